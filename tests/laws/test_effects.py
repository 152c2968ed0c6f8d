"""One owner an effect (law 8), no pickle (law 2), no wait in the step (law 7), and the words that are no names.

Each rule reads one file and tells the lines that break it. Below them stand lines that break each rule, to prove that
it can fail, and lines near by that do not.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from source import ROOT, Module, dotted, is_type_checking, read_house, read_module

Rule = Callable[[Module], Iterator[ast.AST]]

PICKLERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_WORDS = {"utils", "helpers", "common", "misc", "manager", "handler", "processor"}
FORBIDDEN_WORDS |= {"util", "helper", "managers", "handlers", "processors"}
WITHOUT_TORCH = {"errors.py", "settings.py", "files.py", "folder.py", "cli.py", "__init__.py", "__main__.py"}


def calls(module: Module) -> Iterator[tuple[ast.Call, str, str]]:
    """Every call: the node, the whole name as written, and its last part."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            yield node, name, name.rpartition(".")[2]


def imported_names(module: Module) -> Iterator[tuple[ast.AST, str]]:
    """Every imported name in full: ``from os import fsync`` gives "os.fsync", and "os" too."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node, node.module
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


def keyword(call: ast.Call, name: str) -> object:
    """The constant given for a keyword; None where it is not given, ... where it is no constant."""
    for given in call.keywords:
        if given.arg == name:
            return given.value.value if isinstance(given.value, ast.Constant) else ...
    return None


def backward_elsewhere(module: Module) -> Iterator[ast.AST]:
    if module.path == "gradients.py":
        return
    own = {f"{name}.backward" for name in ("gradients", "context", "self", "subject")}  # these lead there
    for node, name, last in calls(module):
        is_method = last == "backward" and "." in name and name not in own
        if is_method or re.search(r"(^|\.)autograd\.(grad|backward)$", name):
            yield node
    yield from (
        node for node, name in imported_names(module) if re.fullmatch(r"torch\.autograd\.(grad|backward)", name)
    )


def disk_effect_elsewhere(module: Module) -> Iterator[ast.AST]:
    if module.path == "files.py":
        return
    for node, name, last in calls(module):
        is_rename = last in {"fsync", "fdatasync", "rename", "renames"} or name in {"os.replace", "shutil.move"}
        # str.replace takes two values, dataclasses.replace and datetime.replace take keywords: a path's takes one
        is_method = last == "replace" and "." in name and name != "dataclasses.replace"
        is_path_replace = is_method and len(node.args) == 1 and not node.keywords
        if is_rename or is_path_replace:
            yield node
    effects = {"os.fsync", "os.fdatasync", "os.rename", "os.renames", "os.replace", "shutil.move"}
    yield from (node for node, name in imported_names(module) if name in effects)


def requires_grad_elsewhere(module: Module) -> Iterator[ast.AST]:
    if module.path in {"model/freeze.py", "share/ejected.py"}:  # the second is what a script without us is made of
        return
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute) and node.attr == "requires_grad" and isinstance(node.ctx, ast.Store):
            yield node
    for node, _, last in calls(module):
        second = node.args[1] if len(node.args) > 1 else None
        is_setattr = last == "setattr" and isinstance(second, ast.Constant) and second.value == "requires_grad"
        if last == "requires_grad_" or is_setattr:
            yield node


def pickle(module: Module) -> Iterator[ast.AST]:
    yield from (node for node, name in imported_names(module) if name.split(".")[0] in PICKLERS)
    yield from (node for node, name in imported_names(module) if name in {"torch.save", "torch.load"})
    for node, name, last in calls(module):
        is_safe_load = module.path == "model/weights.py" and keyword(node, "weights_only") is True
        is_load = name == "torch.load" and not is_safe_load
        is_array = keyword(node, "allow_pickle") not in {None, False}
        # who asked for a plain state dict gets one: tensors alone, for programs that read nothing else
        is_save = name == "torch.save" and module.path != "share/export.py"
        if is_save or is_load or is_array or last in {"read_pickle", "to_pickle"}:
            yield node


def wait_in_the_step(module: Module) -> Iterator[ast.AST]:
    if module.path != "training/step.py":
        return
    for node, _, last in calls(module):
        to_cpu = last == "to" and any(isinstance(a, ast.Constant) and a.value == "cpu" for a in node.args)
        if last in {"item", "tolist", "cpu", "synchronize"} or to_cpu:
            yield node


def print_elsewhere(module: Module) -> Iterator[ast.AST]:
    if module.path not in {"watch/console.py", "cli.py"}:
        yield from (node for node, name, _ in calls(module) if name == "print")


def forbidden_name(module: Module) -> Iterator[ast.AST]:
    if words(module.name) & FORBIDDEN_WORDS:
        yield module.tree
    for node in ast.walk(module.tree):
        is_named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if is_named and words(node.name) & FORBIDDEN_WORDS:
            yield node


def words(name: str) -> set[str]:
    """The words of a name: "HTTPHandler" and "http_handler" both hold "handler"."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}


