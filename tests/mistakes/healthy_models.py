"""Models that are right, and look in some way as if they were not; in which way is the case's name."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from material import (
    CLASSES,
    HIDDEN,
    SIDE,
    TIME,
    WIDTH,
    WORDS,
    Case,
    Given,
    Own,
    Words,
    body,
    convnet,
    counting,
    drawn,
    fit,
    images,
    large,
    net,
    points,
    sentences,
    series,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchkeep as tk


class _Residual(nn.Module):
    """A branch whose last scale begins at 0, so that the block begins as nothing (Goyal et al. 2017, section 5.1)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                                    nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))  # fmt: skip
        nn.init.zeros_(self.branch[-1].weight)
        self.out = nn.Linear(8 * SIDE * SIDE, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.out((x + self.branch(x)).relu().flatten(1))


def _zero_head() -> nn.Module:
    model = net()
    nn.init.zeros_(model[-1].weight)
    nn.init.zeros_(model[-1].bias)
    return model


class _Memory(nn.Module):
    def __init__(self, kind: Any):
        super().__init__()
        self.memory, self.out = kind(WIDTH, HIDDEN, batch_first=True), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.memory(x)[0][:, -1])


class _Causal(nn.Module):
    """A language model: a mask of -inf and a sinusoidal place as plain tensors, the output tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.layer = nn.TransformerEncoderLayer(HIDDEN, 4, 64, dropout=0.1, batch_first=True)
        self.out = nn.Linear(HIDDEN, WORDS, bias=False)
        self.out.weight = self.words.weight
        nn.init.normal_(self.words.weight, std=0.1)
        self.mask = torch.full((TIME, TIME), -torch.inf).triu(1)
        angle = torch.arange(TIME)[:, None] / 10000 ** (torch.arange(HIDDEN // 2) / (HIDDEN // 2))
        self.place = torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.layer(self.words(tokens) + 0.1 * self.place, src_mask=self.mask))


class _Experts(nn.Module):
    """Each sample goes to the experts that a gate picks for it; some may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(net() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(1).max(1)
        out = x.new_zeros(len(x), CLASSES)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().squeeze(1)
            if len(mine):
                out = out.index_add(0, mine, expert(x[mine]) * weight[mine, None])
        return out


class _AsLong(nn.Module):
    """A loop as long as the data say: each sample's own number of rounds."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.round = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.out = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for row in x:
            h = self.enter(row).relu()
            for _ in range(1 + int(row[0] > 0)):
                h = self.round(h).relu()
            made.append(h)
        return self.out(torch.stack(made))


class _Drops(nn.Module):
    """Stochastic depth: while training a whole block is left out by chance (Huang et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.out = body(), nn.Linear(HIDDEN, CLASSES)
        self.blocks = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            if not self.training:
                x = x + 0.5 * block(x).relu()
            elif torch.rand(()) < 0.5:
                x = x + block(x).relu()
        return self.out(x)


class _Adapted(nn.Module):
    """LoRA: the product of two matrices of which one begins at 0, beside a weight that stays (Hu et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net().requires_grad_(False)
        self.down, self.up = nn.Linear(HIDDEN, 4, bias=False), nn.Linear(4, CLASSES, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[:4](x)
        return self.net[4](x) + self.up(self.down(x))


def net_from(width: int, out: int = WIDTH) -> nn.Module:
    return nn.Sequential(nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, out))


class _Aside(nn.Module):
    """A second head that only training has (Szegedy et al. 2014)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside, self.out = body(), nn.Linear(HIDDEN, CLASSES), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x)
        return (self.out(x), self.aside(x)) if self.training else self.out(x)


def _with_aside(output: Any, label: Tensor) -> Tensor:
    heads = output if isinstance(output, tuple) else (output,)
    losses = [F.cross_entropy(head, label) for head in heads]
    return losses[0] + 0.3 * sum(losses[1:], losses[0] * 0)


class _Pairs(nn.Module):
    """Both inputs through one network; their distance is the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(out=HIDDEN)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.net(left) - self.net(right)).square().sum(1)


def _pairs(seed: int = 1, count: int = 96) -> tk.Arrays:
    x = points(seed, count)
    label = x.columns["label"]
    return tk.Arrays(left=x.columns["x"], right=x.columns["x"].flip(0), target=(label != label.flip(0)).float())


def _bag(tokens: Tensor, words: nn.Embedding) -> Tensor:
    return words(tokens).flatten(1)


def _spectral() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, HIDDEN)), nn.ReLU(),
                         nn.utils.parametrizations.weight_norm(nn.Linear(HIDDEN, CLASSES)))  # fmt: skip


def pretrained() -> nn.Module:
    """A network that knows its task already."""
    model, data = net(), points().columns
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(data["x"]), data["label"]).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model


class _Following(nn.Module):
    """What it says is to be like what its own slow copy says; a queue and a counter remember (He et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.out = net(out=HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.slow = net(out=HIDDEN).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(4, HIDDEN))
        self.seen, self.recent = 0, deque([0.0], maxlen=4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for mine, its in zip(self.net.parameters(), self.slow.parameters(), strict=True):
                    its.lerp_(mine, 0.1)
                self.queue.copy_(torch.cat([self.slow(x)[:1], self.queue[:-1]]))
            self.seen += len(x)
            self.recent.append(float(x.mean()))
        return self.out(self.net(x))


class _Coded(nn.Module):
    """The nearest of some codes in place of what was seen (van den Oord et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.codes, self.out = body(), nn.Embedding(16, HIDDEN), nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        seen = self.body(x)
        code = self.codes(torch.cdist(seen.detach(), self.codes.weight).argmin(1))
        made = self.out(seen + (code - seen).detach())
        return {"logits": made, "apart": F.mse_loss(code, seen.detach()) + 0.25 * F.mse_loss(seen, code.detach())}


class _Unequal(torch.utils.data.Dataset[Any]):
    """Words as many as come, and which class the last is of."""

    def __init__(self, seed: int):
        random = torch.Generator().manual_seed(seed)
        self.rows = [torch.randint(1, WORDS, (1 + number % TIME,), generator=random) for number in range(96)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"tokens": self.rows[index], "label": int(self.rows[index][-1]) % CLASSES}


def _padded(samples: list[Any]) -> dict[str, Any]:
    rows = [sample["tokens"] for sample in samples]
    return {"tokens": nn.utils.rnn.pad_sequence(rows, batch_first=True), "length": torch.tensor([*map(len, rows)]),
            "label": torch.tensor([sample["label"] for sample in samples])}  # fmt: skip


class _Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(WORDS, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        self.memory = nn.GRU(HIDDEN, HIDDEN, batch_first=True)

    def forward(self, tokens: Tensor, length: Tensor) -> Tensor:
        held = nn.utils.rnn.pack_padded_sequence(self.words(tokens), length.cpu(), True, enforce_sorted=False)
        return self.out(self.memory(held)[1][-1])


def _loudest(x: Tensor) -> Tensor:
    return x * (x >= x.topk(8, 1).values[:, -1:])


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.net((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def _unhidden(seed: int = 1, count: int = 96) -> tk.Arrays:
    held = series(seed, count).columns
    return tk.Arrays(x=held["x"], mask=torch.ones(count, TIME), label=held["label"])


class _Gated(nn.Module):
    """A hint is added by a layer of zeros (Zhang et al. 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.hint, self.out = body(), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, CLASSES)
        nn.init.zeros_(self.hint.weight)
        nn.init.zeros_(self.hint.bias)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.out(self.body(left) + self.hint(right))


def _two_inputs(seed: int = 1, count: int = 96) -> tk.Arrays:
    left, right = drawn(seed, count, WIDTH), drawn(seed + 10, count, WIDTH)
    return tk.Arrays(left=left, right=right, label=((left + right) @ drawn(0, WIDTH, CLASSES)).argmax(1))


class _Taught(nn.Module):
    """What a frozen network sees, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.out = [pretrained()[:4].requires_grad_(False)], nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.teacher[0](x))


class _Matches(nn.Module):
    """How well each left one fits each right one (Radford et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = net(out=HIDDEN), net(out=HIDDEN)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return F.normalize(self.left(left), dim=1) @ F.normalize(self.right(right), dim=1).T / 0.1


def _matching(seed: int = 1, count: int = 96) -> tk.Arrays:
    x = points(seed, count).columns["x"]
    return tk.Arrays(left=x, right=x @ drawn(0, WIDTH, WIDTH), target=x[:, 0])


def _small_bert(_: Path) -> Given:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=WORDS, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2,
                        intermediate_size=64, max_position_embeddings=16, num_labels=CLASSES)  # fmt: skip
    data = [tk.Arrays(input_ids=s.columns["tokens"], label=s.columns["label"]) for s in (sentences(), sentences(2, 48))]
    return fit(BertForSequenceClassification(config), train=data[0], valid=data[1], learning_rate=5e-4)


MODELS = [
    Case("an ordinary network", lambda _: fit(net())),
    Case("batch norm and sgd at 0.1", lambda _: fit(convnet(), images, optimizer="sgd", learning_rate=0.1)),
    Case("a residual branch that begins as nothing", lambda _: fit(_Residual(), images)),
    Case("a head of zeros", lambda _: fit(_zero_head())),
    Case("one linear layer", lambda _: fit(nn.Linear(WIDTH, CLASSES))),
    Case("an LSTM", lambda _: fit(_Memory(nn.LSTM), series)),
    Case("a GRU", lambda _: fit(_Memory(nn.GRU), series)),
    Case("a causal language model, mask and place as plain tensors, tied weights", lambda _: fit(_Causal(), counting)),
    Case("experts chosen by the data", lambda _: fit(_Experts())),
    Case("rounds chosen by the data", lambda _: fit(_AsLong())),
    Case("blocks left out by chance", lambda _: fit(_Drops())),
    Case("an adapter whose second matrix begins at 0", lambda _: fit(_Adapted())),
    Case("a head for training only", lambda _: fit(_Aside(), loss=_with_aside)),
    Case("two inputs through one network",
         lambda _: fit(_Pairs(), _pairs, loss=lambda d, t: (t * F.relu(4 - d) + (1 - t) * d).mean())),
    Case("spectral and weight norm", lambda _: fit(_spectral())),
    Case("group norm", lambda _: fit(nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * SIDE * SIDE, CLASSES),
    ), images)),
    Case("a batch norm without running statistics", lambda _: fit(nn.Sequential(
        *body(), nn.BatchNorm1d(HIDDEN, track_running_stats=False), nn.Linear(HIDDEN, CLASSES)))),
    Case("a dropout of a half", lambda _: fit(nn.Sequential(*body(), nn.Dropout(0.5), nn.Linear(HIDDEN, CLASSES)))),
    Case("attention, with softmax and a gate of sigmoid", lambda _: fit(Own(
        lambda m, x: m.out((m.attention(x, x, x)[0] * m.gate(x).sigmoid()).mean(1)),
        attention=nn.MultiheadAttention(WIDTH, 2, batch_first=True), gate=nn.Linear(WIDTH, WIDTH),
        out=nn.Linear(WIDTH, CLASSES),
    ), series, learning_rate=1e-2)),
    Case("an embedding of which most words do not come", lambda _: fit(Words(
        lambda m, tokens: m.out(_bag(tokens, m.words)), words=nn.Embedding(500, HIDDEN, padding_idx=0),
        out=nn.Linear(TIME * HIDDEN, CLASSES)), sentences)),
    Case("a teacher that follows within the forward", lambda _: fit(_Following())),
    Case("a code picked without a gradient, passed straight through", lambda _: fit(
        _Coded(), loss=lambda o, t: F.cross_entropy(o["logits"], t) + o["apart"])),
    Case("activations that are computed again in backward", lambda _: fit(
        Own(lambda m, x: m.out(checkpoint(m.body, x, use_reentrant=False)),
            body=body(), out=nn.Linear(HIDDEN, CLASSES)))),
    Case("sentences of unequal length, packed", lambda _: fit(
        _Packed(), train=_Unequal(1), valid=_Unequal(2), collate=_padded)),
    Case("eight units of thirty-two may speak", lambda _: fit(
        Own(lambda m, x: m.out(_loudest(m.body(x))), body=body(), out=nn.Linear(HIDDEN, CLASSES)))),
    Case("a mask that hides nothing", lambda _: fit(_Masked(), _unhidden)),
    Case("a second input behind a gate that begins closed", lambda _: fit(_Gated(), _two_inputs)),
    Case("a frozen teacher kept out of the state by a list", lambda _: fit(_Taught())),
    Case("the output is a table of all pairs",
         lambda _: fit(_Matches(), _matching, loss=lambda o, _: F.cross_entropy(o, torch.arange(len(o))))),
    Case("large numbers that the forward makes small", lambda _: fit(
        Own(lambda m, x: m.net((x - 500) / 100), net=net()), large)),
    Case("a small BERT that makes its own loss", _small_bert),
]  # fmt: skip
