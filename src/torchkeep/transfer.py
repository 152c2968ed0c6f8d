"""A pretrained model fitted to new data in one call: a probe first, then all of it, and the best of both on validation.

The head is solved for on features that are computed once, its strength found by cross-validation; from that head
everything learns, later layers faster (LP-FT). Whichever is best on the validation split is kept: the probe, the tuned
model, or one between them.

Source:  Kumar et al. 2022 (arXiv 2202.10054), LP-FT; Wortsman et al. 2022 (arXiv 2109.01903), interpolated weights
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from .contracts import Json
from .data.dataset import whole
from .data.foreign import as_dataset
from .data.images import Images
from .data.splits import split
from .errors import ModelError, TorchkeepError
from .model.heads import find_head, fit_head
from .running import Run, execute, loaded, place_of, work_of
from .settings import check, override
from .training.attempt import checkpoints_of
from .training.binding import FEATURE
from .training.decisions import Decisions
from .training.prepare import Prepared
from .training.probe import Probe, fit_probe, interpolate
from .training.recipe import Recipe, RunSettings
from .training.work import Work, describe_object
from .usercode import load_function
from .watch.console import Console, format_number, format_seconds

Tune = bool | Literal["auto"]

VALID_FRACTION = 0.2
_SHARES = (0.25, 0.5, 0.75)
_MOST_TUNING_S = 1800.0
# what the published recipes for whole models agree on: a small rate, later layers faster, a rise and a fall
_DEFAULTS: dict[str, Any] = {
    "train": {"epochs": 8},
    "optimizer": {"learning_rate": 1e-4, "schedule": "cosine", "warmup": 0.1},
    "early_stopping": {"patience": 3},
    "freeze": {"layer_decay": 0.75},
}
_IMAGES: dict[str, Any] = {
    "augment": ["random_resized_crop", "horizontal_flip"],
    # those of ImageNet, which weights in a file do not state: squares of 224 from the middle of 256
    "crop_fraction": 0.875,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def fine_tune(
    model: nn.Module, train: Any, valid: Any = None, *, test: Any = None, head: str | None = None,
    epochs: int | None = None, batch_size: int = 32, learning_rate: float | None = None, tune: Tune = "auto",
    seed: int = 0, name: str | None = None, run_dir: str | Path | None = None, settings: dict[str, Any] | None = None,
    quiet: bool = False,
) -> Run:  # fmt: skip
    """Fit a pretrained model to a dataset of classes or numbers; the model is left with the best parameters.

    ``head`` names its last layer, else it is found; it is replaced where the data have other classes. Without ``valid``
    a fifth of ``train`` is set apart. ``tune="auto"`` trains all of the model where that is expected to take half an
    hour at most; ``settings`` takes further sections, as ``tk.fit`` does.

    Raises:  as ``tk.fit`` does; ModelError where no one vector goes into the head
    """
    data = as_dataset(train)
    held, rest = (as_dataset(valid), data) if valid is not None else split(data, VALID_FRACTION, seed)[:2][::-1]
    schema = data.schema
    number = schema[schema.targets[0]].num_classes if schema.targets else 0
    if number:
        head = fit_head(model, number, head)[0]
    named = name or (Path(run_dir).name if run_dir else type(model).__name__.lower())
    given = _merged(_DEFAULTS, settings or {}) | {"seed": seed, "name": named}
    given["train"] |= {"epochs": epochs} if epochs else {}
    given["optimizer"] |= {"learning_rate": learning_rate} if learning_rate else {}
    chosen = check(RunSettings, given, "tk.fine_tune")
    work = Work(chosen, model, rest, held, as_dataset(test) if test is not None else None, batch_size)
    facts = {
        "recipe": None, "settings": chosen.model_dump(mode="json"), "batch_size": batch_size,
        "objects": {"model": describe_object(model), "train": describe_object(train)},
    }  # fmt: skip
    with contextlib.closing(Console(quiet)) as console:
        return _Transfer(work, head, tune, console).run(facts, None, Path.cwd(), place_of(named, run_dir))


def transfer(
    data: str | Path, model: str, *, weights: str | None = None, head: str | None = None, valid: str | None = None,
    tune: Tune = "auto", set: Sequence[str] = (), run_dir: str | Path | None = None, quiet: bool = False,
) -> Run:  # fmt: skip
    """Fit a model by name to data by name, as ``fine_tune`` does; the run is one of a recipe.

    ``data`` is what ``data.train`` of a recipe may be, or a folder with "train" and "val" or "valid" (and "test") in
    it.
    ``set`` overrides keys of the recipe.
    """
    with contextlib.closing(Console(quiet)) as console:
        work, recipe, code = _opened(data, model, weights, head, valid, set)
        facts = {"recipe": recipe.model_dump(mode="json"), "base": str(Path.cwd()), "code_files": code, **loaded(work)}
        named = work.built.head if work.built is not None else head
        place = place_of(recipe.name, run_dir)
        return _Transfer(work, named, tune, console).run(facts, recipe, Path.cwd(), place)


@dataclass(frozen=True)
class Backbone:
    """What a probe on a backbone's features found. ``problem`` says why there is none."""

    name: str
    accuracy: float | None = None
    held_out: float | None = None
    num_parameters: int = 0
    seconds: float = 0.0
    feature_bytes: int = 0
    samples_per_s: float = 0.0
    problem: str = ""


