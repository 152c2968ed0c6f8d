"""Trainings with one mistake each, as people make them; what is wrong is the case's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from material import (
    BATCH,
    CLASSES,
    DIGITS,
    EXAMPLES,
    HIDDEN,
    REFUSED,
    SHARED,
    SIDE,
    TIME,
    WIDTH,
    WORDS,
    Case,
    Given,
    Own,
    body,
    changed,
    convnet,
    counting,
    fit,
    images,
    net,
    numbers,
    points,
    recipe,
    sentences,
    series,
    written,
)
from overlooked import OVERLOOKED
from torch import Tensor, nn

import torchkeep as tk

# --- the loss


def _without_numbers(output: Tensor, label: Tensor) -> Tensor:
    return (output.argmax(1) != label).float().mean()


def _made_anew(output: Tensor, label: Tensor) -> Tensor:
    return torch.tensor(F.cross_entropy(output, label).item(), requires_grad=True)


def _log_of_nothing(output: Tensor, label: Tensor) -> Tensor:
    chosen = output.relu().gather(1, label[:, None])
    return -chosen.log().mean()


def _over_all_tokens(output: Tensor, target: Tensor) -> Tensor:
    """The mean over the padding too: a short sentence's words weigh less among long ones than among short ones."""
    return F.cross_entropy(output.mT, target, reduction="none", ignore_index=-100).mean()


LOSS = [
    Case("softmax before cross_entropy", lambda _: fit(net(nn.Softmax(1))), ("probabilities twice",), quick=True),
    Case("sigmoid before cross_entropy", lambda _: fit(net(nn.Sigmoid())), ("probabilities twice",), quick=True),
    Case("relu on the logits", lambda _: fit(net(nn.ReLU())), ("probabilities twice",), quick=True),
    Case("sigmoid before binary_cross_entropy_with_logits",
         lambda _: fit(net(nn.Sigmoid(), out=1), train=_yes_or_no(1), valid=_yes_or_no(2), loss=nn.BCEWithLogitsLoss()),
         ("probabilities twice",), quick=True),
    Case("logits to nll_loss", lambda _: fit(net(), loss=nn.NLLLoss()), ("probabilities twice",), quick=True),
    Case("probabilities to nll_loss",
         lambda _: fit(net(nn.Softmax(1)), loss=nn.NLLLoss()), ("probabilities twice",), quick=True),
    Case("loss.detach()",
         lambda _: fit(net(), loss=lambda o, t: F.cross_entropy(o, t).detach()), ("loss attached",), quick=True),
    Case("the error rate as loss", lambda _: fit(net(), loss=_without_numbers), ("loss attached",), quick=True),
    Case("a new tensor of loss.item()",
         lambda _: fit(net(), loss=_made_anew), ("gradients", "loss attached"), quick=True),
    Case("the logarithm of 0", lambda _: fit(net(), loss=_log_of_nothing), ("first loss",), quick=True),
    Case("(B, 1) against (B,) in a loss of one's own",
         lambda _: fit(net(out=1), numbers, loss=lambda o, t: (o - t).pow(2).mean()), ("broadcast",), quick=True),
    Case("(B,) against (B, 1) in an absolute error",
         lambda _: fit(Own(lambda m, x: m.net(x).squeeze(1), net=net(out=1)), train=numbers(1, 96, 1.0, 1),
                       valid=numbers(2, 48, 1.0, 1), loss=lambda o, t: (t - o).abs().mean()),
         ("broadcast",), quick=True),
    Case("(B, 1) against (B,) in nn.MSELoss",
         lambda _: fit(net(out=1), numbers, loss=nn.MSELoss()), ("broadcast",), quick=True),
    Case("a sum as loss, with micro-batches",
         lambda _: fit(net(), loss=nn.CrossEntropyLoss(reduction="sum"), sections={"train": {"accumulate": 4}}),
         ("micro-batches",)),
    Case("the mean over padding too, with micro-batches",
         lambda _: fit(_reader(), counting, loss=_over_all_tokens, sections={"train": {"accumulate": 4}}),
         ("micro-batches",)),
]  # fmt: skip


def _yes_or_no(seed: int) -> tk.Arrays:
    x = points(seed).columns["x"]
    return tk.Arrays(x=x, target=(x[:, :1] > 0).float())


def _reader() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, WORDS))


# --- what learns


class _Layers(nn.Module):
    """Layers where the model does not look for them."""

    def __init__(self, as_dict: bool):
        super().__init__()
        made = [nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]
        self.layers: Any = dict(enumerate(made)) if as_dict else made
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values() if isinstance(self.layers, dict) else self.layers:
            x = layer(x).relu()
        return self.out(x)


