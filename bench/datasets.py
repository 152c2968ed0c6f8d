"""Rows, texts, recordings and indices of files: how fast they are fed, against what people use today.

Every work is a process of its own with one thread for arithmetic; it stays up, waits, and measures itself when it is
asked, one at a time, in rotating order. Peers get the best of their numbers of workers, tried before the first round,
with workers that stay. Before any time is taken all works of a kind must give the same content in an epoch: rows,
token numbers and labels, or log-mels bit by bit. The real data are those of ../shared/data.

    python bench/datasets.py [--rounds 11] [--seconds 1.0] [--only tables,texts,recordings,index] [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from measure import RESULTS, ROOT, interleave, machine_facts, summary, write_result
from works import ONE_THREAD, Feed, Work, answer_of, by_workers, folder_samples, serve

sys.path[:] = [place for place in sys.path if Path(place).resolve() != ROOT / "bench"]  # ``datasets`` is a peer's name

DATA = ROOT.parent / "shared" / "data"
ADULT = DATA / "tabular" / "adult" / "adult.data"
BANKING = DATA / "text" / "banking77" / "train.csv"
DIGITS = DATA / "spoken-digits"
NEEDED = {"tables": ADULT, "texts": BANKING, "recordings": DIGITS}

ROWS_A_BATCH, TEXTS_A_BATCH, CLIPS_A_BATCH, NAMES_A_BATCH = 256, 32, 32, 256
RATE_HZ, NUM_MELS = 8000, 64
PEERS = ("pandas", "datasets", "tokenizers", "transformers", "soundfile", "torchcodec")
BARS = {"1e7 names, resident bytes": 1e9, "1e7 names, opened in s": 0.1}


# Tables


def adult() -> Any:
    import torchkeep as tk
    from torchkeep.data.frames import Form

    return tk.Table(ADULT, target="Y", form=Form(is_csv=True))


def tables_torchkeep(folder: Path) -> dict[str, Feed]:
    import torchkeep as tk

    loader = tk.Loader(adult(), ROWS_A_BATCH, shuffle=True)
    return {loader.plan.backend: loader.__iter__}


def tables_expert(folder: Path) -> dict[str, Feed]:
    import torch

    columns = adult().columns

    def epoch() -> Iterator[dict[str, Any]]:
        order = torch.randperm(len(columns["label"]))
        for i in range(0, len(order), ROWS_A_BATCH):
            rows = order[i : i + ROWS_A_BATCH]
            yield {name: torch.index_select(column, 0, rows) for name, column in columns.items()}

    return {"index_select": epoch}


def tables_dataloader(folder: Path) -> dict[str, Feed]:
    return by_workers(Rows(adult().columns), ROWS_A_BATCH, None, (0, 2))


class Rows:
    """Tensors in memory, a row at a time: the Dataset that most people write."""

    def __init__(self, columns: dict[str, Any]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def tables_pandas(folder: Path) -> dict[str, Feed]:
    import numpy as np
    import pandas as pd
    import torch

    columns = adult().columns
    numbers = [f"n{i}" for i in range(columns["numbers"].shape[1])]
    categories = [f"c{i}" for i in range(columns["categories"].shape[1])]
    parts = [(numbers, "numbers"), (categories, "categories"), (["label"], "label")]
    frame = pd.concat([pd.DataFrame(columns[key].numpy(), columns=names) for names, key in parts], axis=1)

    def epoch() -> Iterator[dict[str, Any]]:
        order = np.random.permutation(len(frame))
        for i in range(0, len(order), ROWS_A_BATCH):
            rows = frame.iloc[order[i : i + ROWS_A_BATCH]]
            yield {
                "numbers": torch.tensor(rows[numbers].to_numpy()),
                "categories": torch.tensor(rows[categories].to_numpy()),
                "label": torch.tensor(rows["label"].to_numpy()),
            }

    return {"iloc": epoch}


def rows_of(batch: dict[str, Any]) -> dict[str, float]:
    label = batch["label"]
    return {
        "units": len(label),
        "categories × label": int((batch["categories"].sum(1) * (label + 1)).sum()),
        "numbers × label": float((batch["numbers"].double().sum(1) * (label + 1)).sum()),
    }


# Texts


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of at most 8,000 tokens, of the training texts, as folder/tokenizer.json."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[PAD]", "[UNK]"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(banking()["text"].to_pylist(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def banking() -> Any:
    import pyarrow.csv as pcsv

    return pcsv.read_csv(BANKING, parse_options=pcsv.ParseOptions(newlines_in_values=True))


def texts_torchkeep(folder: Path, **options: Any) -> dict[str, Feed]:
    import torchkeep as tk

    texts = tk.TextTable(BANKING, target="category", tokenizer=str(folder / "tokenizer.json"))
    loader = tk.Loader(texts, TEXTS_A_BATCH, shuffle=True, **options)
    return {f"{loader.plan.workers} {loader.plan.backend}": loader.__iter__}


def texts_torchkeep_first(folder: Path) -> dict[str, Feed]:
    """Each epoch is the first: no token is made yet. The start of the threads is in it."""
    import torchkeep as tk

    texts = tk.TextTable(BANKING, target="category", tokenizer=str(folder / "tokenizer.json"))

    def epoch() -> Iterator[dict[str, Any]]:
        loader = tk.Loader(texts.with_tokenizer(texts.tokenizer), TEXTS_A_BATCH, shuffle=True)
        yield from loader
        loader.close()

    return {"first": epoch}


def hub_texts(folder: Path) -> Any:
    """The same file as a Hugging Face dataset, the category as its number."""
    from datasets import Dataset

    held = Dataset.from_csv(str(BANKING), cache_dir=str(folder / "hub"))
    number_of = {name: number for number, name in enumerate(sorted(set(held["category"])))}
    return held.add_column("label", [number_of[name] for name in held["category"]])


def texts_datasets(folder: Path) -> dict[str, Feed]:
    """``set_transform`` with the Rust tokenizer itself and lean padding: the least that can be written."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    held = hub_texts(folder)

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": [row.ids for row in tokenizer.encode_batch_fast(rows["text"])], "label": rows["label"]}

    held.set_transform(transform)
    feeds = by_workers(held, TEXTS_A_BATCH, pad, (0, 1, 2))
    return {**feeds, "0 workers, the tokenizer's threads": with_tokenizer_threads(feeds["0 workers"])}


