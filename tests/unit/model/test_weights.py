"""Weights: what fits is loaded under whatever wrapping, all of it or nothing, and the report adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from torchkeep.errors import CheckpointError, ModelError
from torchkeep.keep.checkpoint import Checkpoints
from torchkeep.model.images import ConvNet, MobileNetV2
from torchkeep.model.weights import load_weights
from torchkeep.tensors import to_safetensors

REAL = Path(__file__).parents[3] / "../shared/data/weights/mobilenet_v2.pth"


def net(num_classes: int = 4, seed: int = 0) -> ConvNet:
    torch.manual_seed(seed)
    model = ConvNet(3, num_classes, widths=(4, 8))
    model.features[1].running_mean.add_(1.0 + seed)  # a buffer that is not as a new model has it
    return model


def saved(folder: Path, value: Any, name: str = "w.pth") -> Path:
    torch.save(value, folder / name)
    return folder / name


def equal(model: nn.Module, other: nn.Module, without: str = "-") -> bool:
    pairs = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for (name, a), b in pairs if not name.startswith(without))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


WRAPPED: dict[str, Any] = {
    "plain": (lambda s: s, []),
    "state_dict": (lambda s: {"epoch": 3, "best": torch.tensor(0.9), "state_dict": s}, ["in 'state_dict'"]),
    "model beside an optimiser": (
        lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}, ["in 'model'"]
    ),
    "model_state_dict": (lambda s: {"model_state_dict": s, "loss": 0.5}, ["in 'model_state_dict'"]),
    "two deep": (lambda s: {"params": {"state_dict": s}}, ["in 'params'", "in 'state_dict'"]),
    "module.": (lambda s: prefixed("module.", s), ["'module.' taken off"]),
    "lightning": (
        lambda s: {"state_dict": prefixed("model.", s) | {"loss.weight": torch.ones(2)}},
        ["in 'state_dict'", "'model.' taken off"],
    ),
    "compiled, parallel": (
        lambda s: prefixed("module._orig_mod.", s), ["'_orig_mod.' taken off", "'module.' taken off"]
    ),
    "another name": (lambda s: {"network": s}, ["'network.' taken off"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_wrapping_is_found_and_named(name: str, tmp_path: Path) -> None:
    wrap, expected = WRAPPED[name]
    model, source = net(seed=1), net()
    report = load_weights(model, saved(tmp_path, wrap(source.state_dict())))
    assert equal(model, source)
    assert report.found == expected
    assert report.trunk_share == report.share("matched") == 1.0
    assert not report.missing
    assert not report.missing_buffers


def test_safetensors_a_dict_and_shards_do_the_same(tmp_path: Path) -> None:
    source = net()
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    (tmp_path / "w.safetensors").write_bytes(b"".join(to_safetensors(state)))
    names = list(state)
    halves = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, some in halves.items():
        (tmp_path / file).write_bytes(b"".join(to_safetensors({name: state[name] for name in some})))
    weight_map = {name: file for file, some in halves.items() for name in some}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for given in (tmp_path / "w.safetensors", tmp_path, f"hf:{tmp_path}", state):
        model = net(seed=1)
        load_weights(model, given)
        assert equal(model, source)


def test_a_trunk_alone_goes_into_a_model_that_wraps_it() -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = net(seed=1).features
            self.head = nn.Linear(8, 2)

    model, source = Wrapping(), net().features
    report = load_weights(model, source.state_dict())
    assert report.found == ["'backbone.' put before"]
    assert equal(model.backbone, source)
    assert set(report.reinitialised) == {"head.weight", "head.bias"}


def test_another_head_keeps_its_fresh_values_and_the_report_adds_up() -> None:
    model, source = net(3, seed=1), net(10)
    fresh = model.head.weight.clone()
    report = load_weights(model, {**source.state_dict(), "old.weight": torch.ones(7)})
    assert equal(model, source, without="head")
    assert torch.equal(model.head.weight, fresh)
    assert report.shapes["head.weight"] == "(10, 8) in the file, (3, 8) in the model"
    assert set(report.reinitialised) == {"head.weight", "head.bias"}
    assert report.unexpected == {"old.weight": 7}
    total = sum(p.numel() for p in model.parameters())
    parts = [report.matched, report.missing, report.other_shape, report.reinitialised]
    assert sum(sum(part.values()) for part in parts) == total
    assert report.share("reinitialised") == 27 / total
    assert report.share("unexpected") == 7 / (total - 27 + 7)
    assert report.trunk_share == 1.0
    text = report.text()
    assert "(10, 8) in the file" in text
    assert "buffers           12  of 12" in text
    assert json.loads(json.dumps(report.to_json()))["shares"]["matched"] == report.share("matched")


def test_too_little_is_refused_with_the_largest_lists_and_changes_nothing() -> None:
    model, before = net(), net()
    other = {f"x{i}.weight": torch.rand(5) for i in range(6)}
    half = {name: value for name, value in net(seed=1).state_dict().items() if not name.startswith("features.1")}
    with pytest.raises(ModelError, match="too little") as caught:
        load_weights(model, half | other, least_share=0.9)
    assert equal(model, before)
    assert "missing: features.10.weight" in caught.value.got
    assert "and 3 more" in caught.value.got
    assert "90%" in caught.value.expected
    report = load_weights(model, half | other, least_share=0.2)
    assert 0.2 < report.trunk_share < 0.9
    assert not equal(model, before)


def test_rules_rename_the_longest_prefix_first(tmp_path: Path) -> None:
    source = net()
    old = {name.replace("features.1", "stem.one").replace("features.", "stem."): value
           for name, value in source.state_dict().items()}  # fmt: skip
    model = net(seed=1)
    load_weights(model, old, rename={"stem.": "features.", "stem.one": "features.1"})
    assert equal(model, source)
    with pytest.raises(ModelError, match="renames nothing") as caught:
        load_weights(net(), old, rename={"stern.": "features."})
    assert "'stem.'" in caught.value.fix
    with pytest.raises(ModelError, match="one name"):
        load_weights(net(), source.state_dict(), rename={"features.0.": "features.3."})


def test_two_sets_in_one_file_are_asked_about() -> None:
    teacher, student, model = net(), net(seed=2), net(seed=1)
    both = {"student": student.state_dict(), "teacher": teacher.state_dict()}
    with pytest.raises(ModelError, match="two sets of weights") as caught:
        load_weights(model, both)
    assert "'student.'" in caught.value.got
    load_weights(model, both, rename={"teacher.": ""})
    assert equal(model, teacher)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_by_name(value: float) -> None:
    model, before = net(seed=1), net(seed=1)
    state = net().state_dict()
    state["features.4.bias"] = torch.full_like(state["features.4.bias"], value)
    with pytest.raises(ModelError, match="no numbers") as caught:
        load_weights(model, state)
    assert "features.4.bias" in caught.value.got
    assert equal(model, before)


def test_types_are_the_models_own() -> None:
    model, source = net(seed=1), net()
    load_weights(model, {name: value.bfloat16() if value.is_floating_point() else value
                         for name, value in source.state_dict().items()})  # fmt: skip
    assert model.head.weight.dtype == torch.float32
    assert torch.equal(model.head.weight, source.head.weight.bfloat16().float())
    whole = {name: value.long() for name, value in source.state_dict().items()}
    with pytest.raises(ModelError, match="cannot hold this tensor"):
        load_weights(model, whole)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.between = nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tie_is_kept_and_counted_once() -> None:
    source, model = Tied(), Tied()
    one_name = {name: value for name, value in source.state_dict().items() if name != "head.weight"}
    report = load_weights(model, one_name)
    assert model.head.weight is model.embedding.weight
    assert equal(model, source)
    assert sum(report.matched.values()) == sum(p.numel() for p in model.parameters()) == 24 + 20
    with pytest.raises(ModelError, match="ties have different values") as caught:
        load_weights(model, {**source.state_dict(), "head.weight": torch.rand(6, 4)})
    assert "head.weight" in caught.value.fix


def test_buffers_count_apart() -> None:
    state = {name: value for name, value in net().state_dict().items() if "running" not in name}
    report = load_weights(net(seed=1), state)
    assert report.share("matched") == 1.0
    assert len(report.missing_buffers) == 8
    assert "buffers            4  of 12" in report.text()


class Sly:
    """Would run code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


