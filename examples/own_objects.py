"""Your own module, dataset, loss, optimiser and schedule through tk.fit, on the digits beside this file.

    python examples/own_objects.py

The first call trains and ends in runs/own-objects. End it with Ctrl-C and call it again: it goes on where it stopped.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

import torchkeep as tk

DIGITS = Path(__file__).resolve().parent / "digits"


class Digits(Dataset):
    """The digits as (pixels, digit); while training each image is moved by up to one pixel, by torch's generator."""

    def __init__(self, split: str, moves: bool = False):
        table = pq.read_table(DIGITS / f"{split}.parquet")
        images = [np.asarray(Image.open(io.BytesIO(png))) for png in table["image"].to_pylist()]
        self.pixels = torch.from_numpy(np.stack(images)).float() / 255
        self.labels = table["label"].to_pylist()
        self.moves = moves

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.pixels[index]
        if self.moves:
            down, right = (torch.randint(-1, 2, (2,))).tolist()
            pixels = torch.roll(pixels, (down, right), (0, 1))
        return pixels, self.labels[index]


class Net(nn.Module):
    """Shapes: pixels (B, 8, 8) → logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 16, 10),
        )  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.unsqueeze(1))


def main() -> None:
    torch.manual_seed(0)  # the first weights are made here, before torchkeep is asked
    model = Net()
    run = tk.fit(
        model,
        Digits("train", moves=True),
        Digits("valid"),
        test=Digits("test"),
        loss=nn.CrossEntropyLoss(label_smoothing=0.05),
        metrics=["accuracy"],
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        schedule=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
        schedule_every="epoch",
        epochs=8,
        batch_size=64,
        settings={"train": {"threads": 1}},  # steps this small are faster on one thread
        run_dir="runs/own-objects",
        resume="auto",
    )

    print()
    print(f"best epoch {run.best.epoch}: valid/accuracy {run.best.metrics['valid/accuracy']:.4f}")
    test = Digits("test")
    said = list(run.predict(test))
    wrong = [i for i, prediction in enumerate(said) if prediction.label != str(test.labels[i])]
    print(f"{len(wrong)} of {len(test)} test digits are read wrongly:")
    for i in wrong[:5]:
        print(f"  sample {i}: a {test.labels[i]} read as {said[i].label} (probability {said[i].probability:.2f})")


if __name__ == "__main__":
    main()