def backbones(
    data: str | Path, models: Sequence[str], *, weights: Sequence[str | None] = (), valid: str | None = None,
    set: Sequence[str] = (), quiet: bool = False,
) -> list[Backbone]:  # fmt: skip
    """Models ranked by the probe on what they make of the data: best held-out accuracy first.

    ``accuracy`` is that on the validation split, ``held_out`` that of cross-validation on the training split.
    """
    found: list[Backbone] = []
    with contextlib.closing(Console(quiet)) as console:
        for place, name in enumerate(models):
            file = weights[place] if place < len(weights) else None
            begun = time.perf_counter()
            try:
                work, _, _ = _opened(data, name, file, None, valid, set)
                probed = _Transfer(work, work.built.head if work.built else None, False, console).probed()
            except TorchkeepError as error:
                found.append(Backbone(name, problem=f"{error.what}: {error.got}" if error.got else error.what))
                continue
            size = sum(parameter.numel() for parameter in work.model.parameters())
            found.append(
                Backbone(name, probed.score, probed.probe.accuracy, size, time.perf_counter() - begun,
                         probed.feature_bytes, 1 / probed.frozen_s)
            )  # fmt: skip
    return sorted(found, key=lambda row: -1.0 if row.held_out is None else row.held_out, reverse=True)


@dataclass(frozen=True)
class _Probed:
    """The probe, what it measured on validation, and what all of the model would take."""

    probe: Probe
    measured: dict[str, float]
    metric: str
    score: float
    feature_bytes: int
    frozen_s: float
    whole_s: float


