"""What bench/transfer.py measures: one pretrained model on new data, by hand, by Lightning and by torchkeep.

Every function is a process of its own. Seconds begin when imports are done and the model is built, and end when the
last epoch is validated: reading, computing, training, recording and saving are in them.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from feeding import AUGMENT, DATA, IMAGES_A_BATCH, SIZE, Pictures
from measure import ROOT, interleave
from works import folder_samples

PHOTOS = DATA / "hymenoptera"
WEIGHTS = DATA / "weights" / "mobilenet_v2.pth"
MODEL = ROOT.parent / "shared" / "models" / "mobilenet_v2.py"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
RATE, NUM_FEATURES = 1e-3, 1280
RESIZED = 256  # the short side, of which the middle is cut out
CHOICE = "frozen part"

# what a run imports on its way; the same is done for Lightning, whose package imports all of it, and for the optimiser
ON_THE_WAY = ("torchkeep.api", "torchkeep.training.loop", "torchkeep.training.prepare", "torchkeep.data.images",
              "torchkeep.watch.tensorboard", "tensorboard.compat.proto.event_pb2", "rich.console", "psutil", "numpy.ma",
              "cv2", "simplejpeg")  # fmt: skip


def built(seed: int, names: tuple[str, ...] = ()) -> Any:
    """The pretrained model with a new head of two classes, all that has to be imported with it, and the seed set."""
    for name in (*names, "torch._dynamo"):
        importlib.import_module(name)
    sys.path.insert(0, str(MODEL.parent))
    model = importlib.import_module(MODEL.stem).build()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    random.seed(seed)
    torch.manual_seed(seed)
    model.classifier[1] = nn.Linear(NUM_FEATURES, 2)
    return model


def answer(begun: float, accuracies: list[float], **facts: Any) -> dict[str, Any]:
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "best": max(accuracies), "accuracies": accuracies, **facts}


# Peers


class Transformed(Pictures):
    """The tutorial's transforms by Pillow: a random crop and flip, or resize to 256 and the middle; normalised."""

    def __init__(self, split: str, is_random: bool):
        super().__init__(folder_samples(PHOTOS / split), SIZE)
        self.is_random = is_random
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index) if self.is_random else self.middle(index)
        return torch.from_numpy(image).permute(2, 0, 1).contiguous().float().div(255).sub(self.mean).div(
            self.std
        ), label

    def middle(self, index: int) -> tuple[Any, int]:
        import numpy as np
        from PIL import Image

        path, label = self.samples[index]
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        scale = RESIZED / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        return np.array(image.crop((left, top, left + self.size, top + self.size))), label


def batches(split: str, is_random: bool) -> DataLoader[Any]:
    return DataLoader(Transformed(split, is_random), IMAGES_A_BATCH, shuffle=split == "train", num_workers=2,
                      persistent_workers=True)  # fmt: skip


def accuracy(model: nn.Module, fed: Any) -> float:
    model.eval()
    with torch.inference_mode():
        hits = [(model(x).argmax(1) == y).float() for x, y in fed]
    return float(torch.cat(hits).mean())


