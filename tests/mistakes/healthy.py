"""Trainings that are right, and look in some way as if they were not; in which way is the case's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from healthy_models import MODELS, net_from, pretrained
from material import (
    CLASSES,
    EXAMPLES,
    HIDDEN,
    WIDTH,
    WORDS,
    Case,
    Given,
    Own,
    body,
    convnet,
    counting,
    drawn,
    fit,
    images,
    large,
    net,
    numbers,
    points,
)
from torch import Tensor, nn

import torchkeep as tk

# --- losses and targets


def _alike(output: Tensor) -> Tensor:
    """Two views of each sample are to be alike, and unlike those of all others (van den Oord et al. 2018)."""
    one, other = F.normalize(output, dim=-1).unbind(1)
    return F.cross_entropy(one @ other.T / 0.2, torch.arange(len(one)))


def _ranked(output: Tensor, target: Tensor) -> Tensor:
    """Of each two the greater one is to come first (Burges et al. 2005)."""
    ahead = output[:, None] - output[None, :]
    return (F.softplus(-ahead) * (target[:, None] > target[None, :])).mean()


class _Physical(nn.Module):
    """A network that is to solve u' = u, which it tells by its own derivative (Raissi et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            x = x.clone().requires_grad_()
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return {"logits": u, "loss": (slope[:, :1] - u).square().mean() + (u.mean() - 1).square()}


class _Centres(nn.Module):
    """Each class has a centre, which learns too (Wen et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(CLASSES, HIDDEN))

    def forward(self, output: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(-torch.cdist(output, self.centres), label)


def _centred(_: Path) -> Given:
    model, loss = net(out=HIDDEN), _Centres()
    return fit(model, loss=loss, optimizer=torch.optim.Adam([*model.parameters(), *loss.parameters()]))


def _seldom(seed: int) -> tk.Arrays:
    x = drawn(seed, 400, WIDTH)
    return tk.Arrays(x=x, target=(x[:, :1] > x[:, 0].quantile(0.99)).float())


class _Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net(out=HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.net(x), self.net(x * 0.9)], 1)


class _Variational(nn.Module):
    """An autoencoder with noise while training only, which gives its own loss (Kingma & Welling 2013)."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2 * 4), net_from(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.down(x).chunk(2, 1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        made = self.up(mean + noise * (log_variance / 2).exp())
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return {"logits": made, "loss": (made - x).square().sum(1).mean() + 0.1 * divergence}


class _Tasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind, self.size = body(), nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"kind": self.kind(x), "size": self.size(x).squeeze(1)}


def _two_tasks(_: Path) -> Given:
    held = [part.columns for part in (points(), points(2))]
    splits = [tk.Arrays(x=part["x"], kind=part["label"], size=part["x"][:, 0]) for part in held]
    return fit(
        _Tasks(), train=splits[0], valid=splits[1], inputs="x", targets=["kind", "size"],
        loss=lambda o, t: F.cross_entropy(o["kind"], t["kind"]) + F.mse_loss(o["size"], t["size"]),
    )  # fmt: skip


def _several(_: Path) -> Given:
    splits = [tk.Arrays(x=p.columns["x"], target=(p.columns["x"][:, :4] > 0.5).float()) for p in (points(), points(2))]
    return fit(net(out=4), train=splits[0], valid=splits[1], loss="binary_cross_entropy")


def _segments(_: Path) -> Given:
    """The bright places of a picture, by the overlap of the areas (Milletari et al. 2016)."""
    splits = [tk.Arrays(x=p.columns["x"], target=(p.columns["x"] > 0.3).float()) for p in (images(), images(2, 48))]

    def dice(output: Tensor, truth: Tensor) -> Tensor:
        share = output.sigmoid()
        return 1 - (2 * (share * truth).sum((1, 2, 3)) + 1).div((share + truth).sum((1, 2, 3)) + 1).mean()

    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1))
    return fit(model, train=splits[0], valid=splits[1], loss=dice)


def _rare(_: Path) -> Given:
    """One sample in twenty is of the second class."""

    def made(seed: int, count: int) -> tk.Arrays:
        x = drawn(seed, count, WIDTH)
        return tk.Arrays(x=x, label=(x[:, 0] > x[:, 0].quantile(0.95)).long())

    return fit(net(out=2), train=made(1, 200), valid=made(2, 100))


