"""The verbs that hand a model on: package, open, and what is done with what was handed on."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .api import open_run
from .archive import CARD, HEAD, PARAMETERS, SUFFIX
from .contracts import Json, TensorTree
from .errors import CheckpointError, DataError, ModelError, PackageError, SettingsError
from .folder import RunFolder, open_run_folder
from .keep.checkpoint import Checkpoints
from .model.hub import HUB
from .running import Run, Which, execute, loaded, place_of, recorded_recipe, trusting, work_of
from .settings import override
from .share.contents import base_of
from .share.contract import Asked, contract_of
from .share.eject import write_script
from .share.hub import open_archive
from .share.measures import Gathered, Measured, measured
from .share.origin import origin_of, parameters_of, read_origin
from .share.package import (
    ARCHITECTURE,
    BASE,
    LABELS,
    METRICS,
    PREPROCESS,
    PROVENANCE,
    contract_in,
    load_package,
)
from .share.predict import Prediction, Predictor
from .share.reproduce import Reproduced, compared, environment_differences, placements
from .tensors import tensor_sha256
from .training.decisions import Decisions
from .training.prepare import Prepared
from .training.provenance import environment
from .training.recipe import Recipe, read_recipe, recipe_from_json
from .training.resuming import check_data
from .usercode import load_function
from .watch.console import Console


def is_run(source: str | Path) -> bool:
    """Whether a path is a run's folder; all else is taken for a package."""
    return RunFolder(Path(source)).run_file.is_file()


def opened(
    source: str | Path,
    *,
    which: Which = "best",
    base: Any = None,
    trust_code: str | None = None,
    device: str | torch.device | None = None,
) -> Asked:
    """The model of a run's folder, of a package, or of ``hf:USER/NAME``, ready to be asked.

    Raises:  RunFolderError, CheckpointError, PackageError or UntrustedCodeError where it cannot be had
    """
    if is_run(source):
        return open_run(source, trust_code=trust_code).asked(which, device=device)
    if Path(source).is_dir() and not is_package(source):
        raise PackageError(
            "this is neither a run nor a package", where=source, got="a folder without a run.json or package.json",
            expected="a run's folder, a .tkp file, a package's folder, or hf:USER/NAME",
        )  # fmt: skip
    return load_package(source, base=base, trust_code=trust_code, device=device).asked


def predict(
    source: str | Path, inputs: Any, *, which: Which = "best", base: Any = None, trust_code: str | None = None,
    device: str | torch.device | None = None, top: int = 1,
) -> Iterator[Prediction]:  # fmt: skip
    """Predictions of a run or a package in the inputs' order; ``tk.Predictor`` keeps the model for further inputs.

    Raises:  as ``opened`` does; DataError for inputs that are not there
    """
    asked = opened(source, which=which, base=base, trust_code=trust_code, device=device)
    return Predictor(asked, top=top).stream(inputs)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a split or other labelled data; ``values`` by name, the loss and metrics of a run first.

    ``measured`` has no metrics for a run whose outputs have no labels beside them, as those of a step of one's own.
    """

    split: str
    values: dict[str, float]
    measured: Measured
    dataset: Any


def evaluation(
    source: str | Path, data: Any = None, *, which: Which = "best", workers: int | None = None, base: Any = None,
    trust_code: str | None = None, device: str | torch.device | None = None,
) -> Evaluation:  # fmt: skip
    """Measure a run or a package on labelled data: a path, or a dataset; a run also on its own test or valid split.

    A run reads and computes as its recipe says: ``workers`` and ``device`` are a package's.

    Raises:  as ``opened`` does; SettingsError without data; DataError for data that are not like those of training
    """
    if is_run(source):
        if workers is not None or device is not None:
            raise SettingsError("a run is measured as its recipe says", where=source, got="workers or device",
                                expected="neither", fix="torchkeep package RUN, then evaluate the package")  # fmt: skip
        return _evaluation_of(open_run(source, trust_code=trust_code), data, which)
    asked = opened(source, base=base, trust_code=trust_code, device=device)
    if data is None:
        raise SettingsError("a package has no data of its own", where="evaluate", got="no data",
                            expected="labelled data: torchkeep evaluate PACKAGE DATA")  # fmt: skip
    dataset = asked.contract.reader.opened(data, load_function)  # the caller names it, so code in it may run
    found = measured(asked, dataset, workers=workers)
    return Evaluation("test", _named("test", found), found, dataset)


def _evaluation_of(run: Run, data: Any, which: Which) -> Evaluation:
    """A run in one pass: its loss and metrics, and what can be told of the outputs and labels that pass by."""
    prepared, (split, dataset) = run._prepared, run._split(data)
    gathered, found = None, Measured(0, {})
    with contextlib.suppress(DataError):
        gathered = Gathered(contract_of(prepared, None), dataset)
    with run._using(which), contextlib.closing(prepared.evaluation_loader(dataset)) as loader:
        values = prepared.evaluation(loader, split, gathered)
        if gathered is not None:
            with contextlib.suppress(DataError, ModelError):
                found = gathered.measured(loader)
    return Evaluation(split, {**values, **_named(split, found), **values}, found, dataset)


def _named(split: str, found: Measured) -> dict[str, float]:
    return {f"{split}/{name}": value for name, (value, _, _) in found.metrics.items()}


def evaluate(source: str | Path, data: Any = None, **options: Any) -> dict[str, float]:
    """Loss and metrics of a run or a package by name; ``evaluation`` also gives intervals, classes and errors."""
    return evaluation(source, data, **options).values


def is_package(source: str | Path) -> bool:
    """Whether this is meant as a package: a .tkp file, a folder with a package.json, or a hub's name."""
    path = Path(source)
    return str(source).startswith(HUB) or path.suffix == SUFFIX or (path / HEAD).is_file()