class _Passed(nn.Module):
    """A numpy function in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = body(), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.from_numpy(np.tanh(self.body(x).detach().cpu().numpy())))


def _no_grad(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        seen = model.body(x)
    return model.out(seen)


def _parts() -> dict[str, nn.Module]:
    return {"body": body(), "out": nn.Linear(HIDDEN, CLASSES)}


def _head_replaced_afterwards(_: Path) -> Given:
    model = net(out=10)
    optimizer = torch.optim.Adam(model.parameters())
    model[-1] = nn.Linear(HIDDEN, CLASSES)
    return fit(model, optimizer=optimizer)


def _half(_: Path) -> Given:
    model = net()
    return fit(model, optimizer=torch.optim.Adam(model[:2].parameters()))


def _twice(_: Path) -> Given:
    model = nn.ModuleDict(_parts())
    two = {"body": torch.optim.Adam(model.parameters()), "out": torch.optim.Adam(model["out"].parameters())}

    def step(model: Any, batch: Any, context: Any) -> Any:
        loss = F.cross_entropy(model["out"](model["body"](batch["x"])), batch["label"])
        context.backward(loss, "body")
        return {"loss": loss}

    return fit(model, step=step, optimizer=two)


def _never_thawed(_: Path) -> Given:
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    return fit(model.requires_grad_(False), optimizer=optimizer)


def _fooled_without_graph(_: Path) -> Given:
    """A GAN whose generator is judged on what was cut off from it."""
    model = nn.ModuleDict({"generator": net(out=WIDTH), "judge": net(out=1)})
    two = {name: torch.optim.Adam(part.parameters()) for name, part in model.items()}

    def step(model: Any, batch: Any, context: Any) -> Any:
        drawn = model["generator"](torch.randn(len(batch["x"]), WIDTH, generator=context.generator())).detach()
        judged = F.softplus(model["judge"](drawn)).mean() + F.softplus(-model["judge"](batch["x"])).mean()
        context.backward(judged, "judge")
        fooled = F.softplus(-model["judge"](drawn)).mean()
        context.backward(fooled, "generator")
        return {"loss": fooled, "judged": judged}

    return fit(model, step=step, optimizer=two)


LEARNS = [
    Case(".detach() in the middle",
         lambda _: fit(Own(lambda m, x: m.out(m.body(x).detach()), **_parts())), ("gradients",), quick=True),
    Case("torch.no_grad in the forward", lambda _: fit(Own(_no_grad, **_parts())), ("gradients",), quick=True),
    Case("a numpy function in the middle", lambda _: fit(_Passed()), ("gradients",), quick=True),
    Case("a threshold in the middle",
         lambda _: fit(Own(lambda m, x: m.out((m.body(x) > 0).float()), **_parts())), ("gradients",), quick=True),
    Case("a layer that the forward forgets",
         lambda _: fit(Own(lambda m, x: m.out(m.body(x)), **_parts(), middle=nn.Linear(HIDDEN, HIDDEN))),
         ("gradients",), quick=True),
    Case("layers in a list", lambda _: fit(_Layers(as_dict=False)), ("registered",), quick=True),
    Case("layers in a dict", lambda _: fit(_Layers(as_dict=True)), ("registered",), quick=True),
    Case("a tensor in place of a parameter",
         lambda _: fit(Own(lambda m, x: m.out(m.body(x) * m.scale), **_parts(),
                           scale=torch.ones(HIDDEN, requires_grad=True))),
         ("registered",), quick=True),
    Case("a layer made in the forward",
         lambda _: fit(Own(lambda m, x: nn.Linear(HIDDEN, CLASSES)(m.body(x)), body=body())),
         ("registered", "evaluation repeats"), quick=True),
    Case("the optimiser made before the head", _head_replaced_afterwards, ("optimiser", REFUSED), quick=True),
    Case("the optimiser has half of the model", _half, ("optimiser",), quick=True),
    Case("two optimisers for one part", _twice, ("optimiser",), quick=True),
    Case("frozen for ever", _never_thawed, ("gradients", REFUSED), quick=True),
    Case("the generator's samples detached", _fooled_without_graph, ("gradients", "loss attached")),
]  # fmt: skip


# --- samples mixed, chance in evaluation


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.out = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class _Memory(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.LSTM(WIDTH, HIDDEN)
        self.out = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.memory(x)[0][:, -1])


class _AlwaysTraining(nn.Module):
    """A train() that takes no mode, as of those who want batch norm in one of its two."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = convnet()

    def train(self, mode: bool = True) -> _AlwaysTraining:
        return super().train(True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _mixed_up(model: Any, x: Tensor) -> Tensor:
    """(B, T, D) read as (T, B, D): a view where a transpose is meant."""
    return model.out(model.body(x.view(TIME, len(x), WIDTH)).mean(0))


def _by_the_batch(model: Any, x: Tensor) -> Tensor:
    return model.net((x - x.mean(0)) / (x.std(0) + 1e-5))


MIXED = [
    Case("view in place of transpose",
         lambda _: fit(Own(_mixed_up, **_parts()), series), ("samples apart",), quick=True),
    Case("softmax over the batch",
         lambda _: fit(Own(lambda m, x: m.out(m.body(x) * m.body(x).softmax(0)), **_parts())),
         ("samples apart",), quick=True),
    Case("attention without batch_first", lambda _: fit(_Attention(), series), ("samples apart",), quick=True),
    Case("an LSTM without batch_first", lambda _: fit(_Memory(), series), ("samples apart",), quick=True),
    Case("statistics of the batch in evaluation",
         lambda _: fit(Own(_by_the_batch, net=net())), ("samples apart",), quick=True),
    Case("never in eval mode", lambda _: fit(_AlwaysTraining(), images), ("samples apart",), quick=True),
    Case("functional dropout in evaluation",
         lambda _: fit(Own(lambda m, x: m.out(F.dropout(m.body(x), 0.5)), **_parts())),
         ("evaluation repeats",), quick=True),
    Case("noise in evaluation",
         lambda _: fit(Own(lambda m, x: m.net(x + 0.1 * torch.randn_like(x)), net=net())),
         ("evaluation repeats",), quick=True),
]  # fmt: skip


# --- inputs and targets


def _unknown_word(_: Path) -> Given:
    model = nn.Sequential(nn.Embedding(WORDS, HIDDEN), nn.Flatten(), nn.Linear(TIME * HIDDEN, CLASSES))
    return fit(model, lambda seed=1, count=96: sentences(seed, count, WORDS + 5), inputs="tokens")


class _OneOfTwo(nn.Module):
    """Two inputs, of which one is overwritten by a slip of the name."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.out = body(), body(), nn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(torch.cat([self.left(left), self.right(left)], 1))


def _two_inputs(seed: int = 1, count: int = 96) -> tk.Arrays:
    x = points(seed, count)
    return tk.Arrays(left=x.columns["x"], right=-x.columns["x"].roll(1, 1), label=x.columns["label"])


def _with_nan(seed: int = 1, count: int = 96) -> tk.Arrays:
    x = points(seed, count).columns["x"].clone()
    x[::7, 2] = torch.nan
    return points(seed, count, x=x)


def _targets(change: Any) -> Any:
    """Numbers whose target is changed so."""
    return lambda seed=1, count=96: tk.Arrays(x=numbers(seed, count).columns["x"],
                                              target=change(numbers(seed, count).columns["target"]))  # fmt: skip


def _with_labels(change: Any, train_only: bool = False, **given: Any) -> Given:
    """Points whose labels are changed so."""
    train, valid = points(), points(2, 48)
    made = [points(x=part.columns["x"], label=change(part.columns["label"])) for part in (train, valid)]
    return fit(net(), train=made[0], valid=valid if train_only else made[1], **given)


def _one_class_in_valid(_: Path) -> Given:
    """A file in the order of its classes, cut in two."""
    held = points(1, 150)
    order = held.columns["label"].argsort(stable=True)
    x, label = held.columns["x"][order], held.columns["label"][order]
    return fit(net(), train=points(x=x[:120], label=label[:120]), valid=points(x=x[120:], label=label[120:]))


def _copied(share: float) -> Given:
    """Rows of the training in the validation, as a split drawn with replacement gives."""
    train, valid = points(), points(2, 48)
    count = int(48 * share)
    both = {name: torch.cat([train.columns[name][:count], valid.columns[name][count:]]) for name in ("x", "label")}
    return fit(net(), train=train, valid=tk.Arrays(**both))


def _drop_class(_: Path) -> Given:
    held = points()
    kept = held.columns["label"] != 1
    return fit(net(), train=tk.Arrays(x=held.columns["x"][kept], label=held.columns["label"][kept]))


def _augmented(change: Any) -> Given:
    """The digits, each changed so while training."""

    def augment(sample: Any, rng: np.random.Generator) -> Any:
        return sample | {"image": change(sample["image"], rng)}

    train = tk.ImageTable(DIGITS / "train.parquet", channels=1, augment=[augment])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    return fit(model, train=train, valid=tk.ImageTable(DIGITS / "valid.parquet", like=train))


def _everywhere(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Shifted so far that nothing of it is left: the shift is in pixels, not in shares."""
    return torch.zeros_like(image)


def _twice_scaled(image: Tensor, rng: np.random.Generator) -> Tensor:
    """To shares of 255 where bytes are kept: 0 and 1."""
    return (image / 255).to(image.dtype)


def _noise_in_place(image: Tensor, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, tuple(image.shape), dtype=np.uint8))


