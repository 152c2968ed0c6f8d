"""One process's share of a run: from its newest checkpoint, or from the start, to the end and the last table."""

from __future__ import annotations

import contextlib
import hashlib
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..contracts import Json
from ..errors import Interrupted, PreemptedError, TorchkeepError
from ..folder import RunFolder
from ..keep.checkpoint import MANIFEST, Checkpoints, Saved
from ..keep.generators import seed_generators
from ..keep.mirror import Mirror
from ..tensors import tensor_sha256
from ..watch.console import Console, format_number, format_seconds
from ..watch.media import Medium
from ..watch.monitor import make_views
from ..watch.recorder import Recorder
from ..watch.records import last_step, next_attempt, records_of
from ..watch.system import System
from .loop import Training, load_model
from .prepare import Prepared
from .provenance import EnvironmentLock, untracked_files
from .resuming import Changes
from .signals import Signals
from .watching import DUES, Watching

_STARTS_WITH = ("recipe", "settings", "objects", "seed", "command", "code", "data", "device")


def attempt(
    prepared: Prepared, folder: RunFolder, console: Console, began: float, changes: Changes, base: Path,
    mirror: str | Path | None,
) -> None:  # fmt: skip
    """Train a prepared run to its end in its folder, whose lock is held.

    ``began`` is when the command began, Unix s; ``base`` is where its code lies. An attempt that is not exact, since
    something has changed, is shown apart where it takes steps again that were recorded before (law 9).

    Raises:  Interrupted or PreemptedError after saving; RunFailedError, with the last good checkpoint standing
    """
    settings = prepared.work.settings
    number = next_attempt(folder.records)
    checkpoints = checkpoints_of(prepared, folder, console)
    taken = checkpoints.take_up()
    saved = taken[0] if taken else None
    if mirror is not None:
        copied = Mirror(folder.path, Path(mirror), console.warn)
        checkpoints.after_visible = copied.begin
    goes_apart = not changes.is_exact and last_step(folder.records) > (saved.step if saved else 0)
    views = make_views(settings.monitor, folder.path, number, apart=goes_apart)
    recorder = Recorder(
        folder.records, attempt=number, views=views, on_record=prepared.work.on_record, on_alert=console.warn
    )
    watching = Watching(prepared, recorder, console.say, _periods(folder.records) if number else {})
    training = prepared.training(checkpoints, recorder, console, Signals(), _go_on(prepared, folder), watching)
    training.data_changed = changes.data
    clock = training.clock
    system = System(
        lambda values: recorder.log("system", **clock.state_dict(), values=values), folder.path,
        settings.monitor.system_every_s,
    )  # fmt: skip
    try:
        # before anything is recorded: a checkpoint that does not fit leaves no record behind
        _restore(training, taken[1] if taken else None, settings.seed)
        _announce(training, prepared, folder, saved, changes)
        if number == 0:
            _record_start(training, prepared, folder, began, base)
        metrics, reason = _train(training, prepared)
    finally:
        with contextlib.suppress(Exception):
            checkpoints.join()  # the folder's lock is not given back while a thread still writes there
        system.close()
        with contextlib.suppress(Exception):
            recorder.close()
        if mirror is not None:
            copied.begin(folder.path)
            copied.join()
    _summarise(training, prepared, folder, metrics, reason, began)


def _train(training: Training, prepared: Prepared) -> tuple[dict[str, float], str]:
    try:
        at = training.clock.state_dict()
        training.recorder.log("attempt_start", **at, from_step=training.clock.step, settings=prepared.work.resolved)
        reason = training.run()
        with training.signals.at_once("after the last step; the state is saved", training.go_on):
            best = training.checkpoints.best() if prepared.settings.early_stopping.restore_best else None
            if best is not None:
                put(prepared.work.model, training.checkpoints, best)
            metrics = {**training.metrics, **_test(prepared, training)}
        _record_end(training, "finished", metrics, reason, _artifacts(training, prepared))
    except BaseException as error:
        _record_failure(training, error)
        raise
    return metrics, reason


def checkpoints_of(prepared: Prepared, folder: RunFolder, console: Console | None = None) -> Checkpoints:
    """A run's checkpoints, kept and judged by its settings."""
    kept = prepared.work.settings.checkpoint
    return Checkpoints(
        folder.checkpoints,
        kept.keep_last,
        kept.keep_best,
        prepared.best_metric,
        prepared.best_mode,
        kept.keep_every,
        console.warn if console else None,
    )


def put(model: nn.Module, checkpoints: Checkpoints, saved: Saved) -> None:
    """Give a model a checkpoint's parameters, or their moving average where there is one.

    Raises:  CheckpointError where the checkpoint is damaged or of another model
    """
    average = checkpoints.load_part(saved, "optimizer")["average"]
    load_model(model, {**checkpoints.model(saved), **(average or {})})


def _restore(training: Training, state: dict[str, Any] | None, seed: int) -> None:
    """Become the newest whole checkpoint; without one, seed what a fresh run draws from."""
    if state is None:
        seed_generators(seed)
    else:
        training.load_state_dict(state)


def _announce(training: Training, prepared: Prepared, folder: RunFolder, saved: Saved | None, changes: Changes) -> None:
    console = training.console
    if saved is not None:
        console.say(f"resumed from step {saved.step}, epoch {training.clock.epoch} ({saved.path})")
        console.say(f"restored  {_restored(training)}")
        reasons = list(changes.reasons)
        if prepared.device.type != "cpu" and not prepared.work.settings.train.deterministic:
            reasons.append("without train.deterministic = true a GPU's last bits differ")
        if not saved.is_exact:
            reasons.append("the checkpoint was taken after a step that failed halfway")
        reasons += [row.reason for row in prepared.decisions.rows if row.name == "resume"]
        console.say(f"resume    {'best-effort: ' + '; '.join(reasons) if reasons else 'exact'}")
    console.decisions(prepared.decisions.rows)
    console.say(f"run       {folder.path}")


