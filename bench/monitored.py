"""The works of bench/monitor.py, each in a process of its own: ``python bench/monitored.py WORK …``."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from step import BATCH, digits, make_model

HERE = Path(__file__).resolve().parent
NUM_SCALARS = 20
WARM_STEPS = 300


class Clock:
    """µs a step between the first steps and the last."""

    def __init__(self) -> None:
        self.steps = 0
        self.begun = 0.0

    def tick(self) -> None:
        self.steps += 1
        if self.steps == WARM_STEPS:
            self.begun = time.perf_counter()

    def said(self) -> dict[str, float]:
        steps = self.steps - WARM_STEPS
        return {"us_per_step": (time.perf_counter() - self.begun) / steps * 1e6, "steps": self.steps}


def epochs_for(seconds: float, num_samples: int, us: float) -> int:
    return max(2, round(seconds / (us * 1e-6) / -(-num_samples // BATCH)))


def torchkeep(seconds: float, is_on: bool) -> dict[str, float]:
    import torch
    from torch.nn import functional

    import torchkeep as tk

    x, y = digits()
    clock, scales = Clock(), torch.linspace(0.1, 2, NUM_SCALARS)
    names = [f"value_{number}" for number in range(NUM_SCALARS)]

    def step(model: Any, batch: Any, context: Any) -> dict[str, Any]:
        loss = functional.cross_entropy(model(batch["input"]), batch["label"])
        values = (loss.detach() * scales).unbind()
        if context.training:
            clock.tick()
        return {"loss": loss, **dict(zip(names, values, strict=True))} if is_on else {"loss": loss}

    off = {"views": [], "log_every": 1 << 20, "graph": False, "histograms": "off", "system_every_s": 0}
    with tempfile.TemporaryDirectory() as place:
        tk.fit(
            make_model(), tk.Arrays(input=x, label=y), step=step, epochs=epochs_for(seconds, len(x), 500),
            batch_size=BATCH, learning_rate=1e-3, run_dir=f"{place}/run", quiet=True,
            monitor={"views": ["tensorboard"], "log_every": 1} if is_on else off,
        )  # fmt: skip
        return clock.said()


def lightning(seconds: float) -> dict[str, float]:
    import logging

    import lightning as pl
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.nn import functional
    from torch.utils.data import DataLoader, TensorDataset

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y = digits()
    clock, scales = Clock(), torch.linspace(0.1, 2, NUM_SCALARS)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def training_step(self, batch: Any, number: int) -> Any:
            loss = functional.cross_entropy(self.model(batch[0]), batch[1])
            values = (loss.detach() * scales).unbind()
            self.log_dict({f"value_{place}": value for place, value in enumerate(values)})
            clock.tick()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)

    with tempfile.TemporaryDirectory() as place:
        trainer = pl.Trainer(
            max_epochs=epochs_for(seconds, len(x), 2500), accelerator="cpu", devices=1, log_every_n_steps=1,
            logger=TensorBoardLogger(place), enable_progress_bar=False, enable_checkpointing=False,
            enable_model_summary=False, default_root_dir=place,
        )  # fmt: skip
        trainer.fit(Module(), DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True))
        return clock.said()


def hf_trainer(seconds: float) -> dict[str, float]:
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != HERE]  # whose datasets.py is not the package

    import torch
    from torch import nn
    from torch.nn import functional
    from transformers import Trainer, TrainingArguments

    x, y = digits()
    clock, scales = Clock(), torch.linspace(0.1, 2, NUM_SCALARS)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def forward(self, input: Any, labels: Any) -> Any:
            return {"loss": functional.cross_entropy(self.model(input), labels)}

    class Logging(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            loss = model(**inputs)["loss"]
            values = (loss.detach() * scales).tolist()
            self.log({f"value_{place}": value for place, value in enumerate(values)})
            clock.tick()
            return loss

    data = [{"input": x[place], "labels": y[place]} for place in range(len(x))]
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            output_dir=place, num_train_epochs=epochs_for(seconds, len(x), 2500), per_device_train_batch_size=BATCH,
            learning_rate=1e-3, report_to=["tensorboard"], logging_strategy="no", save_strategy="no",
            disable_tqdm=True, use_cpu=True, optim="adamw_torch_fused",
        )  # fmt: skip
        trainer = Logging(Model(), arguments, train_dataset=data)
        trainer.remove_callback(_printer())
        trainer.train()
        return clock.said()


def _printer() -> Any:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def expert_with_writer(seconds: float) -> dict[str, float]:
    """A loop by hand that indexes tensors, with TensorBoard's own writer."""
    import torch
    from torch.nn import functional
    from torch.utils.tensorboard import SummaryWriter

    x, y = digits()
    model, clock, scales = make_model(), Clock(), torch.linspace(0.1, 2, NUM_SCALARS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    with tempfile.TemporaryDirectory() as place, SummaryWriter(place) as writer:
        for _ in range(epochs_for(seconds, len(x), 2500)):
            order = torch.randperm(len(x))
            for begin in range(0, len(x), BATCH):
                rows = order[begin : begin + BATCH]
                loss = functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                for number, value in enumerate((loss.detach() * scales).tolist()):
                    writer.add_scalar(f"value_{number}", value, clock.steps)
                clock.tick()
        return clock.said()


WORKS: dict[str, Any] = {
    "torchkeep off": lambda seconds: torchkeep(seconds, is_on=False),
    "torchkeep off again (A/A)": lambda seconds: torchkeep(seconds, is_on=False),
    "torchkeep on": lambda seconds: torchkeep(seconds, is_on=True),
    "by hand, SummaryWriter": expert_with_writer,
    "Lightning": lightning,
    "HF Trainer": hf_trainer,
}


def logging(place: str) -> None:
    """Log for ever; each durable flush prints the step that it acknowledges."""
    import torchkeep as tk

    monitor = tk.Monitor(Path(place) / "run")
    print("ready", flush=True)
    step = 0
    while True:
        step += 1
        monitor.log(step, loss=1 / step)
        if step % 500 == 0:
            monitor.flush()
            print(step, flush=True)
        time.sleep(0.0005)


def reading(place: str) -> None:
    from torchkeep.watch.reading import RunRecord

    begun = time.perf_counter()
    table = RunRecord(Path(place) / "records.jsonl").scalars()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "table_bytes": table.nbytes, "peak_bytes": peak, "rows": table.num_rows}))


