"""Models of transformers from tiny folders made here: every kind, with and without a head, and what they state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchkeep.contracts import Field, Preprocess, Schema
from torchkeep.errors import ModelError, SettingsError
from torchkeep.model.build import Built, LinearInUnits, ModelSettings, build_model, stated
from torchkeep.settings import check
from torchkeep.training.binding import Binding

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # of the library's own

CLASSES = Field("label", (), ("a", "b", "c"), is_target=True)
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 60}
VIT = {**TEXT, "image_size": 16, "patch_size": 8}
WAVE = {
    **TEXT, "conv_dim": (8, 8), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8, "num_feat_extract_layers": 2,
    "mask_time_length": 2,
}  # fmt: skip
INPUTS = {
    "image": {"image": Field("image", (3, 16, 16))},
    "text": {"input_ids": Field("tokens", (None,), num_tokens=50)},
    "audio": {"audio": Field("audio", (None,))},
}
BATCHES: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "image": lambda: {"image": torch.rand(2, 3, 16, 16)},
    "text": lambda: {"input_ids": torch.randint(1, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)},
    "audio": lambda: {"audio": torch.randn(2, 400), "length": torch.tensor([400, 250])},
}
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "vit": ("image", "ViT", "ForImageClassification", VIT),
    "resnet": ("image", "ResNet", "ForImageClassification",
               {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}),
    "bert": ("text", "Bert", "ForSequenceClassification", TEXT),
    "gpt2": ("text", "GPT2", "ForSequenceClassification",
             {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 0}),
    "wav2vec2": ("audio", "Wav2Vec2", "ForSequenceClassification", WAVE),
    "hubert, masked": ("audio", "Hubert", "ForSequenceClassification", {**WAVE, "feat_extract_norm": "layer"}),
}  # fmt: skip


def write(folder: Path, name: str, num_labels: int | None, **more: Any) -> Path:
    """A folder as save_pretrained writes it: a classifier's, or that of the model without a head."""
    _, family, task, options = KINDS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**options, **more})
    if num_labels is not None:
        config.num_labels = num_labels
    made = getattr(transformers, family + (task if num_labels is not None else "Model"))(config)
    made.save_pretrained(folder)
    return folder


def reference(folder: Path, name: str, num_labels: int | None) -> dict[str, torch.Tensor]:
    """What the library's own class makes of the folder."""
    _, family, task, _ = KINDS[name]
    made = getattr(transformers, family + (task if num_labels is not None else "Model"))
    return made.from_pretrained(folder).state_dict()


def build(name: str, kind: str, target: Field = CLASSES, *, loads: bool = True, **settings: Any) -> Built:
    key = "label" if target.kind == "label" else "target"
    schema = Schema({**INPUTS[kind], key: target}, Preprocess(channels=3) if kind == "image" else None)
    checked = check(ModelSettings, {"name": name, **settings}, "test")
    torch.manual_seed(1)
    return build_model(checked, schema, (), lambda _: None, loads=loads)