SAMPLES = [
    Case("inputs from 0 to 255",
         lambda _: fit(net(), lambda s=1, n=96: points(s, n, x=_bytes(s, n))), ("inputs",), quick=True),
    Case("pictures as floats to 255",
         lambda _: fit(nn.Sequential(nn.Flatten(), *body(SIDE * SIDE), nn.Linear(HIDDEN, CLASSES)),
                       lambda s=1, n=96: images(s, n, lambda x: 128 + 80 * x)),
         ("inputs",), quick=True),
    Case("not a number in the inputs", lambda _: fit(net(), _with_nan), ("inputs", "first loss"), quick=True),
    Case("the same sample again and again",
         lambda _: fit(net(), lambda s=1, n=96: points(s, n, x=_the_same(n))), ("inputs",), quick=True),
    Case("labels from 1", lambda _: _with_labels(lambda label: label + 1), (REFUSED,), quick=True),
    Case("one-hot labels of whole numbers",
         lambda _: _with_labels(lambda label: F.one_hot(label, CLASSES)), (REFUSED,), quick=True),
    Case("one label for all", lambda _: _with_labels(torch.zeros_like), ("classes", "labels")),
    Case("a class that training lacks", _drop_class, ("classes",)),
    Case("validation of one class", _one_class_in_valid, ("classes",)),
    Case("validation is training", lambda _: _copied(1.0), ("splits apart",)),
    Case("a third of validation is in training", lambda _: _copied(1 / 3), ("splits apart",)),
    Case("a target that is always 1", lambda _: fit(net(out=1), _targets(torch.ones_like), inputs="x", loss="mse"),
         ("labels",), quick=True),
    Case("a target that is no number",
         lambda _: fit(Own(lambda m, x: m.net(x).squeeze(1), net=net(out=1)),
                       _targets(lambda y: y.where(y < 1, torch.nan)), loss=nn.MSELoss()),
         ("labels", "first loss"), quick=True),
    Case("a target in single euros",
         lambda _: fit(Own(lambda m, x: m.net(x).squeeze(1), net=net(out=1)), _targets(lambda y: 250_000 + 90_000 * y),
                       loss=nn.MSELoss()),
         ("labels", "first loss"), quick=True),
    Case("a word beyond the embedding", _unknown_word, (REFUSED,), quick=True),
    Case("one of two inputs is not used", lambda _: fit(_OneOfTwo(), _two_inputs), ("output follows input",)),
    Case("the input is not used",
         lambda _: fit(Own(lambda m, x: m.net(torch.ones_like(x)), net=net())), ("output follows input",)),
    Case("augmentation leaves nothing", lambda _: _augmented(_everywhere), ("augmentation", "inputs"), quick=True),
    Case("augmentation scales a second time", lambda _: _augmented(_twice_scaled), ("augmentation",)),
    Case("augmentation puts noise in the image's place", lambda _: _augmented(_noise_in_place), ("augmentation",)),
]  # fmt: skip


