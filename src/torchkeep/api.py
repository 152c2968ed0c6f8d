"""The verbs: train, fit, resume, inspect. The command line calls these and nothing else."""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .archive import SUFFIX
from .contracts import Json
from .data.cache import Wanted
from .data.foreign import as_dataset
from .data.reading import OnBad
from .errors import RunFolderError, SettingsError
from .folder import open_run_folder
from .generators import kept_generators, keyed_generators
from .keep.checkpoint import Checkpoints, Row
from .model.build import ModelSettings, build_alone
from .model.describe import Anatomy, dissect
from .model.freeze import begin_training, release
from .running import (
    Run,
    execute,
    fetch,
    find_run,
    loaded,
    place_of,
    recorded_recipe,
    released,
    taken,
    trusting,
    work_of,
)
from .settings import check, override
from .share.package import Package, load_package
from .training.decisions import Decisions
from .training.prefix import GAIN
from .training.preflight import Level
from .training.preflight import preflight as look_over
from .training.prepare import Prepared
from .training.recipe import RunSettings, read_recipe
from .training.replay import Replay, replay
from .training.resuming import check_data
from .training.subject import Finding, Subject
from .training.work import Feeding, Work, describe_object
from .usercode import is_reference, load_function, read_reference
from .watch.anatomy import anatomy_page, anatomy_svg, show_anatomy
from .watch.console import Console
from .watch.records import Record, dump_record, read_records

Resume = Literal["no", "auto"] | bool
OnRecord = Sequence[Callable[[Record], Any]]
Log = Literal["text", "json"]


def train(
    recipe: str | Path | dict[str, Any],
    *,
    set: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: Resume = "no",
    mirror: str | Path | None = None,
    allow_change: Sequence[str] = (),
    preflight: Level = "quick",
    on_record: OnRecord = (),
    log: Log = "text",
    quiet: bool = False,
) -> Run:
    """Train a recipe: a TOML file's path, or a dict.

    ``set`` overrides keys, ``["train.epochs=3"]``. ``resume="auto"`` goes on where the newest run of this name ended.
    ``mirror`` is a folder on another disk to which checkpoints are copied, and where a run that is lost here is found.
    ``allow_change=["data"]`` goes on with other data. ``preflight``: how closely a new run is looked over before it
    begins, "quick", "full" or "off". ``on_record`` are called with each record, on a thread of their
    own; ``log="json"`` prints the records as lines of JSON, and everything else to standard error.

    Raises:  SettingsError, DataError, ModelError before anything is written; Interrupted, PreemptedError after saving
    """
    _check_level(preflight)
    read, base = read_recipe(recipe, list(set))
    console, told = _outlets(quiet, log, on_record)
    with contextlib.closing(console):
        found = find_run(read.name, run_dir, mirror, console) if _goes_on(resume) else None
        lock = taken(found.path, console) if found else None
        with released(lock):
            work, read, code = work_of(read, base, load_function, is_new=found is None)
            work.on_record = told
            facts = {"recipe": read.model_dump(mode="json"), "base": str(base), "code_files": code, **loaded(work)}
            place = place_of(read.name, run_dir)
            return execute(
                work, facts, read, base, place, found, lock, console, mirror, allow_change, level=preflight
            )  # fmt: skip


