"""The contract: what a model takes and gives is in every checkpoint, and what does not keep to it is shown with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkeep as tk
from torchkeep.errors import CheckpointError, ModelError
from torchkeep.keep.checkpoint import Checkpoints


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples of three numbers; the one called ``odd`` has another shape or type."""

    def __init__(self, odd: Tensor | None = None, count: int = 6):
        self.odd, self.count = odd, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        x = self.odd if self.odd is not None and index == 1 else torch.arange(3.0) + index
        return {"x": x, "label": index % 2}


def images(folder: Path, names: tuple[str, str]) -> dict[str, Any]:
    from PIL import Image

    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for sample in range(4):
            Image.new("RGB", (8, 8), (200 * number, 20 * sample, 0)).save(folder / name / f"{number}{sample}.png")
    return {
        "data": {"train": str(folder), "image_size": 8, "batch_size": 4, "workers": 0},
        "model": {"name": "convnet", "args": {"widths": [4]}}, "train": {"epochs": 1}, "monitor": {"views": []},
    }  # fmt: skip


def contract_of(run: tk.Run) -> dict[str, Any]:
    checkpoints = Checkpoints(run.dir / "checkpoints")
    saved = checkpoints.latest()
    assert saved is not None
    return dict(checkpoints.load_part(saved, "contract"))


def test_a_checkpoint_has_types_shapes_classes_and_preprocessing(tmp_path: Path) -> None:
    run = tk.train(images(tmp_path / "data", ("ants", "bees")), run_dir=tmp_path / "run", quiet=True)
    kept = contract_of(run)
    assert kept["inputs"] == {"image": "uint8"}
    assert kept["outputs"] == [{"dtype": "float32", "shape": [None, 2]}]
    assert kept["schema"]["fields"]["image"]["shape"] == (3, 8, 8)
    assert kept["schema"]["fields"]["label"]["classes"] == ("ants", "bees")
    assert kept["schema"]["preprocess"]["mean"] == (0.5, 0.5, 0.5)


def test_other_classes_are_refused_whatever_may_change(tmp_path: Path) -> None:
    recipe = images(tmp_path / "data", ("ants", "bees"))
    tk.train(recipe, run_dir=tmp_path / "run", quiet=True)
    (tmp_path / "data" / "ants").rename(tmp_path / "data" / "wasps")  # now the second of two
    with pytest.raises(CheckpointError) as caught:
        tk.resume(tmp_path / "run", set=["train.epochs=2"], allow_change=["data"], quiet=True)
    assert "ants" in caught.value.expected
    assert "wasps" in caught.value.got
    assert "classes of label" in caught.value.where


def test_other_preprocessing_is_refused_unless_it_may_change(tmp_path: Path) -> None:
    recipe = images(tmp_path / "data", ("ants", "bees"))
    tk.train(recipe, run_dir=tmp_path / "run", quiet=True)
    changed = ["train.epochs=2", "data.mean=[0.1,0.1,0.1]"]
    with pytest.raises(CheckpointError) as caught:
        tk.resume(tmp_path / "run", set=changed, quiet=True)
    assert caught.value.where == "preprocessing"
    assert "0.5" in caught.value.expected
    assert "0.1" in caught.value.got


@pytest.mark.parametrize("odd", [torch.ones(5), torch.ones(3, dtype=torch.int64)], ids=["shape", "type"])
@pytest.mark.parametrize("split", ["train", "valid"])
def test_a_batch_that_does_not_fit_is_shown_with_what_is_expected(odd: Tensor, split: str, tmp_path: Path) -> None:
    data = {"train": Samples(), "valid": Samples(), split: Samples(odd)}
    model = nn.Linear(3, 2)
    with pytest.raises(ModelError) as caught:
        tk.fit(model, data["train"], data["valid"], epochs=1, batch_size=1, workers=0, run_dir=tmp_path / "run",
               quiet=True)  # fmt: skip
    assert f"({1}, {len(odd)})" in caught.value.got
    assert "(B, 3)" in caught.value.expected
    assert "1" in caught.value.where


def test_a_model_that_would_take_it_is_not_asked_with_another_shape(tmp_path: Path) -> None:
    run = tk.train(images(tmp_path / "data", ("ants", "bees")), run_dir=tmp_path / "run", quiet=True)
    package = tk.load_package(run.package(tmp_path / "x.tkp"))
    package.asked({"image": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)})
    with pytest.raises(ModelError) as caught:
        package.asked({"image": torch.zeros(1, 3, 16, 16, dtype=torch.uint8)})
    assert "(1, 3, 16, 16)" in caught.value.got
    assert "(B, 3, 8, 8)" in caught.value.expected
