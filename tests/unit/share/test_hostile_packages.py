"""Packages that are whole by every checksum and evil inside: refused with one clear error, nothing run or written."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import packaged
import pytest
import torch
from packaged import changed, contents_of, image_files, tensors_of, write_good

from torchkeep import cli
from torchkeep.contracts import Json
from torchkeep.errors import PackageError, UntrustedCodeError
from torchkeep.share.package import load_package, write_package
from torchkeep.tensors import tensor_sha256

MOST_BYTES = 1 << 30
MOST_SECONDS = 20
CANARY = "import os\nos.system('touch canary')\nopen('canary', 'w').write('ran')\nclass Evil: ...\n"
GIANT = 10**9
ESCAPES = "\x1b]0;owned\x07\x1b[2Jants\r\n\u202e"

Change = Any


class Attack(NamedTuple):
    """Members that are changed in a package of a form, and what the error says."""

    form: str
    changes: dict[str, Change]
    says: str


def put(path: str, value: Json) -> Callable[[Json], Json]:
    """Sets one place of a member's JSON, by keys with / between."""

    def change(data: Json) -> Json:
        *keys, last = path.split("/")
        place = data
        for key in keys:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = value
        return data

    return change


def drop(key: str) -> Callable[[Json], Json]:
    return lambda data: {name: value for name, value in data.items() if name != key}


def form(kind: str, name: str, **more: Json) -> dict[str, Change]:
    return {"architecture.json": lambda data: {"kind": kind, "name": name, **more}}


def architecture(path: str, value: Json) -> dict[str, Change]:
    return {"architecture.json": put(path, value)}


def config(path: str, value: Json) -> dict[str, Change]:
    return {"hf/config.json": put(path, value)}


def labels(path: str, value: Json) -> dict[str, Change]:
    return {"labels.json": put(path, value)}


def preprocess(path: str, value: Json) -> dict[str, Change]:
    return {"preprocess.json": put(path, value)}


def graph(path: str, value: Json) -> dict[str, Change]:
    return architecture(f"graph/{path}", value)


def nested(depth: int) -> Json:
    return [nested(depth - 1)] if depth else 0


NO_MODEL, NO_FIT, NO_TEST = "no model that can be built", "do not fit the model", "self-test"
READING = "how inputs are read is not"
OTHER_FORM = "is not what was written"
CLASSES = {"classes": {"label": ["ants", "bees"]}}

