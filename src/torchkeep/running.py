"""A run: what a recipe or a program names is opened, gets a folder and a lock, and is trained; and what a run gives."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from .contracts import Json, Schema
from .data.dataset import whole
from .data.foreign import as_dataset
from .data.sources import open_data, open_source
from .errors import CheckpointError, RunFolderError, SettingsError
from .files import FolderLock
from .folder import RunFolder, create_run_folder, list_runs
from .keep.checkpoint import Checkpoints, Saved
from .keep.generators import seed_generators
from .keep.mirror import Mirror
from .model.build import build_model, stated
from .model.freeze import release
from .settings import check, override
from .share.contents import contents_of
from .share.contract import Asked, contract_of
from .share.package import write_package
from .share.predict import Prediction, Predictor
from .tensors import tensor_sha256
from .training.attempt import attempt, checkpoints_of, put
from .training.decisions import Decisions
from .training.loop import load_model
from .training.preflight import Level, preflight, refuse_errors
from .training.prepare import Prepared
from .training.provenance import code_state, command, environment
from .training.recipe import Recipe, recipe_from_json
from .training.resuming import Changes, changes_since
from .training.work import Feeding, Work, source_folder
from .usercode import CodeReference, check_trusted, load_function, read_reference
from .watch.console import Console
from .watch.findings import show_preflight
from .watch.records import last_attempt_start, read_records

RUNS = Path("runs")
Which = Literal["best", "last"] | int
"""A checkpoint: the best, the newest, or that of a step."""


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

    def model(self, which: Which = "best") -> nn.Module:
        """A copy of the model with a checkpoint's parameters (or their moving average), in eval mode."""
        model = copy.deepcopy(self._prepared.work.model)
        release(model)
        put(model, self._checkpoints(), self._checkpoint(which))
        return model.eval()

    def asked(
        self, which: Which = "best", device: str | torch.device | None = None
    ) -> Asked:  # fmt: skip
        """A copy of the model with a checkpoint's parameters, to be asked with batches."""
        settings = self._recipe.data if self._recipe is not None else None
        return Asked(self.model(which), contract_of(self._prepared, settings), device or self._prepared.device)

    def package(
        self, path: str | Path | None = None, *, which: Which = "best",
        base: str | None = None, folder: bool = False,
    ) -> Path:  # fmt: skip
        """Write a checkpoint's model as a package, NAME.tkp without ``path``; probabilities are calibrated on the
        validation split. ``base``: weights, mostly those that the run began with; what is equal is left out.

        Raises:  ModelError where the model has no form that can be kept; PackageError where the path is taken
        """
        saved = self._checkpoint(which)
        made = contents_of(self._prepared, self._recipe, self._base, self._folder, saved, self.model(which), base)
        place = Path(path) if path is not None else Path(self._folder.name + ("" if folder else ".tkp"))
        return write_package(made, place, folder=folder).path

    def evaluate(self, data: Any = None, *, which: Which = "best") -> dict[str, float]:
        """Loss and metrics on any dataset, a path, or (without data) on the test split, else the validation split."""
        split, dataset = self._split(data)
        with self._using(which):
            return self._prepared.measure(dataset, split)

    def predict(self, inputs: Any, *, which: Which = "best") -> Iterator[Prediction]:
        """A prediction for each input: files, folders, a table's path, texts, a dataset, or a tensor (N, …)."""
        yield from Predictor(self.asked(which), collate=self._prepared.work.collate).stream(inputs)

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
    def _using(self, which: Which) -> Iterator[None]:
        """The prepared model with a checkpoint's parameters for a while."""
        with self._prepared.borrowed_model() as model:
            put(model, self._checkpoints(), self._checkpoint(which))
            yield

    def _checkpoints(self) -> Checkpoints:
        return checkpoints_of(self._prepared, self._folder)

    def _checkpoint(self, which: Which) -> Saved:
        checkpoints = self._checkpoints()
        if isinstance(which, int):
            return checkpoints.at(which)
        saved = checkpoints.best() if which == "best" else checkpoints.latest()
        if saved is None:
            raise CheckpointError(
                "this run has no whole checkpoint", where=self._folder.checkpoints, fix="torchkeep resume trains on"
            )
        return saved