BAD: dict[str, tuple[Any, str, str]] = {
    "code": ("w.pth", {"state_dict": Sly()}, "as tensors alone"),
    "a whole model": ("w.pt", nn.Linear(2, 2), "as tensors alone"),
    "no tensors": ("w.ckpt", {"epoch": 1}, "no weights in this file"),
    "no dict": ("w.pth", torch.zeros(3), "as tensors alone"),
    "text": ("w.pth", b"weights", "as tensors alone"),
    "empty": ("w.pth", b"", "as tensors alone"),
    "another ending": ("w.h5", b"weights", "no file of weights"),
    "damaged": ("w.safetensors", b"weights", "safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(name: str, tmp_path: Path) -> None:
    file, content, said = BAD[name]
    path = tmp_path / file
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises((ModelError, CheckpointError), match=said) as caught:
        load_weights(net(), path)
    assert str(path) in caught.value.where


def test_a_file_of_the_old_form_is_read(tmp_path: Path) -> None:
    model, source = net(seed=1), net()
    torch.save(source.state_dict(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "w.pth")
    assert equal(model, source)


def test_a_head_that_is_not_there_is_a_slip() -> None:
    with pytest.raises(ModelError, match="no such part"):
        load_weights(net(), net().state_dict(), head="heed")


@pytest.mark.parametrize("files", [None, [], ["../w.pth"], ["model.safetensors.index.json"], [1]], ids=str)
def test_an_index_that_is_none_is_refused(files: list[Any] | None, tmp_path: Path) -> None:
    index = [1] if files is None else {"weight_map": dict(enumerate(files))} if files else {}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="no index of weights"):
        load_weights(net(), tmp_path)


def test_a_missing_file_is_answered_with_a_near_one(tmp_path: Path) -> None:
    saved(tmp_path, net().state_dict(), "resnet.pth")
    with pytest.raises(ModelError, match="no such weights") as caught:
        load_weights(net(), tmp_path / "resnett.pth")
    assert "'resnet.pth'" in caught.value.fix
    with pytest.raises(ModelError, match="no weights in this folder"):
        load_weights(net(), tmp_path)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with torch.device("meta"):
        model = ConvNet(3, 4, widths=(4, 8))
    with pytest.raises(ModelError, match="cannot hold this tensor"):
        load_weights(model, net().state_dict())


def run_folder(folder: Path, models: dict[int, nn.Module], average: dict[str, Tensor] | None = None) -> Path:
    """A run whose best checkpoint is its first."""
    checkpoints = Checkpoints(folder / "checkpoints", metric="accuracy", mode="max")
    for step, model in models.items():
        state = {"model": model.state_dict(), "optimizer": {"average": average, "lr": 0.1}}
        checkpoints.save(step, state, {"accuracy": 1 / step})
    checkpoints.join()
    (folder / "run.json").write_text("{}")
    return folder


def test_a_runs_best_checkpoint_or_a_named_one_is_read(tmp_path: Path) -> None:
    best, last, model = net(), net(seed=2), net(seed=1)
    run = run_folder(tmp_path / "run", {1: best, 2: last})
    load_weights(model, run)
    assert equal(model, best)
    steps = sorted((run / "checkpoints").glob("step-*"))
    load_weights(model, steps[-1])
    assert equal(model, last)
    (run / "checkpoints/best.json").unlink()
    (run / "checkpoints/last.json").unlink()
    load_weights(model, run)
    assert equal(model, last)


def test_a_moving_average_is_what_the_run_means(tmp_path: Path) -> None:
    trained, average, model = net(), net(seed=2), net(seed=1)
    run = run_folder(tmp_path / "run", {1: trained}, dict(average.named_parameters()))
    load_weights(model, run)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), average.parameters(), strict=True))
    assert torch.equal(model.features[1].running_mean, trained.features[1].running_mean)


def test_a_damaged_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    model, before = net(seed=1), net(seed=1)
    run = run_folder(tmp_path / "run", {1: net()})
    file = next((run / "checkpoints").glob("step-*/model.safetensors"))
    for damaged in (file, file.with_name("state.json")):
        whole = damaged.read_bytes()
        changed = whole + b" " if damaged.suffix == ".json" else whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:]
        damaged.write_bytes(changed)
        with pytest.raises(CheckpointError):
            load_weights(model, run)
        assert equal(model, before)
        damaged.write_bytes(whole)
    load_weights(model, run)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "run.json").write_text("{}")
    with pytest.raises(ModelError, match="no checkpoint"):
        load_weights(model, empty)


def test_the_usual_file_of_mobilenet_v2_loads_whole() -> None:
    if not REAL.is_file():
        pytest.skip("the file shared/data/weights/mobilenet_v2.pth beside the repository is missing")
    model = MobileNetV2(3, 1000)
    report = load_weights(model, REAL)
    assert report.share("matched") == 1.0
    assert not report.unexpected
    assert not report.missing_buffers
    assert set(model.state_dict()) == set(torch.load(REAL, weights_only=True, mmap=True))
