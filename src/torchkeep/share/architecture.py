"""The form of a model as JSON, and a model of that form with given tensors: no code of others runs, nothing is drawn.

A model known by name is built again by that name, with its settings and the schema of its data. Any other is a graph of
allowed operations. What can be neither carries its source, which runs only by the hash that the caller gives.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field as Setting
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..contracts import Json, Schema, TensorTree
from ..errors import ModelError, PackageError, SettingsError, TorchkeepError, UntrustedCodeError
from ..model.build import BUILT_IN, NO_WEIGHTS, ModelSettings, build_model
from ..model.hub import HUB, is_hub_name
from ..settings import Settings, check
from ..tensors import parse_json
from ..usercode import CodeReference, is_reference, load_function
from .graph import GraphModel

CONFIG = "hf/config.json"
PREPROCESSOR = "hf/preprocessor_config.json"
CODE = "code/"

_WHERE = "architecture.json"
_OWN_CODE = (  # would load more: code, kernels, weights, a model of another library
    "auto_map", "custom_pipelines", "quantization_config", "backbone", "use_pretrained_backbone", "use_timm_backbone",
    "model_args",
)  # fmt: skip
_ATTENTION = (None, "eager", "sdpa")
_MAX_CONFIG_BYTES = 4 << 20  # such as the names of 20,000 classes
_MAX_COUNT = 1 << 20  # of layers, labels …: of each the library may make an object
_LIBRARY_NAME = re.compile(r"(timm|torchvision):[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_LIBRARY_ARGS = re.compile(
    r"pretrained|checkpoint|weights|path|file|url|cache|scriptable|strict"
)  # would read or fetch
_ROOM = 1 << 22  # of numbers beside the parameters that a model may make when it is built
_CALLS, _CALLS_A_TENSOR = 10_000, 100
_INT32 = (1 << 31) - 1
_SHOWN = 5

Member = Callable[[str], bytes]


class _Registered(Settings):
    """A model that is known by name here, or in a library."""

    kind: Literal["built-in", "hf", "timm", "torchvision"]
    name: str
    args: dict[str, Any] = Setting(default_factory=dict)
    head: str | None = None
    cardinalities: list[Annotated[int, Setting(ge=1, le=_INT32)]] = Setting(default_factory=list)
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    tied: dict[str, str] = Setting(default_factory=dict)


class _Graph(Settings):
    """A graph of operations, whose tensors have its names."""

    kind: Literal["graph"]
    class_name: str = ""
    graph: dict[str, Any]
    tied: dict[str, str] = Setting(default_factory=dict)


class _Code(_Registered):
    """A function in a file of the package that builds the model; ``name`` is file.py:function."""

    kind: Literal["code"]  # type: ignore[assignment]
    sha256: str = Setting(pattern="^[0-9a-f]{64}$")


_FORMS: dict[str, type[_Registered] | type[_Graph] | type[_Code]] = {
    **dict.fromkeys(("built-in", "hf", "timm", "torchvision"), _Registered), "graph": _Graph, "code": _Code,
}  # fmt: skip


def registered(
    settings: ModelSettings, cardinalities: Sequence[int], model: nn.Module
) -> tuple[dict[str, Json], dict[str, bytes]]:
    """The JSON of a model that ``build_model`` made by a name that is not the user's own, and the files it needs."""
    library = settings.name.partition(":")[0] if is_hub_name(settings.name) else "built-in"
    said = {"kind": library, "name": settings.name, "args": settings.args, "head": settings.head,
            "cardinalities": list(cardinalities), "dtype": _dtype_of(model)}  # fmt: skip
    config = getattr(model, "config", None)
    if library != "hf" or config is None:
        return said, {}
    files = {CONFIG: config.to_json_string(use_diff=True).encode()}
    seen = Path(settings.name.removeprefix(HUB)).expanduser() / Path(PREPROCESSOR).name
    if seen.is_file():
        files[PREPROCESSOR] = seen.read_bytes()
    # the configuration says it all, and a folder's place on this machine is nobody's business
    return said | {"name": HUB + Path(settings.name.removeprefix(HUB)).name, "args": {}}, files