def _drawn_and_judged(_: Path) -> Given:
    model = nn.ModuleDict({"generator": net_from(4), "judge": net(out=1)})
    two = {name: torch.optim.Adam(part.parameters()) for name, part in model.items()}

    def step(model: Any, batch: Any, context: Any) -> Any:
        drawn_ = model["generator"](torch.randn(len(batch["x"]), 4, generator=context.generator("noise")))
        judged = F.softplus(model["judge"](drawn_.detach())).mean() + F.softplus(-model["judge"](batch["x"])).mean()
        context.backward(judged, "judge")
        fooled = F.softplus(-model["judge"](drawn_)).mean()
        context.backward(fooled, "generator")
        return {"loss": fooled, "judged": judged}

    return fit(model, step=step, optimizer=two)


def _example_gan(_: Path) -> Given:
    import importlib.util

    spec = importlib.util.spec_from_file_location("example_gan", EXAMPLES / "gan.py")
    assert spec is not None
    assert spec.loader is not None
    gan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gan)
    data = tk.ImageTable(EXAMPLES / "digits/train.parquet", channels=1)
    model = nn.ModuleDict({"generator": gan.make_generator(), "discriminator": gan.make_discriminator()})
    return {"source": model, "train": data, "step": gan.step, "optimizer": gan.make_optimizers, "batch_size": 64,
            "last": "drop", "settings": {"train": {"threads": 1}}}  # fmt: skip


def _teacher(_: Path) -> Given:
    """A step of one's own: a student learns what a teacher says, who does not."""
    teacher = pretrained().requires_grad_(False).eval()

    def step(model: Any, batch: Any, context: Any) -> Any:
        output, wanted = model(batch["x"]), teacher(batch["x"]).softmax(1)
        taught = F.kl_div(output.log_softmax(1), wanted, reduction="batchmean")
        return {"loss": taught, "output": output, "target": batch["label"]}

    return fit(net(), step=step)


LOSSES = [
    Case("log_softmax and nll_loss", lambda _: fit(net(nn.LogSoftmax(1)), loss=nn.NLLLoss())),
    Case("log_softmax before cross_entropy, which changes nothing", lambda _: fit(net(nn.LogSoftmax(1)))),
    Case("softmax and its logarithm in the loss", lambda _: fit(
        net(nn.Softmax(1)), loss=lambda o, t: -(o + 1e-9).log().gather(1, t[:, None]).mean())),
    Case("sigmoid and binary_cross_entropy", lambda _: fit(
        net(nn.Sigmoid(), out=4), train=_fours(1), valid=_fours(2), loss=nn.BCELoss())),
    Case("several classes a sample", _several),
    Case("classes weighted", lambda _: fit(net(), sections={"train": {"class_weights": [1.0, 5.0, 0.2]}})),
    Case("labels smoothed", lambda _: fit(net(), loss=nn.CrossEntropyLoss(label_smoothing=0.2))),
    Case("probabilities as the truth", lambda _: fit(
        net(), train=_soft(1), valid=_soft(2), loss=nn.CrossEntropyLoss())),
    Case("numbers, standardised", lambda _: fit(
        Own(lambda m, x: m.net(x).squeeze(1), net=net(out=1)), numbers, loss=nn.MSELoss())),
    Case("numbers as (B, 1) on both sides", lambda _: fit(
        net(out=1), train=numbers(1, 96, 1.0, 1), valid=numbers(2, 48, 1.0, 1), loss=nn.HuberLoss())),
    Case("as many samples as outputs: (B, B) is right", lambda _: fit(
        net(out=16), train=numbers(1, 96, 1.0, 1), valid=numbers(2, 48, 1.0, 1),
        loss=lambda o, t: (o - t.expand(-1, 16)).pow(2).mean())),
    Case("quantiles", lambda _: fit(
        Own(lambda m, x: m.net(x).squeeze(1), net=net(out=1)), numbers,
        loss=lambda o, t: torch.maximum(0.9 * (t - o), -0.1 * (t - o)).mean())),
    Case("pairs ranked within the loss", lambda _: fit(
        Own(lambda m, x: m.net(x).squeeze(1), net=net(out=1)), numbers, loss=_ranked)),
    Case("a derivative by the input in the loss", lambda _: fit(_Physical(), _unlabelled)),
    Case("a loss with parameters of its own", _centred),
    Case("one in a hundred is a yes, as floats", lambda _: fit(
        net(out=1), train=_seldom(1), valid=_seldom(2), loss=nn.BCEWithLogitsLoss())),
    Case("samples that are compared within the loss", lambda _: fit(_Views(), _unlabelled, loss=_alike)),
    Case("two tasks in a dict", _two_tasks),
    Case("an autoencoder", lambda _: fit(
        nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, WIDTH)), _unlabelled, targets="x", loss="mse")),
    Case("an autoencoder with noise while training", lambda _: fit(_Variational(), _unlabelled)),
    Case("areas that overlap", _segments),
    Case("two optimisers that take turns", _drawn_and_judged),
    Case("the example's GAN", _example_gan),
    Case("a student and its teacher", _teacher),
]  # fmt: skip


