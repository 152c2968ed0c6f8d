"""From a file to the first prediction, and the rate of prediction: packages beside what is used without them.

Two models of about a hundred million parameters: BERT-base with four classes (transformers) and a ViT-B/16. Ours is a
package with all its checksums compared and its self-test run: BERT by its name and configuration, and as a graph that
needs no transformers; the ViT by name. Beside them: the model's own code with ``torch.load(weights_only=True)`` and
``load_state_dict``, and ``from_pretrained`` of transformers. Each load is a process of its own that has imported its
libraries and lies in a warm file cache; seconds are from the call to the first prediction of one sample, memory is the
peak of the process beyond what it held before, over the bytes of the parameters. One thread.

The rate: ``tk.Predictor`` on batches in memory, beside the bare loop over the same uint8 images: normalise, model,
softmax, the best class.

    python bench/package.py [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from measure import ROOT, between, interleave, pairs, print_bars, summary, write_result

os.environ.setdefault("OMP_NUM_THREADS", "1")
TOKENS, CLASSES, SIDE = 64, 4, 224
VIT = {"patch": 16, "width": 768, "depth": 12, "heads": 12}
BATCHES = {"convnet 28": (28, 1, 256, 40), "resnet18 224": (224, 3, 16, 3)}


# --- what a process measures of itself


def memory_bytes(kind: str) -> int:
    """VmRSS: now; VmHWM: the peak. (getrusage would give the peak of the process that started this one.)"""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(kind):
            return int(line.split()[1]) * 1024
    return 0


def timed(call: Callable[[], Any]) -> None:
    """Print seconds and memory of a load with its first prediction, and what it predicts."""
    before, began = memory_bytes("VmRSS"), time.perf_counter()
    output = call()
    seconds = time.perf_counter() - began
    print(json.dumps({"s": seconds, "bytes": memory_bytes("VmHWM") - before, "output": output.flatten().tolist()[:4]}))


def sample_of(work: str) -> dict[str, Any]:
    import torch

    numbers = torch.Generator().manual_seed(1)
    if work == "bert":
        ids = torch.randint(5, 1000, (1, TOKENS), generator=numbers)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {"image": torch.randint(0, 256, (1, 3, SIDE, SIDE), generator=numbers, dtype=torch.uint8)}


def child(work: str, how: str, folder: Path) -> None:
    import torch

    torch.set_grad_enabled(False)
    sample = sample_of(work)
    if how.startswith("package"):
        from torchkeep.share.package import load_package

        if how == "package by name" and work == "bert":
            import transformers.models.bert.modeling_bert  # noqa: F401  what from_pretrained has imported too
        path = folder / f"{work}-{how.rpartition(' ')[2]}.tkp"
        timed(lambda: load_package(path).asked(sample))
    elif how == "from_pretrained":
        from transformers import BertForSequenceClassification

        timed(lambda: BertForSequenceClassification.from_pretrained(folder / "bert").eval()(**sample).logits)
    else:
        timed(partial(own_code, work, folder, sample))


def own_code(work: str, folder: Path, sample: dict[str, Any]) -> Any:
    """What a careful person writes by hand."""
    import torch

    model = made(work, folder)
    model.load_state_dict(torch.load(folder / f"{work}.pt", weights_only=True))
    model.eval()
    return model(**sample).logits if work == "bert" else model(sample["image"].float().div(255).sub(0.5).div(0.5))


def made(work: str, folder: Path) -> Any:
    if work == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(BertConfig.from_pretrained(folder / "bert"))
    from torchkeep.model.images import VisionTransformer

    return VisionTransformer(num_classes=CLASSES, in_channels=3, image_size=SIDE, **VIT)


# --- what is made before


def make_all(folder: Path) -> dict[str, int]:
    """The files of each work; gives the bytes of the parameters."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    bert = BertForSequenceClassification(BertConfig(num_labels=CLASSES)).eval()
    bert.save_pretrained(folder / "bert")
    vit = made("vit", folder).eval()
    sizes = {}
    for work, model in (("bert", bert), ("vit", vit)):
        torch.save(model.state_dict(), folder / f"{work}.pt")
        sizes[work] = sum(p.nbytes for p in model.parameters())
    pack(folder, "bert", f"hf:{folder / 'bert'}", {}, bert)
    pack(folder, "vit", "vit", VIT, vit)
    import torchkeep as tk

    tk.save_package(bert, folder / "bert-graph.tkp", sample_of("bert"), classes=list("abcd"))
    return sizes


def pack(folder: Path, work: str, name: str, args: dict[str, Any], trained: Any) -> None:
    """A package by name, as ``torchkeep package`` writes it of a run."""
    import numpy as np
    import torch

    import torchkeep as tk
    from torchkeep.data.readers import Reader
    from torchkeep.data.sources import DataSettings
    from torchkeep.model.build import ModelSettings, build_model
    from torchkeep.share.architecture import registered
    from torchkeep.share.contract import Contract
    from torchkeep.share.package import Contents, write_package

    if work == "bert":
        path = folder / "texts.csv"
        rows = [f"{' '.join(f'w{j}' for j in range(i, i + 40))},{'abcd'[i % 4]}" for i in range(900)]
        path.write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
        data: Any = tk.TextTable(path, text="text", target="label")
    else:
        data = image_data(folder, SIDE, 3)
    settings = ModelSettings(name=name, args=args, weights="none")
    model = build_model(settings, data.schema, (), lambda _: np.nan, Path("/"), loads=False).model
    model.load_state_dict(trained.state_dict())
    contract = Contract(Reader(data, DataSettings(train="")), "cross_entropy")
    example = sample_of(work) | {"label": torch.zeros(1, dtype=torch.int64)}
    write_package(
        Contents(work, model, contract, example, registered(settings, (), model)), folder / f"{work}-name.tkp"
    )


