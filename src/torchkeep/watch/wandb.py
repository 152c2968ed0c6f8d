"""The record at Weights & Biases: one run an attempt, in a group that is named as the run.

A record is one row, and its number at W&B is the record's ``seq``: the server itself then tells what it has. The clock
``step`` is a value of each row, which every curve is drawn over. All that the client writes lies in RUN/wandb. What it
does to its process (``sys.excepthook``, ``sys.exit``, an exit that waits for uploads) it does apart: see ``apart.py``.
"""

from __future__ import annotations

import contextlib
import html
import json
import netrc
import os
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import orjson
from pydantic import Field

from ..contracts import Json
from ..files import write_durable
from ..settings import Settings
from .apart import Apart, Attempts
from .feeds import Unreachable
from .media import MediaStore
from .records import Record

_NOTE_S = 10.0
_BINS = 64
_INIT_S = 20.0
_CLOCK = ("step", "epoch", "samples")
_ASKS = {"artifact", "prediction", "confusion", "pr_curve", "trainable_map", "bad_samples"}
_SENT = {"graph": "graph.json", "profile": "profile.pt.trace.json"}
_PREDICTION = ("sample", "input", "truth", "output", "confidence", "is_right")


class WandbSettings(Settings):
    """Where Weights & Biases keeps a run."""

    project: str | None = None
    """The project; left out, $WANDB_PROJECT, else "torchkeep"."""
    entity: str | None = None
    """The user or team; left out, the one of the API key."""
    mode: Literal["auto", "online", "offline"] = "auto"
    """"auto": online where there is an API key, else offline, to be sent by ``torchkeep sync RUN --to wandb``."""
    name: str | None = None
    """What the run is called there; left out, as its folder."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""
    models: bool = False
    """Whether packages and the best checkpoint are uploaded."""
    close_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds that the end of a run waits for the upload; what is left then, ``torchkeep sync`` sends."""


class WandbView(Apart):
    """One run in Weights & Biases for this attempt; earlier attempts that were cut off are completed."""

    name = "wandb"
    sender = "torchkeep.watch.wandb:WandbSender"
    answer_s = 60.0


