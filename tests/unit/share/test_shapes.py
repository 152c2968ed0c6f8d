"""What the rules say of shapes and types is what the operations give, and asking a graph needs no compiler."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from torchkeep.share.operations import NAMES, Argument, find_operation
from torchkeep.share.shapes import rule_of

RULED = sorted(name for name in NAMES if rule_of(name))
RECURRENT = [name for name in RULED if name.endswith(".input")]
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
STATED = {"padding": ("same", "valid"), "approximate": ("none", "tanh"), "mode": ("constant", "reflect")}
MOST_DRAWS, ENOUGH = 4000, 12


class Drawn:
    """Arguments by chance, for the most part of one type and of sizes that go together."""

    def __init__(self, name: str, seed: int):
        self.chance = random.Random(f"{name} {seed}")
        self.name, self.operation = name, find_operation(name)
        self.kind = torch.float32 if self.chance.random() < 0.5 else self.chance.choice(KINDS)
        axes = next((int(digit) + 2 for digit in "123" if f"{digit}d." in name), self.chance.randint(0, 4))
        self.shape = [self.chance.choice((1, 2, 2, 3)) for _ in range(axes)]

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        rows = self.operation.positional
        least = sum(row.is_required for row in rows)
        args = [self.value(row) for row in rows[: self.chance.randint(least, len(rows))]]
        named = [row for row in self.operation.arguments if row.is_keyword and row.kind != "MemoryFormat"]
        return args, {row.name: self.value(row) for row in named if row.is_required or self.chance.random() < 0.3}

    def value(self, row: Argument) -> Any:
        if row.is_optional and self.chance.random() < 0.5:
            return None
        if row.is_list:
            count = self.chance.randint(1, 3) if row.kind == "Tensor" else self.chance.randint(0, len(self.shape))
            item = Argument(row.name, row.kind, is_optional=row.holds_none)
            return [self.value(item) for _ in range(count)]
        choose = self.chance.choice
        values = {
            "Tensor": lambda: self.tensor(row.name), "int": lambda: choose((-2, -1, 0, 1, 1, 2, 3)),
            "number": lambda: choose((1, 2, 0.5, True)), "float": lambda: 0.0 if row.name == "dropout_p" else 0.5,
            "bool": lambda: row.name != "training" and choose((True, False)), "ScalarType": lambda: choose(KINDS),
            "str": lambda: choose(STATED.get(row.name, ("floor", "trunc"))),
        }  # fmt: skip
        return values[row.kind]()

    def tensor(self, name: str) -> Any:
        """Sometimes a number, which torch takes for a tensor of no axes."""
        shape, kind, chance = [*self.shape], self.kind, self.chance
        if chance.random() < 0.4:
            shape = [size if chance.random() < 0.7 else chance.choice((1, 2, 3)) for size in shape]
        if chance.random() < 0.2 or name in ("bias", "running_mean", "running_var"):
            shape = shape[chance.choice((1, -1, -1)) :][: 1 if name in ("bias", "running_mean", "running_var") else 9]
        if chance.random() < 0.1:
            kind = chance.choice(KINDS)
        if name in ("index", "indices"):
            kind = chance.choice((torch.int64, torch.int64, torch.int32, torch.bool))
            shape = shape[: chance.randint(0, 4)]
        kind = torch.bool if name in ("mask", "condition", "attn_mask") and chance.random() < 0.8 else kind
        value = torch.zeros(shape, dtype=kind)
        return 1 if name == "other" and chance.random() < 0.1 else value


class Layers(Drawn):
    """Of a recurrent network, with now and then a size that does not fit."""

    def call(self) -> tuple[list[Any], dict[str, Any]]:
        odd, choose = self.odd, self.chance.choice
        gates = {"gru": 3, "lstm": 4}.get(self.name.split(".")[1], 1)
        layers, ways, width, is_biased = odd(2), odd(2), odd(2), choose((True, False))
        own, weights = gates * width, []
        for i in range(layers * ways):
            taken = 3 if i < ways else ways * width
            biases = [torch.zeros(odd(own)), torch.zeros(own)] * is_biased
            weights += [torch.zeros(odd(own), taken), torch.zeros(own, odd(width)), *biases]
        first = torch.zeros(choose((2, 1)), 2, 3)
        is_first = choose((True, False))
        state = torch.zeros(odd(layers * ways), first.shape[0 if is_first else 1], odd(width))
        states = [state, torch.zeros(odd(layers * ways), *state.shape[1:])] if gates == 4 else state
        return [first, states, weights, is_biased, layers, 0.0, False, ways == 2, is_first], {}

    def odd(self, size: int) -> int:
        return self.chance.choice([size] * 12 + [1, 2])


def meta(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), value)


def stated(value: Any) -> list[Any]:
    tensors = value if isinstance(value, tuple | list) else [value]
    return [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]


@pytest.mark.parametrize("name", RULED)
def test_a_rule_says_what_the_operation_gives(name: str) -> None:
    operation, rule, covered = find_operation(name).function, rule_of(name), 0
    assert rule is not None
    for seed in range(MOST_DRAWS):
        args, kwargs = (Layers if name in RECURRENT else Drawn)(name, seed).call()
        try:
            said = rule(*meta(args), **meta(kwargs))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError):
            continue  # left to the operation itself
        try:
            given = operation(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, UserWarning):
            continue  # torch refuses these, and allocates nothing
        assert stated(said) == stated(given), (args, kwargs)
        covered += 1
        if covered == ENOUGH:
            break
    assert covered == ENOUGH


EXPORTS = """
import sys
import torch
import torchkeep as tk
from torch import nn
from torchkeep.model.build import BUILT_IN as made
from transformers import BertConfig, BertForSequenceClassification