def batch_of(kind: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    return {**BATCHES[kind](), "label": torch.tensor([0, 2]), "index": torch.arange(2)}


@pytest.mark.parametrize("num_labels", [3, 5, None], ids=["its head fits", "another head", "no head"])
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_gives_logits_to_the_engine(name: str, num_labels: int | None, tmp_path: Path) -> None:
    kind = KINDS[name][0]
    folder = write(tmp_path, name, num_labels)
    built = build(f"hf:{folder}", kind)
    batch = batch_of(kind)
    output = Binding(built.model, batch, ["label"], with_targets=True).call(batch)
    assert output.shape == (2, 3)
    assert torch.isfinite(output).all()
    report = built.report
    assert report is not None
    assert report.trunk_share > 0.9
    assert bool(report.reinitialised) == (num_labels != 3)
    assert built.notes[0][0] == "weights"
    held, loaded = built.model.state_dict(), 0
    for key, value in reference(folder, name, num_labels).items():
        own = next((own for own in held if own == key or (num_labels is None and own.endswith(f".{key}"))), None)
        if own is not None and held[own].shape == value.shape:
            assert torch.equal(held[own], value), key
            loaded += 1
    assert loaded > 15


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_run_gets_the_same_model_without_weights(name: str, tmp_path: Path) -> None:
    kind = KINDS[name][0]
    folder = write(tmp_path, name, 5)
    trained = build(f"hf:{folder}", kind)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    again = build(f"hf:{folder}", kind, loads=False)
    assert again.head == trained.head
    assert again.report is None
    again.model.load_state_dict(trained.model.state_dict())
    batch = batch_of(kind)
    for built in (trained, again):
        built.model.eval()
    calls = [Binding(built.model, batch, ["label"]).call(batch) for built in (trained, again)]
    assert torch.equal(*calls)


def test_the_answer_is_that_of_the_model_itself(tmp_path: Path) -> None:
    folder = write(tmp_path, "bert", 3)
    model = build(f"hf:{folder}", "text").model.eval()
    batch = batch_of("text")
    batch["attention_mask"][1, 5:] = 0
    original = transformers.BertForSequenceClassification.from_pretrained(folder).eval()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    assert torch.equal(model(**inputs), original(**inputs).logits)
    assert list(model.state_dict()) == list(original.state_dict())  # no module around it: its names are the usual ones


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_padding_changes_no_answer_whatever_number_pads(name: str, tmp_path: Path) -> None:
    model = build(f"hf:{write(tmp_path, name, 3)}", "text").model.eval()
    text = torch.tensor([[5, 6, 7, 8]])
    alone = model(text)
    for pad in (0, 33):
        padded = torch.cat([text, torch.full((1, 3), pad)], 1)
        mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
        torch.testing.assert_close(model(padded, mask), alone, atol=1e-5, rtol=0)


def test_a_waveform_is_normalised_over_its_own_samples_and_padding_changes_nothing(tmp_path: Path) -> None:
    model = build(f"hf:{write(tmp_path, 'hubert, masked', 3)}", "audio").model.eval()
    torch.manual_seed(0)
    clip = torch.randn(1, 400) * 3 + 1
    padded = torch.cat([clip, torch.zeros(1, 100)], 1)
    alone = model(clip)
    torch.testing.assert_close(model(padded, torch.tensor([400])), alone, atol=1e-4, rtol=0)
    torch.testing.assert_close(model(clip * 5 + 2), alone, atol=1e-4, rtol=0)


def test_new_layers_are_drawn_and_hold_no_garbage(tmp_path: Path) -> None:
    model = build(f"hf:{write(tmp_path, 'bert', None)}", "text").model
    assert 0.02 < model.classifier.weight.abs().max() < 0.1  # the library's own: a deviation of 0.02
    assert not model.classifier.bias.any()


def test_a_head_that_is_replaced_was_not_loaded(tmp_path: Path) -> None:
    built = build(f"hf:{write(tmp_path, 'bert', 7)}", "text", args={"num_labels": 7})
    assert built.model.classifier.out_features == 3
    assert set(built.report.reinitialised) == {"classifier.weight", "classifier.bias"}
    assert built.report.trunk_share == 1.0


def test_weights_that_are_not_the_models_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "vit", 3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 24}))
    with pytest.raises(ModelError, match="too little of these weights"):
        build(f"hf:{folder}", "image")
    assert build(f"hf:{folder}", "image", weights_share=0.05).model is not None
    assert build(f"hf:{folder}", "image", weights="none").report is None


def test_a_weight_that_is_no_number_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "bert", 3)
    made = transformers.BertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        made.bert.pooler.dense.bias[0] = float("nan")
    made.save_pretrained(folder)
    with pytest.raises(ModelError, match="no numbers") as caught:
        build(f"hf:{folder}", "text")
    assert "bert.pooler.dense.bias" in caught.value.got


def test_a_number_is_predicted_in_its_units_and_the_head_may_be_named(tmp_path: Path) -> None:
    number = Field("number", (), is_target=True, mean=500.0, std=10.0)
    built = build(f"hf:{write(tmp_path, 'bert', 3)}", "text", number, head="classifier")
    assert isinstance(built.model.classifier, LinearInUnits)
    output = built.model.eval()(batch_of("text")["input_ids"])
    assert output.shape == (2, 1)
    assert (output - 500).abs().max() < 100