class WandbSender(Attempts):
    """Sends records by W&B's client."""

    def __init__(self, folder: Path, attempt: int, run_name: str, settings: dict[str, Any]):
        super().__init__(folder, attempt, settings["name"] or run_name, settings)
        self._place = folder / "wandb"
        inside = {"DIR": "", "DATA_DIR": "", "ARTIFACT_DIR": "artifacts", "CACHE_DIR": "cache", "CONFIG_DIR": "config"}
        os.environ.update({f"WANDB_{key}": str(self._place / part) for key, part in inside.items()})
        os.environ["WANDB_ERROR_REPORTING"] = "false"
        import wandb

        self._wandb: Any = wandb
        self._rows = _Rows(self.media)
        self._mode = settings["mode"]
        if self._mode == "auto":
            self._mode = os.environ.get("WANDB_MODE") or ("online" if _has_key(wandb.setup().settings) else "offline")
        self._noted = time.monotonic()
        self._delivered: dict[str, Json] = {}
        with contextlib.suppress(FileNotFoundError):
            self._delivered = orjson.loads((self._place / "delivered.json").read_bytes())

    def send(self, records: list[Record]) -> None:
        for record in records:
            self._show(record)
        if time.monotonic() - self._noted > _NOTE_S:
            self.flush()

    def flush(self) -> None:
        """Note what the client has; what the server has, it says itself when a run is opened again."""
        if self.is_open:
            self._note(self._opened, is_whole=False)

    def close(self) -> None:
        if self.is_open:
            with contextlib.suppress(OSError):
                self._send_code()
        self._end(is_whole=self.live < 0 or self._has_ended)
        shutil.rmtree(self._place / "cache", ignore_errors=True)

    # --- runs

    def begin(self, first: Record) -> bool:
        attempt = first["attempt"]
        before = self._delivered.get(str(attempt), {})
        is_done = before.get("whole") or (before.get("mode") == "online" and self._mode == "offline")
        if is_done and attempt < self.live:
            return False
        self._was_whole = bool(before.get("whole")) and before.get("mode") == self._mode
        self._row, self._exit_code, self._has_ended = -1, 1, False
        self._code: dict[str, Path | bytes] = {}
        try:
            self._open(f"{self.run_id()}-{attempt}", first)
        except Exception as error:
            raise Unreachable(f"W&B opens no run: {type(error).__name__}: {error}") from error
        if attempt > 0:
            self._describe(self.run_start())
        return True

    def _open(self, name: str, first: Record) -> None:
        self._reach()
        is_online = self._mode == "online"
        if not is_online:  # the record is the truth: one that was cut off is written again, whole
            for left in (self._place / "wandb").glob(f"offline-run-*-{name}"):
                shutil.rmtree(left, ignore_errors=True)
        given = {key: self.settings[key] for key in ("entity", "tags")}
        self._run = self._wandb.init(
            project=self.settings["project"] or os.environ.get("WANDB_PROJECT") or "torchkeep", **given, id=name,
            group=self.name, name=f"{self.name}/attempt-{first['attempt']}", job_type="train", dir=str(self._place),
            mode=self._mode, resume="allow" if is_online else None, settings=self._wandb.Settings(
                console="off", silent=True, init_timeout=_INIT_S, x_start_time=first["time"],
                finish_timeout=self.settings["close_timeout_s"] * 0.5, finish_timeout_raises=True,
                # the record has its own
                x_disable_stats=True, x_disable_meta=True, x_save_requirements=False, disable_git=True, save_code=False,
            ),
        )  # fmt: skip
        self._start, self._opened = self._run.starting_step, first["attempt"]
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def end(self, is_whole: bool) -> None:
        self.is_open, self.attempt = False, -1  # whatever comes of it, this run takes no more
        self._run.finish(exit_code=self._exit_code)  # raises TimeoutError where the server has not taken all of it
        self._note(self._opened, is_whole)

    def _note(self, attempt: int, is_whole: bool) -> None:
        self._noted = time.monotonic()
        self._delivered[str(attempt)] = {"seq": self.seq, "mode": self._mode, "whole": is_whole}
        write_durable(self._place / "delivered.json", orjson.dumps(self._delivered))

    # --- records

    def _show(self, record: Record) -> None:
        if record["kind"] not in ("run_start", "artifact", "decision"):
            self._send_code()
        if record["kind"] in _ASKS:
            self._reach()
        act = getattr(self, f"_{record['kind']}", None)
        if act is not None:
            act(record)
        make = getattr(self._rows, record["kind"], None)
        row = make(record) if make is not None else {}
        if row and record["seq"] >= self._start:
            clock = {key: record[key] for key in _CLOCK}
            self._run.log({**row, **clock, "_timestamp": record["time"]}, step=record["seq"], commit=True)
        elif row and not self._was_whole:
            self._upload(row)
        self._row = record["seq"] if row else self._row
        self.seq = record["seq"]

    def _reach(self) -> None:
        """See that the server is there: the client waits minutes for one that is not, where it asks something.

        Raises:  OSError
        """
        url = urlsplit(self._wandb.setup().settings.base_url)
        if self._mode == "online" and url.hostname and not getproxies():
            socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), 5).close()

    def _upload(self, row: dict[str, Any]) -> None:
        """Send the files of a row that the server has: its client may have been ended between the two."""
        for key, value in row.items():
            if hasattr(value, "bind_to_run"):
                value.bind_to_run(self._run, key, self._row + 1)  # as the client counts for a file's name

    def _attempt_start(self, record: Record) -> None:
        self._run.config.update(record.get("settings") or {}, allow_val_change=True)

    def _run_start(self, record: Record) -> None:
        self._describe(record)
        code = record.get("code") or {}
        facts = {"commit.txt": code.get("commit"), "diff.patch": code.get("diff"),
                 "requirements.txt": "\n".join((record.get("environment") or {}).get("lock") or ())}  # fmt: skip
        self._code = {name: text.encode() for name, text in facts.items() if text}

    def _describe(self, start: Record) -> None:
        facts = {key: start[key] for key in ("seed", "command") if start.get(key) is not None}
        facts["environment"] = {k: v for k, v in (start.get("environment") or {}).items() if k != "lock"}
        facts["commit"] = (start.get("code") or {}).get("commit")
        self._run.config.update({**facts, **(start.get("settings") or {})}, allow_val_change=True)

    def _decision(self, record: Record) -> None:
        self._run.config.update({f"decisions/{record['name']}": record["value"]}, allow_val_change=True)

    def _alert(self, record: Record) -> None:
        if record["seq"] >= self._start:
            level = "ERROR" if record["level"] == "error" else "WARN"
            self._run.alert(record["name"], f"{record['text']}\n{record['fix']}".strip(), level=level, wait_duration=1)

    def _artifact(self, record: Record) -> None:
        source = self.source(record)
        if record["type"] == "code":
            self._code[f"untracked/{record['name']}"] = source
        elif self.is_model(record):
            facts = {key: record[key] for key in ("sha256", "bytes", "parents")}
            if self._mode == "online":
                for parent in record["parents"]:
                    data = self._wandb.Artifact(_name(f"data-{parent}"), "dataset", metadata={"fingerprint": parent})
                    self._run.use_artifact(_filled(data, {"fingerprint.txt": str(parent).encode()}))
            made = self._wandb.Artifact(_name(f"{self.name}-{record['name']}"), "model", metadata=facts)
            self._run.log_artifact(_filled(made, {source.name: source}))

    def _graph(self, record: Record) -> None:
        self._send(record["kind"], {_SENT[record["kind"]]: self.media.read(record["media"])})

    _profile = _graph

    def _run_end(self, record: Record) -> None:
        self._has_ended = True
        self._exit_code = 0 if record["status"] == "finished" else 1
        told = {key: record.get(key) for key in ("status", "reason")}
        self._run.summary.update({**(record.get("metrics") or {}), **told})

    def _send_code(self) -> None:
        if self._code:
            self._send("code", self._code)
            self._code = {}

    def _send(self, kind: str, files: dict[str, Path | bytes]) -> None:
        self._reach()
        made = self._wandb.Artifact(_name(f"{kind}-{self.name}"), kind)
        self._run.log_artifact(_filled(made, files))