def runs(place: str, times: int) -> None:
    """Make 10,000 small runs, and ask for them."""
    from torchkeep import history
    from torchkeep.watch.records import dump_record

    for number in range(10_000):
        folder = Path(place) / f"run-{number:05d}"
        folder.mkdir()
        accuracy = 0.5 + (number * 7919 % 5000) / 10_000
        recipe = {
            "model": {"name": "convnet" if number % 3 else "mlp"},
            "optimizer": {"learning_rate": 1e-3},
            "seed": 0,
        }
        facts = {"format": 1, "id": folder.name, "created": 1.7e9 + number, "decisions": [], "data": {},
                 "environment": {"packages": {}}, "recipe": recipe, "code": {"commit": f"{number:040x}"}}  # fmt: skip
        (folder / "run.json").write_text(json.dumps(facts))
        at = {"attempt": 0, "rank": 0, "samples": 32, "epoch": 1, "time": 1.7e9 + number}
        rows = [
            {"kind": "scalars", **at, "seq": 0, "step": 9, "values": {"valid/accuracy": accuracy, "train/loss": 0.1}},
            {"kind": "run_end", **at, "seq": 1, "step": 9, "status": "finished", "reason": "finished",
             "metrics": {"valid/accuracy": accuracy}, "artifacts": []},
        ]  # fmt: skip
        (folder / "records.jsonl").write_bytes(b"".join(map(dump_record, rows)))
    begun = time.perf_counter()
    assert len(history.runs(place)) == 10_000
    first_s = time.perf_counter() - begun
    query_s = []
    for _ in range(times):
        begun = time.perf_counter()
        found = history.runs(place, where="valid/accuracy > .9 and model.name = convnet", most=50)
        query_s.append(time.perf_counter() - begun)
    assert len(found) == 50, len(found)
    print(json.dumps({"first_s": first_s, "query_s": query_s}))


if __name__ == "__main__":
    if sys.argv[1] in WORKS:
        print(json.dumps(WORKS[sys.argv[1]](float(sys.argv[2]))))
    else:
        {"logging": logging, "reading": reading, "runs": lambda place, times: runs(place, int(times))}[sys.argv[1]](
            *sys.argv[2:]
        )