def place_of(name: str, run_dir: str | Path | None) -> Path:
    """The folder that a run wants."""
    return Path(run_dir) if run_dir is not None else RUNS / name


def fetch(run: Path, mirror: str | Path, console: Console) -> None:
    """Bring back from the mirror what this place lacks."""
    if not (Path(mirror) / run.name / "run.json").is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(FolderLock(run).acquire()):
        if Mirror(run, Path(mirror), console.warn).fetch():
            console.say(f"found in the mirror: {Path(mirror) / run.name}")


def find_run(name: str, run_dir: str | Path | None, mirror: str | Path | None, console: Console) -> RunFolder | None:
    """The newest run of this name, here or in the mirror; None where there is none to go on with."""
    place = place_of(name, run_dir)
    if mirror is not None:
        fetch(place, mirror, console)
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


def taken(run: Path, console: Console) -> FolderLock:
    """Lock a run's folder; a lock that was left behind is said."""
    lock = FolderLock(run).acquire()
    if lock.stale:  # of another host: it may still be there
        (console.say if lock.is_from_here else console.warn)(lock.stale)
    return lock


@contextlib.contextmanager
def released(lock: FolderLock | None) -> Iterator[None]:
    """Give the lock back where what follows fails."""
    try:
        yield
    except BaseException:
        if lock is not None:
            lock.release()
        raise


def trusting(facts: Json, trust_code: str | None) -> Callable[[CodeReference], Callable[..., Any]]:
    """What may run of the code that a run's folder names (law 10)."""
    recorded = {(row["path"], row["function"]): row for row in facts.get("code_files", [])}

    def load(reference: CodeReference) -> Callable[..., Any]:
        row = recorded.get((str(reference.path), reference.function), reference.to_json() | {"sha256": ""})
        return load_function(check_trusted(row, trust_code))

    return load


def recorded_recipe(folder: RunFolder, facts: Json, assignments: list[str]) -> tuple[Recipe, Path]:
    """The recipe of a run as its last attempt had it, changed by assignments, and the folder of its paths.

    Raises:  SettingsError for a run of objects, naming the call to repeat
    """
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


def work_of(
    recipe: Recipe, base: Path, load: Callable[[CodeReference], Any], is_new: bool = True
) -> tuple[Work, Recipe, list[Json]]:
    """Open what a recipe names: data first, then the model made for it. A run that goes on reads no weights again."""
    used: list[CodeReference] = []

    def load_reference(reference: CodeReference) -> Any:
        used.append(reference)
        return load(reference)

    def load_name(name: str) -> Any:
        return load_reference(read_reference(name, base))

    recipe = _with_stated(recipe, stated(recipe.model, base))
    splits = open_data(recipe.data, base, recipe.seed, load_reference)
    train_data = as_dataset(splits.train)
    seed_generators(recipe.seed)
    cardinalities = getattr(whole(splits.train), "cardinalities", ())
    built = build_model(recipe.model, train_data.schema, cardinalities, load_name, base, loads=is_new)
    work = Work(
        recipe,
        built.model,
        train_data,
        as_dataset(splits.valid) if splits.valid is not None else None,
        as_dataset(splits.test) if splits.test is not None else None,
        recipe.data.batch_size,
        Feeding(**{field.name: getattr(recipe.data, field.name) for field in fields(Feeding)}),
        load=load_name,
        weights=recipe.data.weights,
        is_recipe=True,
        built=built,
        notes=built.notes,
    )
    return work, recipe, [reference.to_json() for reference in used]


