"""The command line: the verbs of ``api``, nothing else. Only click is imported until a verb runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from . import cli_handing
from .errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Interrupted,
    SettingsError,
    TorchkeepError,
)

_SET = click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
_TRUST = click.option("--trust-code", metavar="HASH", help="Run the code that the run names, if it has this sha256.")
_MIRROR = click.option("--mirror", metavar="DIR", help="Copy checkpoints to DIR too, and find a lost run there.")
_ALLOW = click.option("--allow-change", "allow_change", multiple=True, type=click.Choice(["data"]),
                      help="Go on although this has changed.")  # fmt: skip
_LOG = click.option("--log", type=click.Choice(["text", "json"]), default="text", show_default=True,
                    help="json: each record as a line of JSON, the rest to standard error.")  # fmt: skip
_QUIET = click.option("--quiet", is_flag=True, help="Print only warnings and errors.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="torchkeep", prog_name="torchkeep")
def cli() -> None:
    """Train a PyTorch model: fast to the step, exact on resume.

    torchkeep train examples/digits/recipe.toml
    """


@cli.command()
@click.argument("recipe", type=click.Path())
@_SET
@click.option("--run-dir", type=click.Path(), help="The run's folder; runs/NAME without it.")
@click.option("--resume", "resume_mode", type=click.Choice(["no", "auto"]), default="no", show_default=True,
              help="auto: go on where the newest run of this name ended.")  # fmt: skip
@_MIRROR
@_ALLOW
@click.option("--verify-cache", is_flag=True, help="Compute some of the kept features again and compare every bit.")
@click.option("--preflight", type=click.Choice(["quick", "full", "off"]), default="quick", show_default=True,
              help="How closely a new run is looked over before it begins.")  # fmt: skip
@_LOG
@_QUIET
def train(
    recipe: str, assignments: tuple[str, ...], run_dir: str | None, resume_mode: Any, mirror: str | None,
    allow_change: tuple[str, ...], verify_cache: bool, preflight: Any, log: Any, quiet: bool,
) -> None:  # fmt: skip
    """Train the model that RECIPE (a TOML file) describes."""
    from . import api

    assignments += ("features.verify=64",) if verify_cache else ()
    api.train(recipe, set=assignments, run_dir=run_dir, resume=resume_mode, mirror=mirror, allow_change=allow_change,
              preflight=preflight, log=log, quiet=quiet)  # fmt: skip


@cli.command()
@click.argument("recipe", type=click.Path())
@_SET
@click.option("--run-dir", type=click.Path(), help="The run's folder to be; runs/NAME without it.")
@click.option("--quick", is_flag=True, help="Only what is looked at before every training.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each check.")
def preflight(recipe: str, assignments: tuple[str, ...], run_dir: str | None, quick: bool, as_json: bool) -> None:
    """Look RECIPE over without training: what mostly is a mistake, with what to do.

    Exit code 1 where something is found.
    """
    from . import api
    from .watch.console import Console
    from .watch.findings import show_preflight

    found = api.preflight(recipe, level="quick" if quick else "full", set=assignments, run_dir=run_dir)
    if as_json:
        for finding in found:
            click.echo(_json_line(vars(finding)))
    else:
        show_preflight(Console(), [vars(finding) for finding in found])
    if any(finding.is_blamed for finding in found):
        click.get_current_context().exit(EXIT_FAILED)


@cli.command()
@click.argument("run", type=click.Path())
@_SET
@_TRUST
@_MIRROR
@_ALLOW
@_LOG
@_QUIET
def resume(
    run: str, assignments: tuple[str, ...], trust_code: str | None, mirror: str | None, allow_change: tuple[str, ...],
    log: Any, quiet: bool,
) -> None:  # fmt: skip
    """Go on with RUN (a run's folder) from its last checkpoint, to the same bits."""
    from . import api

    api.resume(run, set=assignments, trust_code=trust_code, mirror=mirror, allow_change=allow_change, log=log,
               quiet=quiet)  # fmt: skip


@cli.command()
@click.argument("run", type=click.Path())
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each checkpoint.")
def checkpoints(run: str, as_json: bool) -> None:
    """List RUN's checkpoints, oldest first, each read and checked."""
    from . import api

    _show_checkpoints(api.checkpoints(run), as_json)


@cli.command()
@click.argument("run", type=click.Path())
@click.option("--replay", is_flag=True, help="Train the last stretch again and compare every bit.")
@_TRUST
@click.option("--base", metavar="WEIGHTS", help="What a delta package was made against.")
@click.option("--json", "as_json", is_flag=True, help="Print lines of JSON.")
def verify(run: str, replay: bool, trust_code: str | None, base: str | None, as_json: bool) -> None:
    """Check RUN's checkpoints, or a package: every size and checksum, and a package's self-test.

    Exit code 1 where anything of a run is damaged, or a replay differs; 2 for a package that is refused.
    """
    from . import api, handing

    if handing.is_package(run):
        identity = handing.verify_package(run, base=base, trust_code=trust_code)
        click.echo(_json_line({"path": run, "sha256": identity}) if as_json else f"{run}: whole, its self-test passed, "
                   f"sha256 {identity}")  # fmt: skip
        return

    rows = api.checkpoints(run)
    _show_checkpoints(rows, as_json)
    is_bad = any(row.damage for row in rows)
    if replay and not is_bad:
        again = api.verify(run, trust_code=trust_code)
        is_bad = bool(again.differs)
        said = (
            f"differs in {', '.join(again.differs[:5])}" if is_bad else f"the same bits in {again.num_tensors} tensors"
        )
        line = f"steps {again.first_step} to {again.last_step} trained again: {said}"
        click.echo(_json_line(vars(again)) if as_json else line)
    if is_bad:
        click.get_current_context().exit(EXIT_FAILED)


def _show_checkpoints(rows: Iterable[Any], as_json: bool) -> None:
    import time

    from .watch.console import Console, format_number, format_seconds

    if as_json:
        for row in rows:
            click.echo(_json_line(vars(row)))
        return
    now = time.time()
    Console().table(
        ["checkpoint", "epoch", "metrics", "size", "age", "state"],
        [
            (row.name, "" if row.epoch is None else str(row.epoch),
             ", ".join(f"{name} {format_number(value)}" for name, value in row.metrics.items()),
             f"{row.size_bytes / 1e6:,.1f} MB", format_seconds(now - row.created),
             row.damage or ("whole" if row.is_exact else "whole, after a step that failed"))
            for row in rows
        ],
    )  # fmt: skip


@cli.command()
@click.argument("source", type=click.Path())
@_SET
@click.option("--input", "inputs", multiple=True, metavar="[NAME=]SHAPE[:TYPE]",
              help="What goes into file.py:function's model: 1x3x224x224, or ids=2x16:int64.")  # fmt: skip
@click.option("--modules", is_flag=True, help="Build a package's model, and show its tree on the self-test.")
@click.option("--depth", type=click.IntRange(0), metavar="N", help="How deep the tree is shown.")
@click.option("--all", "everything", is_flag=True, help="Show every module on a line of its own.")
@click.option("--svg", type=click.Path(dir_okay=False), help="Draw the tree there instead.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write the tree as one page to fold and unfold there.")
@click.option("--trainable-svg", type=click.Path(dir_okay=False), help="Draw what is frozen in a run there instead.")
@click.option("--base", metavar="WEIGHTS", help="What a delta package was made against.")
@_TRUST
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each module.")
def inspect(
    source: str, assignments: tuple[str, ...], inputs: tuple[str, ...], modules: bool, depth: int | None,
    everything: bool, svg: str | None, html: str | None, trainable_svg: str | None, base: str | None,
    trust_code: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Show SOURCE module by module after one forward and backward: shapes, parameters, FLOPs, gradients, time.

    SOURCE is a recipe, a run's folder, or file.py:function; of a package, what it says of itself, unbuilt.
    """
    from . import api, handing
    from .files import write_durable

    drawn: dict[str, str] = {path: "" for path in (svg, html, trainable_svg) if path}
    for path in drawn:
        if not Path(path).absolute().parent.is_dir():
            raise SettingsError("the folder of the picture is missing", where=path, expected="a folder that exists")
    is_package = handing.is_package(source)
    if is_package and not (modules or svg or html or inputs):
        said = handing.described(source)
        click.echo(_json_line(said)) if as_json else cli_handing.show_package(said)
        return
    if trainable_svg:
        from .watch import trainable

        drawn[trainable_svg] = trainable.trainable_svg(api.trainable(source))
    else:
        found = _inspected(source, is_package, inputs, assignments, base, trust_code)
        payload = found.to_json()
        drawn |= {svg: found.svg()} if svg else {}
        drawn |= {html: found.html()} if html else {}
        if not drawn:
            _show_modules(payload, depth, everything, as_json)
    for path, text in drawn.items():
        write_durable(Path(path), text.encode())
        click.echo(f"{source} is drawn in {path}")


def _inspected(
    source: str, is_package: bool, inputs: tuple[str, ...], assignments: tuple[str, ...], base: str | None,
    trust_code: str | None,
) -> Any:  # fmt: skip
    from . import api
    from .model.example import example_of
    from .share.package import load_package
    from .usercode import is_reference

    if inputs and not is_reference(source):
        raise SettingsError("only a model without data is given inputs", where="--input", got=source,
                            expected="file.py:function")  # fmt: skip
    if is_package:
        return api.inspect(load_package(source, base=base, trust_code=trust_code))
    batch = example_of(inputs) if inputs else None
    return api.inspect(source, batch, set=assignments, trust_code=trust_code)


def _show_modules(payload: dict[str, Any], depth: int | None, everything: bool, as_json: bool) -> None:
    from .watch.anatomy import show_anatomy
    from .watch.console import Console

    if as_json:
        for row in payload["rows"]:
            click.echo(_json_line(row))
    else:
        show_anatomy(Console(), payload, depth=depth, everything=everything)


_VALID = click.option("--valid", metavar="DATA", help="Validation data; a fifth is set apart without it.")


@cli.command()
@click.argument("data")
@click.option("--model", required=True, metavar="NAME", help="A model's name, as model.name of a recipe.")
@click.option("--weights", metavar="FILE", help="Its weights: a file, a run's folder or hf:NAME.")
@click.option("--head", metavar="NAME", help="Its last layer; found without it.")
@_VALID
@click.option("--tune", type=click.Choice(["auto", "yes", "no"]), default="auto", show_default=True,
              help="Train all of the model after the probe; auto: where that takes half an hour at most.")  # fmt: skip
@_SET
@click.option("--run-dir", type=click.Path(), help="The run's folder; runs/DATA-MODEL without it.")
@_QUIET
def transfer(
    data: str, model: str, weights: str | None, head: str | None, valid: str | None, tune: str,
    assignments: tuple[str, ...], run_dir: str | None, quiet: bool,
) -> None:  # fmt: skip
    """Fit a pretrained model to DATA: a probe first, then all of it; the best on validation is kept."""
    from . import transfer as verbs

    chosen: Any = {"yes": True, "no": False}.get(tune, "auto")
    verbs.transfer(data, model, weights=weights, head=head, valid=valid, tune=chosen, set=assignments,
                   run_dir=run_dir, quiet=quiet)  # fmt: skip


@cli.command()
@click.argument("data")
@click.option("--models", required=True, metavar="A,B,C", help="The models' names.")
@click.option("--weights", default="", metavar="A,B,C", help="The weights of each, in the same order; may be empty.")
@_VALID
@_SET
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each model.")
@_QUIET
def backbones(
    data: str, models: str, weights: str, valid: str | None, assignments: tuple[str, ...], as_json: bool, quiet: bool
) -> None:
    """Rank pretrained models by a probe on what they make of DATA."""
    from . import transfer as verbs
    from .watch.console import Console, format_number, format_seconds

    files = [file or None for file in weights.split(",")] if weights else []
    rows = verbs.backbones(data, models.split(","), weights=files, valid=valid, set=assignments, quiet=quiet or as_json)
    if as_json:
        for row in rows:
            click.echo(_json_line(vars(row)))
    else:
        Console().table(
            ["model", "cross-validation", "validation", "parameters", "samples/s", "features", "time"],
            [
                (row.name, row.problem, "", "", "", "", "") if row.held_out is None else
                (row.name, format_number(row.held_out), format_number(row.accuracy or row.held_out),
                 f"{row.num_parameters:,}", f"{row.samples_per_s:,.0f}", f"{row.feature_bytes / 1e6:,.1f} MB",
                 format_seconds(row.seconds))
                for row in rows
            ],
        )  # fmt: skip
    if all(row.problem for row in rows):
        click.get_current_context().exit(EXIT_FAILED)


@cli.command()
@click.argument("folder", type=click.Path(), default="runs")
@click.option("--where", default="", metavar="CONDITION", help="As 'valid/accuracy > .9 and model.name = convnet'.")
@click.option("--sort", default="", metavar="KEY", help="Sort by a metric or setting; -KEY: the highest first.")
@click.option("--all", "all_of_them", is_flag=True, help="All runs, not only the newest 50.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each run.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV.")
def runs(folder: str, where: str, sort: str, all_of_them: bool, as_json: bool, as_csv: bool) -> None:
    """List the runs under FOLDER, oldest first."""
    from . import history

    most = None if all_of_them else _NEWEST
    rows = history.runs(folder, where=where, sort=sort, most=None if most is None else most + 1)
    is_more = most is not None and len(rows) > most
    rows = (rows[:most] if sort else rows[-most:]) if most is not None else rows
    if as_json:
        for row in rows:
            click.echo(_json_line(row))
    elif as_csv:
        from .watch.index import csv_text

        click.echo(csv_text(rows), nl=False)
    elif not rows:
        click.echo(f"no runs under {folder}" + (" for which this holds" if where else "; torchkeep train makes one"))
    else:
        _show_runs(rows, sort)
    if is_more and not (as_json or as_csv):
        click.echo(f"the {'first' if sort else 'newest'} {most}; --all shows the rest")


_NEWEST = 50


def _show_runs(rows: list[dict[str, Any]], sort: str) -> None:
    import time

    from .watch.console import Console, format_number, format_seconds

    key = sort.removeprefix("-").split()[0] if sort else ""
    shown = key if key not in ("", "name", "status", "attempts", "model", "commit", "created", "seconds") else ""

    def text(value: Any) -> str:
        return format_number(value) if isinstance(value, float) else "" if value is None else str(value)

    def line(row: dict[str, Any]) -> list[str]:
        best = row["best"]
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["created"])) if row["created"] else ""
        return [
            row["name"], row["status"], text(row["attempts"]), text(row["model"]), (row["commit"] or "")[:8],
            "" if best is None else f"{row['best_metric']} {format_number(best)}", began,
            "" if row["seconds"] is None else format_seconds(row["seconds"]),
            *([text(next((row[k] for k in (key, f"best.{key}", f"last.{key}") if row.get(k) is not None), None))]
              if shown else []),
        ]  # fmt: skip

    columns = ["run", "status", "attempts", "model", "commit", "best", "began", "time", *([shown] if shown else [])]
    Console().table(columns, [line(row) for row in rows])


@cli.command()
@click.argument("run", nargs=-1, required=True, type=click.Path())
@click.option("--html", type=click.Path(dir_okay=False), help="Write one page with curves, that needs no network.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def compare(run: tuple[str, ...], html: str | None, as_json: bool) -> None:
    """Show what sets RUNs apart: metrics, recipe, code, data, environment, and where their courses part."""
    from . import history
    from .watch.comparing import show_comparison
    from .watch.console import Console

    found = history.compare(*run)
    if html:
        from .files import write_durable
        from .watch.page import comparison_page

        write_durable(Path(html), comparison_page(found).encode())
    if as_json:
        click.echo(_json_line(found.to_json()))
        return
    show_comparison(Console(), found)
    if html:
        click.echo(f"the curves are in {html}")


@cli.command()
@click.argument("run", type=click.Path())
@click.option("--to", required=True, type=click.Choice(["wandb", "mlflow", "tensorboard"]), help="Where it is shown.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A key of the view's settings.")
def sync(run: str, to: Any, assignments: tuple[str, ...]) -> None:
    """Give RUN's record to a view afterwards: what it missed, or all of it."""
    from . import history

    count = history.sync(run, to, set=assignments)
    click.echo(f"{count:,} records of {run} are at {to}")


@cli.command()
@click.argument("data", nargs=-1, required=True)
@_SET
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--bad", "only_bad", is_flag=True, help="Print only the samples that cannot be read, one a line.")
@click.option("-o", "--output", type=click.Path(), help="A folder for survey.json and a contact sheet, sheet.png.")
@click.option("--build-cache", is_flag=True, help="Decode each image into the cache on the disk instead.")
def survey(
    data: tuple[str, ...], assignments: tuple[str, ...], as_json: bool, only_bad: bool, output: str | None,
    build_cache: bool,
) -> None:  # fmt: skip
    """Look through DATA before training: classes, sizes, bad samples, copies and leaks, labels, drift.

    DATA is a recipe, or each split as a recipe's data.train would name it: torchkeep survey data/train data/val
    """
    from .tensors import to_json
    from .training.survey import build_cache as build
    from .training.survey import survey as look_through
    from .watch.console import Console
    from .watch.findings import show_survey

    def report(split: str, done: int, total: int) -> None:
        click.echo(f"\r{split}: {done:,} of {total:,} samples" + "\n" * (done == total), nl=False, err=True)

    progress = report if sys.stderr.isatty() else None
    if build_cache:
        for name, (plan, bad) in build(data, set=assignments, progress=progress).items():
            click.echo(f"{name}: {plan.said}, {plan.reason}" + (f"; {len(bad):,} cannot be read" if bad else ""))
        return
    found = look_through(data, set=assignments, output=output, progress=progress)
    if as_json:
        click.echo(to_json(found.to_json(), indent=True).decode(), nl=False)
    elif only_bad:
        for one in (one for split in found.splits.values() for one in split.bad):
            click.echo(f"{one.where}: {one.what}: {one.got}")
    else:
        show_survey(Console(), found.to_json())


@cli.command()
def schema() -> None:
    """Print the JSON schema of a recipe."""
    from .tensors import to_json
    from .training.recipe import schema as recipe_schema

    click.echo(to_json(recipe_schema(), indent=True).decode(), nl=False)


for _command in cli_handing.COMMANDS:
    cli.add_command(_command)


def _json_line(value: Any) -> str:
    import json

    return json.dumps(value, ensure_ascii=False)


def main() -> None:
    """Run the command line; every expected error ends in one message and its exit code."""
    sys.exit(run(lambda: cli.main(prog_name="torchkeep", standalone_mode=False)))


def run(command: Callable[[], Any]) -> int:
    """The exit code of a command, its error said in the one form."""
    try:
        code = command()
    except TorchkeepError as error:
        click.echo(error.said(), err=True)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error  # click wraps every KeyboardInterrupt
        if isinstance(cause, Interrupted):
            click.echo(str(cause), err=True)
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        sys.stderr.close()
        return EXIT_FAILED
    return code if isinstance(code, int) else EXIT_DONE  # click gives what a verb has said with ctx.exit
