"""One table, however its file is written; and what is said of a file that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from torchkeep.data.frames import (
    TABLE_SUFFIXES,
    Form,
    as_texts,
    check_ids,
    check_one_kind,
    column_names,
    is_table,
    read_frame,
)
from torchkeep.data.tables import Table
from torchkeep.errors import DataError

LONG = 'lörem,\t"ipsum"\n' * 6000  # 90,000 characters and more
FRAME = pa.table(
    {
        "n": pa.array([1, None, -3], pa.int64()),
        "x": [0.5, 2.0, None],
        "word": ["a, b", 'say "x"', "two\nlines"],
        "long": [LONG.strip() + "!", "ü", None],
        "flag": [True, False, None],
        "day": pa.array(["2026-11-24", None, "1969-01-02"]).cast(pa.timestamp("us")),
    }
)


def as_csv(frame: pa.Table, delimiter: str = ",", end: str = "\n", header: bool = True) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return ""
        text = f"{value:%Y-%m-%d}" if hasattr(value, "year") else str(value)
        return '"' + text.replace('"', '""') + '"' if any(sign in text for sign in ',\t"\n\r') else text

    rows = [[cell(value) for value in row.values()] for row in frame.to_pylist()]
    return "".join(delimiter.join(row) + end for row in ([frame.column_names] if header else []) + rows)


def as_json(frame: pa.Table) -> str:
    import json

    return "".join(json.dumps(row, default=lambda day: f"{day:%Y-%m-%d}") + "\n" for row in frame.to_pylist())


def written(folder: Path, kind: str) -> tuple[Path, Form]:
    name, _, more = kind.partition("+")
    path, form = folder / f"t{name}", Form()
    if name in (".csv", ".tsv", ".data"):
        text = as_csv(
            FRAME, "\t" if name == ".tsv" else ",", "\r\n" if more == "crlf" else "\n", header=more != "no header"
        )
        path.write_bytes(text.encode("utf-8-sig" if more == "bom" else "utf-8"))
        form = Form(name == ".data", tuple(FRAME.column_names) if more == "no header" else ())
    elif name in (".parquet", ".pq"):
        pq.write_table(FRAME, path, row_group_size=2)
    elif name == ".feather":
        feather.write_feather(FRAME, path, compression=more or "uncompressed")
    elif name in (".arrow", ".ipc"):
        make = pa.ipc.new_stream if more == "stream" else pa.ipc.new_file
        with make(path, FRAME.schema) as file:
            file.write_table(FRAME, max_chunksize=2)
    else:
        path.write_text(as_json(FRAME), encoding="utf-8")
    return path, form


KINDS = [
    ".csv", ".csv+bom", ".csv+crlf", ".csv+no header", ".data", ".tsv", ".tsv+no header", ".parquet", ".pq",
    ".arrow", ".arrow+stream", ".ipc", ".feather", ".feather+lz4", ".feather+zstd", ".jsonl", ".ndjson",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_table(tmp_path: Path, kind: str) -> None:
    path, form = written(tmp_path, kind)
    assert is_table(path, form)
    assert column_names(path, form) == FRAME.column_names
    frame = read_frame(path, form)
    if ".jsonl" in kind or ".ndjson" in kind:  # JSON has days in seconds
        frame = frame.set_column(5, "day", frame["day"].cast(pa.timestamp("us")))
    assert frame.to_pydict() == FRAME.to_pydict()
    assert frame.schema.types == FRAME.schema.types
    assert len(frame["long"][0].as_py()) > 80_000


def test_mapped_arrow_is_not_copied(tmp_path: Path) -> None:
    frame = pa.table({"x": pa.array(range(1_000_000), pa.int64())})
    with pa.ipc.new_file(tmp_path / "t.arrow", frame.schema) as file:
        file.write_table(frame)
    before = pa.total_allocated_bytes()
    held = read_frame(tmp_path / "t.arrow")
    assert pa.total_allocated_bytes() - before < 100_000
    assert held["x"][999_999].as_py() == 999_999


def csv(folder: Path, text: str | bytes, name: str = "t.csv") -> Path:
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (["1", " 2 ", "?"], pa.int64(), [1, 2, None]),
        (["1", "NA", "2.5"], pa.float64(), [1.0, None, 2.5]),
        (["1e3", "nan", ".5"], pa.float64(), [1000.0, None, 0.5]),
        (["9223372036854775808", "1"], pa.float64(), [2.0**63, 1.0]),
        (["True", "false", ""], pa.bool_(), [True, False, None]),
        (["true", "yes"], pa.string(), ["true", "yes"]),
        (["1", "2", "x"], pa.string(), ["1", "2", "x"]),
        (["2026-01-02", "2026-01-02 03:04:05"], pa.timestamp("us"), None),
        (["2026-01-02", "02.01.2026"], pa.string(), ["2026-01-02", "02.01.2026"]),
        (["", "NaN"], pa.int64(), [None, None]),
    ],
)
def test_a_column_has_the_type_that_holds_all_its_cells(tmp_path: Path, cells: list, kind: Any, values: Any) -> None:
    frame = read_frame(csv(tmp_path, "x,y\n" + "".join(f"{cell},1\n" for cell in cells)))
    assert frame["x"].type == kind
    if values is not None:
        assert frame["x"].to_pylist() == values


def test_free_text_is_kept_to_the_letter(tmp_path: Path) -> None:
    path = csv(tmp_path, "text,label\n NA ,NA\n1,1\n")
    frame = read_frame(path, Form(text=("text",)))
    assert frame.to_pydict() == {"text": [" NA ", "1"], "label": [None, 1]}


@pytest.mark.parametrize("cell", ["x\n", "x\ny", '\n"', "\n", '"\n"', ""])
@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_last_cell_may_end_as_it_likes(tmp_path: Path, cell: str, end: str) -> None:
    quoted = cell.replace('"', '""')
    frame = read_frame(csv(tmp_path, f'n,text\n1,"{quoted}"{end}'), Form(text=("text",)))
    assert frame.to_pydict() == {"n": [1], "text": [cell]}


def test_a_header_may_have_quotes_lines_and_blanks(tmp_path: Path) -> None:
    frame = read_frame(csv(tmp_path, '"two\nlines", b ,"c,d"\r\n1,2,3\r\n'))
    assert frame.to_pydict() == {"two\nlines": [1], "b": [2], "c,d": [3]}


@pytest.mark.parametrize("block", [1 << 8, 1 << 12])
def test_a_type_that_changes_in_a_later_block_is_seen(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchkeep.data.frames._BLOCK_BYTES", block)
    frame = read_frame(csv(tmp_path, "x,y\n" + "1,a\n" * 2000 + "1.5,b\n" + "word,c\n"))
    assert frame["x"].type == pa.string()
    assert frame.num_rows == 2002
    assert frame["x"][2000:].to_pylist() == ["1.5", "word"]


def test_a_column_that_changes_its_type_halfway_is_named(tmp_path: Path) -> None:
    rows = [f"{i}.5,{i % 2}" for i in range(300)]
    rows[200] = "abc,1"
    path = csv(tmp_path, "x,y\n" + "\n".join(rows) + "\n")
    with pytest.raises(DataError, match="changes its type") as caught:
        Table(path, "y")
    assert "column 'x', row 200" in caught.value.where
    assert "'abc'" in caught.value.got
    assert Table(path, "y", categories=["x"]).encoding.categories == ("x",)
    halves = [f"{i},{i % 2}" for i in range(10)] + [f"{word},1" for word in "abcabcabca"]
    with pytest.raises(DataError, match="changes its type") as caught:
        Table(csv(tmp_path, "x,y\n" + "\n".join(halves) + "\n"), "y")
    assert "row 10" in caught.value.where
    mixed = [f"{word},{i % 2}" for i, word in enumerate("1a2b3c4d5e6f")]  # numbers and words throughout: names
    assert Table(csv(tmp_path, "x,y\n" + "\n".join(mixed) + "\n"), "y").encoding.categories == ("x",)
    words = pa.chunked_array([[f"word {i}" for i in range(100)], [f"{i}" for i in range(100)]])
    check_one_kind(words, "x", "t")  # half of them: these are texts


def test_whole_floats_are_the_same_words_where_cells_are_missing() -> None:
    for values in ([3.0, None, 1.0], [3.0, float("nan"), 1.0]):
        assert as_texts(pa.chunked_array([values])).to_pylist() == ["3", None, "1"]


BAD: dict[str, tuple[str, bytes, str, str]] = {
    "twice": ("t.csv", b"a,b,a\n1,2,3\n", "header", "'a' more than once"),
    "nothing": ("t.csv", b"", "header", "no first line"),
    "no rows": ("t.csv", b"a,b\n", "empty", "0 rows"),
    "latin-1": ("t.csv", "a,b\n1,caf\xe9\n".encode("latin-1"), "cannot be read", "utf-8"),
    "latin-1, far": ("t.csv", b"a,b\n" + b"1,2\n" * 50_000 + b"1,caf\xe9\n", "cannot be read", "UTF8"),
    "latin-1, header": ("t.csv", b"caf\xe9,b\n1,2\n", "cannot be read", "utf-8"),
    "utf-16": ("t.csv", "a,b\n1,2\n".encode("utf-16"), "cannot be read", "utf-8"),
    "ragged": ("t.csv", b"a,b\n1,2\n3\n", "cannot be read", "Expected 2 columns"),
    "open quote": ("t.csv", b'a,b\n1,"2\n3,4\n5,""6""\n', "quote", "3 lines that begins with '2"),
    "open quote, first column": ("t.csv", b'a,b\n"1,2\n3,4\n', "cannot be read", "Expected 2 columns"),
    "parquet of text": ("t.parquet", b"a,b\n1,2\n", "cannot be read", ""),
    "empty parquet": ("t.parquet", b"", "cannot be read", ""),
    "empty arrow": ("t.arrow", b"", "cannot be read", ""),
    "arrow of text": ("t.feather", b"a,b\n1,2\n", "cannot be read", ""),
    "empty jsonl": ("t.jsonl", b"", "cannot be read", ""),
    "json, two types": ("t.jsonl", b'{"a": 1}\n{"a": "x"}\n', "cannot be read", "changed"),
    "json array": ("t.jsonl", b"[1, 2]\n", "cannot be read", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_said(tmp_path: Path, case: str) -> None:
    name, data, what, got = BAD[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=what) as caught:
        read_frame(tmp_path / name)
    assert caught.value.where.startswith(str(tmp_path / name))
    assert got in caught.value.got
    assert caught.value.expected
    if case.startswith("latin-1"):
        assert "iconv" in caught.value.fix


@pytest.mark.parametrize("suffix", TABLE_SUFFIXES)
def test_a_missing_file_is_answered_with_the_nearest(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"people{suffix}").write_bytes(b"")
    with pytest.raises(DataError, match="missing") as caught:
        read_frame(tmp_path / f"peple{suffix}")
    assert f"people{suffix}" in caught.value.fix


@pytest.mark.parametrize("cut", [0.3, 0.9])
@pytest.mark.parametrize("kind", [".parquet", ".arrow", ".arrow+stream", ".feather+lz4"])
def test_a_cut_file_is_not_read(tmp_path: Path, kind: str, cut: float) -> None:
    path, form = written(tmp_path, kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(DataError, match="cannot be read"):
        read_frame(path, form)


def test_names_twice_are_refused_wherever_they_come_from(tmp_path: Path) -> None:
    frame = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pa.ipc.new_file(tmp_path / "t.arrow", frame.schema) as file:
        file.write_table(frame)
    sources: list[tuple[Any, Form]] = [
        (frame, Form()), (tmp_path / "t.arrow", Form()), (csv(tmp_path, "1,2\n"), Form(columns=("a", "a"))),
    ]  # fmt: skip
    for source, form in sources:
        with pytest.raises(DataError, match="header") as caught:
            read_frame(source, form)
        assert "'a' more than once" in caught.value.got


def test_columns_that_do_not_fit_are_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_frame(csv(tmp_path, "1,2\n"), Form(columns=("a",)))
    with pytest.raises(DataError, match="no table"):
        read_frame({"a": [1]})


@pytest.mark.parametrize(
    ("ids", "said"),
    [(["a", "b", "a"], "'a' more than once"), ([1, 2, 2], "2 more than once"), (["a", None], "an empty cell")],
)
def test_ids_name_one_sample_each(ids: list, said: str) -> None:
    check_ids(pa.chunked_array([["x"], ["y"]]), "id", "t")
    for column in (pa.array(ids), pa.chunked_array([ids[:1], ids[1:]])):
        with pytest.raises(DataError, match="does not name one sample") as caught:
            check_ids(column, "id", "t")
        assert caught.value.got == said
