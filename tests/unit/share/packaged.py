"""Small packages of every form, and the same with other members under checksums that hold."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import torch
from PIL import Image
from torch import Tensor, nn

import torchkeep
from torchkeep.archive import Archive, Content, write_archive
from torchkeep.contracts import Json
from torchkeep.data.loader import Loader
from torchkeep.data.readers import Reader
from torchkeep.data.sources import DataSettings, open_data
from torchkeep.model.build import ModelSettings, build_model
from torchkeep.settings import check
from torchkeep.share.architecture import registered
from torchkeep.share.contract import Contract
from torchkeep.share.package import Contents, load_package, save_package, write_package
from torchkeep.tensors import to_safetensors

CODE = """
from pathlib import Path

from torch import nn

Path({canary!r}).write_text("ran")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def build():
    return Net()
"""

Form = Callable[[Path], Contents]


def image_files(root: Path) -> dict[str, Any]:
    for number in range(4):
        path = root / "images" / ("ants", "bees")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (9, 9, 3), np.uint8)).save(path)
    return {"train": "images", "image_size": 8}


def text_table(root: Path) -> dict[str, Any]:
    rows = "".join(f"a {('good', 'bad')[i % 2]} film number {i},{('ants', 'bees')[i % 2]}\n" for i in range(6))
    (root / "texts.csv").write_text(f"text,label\n{rows}")
    return {"train": "texts.csv"}


def number_table(root: Path) -> dict[str, Any]:
    rows = "".join(f"{i},{i % 3}.5,{('red', 'blue')[i % 2]},{('ants', 'bees')[i % 3 % 2]}\n" for i in range(8))
    (root / "rows.csv").write_text(f"a,b,colour,kind\n{rows}")
    return {"train": "rows.csv", "target": "kind"}


def sounds(root: Path) -> dict[str, Any]:
    import soundfile

    for number in range(4):
        path = root / "sounds" / ("ants", "bees")[number % 2] / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(number).normal(0, 0.1, 800), 8000)
    return {"train": "sounds", "num_mels": 8, "sample_rate": 8000}


def contents_of(root: Path, data: dict[str, Any], name: str, **given: Any) -> Contents:
    """A model that is known by name, as training would make it for these data, not trained."""
    settings = check(DataSettings, data, "data")
    train = open_data(settings, root, 0).train
    model_settings = ModelSettings(name=name, **given)
    cardinalities = getattr(train, "cardinalities", ())
    torch.manual_seed(0)
    model = build_model(model_settings, train.schema, cardinalities, lambda _: None, root, loads=False).model.eval()  # type: ignore[arg-type,return-value]
    contract = Contract(Reader(train, settings), "cross_entropy")
    example = Loader(train, batch_size=2, workers=0).peek()
    return Contents(name.rpartition("/")[2], model, contract, example, registered(model_settings, cardinalities, model))


def image_contents(root: Path) -> Contents:
    return contents_of(root, image_files(root), "convnet", args={"widths": [4, 4]})


def text_contents(root: Path) -> Contents:
    return contents_of(root, text_table(root), "textconv", args={"width": 4, "channels": 4})


def hub_contents(root: Path) -> Contents:
    import transformers

    config = transformers.BertConfig(
        vocab_size=258, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=64,
    )  # fmt: skip
    config.save_pretrained(root / "bert")
    data = text_table(root) | {"tokenizer": "bytes"}
    return contents_of(root, data, f"hf:{root / 'bert'}")


class Own(nn.Module):
    """Known to nobody who loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu())
        return found


def write_good(form: str, root: Path, path: Path) -> Path:
    """A package of a form: "image", "text", "hub", "graph", "code"."""
    torch.manual_seed(0)
    if form == "graph":
        return save_package(Own(), path, torch.randn(2, 4), classes=("ants", "bees"), loss="cross_entropy")
    if form == "code":
        (root / "net.py").write_text(CODE.format(canary=str(root / "canary")))
        space: dict[str, Any] = {}
        exec((root / "net.py").read_text(), space)
        made = save_package(space["build"](), path, torch.randn(2, 4), code=f"{root / 'net.py'}:build")
        (root / "canary").unlink()
        return made
    makers: dict[str, Form] = {"image": image_contents, "text": text_contents, "hub": hub_contents}
    return write_package(makers[form](root), path).path


def members_of(path: Path) -> dict[str, Content]:
    opened = Archive.open(path)
    return {name: bytes(opened.read(name)) for name in opened.names}


def tensors_of(path: Path, name: str = "parameters.safetensors") -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in Archive.open(path).tensors(name).items()}


def changed(good: Path, path: Path, changes: Mapping[str, Any], head: Mapping[str, Json] | None = None) -> Path:
    """A package with other members: bytes; a dict of tensors; a function of the old JSON; None: without it."""
    members = members_of(good)
    for name, change in changes.items():
        if change is None:
            del members[name]
        elif callable(change):
            data = orjson.loads(members[name]) if name in members else {}
            members[name] = json.dumps(change(data)).encode()
        else:
            members[name] = to_safetensors(change) if isinstance(change, dict) else change
    write_archive(path, members, head={"name": "a", **(head or {})})
    return path


# --- a child process that loads packages and says what came of each

FORBIDDEN = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.posix_spawn", "os.exec",
             "pickle.find_class")  # fmt: skip
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink", "os.chmod")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """Notes what a process runs and where it writes, as the interpreter itself reports it."""

    def __init__(self, writable: Path):
        self._writable, self.seen = str(writable), list[str]()
        self._known = (sys.prefix, sys.base_prefix, str(Path(torchkeep.__file__).parent), "<")

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        is_write = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        is_within = args and isinstance(args[-1], int) and args[-1] >= 0  # of a folder that is open: seen by its path
        if event == "exec" and not args[0].co_filename.startswith(self._known):
            self.seen.append(f"exec {args[0].co_filename}")
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args}"[:200])
        if (is_write or (event in CHANGES and not is_within)) and not str(args[0]).startswith(
            (self._writable, "/dev/null")
        ):
            self.seen.append(f"{event} {args[0]}"[:200])


def memory_bytes(kind: str) -> int:
    """VmRSS: now; VmHWM: the peak since it was forgotten."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(rows[kind].split()[0]) << 10


def outcome_of(path: Path) -> tuple[str, str]:
    try:
        found = load_package(path)
        return "loaded", str(tuple(found.asked(found.selftest[0]).shape))
    except Exception as error:
        return type(error).__name__, str(error)


def load_each(folder: Path, names: list[str]) -> None:
    """Load packages of a folder, and print a line of JSON for each."""
    import resource

    limit = memory_bytes("VmSize") + (4 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch = Watch(folder / "temporary")
    sys.addaudithook(watch)
    for name in names:
        Path("/proc/self/clear_refs").write_text("5")
        watch.seen.clear()
        before = memory_bytes("VmRSS")
        outcome, message = outcome_of(folder / "packages" / f"{name}.tkp")
        row = {"name": name, "outcome": outcome, "message": message, "bytes": memory_bytes("VmHWM") - before,
               "did": list(watch.seen)}  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    load_each(Path(sys.argv[1]), sys.argv[2:])