def coded(
    reference: CodeReference, settings: ModelSettings, cardinalities: Sequence[int], model: nn.Module
) -> tuple[dict[str, Json], dict[str, bytes]]:
    """The JSON of a model that a function of the user's own builds, and the file with it."""
    name = f"{reference.path.name}:{reference.function}"
    said = {"kind": "code", "name": name, "args": settings.args, "head": settings.head, "sha256": reference.sha256,
            "cardinalities": list(cardinalities), "dtype": _dtype_of(model)}  # fmt: skip
    return said, {CODE + reference.path.name: reference.path.read_bytes()}


def _dtype_of(model: nn.Module) -> str:
    kinds = [tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()]
    return str(max(kinds, key=kinds.count, default=torch.float32)).removeprefix("torch.")


def without_ties(tensors: Mapping[str, Tensor]) -> tuple[TensorTree, dict[str, str]]:
    """Each tensor once, under its first name; and the first name of those that are the same memory under another."""
    first: dict[Any, str] = {}
    kept, tied = {}, {}
    for name, tensor in tensors.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(),
                 tensor.dtype) if tensor.numel() else name  # fmt: skip
        if (other := first.setdefault(place, name)) == name:
            kept[name] = tensor
        else:
            tied[name] = other
    return kept, tied


def checked_form(data: Json) -> _Registered | _Graph | _Code:
    """What architecture.json says, in the form that it must have.

    Raises:  PackageError for any other form, and for a name that is not registered
    """
    form = _FORMS.get(data.get("kind", "")) if isinstance(data, dict) and isinstance(data.get("kind"), str) else None
    if form is None:
        raise _refused(f"kind {str(data.get('kind'))[:60]!r}" if isinstance(data, dict) else type(data).__name__,
                       f"one of {', '.join(_FORMS)}")  # fmt: skip
    try:
        said = check(form, data, _WHERE)
    except SettingsError as error:
        raise _refused(f"{error.where}: {error.what} {error.got}", error.expected) from None
    if isinstance(said, _Registered):
        _check_name(said)
    return said


def files_of(data: Json) -> set[str]:
    """The members that a form may take beside its tensors.

    Raises:  PackageError as ``checked_form``
    """
    said = checked_form(data)
    if isinstance(said, _Code):
        return {CODE + said.name.rpartition(":")[0]}
    return {CONFIG, PREPROCESSOR} if said.kind == "hf" else set()


def _check_name(said: _Registered) -> None:
    """A name leads to nothing but a table of this house, or of the library that the kind names."""
    own = {"built-in": said.name in BUILT_IN, "code": is_reference(said.name), "hf": said.name.startswith(HUB)}
    if not own.get(said.kind, _LIBRARY_NAME.fullmatch(said.name) and said.name.startswith(f"{said.kind}:")):
        named = f"a {said.kind} model called {said.name[:80]!r}"
        raise _refused(named, f"one of {', '.join(BUILT_IN)}, or LIBRARY:NAME")
    odd = [key for key in said.args if said.kind == "hf" or (said.kind not in own and _LIBRARY_ARGS.search(key))]
    if odd:
        raise _refused(f"{odd[0][:80]!r} as an argument of {said.name[:80]!r}", "what describes the model alone")


def built(
    data: Json, tensors: TensorTree, schema: Schema, member: Member, trust_code: str | None = None
) -> nn.Module:  # fmt: skip
    """A model of the form that ``data`` states, in eval mode, holding the tensors themselves.

    ``member`` gives the bytes of a file of the package. Parameters of floating point may be trained further.

    Raises:  PackageError where form and tensors do not fit; UntrustedCodeError for code without its hash
    """
    said = checked_form(data)
    tensors = _with_ties(tensors, said.tied)
    if isinstance(said, _Graph):
        try:
            model: nn.Module = GraphModel(_with_tied_parameters(said), tensors)
        except ModelError as error:
            raise _refused(error.got, error.expected, error.what) from None
        except TypeError as error:  # a tensor of a name that the model itself keeps
            raise _refused(error, "names of tensors") from None
        _tie(model, said.tied)
        return model.eval()
    with _files_of(said, member, trust_code) as (settings, load):
        cardinalities = said.cardinalities

        def make() -> nn.Module:
            found = build_model(settings, schema, cardinalities, load, loads=False).model
            return found if said.dtype == "float32" else found.to(getattr(torch, said.dtype))

        model = _made(make, tensors)
    _put(model, tensors)
    _tie(model, said.tied)
    return model.eval()