NAMES = {
    f"name {number} {kind}": Attack("image", form(kind, name), NO_MODEL)
    for number, (kind, name) in enumerate([
        ("built-in", "os.system"), ("built-in", "builtins:eval"), ("built-in", "../x.py:build"),
        ("built-in", "torch.load"), ("built-in", "hf:bert"), ("built-in", "__class__"), ("built-in", "x.py:build"),
        ("hf", "../x.py:build"), ("hf", "os.system"), ("timm", "hf:x"), ("timm", "timm:hf-hub:user/name"),
        ("timm", "timm:local-dir:/"), ("torchvision", "torchvision:../x"), ("code", "os.system"), ("pickle", "x"),
        ("graph", "x"), (["built-in"], "convnet"), ("hf", "hf:x.py:build"),
    ])
}  # fmt: skip
ARGUMENTS = {
    f"arguments {number} {name}": Attack("text" if name in ("transformer", "textconv") else "image",
                                         form("built-in", name, args=args, **more), "")
    for number, (name, args, more) in enumerate([
        ("transformer", {"depth": GIANT}, {}), ("transformer", {"depth": GIANT, "width": 8}, {}),
        ("transformer", {"width": GIANT}, {}), ("transformer", {"heads": 0}, {}),
        ("transformer", {"width": 8, "heads": GIANT}, {}), ("transformer", {"depth": -1}, {}),
        ("textconv", {"kernels": [GIANT]}, {}), ("textconv", {"kernels": [1] * 100_000}, {}),
        ("textconv", {"width": 1 << 62}, {}), ("textconv", {"width": 10**300}, {}),
        ("textconv", {"width": "os.system"}, {}), ("textconv", {"num_tokens": GIANT}, {}),
        ("vit", {"depth": GIANT, "width": 6, "patch": 1}, {}), ("vit", {"patch": 0}, {}),
        ("vit", {"image_size": 1 << 40, "patch": 1}, {}), ("convnet", {"widths": [GIANT]}, {}),
        ("convnet", {"widths": [1] * 1_000_000}, {}), ("convnet", {"widths": []}, {}),
        ("convnet", {"dropout": "x"}, {}), ("convnet", {"device": "cuda"}, {}), ("convnet", {"__class__": 1}, {}),
        ("convnet", {"num_classes": GIANT}, {}), ("mlp", {"hidden": [GIANT, GIANT]}, {}),
        ("mlp", {"waves": GIANT}, {}), ("mlp", {"hidden": [1] * 1_000_000}, {}),
        ("mlp", {}, {"cardinalities": [(1 << 31) - 1] * 1000}), ("convnet", {}, {"cardinalities": [-1]}),
        ("convnet", {}, {"head": "features.0"}), ("convnet", {}, {"head": "x" * 1_000_000}),
        ("convnet", {}, {"head": "__class__"}), ("convnet", {}, {"dtype": "load"}),
        ("convnet", {}, {"dtype": "float16"}), ("convnet", {}, {"weights": "/etc/passwd"}),
        ("resnet18", {"stem": ["large"]}, {}), ("resnet18", {}, {}), ("audioconv", {}, {}),
    ])
}  # fmt: skip
TIED = {
    "tied to nowhere": {"x": "y"}, "tied to itself": {"x": "x"}, "tied in a circle": {"x": "y", "y": "x"},
    "tied to what is there": {"head.bias": "head.weight"}, "tied by a number": {"x": 1}, "tied as a list": ["x"],
    "tied to another layer's": {"features.0.weight": "head.weight"}, "tied to an odd name": {"..": "head.bias"},
}  # fmt: skip
CONFIGS = {
    f"config {number} {path}": Attack("hub", config(path, value) | more, "")
    for number, (path, value, more) in enumerate([
        ("auto_map", {"AutoModelForSequenceClassification": "canary.Evil"}, {}),
        ("auto_map", {"AutoConfig": "user/name--canary.Evil"}, {}),
        ("text_config", {"auto_map": {"AutoConfig": "canary.Evil"}}, {}),
        ("parts", [{"auto_map": {"AutoConfig": "canary.Evil"}}], {}),
        ("attn_implementation", "user/kernel", {}), ("_attn_implementation", "user/kernel", {}),
        ("_attn_implementation_internal", "user/kernel", {}), ("attn_implementation", {"": "user/kernel"}, {}),
        ("quantization_config", {"quant_method": "bitsandbytes"}, {}), ("use_pretrained_backbone", True, {}),
        ("backbone", "user/name", {}), ("model_type", "timm_wrapper", {}), ("model_type", "../bert", {}),
        ("model_type", "nothing", {}), ("model_type", 5, {}), ("model_type", "gpt2", {}),
        ("hidden_size", GIANT, {}), ("hidden_size", 1 << 62, {}), ("hidden_size", "8", {}), ("hidden_size", 0, {}),
        ("hidden_size", -8, {}), ("num_hidden_layers", GIANT, {}), ("vocab_size", GIANT, {}),
        ("num_labels", GIANT, {}), ("max_position_embeddings", GIANT, {}), ("hidden_act", "os.system", {}),
        ("id2label", {"0": "a", "x": "b"}, {}), ("dtype", "load", {}), ("num_attention_heads", 0, {}),
        ("to_dict", 1, {}), ("is_decoder", "x", {}), ("_name_or_path", "user/name", {"code/canary.py": b"1"}),
    ])
}  # fmt: skip
HUB = {
    "hub without a config": Attack("hub", {"hf/config.json": None}, ""),
    "hub with a broken config": Attack("hub", {"hf/config.json": b'{"model_type": "bert", '}, ""),
    "hub with NaN": Attack("hub", {"hf/config.json": b'{"model_type": "bert", "layer_norm_eps": NaN}'}, ""),
    "hub with a deep config": Attack("hub", {"hf/config.json": b'{"a":' * 5000 + b"1" + b"}" * 5000}, ""),
    "hub with a list": Attack("hub", {"hf/config.json": b"[1]"}, ""),
    "hub with code beside it": Attack("hub", {"hf/modeling_canary.py": CANARY.encode()}, "member"),
    "hub with a tokenizer's code": Attack("hub", {"hf/tokenization_canary.py": CANARY.encode()}, "member"),
    "hub with pickled weights": Attack("hub", {"hf/pytorch_model.bin": b"cos\nsystem\n(S'x'\ntR."}, "member"),
    "hub with arguments": Attack(
        "hub", form("hf", "hf:bert", args={"_configuration_file": "../../x.json", "cache_dir": "."}), ""
    ),
    "hub with trust": Attack("hub", form("hf", "hf:bert", args={"trust_remote_code": True}), ""),
}  # fmt: skip
GRAPHS = {
    f"graph {number} {path}": Attack("graph", graph(path, value), says)
    for number, (path, value, says) in enumerate([
        ("nodes/1/op", "aten.set_.source_Storage", "may not stand"), ("nodes/1/op", "os.system", "may not stand"),
        ("nodes/1/op", "aten.rand.default", "may not stand"), ("nodes/1/op", "prim.device.default", "may not stand"),
        ("nodes/1/op", ["aten.relu.default"], ""), ("nodes/1/op", "aten.relu.default\0", "may not stand"),
        ("nodes/1", {"op": "aten.zeros.default", "args": [[1 << 40, 1 << 20]]}, ""),
        ("nodes/1", {"op": "aten.zeros.default", "args": [[1 << 16, 1 << 16]]}, ""),
        ("nodes/1", {"op": "aten.repeat.default", "args": [{"$node": 0}, [1 << 20, 1 << 10]]}, ""),
        ("nodes/1", {"op": "aten.arange.default", "args": [1e300]}, ""),
        ("nodes/1/args/0", {"$node": 5}, ""), ("nodes/1/args/0", {"$node": -1}, ""),
        ("nodes/1/args/0", {"$tensor": "gone"}, ""), ("nodes/1/args", nested(60), ""), ("nodes", {}, ""),
        ("nodes", [{"op": "aten.relu.default", "args": [{"$input": 0}]}] * 250_000, ""), ("output", nested(50), ""),
        ("outputs", [{"$node": GIANT}], ""), ("axes", {"batch": [1]}, ""), ("axes", [], ""), ("inputs", 5, ""),
        ("inputs", [{"name": "__class__", "value": {"$leaf": 0}}, {"name": "x", "value": 1}], ""),
        ("leaves/0/dtype", "load", ""), ("leaves/0/shape", ["batch", 1 << 40], ""), ("parameters", ["gone"], ""),
        ("positional", -1, ""), ("more", 1, ""),
    ])
}  # fmt: skip
LABELS = {
    f"labels {number} {path}": Attack("image", labels(path, value), says)
    for number, (path, value, says) in enumerate([
        ("classes/label", ["bees", "ants"], "classes are not those"), ("classes/label", ["ants"], "classes are not"),
        ("classes/other", [], "classes are not"), ("classes", [], OTHER_FORM), ("batch_size", 10**12, OTHER_FORM),
        ("batch_size", 0, OTHER_FORM), ("batch_size", True, OTHER_FORM), ("precision", "os.system", OTHER_FORM),
        ("inputs", ["gone"], ""), ("inputs", ["label"], ""), ("inputs", [], ""), ("inputs", "x.py:f", ""),
        ("loss", 1, OTHER_FORM), ("more", 1, OTHER_FORM),
        *(("calibration/temperature", value, "temperature")
          for value in (0, -1, 1e308, 1e-300, "1", [1], None, True)),
        ("calibration/temperature", 10**300, OTHER_FORM),
        ("calibration", 1, OTHER_FORM),
    ])
}  # fmt: skip
FORMS = {
    f"preprocess {number} {made} {path}": Attack(made, preprocess(path, value), "")
    for number, (made, path, value) in enumerate([
        ("image", "schema/fields/image/shape", [3, GIANT, GIANT]), ("image", "schema/fields/image/shape", [3, 0, 8]),
        ("image", "schema/fields/image/shape", [GIANT, 8, 8]), ("image", "schema/fields/image/shape", [3, 9000, 9000]),
        ("image", "schema/fields/image/shape", None), ("image", "schema/fields/image/kind", "object"),
        ("image", "schema/fields/image/mean", 1e400), ("image", "schema/fields/label/classes", ["a"] * 3),
        ("image", "schema/fields/label/num_tokens", -1), ("image", "schema/fields/more", {}),
        ("image", "schema/preprocess", None), ("image", "schema/preprocess/channels", GIANT),
        ("image", "schema/preprocess/mean", [0.5]), ("image", "schema/preprocess/mean", [0.5] * 5),
        ("image", "schema/preprocess/std", [0, 0, 0]), ("image", "schema/preprocess/bits", 7),
        ("image", "schema/preprocess/crop_fraction", 0), ("image", "schema/preprocess/crop_fraction", -1e9),
        ("image", "settings/image_size", GIANT), ("image", "kind", "tensors"),
        ("image", "kind", "os.system"), ("image", "settings", {}),
        ("image", "settings/train", "/etc"), ("image", "settings/label", 5),
        ("text", "tokenizer/kind", "hub"), ("text", "tokenizer/words", None), ("text", "tokenizer/words", ["a", 1]),
        ("text", "tokenizer/words", ["a"] * 3), ("text", "tokenizer/pattern", "(a+)+$"),
        ("text", "settings/max_length", 0), ("text", "settings/block_size", -1), ("text", "tokenizer", None),
        ("text", "schema/fields/input_ids/num_tokens", GIANT), ("text", "schema/fields/input_ids/shape", [GIANT]),
        ("graph", "schema/fields/x/shape", [GIANT] * 3),
        ("graph", "schema/fields/x/kind", "os.system"), ("graph", "schema/fields/label/is_target", False),
        ("graph", "schema/fields", {}), ("graph", "encoding", {"features": []}),
    ])
}  # fmt: skip
TOKENIZERS = {
    f"tokenizer {number}": Attack("text", {
        "preprocess.json": put("tokenizer", {"kind": "hub", "name": "x", "pad_id": 0}), "reading/tokenizer.json": data,
    }, READING)
    for number, data in enumerate([
        b"", b"{", b"[]", b'{"version": "1.0", "model": {"type": "WordLevel"}}', b"\xff\xfe", b"\x80\x04cos\nsystem\n",
        b'{"version":"1.0","truncation":null,"padding":{"strategy":{"Fixed":1000000000000},"direction":"Right",'
        b'"pad_to_multiple_of":null,"pad_id":0,"pad_type_id":0,"pad_token":"[PAD]"},"added_tokens":[],'
        b'"normalizer":null,"pre_tokenizer":null,"post_processor":null,"decoder":null,"model":{"type":"WordLevel",'
        b'"vocab":{"a":4294967295},"unk_token":"a"}}',
    ])
}  # fmt: skip
DESCRIBED = {
    f"described {name} {number}": Attack("image", {name: data}, "")
    for number, (name, data) in enumerate([
        ("metrics.json", b"[1, 2]"), ("metrics.json", b'"x"'), ("metrics.json", b'{"values": [1]}'),
        ("metrics.json", b'{"values": {"a": "b"}}'), ("metrics.json", b'{"accuracy": NaN}'), ("metrics.json", b"{"),
        ("provenance.json", b"[]"), ("provenance.json", b'{"code": "x"}'), ("provenance.json", b"[" * 100_000),
        ("architecture.json", b"[]"), ("architecture.json", b"null"), ("labels.json", b"[]"), ("labels.json", b"{}"),
        ("preprocess.json", b"[]"), ("preprocess.json", b"1" * 500),
        ("canary.py", CANARY.encode()), ("code/canary.py", CANARY.encode()), ("reading/canary.py", CANARY.encode()),
        ("conftest.py", b"1"), ("architecture.json.orig", b"1"),
    ])
}  # fmt: skip
MISSING = {
    f"without {name}": Attack("image", {name: None}, name)
    for name in (
        "architecture.json",
        "labels.json",
        "parameters.safetensors",
        "preprocess.json",
        "selftest.safetensors",
    )
}


