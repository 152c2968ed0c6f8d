"""The verbs: train, fit, resume, evaluate, predict, inspect. The command line calls these and nothing else."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .contracts import Json, Schema
from .data.cache import Wanted
from .data.dataset import whole
from .data.foreign import as_dataset
from .data.reading import OnBad
from .data.sources import open_data, open_source
from .errors import CheckpointError, RunFolderError, SettingsError
from .files import FolderLock
from .folder import RunFolder, create_run_folder, list_runs, open_run_folder
from .keep.checkpoint import Checkpoints, Row, Saved
from .keep.generators import seed_generators
from .keep.mirror import Mirror
from .model.build import build_model
from .model.describe import ModuleRow, describe
from .settings import check, override
from .share.predict import Prediction, predict_all
from .tensors import tensor_sha256
from .training.attempt import attempt, checkpoints_of, put
from .training.decisions import Decisions
from .training.prepare import Feeding, Prepared, Work, describe_object, source_folder
from .training.provenance import code_state, command, environment
from .training.recipe import Recipe, RunSettings, read_recipe, recipe_from_json
from .training.replay import Replay, replay
from .training.resuming import Changes, changes_since, check_data
from .usercode import CodeReference, check_trusted, load_function, read_reference
from .watch.console import Console
from .watch.records import last_attempt_start, next_attempt, read_records

Resume = Literal["no", "auto"] | bool
RUNS = Path("runs")


@dataclass(frozen=True)
class BestPoint:
    """The evaluation that picked the best checkpoint; without a validation split, the last one."""

    step: int
    epoch: int
    metrics: dict[str, float]


class Run:
    """A run that has ended, or that was opened from its folder."""

    def __init__(self, folder: RunFolder, prepared: Prepared, recipe: Recipe | None, base: Path):
        self._folder, self._prepared, self._recipe, self._base = folder, prepared, recipe, base

    @property
    def dir(self) -> Path:
        """The run's folder."""
        return self._folder.path

    @property
    def status(self) -> str:
        """ "finished", "failed", "interrupted" or "killed"."""
        return self._folder.status()

    @property
    def metrics(self) -> dict[str, float]:
        """The last epoch's metrics, and the test split's where there is one."""
        ends = [row for row in read_records(self._folder.records) if row["kind"] == "run_end"]
        return dict(ends[-1]["metrics"]) if ends else {}

    @property
    def best(self) -> BestPoint:
        """Where the best checkpoint was met."""
        saved = self._checkpoint("best")
        clock = self._checkpoints().load_part(saved, "clock")
        return BestPoint(saved.step, clock["epoch"], saved.metrics)

    @property
    def schema(self) -> Schema:
        """The keys, shapes and classes of the data."""
        return self._prepared.work.train.schema

    def sha256(self, which: Literal["best", "last"] = "last") -> str:
        """The identity of the parameters and buffers of a checkpoint."""
        return tensor_sha256(self._checkpoints().model(self._checkpoint(which)))

    def model(self, which: Literal["best", "last"] = "best") -> nn.Module:
        """A copy of the model with a checkpoint's parameters (or their moving average), in eval mode."""
        model = copy.deepcopy(self._prepared.work.model)
        put(model, self._checkpoints(), self._checkpoint(which))
        return model.eval()

    def evaluate(self, data: Any = None, *, which: Literal["best", "last"] = "best") -> dict[str, float]:
        """Loss and metrics on any dataset, a path, or (without data) on the test split, else the validation split."""
        split, dataset = self._split(data)
        with self._using(which):
            return self._prepared.measure(dataset, split)

    def predict(self, inputs: Any, *, which: Literal["best", "last"] = "best") -> Iterator[Prediction]:
        """A prediction for each input: files, folders, a table's path, a dataset, or a tensor (B, …)."""
        with self._using(which):
            settings = self._recipe.data if self._recipe else None
            yield from predict_all(self._prepared, inputs, settings)

    def _split(self, data: Any) -> tuple[str, Any]:
        work = self._prepared.work
        if data is None:
            found = [(name, part) for name, part in [("test", work.test), ("valid", work.valid)] if part is not None]
            if not found:
                raise SettingsError(
                    "this run has no test and no validation split", where="evaluate", fix="run.evaluate(data)"
                )
            return found[0]
        if isinstance(data, str | Path):
            if self._recipe is None:
                raise SettingsError("a path needs a recipe to be read by", where=data, fix="give a dataset instead")
            base = Path.cwd() if Path(data).exists() else self._base
            # the caller names this source, so code in it may run
            opened = open_source(
                self._recipe.data, str(data), base, like=work.train, train=False, load=load_function, split_name="test"
            )
            return "test", opened
        return "test", as_dataset(data)

    @contextlib.contextmanager
    def _using(self, which: Literal["best", "last"]) -> Iterator[None]:
        """The prepared model with a checkpoint's parameters for a while."""
        with self._prepared.borrowed_model() as model:
            put(model, self._checkpoints(), self._checkpoint(which))
            yield

    def _checkpoints(self) -> Checkpoints:
        return checkpoints_of(self._prepared, self._folder)

    def _checkpoint(self, which: Literal["best", "last"]) -> Saved:
        checkpoints = self._checkpoints()
        saved = checkpoints.best() if which == "best" else checkpoints.latest()
        if saved is None:
            raise CheckpointError(
                "this run has no whole checkpoint", where=self._folder.checkpoints, fix="torchkeep resume trains on"
            )
        return saved


