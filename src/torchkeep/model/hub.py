"""Models of others by name: ``hf:``, ``timm:``, ``torchvision:``. Code that comes with weights is never run.

A transformers model keeps its own parameter names and gets a forward that takes a batch's keys and gives logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..contracts import Schema
from ..errors import ModelError, SettingsError, nearest
from ..packages import package_of
from ..tensors import read_json

HubKind = Literal["image", "tokens", "audio"]

HUB = "hf:"

_LIBRARIES = (HUB, "timm:", "torchvision:")
_TASKS = {
    "image": ("ImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING", "pixel_values"),
    "tokens": ("SequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", "input_ids"),
    "audio": ("AudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING", "input_values"),
}
_WAVEFORM_KEY = "feat_extract_activation"  # what the configurations of models of raw waveforms have, and no other
_WEIGHT_FILES = (["model*.safetensors", "model.safetensors.index.json"], ["pytorch_model*"])


@dataclass
class HubModel:
    """A model, and what its weights left as it was: by name, the shape in the file; None where none were read."""

    model: nn.Module
    absent: dict[str, str] | None
    unexpected: dict[str, int]


def is_hub_name(name: str) -> bool:
    return name.startswith(_LIBRARIES)


def open_model(
    name: str, base: Path, schema: Schema, num_outputs: int, args: dict[str, Any], *, reads: bool
) -> HubModel:
    """The model that a hub's name means, with its weights where ``reads``, else as drawn.

    Raises:  ModelError where the library or the model is missing, or where the data are of another kind
    """
    library, _, called = name.partition(":")
    kind = _kind_of(name, schema)
    if library == "hf":
        return _transformers(name, _place(called, base), kind, schema, {"num_labels": num_outputs, **args}, reads)
    if kind != "image":
        raise ModelError(f"{library} has models of images", where=f"model.name = {name!r}", got=f"data of {kind}")
    package, channels = (
        package_of(library, library, f"model.name = {name!r}"),
        schema.preprocess.channels if schema.preprocess else 3,
    )
    listed = package.list_models if library == "timm" else package.models.list_models
    with _explained(name, "a name that the library knows", nearest(called, listed())):
        if library == "timm":
            model = package.create_model(called, pretrained=reads, in_chans=channels, **args)
        else:
            model = package.models.get_model(called, weights="DEFAULT" if reads else None, **args)
    return HubModel(model, {} if reads else None, {})


def stated(name: str, base: Path) -> dict[str, Any]:
    """What a hub's model says of its preprocessing, as keys of [data]; empty where it says nothing.

    Raises:  ModelError where the library is missing
    """
    library, _, called = name.partition(":")
    if library == "hf":
        return _stated_by_files(_place(called, base), called, base)
    package = package_of(library, library, f"model.name = {name!r}")
    with _explained(name, "a name that the library knows"):
        if library == "timm":
            held = package.models.get_pretrained_cfg(called)
            return _image_keys(held.input_size, held.mean, held.std, held.crop_pct) if held else {}
        seen = package.models.get_model_weights(called).DEFAULT.transforms()
        return _image_keys(seen.crop_size, seen.mean, seen.std, seen.crop_size[0] / seen.resize_size[0])


def fetched(name: str) -> Path:
    """The folder with the weights of "hf:NAME": a folder of that name, else the hub's copy in this machine's cache.

    Raises:  ModelError where neither has it
    """
    place = _place(name.removeprefix(HUB), Path())
    if Path(place).is_dir():
        return Path(place)
    hub = package_of("huggingface_hub", "hf", f"model.name = {name!r}")
    with _explained(name, "a folder, or a name that the hub or its cache on this machine knows"):
        for patterns in _WEIGHT_FILES:
            folder = Path(hub.snapshot_download(place, allow_patterns=patterns))
            if any(folder.glob(patterns[0])):
                break
    return folder


def placed(source: str, base: Path) -> str:
    """Where weights lie: a path below ``base``, a hub's name as it is."""
    if source.startswith(HUB):
        return HUB + _place(source.removeprefix(HUB), base)
    return str(base / Path(source).expanduser())


def _kind_of(name: str, schema: Schema) -> HubKind:
    kinds = [schema[key].kind for key in schema.inputs if schema[key].kind in _TASKS]
    target = next((schema[key].kind for key in schema.targets), "label")
    if not kinds or target in ("mask", "tokens"):
        raise ModelError(
            "models of a hub answer for a whole image, text or recording", where=f"model.name = {name!r}",
            got=f"data with {', '.join(schema.inputs)}, target {target}", expected="a label or numbers for each sample",
        )  # fmt: skip
    return cast(HubKind, kinds[0])


