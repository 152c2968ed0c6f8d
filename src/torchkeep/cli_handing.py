"""The command line's verbs that hand a model on; ``cli`` takes them up."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from .errors import EXIT_BAD_ROWS, EXIT_FAILED, SettingsError

_TRUST = click.option("--trust-code", metavar="HASH", help="Run the code that is named, if it has this sha256.")
_BASE = click.option("--base", metavar="WEIGHTS", help="What a delta package was made against.")


def _existing(context: click.Context, option: click.Parameter, device: str | None) -> str | None:
    if device is not None:
        from .training.device import existing_device

        existing_device(device, f"--device {device}")
    return device


_DEVICE = click.option("--device", metavar="NAME", callback=_existing,
                       help="cpu, cuda, cuda:1, mps; the best there is without it.")  # fmt: skip


@click.command()
@click.argument("source", type=click.Path())
@click.argument("inputs", nargs=-1, required=True)
@click.option("-o", "--output", type=click.Path(dir_okay=False),
              help="A .csv, .jsonl or .parquet file: a job that was ended goes on; else the terminal.")  # fmt: skip
@click.option("--format", "form", type=click.Choice(["csv", "jsonl", "parquet"]),
              help="csv without it, or by the file's ending.")  # fmt: skip
@click.option("--top", type=click.IntRange(1), default=1, metavar="K", help="Say the K likeliest classes.")
@click.option("--batch-size", type=click.IntRange(1), metavar="N", help="Inputs at once; as in training without it.")
@click.option("--workers", type=click.IntRange(0), metavar="N", help="Threads that read; one a core without it.")
@_DEVICE
@_BASE
@_TRUST
def predict(
    source: str, inputs: tuple[str, ...], output: str | None, form: Any, top: int, batch_size: int | None,
    workers: int | None, device: str | None, base: str | None, trust_code: str | None,
) -> None:  # fmt: skip
    """Predict with SOURCE (a package, a run's folder, hf:USER/NAME): a row for each file or row of a table, in order.

    INPUTS are files, folders and tables; - is standard input: names of files, one a line, or texts, or a CSV.
    Exit code 3: some inputs could not be read; their rows say why.
    """
    from . import handing
    from .share import rows
    from .share.predict import Predictor

    ending = Path(output or "").suffix.lower()
    form = form or {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".pq": "parquet"}.get(ending, "csv")
    if output is not None and not Path(output).absolute().parent.is_dir():
        where = f"-o {output}"
        raise SettingsError("the folder of the output is missing", where=where, expected="a folder that exists")
    if output is None and form == "parquet":
        raise SettingsError("Parquet needs a file", where="--format parquet", expected="-o NAME.parquet")
    asked = handing.opened(source, base=base, trust_code=trust_code, device=device)
    predictor = Predictor(asked, batch_size=batch_size, top=top, workers="auto" if workers is None else workers)
    found, paths, given = rows.inputs_of(asked.contract.reader, inputs, lambda: sys.stdin.buffer.read())
    is_shown = sys.stderr.isatty() and (output is not None or not sys.stdout.isatty())
    seen = _progress(len(paths) if getattr(found, "are_files", False) else None, is_shown)
    num_bad = 0
    if output is not None:
        job = rows.job_of(predictor, paths, given)
        num_bad = rows.write_rows(predictor, found, Path(output), form, job, seen, partial(click.echo, err=True))
    else:
        for lines, count, bad in rows.stream_rows(predictor, found, form):
            click.echo(lines, nl=False)
            seen(count)
            num_bad += bad
    seen(0)
    if num_bad:
        click.echo(f"{num_bad} inputs could not be read; their rows say why", err=True)
        click.get_current_context().exit(EXIT_BAD_ROWS)


def _progress(total: int | None, is_shown: bool) -> Callable[[int], None]:
    """Counts inputs on one line of the terminal; 0 more ends it."""
    done = 0

    def seen(count: int) -> None:
        nonlocal done
        done += count
        of = f" of {total:,}" if total is not None else ""
        if is_shown:
            click.echo(f"\r{done:,}{of} inputs" + "\n" * (not count), nl=False, err=True)

    return seen


@click.command()
@click.argument("source", type=click.Path())
def evaluate(source: str) -> None:
    """Part: evaluate."""


@click.command()
@click.argument("source", type=click.Path())
def export(source: str) -> None:
    """Part: export."""


@click.command()
@click.argument("source", type=click.Path())
def unpack(source: str) -> None:
    """Part: export."""


@click.command()
@click.argument("source", type=click.Path())
@click.option("--run-dir", type=click.Path(), help="The new run's folder; runs/NAME-reproduced without it.")
@click.option("--data", multiple=True, metavar="KEY=PATH", help="Where data or weights lie now: data.train=PATH.")
@click.option("--allow-change", multiple=True, type=click.Choice(["data"]), help="Go on although this has changed.")
@_TRUST
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document, and nothing of the training.")
def reproduce(
    source: str, run_dir: str | None, data: tuple[str, ...], allow_change: tuple[str, ...], trust_code: str | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Train SOURCE (a run's folder, a package, hf:USER/NAME) again in a fresh folder, and compare every bit.

    Exit code 1 where it differs: the first step and tensor are named, and what else is not as it was.
    """
    from . import handing
    from .tensors import to_json
    from .watch.console import Console

    found = handing.reproduce(source, run_dir=run_dir, trust_code=trust_code, data=data, allow_change=allow_change,
                              quiet=as_json)  # fmt: skip
    if as_json:
        click.echo(to_json(found.to_json(), indent=True).decode(), nl=False)
    else:
        click.echo()
        Console().table(["compared", "then", "now"], found.rows())
        click.echo(found.verdict)
    if not found.is_same:
        click.get_current_context().exit(EXIT_FAILED)


@click.command()
@click.argument("source", type=click.Path())
def push(source: str) -> None:
    """Part: sharing."""


@click.command()
@click.argument("run", type=click.Path())
@click.option("-o", "--output", type=click.Path(), help="The package's path; NAME.tkp without it.")
@click.option("--checkpoint", default="best", metavar="best|last|STEP", show_default=True, help="Which one.")
@click.option("--delta", is_flag=False, flag_value="", default=None, metavar="[WEIGHTS]",
              help="Leave out what is equal to the weights that the run began with, or to these.")  # fmt: skip
@click.option("--folder", is_flag=True, help="Write a folder in place of a file.")
@_TRUST
def package(
    run: str, output: str | None, checkpoint: str, delta: str | None, folder: bool, trust_code: str | None
) -> None:
    """Write RUN's model as one file that loads without its code: form, parameters, preprocessing, classes, origin."""
    from . import handing

    if checkpoint not in ("best", "last") and not checkpoint.isdecimal():
        raise SettingsError("there is no such checkpoint", where=f"--checkpoint {checkpoint}", got=repr(checkpoint),
                            expected="best, last, or a step as torchkeep checkpoints lists them")  # fmt: skip
    which: Any = int(checkpoint) if checkpoint.isdecimal() else checkpoint
    path = handing.package(run, output, checkpoint=which, delta=delta if delta else delta is not None, folder=folder,
                           trust_code=trust_code)  # fmt: skip
    show_package(handing.described(path))


def show_package(said: dict[str, Any]) -> None:
    """What a package is, in a table."""
    from .watch.console import Console, format_number

    form, labels, origin = said["architecture"], said["labels"], said.get("provenance", {})
    num_bytes = said["members"]["parameters.safetensors"]["bytes"]
    numbers = sum(math.prod(shape) for _, shape in said["parameters"].values())
    metrics = said.get("metrics", {})
    measured = metrics.get("values", metrics)
    calibration, base = labels.get("calibration", {}), said.get("base")
    classes: list[str] = next(iter(labels["classes"].values()), [])
    shown = ", ".join(classes[:8]) + (f" and {len(classes) - 8} more" if len(classes) > 8 else "")
    rows = [
        ("name", str(said["name"])),
        ("form", f"{form['kind']} {form.get('name') or form.get('class_name', '')}".strip()),
        ("parameters", f"{numbers:,} in {len(said['parameters']):,} tensors, {num_bytes / 1e6:,.1f} MB"),
        ("inputs", inputs_text(said["preprocess"]["schema"])),
        ("classes", shown or "none: numbers"),
        ("metrics", ", ".join(f"{key} {format_number(value)}" for key, value in measured.items()) or "none"),
        ("calibration", calibration_text(calibration)),
        ("origin", origin_text(origin)),
        ("code", "carried, runs only by its hash" if form["kind"] == "code" else "none"),
        ("base", f"{base['source']}, {len(base['tensors']):,} tensors of it" if base else "none"),
        ("made by", f"torchkeep {said['torchkeep']}, format {said['format']}"),
        ("sha256", said["identity"]),
        ("path", said["path"]),
    ]  # fmt: skip
    Console().table(["package", ""], rows)


def inputs_text(schema: dict[str, Any]) -> str:
    """The inputs of a schema with their shapes, in words."""
    rows = {
        key: field for key, field in schema["fields"].items() if not field["is_target"] and field["kind"] != "object"
    }
    shapes = {key: "×".join("…" if size is None else str(size) for size in field["shape"] or ())
              for key, field in rows.items()}  # fmt: skip
    return ", ".join(f"{key}: {field['kind']} {shapes[key]}".strip() for key, field in rows.items())


def calibration_text(calibration: dict[str, Any]) -> str:
    """How probabilities were made true, in words."""
    if not calibration:
        return "none: probabilities are as the model says"
    return f"temperature {calibration['temperature']:.3g}, found on {calibration.get('split', 'other data')}"


def origin_text(origin: dict[str, Any]) -> str:
    """Where a package comes from, in words."""
    code = origin.get("code") or {}
    commit = f"commit {str(code['commit'])[:8]}" if code.get("commit") else ""
    seed = f"seed {origin['seed']}" if "seed" in origin else ""
    return ", ".join(filter(None, [seed, commit])) or "not stated"


COMMANDS = (package, predict, evaluate, export, unpack, reproduce, push)