class Foreign(nn.Module):
    def __init__(self, model, *names):
        super().__init__()
        self.model, self.names = model, names
    def forward(self, first, second=None):
        given = [first] if second is None else [first, second]
        output = self.model(**dict(zip(self.names, given))) if self.names else self.model(*given)
        return getattr(output, "logits", output)

class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.GRU(8, 8, 2, batch_first=True, bidirectional=True)
    def forward(self, x):
        return self.layers(x)[0].mean(1)

torch.manual_seed(0)
image, words = torch.randn(2, 3, 32, 32), torch.randint(1, 90, (2, 9))
bert = BertForSequenceClassification(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                                intermediate_size=64, vocab_size=99))
models = {
    "mobilenet_v2": (Foreign(made["mobilenet_v2"](3, 5)), image), "resnet18": (Foreign(made["resnet18"](3, 5)), image),
    "convnet": (Foreign(made["convnet"](3, 5)), image), "vit": (Foreign(made["vit"](3, 5, 32, depth=2)), image),
    "mlp": (Foreign(made["mlp"](4, 5)), torch.randn(2, 4)), "gru": (Recurrent(), torch.randn(2, 7, 8)),
    "transformer": (Foreign(made["transformer"](100, 5), "input_ids", "attention_mask"), words),
    "bert": (Foreign(bert, "input_ids", "attention_mask"), words),
}
for name, (model, first) in models.items():
    example = {"first": first, "second": torch.ones_like(first)} if first is words else {"first": first}
    tk.save_package(model, f"{sys.argv[1]}/{name}.tkp", example)
"""
ASKS = """
import sys
from pathlib import Path
import torchkeep as tk

for path in sorted(Path(sys.argv[1]).iterdir()):
    package = tk.load_package(path, device="cpu")
    assert package.architecture["kind"] == "graph"
    batch, expected = package.selftest
    for count in (1, len(expected)):  # a new shape, too
        package.asked({name: tensor[:count] for name, tensor in batch.items()})
    print(path.stem, *sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
"""


def test_graphs_are_loaded_and_asked_without_the_compiler(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for program in (EXPORTS, ASKS):
        words = [sys.executable, "-c", program, str(tmp_path)]
        done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    names = "bert convnet gru mlp mobilenet_v2 resnet18 transformer vit"
    assert done.stdout.split() == names.split()
