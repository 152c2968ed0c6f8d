"""How a batch meets the model and the loss: which keys go in, under which names, and which are the truth."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..contracts import INDEX, VALID, Batch
from ..data.samples import TARGETS
from ..errors import ModelError, SettingsError, nearest
from ..model.describe import shape_text

Keys = str | Sequence[str]
Inputs = Keys | Callable[[Batch], Any]
Call = Callable[[Batch], Any]

FEATURE = "feature."
"""What begins the keys of a batch of features: what crosses the frontier of the frozen part, numbered."""

_NOT_INPUT = (INDEX, VALID, "id")
_OPTIONAL = ("attention_mask", "length")  # what padding adds: for models that ask for it


class Binding:
    """Calls the model with a batch, and finds the targets in it.

    ``call(batch)`` runs the model, ``whole(batch)`` always all of it, on the ``keys`` of its inputs; ``target(batch)``
    gives a tensor, a dict of them where there are several, or None.

    Raises:  SettingsError for a key that the batch does not have, ModelError where the inputs cannot be matched
    """

    def __init__(
        self, model: nn.Module, batch: Batch, known_targets: Sequence[str] = (), inputs: Inputs | None = None,
        targets: Keys | None = None, with_targets: bool = False,
    ):  # fmt: skip
        self.model = model
        self._parameters = _forward_parameters(model)
        self._takes_all = not self._parameters and _takes_keywords(model)
        self._gives_targets = False
        keys = [name for name in batch if name not in _NOT_INPUT]
        self.targets = _find_targets(batch, keys, known_targets, targets)
        self.keys: list[str] = []
        self.whole, self.how = self._bind(batch, keys, inputs, with_targets, targets is not None)
        self.call = self.whole

    def shorten(self, rest: Call) -> None:
        """Have batches of features go to what is left of the model behind them."""
        self.call = lambda batch: rest(batch) if FEATURE + "0" in batch else self.whole(batch)

    def target(self, batch: Batch) -> Any:
        """The truth of a batch."""
        if len(self.targets) == 1:
            return batch[self.targets[0]]
        return {name: batch[name] for name in self.targets} if self.targets else None

    def _bind(
        self, batch: Batch, keys: list[str], inputs: Inputs | None, with_targets: bool, is_chosen: bool
    ) -> tuple[Call, str]:
        model = self.model
        if callable(inputs):
            self.keys = [name for name in keys if name not in self.targets]
            return _bind_callable(model, inputs), "inputs=(a function)"
        if inputs is None:
            known = [*keys, *self._parameters] if self._takes_all else self._parameters
            usable = [name for name in keys if name not in _OPTIONAL or name in known]
            names = [name for name in usable if name not in self.targets and _can_feed(batch[name])]
            names = names or (self.targets if is_chosen else [])  # targets="input": an autoencoder
        else:
            names = [inputs] if isinstance(inputs, str) else list(inputs)
            _check_keys(batch, names, "inputs")
        if not names:
            raise ModelError(
                "there is nothing in the batch for the model", where="inputs",
                got=f"a batch with {batch_text(batch)}", expected="a tensor that is no target",
                fix='inputs="NAME" names its key; a collate gives a dict of tensors',
            )  # fmt: skip
        keyword = self._keywords(names, with_targets)
        self.keys = names if keyword is None else list(keyword.values())
        if keyword is not None:
            pairs = tuple(keyword.items())
            return (lambda batch: model(**{word: batch[name] for word, name in pairs})), ", ".join(
                f"{word}={name}" for word, name in pairs
            )
        if len(names) == 1:
            only = names[0]
            return (lambda batch: model(batch[only])), only
        if inputs is not None and not isinstance(inputs, str):
            return (lambda batch: model(*[batch[name] for name in names])), ", ".join(names)
        if sum(self._parameters.values()) <= 1:
            return (lambda batch: model({name: batch[name] for name in names})), f"a dict of {', '.join(names)}"
        raise ModelError(
            "the batch's keys do not fit the model's forward", where=type(model).__name__,
            got=f"{', '.join(names) or 'no inputs'}", expected=f"forward({', '.join(self._parameters)})",
            fix='inputs=["first", "second"] gives them in order; inputs= also takes a function batch → (args, kwargs)',
        )  # fmt: skip

    def _keywords(self, names: list[str], with_targets: bool) -> dict[str, str] | None:
        """Keyword → key, where the forward knows every name; the targets too where the model makes its own loss."""
        known = self._parameters
        if not names or not (self._takes_all or all(name in known for name in names)):
            return None
        words = {name: name for name in names}
        for target in self.targets if with_targets else ():
            word = target if target in known else "labels" if target == "label" and "labels" in known else None
            if word and target not in names:
                words[word] = target
                self._gives_targets = True
        return words

    def makes_own_loss(self) -> bool:
        """Whether the model is given the targets, as models that return ``.loss`` want them."""
        return self._gives_targets


def _bind_callable(model: nn.Module, inputs: Callable[[Batch], Any]) -> Call:
    def call(batch: Batch) -> Any:
        given = inputs(batch)
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
            args = given[0] if isinstance(given[0], tuple | list) else (given[0],)
            return model(*args, **given[1])
        if isinstance(given, tuple | list):
            return model(*given)
        return model(**given) if isinstance(given, Mapping) else model(given)

    return call


def _forward_parameters(model: nn.Module) -> dict[str, bool]:
    """The forward's parameter names, and whether each must be given."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    try:
        found = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return {}
    return {name: given.default is given.empty for name, given in found.items() if given.kind in kinds}


def _takes_keywords(model: nn.Module) -> bool:
    try:
        found = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in found)


def _can_feed(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict) and all(_can_feed(item) for item in value.values()))


def _find_targets(batch: Batch, keys: list[str], known: Sequence[str], targets: Keys | None) -> list[str]:
    if targets is not None:
        names = [targets] if isinstance(targets, str) else list(targets)
        _check_keys(batch, names, "targets")
        return names
    found = [name for name in known if name in keys]
    return found or [name for name in TARGETS if name in keys][:1]


def _check_keys(batch: Batch, names: Sequence[str], what: str) -> None:
    for name in names:
        if name not in batch:
            raise SettingsError(
                "the batch has no such key", where=f"{what}={names!r}", got=repr(name),
                expected=f"one of {', '.join(batch)}", fix=nearest(name, list(batch)),
            )  # fmt: skip


def batch_text(batch: Batch) -> str:
    """A batch in words: keys, shapes and types."""
    parts = []
    for name, value in batch.items():
        dtype = f" {str(value.dtype).removeprefix('torch.')}" if isinstance(value, Tensor) else ""
        parts.append(f"{name}{dtype} {shape_text(value) or type(value).__name__}")
    return ", ".join(parts)