def texts_datasets_transformers(folder: Path) -> dict[str, Feed]:
    """``set_transform`` with the fast tokenizer of transformers and ``DataCollatorWithPadding``: as the docs write."""
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]", unk_token="[UNK]"
    )
    held = hub_texts(folder)

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        made = tokenizer(rows["text"], truncation=True, max_length=512, return_token_type_ids=False)
        return {**made, "label": rows["label"]}

    held.set_transform(transform)
    collator = DataCollatorWithPadding(tokenizer)

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(collator(samples))
        return {**batch, "label": batch.pop("labels")}

    return by_workers(held, TEXTS_A_BATCH, collate, (0, 1, 2))


def texts_datasets_mapped(folder: Path) -> dict[str, Feed]:
    """``map`` makes the tokens once, before the first round; an epoch only reads and pads them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    held = hub_texts(folder)
    made = held.map(
        lambda rows: {"input_ids": [row.ids for row in tokenizer.encode_batch_fast(rows["text"])]},
        batched=True,
        remove_columns=["text", "category"],
        new_fingerprint=f"mapped{os.getpid()}",
    )
    return by_workers(made, TEXTS_A_BATCH, pad, (0, 1, 2))


def pad(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What DataCollatorWithPadding does, without its generality."""
    import torch

    longest = max(len(sample["input_ids"]) for sample in samples)
    rows = [sample["input_ids"] + [0] * (longest - len(sample["input_ids"])) for sample in samples]
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    label = torch.tensor([sample["label"] for sample in samples])
    return {"input_ids": torch.tensor(rows), "attention_mask": mask, "label": label}


