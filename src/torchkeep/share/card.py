"""The model card: a package's README.md, made of what the package says of itself, the rest left for its author.

Names and texts come from data and may be anything: each is escaped where it stands, so that none becomes a heading, a
link, a table's cell or a key of the header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ..contracts import Field, Json, Preprocess, Schema
from ..errors import printable
from ..watch.console import format_number

AUTHOR = "<!-- from here on the words are the author's: a later push keeps them -->"
"""What stands below it is not made anew where a card is already."""

HUB_ID = r"[\w-][\w.-]*/[\w-][\w.-]*"
"""USER/NAME, as a hub has it."""

_MOST_CLASSES = 50
_MOST_SIGNS = 200
_MARKS = re.compile(r"[#$*:@\[\\\]_`{|}~]|(?<=www)\.", re.IGNORECASE)  # what means something within a line
_HEADER = re.compile(r"---\n(.*?)^---[ \t]*\n", re.DOTALL | re.MULTILINE)
_MACHINE = ("python", "platform", "processor", "cores", "gpu", "cuda")
_TASKS = {
    ("image", "label"): "image-classification", ("image", "multilabel"): "image-classification",
    ("image", "mask"): "image-segmentation", ("tokens", "label"): "text-classification",
    ("tokens", "multilabel"): "text-classification", ("tokens", "tokens"): "text-generation",
    ("audio", "label"): "audio-classification", ("audio", "multilabel"): "audio-classification",
    ("vector", "label"): "tabular-classification", ("vector", "number"): "tabular-regression",
}  # fmt: skip
_MEANS = {
    "cross_entropy": "Logits (B, K): the largest is the answer, softmax makes probabilities of them.",
    "binary_cross_entropy": "Logits of yes or no, (B,) or (B, K): the sigmoid makes probabilities of them.",
    "mse": "Numbers, in their own units.",
}
_AUTHORS = """
## Intended use

*Left for the author to fill: what this model is for, who should use it, and what it must not be used for.*

## Limits

*Left for the author to fill: on which inputs it fails, whom its errors would hurt, what its data leave out.*

## Licence and contact

*Left for the author to fill. A line `license: …` in the header above tells the hub.*
"""


def model_card(facts: Json) -> str:
    """The README.md of a package; the same facts give the same bytes. Every fact may be missing.

    ``name``; ``architecture``: kind, name, class_name, num_parameters; ``schema``: a Schema; ``loss``; ``calibration``;
    ``metrics``: step, epoch and values by tag, or numbers by name; ``provenance`` as ``origin_of`` gives it;
    ``size_bytes`` and ``sha256`` of the parameters; ``base``: source and sha256 of what a delta leaves out.
    """
    said = _Facts(facts)
    parts = [
        f"{_header(said)}\n# {_plain(said.name)}", _summary(said), _loading(said), _inputs(said), _outputs(said),
        _measured(said), _origin(said), _environment(said), _sizes(said),
    ]  # fmt: skip
    return "\n\n".join(filter(None, parts)) + f"\n\n{AUTHOR}\n{_AUTHORS}"


def card_over(there: str, card: str) -> str:
    """What a card that is already ``there`` becomes: ``card``, with what its author wrote.

    That is all below the line ``AUTHOR``, and the keys of the header that ``card`` has not. A text without that line is
    the author's wholly, and stays as it is.
    """
    if not there:
        return card
    (old_keys, old_text), (keys, text) = _parted(there), _parted(card)
    if old_text.strip() and AUTHOR not in old_text:
        return there
    kept = "".join(row for key, row in old_keys.items() if key not in keys)
    made, _, words = text.partition(AUTHOR)
    return f"---\n{''.join(keys.values())}{kept}---\n{made}{AUTHOR}{old_text.partition(AUTHOR)[2] or words}"


def _parted(card: str) -> tuple[dict[str, str], str]:
    """A header's keys with their lines, and the text below it."""
    found = _HEADER.match(card)
    rows = re.findall(r"^([^\s#-][^:\n]*):(.*\n(?:[ \t#-].*\n|\n)*)", found[1] if found else "", re.MULTILINE)
    return {key: f"{key}:{rest}" for key, rest in rows}, card[found.end() :] if found else card


