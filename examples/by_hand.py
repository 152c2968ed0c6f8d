"""The pieces alone, in a loop that you write: tk.Loader, tk.Checkpoints, tk.EarlyStopping, tk.Monitor.

    python examples/by_hand.py

Kill it at any moment, with kill -9 too, and call it again: it goes on from its last checkpoint, in the middle of an
epoch, and ends with the same parameters as one that was never stopped. It prints their sum, so that you can compare.
What it shows: tensorboard --logdir runs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchkeep as tk

DIGITS = Path(__file__).resolve().parent / "digits"
EPOCHS = 30
SAVE_EVERY = 20  # steps


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))


def pixels(batch: dict[str, Any]) -> torch.Tensor:
    """The images of a batch come as uint8; here they become numbers from -1 to 1."""
    return batch["image"].float() / 127.5 - 1


@torch.no_grad()
def evaluate(model: nn.Module, loader: tk.Loader) -> dict[str, float]:
    model.eval()
    loss = right = count = 0.0
    for batch in loader:
        output = model(pixels(batch))
        loss += float(nn.functional.cross_entropy(output, batch["label"], reduction="sum"))
        right += int((output.argmax(1) == batch["label"]).sum())
        count += len(output)
    model.train()
    return {"valid/loss": loss / count, "valid/accuracy": right / count}


def main() -> None:
    torch.set_num_threads(1)  # steps this small are faster on one thread; another number gives other last bits
    train_data = tk.ImageTable(DIGITS / "train.parquet", channels=1, augment=["random_shift"])
    valid_data = tk.ImageTable(DIGITS / "valid.parquet", like=train_data)
    loader = tk.Loader(train_data, batch_size=64, shuffle=True, seed=0)
    valid = tk.Loader(valid_data, batch_size=64)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    stopper = tk.EarlyStopping(metric="valid/loss", patience=4)
    checkpoints = tk.Checkpoints("runs/by-hand", keep_last=2, keep_best=1, metric="valid/accuracy", mode="max")
    step = 0

    def state() -> dict[str, Any]:
        """All that the rest of the training depends on; dropout draws from torch's generator."""
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "rng": tk.generator_states(),
            "loader": loader.state_dict(),
            "stopper": stopper.state_dict(),
        }

    saved = checkpoints.latest()
    if saved is not None:
        found = checkpoints.load(saved)
        model.load_state_dict(found["model"])
        optimizer.load_state_dict(found["optimizer"])
        loader.load_state_dict(found["loader"])
        stopper.load_state_dict(found["stopper"])
        tk.set_generator_states(found["rng"])
        step = saved.step
        print(f"going on from step {step}, epoch {loader.epoch}")

    monitor = tk.Monitor("runs/by-hand/monitor", from_step=step)
    monitor.watch(model, every=200)
    while loader.epoch < EPOCHS and not stopper.should_stop:
        for batch in loader:
            loss = nn.functional.cross_entropy(model(pixels(batch)), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if step % 10 == 0:
                monitor.log(step, epoch=loader.epoch, **{"train/loss": loss})
            if step % SAVE_EVERY == 0 and step % len(loader):
                monitor.flush()  # what a checkpoint acknowledges is recorded before it
                checkpoints.save(step, state())
        metrics = evaluate(model, valid)
        stopper.update(metrics)
        monitor.log(step, epoch=loader.epoch, **metrics)
        monitor.flush()
        checkpoints.save(step, state(), metrics)  # after the stopper: one state, of one moment
        print(f"epoch {loader.epoch:>2}  " + "  ".join(f"{name} {value:.4f}" for name, value in metrics.items()))

    monitor.close(metrics=metrics)
    best = checkpoints.best()
    print(f"ended after epoch {loader.epoch}; best: {best.path} {best.metrics}")
    print(f"sum of the parameters: {sum(p.double().sum() for p in model.parameters()).item():.12f}")


if __name__ == "__main__":
    main()