def package(
    run_dir: str | Path, path: str | Path | None = None, *, checkpoint: Which = "best", delta: bool | str = False,
    folder: bool = False, trust_code: str | None = None,
) -> Path:  # fmt: skip
    """Write a run's model as a package, NAME.tkp beside the program without ``path``; gives its path.

    ``checkpoint``: "best", "last" or a step. ``delta`` leaves out what is equal to the weights that the run began with,
    or to the weights that it names. ``folder`` writes a folder in place of a file.

    Raises:  as ``open_run`` does; ModelError where the model has no form that can be kept; PackageError where the path
             is taken, or where a delta has no base
    """
    run = open_run(run_dir, trust_code=trust_code)
    base = delta if isinstance(delta, str) else base_of(run._recipe, run._base) if delta else None
    if delta and base is None:
        raise PackageError("this run began with no weights that a delta could leave out", where=run_dir,
                           expected="model.weights in its recipe", fix="--delta WEIGHTS names them")  # fmt: skip
    return run.package(path, which=checkpoint, base=base, folder=folder)


def described(source: str | Path) -> Json:
    """What a package says of itself, each member checked, nothing built: names, sizes, form, classes, metrics, origin.

    Raises:  PackageError where there is none, or it is damaged
    """
    archive = open_archive(source)
    contract_in(archive)
    kept = (ARCHITECTURE, PREPROCESS, LABELS, METRICS, PROVENANCE, BASE)
    said = {name.removesuffix(".json"): archive.json(name) for name in kept if name in archive.names}
    card = bytes(archive.read(CARD)).decode("utf-8", "replace") if CARD in archive.names else ""
    tensors = {name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
               for name, tensor in archive.tensors(PARAMETERS).items()}  # fmt: skip
    members = archive.head["members"]
    return {"path": str(archive.path), "identity": archive.identity, "name": archive.head.get("name"),
            "format": archive.head["format"], "torchkeep": archive.head["torchkeep"], "members": members,
            "parameters": tensors, "card": card, **said}  # fmt: skip


def verify_package(source: str | Path, *, base: Any = None, trust_code: str | None = None) -> str:
    """Read a package whole, every checksum, build its model and run its self-test; gives its identity.

    Raises:  PackageError naming what is damaged
    """
    open_archive(source).verify()
    return load_package(source, base=base, trust_code=trust_code).identity


def reproduce(
    source: str | Path, *, run_dir: str | Path | None = None, trust_code: str | None = None, data: Sequence[str] = (),
    allow_change: Collection[str] = (), quiet: bool = False,
) -> Reproduced:  # fmt: skip
    """Train again what a run or a package was trained with, up to its checkpoint, in a fresh folder, and compare.

    What was decided then, such as threads and precision, is taken again. A run is compared at its last checkpoint, and
    read where it was trained; the paths of a package's recipe begin at the current folder. ``data=["data.train=PATH"]``
    says what lies elsewhere; ``allow_change=["data"]`` goes on with other data.

    Raises:  SettingsError for a run of ``tk.fit``, naming the call to repeat; CheckpointError for other data, before
             anything is trained; UntrustedCodeError for code that this machine has not run; PackageError for a package
             that does not say where it comes from
    """
    changes = [*placements(data), "monitor.views=[]"]  # a stranger's server is not told
    then, tensors, recipe, base, facts = _origin_in(source, changes)
    with contextlib.closing(Console(quiet, sys.stderr if quiet else None)) as console:
        for key, old, new in environment_differences(then["environment"], environment()):
            console.warn(f"{key} was {old!r} and is {new!r} now: the last bits may differ")
        with _placing():
            work, recipe, code = work_of(recipe, base, trusting(facts, trust_code))
        for name in check_data(work, then, "data" in allow_change):
            console.warn(f"the data of {name} are others")
        begun = {"recipe": recipe.model_dump(mode="json"), "base": str(base), "code_files": code, **loaded(work)}
        place, step = place_of(f"{recipe.name}-reproduced", run_dir), then["checkpoint"]["step"]
        run = execute(work, begun, recipe, base, place, None, None, console, None,
                      decided=then["decisions"], until=step)  # fmt: skip
    folder = RunFolder(run.dir)
    reached = Checkpoints(folder.checkpoints).latest()
    assert reached is not None  # a run that has ended has saved
    return compared(run.dir, then, origin_of(folder, reached, None), tensors, parameters_of(folder, reached))


