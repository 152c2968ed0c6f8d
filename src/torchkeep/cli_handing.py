"""The command line's verbs that hand a model on; ``cli`` takes them up."""

from __future__ import annotations

import contextlib
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import EXIT_BAD_ROWS, EXIT_FAILED, SettingsError

if TYPE_CHECKING:
    from .share.package import Package

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
    if sys.stderr.isatty():  # a person reads it
        click.echo(f"calibration: {calibration_text(asked.contract.calibration)}", err=True)
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
@click.argument("data", required=False)
@click.option("--html", type=click.Path(dir_okay=False), help="Write one page: classes, calibration, the worst errors.")
@click.option("--workers", type=click.IntRange(0), metavar="N", help="Who reads for a package; one a core without it.")
@_DEVICE
@_BASE
@_TRUST
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON.")
def evaluate(
    source: str, data: str | None, html: str | None, workers: int | None, device: str | None, base: str | None,
    trust_code: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Measure SOURCE (a package, a run's folder, hf:USER/NAME) on labelled DATA, with intervals of 95 %.

    Without DATA a run is measured on its test split, else its validation split.
    """
    from . import handing
    from .files import write_durable
    from .share.report import interval_text, report_page, unanswered_text
    from .watch.console import Console, format_number

    if html and not Path(html).absolute().parent.is_dir():
        where = f"--html {html}"
        raise SettingsError("the folder of the page is missing", where=where, expected="a folder that exists")
    found = handing.evaluation(source, data, workers=workers, base=base, trust_code=trust_code, device=device)
    if html and not found.measured.metrics:
        raise SettingsError("there is nothing to draw of this run", where=f"--html {html}",
                            got="no labels beside the outputs", expected="one target")  # fmt: skip
    if html:
        facts = {"model": source, "data": data or found.split, "samples": f"{found.measured.num_samples:,}"}
        page = report_page(found.measured, f"{Path(source).name}, measured", facts, found.dataset)
        write_durable(Path(html), page.encode())
    if as_json:
        known = {name: row for name, row in found.measured.metrics.items() if row[1] < row[2]}
        more: dict[str, Any] = {"intervals": {name: [low, high] for name, (_, low, high) in known.items()}}
        click.echo(_json_line({**found.values, **more, "unanswered": found.measured.num_unanswered}))
        return
    ends = {f"{found.split}/{name}": row for name, row in found.measured.metrics.items()}
    Console().table(
        ["metric", "value", "95 % interval"],
        [(name, format_number(value), interval_text(*ends[name][1:]) if name in ends else "")
         for name, value in found.values.items()],
    )  # fmt: skip
    if found.measured.num_unanswered:
        name, why = next(iter(found.measured.unanswered.items()))
        click.echo(f"{unanswered_text(found.measured.num_unanswered)} The first is {name}: {why}")
    if html:
        click.echo(f"the report is in {html}")


def _json_line(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


@click.command()
@click.argument("source", type=click.Path())
@click.option("--to", "form", type=click.Choice(["onnx", "torch-export", "transformers"]), required=True)
@click.option("-o", "--output", type=click.Path(), required=True, help="A .onnx or .pt2 file, or a new folder.")
@click.option("--preprocess", is_flag=True, help="Take images as uint8, decoded and resized; normalise them inside.")
@click.option("--probabilities", is_flag=True, help="Give calibrated probabilities in place of logits.")
@click.option("--opset", type=click.IntRange(1), metavar="N", help="ONNX's version; torch's choice without it.")
@_BASE
@_TRUST
def export(
    source: str, form: str, output: str, preprocess: bool, probabilities: bool, opset: int | None, base: str | None,
    trust_code: str | None,
) -> None:  # fmt: skip
    """Write SOURCE (a package, a run's folder, hf:USER/NAME) in a form of others, once it answers as the model does."""
    from .share.export import check_place, export_onnx, export_program, export_transformers
    from .watch.console import Console, format_number

    options: dict[str, Any] = {"preprocess": preprocess, "probabilities": probabilities}
    odd = [name for name, value in {**options, "opset": opset}.items() if value]
    if odd and (form == "transformers" or (form == "torch-export" and opset)):
        raise SettingsError("this form has no such option", where=f"--to {form}", got=", ".join(odd))
    path = Path(output)
    check_place(path, form)
    with _packaged(source, base, trust_code) as held:
        options |= {"identity": held.identity}
        if form == "transformers":
            made = export_transformers(held, path)
        elif form == "onnx":
            made = export_onnx(held.asked, held.selftest[0], path, opset=opset, **options)
        else:
            made = export_program(held.asked, held.selftest[0], path, **options)
    size = made.size_bytes
    rows = [
        ("form", form + (f", opset {made.opset}" if made.opset else "")),
        *(("input", f"{name}: {text}") for name, text in made.inputs.items()),
        *(("output", f"{name}: {text}") for name, text in made.outputs.items()),
        ("difference", f"{format_number(made.largest_difference)} at most from the model's own outputs"),
        ("size", f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size:,} bytes"),
        ("path", str(made.path)),
    ]
    Console().table(["exported", ""], rows)


@contextlib.contextmanager
def _packaged(source: str, base: str | None, trust_code: str | None) -> Iterator[Package]:
    """The package that SOURCE is, or that the run would give."""
    from . import handing
    from .archive import Archive
    from .share.package import ARCHITECTURE, load_package

    if not handing.is_run(source):
        yield load_package(source, base=base, trust_code=trust_code, device="cpu")
        return
    with tempfile.TemporaryDirectory(prefix="torchkeep-", ignore_cleanup_errors=True) as place:
        path = handing.package(source, Path(place, "run.tkp"), trust_code=trust_code)
        own_code = Archive.open(path).json(ARCHITECTURE).get("sha256")  # which opening the run has trusted
        yield load_package(path, trust_code=own_code, device="cpu")


@click.command()
@click.argument("source", type=click.Path())
@click.argument("folder", type=click.Path(file_okay=False), required=False)
@click.option("--state-dict", type=click.Path(dir_okay=False), metavar="OUT.pt", help="Write a plain state dict.")
@click.option("--safetensors", type=click.Path(dir_okay=False), metavar="OUT.safetensors", help="Write the tensors.")
@_BASE
@_TRUST
def unpack(
    source: str, folder: str | None, state_dict: str | None, safetensors: str | None, base: str | None,
    trust_code: str | None,
) -> None:  # fmt: skip
    """Write SOURCE (a package, hf:USER/NAME) as a FOLDER with the same identity, or its tensors alone."""
    from .share import export as forms
    from .share.package import load_package

    wanted = {"state-dict": state_dict, "safetensors": safetensors}
    files = {form: Path(path) for form, path in wanted.items() if path}
    if not (folder or files):
        raise SettingsError("there is nothing to write", where="unpack", expected="FOLDER, or a file that is named")
    for form, path in files.items():
        forms.check_place(path, form)
    if folder:
        click.echo(forms.unpack(source, Path(folder)))
    if files:
        model = load_package(source, base=base, trust_code=trust_code, device="cpu").model
        for form, path in files.items():
            click.echo(forms.write_tensors(model, path, form))


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
@click.argument("package", type=click.Path())
@click.argument("target", metavar="hf:USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository for your eyes only.")
@click.option("--message", metavar="M", default="", help="Of the commit; Add NAME.tkp without it.")
def push(package: str, target: str, private: bool, message: str) -> None:
    """Put PACKAGE and its model card on the Hugging Face hub, where hf:USER/NAME loads it; hf auth login comes first.

    The package goes as it is, with the recipe, the code's commit and the changes since that its origin states.
    """
    from .share.hub import push as push_to

    click.echo(push_to(package, target, private=private, message=message))


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


@click.command()
@click.argument("recipe", type=click.Path())
@click.option("-o", "--output", type=click.Path(dir_okay=False), required=True, help="The script's path.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def eject(recipe: str, output: str, assignments: tuple[str, ...], force: bool) -> None:
    """Write what RECIPE trains as a plain PyTorch script without torchkeep.

    It has the run's losses to the last bit; where augmentation is drawn, the same kinds of it.
    """
    from . import handing

    click.echo(handing.eject(recipe, output, set=assignments, force=force))


COMMANDS = (package, predict, evaluate, export, unpack, reproduce, push, eject)