def _restored(training: Training) -> str:
    parts = ["parameters", "optimiser", "random states", f"{training.loader.batches_left:,} batches left of the epoch"]
    if training.average is not None:
        parts.append("moving average")
    if training.best.value is not None:
        parts.append(f"best {training.best_metric} {format_number(training.best.value)}")
    if training.stopper is not None:
        parts.append(f"{training.stopper.waited} of {training.stopper.patience} evaluations without a better one")
    return ", ".join(parts)


def _periods(records: Path) -> dict[str, int]:
    """How often something expensive is done, as an earlier attempt has decided it."""
    return {row["name"]: row["value"] for row in records_of(records, "decision") if row["name"] in DUES}


def _record_start(training: Training, prepared: Prepared, folder: RunFolder, began: float, base: Path) -> None:
    at, log = training.clock.state_dict(), training.recorder.log
    facts = {key: value for key, value in folder.read_run().items() if key in _STARTS_WITH}
    log("run_start", **at, began=began, **facts, late=EnvironmentLock())
    for name, data in untracked_files(base, facts["code"]):
        kept = Medium(data, ".txt", {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
        log("artifact", **at, name=name, type="code", parents=[], late=kept)
    for row in prepared.decisions.to_json():
        log("decision", **at, **row)


def _test(prepared: Prepared, training: Training) -> dict[str, float]:
    """The test split, once, at the end, with the best checkpoint's parameters."""
    if prepared.work.test is None:
        return {}
    best = training.checkpoints.best()
    with prepared.borrowed_model() as model:
        if best is not None:
            put(model, training.checkpoints, best)
        measured = prepared.measure(prepared.work.test, "test")
    training.recorder.log("scalars", **training.clock.state_dict(), values=measured)
    return measured


def _artifacts(training: Training, prepared: Prepared) -> list[Json]:
    """The checkpoints that a run ends with; one is named by the sha256 of its manifest, which has all checksums."""
    parents, place = list(prepared.work.fingerprints().values()), training.checkpoints.folder
    rows = []
    for name in ("best", "last"):
        saved = place / str(training.checkpoints.hint(name).get("folder"))
        with contextlib.suppress(OSError):
            manifest = (saved / MANIFEST).read_bytes()
            size = sum(file.stat().st_size for file in saved.iterdir())
            rows.append({"name": name, "type": "checkpoint", "path": f"{place.name}/{saved.name}", "bytes": size,
                         "parents": parents, "sha256": hashlib.sha256(manifest).hexdigest()})  # fmt: skip
    return rows


def _record_end(
    training: Training, status: str, metrics: dict[str, float], reason: str, artifacts: Sequence[Json] = ()
) -> None:
    at = training.clock.state_dict()
    for row in artifacts:
        training.recorder.log("artifact", **at, **row)
    training.recorder.log(
        "run_end", **at, status=status, reason=reason, metrics=dict(metrics), artifacts=list(artifacts),
        device_waits=training.window.num_waits,
    )  # fmt: skip
    training.recorder.flush(durable=True)


def _record_failure(training: Training, error: BaseException) -> None:
    status = "interrupted" if isinstance(error, KeyboardInterrupt | PreemptedError) else "failed"
    text = error.what if isinstance(error, TorchkeepError | Interrupted) else f"{type(error).__name__}: {error}"
    with contextlib.suppress(TorchkeepError):
        _record_end(training, status, training.metrics, text)


def _summarise(
    training: Training, prepared: Prepared, folder: RunFolder, metrics: dict[str, float], reason: str, began: float
) -> None:
    path, best, clock = folder.path, training.best, training.clock
    rows = [(name if name.startswith("test/") else f"last {name}", format_number(v)) for name, v in metrics.items()]
    if best.value is not None:  # which parameters a test was made with must not be guessed
        rows = [(name, f"{text} (the best)" if name.startswith("test/") else text) for name, text in rows]
    if best.value is not None:
        rows.insert(0, (f"best {training.best_metric}", f"{format_number(best.value)} (epoch {best.epoch})"))
    if training.trained_s:
        rows.append(("speed", f"{training.rate:,.0f} samples/s"))
    else:
        reason = f"nothing was left to train; {reason}"
    rows += [
        ("ended", f"{reason} after epoch {clock.epoch}, step {clock.step:,}"),
        ("time", f"{format_seconds(time.time() - began)}, of it training {format_seconds(training.trained_s)}"),
        ("parameters", f"sha256 {tensor_sha256(dict(prepared.work.model.state_dict()))[:16]}"),
        ("run", str(path)),
        ("checkpoints", str(folder.checkpoints)),
        ("record", str(folder.records)),
    ]
    training.console.summary(folder.name, rows, _next_commands(prepared, folder))


def _go_on(prepared: Prepared, folder: RunFolder) -> str:
    if prepared.work.is_recipe:
        return f"torchkeep resume {shlex.quote(str(folder.path))}"
    return f'run the same program again with tk.fit(…, run_dir="{folder.path}", resume="auto")'


def _next_commands(prepared: Prepared, folder: RunFolder) -> list[str]:
    path = shlex.quote(str(folder.path))
    commands = []
    if prepared.work.is_recipe:
        commands = [f"torchkeep evaluate {path}", f"torchkeep predict {path} FILES", f"torchkeep package {path}"]
    if folder.tensorboard.is_dir():
        commands.append(f"tensorboard --logdir {shlex.quote(str(folder.path.parent))}")
    return commands
