"""The owner of module modes: what learns, and what stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the whole model into eval mode, and each module back into its own mode afterwards.

    A submodule that its user had put into eval mode stays there: ``model.train()`` would undo that (pytorch#66073).
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def begin_training(model: nn.Module) -> None:
    """Train mode, where the model as a whole is not in it; what its user chose for a part of it stands."""
    if not model.training:
        model.train()


def learning(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn, each once, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