class _Transfer:
    """One model on its way to new data."""

    def __init__(self, work: Work, head: str | None, tune: Tune, console: Console):
        self.work, self.tune, self.console = work, tune, console
        self.model = work.model
        self.head = find_head(work.model, head) or ""

    def run(self, facts: Json, recipe: Recipe | None, base: Path, place: Path) -> Run:
        """Probe, tune from there, choose."""
        probed = self.probed()
        start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        epochs = self.work.settings.train.epochs
        expected_s = len(self.work.train) * epochs * probed.whole_s
        is_tuned = self.tune is True or (self.tune == "auto" and expected_s <= _MOST_TUNING_S)
        reason = f"{epochs} epochs of all of it take about {format_seconds(expected_s)}"
        self.work.notes += [
            ("probe", f"{probed.metric} {format_number(probed.score)}", _strength_text(probed.probe), "model.head"),
            (
                "tuning",
                "all of it, from the probe's head" if is_tuned else "the head alone, from the probe's",
                reason,
                "tune",
            ),
        ]
        if not is_tuned:
            self.work.settings = self._head_only()
        run = execute(self.work, facts, recipe, base, place, None, None, self.console, None)
        self._choose(run, start, probed)
        return run

    def probed(self) -> _Probed:
        """Solve for the head on what the rest makes of the samples, and put it in."""
        work = copy.copy(self.work)
        work.settings = self._head_only()
        plain = getattr(work.train, "without_augmentation", None)
        work.train = plain() if plain is not None else work.train
        prepared = Prepared(work, Decisions())
        try:
            prepared.shorten(self.console.say)
            prefix = prepared.prefix
            assert prefix is not None, "it was asked for"
            name, layer = f"{FEATURE}0", self.model.get_submodule(self.head)
            shape = tuple(prefix.train.example[name].shape)
            if not isinstance(layer, nn.Linear) or shape != (layer.in_features,) or len(prefix.frontier.crossings) > 1:
                raise ModelError(
                    "a probe needs one vector that goes into a linear head", where=f"model.head = {self.head!r}",
                    got=f"{type(layer).__name__} after {tuple(shape)}", expected="a linear layer after a vector",
                    fix="tk.fit with freeze trains a head of another kind",
                )  # fmt: skip
            rows = prefix.train.all_rows()
            target = rows[prepared.binding.targets[0]]
            probe = fit_probe(rows[name].flatten(1), target, layer.out_features, seed=work.settings.seed)
            probe.put(layer)
            _, valid = prepared.loaders_at(0)
            measured = prepared.evaluation(valid, "valid") if valid is not None else {}
            metric = prepared.best_metric or "cross-validation"
            score = measured.get(metric, probe.accuracy)
            times = prefix.times
            return _Probed(probe, measured, metric, score, prefix.num_bytes, times.frozen_s, times.whole_s)
        finally:
            prepared.close()

    def _head_only(self) -> Any:
        """The settings with everything but the head frozen, and what it makes of a sample computed once."""
        settings = self.work.settings
        frozen = {"all_but_head": True, "head": self.head}
        given = settings.model_dump(mode="json") | {"freeze": frozen, "features": {"cache": "on"}}
        return check(type(settings), given, "transfer")

    def _choose(self, run: Run, start: dict[str, Tensor], probed: _Probed) -> None:
        """Keep whichever is best on validation: the probe, what was tuned, or what lies between."""
        prepared = run._prepared
        metric, mode = prepared.best_metric, prepared.best_mode
        if metric is None or prepared.work.valid is None:
            return
        tuned = {name: tensor.clone() for name, tensor in run.model("best").state_dict().items()}
        found = {"tuned": (tuned, run.best.metrics), "probe": (start, probed.measured)}
        with prepared.borrowed_model() as model:
            for share in _SHARES:
                between = interpolate(start, tuned, share)
                model.load_state_dict(between)
                found[f"{share:.0%} tuned"] = between, prepared.measure(prepared.work.valid, "valid")
        sign = -1.0 if mode == "min" else 1.0
        # of equals the tuned one, which the run's checkpoints call the best
        best = max(
            found, key=lambda name: (sign * found[name][1][metric], name == "tuned", -found[name][1]["valid/loss"])
        )
        state, measured = found[best]
        self.model.load_state_dict(state)
        if best != "tuned":
            checkpoints = checkpoints_of(prepared, run._folder)
            taken = checkpoints.best()
            held = checkpoints.load(taken)
            held["model"], held["optimizer"]["average"] = dict(state), None
            last = checkpoints.latest()
            checkpoints.save((last.step if last else 0) + 1, held, measured, exact=False)
        rows = [(name, f"{metric.removeprefix('valid/')} {format_number(row[metric])}, loss "
                 f"{format_number(row['valid/loss'])}{'   kept' if name == best else ''}")
                for name, (_, row) in found.items()]  # fmt: skip
        self.console.summary("on the validation split", rows, [])


def _strength_text(probe: Probe) -> str:
    return f"strength {probe.regularisation:g}, {format_number(probe.accuracy)} in cross-validation"


def _opened(
    data: str | Path, model: str, weights: str | None, head: str | None, valid: str | None, assignments: Sequence[str]
) -> tuple[Work, Recipe, list[Json]]:
    """The recipe that the words mean, opened."""
    source = Path(data).expanduser()
    named: dict[str, Any] = {"train": str(data), "valid": valid}
    if source.is_dir() and (source / "train").is_dir():
        named = {"train": str(source / "train"), "test": _first_of(source, "test")}
        named["valid"] = valid or _first_of(source, "valid", "val", "validation")
    if named["valid"] is None:
        named["valid_fraction"] = VALID_FRACTION
    asked = override({}, list(assignments))
    given = {
        "name": f"{source.resolve().stem}-{model.partition(':')[2] or model}".replace("/", "-").replace(":", "-"),
        "data": {name: value for name, value in named.items() if value is not None},
        "model": {"name": model} | {k: v for k, v in {"weights": weights, "head": head}.items() if v is not None},
        "train": {"metrics": ["accuracy"]},
    }
    recipe = check(Recipe, _merged(_merged(_DEFAULTS, given), asked), "transfer")
    work = work_of(recipe, Path.cwd(), load_function)
    images = whole(work[0].train)
    if not isinstance(images, Images):
        return work
    defaults = _IMAGES if images.channels == 3 else {"augment": _IMAGES["augment"], "crop_fraction": 0.875}
    size = {} if images.image_size else {"image_size": 224}
    set_by_user = work[1].data.model_fields_set
    more = {key: value for key, value in (defaults | size).items() if key not in set_by_user}
    again = _merged(_merged(_merged(_DEFAULTS, given), {"data": more}), asked)
    return work_of(check(Recipe, again, "transfer"), Path.cwd(), load_function)


def _first_of(folder: Path, *names: str) -> str | None:
    return next((str(folder / name) for name in names if (folder / name).is_dir()), None)


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Sections of both, a key of the other above the one's."""
    both = copy.deepcopy(one)
    for key, value in other.items():
        both[key] = _merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both