def fit(
    model: nn.Module,
    train: Any,
    valid: Any = None,
    *,
    test: Any = None,
    loss: Any = None,
    metrics: Any = None,
    epochs: int | None = None,
    batch_size: int = 32,
    learning_rate: float | None = None,
    optimizer: Any = None,
    schedule: Any = None,
    schedule_every: Literal["step", "epoch"] = "step",
    step: Any = None,
    inputs: Any = None,
    targets: Any = None,
    collate: Callable[[list[Any]], Any] | None = None,
    workers: int | Literal["auto"] = "auto",
    last: Literal["keep", "drop"] = "keep",
    cache: Wanted = "off",
    on_bad: OnBad = "raise",
    seed: int = 0,
    name: str | None = None,
    run_dir: str | Path | None = None,
    resume: Resume = "no",
    mirror: str | Path | None = None,
    allow_change: Sequence[str] = (),
    freeze: dict[str, Any] | None = None,
    checkpoint: dict[str, Any] | None = None,
    early_stopping: dict[str, Any] | None = None,
    monitor: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    preflight: Level = "quick",
    on_record: OnRecord = (),
    quiet: bool = False,
) -> Run:
    """Train your own module on your own dataset.

    ``loss``: a name, a module or a callable (output, target) → (). ``metrics``: names and torchmetrics objects.
    ``optimizer``: a name, an optimiser, a dict of several, or a function of the model. ``schedule``: a name, a
    scheduler object, a function optimiser → scheduler, or a function (step, total_steps) → factor.
    ``step(model, batch, context)`` → ``{"loss": …, anything to log}`` replaces binding and loss. ``freeze`` says what
    stays as it is: ``{"modules": ["features"]}``. ``settings`` takes further sections as a recipe has them:
    ``{"train": {"clip_norm": 1.0}}``. ``preflight``: how closely a new run is looked over before it begins, "quick",
    "full" or "off". ``on_record`` are called with each record, on a thread of their own.

    The model is trained in place and keeps its last parameters; ``run.model()`` is a copy with the best ones. ``seed``
    keys order, augmentation and dropout; the first weights are the model's own: seed torch before it is made.

    Raises:  SettingsError, DataError, ModelError before anything is written; Interrupted, PreemptedError after saving
    """
    work = _work_of_objects(dict(locals()))
    checked, place = work.settings, place_of(work.settings.name, run_dir)
    objects = {"model": model, "train": train, "loss": loss, "optimizer": optimizer, "schedule": schedule,
               "step": step, "collate": collate}  # fmt: skip
    facts = {
        "recipe": None,
        "settings": checked.model_dump(mode="json"),
        "objects": {key: describe_object(value) for key, value in objects.items()},
        "batch_size": batch_size,
    }
    console = Console(quiet)
    with contextlib.closing(console):
        found = find_run(checked.name, run_dir, mirror, console) if _goes_on(resume) else None
        lock = taken(found.path, console) if found else None
        with released(lock):
            return execute(
                work, facts, None, Path.cwd(), place, found, lock, console, mirror, allow_change, level=preflight
            )  # fmt: skip


def _work_of_objects(given: dict[str, Any]) -> Work:
    """What the arguments of ``fit`` ask for, by their names.

    Raises:  SettingsError for what contradicts itself, DataError for data that cannot be read
    """
    model, loss, optimizer, run_dir = (given[name] for name in ("model", "loss", "optimizer", "run_dir"))
    _check_level(given["preflight"])
    _check_objects(model, loss=loss, optimizer=optimizer, step=given["step"])
    named = given["name"] or (Path(run_dir).name if run_dir else type(model).__name__.lower())
    data = {"seed": given["seed"], "name": named, **copy.deepcopy(given["settings"] or {})}
    _merge(data, "train", {"epochs": given["epochs"], "loss": loss if isinstance(loss, str) else None})
    if given["freeze"] is not None:
        _merge(data, "freeze", given["freeze"])
    for section in ("checkpoint", "early_stopping", "monitor"):
        _merge(data, section, given[section] or {})
    own_optimizer = optimizer is not None and not isinstance(optimizer, str)
    if own_optimizer and given["learning_rate"] is not None:
        raise SettingsError(
            "the learning rate is given twice", where="tk.fit", got="optimizer= and learning_rate=",
            expected="one of them",
        )  # fmt: skip
    schedule = given["schedule"]
    _merge(data, "optimizer", {"name": None if own_optimizer else optimizer, "learning_rate": given["learning_rate"]})
    _merge(data, "optimizer", {"schedule": schedule if isinstance(schedule, str) else None})
    splits: dict[str, Any] = {name: as_dataset(given[name]) for name in ("valid", "test") if given[name] is not None}
    metrics = given["metrics"]
    same = {name: given[name] for name in ("batch_size", "loss", "optimizer", "schedule", "schedule_every", "step",
                                           "inputs", "targets", "collate", "on_record")}  # fmt: skip
    return Work(
        check(RunSettings, data, "tk.fit"), model, as_dataset(given["train"]), **splits, **same,
        metrics=[metrics] if isinstance(metrics, str) else metrics,
        feeding=Feeding(given["workers"], given["last"], given["cache"], given["on_bad"]),
    )  # fmt: skip


def preflight(
    source: Any, train: Any = None, valid: Any = None, *, level: Literal["quick", "full"] = "full",
    set: Sequence[str] = (), **options: Any,
) -> list[Finding]:  # fmt: skip
    """Look a training over without training: a recipe (a TOML file or a dict), or a module as ``fit`` takes it.

    ``options`` are the keywords of ``fit``. What mostly is a mistake has the verdict "warning", what lets nothing be
    learned "error". The model is as it was afterwards, bit for bit.

    Raises:  SettingsError, DataError or ModelError for what could not even begin
    """
    _check_level(level, ("quick", "full"))
    with kept_generators():
        return _looked_over(source, train, valid, level, set, options)


