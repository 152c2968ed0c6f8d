"""What the quick preflight takes before a training, against the time there is for it.

For it are max(1 s, min(2 % of the estimated time, 10 s)). The works: two recipes of examples/, and three large models
of which a CPU takes seconds for a step, each in a short and in a long training: ResNet-18 (11 M parameters) and a
ViT-B/16 (86 M) on 224 × 224 pixels, BERT-base (110 M) on 64 tokens. Each is looked over several times; the longest
counts.

    python bench/preflight_time.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import os
import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn

import torchkeep as tk
from measure import ROOT, summary, write_result
from torchkeep.api import _work_of_objects
from torchkeep.model.build import ModelSettings, build_model
from torchkeep.running import work_of
from torchkeep.training.decisions import Decisions
from torchkeep.training.preflight import preflight
from torchkeep.training.prepare import Prepared
from torchkeep.training.recipe import read_recipe
from torchkeep.usercode import load_function

BATCH, CLASSES, TOKENS, SIDE = 8, 4, 64, 224


def of_recipe(name: str) -> Prepared:
    recipe, base = read_recipe(ROOT / "examples" / name / "recipe.toml", [])
    return Prepared(work_of(recipe, base, load_function)[0], Decisions())


def of_objects(model: nn.Module, data: Any, epochs: int) -> Prepared:
    bound = signature(tk.fit).bind(model, data, batch_size=BATCH, epochs=epochs)
    bound.apply_defaults()
    return Prepared(_work_of_objects(dict(bound.arguments)), Decisions())


def photographs() -> tk.Arrays:
    drawn = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=drawn)
    return tk.Arrays(image=images, label=torch.arange(2 * BATCH) % CLASSES)


def resnet(epochs: int) -> Prepared:
    data = photographs()
    settings = ModelSettings(name="resnet18")
    return of_objects(build_model(settings, data.schema, (), lambda name: None, ROOT, loads=False).model, data, epochs)


def hugging(name: str, data: tk.Arrays, epochs: int, **options: Any) -> Prepared:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **options)
    kind = "ForImageClassification" if name == "ViT" else "ForSequenceClassification"
    model = getattr(transformers, name + kind)(config)
    return of_objects(model, data, epochs)


def vit(epochs: int) -> Prepared:
    pixels = torch.randn(2 * BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return hugging("ViT", tk.Arrays(pixel_values=pixels, label=torch.arange(2 * BATCH) % CLASSES), epochs)


def bert(epochs: int) -> Prepared:
    ids = torch.randint(5, 1000, (2 * BATCH, TOKENS), generator=torch.Generator().manual_seed(0))
    return hugging("Bert", tk.Arrays(input_ids=ids, label=torch.arange(2 * BATCH) % CLASSES), epochs)


WORKS: dict[str, Callable[[], Prepared]] = {
    "digits": partial(of_recipe, "digits"), "table": partial(of_recipe, "table"),
    **{f"{make.__name__}, {2 * epochs} steps": partial(make, epochs) for make in (resnet, vit, bert)
       for epochs in (1, 500)},
}  # fmt: skip


def measure(make: Callable[[], Prepared], rounds: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = make()
    with contextlib.closing(prepared):
        reports = [preflight(prepared, "quick") for _ in range(rounds)]
    left = sorted({f.check for report in reports for f in report.findings if f.found == "no time"})
    budget_s = reports[0].budget_s or 0.0
    return {
        "budget_s": budget_s, "s": summary([report.seconds for report in reports]),
        "longest_share": max(report.seconds for report in reports) / budget_s, "left_out": left,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds, rows = parser.parse_args().rounds, {}
    for name, make in WORKS.items():
        row = rows[name] = measure(make, rounds)
        print(f"{name:<20} {row['s']['median']:.3f} s of {row['budget_s']:.2f} s; the longest took "
              f"{row['longest_share']:.0%}; left out: {', '.join(row['left_out']) or 'nothing'}")  # fmt: skip
    print(f"written to {write_result('preflight_time', {'works': rows}).relative_to(ROOT)}")


if __name__ == "__main__":
    main()