def hand(view: str, seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """The loop of the tutorials, with what they forget: frozen features are in eval mode and without gradients."""
    model = built(seed)
    begun = time.perf_counter()
    model.features.requires_grad_(False)
    train, valid = batches("train", view == "random"), batches("val", False)
    optimizer, found = torch.optim.AdamW(model.classifier.parameters(), RATE), []
    for _ in range(epochs):
        model.train()
        model.features.eval()
        for x, y in train:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found.append(accuracy(model, valid))
    return answer(begun, found)


def lightning(seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """The same as a LightningModule, with the Trainer as it comes but for its bar and its table."""
    import lightning as L
    import lightning.pytorch.loggers

    class Net(L.LightningModule):  # type: ignore[misc]
        def __init__(self, net: Any):
            super().__init__()
            self.net, self.found = net, list[float]()

        def training_step(self, batch: Any, _: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            hits = (self.net(batch[0]).argmax(1) == batch[1]).float().mean()
            self.log("accuracy", hits, batch_size=len(batch[1]))

        def on_validation_epoch_end(self) -> None:
            if not self.trainer.sanity_checking:
                self.found.append(float(self.trainer.callback_metrics["accuracy"]))

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.net.classifier.parameters(), RATE)

    net = Net(built(seed))
    begun = time.perf_counter()
    net.net.features.requires_grad_(False).eval()
    trainer = L.Trainer(max_epochs=epochs, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
                        enable_model_summary=False)  # fmt: skip
    trainer.fit(net, batches("train", True), batches("val", False))
    assert not net.net.features.training
    return answer(begun, net.found)


def cached(seed: int, epochs: int, folder: Path) -> dict[str, Any]:
    """What an expert writes: features of the fixed view once, channels last, without autograd; then the head alone."""
    model = built(seed)
    begun = time.perf_counter()
    trunk = model.features.eval().to(memory_format=torch.channels_last)

    def rows(split: str) -> tuple[Tensor, Tensor]:
        fed = DataLoader(Transformed(split, False), IMAGES_A_BATCH, num_workers=2)
        with torch.inference_mode():
            made = [(trunk(x.contiguous(memory_format=torch.channels_last)).mean((2, 3)), y) for x, y in fed]
        return torch.cat([x for x, _ in made]).clone(), torch.cat([y for _, y in made])

    (x_train, y_train), (x_valid, y_valid) = rows("train"), rows("val")
    head, found = model.classifier, []
    optimizer = torch.optim.AdamW(head.parameters(), RATE)
    for _ in range(epochs):
        head.train()
        for places in torch.randperm(len(x_train)).split(IMAGES_A_BATCH):
            optimizer.zero_grad()
            F.cross_entropy(head(x_train.index_select(0, places)), y_train.index_select(0, places)).backward()
            optimizer.step()
        found.append(accuracy(head, [(x_valid, y_valid)]))
    return answer(begun, found)


# Torchkeep


def photos(split: str, **options: Any) -> Any:
    import torchkeep as tk

    return tk.ImageFolder(PHOTOS / split, mean=MEAN, std=STD, **options)


def fit(model: nn.Module, train: Any, valid: Any, place: Path, cache: str = "auto", **options: Any) -> Any:
    import torchkeep as tk

    options["settings"] = options.get("settings", {}) | {"features": {"cache": cache, **options.pop("features", {})}}
    return tk.fit(model, train, valid, batch_size=IMAGES_A_BATCH, run_dir=place, quiet=True, **options)


def choice(run_dir: Path) -> str:
    """What was decided of the frozen part, and why."""
    rows = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))["decisions"]
    return next((f"{row['value']}: {row['reason']}" for row in rows if row["name"] == CHOICE), "")