def image_data(folder: Path, side: int, channels: int) -> Any:
    import numpy as np
    from PIL import Image

    import torchkeep as tk

    root = folder / f"images-{side}"
    draws = np.random.default_rng(0)
    for name in "abcd"[:CLASSES]:
        (root / name).mkdir(parents=True, exist_ok=True)
        shape = (side, side) if channels == 1 else (side, side, channels)
        Image.fromarray(draws.integers(0, 256, shape, dtype=np.uint8)).save(root / name / "0.png")
    return tk.ImageFolder(root, image_size=side, channels=channels)


# --- the rates


def rates(folder: Path, rounds: int) -> dict[str, Any]:
    import torch

    import torchkeep as tk
    from torchkeep.model.images import ConvNet, ResNet18

    torch.set_num_threads(1)
    found = {}
    for name, (side, channels, size, count) in BATCHES.items():
        torch.manual_seed(0)
        kind = ConvNet if name.startswith("convnet") else ResNet18
        model = kind(num_classes=CLASSES, in_channels=channels).eval()
        path = tk.save_package(model, folder / f"{kind.__name__}.tkp", dataset=image_data(folder, side, channels))
        images = torch.randint(0, 256, (size * count, channels, side, side), dtype=torch.uint8)
        predictor = tk.Predictor(path, batch_size=size)
        works = {"predictor": partial(ours_s, predictor, images), "bare": partial(bare_s, model, images, size),
                 "bare again": partial(bare_s, model, images, size)}  # fmt: skip
        interleave(works, 1)
        times = interleave(works, rounds)
        found[name] = {
            "images_per_s": {work: summary([len(images) / s for s in values]) for work, values in times.items()},
            "rate_of_bare": pairs(times["bare"], times)["predictor"],
            "bare_of_bare": pairs(times["bare"], times)["bare again"],
        }
    return found


def ours_s(predictor: Any, images: Any) -> float:
    began = time.perf_counter()
    assert sum(1 for _ in predictor.stream(images)) == len(images)
    return time.perf_counter() - began


def bare_s(model: Any, images: Any, size: int) -> float:
    import torch

    began = time.perf_counter()
    said = []
    with torch.inference_mode():
        for batch in images.split(size):
            best = model(batch.float().mul_(2 / 255).sub_(1)).softmax(1).max(1)
            said += zip(best.values.tolist(), best.indices.tolist(), strict=True)
    assert len(said) == len(images)
    return time.perf_counter() - began


# --- all of it


WORKS = {
    "bert": ("package by name", "package graph", "own code and torch.load", "from_pretrained"),
    "vit": ("package by name", "own code and torch.load"),
}


def loads(folder: Path, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for work, ways in WORKS.items():
        memory: dict[str, list[float]] = {way: [] for way in ways}
        outputs: dict[str, list[float]] = {}

        def once(way: str, work: str = work, memory: Any = memory, outputs: Any = outputs) -> float:
            command = [sys.executable, __file__, "--child", work, way, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{work}, {way}: {done.stderr[-2000:]}")
            row = json.loads(done.stdout.splitlines()[-1])
            memory[way].append(row["bytes"] / sizes[work])
            outputs[way] = row["output"]
            return float(row["s"])

        works = {way: partial(once, way) for way in ways}
        interleave(works, 1)
        times = interleave(works, rounds)
        expected = outputs[ways[0]]
        assert all(max(abs(a - b) for a, b in zip(o, expected, strict=True)) < 1e-3 for o in outputs.values()), outputs
        found[work] = {
            "parameter_bytes": sizes[work],
            "seconds": {way: summary(values) for way, values in times.items()},
            "memory_of_parameters": {way: summary(values) for way, values in memory.items()},
            "time_of": {f"{ours} / {peer}": summary([a / b for a, b in zip(times[ours], times[peer], strict=True)])
                        for ours, peer in product(ways, ways) if ours[:4] == "pack" != peer[:4]},
        }  # fmt: skip
    return found


def print_all(loaded: dict[str, Any], rated: dict[str, Any]) -> None:
    for work, row in loaded.items():
        print(f"\n{work}, {row['parameter_bytes'] / 1e6:,.0f} MB of parameters")
        for way, values in row["seconds"].items():
            memory = row["memory_of_parameters"][way]["median"]
            print(f"  {way:<28} {values['median']:>7.3f} s to the first prediction   {memory:>5.2f} x the parameters")
        for way, values in row["time_of"].items():
            print(f"  {way:<52} {between(values)}")
    for name, row in rated.items():
        print(f"\n{name}: predictor at {between(row['rate_of_bare'])} of the bare rate, "
              f"bare at {between(row['bare_of_bare'])}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", nargs=3)
    given = parser.parse_args()
    if given.child:
        child(given.child[0], given.child[1], Path(given.child[2]))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        loaded = loads(folder, make_all(folder), given.rounds)
        rated = rates(folder, given.rounds)
    print_all(loaded, rated)
    bars = {f"{work}: {way}": row["median"] for work, rows in loaded.items() for way, row in rows["time_of"].items()}
    memory = {f"{work}: memory, {way}": row["median"] for work, rows in loaded.items()
              for way, row in rows["memory_of_parameters"].items() if way.startswith("package")}  # fmt: skip
    rate = {f"{name}: predictor / bare": row["rate_of_bare"]["median"] for name, row in rated.items()}
    print_bars({**bars, **memory, **rate}, {**dict.fromkeys(bars, (1.2, False)),
               **dict.fromkeys(memory, (1.1, False)), **dict.fromkeys(rate, (0.95, True))})  # fmt: skip
    path = write_result("package", {"loads": loaded, "rates": rated})
    print(f"\nwritten to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