def _has_key(settings: Any) -> bool:
    """Whether the client will find a key, without a question to the server."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        keys = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return keys.authenticators(urlsplit(settings.base_url).hostname or "") is not None


def _name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII)[:120]


def _filled(artifact: Any, files: dict[str, Path | bytes]) -> Any:
    for name, content in files.items():
        if isinstance(content, bytes):
            with artifact.new_file(name, mode="wb") as file:
                file.write(content)
        elif content.is_dir():
            artifact.add_dir(str(content))
        else:
            artifact.add_file(str(content), name=name)
    return artifact


class _Rows:
    """What each kind of record is at W&B: a row of values by name."""

    def __init__(self, media: MediaStore):
        import wandb

        self._wandb: Any = wandb
        self._media = media

    def scalars(self, record: Record) -> dict[str, Any]:
        # names with a leading "_" are W&B's own
        return {f"value/{tag}" if tag[:1] == "_" or tag in _CLOCK else tag: v for tag, v in record["values"].items()}

    timing = system = scalars

    def histogram(self, record: Record) -> dict[str, Any]:
        left_out = {key: record[key] for key in ("nan", "positive_infinite", "negative_infinite")}
        row: dict[str, Any] = {f"{record['tag']}/{key}": count for key, count in left_out.items() if count}
        if record["num"]:
            from .histograms import rebinned

            edges, counts = rebinned(record, _BINS)
            row[record["tag"]] = self._wandb.Histogram(np_histogram=(counts, edges))
        return row

    def image(self, record: Record) -> dict[str, Any]:
        picture = self._wandb.Image(self._file(record), caption=record.get("caption") or None)
        return {record["tag"]: picture}

    figure = image

    def prediction(self, record: Record) -> dict[str, Any]:
        row = {f"{record['tag']}/table": self._table(record["rows"], _PREDICTION)}
        return row | (self.image(record) if record["media"] else {})

    def mesh(self, record: Record) -> dict[str, Any]:
        import io

        import numpy as np
        from safetensors.numpy import load

        parts = load(self._media.read(record["media"]))
        points, colors = parts["vertices"], parts["colors"]
        if "faces" not in parts:
            return {record["tag"]: self._wandb.Object3D(np.concatenate([points, colors], 1))}
        lines = [f"v {x} {y} {z} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(points, colors / 255, strict=True)]
        lines += [f"f {a} {b} {c}" for a, b, c in parts["faces"] + 1]
        return {record["tag"]: self._wandb.Object3D(io.StringIO("\n".join(lines)), file_type="obj")}

    def text(self, record: Record) -> dict[str, Any]:
        cut = "" if record["num_characters"] == len(record["text"]) else f"\n… {record['num_characters']:,} characters"
        return {record["tag"]: self._wandb.Html(f"<pre>{html.escape(record['text'] + cut)}</pre>")}

    def audio(self, record: Record) -> dict[str, Any]:
        caption = record.get("caption") or None
        return {record["tag"]: self._wandb.Audio(self._file(record), record["sample_rate"], caption)}

    def confusion(self, record: Record) -> dict[str, Any]:
        names = record["classes"]
        rows = [[names[truth], names[output], count] for truth, counts in enumerate(record["counts"])
                for output, count in enumerate(counts)]  # fmt: skip
        columns = ["Actual", "Predicted", "nPredictions"]
        table = self._wandb.Table(columns, rows)
        fields = dict.fromkeys(columns)
        return {
            record["tag"]: self._wandb.plot_table("wandb/confusion_matrix/v1", table, {name: name for name in fields})
        }

    def pr_curve(self, record: Record) -> dict[str, Any]:
        columns = ["recall", "precision", "thresholds", "true_positives", "false_positives", "true_negatives",
                   "false_negatives"]  # fmt: skip
        rows = [[*row, record["tag"]] for row in zip(*(record[name] for name in columns), strict=True)]
        table = self._wandb.Table([*columns, "class"], rows)
        fields = {"x": "recall", "y": "precision", "class": "class"}
        return {record["tag"]: self._wandb.plot_table("wandb/area-under-curve/v0", table, fields)}

    def trainable_map(self, record: Record) -> dict[str, Any]:
        return {"trainable_map": self._table(record["rows"])}

    def bad_samples(self, record: Record) -> dict[str, Any]:
        return {"bad_samples": self._table(record["samples_bad"])}

    def alert(self, record: Record) -> dict[str, Any]:
        return {f"alert/{record['name']}": record["text"]}

    def _file(self, record: Record) -> str:
        self._media.read(record["media"])  # checked before it is shown
        return str(self._media.path(record["media"]))

    def _table(self, rows: list[dict[str, Json]], columns: tuple[str, ...] = ()) -> Any:
        names = columns or tuple(dict.fromkeys(name for row in rows for name in row))
        cells = [[_cell(row.get(name)) for name in names] for row in rows]
        return self._wandb.Table(list(names), cells, allow_mixed_types=True)


def _cell(value: Json) -> Json:
    return json.dumps(value) if isinstance(value, dict | list) else value
