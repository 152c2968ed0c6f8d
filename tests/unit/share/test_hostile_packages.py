"""Packages that are whole by every checksum and evil inside: refused with one clear error, nothing run or written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from packaged import tensors_of

from torchkeep.contracts import Json

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
    error: str = "PackageError"


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
        ("id2label", {"0": "a", "x": "b"}, {}), ("dtype", "load", {}), ("dtype", 5, {}), ("num_attention_heads", 0, {}),
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
    "hub with pickled weights": Attack("hub", {"hf/pytorch_model.bin": b"cos\nsystem\n(S'touch canary'\ntR."}, "member"),
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
        ("loss", "os.system", ""), ("loss", "x.py:f", ""), ("loss", 1, OTHER_FORM), ("more", 1, OTHER_FORM),
        *(("calibration/temperature", value, "temperature")
          for value in (0, -1, 1e308, 1e-300, "1", [1], None, True, 10**300)),
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
        ("image", "settings/image_size", GIANT), ("image", "settings/image", "../../x"), ("image", "kind", "tensors"),
        ("image", "settings/mask", "/etc"), ("image", "kind", "os.system"), ("image", "settings", {}),
        ("image", "settings/train", "/etc"), ("image", "settings/label", 5),
        ("text", "tokenizer/kind", "hub"), ("text", "tokenizer/words", None), ("text", "tokenizer/words", ["a", 1]),
        ("text", "tokenizer/words", ["a"] * 3), ("text", "tokenizer/pattern", "(a+)+$"),
        ("text", "settings/max_length", 0), ("text", "settings/block_size", -1), ("text", "tokenizer", None),
        ("text", "schema/fields/input_ids/num_tokens", GIANT), ("text", "schema/fields/input_ids/shape", [GIANT]),
        ("graph", "schema/fields/x/shape", [GIANT] * 3), ("graph", "schema/fields/x/shape", [5]),
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
        ("preprocess.json", b"[]"), ("preprocess.json", b"1" * 500), ("README.md", b"\xff\xfe not UTF-8"),
        ("canary.py", CANARY.encode()), ("code/canary.py", CANARY.encode()), ("reading/canary.py", CANARY.encode()),
        ("conftest.py", b"1"), ("architecture.json.orig", b"1"),
    ])
}  # fmt: skip
MISSING = {
    f"without {name}": Attack("image", {name: None}, name)
    for name in ("architecture.json", "labels.json", "parameters.safetensors", "preprocess.json", "selftest.safetensors")
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
        "another shape": good | {number: good[number][None]}, "flat": good | {number: good[number].flatten()[:-1]},
        "no numbers": good | {number: good[number][:0]}, "NaN": good | {number: torch.full_like(good[number], torch.nan)},
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
        "no axes": {entry: torch.zeros(()), "output": output}, "another input": {"input/y": image, "output": output},
        "a name that climbs": test | {"input/a/../../b": image}, "a name within another": test | {f"{entry}/b": image},
        "a name of nothing": test | {"input/": image}, "an absolute name": test | {"input//etc/passwd": image},
        "a deep name": test | {"input/" + "a/" * 20_000 + "a": image}, "an output more": test | {"outputs": output},
        "a label": test | {"input/label": torch.zeros(len(image), dtype=torch.int64)},
        "a wide input": test | {entry: image.repeat(1, *[1] * (image.ndim - 2), 1_000_000)},
        "a long input": test | {entry: image[:1].repeat(2_000_000 // image[0].numel(), *[1] * (image.ndim - 1))},
        "an input of another type": test | {entry: image.double() * 1e300},
        "an empty giant": test | {entry: torch.empty(1 << 40, 0, 1 << 20)},
    }  # fmt: skip
    if made == "image":  # 4 MB, of which 500 channels would make 2 GB
        large = torch.zeros(1, 3, 1100, 1100, dtype=torch.uint8)
        tests["an image of another size"] = {entry: large, "output": output[:1]}
    return {
        **{f"{made} parameters: {name}": Attack(made, {"parameters.safetensors": tensors}, "")
           for name, tensors in parameters.items()},
        **{f"{made} self-test: {name}": Attack(made, {"selftest.safetensors": tensors}, "")
           for name, tensors in tests.items()},
    }  # fmt: skip


def bases() -> dict[str, Attack]:
    good = {"source": "x", "sha256": "0" * 64, "tensors": {"head.bias": ["float32", [2]]}, "rename": {}}
    odd = [{}, [], {"source": 1}, good | {"more": 1}, good | {"tensors": {"a": ["load", [1]]}}, good | {"tensors": []},
           good | {"tensors": {"a": ["float32", [1 << 62, 1 << 62]]}}, good | {"tensors": {"a": ["float32", [-1]]}},
           good, good | {"source": ESCAPES}, good | {"source": "/etc/passwd"}, good | {"source": "hf:user/name"}]  # fmt: skip
    return {f"base {number}": Attack("image", {"base.json": json.dumps(said).encode()}, "")
            for number, said in enumerate(odd)}  # fmt: skip


FIXED = {**NAMES, **ARGUMENTS, **CONFIGS, **HUB, **GRAPHS, **LABELS, **FORMS, **TOKENIZERS, **DESCRIBED, **MISSING,
         **{name: Attack("graph", {"architecture.json": put("tied", tied)}, "") for name, tied in TIED.items()},
         **{f"{name} by name": Attack("image", {"architecture.json": put("tied", tied)}, "")
            for name, tied in TIED.items()}, **bases()}  # fmt: skip