class _Facts:
    """The facts, with something in the place of each that is missing."""

    def __init__(self, facts: Mapping[str, Any]):
        self.name = str(facts.get("name") or "model")
        self.file = f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', self.name).strip('-.') or 'model'}.tkp"
        self.form: Json = facts.get("architecture") or {}
        self.schema: Schema = facts.get("schema") or Schema()
        self.loss = str(facts.get("loss") or "")
        self.calibration: Json = facts.get("calibration") or {}
        self.metrics: Json = facts.get("metrics") or {}
        self.origin: Json = facts.get("provenance") or {}
        self.base: Json = facts.get("base") or {}
        self.size_bytes, self.sha256 = facts.get("size_bytes"), facts.get("sha256")

    @property
    def kind(self) -> str:
        return str(self.form.get("kind", ""))

    @property
    def target(self) -> Field | None:
        return next((self.schema[name] for name in self.schema.targets), None)

    @property
    def source(self) -> str:
        """The weights that it began with, as they were named."""
        return str(self.base.get("source") or (self.origin.get("weights") or {}).get("source") or "")


def _plain(value: object) -> str:
    """A text of others as a line of Markdown that means nothing but itself."""
    text = " ".join(printable(str(value)[: 2 * _MOST_SIGNS]).split())
    text = text[:_MOST_SIGNS] + ("…" if len(text) > _MOST_SIGNS else "")
    return _MARKS.sub(r"\\\g<0>", escape(text, quote=False)) or "(empty)"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _section(title: str, *parts: str) -> str:
    return "\n\n".join([f"## {title}", *filter(None, parts)]) if any(parts) else ""


def _header(said: _Facts) -> str:
    """What the hub reads: YAML, of which JSON is a part."""
    of_input = next((said.schema[name].kind for name in said.schema.inputs if said.schema[name].kind != "number"), "")
    task = _TASKS.get((of_input, said.target.kind)) if said.target else None
    of_hub = re.fullmatch(f"hf:({HUB_ID})", said.source, re.ASCII)
    rows = {
        "library_name": "torchkeep",
        "tags": sorted({"torchkeep", "pytorch", *filter(None, [said.kind])}),
        "pipeline_tag": task,
        "base_model": of_hub[1] if of_hub else None,
    }
    return "---\n" + "".join(f"{key}: {json.dumps(value)}\n" for key, value in rows.items() if value) + "---\n"


def _summary(said: _Facts) -> str:
    named = said.form.get("name") or said.form.get("class_name")
    form = f"{said.kind} {_plain(named)}".strip() if named else said.kind
    count = said.form.get("num_parameters")
    model = f"A PyTorch model ({form})" if form else "A PyTorch model"
    size = f" of {count:,} parameters" if count is not None else ""
    began = f" It began with the weights {_plain(said.source)}." if said.source else ""
    runs = "Loading it runs no code of this repository."
    if said.kind == "code":
        runs = "It carries code, which runs only for who has read it and gives its hash."
    packed = "packaged by Torchkeep in one file with its preprocessing and its classes"
    return f"{model}{size}, {packed}.{began} {runs}"


def _loading(said: _Facts) -> str:
    trust = " --trust-code HASH" if said.kind == "code" else ""
    given = ', trust_code="HASH"' if said.kind == "code" else ""
    base, needs = (" --base WEIGHTS", ', base="WEIGHTS"') if said.base else ("", "")
    torchkeep = (
        f'```python\nimport torchkeep as tk\n\npackage = tk.load_package("{said.file}"{needs}{given})\n'
        f"model = package.model  # an nn.Module in eval mode\n"
        f'predictions = tk.Predictor(package)(["INPUT"])  # files, folders, tables\n```\n\n'
        f"```sh\ntorchkeep inspect {said.file}\ntorchkeep predict {said.file} INPUT{base}{trust}\n```"
    )
    tensors = (
        f"Without Torchkeep, the {'tensors that were trained' if said.base else 'tensors'} by name:\n\n"
        f'```python\nimport zipfile\n\nimport safetensors.torch\n\npackage = zipfile.ZipFile("{said.file}")\n'
        f'state_dict = safetensors.torch.load(package.read("parameters.safetensors"))\n```'
    )
    return _section("How to load it", torchkeep, tensors, _elsewhere(said, base))


def _elsewhere(said: _Facts, base: str) -> str:
    if said.kind == "hf":
        command = f"torchkeep export {said.file} --to transformers -o FOLDER{base}"
        return f"transformers reads, by `from_pretrained`, the folder that this writes:\n\n```sh\n{command}\n```"
    if said.kind in ("timm", "torchvision"):
        return f"The names are those of {said.kind}'s own model, whose `load_state_dict` takes them once its head fits."
    return ""