def test_a_model_without_a_classifier_of_its_own_gets_a_head(tmp_path: Path) -> None:
    vision = transformers.SiglipVisionConfig(**VIT)
    transformers.SiglipVisionModel(vision).save_pretrained(tmp_path / "siglip")
    built = build(f"hf:{tmp_path / 'siglip'}", "image")
    assert built.head == "head"
    assert built.model(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    assert set(built.report.reinitialised) == {"head.weight", "head.bias"}
    again = build(f"hf:{tmp_path / 'siglip'}", "image", loads=False)
    assert list(again.model.state_dict()) == list(built.model.state_dict())


def test_a_hubs_weights_for_a_model_of_ones_own(tmp_path: Path) -> None:
    folder = write(tmp_path, "bert", 3)
    settings = check(ModelSettings, {"name": "own.py:make", "weights": f"hf:{folder}"}, "test")
    schema = Schema({**INPUTS["text"], "label": CLASSES})

    def make() -> nn.Module:
        return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=7))

    built = build_model(settings, schema, (), lambda _: make)
    assert (built.head, built.report.trunk_share) == ("classifier", 1.0)
    assert built.model.classifier.out_features == 3
    assert [row[0] for row in built.notes] == ["weights", "head"]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no such folder": ({"name": "hf:no/such-model"}, "image", "cannot be loaded"),
    "no such argument": ({"name": "hf:bert", "args": {"hiden_size": 3}}, "text", "no such argument"),
    "images for texts": ({"name": "hf:vit"}, "text", "of other data"),
    "texts for images": ({"name": "hf:bert"}, "image", "of other data"),
    "no such weights": ({"name": "convnet", "weights": "hf:no/such-model"}, "image", "cannot be loaded"),
    "log-mels": ({"name": "hf:wave"}, "mel", "waveform of one channel"),
    "a spectrogram model": ({"name": "hf:ast"}, "audio", "spectrogram"),
    "more tokens": ({"name": "hf:bert"}, "many", "fewer tokens"),
    "grey": ({"name": "hf:vit"}, "grey", "other channels"),
    "each token": ({"name": "hf:bert"}, "blocks", "answer for a whole"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_work_is_said(name: str, tmp_path: Path) -> None:
    settings, kind, said = WRONG[name]
    write(tmp_path / "bert", "bert", 3)
    write(tmp_path / "vit", "vit", 3)
    write(tmp_path / "wave", "wav2vec2", 3)
    transformers.ASTConfig(**TEXT, num_mel_bins=32, max_length=32).save_pretrained(tmp_path / "ast")
    tokens = Field("tokens", (9,), num_tokens=50)
    inputs: dict[str, Any] = {
        **INPUTS, "mel": {"audio": Field("audio", (64, None))}, "grey": INPUTS["image"],
        "blocks": {"input_ids": tokens}, "many": {"input_ids": Field("tokens", (None,), num_tokens=61)},
    }  # fmt: skip
    target = Field("tokens", (9,), num_tokens=50, is_target=True) if kind == "blocks" else CLASSES
    seen = Preprocess(channels=1 if kind == "grey" else 3) if kind in ("image", "grey") else None
    schema = Schema({**inputs[kind], "label": target}, seen)
    with pytest.raises(ModelError, match=said):
        build_model(check(ModelSettings, settings, "test"), schema, (), lambda _: None, tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    folder = write(tmp_path, "bert", 3)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Net"}
    config |= {"model_type": "own", "auto_map": code}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="cannot be loaded"):
        build(f"hf:{folder}", "text")
    assert not (tmp_path / "ran").exists()


STATED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "size": ("vit", {"size": {"height": 16, "width": 16}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.2]},
             {"image_size": 16, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2]}),
    "crop": ("vit", {"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3,
                     "image_std": [0.5] * 3},
             {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_fraction": 0.8}),
    "as they are": ("vit", {"size": 16, "image_mean": [0.5] * 3, "do_normalize": False},
                    {"image_size": 16, "mean": [0.0], "std": [1.0]}),
    "rate": ("wav2vec2", {"sampling_rate": 16000, "feature_extractor_type": "Wav2Vec2FeatureExtractor"},
             {"features": "waveform", "sample_rate": 16000}),
}  # fmt: skip


@pytest.mark.parametrize("name", STATED)
def test_preprocessing_is_stated_as_keys_of_data(name: str, tmp_path: Path) -> None:
    family, file, expected = STATED[name]
    folder = write(tmp_path, family, 3)
    (folder / "preprocessor_config.json").write_text(json.dumps(file))
    settings = check(ModelSettings, {"name": f"hf:{folder.name}"}, "test")
    assert stated(settings, folder.parent) == expected


def test_a_tokenizer_is_stated_where_there_is_one(tmp_path: Path) -> None:
    folder = write(tmp_path / "bert", "bert", 3)
    settings = check(ModelSettings, {"name": "hf:bert"}, "test")
    assert stated(settings, tmp_path) == {}
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    assert stated(settings, tmp_path) == {"tokenizer": "bert"}
    assert stated(check(ModelSettings, {"name": "convnet"}, "test"), tmp_path) == {}


@pytest.mark.parametrize(("name", "package"), [("timm:resnet18", "timm"), ("torchvision:resnet18", "torchvision")])
def test_the_other_libraries_where_they_can_be_imported(name: str, package: str) -> None:
    try:
        __import__(package)
    except (ImportError, OSError, RuntimeError):
        with pytest.raises(SettingsError, match=f"needs the package {package}") as caught:
            build(name, "image")
        assert caught.value.fix == f'pip install "torchkeep[{package}]"'
        pytest.skip(f"{package} cannot be imported here")
    built = build(name, "image", weights="none")
    assert built.head == "fc"
    assert built.model(torch.rand(2, 3, 64, 64)).shape == (2, 3)
    assert stated(check(ModelSettings, {"name": name}, "test"), Path())["image_size"] == 224
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        build(name.replace("18", "181"), "image", weights="none")
    assert "resnet18" in caught.value.fix
