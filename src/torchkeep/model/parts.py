"""What a name means in a model: its modules and parameters, and how deep each layer lies."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from torch import nn

from ..errors import SettingsError, nearest

_SLICE = re.compile(r"(.*)\[(?:(-?\d+)|(-?\d*):(-?\d*))\]")


def joined(*names: str) -> str:
    return ".".join(name for name in names if name)


def prefixes(name: str) -> list[str]:
    """A name and those of everything around it, the model itself ("") last."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 0, -1)] + [""] * bool(name)


def is_normalisation(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def matching(pattern: str, model: nn.Module, where: str) -> list[str]:
    """The names of modules and parameters that a pattern means.

    Raises:  SettingsError with a name that is near where there are none
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in modules if name] + [name for name, _ in model.named_parameters(remove_duplicate=False)]
    sliced = _SLICE.fullmatch(pattern)
    wanted = sliced[1] if sliced else pattern
    if sliced and wanted in modules:
        children = [joined(wanted, child) for child, _ in modules[wanted].named_children()]
        first, last = (int(text) if text else None for text in (sliced[2] or sliced[3], sliced[4]))
        found = children[slice(first, (int(sliced[2]) + 1 or None) if sliced[2] else last)]
    else:
        found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise SettingsError(
            "no part of the model is called so", where=where, got=repr(pattern),
            expected='a name, a pattern such as "features.*", or children by place such as "features[:14]"',
            fix=nearest(wanted, names) or "tk.inspect(model) lists the names",
        )  # fmt: skip
    return found


def all_but(head: str, model: nn.Module) -> list[str]:
    """The parts around the head. What holds no parameters is one only where a part that does comes after it.

    So dropout within a frozen trunk is off, and dropout before the head stays on.
    """
    around = set(prefixes(head)[1:])
    parts: list[tuple[str, bool]] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name in around:
            parts += [(joined(name, own), True) for own, _ in module.named_parameters(recurse=False)]
        elif name != head and name.rpartition(".")[0] in around:
            parts.append((name, has_parameters(module)))
    while parts and not parts[-1][1]:
        parts.pop()
    return [name for name, _ in parts]


def layer_depths(model: nn.Module) -> dict[str, int]:
    """The depth of each layer by name: what repeats, wherever it lies, and what stands before and after it."""
    depths: dict[str, int] = {}

    def visit(name: str, module: nn.Module) -> None:
        lists = nn.Sequential | nn.ModuleList | nn.ModuleDict
        if not name or isinstance(module, lists) or any(map(_repeats, module.modules())):
            for child_name, child in module.named_children():
                visit(joined(name, child_name), child)
        elif has_parameters(module):
            is_own_layer = not depths or not is_normalisation(module)
            depths[name] = max(depths.values(), default=-1) + is_own_layer

    visit("", model)
    return depths


def _repeats(module: nn.Module) -> bool:
    kinds = [type(child) for child in module.children()] if isinstance(module, nn.Sequential | nn.ModuleList) else []
    return len(kinds) > 1 and len(set(kinds)) == 1 and has_parameters(module)