def _looked_over(
    source: Any, train: Any, valid: Any, level: Level, set: Sequence[str], options: dict[str, Any]
) -> list[Finding]:
    if isinstance(source, nn.Module):
        bound = signature(fit).bind(source, train, valid, **options)
        bound.apply_defaults()
        work, place = _work_of_objects(dict(bound.arguments)), options.get("run_dir")
    else:
        read, base = read_recipe(source, list(set))
        work = work_of(read, base, load_function)[0]
        place = place_of(read.name, options.get("run_dir"))
    try:
        with contextlib.closing(Prepared(work, Decisions())) as prepared:
            return list(look_over(prepared, level, Path(place) if place is not None else None).findings)
    finally:
        if work.settings.freeze is not None:
            release(work.model)


def resume(
    run_dir: str | Path, *, set: Sequence[str] = (), trust_code: str | None = None, mirror: str | Path | None = None,
    allow_change: Sequence[str] = (), on_record: OnRecord = (), log: Log = "text", quiet: bool = False,
) -> Run:  # fmt: skip
    """Go on with a recipe's run where its last checkpoint stands.

    Raises:  RunFolderError if there is no such run; SettingsError for a run of ``tk.fit``, naming the call to repeat;
             UntrustedCodeError for code that changed or never ran on this machine
    """
    console, told = _outlets(quiet, log, on_record)
    if mirror is not None:
        fetch(Path(run_dir), mirror, console)
    folder = open_run_folder(run_dir)
    with contextlib.closing(console):
        lock = taken(folder.path, console)
        with released(lock):
            facts = folder.read_run()
            recipe, base = recorded_recipe(folder, facts, list(set))
            work, recipe, _ = work_of(recipe, base, trusting(facts, trust_code), is_new=False)
            work.on_record = told
            facts = {**facts, "recipe": recipe.model_dump(mode="json")}
            return execute(work, facts, recipe, base, None, folder, lock, console, mirror, allow_change)


def checkpoints(run_dir: str | Path) -> list[Row]:
    """What a run has saved, oldest first, each read and checked. None of the run's code is needed."""
    return Checkpoints(open_run_folder(run_dir).checkpoints).rows()


def verify(run_dir: str | Path, *, trust_code: str | None = None) -> Replay:
    """Train the stretch between a recipe run's last two checkpoints again, in memory, and compare every bit.

    Raises:  CheckpointError where there are not two whole checkpoints; as ``open_run`` does
    """
    prepared = open_run(run_dir, trust_code=trust_code)._prepared
    with contextlib.closing(prepared):
        return replay(prepared, open_run_folder(run_dir))


def open_run(run_dir: str | Path, *, trust_code: str | None = None) -> Run:
    """Open a recipe's run to evaluate it or to predict with it. Nothing is trained or written.

    Raises:  RunFolderError if there is no such run, DataError or CheckpointError where its data are gone or changed
    """
    folder = open_run_folder(run_dir)
    facts = folder.read_run()
    recipe, base = recorded_recipe(folder, facts, [])
    work, recipe, _ = work_of(recipe, base, trusting(facts, trust_code), is_new=False)
    check_data(work, facts)  # classes and a table's statistics are read from the training data again
    return Run(folder, Prepared(work, Decisions(facts["decisions"])), recipe, base)


class Inspection(Anatomy):
    """What ``inspect`` has found: a sequence of ``ModuleRow``. ``print`` shows it as a table that fits the terminal."""

    def __str__(self) -> str:
        text = io.StringIO()
        show_anatomy(Console(file=text), self.to_json(), room=shutil.get_terminal_size((120, 50)))
        return text.getvalue().rstrip("\n")

    def svg(self) -> str:
        """A picture that needs no network."""
        return anatomy_svg(self.to_json())

    def html(self) -> str:
        """A page to fold and unfold, that needs no network."""
        return anatomy_page(self.to_json(), self[0].type_name)