def torch_at_import(module: Module) -> Iterator[ast.AST]:
    if module.path in WITHOUT_TORCH:
        yield from (node for node in run_at_import(module.tree) if imports_torch(node))


def run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when a module is imported: all but the bodies of functions and what stands there for types alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and is_type_checking(child.test):
            continue
        yield child
        yield from run_at_import(child)


def imports_torch(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] == "torch" for alias in node.names)
    return isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch"


RULES: dict[str, Rule] = {
    "backward is called in gradients.py alone": backward_elsewhere,
    "files are synced and renamed in files.py alone": disk_effect_elsewhere,
    "requires_grad is set in model/freeze.py alone": requires_grad_elsewhere,
    "no pickle is written or read": pickle,
    "the step waits for nothing": wait_in_the_step,
    "only the console and the command line print": print_elsewhere,
    "some words are no names": forbidden_name,
    "what starts fast does not import torch": torch_at_import,
}


def violations(module: Module, rule: Rule) -> list[str]:
    lines = sorted({getattr(node, "lineno", 1) for node in rule(module)})
    text = module.text.splitlines() or [""]
    return [f"{module.path}:{line} {text[line - 1].strip()}" for line in lines]


@pytest.mark.parametrize("name", RULES)
def test_the_house_keeps(name: str) -> None:
    assert [line for module in read_house(ROOT) for line in violations(module, RULES[name])] == []


PLANTED: list[tuple[Rule, str, str]] = [
    (backward_elsewhere, "training/step.py", "loss.backward()"),
    (backward_elsewhere, "training/step.py", "scaler.scale(loss).backward()"),
    (backward_elsewhere, "training/objective.py", "torch.autograd.grad(loss, weights)"),
    (backward_elsewhere, "training/objective.py", "torch.autograd.backward([loss])"),
    (backward_elsewhere, "model/freeze.py", "from torch.autograd import grad"),
    (disk_effect_elsewhere, "keep/checkpoint.py", "os.fsync(file.fileno())"),
    (disk_effect_elsewhere, "keep/checkpoint.py", "os.replace(a, b)"),
    (disk_effect_elsewhere, "folder.py", "os.rename(a, b)"),
    (disk_effect_elsewhere, "folder.py", "path.rename(target)"),
    (disk_effect_elsewhere, "watch/records.py", "Path(a).replace(b)"),
    (disk_effect_elsewhere, "watch/records.py", "from os import fsync"),
    (disk_effect_elsewhere, "share/package.py", "shutil.move(a, b)"),
    (requires_grad_elsewhere, "model/build.py", "weight.requires_grad = False"),
    (requires_grad_elsewhere, "model/build.py", "module.requires_grad_(False)"),
    (requires_grad_elsewhere, "training/loop.py", "setattr(weight, 'requires_grad', True)"),
    (requires_grad_elsewhere, "training/loop.py", "a.requires_grad, b = True, 1"),
    (pickle, "keep/checkpoint.py", "import pickle"),
    (pickle, "keep/checkpoint.py", "def f():\n    from cloudpickle import dumps"),
    (pickle, "data/loader.py", "import joblib.memory"),
    (pickle, "data/loader.py", "import shelve, marshal, dill"),
    (pickle, "keep/checkpoint.py", "torch.save(state, path)"),
    (pickle, "keep/checkpoint.py", "from torch import save"),
    (pickle, "keep/checkpoint.py", "torch.load(path, weights_only=True)"),
    (pickle, "model/weights.py", "torch.load(path)"),
    (pickle, "model/weights.py", "torch.load(path, weights_only=False)"),
    (pickle, "model/weights.py", "torch.load(path, weights_only=is_safe)"),
    (pickle, "data/arrays.py", "np.load(path, allow_pickle=True)"),
    (pickle, "data/arrays.py", "np.load(path, allow_pickle=is_wanted)"),
    (pickle, "data/tables.py", "pandas.read_pickle(path)"),
    (wait_in_the_step, "training/step.py", "value = loss.item()"),
    (wait_in_the_step, "training/step.py", "values = loss.detach().cpu()"),
    (wait_in_the_step, "training/step.py", "values = index.tolist()"),
    (wait_in_the_step, "training/step.py", "values = loss.to('cpu')"),
    (wait_in_the_step, "training/step.py", "torch.cuda.synchronize()"),
    (print_elsewhere, "training/loop.py", "print('epoch')"),
    (forbidden_name, "data/utils.py", "x = 1"),
    (forbidden_name, "common/__init__.py", "x = 1"),
    (forbidden_name, "training/loop.py", "class SignalHandler: ..."),
    (forbidden_name, "training/loop.py", "class CheckpointManager: ..."),
    (forbidden_name, "training/loop.py", "def misc_numbers(): ..."),
    (forbidden_name, "training/loop.py", "def _helper(): ..."),
    (torch_at_import, "errors.py", "import torch"),
    (torch_at_import, "settings.py", "from torch import Tensor"),
    (torch_at_import, "files.py", "try:\n    import torch.nn\nexcept ImportError: ..."),
    (torch_at_import, "folder.py", "class A:\n    import torch"),
    (torch_at_import, "cli.py", "import json, torch.cuda as cuda"),
    (torch_at_import, "__init__.py", "if TYPE_CHECKING: ...\nimport torch"),
]