def _fours(seed: int) -> tk.Arrays:
    x = points(seed).columns["x"]
    return tk.Arrays(x=x, target=(x[:, :4] > 0).float())


def _soft(seed: int) -> tk.Arrays:
    x = points(seed).columns["x"]
    return tk.Arrays(x=x, target=(2 * x[:, :CLASSES]).softmax(1))


def _unlabelled(seed: int = 1, count: int = 96) -> tk.Arrays:
    return tk.Arrays(x=points(seed, count).columns["x"])


# --- what is frozen, rates, data


def _frozen_by_hand(_: Path) -> Given:
    model = pretrained()
    model[0].requires_grad_(False)
    kept = [p for p in model.parameters() if p.requires_grad]
    return fit(model, optimizer=torch.optim.SGD(kept, lr=0.05, momentum=0.9))


def _two_rates(_: Path) -> Given:
    model = net()
    groups = [{"params": model[:2].parameters(), "lr": 1e-4}, {"params": model[2:].parameters(), "lr": 1e-2}]
    return fit(model, optimizer=torch.optim.AdamW(groups))


def _first_normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(WIDTH), *net())


def _deep_grey(seed: int = 1, count: int = 96) -> tk.Arrays:
    """Pictures of 16 bits."""
    held = images(seed, count)
    grey = ((held.columns["x"] + 2) * 10_000).clamp(0, 65_535).numpy().astype(np.uint16)
    return tk.Arrays(x=torch.from_numpy(grey.astype(np.float32) / 65_535), label=held.columns["label"])


def _bytes(seed: int = 1, count: int = 96) -> tk.Arrays:
    held = images(seed, count)
    grey = (held.columns["x"] * 64 + 128).clamp(0, 255).byte()
    return tk.Arrays(image=grey, label=held.columns["label"])


def _some_alike(_: Path) -> Given:
    """A table of small numbers, in which rows are equal by chance: 6 × 6 × 6 of them are possible."""

    def made(seed: int, count: int) -> tk.Arrays:
        x = torch.randint(6, (count, 3), generator=torch.Generator().manual_seed(seed)).float() / 2.5 - 1
        noise = 0.5 * drawn(seed, count)
        return tk.Arrays(x=x, label=(x.sum(1) + noise > 0).long())

    return fit(net_from(3, 2), train=made(1, 300), valid=made(2, 60))


def _counts(seed: int = 1, count: int = 96) -> tk.Arrays:
    """Numbers of which most are 0, as word counts are."""
    x = points(seed, count).columns["x"]
    return points(seed, count, x=(x - 1).relu(), label=(x - 1).relu().argmax(1) % CLASSES)


