"""The house stays readable: how long it, its files and its functions may be, and that each file says what it is."""

from __future__ import annotations

import ast
import io
import statistics
import tokenize
from collections.abc import Iterator

import pytest
from source import ROOT, Module, read_house

# of code: data of four kinds, checkpoints and transfer take 16, monitoring 5, packages 5, looking at a training 4
HOUSE_LINES = 30_500
FILE_LINES = 600
FUNCTION_LINES = 90
MEDIAN_BODY_LINES = 10

Function = ast.FunctionDef | ast.AsyncFunctionDef


def num_lines(module: Module) -> int:
    return len(module.text.splitlines())


def num_code_lines(module: Module) -> int:
    """Lines that hold code: what explains it may be as long as it must be."""
    no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = tokenize.generate_tokens(io.StringIO(module.text).readline)
    code = {n for t in tokens if t.type not in no_code for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False) is not None:
            code -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(code)


def functions(module: Module) -> Iterator[Function]:
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def function_lines(function: Function) -> int:
    """From ``def`` to the last line of the body, docstring and comments counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def body_lines(function: Function) -> int:
    """From the first statement after the docstring to the last line; 0 where there is none but ``...``."""
    has_docstring = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if has_docstring else function.body
    is_stub = all(isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) and s.value.value is ... for s in body)
    return 0 if is_stub else (function.end_lineno or 0) - body[0].lineno + 1


def too_long_files(modules: list[Module], bound: int = FILE_LINES) -> list[str]:
    return [f"{module.path}: {num_lines(module)} lines" for module in modules if num_lines(module) > bound]


def too_long_functions(modules: list[Module], bound: int = FUNCTION_LINES) -> list[str]:
    found = [(module, function) for module in modules for function in functions(module)]
    return [f"{m.path}:{f.lineno} {f.name}: {function_lines(f)} lines" for m, f in found if function_lines(f) > bound]


def median_body(modules: list[Module]) -> float:
    """The median over all functions that do something; stubs of protocols would only flatter it."""
    lengths = [body_lines(function) for module in modules for function in functions(module)]
    return statistics.median([length for length in lengths if length])


def without_docstring(modules: list[Module]) -> list[str]:
    public = [module for module in modules if not module.name.rpartition(".")[2].removeprefix("__").startswith("_")]
    return [module.path for module in public if not ast.get_docstring(module.tree)]


@pytest.fixture(scope="module")
def house() -> list[Module]:
    return read_house(ROOT)


def test_the_house_is_small_enough_to_read(house: list[Module]) -> None:
    assert sum(map(num_code_lines, house)) <= HOUSE_LINES


def test_no_file_is_too_long(house: list[Module]) -> None:
    assert too_long_files(house) == []


def test_no_function_is_too_long(house: list[Module]) -> None:
    assert too_long_functions(house) == []


def test_half_of_the_functions_are_short(house: list[Module]) -> None:
    assert median_body(house) <= MEDIAN_BODY_LINES


def test_every_public_module_says_what_it_is(house: list[Module]) -> None:
    assert without_docstring(house) == []


def planted(text: str, path: str = "planted.py") -> list[Module]:
    return [Module(path.removesuffix(".py"), path, text, ast.parse(text))]


def test_planted_breaches_are_found() -> None:
    lines = "    x = 1\n"
    assert too_long_files(planted("x = 1\n" * (FILE_LINES + 1)))
    assert not too_long_files(planted("x = 1\n" * FILE_LINES))
    assert too_long_functions(planted("def f():\n" + lines * FUNCTION_LINES))
    assert not too_long_functions(planted("def f():\n" + lines * (FUNCTION_LINES - 1)))
    assert median_body(planted('def f():\n    """Text."""\n' + lines * 11 + "def g(): ...\n")) == 11
    [written] = planted(
        '"""Says.\n\nMore.\n"""\n\n# why\nx = (1,\n     2)\n\n\ndef f():\n    """Says."""\n    return 1\n'
    )
    assert (num_lines(written), num_code_lines(written)) == (13, 4)
    assert without_docstring(planted("x = 1\n")) == ["planted.py"]
    assert without_docstring(planted("", "__init__.py")) == ["__init__.py"]
    assert without_docstring(planted("x = 1\n", "_private.py")) == []