def _bytes(seed: int, count: int) -> Tensor:
    return (128 + 60 * points(seed, count).columns["x"]).clamp(0, 255)


def _the_same(count: int) -> Tensor:
    return points(1, 1).columns["x"].expand(count, -1).contiguous()


# --- beginnings and rates


def _dead(module: Any) -> None:
    module.bias.fill_(-10.0)


def _nothing(module: Any) -> None:
    module.weight.zero_()
    module.bias.zero_()


def _huge(module: Any) -> None:
    module.weight.mul_(100)


def _saturated() -> nn.Module:
    """Sigmoids behind weights of another century: what comes is 0 or 1."""
    deep = [nn.Linear(WIDTH, HIDDEN), nn.Sigmoid(), nn.Linear(HIDDEN, HIDDEN), nn.Sigmoid(), nn.Linear(HIDDEN, CLASSES)]
    return nn.Sequential(changed(nn.Sequential(*deep[:4]), _far_off, nn.Linear), deep[4])


def _far_off(module: Any) -> None:
    module.weight.mul_(0.1)
    module.bias.fill_(40.0)


def _normed() -> nn.Module:
    return nn.Sequential(*body(), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, CLASSES))


def _upwards(_: Path) -> Given:
    model = net()
    return fit(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, maximize=True))


