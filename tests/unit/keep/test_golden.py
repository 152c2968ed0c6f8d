"""Checkpoints that older code wrote: each format's golden one loads with the content that it was made with, for ever.

Format 1 was written before format 2 was known: three steps of AdamW (rate .01) on a small network of seed 7, with
tensors of other kinds put beside its parameters. Format 2 holds the same, and what is new with it: tied parameters,
complex numbers, tensors of a program's own objects, a moving average, and the mark of a state that is not exact.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import seal

from torchkeep.errors import CheckpointError
from torchkeep.keep.checkpoint import Checkpoints, find_damage
from torchkeep.keep.generators import set_generator_states
from torchkeep.keep.snapshot import FORMAT
from torchkeep.tensors import tensor_sha256

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
FORMATS = [1, 2]
PARAMETERS = {
    "0.weight": [0.067060165, -0.327986777, 0.1586404, 0.156045154, -0.333762139, -0.056779522, -0.310781151,
                 0.176018238, -0.182957977, 0.378487736, 0.436727583, 0.034024291],
    "0.bias": [-0.234486893, -0.336980104, -0.06652724, -0.178978711],
    "1.weight": [0.982821524, 0.970549226, 0.969967961, 0.97044909],
    "1.bias": [-0.029042572, 0.026187779, -0.028185762, -0.029942747],
    "1.running_mean": [-0.052285746, -0.079038262, -0.068947084, 0.01530203],
    "1.running_var": [0.768900037, 0.761010766, 0.787352026, 0.807165563],
    "2.weight": [0.223590091, -0.397727102, 0.440008759, -0.362798035, 0.35486042, -0.085055426, 0.246297657,
                 0.215669408],
    "2.bias": [0.000282018, 0.063708209],
}  # fmt: skip
OTHERS = {
    "1.num_batches_tracked": torch.tensor(3),
    "half": torch.arange(4, dtype=torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False]),
}
GROUP = {
    "lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "amsgrad": False, "maximize": False,
    "foreach": None, "capturable": False, "differentiable": False, "fused": None, "decoupled_weight_decay": True,
    "params": [0, 1, 2, 3, 4, 5],
}  # fmt: skip
SHA256 = "f5b49b794711bbf03c7cad50d29ef26389908e29adef0c1bb73afb523e8d6b29"  # of format 1's model


def golden(number: int) -> tuple[Path, dict[str, Any]]:
    checkpoints = Checkpoints(GOLDEN / f"format-{number}", metric="valid/loss")
    saved, best = checkpoints.latest(), checkpoints.best()
    assert saved is not None
    assert saved == best
    assert (saved.step, saved.metrics) == (3, {"valid/loss": 0.5, "train/loss": math.inf})
    return saved.path, checkpoints.load(saved)


def test_every_format_up_to_todays_has_a_golden_one() -> None:
    assert FORMATS[-1] == FORMAT
    assert sorted(path.name for path in GOLDEN.glob("format-*")) == [f"format-{number}" for number in FORMATS]


@pytest.mark.parametrize("number", FORMATS)
def test_a_golden_checkpoint_loads_with_what_it_was_made_of(number: int) -> None:
    path, state = golden(number)
    assert find_damage(path) == ""
    model = state["model"]
    for name, values in PARAMETERS.items():
        torch.testing.assert_close(model[name].flatten(), torch.tensor(values), rtol=0, atol=1e-8)
    for name, tensor in OTHERS.items():
        assert model[name].dtype == tensor.dtype
        assert torch.equal(model[name], tensor)
    assert tensor_sha256({name: model[name] for name in [*PARAMETERS, *OTHERS]}) == SHA256
    main = state["optimizer"]["by_name"]["main"]
    assert main["param_groups"] == [GROUP]
    assert list(main["state"]) == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(main["state"][5]["exp_avg"], torch.tensor([0.001001075, 0.019789703]))
    assert state["clock"] == {"step": 3, "samples": 15, "epoch": 1}
    assert state["pair"] == (1, [2.5, None])
    assert math.isnan(state["history"][0]["metrics"]["odd"])


@pytest.mark.parametrize("number", FORMATS)
def test_a_golden_checkpoint_trains_on(number: int) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    _, state = golden(number)
    model.load_state_dict({name: state["model"][name] for name in model.state_dict()})
    optimizer.load_state_dict(state["optimizer"]["by_name"]["main"])
    set_generator_states(state["rng"])
    assert torch.equal(torch.get_rng_state(), state["rng"]["torch"])
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["step"] == 4


@pytest.mark.parametrize(("number", "exact"), [(1, True), (2, False)])
def test_a_table_of_golden_checkpoints_says_what_they_are(number: int, exact: bool) -> None:
    (row,) = Checkpoints(GOLDEN / f"format-{number}").rows()
    assert (row.step, row.epoch, row.is_exact, row.damage) == (3, 1, exact, "")
    assert row.created > 0


def test_what_came_with_format_2_is_there() -> None:
    _, state = golden(2)
    assert torch.equal(state["model"]["wave"], torch.tensor([1 + 2j, -3.5j]))
    assert state["model"]["tied"].data_ptr() == state["model"]["2.bias"].data_ptr()
    assert torch.equal(state["objects"]["head"]["mean"], torch.tensor([0.25, -1.0], dtype=torch.float64))
    assert state["objects"]["queue"] == {"at": 2}
    assert torch.equal(state["optimizer"]["average"]["0.bias"], torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_a_format_of_tomorrow_is_refused_and_left_where_it_is(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "format-2", tmp_path / "tomorrow")
    path = tmp_path / "tomorrow" / "step-00000003"
    later = (path / "state.json").read_text().replace('"format": 2', f'"format": {FORMAT + 1}', 1)
    (path / "state.json").write_text(later)
    seal(path)
    checkpoints = Checkpoints(tmp_path / "tomorrow")
    with pytest.raises(CheckpointError, match="another format"):
        checkpoints.take_up()  # never set aside, nor passed over: a newer torchkeep can read it
    assert path.is_dir()