def _with_tied_parameters(said: _Graph) -> Json:
    """The graph, which has a tied parameter under one name, with all of its names."""
    learned = said.graph.get("parameters")
    if not isinstance(learned, list):
        return said.graph
    return said.graph | {"parameters": [*learned, *(name for name, first in said.tied.items() if first in learned)]}


def _with_ties(tensors: TensorTree, tied: Mapping[str, str]) -> TensorTree:
    wrong = [name for name, first in tied.items() if name in tensors or first not in tensors]
    if wrong:
        raise _refused(f"{wrong[0][:80]!r} tied to {tied[wrong[0]][:80]!r}", "the name of a tensor that is there")
    return tensors | {name: tensors[first] for name, first in tied.items()}


@contextlib.contextmanager
def _files_of(
    said: _Registered, member: Member, trust_code: str | None
) -> Iterator[tuple[ModelSettings, Callable[[str], Any]]]:
    """The settings to build by, with the files that they name where a library looks for them."""
    with tempfile.TemporaryDirectory(prefix="torchkeep-") as place:
        name = said.name
        if said.kind == "hf":
            name = HUB + place
            _check_config(_json_of(member, CONFIG))
            for file in (CONFIG, PREPROCESSOR):
                with contextlib.suppress(KeyError):
                    Path(place, Path(file).name).write_bytes(member(file))
        load: Callable[[str], Any] = _refuse_code
        if isinstance(said, _Code):
            reference = _trusted(said, member, trust_code, Path(place))
            load = lambda _: _function_of(reference)  # noqa: E731
        yield ModelSettings(name=name, args=said.args, head=said.head, weights=NO_WEIGHTS), load


def _refuse_code(name: str) -> Any:
    raise _refused(f"code called {name[:80]!r}", "no code in a model that is known by name")


def _trusted(said: _Code, member: Member, trust_code: str | None, place: Path) -> CodeReference:
    """The package's file of code, where the caller gave its hash."""
    file, _, function = said.name.rpartition(":")
    if trust_code != said.sha256:
        raise UntrustedCodeError(
            "this package carries code, which runs only by its hash", where=f"{CODE}{file}",
            got="no --trust-code" if trust_code is None else f"--trust-code {trust_code}",
            expected=f"sha256 {said.sha256}",
            fix=f"torchkeep unpack PACKAGE FOLDER, read the file; if you trust it: --trust-code {said.sha256}",
        )  # fmt: skip
    if Path(file).name != file:
        raise _refused(f"code in {file[:80]!r}", "a file of the package")
    path = place / file
    try:
        code = member(CODE + file)
    except KeyError:
        raise _refused("no such member", "the file that the model is built by", where=f"{CODE}{file[:80]}") from None
    if hashlib.sha256(code).hexdigest() != said.sha256:
        raise _refused("other code", f"the file of sha256 {said.sha256[:64]}", where=f"{CODE}{file[:80]}")
    path.write_bytes(code)
    return CodeReference(path, function, said.sha256)  # the bytes are compared with the hash when they are run


def _function_of(reference: CodeReference) -> Callable[..., Any]:
    """A function of the file's own: one that it imports, such as os.system, was not read with it."""
    function = load_function(reference, remembers=False)
    if not str(getattr(function, "__module__", "")).startswith("torchkeep_user_"):
        raise _refused(f"{reference.function[:80]!r}, which the file imports", "a function or class of the file itself")
    return function


def _json_of(member: Member, name: str) -> Json:
    try:
        text = member(name)
        if len(text) > _MAX_CONFIG_BYTES:
            raise ValueError(f"{len(text):,} bytes, where at most {_MAX_CONFIG_BYTES:,} are read")
        return parse_json(text)
    except (KeyError, ValueError, RecursionError) as error:
        raise _refused(str(error)[:200] or "too deep", "a configuration in strict JSON", where=name) from None


def _check_config(data: Json) -> None:
    """A configuration of the library's may name code, kernels or weights to fetch, or ask for a thousand million
    layers: such ones are refused."""
    if not isinstance(data, dict):
        raise _refused(type(data).__name__, "a configuration", where=CONFIG)
    for key, value in data.items():
        is_odd = (key in _OWN_CODE and value) or ("attn_implementation" in key and value not in _ATTENTION)
        is_other = key == "model_type" and str(value).startswith("timm")
        is_giant = isinstance(value, int) and abs(value) > _MAX_COUNT and not key.startswith(("max_position", "vocab"))
        if is_odd or is_other or is_giant:
            raise _refused(
                f"{key[:80]} = {str(value)[:80]}", "a configuration of the library's own model", where=CONFIG
            )
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                _check_config(inner)