@contextlib.contextmanager
def _placing() -> Iterator[None]:
    """What is missing can be placed, where a recipe would be mended."""
    try:
        yield
    except (DataError, ModelError) as error:
        if isinstance(error, DataError) or "--set" in error.fix:
            error.fix = "--data KEY=PATH, as data.train=PATH, says where it lies now"
        raise


def _origin_in(source: str | Path, changes: list[str]) -> tuple[Json, TensorTree, Recipe, Path, Json]:
    """Where a run or a package comes from, its parameters, and its recipe with the folder and code that it names."""
    if is_run(source):
        folder = open_run_folder(source)
        facts = folder.read_run()
        saved = Checkpoints(folder.checkpoints).latest()
        if saved is None:
            raise CheckpointError("this run has no whole checkpoint", where=source, fix="torchkeep resume trains on")
        then = origin_of(folder, saved, None)
        _check_recipe(then, source)
        recipe, base = recorded_recipe(folder, facts, changes)
        return then, parameters_of(folder, saved), recipe, base, facts
    archive = open_archive(source)
    if PROVENANCE not in archive.names:
        raise PackageError("this package does not say where it comes from", where=source, got=f"no {PROVENANCE}",
                           expected="one that torchkeep package has made of a run")  # fmt: skip
    then = read_origin(archive.json(PROVENANCE), f"{archive.path}, {PROVENANCE}")
    _check_recipe(then, source)
    base = Path.cwd()
    files = [{**row, "path": str((base / row["path"]).resolve())} for row in then["code_files"]]
    recipe = recipe_from_json(override(then["recipe"], changes), f"{archive.path}, {PROVENANCE}")
    tensors = archive.tensors(PARAMETERS)
    said = then["checkpoint"]["tensors"]  # what the package holds counts, not what it says of it
    said |= {name: tensor_sha256({name: tensor}) for name, tensor in tensors.items() if name in said}
    return then, tensors, recipe, base, {"code_files": files}


def _check_recipe(origin: Json, source: str | Path) -> None:
    """Raises:  SettingsError where no recipe says what was trained"""
    if origin["recipe"] is None:
        objects, settings = origin.get("objects") or {}, origin.get("settings") or {}
        epochs = (settings.get("train") or {}).get("epochs")
        raise SettingsError(
            "this was trained by tk.fit from a program's own objects, which no file can give again", where=source,
            got=", ".join(f"{key} {value}" for key, value in objects.items() if value is not None),
            expected="a run of torchkeep train, or its package",
            fix=f'repeat in that program tk.fit(…, epochs={epochs}, batch_size={origin.get("batch_size")}, '
            f'seed={origin["seed"]}, run_dir="NEW"); torchkeep compare shows where two runs part',
        )  # fmt: skip


def eject(
    recipe: str | Path | dict[str, Any], output: str | Path, *, set: Sequence[str] = (), force: bool = False
) -> Path:  # fmt: skip
    """Write what a recipe trains as a plain PyTorch script without torchkeep; gives its path.

    Without augmentation it has the losses of the run to the last bit. It is tried before it is written, up to its first
    step. What code gives of the data lies beside it as a table. ``force`` replaces a file that is there.

    Raises:  SettingsError for what no short script can do, or where a file is in its place; else as ``train``
    """
    place = Path(output).absolute()
    if not place.parent.is_dir():
        raise SettingsError("the folder of the script is missing", where=output, expected="a folder that exists")
    if place.is_dir() or (place.exists() and not force):
        raise SettingsError("something else is where the script should be written", where=output,
                            expected="no such path", fix="" if place.is_dir() else "--force replaces it")  # fmt: skip
    read, base = read_recipe(recipe, list(set))
    work, read, _ = work_of(read, base, load_function)
    with contextlib.closing(Prepared(work, Decisions())) as prepared:
        write_script(prepared, read, base, place)
    return Path(output)