SETTINGS = [
    Case("a frozen body", lambda _: fit(pretrained(), freeze={"modules": ["0", "2"]})),
    Case("a body frozen by hand", _frozen_by_hand),
    Case("two rates", _two_rates),
    Case("a rate of 1e-5 for what is learned already", lambda _: fit(pretrained(), learning_rate=1e-5)),
    Case("one cycle", lambda _: fit(net(), learning_rate=3e-2, schedule="one_cycle")),
    Case("a warm-up", lambda _: fit(net(), sections={"optimizer": {"warmup": 0.3, "schedule": "cosine"}})),
    Case("a moving average", lambda _: fit(net(), sections={"train": {"ema": 0.99}})),
    Case("micro-batches of unequal tokens", lambda _: fit(
        nn.Sequential(nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS)), counting,
        sections={"train": {"accumulate": 4}})),
    Case("large numbers that the first layer normalises", lambda _: fit(_first_normed(), large)),
    Case("pictures of 16 bits", lambda _: fit(convnet(), _deep_grey)),
    Case("pictures as bytes, normalised on the way", lambda _: fit(convnet(), _bytes)),
    Case("mostly zeros", lambda _: fit(net(), _counts)),
    Case("one sample in twenty of a class", _rare),
    Case("twelve samples", lambda _: fit(net(), train=points(1, 12), valid=points(2, 6), batch_size=4)),
    Case("rows alike by chance", _some_alike),
    Case("no validation", lambda _: fit(net(), train=points()) | {"valid": None}),
    Case("sgd at 1e-3, as tutorials have it", lambda _: fit(convnet(), images, optimizer="sgd", learning_rate=1e-3)),
    Case("a tenth of the labels is wrong", lambda _: fit(net(), _noisy)),
    Case("more classes than validation has", lambda _: _many_classes()),
    Case("digits shifted and partly erased", lambda _: _digits(["random_shift", "random_erasing"])),
    Case("digits turned, sheared and recoloured by chance", lambda _: _digits(["rand_augment"])),
    Case("digits cropped anew", lambda _: _digits(["random_resized_crop"], image_size=8)),
    Case("a torch dataset of dicts", lambda _: fit(net(), train=_Dicts(points()), valid=_Dicts(points(2, 48)))),
    Case("a stream", lambda _: fit(net(), train=_Streamed(points()), valid=_Streamed(points(2, 48)))),
    Case("a torch dataset of pairs", lambda _: fit(
        net(), train=_pairs_of(points()), valid=_pairs_of(points(2, 48)))),
]  # fmt: skip


def _noisy(seed: int = 1, count: int = 96) -> tk.Arrays:
    held = points(seed, count).columns
    wrong = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.1
    return tk.Arrays(x=held["x"], label=held["label"].where(~wrong, (held["label"] + 1) % CLASSES))


def _many_classes() -> Given:
    """Twenty kinds, of which a validation of thirty samples lacks some."""

    def made(seed: int, count: int) -> tk.Arrays:
        label = torch.randint(20, (count,), generator=torch.Generator().manual_seed(seed))
        return tk.Arrays(x=2 * drawn(0, 20, WIDTH)[label] + drawn(seed, count, WIDTH), label=label)

    return fit(net(out=20), train=made(1, 400), valid=made(2, 30))


def _digits(augment: list[Any], **options: Any) -> Given:
    train = tk.ImageTable(EXAMPLES / "digits/train.parquet", channels=1, augment=augment, **options)
    valid = tk.ImageTable(EXAMPLES / "digits/valid.parquet", like=train)
    return fit(nn.Sequential(nn.Flatten(), *body(64), nn.Linear(HIDDEN, 10)), train=train, valid=valid)


class _Dicts(torch.utils.data.Dataset[Any]):
    def __init__(self, data: tk.Arrays):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.data.columns.items()}


class _Streamed(torch.utils.data.IterableDataset[Any]):
    def __init__(self, data: tk.Arrays):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Any:
        return zip(self.data.columns["x"], self.data.columns["label"], strict=True)


def _pairs_of(data: tk.Arrays) -> Any:
    return torch.utils.data.TensorDataset(data.columns["x"], data.columns["label"])


# --- the examples' recipes


def _example(name: str, *needs: str) -> Case:
    path = EXAMPLES / name / "recipe.toml"
    return Case(f"the example {name}", lambda _: {"source": path}, needs=needs)


RECIPES = [
    _example("digits"),
    _example("table"),
    _example("titanic", "data/tabular/titanic"),
    _example("adult", "data/tabular/adult"),
    _example("california-housing", "data/tabular/california-housing"),
    _example("banking77", "data/text/banking77"),
    _example("sst2", "data/text/sst2-sentences"),
    _example("fashion-mnist", "data/fashion-mnist"),
    _example("hymenoptera", "data/hymenoptera"),
    _example("spoken-digits", "data/spoken-digits"),
    _example("transfer", "data/hymenoptera", "data/weights/mobilenet_v2.pth"),
]

HEALTHY = [*MODELS, *LOSSES, *SETTINGS, *RECIPES]