def train(
    recipe: str | Path | dict[str, Any],
    *,
    set: Sequence[str] = (),
    run_dir: str | Path | None = None,
    resume: Resume = "no",
    mirror: str | Path | None = None,
    allow_change: Sequence[str] = (),
    quiet: bool = False,
) -> Run:
    """Train a recipe: a TOML file's path, or a dict.

    ``set`` overrides keys, ``["train.epochs=3"]``. ``resume="auto"`` goes on where the newest run of this name ended.
    ``mirror`` is a folder on another disk to which checkpoints are copied, and where a run that is lost here is found.
    ``allow_change=["data"]`` goes on with other data.

    Raises:  SettingsError, DataError, ModelError before anything is written; Interrupted, PreemptedError after saving
    """
    read, base = read_recipe(recipe, list(set))
    console = Console(quiet)
    with contextlib.closing(console):
        found = _find_run(read.name, run_dir, mirror, console) if _goes_on(resume) else None
        lock = FolderLock(found.path).acquire() if found else None
        with _released(lock):
            work, code = _work_of(read, base, load_function)
            facts = {"recipe": read.model_dump(mode="json"), "base": str(base), "code_files": code}
            place = _place(read.name, run_dir)
            return _execute(work, facts, read, base, place, found, lock, console, mirror, allow_change)


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
    checkpoint: dict[str, Any] | None = None,
    early_stopping: dict[str, Any] | None = None,
    monitor: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Run:
    """Train your own module on your own dataset.

    ``loss``: a name, a module or a callable (output, target) → (). ``metrics``: names and torchmetrics objects.
    ``optimizer``: a name, an optimiser, a dict of several, or a function of the model. ``schedule``: a name, a
    scheduler object, a function optimiser → scheduler, or a function (step, total_steps) → factor.
    ``step(model, batch, context)`` → ``{"loss": …, anything to log}`` replaces binding and loss. ``settings`` takes
    further sections as a recipe has them: ``{"train": {"clip_norm": 1.0}}``.

    The model is trained in place and keeps its last parameters; ``run.model()`` is a copy with the best ones. ``seed``
    keys order, augmentation and dropout; the first weights are the model's own: seed torch before it is made.

    Raises:  SettingsError, DataError, ModelError before anything is written; Interrupted, PreemptedError after saving
    """
    _check_objects(model, loss=loss, optimizer=optimizer, step=step)
    data = _sections(settings or {}, seed, name or (Path(run_dir).name if run_dir else type(model).__name__.lower()))
    _merge(data, "train", {"epochs": epochs, "loss": loss if isinstance(loss, str) else None})
    _merge(data, "checkpoint", checkpoint or {})
    _merge(data, "early_stopping", early_stopping or {})
    _merge(data, "monitor", monitor or {})
    own_optimizer = optimizer is not None and not isinstance(optimizer, str)
    if own_optimizer and learning_rate is not None:
        raise SettingsError(
            "the learning rate is given twice", where="tk.fit", got="optimizer= and learning_rate=",
            expected="one of them",
        )  # fmt: skip
    _merge(data, "optimizer", {"name": None if own_optimizer else optimizer, "learning_rate": learning_rate})
    _merge(data, "optimizer", {"schedule": schedule if isinstance(schedule, str) else None})
    checked = check(RunSettings, data, "tk.fit")
    console = Console(quiet)
    with contextlib.closing(console):
        found = _find_run(checked.name, run_dir, mirror, console) if _goes_on(resume) else None
        lock = FolderLock(found.path).acquire() if found else None
        with _released(lock):
            metrics = [metrics] if isinstance(metrics, str) else metrics
            work = Work(
                checked, model, as_dataset(train), as_dataset(valid) if valid is not None else None,
                as_dataset(test) if test is not None else None, batch_size, Feeding(workers, last, cache, on_bad), loss,
                metrics, optimizer, schedule, schedule_every, step, inputs, targets, collate,
            )  # fmt: skip
            objects = {"model": model, "train": train, "loss": loss, "optimizer": optimizer, "schedule": schedule,
                       "step": step, "collate": collate}  # fmt: skip
            facts = {
                "recipe": None,
                "settings": checked.model_dump(mode="json"),
                "objects": {key: describe_object(value) for key, value in objects.items()},
                "batch_size": batch_size,
            }
            place = _place(checked.name, run_dir)
            return _execute(work, facts, None, Path.cwd(), place, found, lock, console, mirror, allow_change)