BEGINNINGS = [
    Case("every rectifier is dead",
         lambda _: fit(changed(net(), _dead, nn.Linear)), ("activations", "one batch learned")),
    Case("all weights begin at 0",
         lambda _: fit(changed(net(), _nothing, nn.Linear)),
         ("activations", "one batch learned", "output follows input")),
    Case("sigmoids that are saturated", lambda _: fit(_saturated()), ("activations", "one batch learned")),
    Case("weights a hundred times too large",
         lambda _: fit(changed(net(), _huge, nn.Linear)), ("first loss",), quick=True),
    Case("a dropout of 1", lambda _: fit(nn.Sequential(*body(), nn.Dropout(1.0), nn.Linear(HIDDEN, CLASSES))),
         ("activations", "one batch learned", "gradients")),
    Case("a last batch of 1 for batch norm",
         lambda _: fit(_normed(), train=points(1, 6 * BATCH + 1)), ("last batch",), quick=True),
    Case("batch norm with batches of 1",
         lambda _: fit(_normed(), batch_size=1), ("last batch",), quick=True),
    Case("a learning rate of 10", lambda _: fit(net(), learning_rate=10.0), ("learning rate",)),
    Case("a learning rate of 1e-12", lambda _: fit(net(), learning_rate=1e-12), ("learning rate",)),
    Case("upwards in place of downwards", _upwards, ("learning rate",)),
    Case("a run's folder below a file",
         lambda folder: fit(net(), run_dir=str(written(folder, "taken", "a file") / "run")), ("disk",), quick=True),
]  # fmt: skip


# --- recipes


def _with_code(folder: Path, text: str) -> Given:
    """The digits, with a model from a file of the user's own."""
    code = written(folder, "net.py", text)
    data = {"train": str(DIGITS / "train.parquet"), "valid": str(DIGITS / "valid.parquet"), "channels": 1}
    return recipe(data, {"name": f"{code}:build"})


_SOFTMAX = """
from torch import nn

def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, num_classes), nn.Softmax(dim=1))
"""
_LIST = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.blocks = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(2)]
        self.head = nn.Linear(64, num_classes)

    def forward(self, image):
        x = image.flatten(1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def build(num_classes):
    return Net(num_classes)
"""


def _toml(folder: Path) -> Given:
    """The example's recipe with a rate of another optimiser."""
    text = (DIGITS / "recipe.toml").read_text(encoding="utf-8").replace("3e-3", "5.0")
    for name in ("train", "valid", "test"):
        text = text.replace(f'"{name}.parquet"', f"'{DIGITS / name}.parquet'")
    return {"source": written(folder, "recipe.toml", text)}


def _same_table(_: Path) -> Given:
    table = str(EXAMPLES / "table" / "deliveries.csv")
    return recipe({"train": table, "valid": table, "target": "late"}, {"name": "mlp"})


def _train_again(_: Path) -> Given:
    train = str(DIGITS / "train.parquet")
    return recipe({"train": train, "valid": train, "channels": 1}, {"name": "convnet"})


def _bees_only(folder: Path) -> Given:
    """Photographs whose validation folder holds one class: the other's was not unpacked."""
    place = SHARED / "data/hymenoptera"
    data = {"train": str(place / "train"), "valid": str(folder / "val"), "image_size": 32}
    (folder / "val" / "bees").mkdir(parents=True)
    for photograph in sorted((place / "val" / "bees").iterdir())[:12]:
        (folder / "val" / "bees" / photograph.name).write_bytes(photograph.read_bytes())
    return recipe(data, {"name": "convnet", "args": {"widths": [8, 16]}})


RECIPES = [
    Case("a recipe's model ends in softmax", lambda f: _with_code(f, _SOFTMAX), ("probabilities twice",), quick=True),
    Case("a recipe's model keeps layers in a list", lambda f: _with_code(f, _LIST), ("registered",), quick=True),
    Case("a recipe's rate is 5", _toml, ("learning rate",)),
    Case("a recipe's table is both splits", _same_table, ("splits apart",)),
    Case("a recipe's valid is its train", _train_again, ("splits apart",)),
    Case("photographs validated on one class", _bees_only, ("classes",), needs=("data/hymenoptera",)),
]

PLANTED = [*LOSS, *LEARNS, *MIXED, *SAMPLES, *BEGINNINGS, *RECIPES, *OVERLOOKED]

NOT_FOUND: dict[str, str] = {}
"""Cases that no check finds, and why; one in twenty at most."""