def _inputs(said: _Facts) -> str:
    rows = [(_plain(name), said.schema[name].kind, _shape(said.schema[name])) for name in said.schema.inputs]
    seen = _preprocessing(said.schema.preprocess) if said.schema.preprocess else ""
    return _section("Inputs", _table(("input", "kind", "shape of one"), rows) if rows else "", seen)


def _shape(field: Field) -> str:
    sizes = [] if field.shape is None else ["any" if size is None else f"{size:,}" for size in field.shape]
    return " × ".join(sizes) or ("any" if field.shape is None else "one number")


def _preprocessing(seen: Preprocess) -> str:
    side, share = seen.image_size, seen.crop_fraction
    square = "the middle square" + (f" of {share:.4g} of the short side" if share != 1 else "")
    size = f"{square} is resized to {side} × {side} pixels; " if side else ""
    most, colour = (1 << seen.bits) - 1, {1: "grey", 3: "RGB"}.get(seen.channels, f"{seen.channels} channels")
    mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (seen.mean, seen.std))
    return (f"Preprocessing, which the package does itself: the image is decoded as {colour}; {size}values of 0 to "
            f"{most:,} are divided by {most:,}, minus the mean ({mean}), over the deviation ({std}).")  # fmt: skip


def _outputs(said: _Facts) -> str:
    classes = said.target.classes if said.target is not None else ()
    shown = ", ".join(map(_plain, classes[:_MOST_CLASSES]))
    more = f", and {len(classes) - _MOST_CLASSES:,} more in `labels.json`" if len(classes) > _MOST_CLASSES else ""
    listed = f"{len(classes):,} classes, in the order of the outputs: {shown}{more}." if classes else ""
    found, split = said.calibration.get("temperature"), _plain(said.calibration.get("split", "other data"))
    true = "Probabilities are not calibrated: they are as the model says." if classes else ""
    if isinstance(found, int | float):
        true = f"Probabilities are calibrated: logits are divided by {found:.4g} first, found on the split {split}."
    return _section("Outputs", _MEANS.get(said.loss, ""), listed, true)


def _measured(said: _Facts) -> str:
    values = said.metrics.get("values", said.metrics)
    numbers = {tag: value for tag, value in values.items() if type(value) in (int, float)}
    split_of = {tag: tag.rpartition("/")[0] for tag in numbers}
    rows = [(_plain(split_of[tag]) if split_of[tag] else "as its author says", _plain(tag.rpartition("/")[2]),
             format_number(value)) for tag, value in numbers.items()]  # fmt: skip
    step, epoch = said.metrics.get("step"), said.metrics.get("epoch")
    at = f"At step {step:,}, epoch {epoch}." if values is not said.metrics and step is not None else ""
    chosen = "If this checkpoint was chosen by one of these numbers, other data give slightly worse ones."
    is_chosen = any(split == "valid" for split in split_of.values())
    return (
        _section("Metrics", _table(("split", "metric", "value"), rows), at, chosen if is_chosen else "") if rows else ""
    )


def _origin(said: _Facts) -> str:
    prints = (said.origin.get("data") or {}).get("fingerprints") or {}
    data = _table(("split", "fingerprint"), [(_plain(name), _plain(value)) for name, value in prints.items()])
    code = said.origin.get("code") or {}
    rows = [("seed", said.origin.get("seed")), ("commit of the code", code.get("commit")),
            ("changed since that commit", "yes" if code.get("diff") else "no" if code else None)]  # fmt: skip
    facts = "\n".join(f"- {name}: {_plain(value)}" for name, value in rows if value is not None)
    again = f"```sh\ntorchkeep reproduce {said.file} --data data.train=PATH\n```" if said.origin.get("recipe") else ""
    how = "Trains it again and compares every bit; further `--data` say where what else was read lies." if again else ""
    return _section("Training data and how to reproduce it", data if prints else "", facts, again, how)


def _environment(said: _Facts) -> str:
    kept = said.origin.get("environment") or {}
    machine = [(key, kept[key]) for key in _MACHINE if kept.get(key) is not None]
    rows = [(_plain(key), _plain(value)) for key, value in [*machine, *(kept.get("packages") or {}).items()]]
    return _section("Environment of the training", _table(("what", "which"), rows) if rows else "")


def _sizes(said: _Facts) -> str:
    base = f"{_plain(said.base.get('sha256'))} of {_plain(said.source)}" if said.base else None
    size = f"{said.size_bytes:,} bytes" if said.size_bytes is not None else None
    rows = {"parameters": size, "sha256 of the parameters": said.sha256, "sha256 of what is left out": base}
    return _section("Size and identity", "\n".join(f"- {name}: {value}" for name, value in rows.items() if value))