def resume(
    run_dir: str | Path, *, set: Sequence[str] = (), trust_code: str | None = None, mirror: str | Path | None = None,
    allow_change: Sequence[str] = (), quiet: bool = False,
) -> Run:  # fmt: skip
    """Go on with a recipe's run where its last checkpoint stands.

    Raises:  RunFolderError if there is no such run; SettingsError for a run of ``tk.fit``, naming the call to repeat;
             UntrustedCodeError for code that changed or never ran on this machine
    """
    console = Console(quiet)
    if mirror is not None:
        _fetch(Path(run_dir), mirror, console)
    folder = open_run_folder(run_dir)
    with contextlib.closing(console):
        lock = FolderLock(folder.path).acquire()
        with _released(lock):
            facts = folder.read_run()
            recipe, base = _recorded_recipe(folder, facts, list(set))
            work, _ = _work_of(recipe, base, _trusting(facts, trust_code))
            facts = {**facts, "recipe": recipe.model_dump(mode="json")}
            return _execute(work, facts, recipe, base, None, folder, lock, console, mirror, allow_change)


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
    recipe, base = _recorded_recipe(folder, facts, [])
    work, _ = _work_of(recipe, base, _trusting(facts, trust_code))
    check_data(work, facts)  # classes and a table's statistics are read from the training data again
    return Run(folder, Prepared(work, Decisions(facts["decisions"])), recipe, base)


def evaluate(run_dir: str | Path, data: Any = None, *, trust_code: str | None = None) -> dict[str, float]:
    """Loss and metrics of a run's best checkpoint on ``data``; without data on its test or validation split."""
    return open_run(run_dir, trust_code=trust_code).evaluate(data)


def predict(run_dir: str | Path, inputs: Any, *, trust_code: str | None = None) -> Iterator[Prediction]:
    """Predictions of a run's best checkpoint, in the inputs' order."""
    return open_run(run_dir, trust_code=trust_code).predict(inputs)