def with_tokenizer_threads(feed: Feed) -> Feed:
    def epoch() -> Iterator[dict[str, Any]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        try:
            yield from feed()
        finally:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"

    return epoch


def tokens_of(batch: dict[str, Any]) -> dict[str, float]:
    real = batch["input_ids"] * batch["attention_mask"]
    return {
        "units": int(batch["attention_mask"].sum()),
        "texts": len(real),
        "sum of ids": int(real.sum()),
        "ids × label": int((real.sum(1) * (batch["label"] + 1)).sum()),
    }


# Recordings


def recordings_torchkeep(folder: Path, **options: Any) -> dict[str, Feed]:
    import torchkeep as tk

    clips = tk.AudioFolder(DIGITS, label_pattern=r"^(?P<label>\d)_", seconds=1.0, num_mels=NUM_MELS)
    loader = tk.Loader(clips, CLIPS_A_BATCH, shuffle=True, **options)
    return {f"{loader.plan.workers} {loader.plan.backend}": loader.__iter__}


def recordings_datasets(folder: Path, features: Callable[[Any], Any]) -> dict[str, Feed]:
    """An audio column that is not decoded by ``datasets`` (that needs torchcodec and FFmpeg), but by soundfile."""
    from datasets import Audio, Dataset

    paths = digit_paths()
    held = Dataset.from_dict({"audio": [str(path) for path in paths], "label": [int(path.name[0]) for path in paths]})
    held = held.cast_column("audio", Audio(decode=False))

    def transform(rows: dict[str, Any]) -> dict[str, Any]:
        return {"audio": [features(one_second(audio["path"])) for audio in rows["audio"]], "label": rows["label"]}

    held.set_transform(transform)
    return by_workers(held, CLIPS_A_BATCH, None, (0, 1, 2))


def recordings_by_hand(folder: Path) -> dict[str, Feed]:
    return by_workers(Digits(digit_paths(), stft_mel()), CLIPS_A_BATCH, None, (0, 1, 2))


class Digits:
    """The Dataset that people write: soundfile and torch.stft, a clip at a time."""

    def __init__(self, paths: list[Path], features: Callable[[Any], Any]):
        self.paths, self.features = paths, features

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        return {"audio": self.features(one_second(str(path))), "label": int(path.name[0])}


def digit_paths() -> list[Path]:
    return sorted(DIGITS.glob("*.wav"))


def one_second(path: str) -> Any:
    """(8000,) float32: cut about the middle, or ending in silence."""
    import numpy as np
    import soundfile

    wave, _ = soundfile.read(path, dtype="float32")
    spare = len(wave) - RATE_HZ
    return wave[spare // 2 : spare // 2 + RATE_HZ] if spare > 0 else np.pad(wave, (0, -spare))


def same_mel(wave: Any) -> Any:
    import torch

    from torchkeep.data.mel import log_mel

    return torch.from_numpy(log_mel(wave[None], RATE_HZ, NUM_MELS)[0])


def stft_mel() -> Callable[[Any], Any]:
    """The same log-mel by ``torch.stft``, to rounding."""
    import torch

    from torchkeep.data.mel import POWER_FLOOR, mel_filters

    filters = torch.from_numpy(mel_filters(NUM_MELS, 256, RATE_HZ, 20.0, RATE_HZ / 2).copy())
    window = torch.hann_window(200)

    def features(wave: Any) -> Any:
        spectrum = torch.stft(torch.from_numpy(wave), 256, 80, 200, window, pad_mode="constant", return_complex=True)
        return (filters @ spectrum.abs().square()).clamp_min(POWER_FLOOR).log()

    return features


def clips_of(batch: dict[str, Any]) -> dict[str, float]:
    import xxhash

    sums = [xxhash.xxh3_64_intdigest(clip.contiguous().numpy()) >> 16 for clip in batch["audio"]]
    return {
        "units": len(sums),
        "bits × label": sum(one * (label + 1) for one, label in zip(sums, batch["label"].tolist(), strict=True)),
        "log-mels": float(batch["audio"].double().sum()),
    }


# What is measured


KINDS: dict[str, dict[str, Any]] = {
    "tables": {
        "unit": "rows/s",
        "content": rows_of,
        "works": {
            "torchkeep": tables_torchkeep,
            "torchkeep again (A/A)": tables_torchkeep,
            "expert: index_select": tables_expert,
            "DataLoader over rows": tables_dataloader,
            "pandas iloc": tables_pandas,
        },
    },
    "texts": {
        "unit": "tokens/s",
        "content": tokens_of,
        "works": {
            "torchkeep": texts_torchkeep,
            "torchkeep again (A/A)": texts_torchkeep,
            "torchkeep, no buckets": partial(texts_torchkeep, buckets=False),
            "torchkeep, workers=0": partial(texts_torchkeep, workers=0),
            "torchkeep, first epochs only": texts_torchkeep_first,
            "datasets, set_transform": texts_datasets,
            "datasets, transformers' tokenizer": texts_datasets_transformers,
            "datasets, mapped before": texts_datasets_mapped,
        },
    },
    "recordings": {
        "unit": "clips/s",
        "content": clips_of,
        "works": {
            "torchkeep": recordings_torchkeep,
            "torchkeep again (A/A)": recordings_torchkeep,
            "torchkeep, workers=0": partial(recordings_torchkeep, workers=0),
            "torchkeep, BLAS threads as they come": recordings_torchkeep,
            "datasets, the same log_mel": lambda folder: recordings_datasets(folder, same_mel),
            "datasets, torch.stft": lambda folder: recordings_datasets(folder, stft_mel()),
            "by hand, torch.stft": recordings_by_hand,
        },
    },
}
OTHER_ROUNDING = {"datasets, torch.stft", "by hand, torch.stft"}
AS_THEY_COME = "torchkeep, BLAS threads as they come"


def begun(kind: str, name: str, folder: Path) -> Work:
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"),
             "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "XDG_CACHE_HOME": str(folder / "cache")}  # fmt: skip
    return Work(__file__, [kind, name, str(folder)], {**quiet, **({} if name == AS_THEY_COME else ONE_THREAD)})


def feed_rates(kind: str, rounds: int, seconds: float, folder: Path) -> dict[str, Any]:
    """All works of a kind, checked against one another, then timed in turn."""
    if kind == "texts":
        make_tokenizer(folder)
    works = {name: begun(kind, name, folder) for name in KINDS[kind]["works"] if not lacks(kind, name)}
    try:
        check_equal(kind, works)
        rates = interleave({name: partial(work.rate, seconds) for name, work in works.items()}, rounds)
    finally:
        for work in works.values():
            work.close()
    ours = rates["torchkeep"]
    ratios = {name: [mine / its for mine, its in zip(ours, found, strict=True)] for name, found in rates.items()}
    return {
        "unit": KINDS[kind]["unit"],
        "left_out": {name: why for name in KINDS[kind]["works"] if (why := lacks(kind, name))},
        "content": works["torchkeep"].facts["content"],
        "ways": {name: {key: work.facts[key] for key in ("way", "tried_s")} for name, work in works.items()},
        "rates": {name: summary(found) for name, found in rates.items()},
        "torchkeep_to_it": {name: summary(found) for name, found in ratios.items() if name != "torchkeep"},
    }


def lacks(kind: str, work: str) -> str:
    """The package that a work needs and that is missing."""
    needed = [name for name in ("pandas", "datasets") if name in work]
    needed += ["transformers"] * ("transformers" in work) + ["tokenizers"] * (kind == "texts")
    needed += ["soundfile"] * (kind == "recordings")
    return next((name for name in needed if importlib.util.find_spec(name) is None), "")


def check_equal(kind: str, works: dict[str, Work]) -> None:
    first = works["torchkeep"].facts["content"]
    for name, work in works.items():
        for key, value in work.facts["content"].items():
            is_bits = key.startswith("bits")
            if is_bits and name in OTHER_ROUNDING:
                continue
            near = 0 if isinstance(value, int) else 1e-4 if name in OTHER_ROUNDING else 1e-9
            if abs(value - first[key]) > near * abs(first[key]):
                sys.exit(f"{kind}: {name!r} gives other content: {key} is {value}, not {first[key]}")


# Indices of files


def index_measures(count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """An index of names made in memory: what it takes to build, save, open, hold and use."""
    built = in_process("index_build", count, folder)
    opened = in_process("index_open", count, folder, rounds)
    used = in_process("index_use", count, folder)
    shutil.rmtree(folder / f"listing-{count}")
    return {"build": built, "open": {name: summary(found) for name, found in opened.items()}, "use": used}


def in_process(work: str, *arguments: object) -> Any:
    return answer_of(__file__, ["index", work, *map(str, arguments)], {})


def memory_bytes() -> tuple[int, int]:
    """Resident now, and at most so far, where the system says it in /proc; zeros elsewhere."""
    status = Path("/proc/self/status")
    rows = dict(line.partition(":")[::2] for line in (status.read_text().splitlines() if status.exists() else ()))
    held, peak = (int(rows.get(name, "0 kB").split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return held, peak


def name_of(number: int) -> str:
    return f"class_{number // 1000:05d}/img_{number:08d}.jpg"


def index_build(count: int, folder: Path) -> dict[str, float]:
    import numpy as np

    from torchkeep.data.index import Listing, Names

    before, _ = memory_bytes()
    began = time.perf_counter()
    names = Names.of(map(name_of, range(count)))
    built_s = time.perf_counter() - began
    sizes, labels = np.full(count, 1000, np.int64), (np.arange(count) // 1000).astype(np.int32)
    classes = tuple(f"class_{number:05d}" for number in range(-(-count // 1000)))
    folders = Names.of(["", *(f"{name}/" for name in classes)])
    listing = Listing(folder, names, sizes, labels, classes, folders, np.zeros(len(folders), np.int64))
    held, peak = memory_bytes()
    began = time.perf_counter()
    listing.save(folder / f"listing-{count}")
    saved_s = time.perf_counter() - began
    size = sum(path.stat().st_size for path in (folder / f"listing-{count}").iterdir())
    return {"build_s": built_s, "save_s": saved_s, "resident_bytes": held - before, "peak_bytes": peak - before,
            "file_bytes": size}  # fmt: skip


def index_open(count: int, folder: Path, rounds: int) -> dict[str, list[float]]:
    from torchkeep.data.index import Listing

    place = folder / f"listing-{count}"

    def opened_s() -> float:
        began = time.perf_counter()
        assert Listing.open(place) is not None
        return time.perf_counter() - began

    def cold_s() -> float:
        forget(place)
        return opened_s()

    def first_name_s() -> float:
        forget(place)
        listing = Listing.open(place)
        assert listing is not None
        began = time.perf_counter()
        assert listing.names[count // 2] == name_of(count // 2)
        return time.perf_counter() - began

    opened_s()
    return interleave({"warm_s": opened_s, "cold_s": cold_s, "first_name_cold_s": first_name_s}, rounds)


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache, where it has such a call."""
    for path in folder.iterdir() if hasattr(os, "posix_fadvise") else ():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def index_use(count: int, folder: Path) -> dict[str, float]:
    """A fresh process that opens an index, takes keyed shuffled batches of names, and then touches all of it."""
    from torchkeep.chance import ChanceKey
    from torchkeep.data.index import Listing, bytes_of_array
    from torchkeep.data.order import shuffled_order

    before, _ = memory_bytes()
    listing = Listing.open(folder / f"listing-{count}")
    assert listing is not None
    opened, _ = memory_bytes()
    order = shuffled_order(ChanceKey(), count)
    took_s = []
    for start in range(0, 40 * NAMES_A_BATCH, NAMES_A_BATCH):
        began = time.perf_counter()
        names = [listing.names[index] for index in order(start, start + NAMES_A_BATCH).tolist()]
        took_s.append(time.perf_counter() - began)
        assert len(names) == NAMES_A_BATCH
    in_use, _ = memory_bytes()
    for numbers in (listing.names.blob, listing.names.offsets, listing.sizes_bytes, listing.labels):
        assert sum(bytes_of_array(numbers)[:: 1 << 10]) >= 0
    whole, peak = memory_bytes()
    return {
        "first_batch_s": took_s[0],
        "batch_s": statistics.median(took_s[1:]),
        "opened_bytes": opened - before,
        "after_40_batches_bytes": in_use - before,
        "all_touched_bytes": whole - before,
        "peak_bytes": peak - before,
    }


def list_of_paths(count: int, folder: Path) -> dict[str, float]:
    """What ImageFolder holds: a list of (path, label)."""
    import torchkeep.data.index  # noqa: F401  # the same imports as the others

    before, _ = memory_bytes()
    began = time.perf_counter()
    samples = [(f"/data/{name_of(number)}", number // 1000) for number in range(count)]
    built_s = time.perf_counter() - began
    held, peak = memory_bytes()
    assert len(samples) == count
    return {"build_s": built_s, "resident_bytes": held - before, "peak_bytes": peak - before}


def folder_measures(count: int, rounds: int, folder: Path) -> dict[str, Any]:
    """A folder of empty files: listed the first time, from the saved listing, and as ImageFolder does it."""
    root = folder / "files"
    for number in range(count):
        path = root / name_of(number)
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.touch()
    time.sleep(2.5)  # a folder that has just changed is not kept
    found = in_process("folder_times", rounds, folder)
    shutil.rmtree(root)
    return {"files": count, "seconds": {name: summary(values) for name, values in found.items()}}


def folder_times(rounds: int, folder: Path) -> dict[str, list[float]]:
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    from torchkeep.data.index import Layout, list_folder

    layout = Layout((".jpg",), "images")

    def listed_s() -> float:
        began = time.perf_counter()
        list_folder(folder / "files", layout)
        return time.perf_counter() - began

    def first_s() -> float:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        return listed_s()

    first_s()
    return interleave(
        {
            "first time, and saved": first_s,
            "from the saved listing": lambda: (list_folder(folder / "files", layout), listed_s())[1],
            "as ImageFolder: os.walk, tuples": partial(image_folder_s, folder / "files"),
        },
        rounds,
    )


def image_folder_s(root: Path) -> float:
    began = time.perf_counter()
    assert folder_samples(root)
    return time.perf_counter() - began


# The table


def print_feeds(kind: str, result: dict[str, Any]) -> None:
    print(f"\n{kind:<40} {result['unit']:>12} {'MAD':>10}  torchkeep is  (95 %)")
    for name, row in result["rates"].items():
        ratio = result["torchkeep_to_it"].get(name)
        said = f"{ratio['median']:6.2f} x  ({ratio['median_95'][0]:.2f}-{ratio['median_95'][1]:.2f})" if ratio else ""
        print(f"{name:<40} {row['median']:>12,.0f} {row['mad']:>10,.0f}  {said:<24} {result['ways'][name]['way']}")
    for name, package in result["left_out"].items():
        print(f"{name:<40} left out: the package {package} is missing")


def print_index(result: dict[str, Any]) -> None:
    print(f"\n{'index of files':<16} {'build s':>8} {'save s':>8} {'build MB':>9} {'file MB':>8} {'open ms':>8} "
          f"{'cold ms':>8} {'batch µs':>9} {'used MB':>8} {'all MB':>8}")  # fmt: skip
    for count, row in result["sizes"].items():
        built, opened, used = row["build"], row["open"], row["use"]
        print(f"{int(count):<16,} {built['build_s']:>8.2f} {built['save_s']:>8.2f} {built['peak_bytes'] / 1e6:>9.0f} "
              f"{built['file_bytes'] / 1e6:>8.0f} {opened['warm_s']['median'] * 1e3:>8.2f} "
              f"{opened['cold_s']['median'] * 1e3:>8.2f} {used['batch_s'] * 1e6:>9.0f} "
              f"{used['after_40_batches_bytes'] / 1e6:>8.0f} {used['all_touched_bytes'] / 1e6:>8.0f}")  # fmt: skip
    plain = result["list_of_paths"]
    print(f"a list of (path, label), {plain['count']:,}: {plain['build_s']:.2f} s, "
          f"{plain['resident_bytes'] / 1e6:.0f} MB")  # fmt: skip
    for name, row in result["folder"]["seconds"].items():
        print(f"{result['folder']['files']:,} files, {name:<32} {row['median']:>8.4f} s  (MAD {row['mad']:.4f})")


def measure(chosen: argparse.Namespace, kinds: list[str]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for kind in kinds:
        with tempfile.TemporaryDirectory(prefix="torchkeep-bench-") as name:
            folder = Path(name)
            if kind != "index":
                result[kind] = feed_rates(kind, chosen.rounds, chosen.seconds, folder)
                print_feeds(kind, result[kind])
                continue
            sizes = (10**5, 10**6) if chosen.quick else (10**5, 10**6, 10**7)
            listed = {"count": 10**6, **in_process("list_of_paths", 10**6, folder)}
            result[kind] = {
                "sizes": {str(count): index_measures(count, chosen.rounds, folder) for count in sizes},
                "list_of_paths": listed,
                "folder": folder_measures(60_000 if chosen.quick else 100_000, chosen.rounds, folder),
            }
            print_index(result[kind])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each work in each round")
    parser.add_argument("--only", default=",".join([*KINDS, "index"]))
    parser.add_argument("--quick", action="store_true", help="three short rounds, small indices, nothing is written")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.work:
        run_work(*chosen.work)
        return
    if chosen.quick:
        chosen.rounds, chosen.seconds = min(chosen.rounds, 3), min(chosen.seconds, 0.3)
    kinds = []
    for kind in chosen.only.split(","):
        if kind in NEEDED and not NEEDED[kind].exists():
            print(f"{kind}: left out, because {NEEDED[kind]} is missing")
        elif kind in KINDS and lacks(kind, ""):
            print(f"{kind}: left out, because the package {lacks(kind, '')} is missing")
        else:
            kinds.append(kind)
    facts = machine_facts()
    print(
        f"{facts['cpu']}, {facts['cores_usable']} cores, load {facts['load_1min']}, torch {facts['versions']['torch']}"
    )
    result = measure(chosen, kinds)
    is_whole = not chosen.quick and kinds == [*KINDS, "index"]
    if is_whole:
        peers = {name: metadata.version(name) for name in PEERS if importlib.util.find_spec(name)}
        path = write_result("datasets", {"seconds": chosen.seconds, "peers": peers, "bars": BARS, **result})
        print(f"\nwritten to {path.relative_to(ROOT)}")
    else:
        print(f"\nnothing is written to {RESULTS.relative_to(ROOT)}: this was not the whole of it")


def run_work(kind: str, work: str, *arguments: str) -> None:
    if kind != "index":
        serve(partial(KINDS[kind]["works"][work], Path(arguments[0])), KINDS[kind]["content"])
        return
    made = [Path(value) if "/" in value or "\\" in value else int(value) for value in arguments]
    print(json.dumps(globals()[work](*made)))


if __name__ == "__main__":
    main()
