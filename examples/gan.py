"""A GAN: two networks, two optimisers, one step of your own, on the digits beside this file.

    python examples/gan.py

It prints digits that the generator has drawn, as text. Goodfellow et al. 2014, "Generative adversarial nets".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchkeep as tk

DIGITS = Path(__file__).resolve().parent / "digits"
NOISE = 32
SHADES = " .:-=+*#%@"


def make_generator() -> nn.Module:
    """Shapes: noise (B, 32) → images (B, 1, 8, 8) from -1 to 1."""
    return nn.Sequential(
        nn.Linear(NOISE, 128), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 64), nn.Tanh(), nn.Unflatten(1, (1, 8, 8)),
    )  # fmt: skip


def make_discriminator() -> nn.Module:
    """Shapes: images (B, 1, 8, 8) → logits (B, 1), above 0 for "real"."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.LeakyReLU(0.2), nn.Dropout(0.3),
        nn.Linear(256, 128), nn.LeakyReLU(0.2), nn.Dropout(0.3), nn.Linear(128, 1),
    )  # fmt: skip


def make_optimizers(model: nn.ModuleDict) -> dict[str, torch.optim.Optimizer]:
    return {
        "discriminator": torch.optim.Adam(model["discriminator"].parameters(), lr=1e-3, betas=(0.5, 0.999)),
        "generator": torch.optim.Adam(model["generator"].parameters(), lr=1e-3, betas=(0.5, 0.999)),
    }


def step(model: nn.ModuleDict, batch: dict[str, Any], context: Any) -> dict[str, Tensor]:
    """One update of each network. ``batch["image"]`` comes normalised, from -1 to 1."""
    real = batch["image"]
    noise = torch.randn(len(real), NOISE, generator=context.generator("noise"), device=context.device)
    drawn = model["generator"](noise)

    # 0.9 for "real": one-sided label smoothing, Salimans et al. 2016, section 3.4
    told_apart = judged(model, real, 0.9) + judged(model, drawn.detach(), 0.0)
    context.backward(told_apart, "discriminator")

    fooled = judged(model, drawn, 1.0)
    context.backward(fooled, "generator")
    return {"loss": fooled.detach(), "discriminator_loss": told_apart}


def judged(model: nn.ModuleDict, images: Tensor, truth: float) -> Tensor:
    logits = model["discriminator"](images)
    return nn.functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, truth))


def show(images: Tensor) -> None:
    """Images side by side. Shapes: (N, 1, 8, 8) from -1 to 1."""
    levels = ((images.squeeze(1) + 1) / 2 * (len(SHADES) - 1)).round().int().tolist()
    for row in range(8):
        print("  ".join("".join(SHADES[level] * 2 for level in image[row]) for image in levels))


def main() -> None:
    torch.manual_seed(0)
    run = tk.fit(
        nn.ModuleDict({"generator": make_generator(), "discriminator": make_discriminator()}),
        tk.ImageTable(DIGITS / "train.parquet", channels=1),
        step=step,
        optimizer=make_optimizers,
        epochs=30,
        batch_size=64,
        last="drop",
        settings={"train": {"threads": 1}},  # steps this small are faster on one thread
        run_dir="runs/gan",
        resume="auto",
    )

    print("\ndrawn by the generator:\n")
    with torch.no_grad():
        show(run.model("last")["generator"](torch.randn(6, NOISE, generator=torch.Generator().manual_seed(1))))


if __name__ == "__main__":
    main()