def _transformers(name: str, place: str, kind: HubKind, schema: Schema, args: dict[str, Any], reads: bool) -> HubModel:
    package, (task, mapping, main_input) = package_of("transformers", "hf", f"model.name = {name!r}"), _TASKS[kind]
    with _silent(package), _explained(name, "a folder that save_pretrained wrote, or a name that the hub knows"):
        options: dict[str, Any] = {"trust_remote_code": False}
        config, unused = package.AutoConfig.from_pretrained(place, return_unused_kwargs=True, **options, **args)
        _check_config(name, kind, config, schema, list(unused))
        has_task = type(config) in getattr(package, mapping)
        factory = getattr(package, f"AutoModelFor{task}") if has_task else package.AutoModel
        options |= {"dtype": torch.float32}
        if reads:
            options |= {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
            model, info = factory.from_pretrained(place, **options)
        else:
            model, info = factory.from_config(config, **options), None
    if model.main_input_name != main_input:
        raise ModelError("this model is of other data", where=f"model.name = {name!r}", expected=f"data with {kind}s",
                         got=f"{type(model).__name__}, which takes {model.main_input_name}")  # fmt: skip
    model = _answering(model if has_task else _Pooled(model, args["num_labels"]), kind, place)
    if info is None:
        return HubModel(model, None, {})
    absent = dict.fromkeys(info["missing_keys"], "") | {key: str(tuple(of)) for key, of, _ in info["mismatched_keys"]}
    if not has_task:
        absent = {f"trunk.{key}": shape for key, shape in absent.items()} | {"head.weight": "", "head.bias": ""}
    return HubModel(model, absent, dict.fromkeys(info["unexpected_keys"], 0))


def _check_config(name: str, kind: HubKind, config: Any, schema: Schema, unused: list[str]) -> None:
    """What would else fail in the midst of a forward, or give wrong numbers. A pad token is set where there is none."""
    where, channels = f"model.name = {name!r}", schema.preprocess.channels if schema.preprocess else 3
    if unused:
        raise ModelError("this model has no such argument", where=f"model.args.{unused[0]}", got=repr(unused[0]),
                         expected="a key of its config.json", fix=nearest(unused[0], [*config.to_dict()]))  # fmt: skip
    if kind == "image" and getattr(config, "num_channels", channels) != channels:
        raise ModelError("this model takes images of other channels", where=where, got=f"{channels} channels",
                         expected=f"{config.num_channels}", fix=f"data.channels = {config.num_channels}")  # fmt: skip
    if kind == "tokens":
        config = config.get_text_config()
        if getattr(config, "pad_token_id", 0) is None:
            end = config.eos_token_id
            config.pad_token_id = (end[0] if isinstance(end, list) else end) or 0
        most = max(field.num_tokens for field in schema.fields.values())
        if most > getattr(config, "vocab_size", most):
            raise ModelError("this model knows fewer tokens than the tokenizer", where=where, got=f"{most:,} tokens",
                             expected=f"at most {config.vocab_size:,}", fix=f"data.tokenizer = {name!r}")  # fmt: skip
    if kind == "audio":
        if not hasattr(config, _WAVEFORM_KEY):
            raise ModelError("models with a spectrogram of their own are not fed", where=where, got=config.model_type,
                             expected="one that takes the waveform, as wav2vec2 does")  # fmt: skip
        shapes = [field.shape or () for field in schema.fields.values() if field.kind == "audio"]
        if len(shapes[0]) != 1:
            raise ModelError("this model takes a waveform of one channel", where=where, got="log-mels or two channels",
                             expected="(T,)", fix='data.features = "waveform"')  # fmt: skip


class _Pooled(nn.Module):
    """A model without a head of its own, and a linear layer on what it says of the whole sample."""

    def __init__(self, trunk: Any, num_outputs: int):
        super().__init__()
        config = trunk.config.get_text_config()
        width = getattr(config, "hidden_size", None) or config.hidden_sizes[-1]
        self.config, self.trunk, self.head = trunk.config, trunk, nn.Linear(width, num_outputs)

    def forward(self, **inputs: Any) -> SimpleNamespace:
        found = self.trunk(**inputs)
        pooled = getattr(found, "pooler_output", None)
        if pooled is None:
            states, mask = found.last_hidden_state, inputs.get("attention_mask")
            if mask is None or mask.shape != states.shape[:2]:
                pooled = states.mean(1) if states.ndim == 3 else states.flatten(2).mean(2)
            else:
                pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return SimpleNamespace(logits=self.head(pooled.flatten(1)))


class _OfImages(nn.Module):
    """Shapes:  image float (B, C, H, W) → (B, K)"""

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = super().forward(pixel_values=image).logits
        return logits


class _OfTexts(nn.Module):
    """Shapes:  input_ids int64 (B, T), attention_mask (B, T) → (B, K)"""

    config: Any

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        mask = None if attention_mask is None else attention_mask.long()
        if mask is not None:  # some count from the padding, and know it by the number that is their own
            pad = getattr(self.config.get_text_config(), "pad_token_id", None)
            input_ids = input_ids if pad is None else input_ids.masked_fill(mask == 0, pad)
        logits: Tensor = super().forward(input_ids=input_ids, attention_mask=mask).logits
        return logits


class _OfWaves(nn.Module):
    """Shapes:  audio float (B, T), length int64 (B,) of valid samples → (B, K)"""

    is_normalised, is_masked = True, True

    def forward(self, audio: Tensor, length: Tensor | None = None) -> Tensor:
        length = audio.new_full((len(audio),), audio.shape[1], dtype=torch.int64) if length is None else length
        valid = torch.arange(audio.shape[1], device=audio.device) < length[:, None]
        if self.is_normalised:  # as Wav2Vec2FeatureExtractor does: mean 0, variance 1 over a clip's own samples
            audio = torch.where(valid, audio - _mean(audio, valid), 0)
            audio = audio / (_mean(audio.square(), valid) + 1e-7).sqrt()
        mask = valid.long() if self.is_masked else None
        logits: Tensor = super().forward(input_values=audio, attention_mask=mask).logits
        return logits


def _mean(values_BT: Tensor, valid_BT: Tensor) -> Tensor:
    return (values_BT * valid_BT).sum(1, keepdim=True) / valid_BT.sum(1, keepdim=True)


_FORWARDS: dict[str, type[nn.Module]] = {"image": _OfImages, "tokens": _OfTexts, "audio": _OfWaves}


def _answering(model: Any, kind: HubKind, place: str) -> nn.Module:
    """The same model with the forward of its kind: no module around it, so that its parameters keep their names."""
    own = type(model)
    model.__class__ = type(own.__name__, (_FORWARDS[kind], own), {"__module__": own.__module__})
    if kind == "audio":
        model.is_normalised = _file_of(place, "preprocessor_config.json").get("do_normalize", True)
        # one whose features are normalised over time was trained without a mask: its paper pads with silence
        model.is_masked = getattr(model.config, "feat_extract_norm", "layer") == "layer"
    held: nn.Module = model
    return held


def _stated_by_files(place: str, called: str, base: Path) -> dict[str, Any]:
    config = _file_of(place, "config.json")
    seen = _file_of(place, "preprocessor_config.json") or _file_of(place, "processor_config.json")
    seen = seen.get("image_processor") or seen.get("feature_extractor") or seen
    if _WAVEFORM_KEY in config:
        return {"features": "waveform", **({"sample_rate": seen["sampling_rate"]} if "sampling_rate" in seen else {})}
    if "image_mean" in seen or "image_size" in config:
        size = seen.get("crop_size") or seen.get("size") or config.get("image_size")
        is_plain = not seen.get("do_normalize", True)
        mean, std = ([0.0], [1.0]) if is_plain else (seen.get("image_mean"), seen.get("image_std"))
        return _image_keys(size, mean, std, seen.get("crop_pct") or _cropped(seen))
    if not seen and any(_file_of(place, file) for file in ("tokenizer.json", "tokenizer_config.json")):
        return {"tokenizer": called if (base / called).is_dir() else f"hf:{called}"}
    return {}


def _cropped(seen: dict[str, Any]) -> float | None:
    """Which share of the resized short side is kept; None where nothing is cropped."""
    size, crop = seen.get("size"), seen.get("crop_size")
    edge = size.get("shortest_edge") if isinstance(size, dict) else None
    side = crop.get("height") if isinstance(crop, dict) else crop
    return side / edge if edge and side and seen.get("do_center_crop", True) else None


def _image_keys(size: Any, mean: Any, std: Any, fraction: float | None = None) -> dict[str, Any]:
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    side = size[-1] if isinstance(size, list | tuple) else size
    keys = {"image_size": side, "mean": mean and [float(x) for x in mean], "std": std and [float(x) for x in std]}
    keys["crop_fraction"] = fraction if fraction and fraction < 1 else None
    return {key: value for key, value in keys.items() if value}


def _place(called: str, base: Path) -> str:
    folder = base / Path(called).expanduser()
    return str(folder) if folder.is_dir() else called


def _file_of(place: str, file: str) -> dict[str, Any]:
    """A JSON file of a model; empty where it has none."""
    path = Path(place) / file
    if not Path(place).is_dir():
        hub = package_of("huggingface_hub", "hf", f"model.name = {place!r}")
        try:
            path = Path(hub.hf_hub_download(place, file))
        except Exception:  # not there, no network, no such name: whoever needs it says so
            return {}
    held = read_json(path) if path.is_file() else {}
    return held if isinstance(held, dict) else {}


@contextlib.contextmanager
def _explained(name: str, expected: str, fix: str = "") -> Iterator[None]:
    try:
        yield
    except (ModelError, SettingsError):
        raise
    except Exception as error:  # whatever the library, the hub, the network or the files bring
        said = str(error).strip().partition("\n")[0]
        raise ModelError("this model cannot be loaded", where=f"model.name = {name!r}", fix=fix,
                         got=f"{type(error).__name__}: {said}", expected=expected) from error  # fmt: skip


@contextlib.contextmanager
def _silent(package: Any) -> Iterator[None]:
    """The library's own tables and bars are left out: the load report says it."""
    logging = package.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