class _Building(TorchFunctionMode):
    """Nothing is drawn while a model is built, so that memory which is replaced at once is never touched; and it may
    make only about as many numbers as there are tensors for, which is looked at before they are made."""

    def __init__(self, tensors: TensorTree):
        super().__init__()
        self._numbers = _ROOM + 4 * sum(tensor.numel() for tensor in tensors.values())
        self._calls = _CALLS + _CALLS_A_TENSOR * len(tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _DRAWS:
            drawn = args[0] if args else kwargs.get("tensor")  # those of torch.nn.init give all by name
            if isinstance(drawn, Tensor):
                return drawn
        if name in _FACTORIES:
            self._count(func(*args, **kwargs | {"device": "meta"}).numel())
        made = func(*args, **kwargs)
        self._count(made.numel() if isinstance(made, Tensor) and name in _GROWING else 0)
        return made

    def _count(self, numbers: int) -> None:
        self._numbers, self._calls = self._numbers - numbers, self._calls - 1
        if self._numbers < 0 or self._calls < 0:
            # this one goes through whoever builds: they say any other error in words of their own
            raise ModelError("it would grow beyond the parameters that are there", got="settings of a larger one")


_DRAWS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
          "xavier_normal_", "orthogonal_", "bernoulli_", "exponential_", "random_")  # fmt: skip
_FACTORIES = ("empty", "zeros", "ones", "full", "rand", "randn", "arange", "linspace", "eye", "randint")
_GROWING = ("repeat", "cat", "stack", "outer", "matmul", "tril", "triu", "clone", "__add__", "__mul__",
            "repeat_interleave")  # fmt: skip


def _made(make: Callable[[], nn.Module], tensors: TensorTree) -> nn.Module:
    """The model, its tensors not drawn."""
    try:
        with _Building(tensors):
            return make()
    except UntrustedCodeError:
        raise
    except TorchkeepError as error:
        raise PackageError(
            f"the model cannot be built: {error.what[:300]}", where=_WHERE, got=error.got[:300],
            expected=error.expected[:300], fix=error.fix[:300],
        ) from None  # fmt: skip
    except Exception as error:  # whatever a library says of odd settings
        said = f"{type(error).__name__}: {str(error)[:300]}"
        raise _refused(said, "settings that the model can be built with") from None


def _put(model: nn.Module, tensors: TensorTree) -> None:
    """The tensors in place of the model's own, not copied.

    Raises:  PackageError where names, shapes or types are others
    """
    wanted = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    _check_same(wanted, tensors)
    for name, own in wanted.items():
        path, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(path), tensors[name]
        if isinstance(own, nn.Parameter):
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        else:
            module._buffers[leaf] = tensor


def _check_same(wanted: TensorTree, tensors: TensorTree) -> None:
    def text(tensor: Tensor | None) -> str:
        return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

    names = dict.fromkeys([*wanted, *tensors])
    odd = [name for name in names if text(wanted.get(name)) != text(tensors.get(name))]
    if odd:
        listed = [f"{name[:80]}: {text(tensors.get(name))}" for name in odd[:_SHOWN]]
        expected = [text(wanted[name]) if name in wanted else "no such tensor" for name in odd[:_SHOWN]]
        more = f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else ""
        raise PackageError("the parameters do not fit the model", where="parameters.safetensors",
                           got="; ".join(listed) + more, expected="; ".join(expected))  # fmt: skip


def _tie(model: nn.Module, tied: Mapping[str, str]) -> None:
    """One parameter where the model has one under several names."""
    for name, first in tied.items():
        (path, _, leaf), (other, _, of) = name.rpartition("."), first.rpartition(".")
        module, source = model.get_submodule(path), model.get_submodule(other)
        for kind in ("_parameters", "_buffers"):
            if leaf in getattr(module, kind) and of in getattr(source, kind):
                getattr(module, kind)[leaf] = getattr(source, kind)[of]


def _refused(
    got: object, expected: str, what: str = "this is no model that can be built", where: str = _WHERE
) -> PackageError:
    return PackageError(what, where=where, got=str(got)[:400], expected=expected[:400])