def inspect(
    source: Any, batch: Any = None, *, set: Sequence[str] = (), trust_code: str | None = None
) -> list[ModuleRow]:
    """The module tree with shapes and parameters: of a model with a batch, of a recipe, or of a run.

    ``batch`` is a tensor, a tuple of arguments or a dict of keywords for the model's forward.
    """
    if isinstance(source, nn.Module):
        return describe(source, _forward_of(source, batch) if batch is not None else None)
    path = Path(source)
    if path.is_dir():
        prepared = open_run(path, trust_code=trust_code)._prepared
    else:
        recipe, base = read_recipe(path, list(set))
        prepared = Prepared(_work_of(recipe, base, load_function)[0], Decisions())
    example = prepared.mover(prepared.loader.peek())
    return describe(prepared.work.model, lambda: prepared.binding.call(example))


def _forward_of(model: nn.Module, batch: Any) -> Callable[[], Any]:
    if isinstance(batch, tuple | list):
        return lambda: model(*batch)
    return (lambda: model(**batch)) if isinstance(batch, dict) else (lambda: model(batch))


def runs(parent: str | Path = RUNS) -> list[dict[str, Any]]:
    """A row for each run under a folder, oldest first: name, status, attempts, best metrics, when it began."""
    rows: list[dict[str, Any]] = []
    for folder in list_runs(Path(parent)):
        try:
            facts = folder.read_run()
        except RunFolderError as error:
            rows.append({"name": folder.name, "status": "unreadable", "problem": error.what})
            continue
        best = Checkpoints(folder.checkpoints).hint("best")
        rows.append(
            {
                "name": folder.name,
                "status": folder.status(),
                "attempts": next_attempt(folder.records),
                "created": facts["created"],
                "commit": ((facts.get("code") or {}).get("commit") or "")[:8],
                "model": (facts.get("recipe") or {}).get("model", {}).get("name")
                or (facts.get("objects") or {}).get("model", ""),
                "best": best.get("metrics", {}),
            }
        )
    return rows


def _sections(settings: dict[str, Any], seed: int, name: str) -> dict[str, Any]:
    return {"seed": seed, "name": name, **copy.deepcopy(settings)}


def _merge(data: dict[str, Any], section: str, values: dict[str, Any]) -> None:
    given = {key: value for key, value in values.items() if value is not None}
    data.setdefault(section, {}).update(given)


def _goes_on(resume: Resume) -> bool:
    if resume not in ("no", "auto", True, False):
        raise SettingsError("this is no way to resume", where="resume", got=repr(resume), expected='"no" or "auto"')
    return resume in ("auto", True)


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


def _place(name: str, run_dir: str | Path | None) -> Path:
    return Path(run_dir) if run_dir is not None else RUNS / name


def _fetch(run: Path, mirror: str | Path, console: Console) -> None:
    """Bring back from the mirror what this place lacks."""
    if not (Path(mirror) / run.name / "run.json").is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(FolderLock(run).acquire()):
        if Mirror(run, Path(mirror), console.warn).fetch():
            console.say(f"found in the mirror: {Path(mirror) / run.name}")


def _find_run(name: str, run_dir: str | Path | None, mirror: str | Path | None, console: Console) -> RunFolder | None:
    """The newest run of this name, here or in the mirror; None where there is none to go on with."""
    place = _place(name, run_dir)
    if mirror is not None:
        _fetch(place, mirror, console)
    same = [run for run in list_runs(place.parent) if run.name == place.name or _was_numbered(run, place.name)]
    return same[-1] if same else None


def _was_numbered(run: RunFolder, name: str) -> bool:
    """Whether a run wanted this name, which was taken; "digits-2" may also be a name of its own."""
    if not run.name.startswith(f"{name}-"):
        return False
    try:
        return bool(run.read_run().get("wanted_name") == name)
    except RunFolderError:
        return False