def valid_accuracies(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "records.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["values"]["valid/accuracy"] for row in rows if "valid/accuracy" in row.get("values", {})]


def ours(views: int, seed: int, epochs: int, rate: float, folder: Path) -> dict[str, Any]:
    """``tk.fit`` as it comes, with records, TensorBoard and checkpoints; what is random is shown in ``views`` draws."""
    model = built(seed, ON_THE_WAY)
    known = set(sys.modules)
    begun = time.perf_counter()
    view = {"image_size": SIZE, "crop_fraction": SIZE / RESIZED}
    train = photos("train", **view, augment=AUGMENT if views > 1 else [])
    run = fit(model, train, photos("val", **view), folder / f"run-{seed}-{rate}", epochs=epochs, seed=seed,
              learning_rate=rate, metrics="accuracy", freeze={"modules": ["features"]},
              features={"views": views})  # fmt: skip
    found = answer(begun, valid_accuracies(run.dir), choice=choice(run.dir))
    return found | {"best_kept": run.best.metrics["valid/accuracy"], "late_imports": len(set(sys.modules) - known)}


# A part of the features frozen


def partly(epochs: int, rounds: int, folder: Path) -> dict[str, Any]:
    """features[:14] frozen and the rest learning: seconds in full and with the cache, and what the formula is made of.

    Source:  cached speed-up = E (d + p + 3 s) / (K (d + p + w) + E (r + 3 s)), seconds a sample
    """
    frozen = 14
    train = photos("train", image_size=SIZE)
    numbers = iter(range(99))

    def fit_s(cache: str, seen: list[str]) -> float:
        model, place = built(0, ON_THE_WAY), folder / f"run-{next(numbers)}"
        begun = time.perf_counter()
        run = fit(model, train, None, place, cache, epochs=epochs, freeze={"modules": [f"features[:{frozen}]"]})
        seconds = time.perf_counter() - begun
        seen.append(choice(run.dir))
        forget(folder, place)
        return seconds

    choices: dict[str, list[str]] = {"off": [], "on": []}
    found = interleave({name: partial(fit_s, name, seen) for name, seen in choices.items()}, rounds)
    return {"samples": len(train), "epochs": epochs, "seconds": found, "choices": choices,
            "per_sample_s": pieces(train, frozen, folder)}  # fmt: skip


def pieces(train: Any, frozen: int, folder: Path) -> dict[str, float]:
    """Seconds a sample: d decoded, p before the frontier, s after it (forward), t after it (trained), w kept, r read;
    k is t on rows in the layout that they are kept in. Images are channels last, as a loader feeds them.
    """
    import torchkeep as tk

    model = built(0)
    before, after = model.features[:frozen].eval(), model.features[frozen:]

    def rest(x: Tensor) -> Tensor:
        logits: Tensor = model.classifier(after(x).mean((2, 3)))
        return logits

    def forward(work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.no_grad():
            return work(x)

    def trained(x: Tensor) -> None:
        F.cross_entropy(rest(x), labels).backward()

    images, labels = torch.randn(IMAGES_A_BATCH, 3, SIZE, SIZE), torch.randint(2, (IMAGES_A_BATCH,))
    images = images.contiguous(memory_format=torch.channels_last)
    crossing = forward(before, images)
    kept = crossing.contiguous()
    many, places = kept.repeat(8, 1, 1, 1), torch.randperm(8 * IMAGES_A_BATCH)[:IMAGES_A_BATCH]
    loader = tk.Loader(train, IMAGES_A_BATCH, shuffle=True)
    found = {
        "d": median_s(lambda: sum(len(batch["label"]) for batch in loader)) / len(train),
        "p": median_s(lambda: forward(before, images)) / IMAGES_A_BATCH,
        "s": median_s(lambda: forward(rest, crossing)) / IMAGES_A_BATCH,
        "t": median_s(lambda: trained(crossing)) / IMAGES_A_BATCH,
        "k": median_s(lambda: trained(kept)) / IMAGES_A_BATCH,
        "w": median_s(lambda: (folder / "rows").write_bytes(kept.numpy().tobytes())) / IMAGES_A_BATCH,
        "r": median_s(lambda: many.index_select(0, places)) / IMAGES_A_BATCH,
        "bytes": kept[0].nbytes,
    }
    loader.close()
    return found


def median_s(work: Callable[[], Any], times: int = 5) -> float:
    def once() -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    once()
    return statistics.median(once() for _ in range(times))


def forget(folder: Path, *more: Path) -> None:
    """Remove runs and what was kept for them: the next one finds an empty cache."""
    for path in (folder / "cache", *more):
        shutil.rmtree(path, ignore_errors=True)


# Nothing frozen


def nothing(epochs: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Everything learns: whole runs of small models with and without the search for a frozen part."""
    import torchkeep as tk

    mlp, convnet = (
        tk.Arrays(input=torch.randn(2048, 64), label=torch.arange(2048) % 10),
        tk.Arrays(input=torch.randn(512, 3, 16, 16), label=torch.arange(512) % 10),
    )
    kinds: dict[str, tuple[Any, Callable[[], nn.Module], int]] = {
        "MLP 64-128-10": (mlp, lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)), epochs),
        "convnet 3-16-32": (convnet, small_convnet, epochs),
    }
    numbers = iter(range(999))

    def fit_s(kind: str, cache: str) -> float:
        data, make, count = kinds[kind]
        torch.manual_seed(0)
        model, place = make(), folder / f"run-{next(numbers)}"
        begun = time.perf_counter()
        fit(model, data, None, place, cache, epochs=count)
        seconds = time.perf_counter() - begun
        forget(folder, place)
        return seconds

    def turns(kind: str, count: int) -> dict[str, list[float]]:
        works = {name: partial(fit_s, kind, name.partition(" ")[0]) for name in ("auto", "off", "off again")}
        return interleave(works, count)

    for kind in kinds:
        turns(kind, 1)
    return {kind: turns(kind, rounds) for kind in kinds}


def small_convnet() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 10))


# Where it pays


def break_even(sizes: list[int], lengths: list[int], size: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Runs of N samples, E epochs and K views, nothing validated: seconds without the cache, with it, and by itself."""
    import numpy as np

    from torchkeep.data.dataset import Part

    numbers = iter(range(9999))

    def fit_s(cache: str, data: Any, epochs: int, views: int, seen: dict[str, Any]) -> float:
        model, place = built(0, ON_THE_WAY), folder / f"run-{next(numbers)}"
        begun = time.perf_counter()
        run = fit(model, data, None, place, cache, epochs=epochs, freeze={"modules": ["features"]},
                  features={"views": views})  # fmt: skip
        seconds = time.perf_counter() - begun
        kept = [path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file()]
        said = [*seen.get(cache, {}).get("choices", []), choice(run.dir)]
        seen[cache] = {"choices": said, "choice": said[-1], "cache_bytes": sum(kept)}
        forget(folder, place)
        return seconds

    def cell(number: int, epochs: int, views: int) -> dict[str, Any]:
        whole = photos("train", image_size=size, augment=AUGMENT if views > 1 else [])
        data, seen = Part(whole, np.linspace(0, len(whole) - 1, number).astype(np.int64)), dict[str, Any]()
        works = {cache: partial(fit_s, cache, data, epochs, views, seen) for cache in ("off", "on", "auto")}
        seconds = interleave(works, rounds if epochs < max(lengths) else 1)
        return {"samples": number, "epochs": epochs, "views": views, "seconds": seconds, "seen": seen}

    cell(sizes[0], 1, 1)  # what is made at first use is not the first cell's
    return [cell(*numbers_of) for numbers_of in product(sizes, lengths, (1, 4))]


# Texts


def make_texts(few: int, folder: Path) -> dict[str, int]:
    """One tokenizer for both sets, byte-level so that no word is unknown; and ``few`` questions of each intent."""
    import csv

    from datasets import BANKING, make_tokenizer  # the benchmark beside this file

    make_tokenizer(folder)
    found: dict[str, list[str]] = {}
    with BANKING.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["category"], []).append(row["text"])
    rows = [(text, name) for name, texts in found.items() for text in texts[:few]]
    with (folder / "questions.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *rows])
    return {"questions": len(rows), "intents": len(found)}


def trained_text(name: str, epochs: int, folder: Path) -> dict[str, Any]:
    """A small transformer from nothing: a language model of "reviews", or a classifier of the few "questions"."""
    import torchkeep as tk

    reviews = {"train": str(DATA / "text/sst2-sentences/train.tsv"), "columns": ["text", "label"], "block_size": 64,
               "valid_fraction": 0.1}  # fmt: skip
    questions = {"train": "questions.csv", "valid": str(DATA / "text/banking77/test.csv"), "label": "category"}
    data = {"reviews": reviews, "questions": questions}[name]
    os.chdir(folder)
    recipe = {
        "name": name,
        "data": {"tokenizer": "tokenizer.json", "max_length": 64, **data},
        "model": {"name": "transformer", "args": {"width": 128, "depth": 2}},
        "optimizer": {"learning_rate": RATE, "schedule": "cosine", "warmup": 0.1},
        "train": {"epochs": epochs, "metrics": ["accuracy"]},
    }
    begun = time.perf_counter()
    return answer(begun, valid_accuracies(tk.train(recipe, run_dir=name, quiet=True).dir))


def main() -> None:
    _, _, part, *given, folder = sys.argv  # the word before the part says that this is a work
    print(json.dumps(globals()[part](*map(_read, given), Path(folder))))


def _read(word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word


if __name__ == "__main__":
    main()