HARMLESS: list[tuple[Rule, str, str]] = [
    (backward_elsewhere, "gradients.py", "loss.backward()"),
    (backward_elsewhere, "training/step.py", "gradients.backward(loss)\nbackward(loss)"),
    (backward_elsewhere, "training/step.py", "with torch.no_grad(): ...\ntorch.set_grad_enabled(True)"),
    (disk_effect_elsewhere, "files.py", "os.replace(a, b)"),
    (disk_effect_elsewhere, "folder.py", "text.replace('a', 'b')\ndataclasses.replace(clock)\nreplace(clock)"),
    (disk_effect_elsewhere, "folder.py", "stamp.replace(microsecond=0)\nreplace(clock, step=1)"),
    (requires_grad_elsewhere, "model/freeze.py", "weight.requires_grad = False"),
    (requires_grad_elsewhere, "training/optim.py", "kept = [w for w in weights if w.requires_grad]"),
    (pickle, "model/weights.py", "torch.load(path, map_location='cpu', weights_only=True)"),
    (pickle, "data/arrays.py", "np.load(path)\nnp.load(path, allow_pickle=False)"),
    (wait_in_the_step, "training/loop.py", "value = loss.item()"),
    (wait_in_the_step, "training/step.py", "loss.to(device, non_blocking=True)\nfor key, x in batch.items(): ..."),
    (print_elsewhere, "cli.py", "print('done')"),
    (print_elsewhere, "training/loop.py", "console.print('done')"),
    (forbidden_name, "data/decode.py", "class Preprocess: ...\ndef commonly(): ...\ndef process(): ..."),
    (torch_at_import, "cli.py", "def train():\n    import torch"),
    (torch_at_import, "folder.py", "if TYPE_CHECKING:\n    from torch import Tensor"),
    (torch_at_import, "settings.py", "from .torch import x\nimport torchless"),
    (torch_at_import, "tensors.py", "import torch"),
]


def found_in(folder: Path, name: str, text: str, rule: Rule) -> list[str]:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""Planted."""\n{text}\n', encoding="utf-8")
    return violations(read_module(folder, path), rule)


def case_id(value: object) -> str:
    return value.__name__ if callable(value) else str(value).replace("\n", "; ")


@pytest.mark.parametrize(("rule", "name", "text"), PLANTED, ids=case_id)
def test_a_planted_breach_is_found(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    assert found_in(tmp_path, name, text, rule)


@pytest.mark.parametrize(("rule", "name", "text"), HARMLESS, ids=case_id)
def test_what_is_allowed_is_not_found(rule: Rule, name: str, text: str, tmp_path: Path) -> None:
    assert found_in(tmp_path, name, text, rule) == []


def test_every_rule_has_a_planted_breach() -> None:
    assert {rule for rule, _, _ in PLANTED} == set(RULES.values())