def with_tensors(path: Path, made: str) -> dict[str, Attack]:
    """Tensors that do not fit, and self-tests that fail, made from a good package."""
    good, test = tensors_of(path), tensors_of(path, "selftest.safetensors")
    (entry,) = (name for name in test if name != "output")
    first, number = next(iter(good)), next(name for name, tensor in good.items() if tensor.is_floating_point())
    image, output = test[entry], test["output"]
    parameters: dict[str, dict[str, torch.Tensor]] = {
        "none": {}, "one missing": {name: tensor for name, tensor in good.items() if name != first},
        "one more": good | {"more": torch.ones(1)}, "other names": {f"x.{name}": t for name, t in good.items()},
        "another type": good | {number: good[number].double()}, "as bytes": good | {number: good[number].byte()},
        "of 8 bits": good | {number: good[number].to(torch.float8_e4m3fn)},
        "another shape": good | {number: good[number][None]}, "flat": good | {number: good[number].flatten()[:-1]},
        "no numbers": good | {number: good[number][:0]},
        "NaN": good | {number: torch.full_like(good[number], torch.nan)},
        "infinity": good | {number: torch.full_like(good[number], torch.inf)},
        "an odd name": good | {"_plan": torch.ones(1), "a..b": torch.ones(1), "": torch.ones(1)},
        "many names": good | {f"t{i}": torch.empty(0) for i in range(20_000)},
        "no axes": good | {"x": torch.empty(1 << 40, 0)}, "_fitting": good | {"_fitting": torch.ones(1)},
    }  # fmt: skip
    tests: dict[str, dict[str, torch.Tensor]] = {
        "none": {}, "without outputs": {entry: image}, "without inputs": {"output": output},
        "other outputs": test | {"output": output + 1}, "NaN as outputs": test | {"output": output * torch.nan},
        "outputs of another shape": test | {"output": output[:1]}, "no outputs": test | {"output": output[:0]},
        "outputs as numbers": test | {"output": output.long()}, "no samples": {entry: image[:0], "output": output[:0]},
        "no axes": {entry: torch.zeros(()), "output": output}, "a name that climbs": test | {"input/a/../../b": image},
        "a name within another": test | {f"{entry}/b": image},
        "a name of nothing": test | {"input/": image}, "an absolute name": test | {"input//etc/passwd": image},
        "a deep name": test | {"input/" + "a/" * 20_000 + "a": image}, "an output more": test | {"outputs": output},
        "a wide input": test | {entry: image.repeat(1, *[1] * (image.ndim - 2), 1_000_000)},
        "a long input": test | {entry: image[:1].repeat(2_000_000 // image[0].numel(), *[1] * (image.ndim - 1))},
        "an input of another type": test | {entry: image.double() * 1e300},
        "an empty giant": test | {entry: torch.empty(1 << 40, 0, 1 << 20)},
    }  # fmt: skip
    if made == "graph":  # a tensor that nothing takes, or that is the same when it is spread, does no harm
        for name in ("one more", "another shape", "many names", "no axes"):
            del parameters[name]
    return {
        **{f"{made} parameters: {name}": Attack(made, {"parameters.safetensors": tensors}, "")
           for name, tensors in parameters.items()},
        **{f"{made} self-test: {name}": Attack(made, {"selftest.safetensors": tensors}, "")
           for name, tensors in tests.items()},
    }  # fmt: skip


HARMLESS = {
    "a loss of an odd name": Attack("image", labels("loss", "os.system"), ""),
    "a column of an odd name": Attack("image", preprocess("settings/image", "../../x"), ""),
    "a mask's column": Attack("image", preprocess("settings/mask", "/etc"), ""),
    "a hub's name": Attack("hub", config("_name_or_path", "user/name"), ""),
    "a type of an odd kind": Attack("hub", config("dtype", 5), ""),
    "a card that is not UTF-8": Attack("image", {"README.md": b"\xff\xfe" + ESCAPES.encode()}, ""),
}
"""What looks odd and leads to nothing."""


def bases() -> dict[str, Attack]:
    good = {"source": "x", "sha256": "0" * 64, "tensors": {"head.bias": ["float32", [2]]}, "rename": {}}
    odd = [
        {}, [], {"source": 1}, good | {"more": 1}, good | {"tensors": {"a": ["load", [1]]}}, good | {"tensors": []},
        good | {"tensors": {"a": ["float32", [1 << 62, 1 << 62]]}}, good | {"tensors": {"a": ["float32", [-1]]}},
        good, good | {"source": ESCAPES}, good | {"source": "/etc/passwd"}, good | {"source": "hf:user/name"},
    ]  # fmt: skip
    return {f"base {n}": Attack("image", {"base.json": json.dumps(said).encode()}, "") for n, said in enumerate(odd)}


FIXED = {**NAMES, **ARGUMENTS, **CONFIGS, **HUB, **GRAPHS, **LABELS, **FORMS, **TOKENIZERS, **DESCRIBED, **MISSING,
         **{name: Attack("graph", {"architecture.json": put("tied", tied)}, "") for name, tied in TIED.items()},
         **{f"{name} by name": Attack("image", {"architecture.json": put("tied", tied)}, "")
            for name, tied in TIED.items()}, **bases()}  # fmt: skip


# --- each is refused in a child process that is watched


class Seen(NamedTuple):
    outcome: str
    message: str
    bytes: int
    did: list[str]


def load_all(folder: Path, names: list[str]) -> dict[str, Seen]:
    """What came of loading each; a child that is silent for too long is ended, and the next one goes on."""
    seen: dict[str, Seen] = {}
    places = dict.fromkeys(("TMPDIR", "HOME", "TORCHINDUCTOR_CACHE_DIR"), str(folder / "temporary"))
    environment = os.environ | places | {"OMP_NUM_THREADS": "1"}
    while left := [name for name in names if name not in seen]:
        words = [sys.executable, packaged.__file__, str(folder), *left]
        with subprocess.Popen(words, cwd=folder / "here", stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout is not None
            for name in left:
                # the first waits for Python and torch to start
                timer = threading.Timer(MOST_SECONDS * (4 if name == left[0] else 1), child.kill)
                timer.start()
                line = child.stdout.readline()
                timer.cancel()
                row = json.loads(line) if line else {"outcome": "ended", "message": "", "bytes": 0, "did": []}
                seen[name] = Seen(*(row[key] for key in Seen._fields))
                if not line:
                    break
    return seen


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    for name in ("packages", "temporary", "here"):
        (root / name).mkdir()
    for made in ("image", "text", "graph", "hub"):
        write_good(made, root, root / f"{made}.tkp")
    return root


@pytest.fixture(scope="module")
def attacks(place: Path) -> dict[str, Attack]:
    made = with_tensors(place / "image.tkp", "image") | with_tensors(place / "graph.tkp", "graph")
    tensors = tensors_of(place / "text.tkp")
    tensors["embedding.weight"][-1] = torch.nan  # of a word that no self-test asks for
    made["NaN that no self-test meets"] = Attack("text", {"parameters.safetensors": tensors}, "NaN")
    return FIXED | made | HARMLESS


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_is_refused_and_nothing_runs(attacks: dict[str, Attack], place: Path) -> None:
    numbers = {name: str(number) for number, name in enumerate(attacks)}
    for name, attack in attacks.items():
        changed(place / f"{attack.form}.tkp", place / "packages" / f"{numbers[name]}.tkp", attack.changes)
    before, wrong = set(place.rglob("*")), {}
    outcomes = load_all(place, list(numbers.values()))
    for name, attack in attacks.items():
        seen = outcomes[numbers[name]]
        is_clear = attack.says in seen.message and len(seen.message) < 4000 and "where:" in seen.message
        is_right = seen.outcome == "loaded" if name in HARMLESS else seen.outcome == "PackageError" and is_clear
        if not is_right or seen.did or seen.bytes > MOST_BYTES:
            wrong[name] = seen._replace(message=seen.message[:500])
    assert wrong == {}
    assert len(attacks) > 300
    written = set(place.rglob("*")) - before
    assert [file for file in written if "temporary" not in file.parts or "canary" in file.name] == []


def test_a_small_file_cannot_take_much_memory(place: Path, tmp_path: Path) -> None:
    """Wide layers and a large image: a package of some MB, whose answer takes gigabytes."""
    contents = contents_of(place, image_files(place), "convnet", args={"widths": [512]})
    good = write_package(contents, tmp_path / "good.tkp").path
    image, output = torch.zeros(1, 3, 1500, 1500, dtype=torch.uint8), torch.zeros(1, 2)
    sizes = [put("schema/fields/image/shape", [3, 1500, 1500]), put("schema/preprocess/image_size", 1500),
             put("settings/image_size", 1500)]  # fmt: skip
    told = {"preprocess.json": lambda data: reduce(lambda held, change: change(held), sizes, data)}
    evil = changed(good, tmp_path / "a.tkp", {"selftest.safetensors": {"input/image": image, "output": output}, **told})
    with pytest.raises(PackageError, match="too much memory"):
        load_package(evil)


def test_code_runs_by_its_hash_alone(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    good, canary = write_good("code", tmp_path, tmp_path / "code.tkp"), tmp_path / "canary"
    trusted = hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()
    evil = f"open({str(canary)!r}, 'w')\n".encode()
    other = hashlib.sha256(evil).hexdigest()
    renamed = form("code", "net.py:build", sha256=trusted)
    cases: dict[str, tuple[dict[str, Change], str | None, type[Exception]]] = {
        "untrusted": ({}, None, UntrustedCodeError),
        "another hash": ({}, other, UntrustedCodeError),
        "no hash": ({}, "", UntrustedCodeError),
        "other code under the hash that is trusted": ({"code/net.py": evil}, trusted, PackageError),
        "other code under its own hash": (
            {"code/net.py": evil, **form("code", "net.py:build", sha256=other)}, trusted, UntrustedCodeError),
        "no hash that it states": (form("code", "net.py:build", sha256=""), None, PackageError),
        "without the file": ({"code/net.py": None}, trusted, PackageError),
        "another file": ({"code/other.py": evil, **renamed}, trusted, PackageError),
        "a file elsewhere": (form("code", "../net.py:build", sha256=trusted), trusted, PackageError),
        "an absolute file": (form("code", f"{tmp_path}/net.py:build", sha256=trusted), trusted, PackageError),
        "code in a form without": ({"code/net.py": evil, **form("built-in", "convnet")}, trusted, PackageError),
        "a name of code in a form without": ({**form("built-in", "net.py:build")}, trusted, PackageError),
    }  # fmt: skip
    for name, (changes, trust, error) in cases.items():
        evil_path = changed(good, tmp_path / "evil.tkp", changes)
        with pytest.raises(error):
            load_package(evil_path, trust_code=trust)
        assert not canary.exists(), name
    assert load_package(good, trust_code=trusted).model(torch.ones(1, 4)).shape == (1, 2)
    assert canary.exists()


def test_trusted_code_gives_nothing_but_its_own_functions(place: Path, tmp_path: Path) -> None:
    """Whoever trusts a file has not read what it imports: a package's own arguments would make a shell of it."""
    (tmp_path / "net.py").write_text("from os import system\nfrom subprocess import run as build\n")
    trusted = hashlib.sha256((tmp_path / "net.py").read_bytes()).hexdigest()
    code = (tmp_path / "net.py").read_bytes()
    for name, args in (("system", {"command": f"touch {tmp_path}/canary"}), ("build", {"popenargs": ["touch", "x"]})):
        named = form("code", f"net.py:{name}", sha256=trusted, args=args)
        evil = changed(place / "graph.tkp", tmp_path / "evil.tkp", {"code/net.py": code, **named})
        with pytest.raises(PackageError, match="which the file imports"):
            load_package(evil, trust_code=trusted)
    assert not (tmp_path / "canary").exists()


def test_a_base_that_is_another_is_refused(place: Path, tmp_path: Path) -> None:
    tensors = tensors_of(place / "image.tkp")
    left = {name: tensor for name, tensor in tensors.items() if name.startswith("features")}
    rows = {name: [str(tensor.dtype)[6:], list(tensor.shape)] for name, tensor in left.items()}
    base = {"source": "x", "sha256": tensor_sha256(left), "rename": {}, "tensors": rows}
    rest = {name: tensor for name, tensor in tensors.items() if name not in left}

    def package(said: Json, held: dict[str, torch.Tensor]) -> Path:
        changes = {"base.json": json.dumps(said).encode(), "parameters.safetensors": held}
        return changed(place / "image.tkp", tmp_path / "a.tkp", changes)

    delta = package(base, rest)
    assert torch.equal(load_package(delta, base=tensors).model.state_dict()["head.bias"], tensors["head.bias"])
    other = {name: tensor + 1 for name, tensor in tensors.items()}
    for wrong in (other, rest, {name: tensor.flatten()[:0] for name, tensor in tensors.items()}):
        with pytest.raises(PackageError, match="not the base"):
            load_package(delta, base=wrong)
    for said, held in ((base | {"sha256": "0" * 64}, rest), (base | {"rename": {"head": "x"}}, {}), (base, tensors)):
        with pytest.raises(PackageError):
            load_package(package(said, held), base=tensors)


# --- by the command line


COMMANDS: dict[str, tuple[Attack, str]] = {
    "a name": (Attack("image", form("built-in", "os.system"), ""), "verify inspect predict"),
    "classes": (Attack("image", labels("classes/label", ["bees", "ants"]), ""), "verify inspect predict"),
    "metrics": (Attack("image", {"metrics.json": b"[1, 2]"}, ""), "verify inspect predict"),
    "an origin": (Attack("image", {"provenance.json": b"[" * 100_000}, ""), "verify inspect predict"),
    "labels": (Attack("image", {"labels.json": b"[]"}, ""), "verify inspect predict"),
    "how inputs are read": (Attack("image", {"preprocess.json": b"[]"}, ""), "verify inspect predict"),
    "another member": (Attack("image", {"canary.py": CANARY.encode()}, ""), "verify inspect predict"),
    "no form": (MISSING["without architecture.json"], "verify inspect predict"),
    "a base of another form": (Attack("image", {"base.json": b"[]"}, ""), "verify inspect predict"),
    "ties": (Attack("image", {"architecture.json": put("tied", TIED["tied in a circle"])}, ""), "verify predict"),
    "an operation": (Attack("graph", graph("nodes/1/op", "os.system"), ""), "verify predict"),
    "parameters": (Attack("image", {"parameters.safetensors": {}}, ""), "verify predict"),
}  # fmt: skip
"""What shows only once a model is built is none of inspect's."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_it_in_the_one_form(
    name: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack, verbs = COMMANDS[name]
    path = changed(place / f"{attack.form}.tkp", tmp_path / "a.tkp", attack.changes)
    for verb in verbs.split():
        words = [verb, str(path), *([str(place / "images/ants/0.png")] if verb == "predict" else [])]
        code = cli.run(lambda: cli.cli.main(words, prog_name="torchkeep", standalone_mode=False))  # noqa: B023
        said = capsys.readouterr()
        assert (code, said.out, said.err.partition(":")[0]) == (2, "", "PackageError"), verb
        assert "Traceback" not in said.err


def test_a_terminal_gets_no_commands(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names, classes and origins are a stranger's words: escape sequences in them would rule the terminal."""
    odd = "\x1b]0;owned\x07\x1b[2J\r\u202e\x9b"
    changes: dict[str, Change] = {
        "metrics.json": json.dumps({"values": {f"a{odd}": 1.0}}).encode(), "README.md": odd.encode(),
        "labels.json": put("calibration", {"temperature": 2.0, "split": odd}),
        "provenance.json": json.dumps({"seed": odd, "code": {"commit": odd}}).encode(),
    }  # fmt: skip
    named = changed(place / "image.tkp", tmp_path / "a.tkp", changes, head={"name": odd})
    based = changed(place / "image.tkp", tmp_path / "b.tkp", bases()["base 9"].changes)
    classes = changed(place / "image.tkp", tmp_path / "c.tkp", labels("classes/label", [odd, "bees"]))
    typed = changed(place / "image.tkp", tmp_path / "d.tkp", architecture("args", {f"x{odd}": 1}))
    for path in (named, based, classes, typed):
        for verb in ("inspect", "verify"):
            cli.run(lambda: cli.cli.main([verb, str(path)], prog_name="torchkeep", standalone_mode=False))  # noqa: B023
            said = capsys.readouterr()
            assert not set(said.out + said.err) & set("\x1b\x07\r\x9b\u202e"), (verb, path.name)