def inspect(
    source: Any, batch: Any = None, *, loss: Callable[[Any], Any] | None = None, set: Sequence[str] = (),
    trust_code: str | None = None,
) -> Inspection:  # fmt: skip
    """The module tree after one forward and backward: shapes, parameters, FLOPs, time, and what gradients arrived.

    ``source`` is a module, which ``batch`` (a tensor, a tuple of arguments or a dict of keywords) is given to, in the
    mode it is in; ``file.py:function`` that gives one; a package (a .tkp file, or from ``load_package``), on its
    self-test; a recipe, or a run's folder with its best checkpoint, on the first batch as it is trained, to the loss
    it is trained by.
    ``loss`` takes the output; without it, it is the output's own ``.loss``, else the sum of the means of its floating
    tensors. Without a batch only what the model holds is shown. The model, the batch and all random generators are as
    before afterwards, bit for bit.

    Units:   numbers, bytes, seconds; FLOPs, a multiply-add counts two
    Raises:  ModelError where the model cannot take the batch, naming the module
    """
    if isinstance(source, str | Path) and Path(source).suffix == SUFFIX:
        source = load_package(source, trust_code=trust_code)
    if isinstance(source, nn.Module):
        found = dissect(source, batch, loss)
    elif isinstance(source, Package):
        asked, (few, _) = source.asked, source.selftest
        found = dissect(source.model, run=lambda backward: backward(asked.forward(few).float().mean()))
    elif isinstance(source, str) and is_reference(source):
        with keyed_generators(0):  # of weights and of dropout: the same at each call
            found = dissect(_built_alone(source, set), batch, loss)
    else:
        found = _inspected(source, set, trust_code)
    return Inspection(found.rows, found.losses, found.note)


def _built_alone(name: str, assignments: Sequence[str]) -> nn.Module:
    settings = check(ModelSettings, override({"model": {"name": name}}, list(assignments))["model"], "--set")
    return build_alone(settings, lambda name: load_function(read_reference(name, Path())))


def _inspected(source: Any, assignments: Sequence[str], trust_code: str | None) -> Anatomy:
    """A recipe or a run as it is trained."""
    using: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if isinstance(source, str | Path) and Path(source).is_dir():
        run = open_run(source, trust_code=trust_code)
        prepared = run._prepared
        if run._checkpoints().best() is not None:
            using = run._using("best")
    else:
        recipe, base = read_recipe(source, list(assignments))
        prepared = Prepared(work_of(recipe, base, load_function)[0], Decisions())

    def step(backward: Callable[[Any], None]) -> None:
        begin_training(subject.model)
        subject.losses(subject.batch, backward)

    with contextlib.closing(prepared), using:
        subject = Subject(prepared)
        return dissect(subject.model, run=step)


def trainable(run_dir: str | Path) -> Json:
    """What learned in a run of which a part was frozen, as it was recorded last: rows, frontier, cache and speed-up.

    Raises:  RunFolderError where nothing was frozen
    """
    folder = open_run_folder(run_dir)
    rows = list(read_records(folder.records))
    found = [row for row in rows if row["kind"] == "trainable_map"]
    gains = [row["values"][GAIN] for row in rows if row["kind"] == "timing" and GAIN in row["values"]]
    if not found:
        raise RunFolderError("nothing was frozen in this run", where=folder.path, expected="a run with [freeze]")
    return found[-1] | {"measured_speedup": gains[-1] if gains else None}


def _outlets(quiet: bool, log: Log, on_record: OnRecord) -> tuple[Console, OnRecord]:
    """What is printed where: with JSON lines standard output is theirs alone."""
    if log not in ("text", "json"):
        raise SettingsError("there is no such log", where="log", got=repr(log), expected='"text" or "json"')
    if log == "text":
        return Console(quiet), on_record
    return Console(quiet, sys.stderr), [*on_record, _print_json]


def _print_json(record: Record) -> None:
    sys.stdout.write(dump_record(record).decode())
    sys.stdout.flush()


def _merge(data: dict[str, Any], section: str, values: dict[str, Any]) -> None:
    given = {key: value for key, value in values.items() if value is not None}
    data.setdefault(section, {}).update(given)


def _goes_on(resume: Resume) -> bool:
    if resume not in ("no", "auto", True, False):
        raise SettingsError("this is no way to resume", where="resume", got=repr(resume), expected='"no" or "auto"')
    return resume in ("auto", True)


def _check_level(level: Any, known: Sequence[str] = ("quick", "full", "off")) -> None:
    if level not in known:
        raise SettingsError("there is no such preflight", where="preflight", got=repr(level), expected=", ".join(known))


def _check_objects(model: Any, **given: Any) -> None:
    """A class where an object is meant: the commonest slip of all."""
    for name, value in {"model": model, **given}.items():
        if isinstance(value, type):
            made = "lambda model: torch.optim.SGD(model.parameters(), lr=0.1)" if name == "optimizer" else "NAME(…)"
            raise SettingsError(
                "this is a class, not an object of it", where=f"tk.fit({name}=…)", got=value.__name__,
                expected="an object", fix=f"{name}={made.replace('NAME', value.__name__)}",
            )  # fmt: skip
    if not isinstance(model, nn.Module):
        raise SettingsError("this is no model", where="tk.fit", got=type(model).__name__, expected="a torch.nn.Module")