def _with_stated(recipe: Recipe, found: dict[str, Any]) -> Recipe:
    """The recipe with what its model states of preprocessing, where the recipe says nothing of it.

    Raises:  SettingsError where it says something else
    """
    data = recipe.data.model_dump(mode="json")
    given = {key: data[key] for key in found if key in recipe.data.model_fields_set and data[key] is not None}
    for key, value in given.items():
        if value != found[key] and recipe.model.preprocess == "stated":
            raise SettingsError(
                "the recipe and the model's weights state different preprocessing", where=f"data.{key}",
                got=f"data.{key} = {value}", expected=f"{found[key]}, which {recipe.model.name} states",
                fix=f'remove data.{key}, or model.preprocess = "own" keeps what the recipe says',
            )  # fmt: skip
    if found.keys() <= given.keys():
        return recipe
    return check(Recipe, recipe.model_dump(mode="json") | {"data": data | found | given}, "recipe")


def loaded(work: Work) -> Json:
    """What the model began with, for run.json."""
    report = work.built.report if work.built is not None else None
    return {"weights": report.to_json()} if report is not None else {}


def _frozen_epoch(prepared: Prepared, found: RunFolder) -> int:
    """The epoch that a run goes on in, its model being given what was saved, where a part of it is frozen.

    What is kept of the frozen part is named by its parameters, which a resumed recipe has not loaded yet.
    """
    checkpoints, model = checkpoints_of(prepared, found), prepared.work.model
    saved = checkpoints.latest() if any(not p.requires_grad for p in model.parameters()) else None
    if saved is None:
        return 0
    load_model(model, checkpoints.model(saved))
    return int(checkpoints.load_part(saved, "clock")["epoch"])


def _looked_over(prepared: Prepared, level: Level, place: Path | None, console: Console) -> Json:
    """What preflight found, said.

    Raises:  PreflightError where nothing can be learned
    """
    try:
        report = preflight(prepared, level, place)
        show_preflight(console, report.to_json()["findings"], brief=True)
        refuse_errors(report.findings)
    except BaseException:
        prepared.close()
        raise
    return report.to_json()


def execute(
    work: Work, facts: Json, recipe: Recipe | None, base: Path, place: Path | None, found: RunFolder | None,
    lock: FolderLock | None, console: Console, mirror: str | Path | None, allow_change: Sequence[str] = (),
    decided: list[Json] | None = None, until: int | None = None, level: Level = "off",
) -> Run:  # fmt: skip
    """Prepare, look over (a new run only), open or make the folder, train, and say how it ended.

    ``decided`` are another run's decisions, taken by a new one in place of its own. It ends after step ``until``, on
    the course of one that goes on.
    """
    began = time.time()
    recorded = found.read_run() if found else None
    decisions = Decisions(recorded["decisions"] if recorded else decided)
    try:
        prepared = Prepared(work, decisions)
        prepared.shorten(console.say, _frozen_epoch(prepared, found) if found is not None else 0)
    except BaseException:
        if work.settings.freeze is not None:
            release(work.model)
        raise
    if until is not None:  # only now: schedules and the frozen part are planned for the whole course
        prepared.total_steps = min(prepared.total_steps, until)
    if found is None and level != "off":
        facts = {**facts, "preflight": _looked_over(prepared, level, place, console)}
    work.resolved = facts.get("recipe") or facts.get("settings")
    changes = Changes()
    if found is not None and recorded is not None:
        folder = found
        changes = changes_since(prepared, folder, facts, recorded, allow_change, console)
    else:
        assert place is not None
        folder, lock = create_run_folder(place.name, place.parent)
        if folder.path.name != place.name:
            console.say(f"{place} exists; this run is {folder.path}")
        with released(lock):
            folder.write_run(
                {
                    **facts,
                    "wanted_name": place.name,
                    "device": str(prepared.device),
                    "seed": work.settings.seed,
                    "decisions": decisions.to_json(),
                    "data": {"fingerprints": work.fingerprints(), "schema": work.train.schema.to_json()},
                    "code": code_state(base if recipe else source_folder(), place.parent),
                    "environment": environment(),
                    "command": command(),
                }
            )
    try:
        attempt(prepared, folder, console, began, changes, base if recipe else source_folder(), mirror)
    finally:
        prepared.close()
        if lock is not None:
            lock.release()
    return Run(folder, prepared, recipe, base)