@contextlib.contextmanager
def _released(lock: FolderLock | None) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def _trusting(facts: Json, trust_code: str | None) -> Callable[[CodeReference], Callable[..., Any]]:
    """What may run of the code that a run's folder names (law 10)."""
    recorded = {(row["path"], row["function"]): row for row in facts.get("code_files", [])}

    def load(reference: CodeReference) -> Callable[..., Any]:
        row = recorded.get((str(reference.path), reference.function), reference.to_json() | {"sha256": ""})
        return load_function(check_trusted(row, trust_code))

    return load


def _recorded_recipe(folder: RunFolder, facts: Json, assignments: list[str]) -> tuple[Recipe, Path]:
    data = facts.get("recipe")
    if data is not None:
        start = last_attempt_start(folder.records)
        data = override((start or {}).get("settings") or data, assignments)
    if data is None:
        objects = facts.get("objects", {})
        raise SettingsError(
            "this run was made by tk.fit from a program's own objects",
            where=folder.path,
            got=f"model {objects.get('model')}, data {objects.get('train')}",
            expected="a run of torchkeep train",
            fix=f'in that program tk.fit(…, run_dir="{folder.path}", resume="auto") goes on, and gives a run with '
            "evaluate, predict and model",
        )
    return recipe_from_json(data, folder.run_file), Path(facts["base"])


def _work_of(recipe: Recipe, base: Path, load: Callable[[CodeReference], Any]) -> tuple[Work, list[Json]]:
    """Open what a recipe names: data first, then the model made for it."""
    used: list[CodeReference] = []

    def load_reference(reference: CodeReference) -> Any:
        used.append(reference)
        return load(reference)

    def load_name(name: str) -> Any:
        return load_reference(read_reference(name, base))

    splits = open_data(recipe.data, base, recipe.seed, load_reference)
    train_data = as_dataset(splits.train)
    seed_generators(recipe.seed)
    cardinalities = getattr(whole(splits.train), "cardinalities", ())
    model = build_model(recipe.model, train_data.schema, cardinalities, load_name)
    work = Work(
        recipe,
        model,
        train_data,
        as_dataset(splits.valid) if splits.valid is not None else None,
        as_dataset(splits.test) if splits.test is not None else None,
        recipe.data.batch_size,
        Feeding(**{field.name: getattr(recipe.data, field.name) for field in fields(Feeding)}),
        load=load_name,
        weights=recipe.data.weights,
        is_recipe=True,
    )
    return work, [reference.to_json() for reference in used]


def _execute(
    work: Work, facts: Json, recipe: Recipe | None, base: Path, place: Path | None, found: RunFolder | None,
    lock: FolderLock | None, console: Console, mirror: str | Path | None, allow_change: Sequence[str] = (),
) -> Run:  # fmt: skip
    """Prepare, open or make the folder, train, and say how it ended."""
    began = time.time()
    recorded = found.read_run() if found else None
    decisions = Decisions(recorded["decisions"] if recorded else None)
    prepared = Prepared(work, decisions)
    work.resolved = facts.get("recipe") or facts.get("settings")
    changes = Changes()
    if found is not None and recorded is not None:
        folder = found
        changes = changes_since(prepared, folder, facts, recorded, allow_change, console)
    else:
        assert place is not None
        folder = create_run_folder(place.name, place.parent)
        lock = FolderLock(folder.path).acquire()
        if folder.path.name != place.name:
            console.say(f"{place} exists; this run is {folder.path}")
        folder.write_run(
            {
                **facts,
                "wanted_name": place.name,
                "device": str(prepared.device),
                "seed": work.settings.seed,
                "decisions": decisions.to_json(),
                "data": {"fingerprints": work.fingerprints(), "schema": work.train.schema.to_json()},
                "code": code_state(base if recipe else source_folder()),
                "environment": environment(),
                "command": command(),
            }
        )
    try:
        attempt(prepared, folder, console, began, changes, Path(mirror) if mirror else None)
    finally:
        prepared.close()
        if lock is not None:
            lock.release()
    return Run(folder, prepared, recipe, base)
