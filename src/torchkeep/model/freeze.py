"""The owner of module modes and of ``requires_grad``: what learns, from when and how fast, and what stays as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field as Setting
from pydantic import model_validator
from torch import Tensor, nn

from ..contracts import Json
from ..errors import ModelError, RunFailedError, SettingsError
from ..files import checksum
from ..settings import Settings, check
from ..tensors import to_safetensors
from .heads import find_head
from .parts import all_but, is_normalisation, joined, layer_depths, matching, prefixes

Normalisation = Literal["part", "frozen", "learn"]
Begin = tuple[int, int] | None
"""From which (epoch, step) on a part learns, both counted from 0 and both reached; None: never."""
DecisionRow = tuple[str, str, str, str]

_START = (0, 0)
_ADAPTER = "lora_"  # in the name of every module and parameter that peft adds


class FreezeStage(Settings):
    """Parts that learn from one moment on; without a moment from the start, at a rate of their own."""

    modules: list[str] = Setting(min_length=1)
    """Which parts, named as in ``freeze.modules``."""
    at_epoch: int | None = Setting(default=None, ge=0)
    """The number of epochs before they learn."""
    at_step: int | None = Setting(default=None, ge=0)
    """The number of steps before they learn."""
    rate_scale: float | None = Setting(default=None, gt=0)
    """What their learning rate is multiplied by; left out, ``freeze.rate_scale``."""
    normalisation: Normalisation | None = None
    """As ``freeze.normalisation``, for these parts."""

    @model_validator(mode="after")
    def _one_moment(self) -> FreezeStage:
        if self.at_epoch is not None and self.at_step is not None:
            raise ValueError("at_epoch or at_step, not both")
        return self


class AdapterSettings(Settings):
    """Small matrices beside frozen linear layers, which learn in their place (LoRA, Hu et al. 2021)."""

    targets: list[str] = Setting(min_length=1)
    """The layers: ends of module names, such as "query"."""
    r: int = Setting(default=8, gt=0)
    """The rank of the matrices."""
    alpha: int = Setting(default=16, gt=0)
    """Their product is scaled by alpha / r."""
    dropout: float = Setting(default=0.0, ge=0, lt=1)
    """Dropout before them."""
    seed: int = 0
    """What their first values are drawn from."""


class FreezeSettings(Settings):
    """[freeze]: which parts stay as they are, for how long, and how fast they learn afterwards."""

    modules: list[str] = Setting(default_factory=list)
    """The frozen parts: names ("features"), patterns ("encoder.*.attention"), children by place ("features[:14]")."""
    all_but_head: bool = False
    """Freeze everything but the head."""
    head: str | None = None
    """The head's name; left out, ``model.head``, else the last linear layer."""
    unfreeze_at_epoch: int | None = Setting(default=None, gt=0)
    """After so many epochs the frozen parts learn too."""
    unfreeze_at_step: int | None = Setting(default=None, gt=0)
    """After so many steps the frozen parts learn too."""
    lp_ft: int | None = Setting(default=None, gt=0)
    """LP-FT: so many epochs of the head alone, then of everything, from that head."""
    rate_scale: float = Setting(default=1.0, gt=0)
    """What the learning rate of parts that were frozen is multiplied by."""
    layer_decay: float | None = Setting(default=None, gt=0, le=1)
    """Each layer learns so many times as fast as the one after it; the last one learns at the full rate."""
    normalisation: Normalisation = "part"
    """Normalisation within the parts: as its part is; "frozen" afterwards too; "learn": always, statistics too."""
    stages: list[FreezeStage] = Setting(default_factory=list)
    """Gradual unfreezing: parts that learn from a moment of their own, which stands above the keys before."""
    adapters: AdapterSettings | None = None
    """LoRA by peft; everything but head and adapters is frozen where ``modules`` does not say what."""

    @model_validator(mode="after")
    def _means_one_thing(self) -> FreezeSettings:
        at_step = self.unfreeze_at_step is not None
        moments = [self.unfreeze_at_epoch is not None, at_step, self.lp_ft is not None]
        if sum(moments) > 1:
            raise ValueError("one of unfreeze_at_epoch, unfreeze_at_step and lp_ft")
        if self.lp_ft and self.modules:
            raise ValueError("lp_ft, which freezes all but the head, or modules")
        in_steps = [at_step] * any(moments) + [s.at_epoch is None for s in self.stages if s.at_epoch or s.at_step]
        if len(set(in_steps)) > 1:
            raise ValueError("moments that are all counted in epochs, or all in steps")
        if not (self.modules or self.stages or self.adapters or self.layer_decay or self.is_all_but_head):
            raise ValueError("modules, all_but_head = true, lp_ft, stages, adapters or layer_decay")
        return self

    @property
    def is_all_but_head(self) -> bool:
        """Whether it is the head that says what is frozen."""
        return self.all_but_head or self.lp_ft is not None or (self.adapters is not None and not self.modules)

    @property
    def begin(self) -> Begin:
        """From when the parts learn that no stage names."""
        found = (self.lp_ft or self.unfreeze_at_epoch or 0, self.unfreeze_at_step or 0)
        return found if any(found) else None


# --- modes


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


class _Hold:
    """Stands in the place of a module's ``train``, and knows what is to be undone.

    It lies in the module itself, so that copies and pickles of a model are as frozen as the model is, and so that the
    next plan finds what the last one did.
    """

    def __init__(self, module: nn.Module, names: list[str], holds_mode: bool, was_eval: bool):
        self.module, self.names, self.holds_mode, self.was_eval = module, names, holds_mode, was_eval

    def __call__(self, mode: bool = True) -> nn.Module:
        return self.module if self.holds_mode else type(self.module).train(self.module, mode)


def release(model: nn.Module) -> None:
    """Undo what any plan did to this model: what learned before learns again, and modes follow the whole model's."""
    for module in model.modules():
        hold = module.__dict__.get("train")
        if isinstance(hold, _Hold):
            del module.__dict__["train"]
            for name in hold.names:
                parameter = module._parameters.get(name)
                if parameter is not None:
                    parameter.requires_grad_(True)
            if hold.holds_mode:
                module.training = model.training and not hold.was_eval


# --- which part is which


@dataclass(frozen=True)
class _Part:
    """Parts that the settings name together."""

    label: str
    begin: Begin
    rate_scale: float
    normalisation: Normalisation


_FREE = _Part("", _START, 1.0, "part")


@dataclass(frozen=True)
class _Row:
    """A parameter under one of its names. ``learns_ever`` is False for one that its user froze."""

    parameter: nn.Parameter
    part: _Part
    rate_scale: float
    learns_ever: bool

    @property
    def begin(self) -> Begin:
        return self.part.begin if self.learns_ever else None


def _is_due(begin: Begin, at: tuple[int, int]) -> bool:
    return begin is not None and begin[0] <= at[0] and begin[1] <= at[1]


def _when(begin: Begin) -> str:
    if begin is None or begin == _START:
        return "never" if begin is None else "the start"
    return f"epoch {begin[0]}" if begin[0] else f"step {begin[1]}"


def _add_adapters(model: nn.Module, settings: AdapterSettings) -> None:
    if any(_ADAPTER in name for name, _ in model.named_parameters()):
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise SettingsError(
            "adapters are made by peft, which is not installed", where="freeze.adapters", expected="peft",
            fix="pip install 'torchkeep[peft]'",
        ) from None  # fmt: skip
    learned = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    config = LoraConfig(
        r=settings.r, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=settings.targets
    )
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count())):
            torch.manual_seed(settings.seed)
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise SettingsError(
            "these layers take no adapters", where="freeze.adapters.targets", got=error,
            expected="ends of the names of linear layers", fix="tk.inspect(model) lists the names",
        ) from error  # fmt: skip
    for parameter in model.parameters():  # peft freezes all but its own, the head too
        parameter.requires_grad_(learned.get(id(parameter), True))


def decay_groups(parameters: list[nn.Parameter], weight_decay: float, decay: str) -> list[dict[str, Any]]:
    """Parameter groups by whether they decay: with ``decay = "matrices"`` what has fewer than 2 dimensions does not."""
    if decay == "all" or weight_decay == 0:
        return [{"params": parameters, "weight_decay": weight_decay}]
    matrices = [p for p in parameters if p.ndim >= 2]
    others = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class FreezePlan:
    """Says for each part of a model whether it learns, from when, at which rate, and what its normalisation does.

    ``apply(model)`` begins it. A part that is frozen has ``requires_grad`` False, no gradients, and stays in eval mode
    under any ``model.train()``; so neither decay, momentum, statistics nor dropout touch it. ``groups`` gives the
    parameters of all parts that ever learn, so that ``advance(epoch, step)``, which lets a part learn when its time has
    come, changes neither the optimiser nor its schedule. What its user froze before stays frozen. The keywords are the
    keys of the recipe's [freeze].

    Raises:  SettingsError for settings that contradict one another
    Source:  gradual unfreezing: Howard & Ruder 2018 (arXiv 1801.06146); LP-FT: Kumar et al. 2022 (arXiv 2202.10054);
             layer_decay: Clark et al. 2020 (arXiv 2003.10555)
    """

    def __init__(self, modules: Sequence[str] | str = (), **given: Any):
        named = [modules] if isinstance(modules, str) else list(modules)
        self.settings = check(FreezeSettings, {"modules": named, **given}, "tk.FreezePlan")
        self.head = self.settings.head
        self._model: nn.Module | None = None
        self._at = _START
        self._rows: dict[str, _Row] = {}
        self._modules: dict[str, tuple[nn.Module, Begin]] = {}
        self._begins: list[tuple[int, int]] = []
        self._waiting: list[tuple[int, int]] = []
        self._sums: dict[str, str] | None = None

    # --- what it does to a model

    def apply(self, model: nn.Module) -> None:
        """Freeze what is frozen now; what another plan did to this model is undone first.

        Raises:  SettingsError for a name without a part, where nothing would learn, or for a tensor that is shared by
                 parts which do not begin to learn together
        """
        release(model)
        if self.settings.is_all_but_head and self.head is None:
            self.head = find_head(model)
            if self.head is None:
                raise SettingsError(
                    "this model has no head that can be found", where="freeze.all_but_head", got=type(model).__name__,
                    expected="a linear layer after all others", fix="freeze.head names it",
                )  # fmt: skip
        if self.settings.adapters is not None:
            _add_adapters(model, self.settings.adapters)
        self._resolve(model)
        self._model = model
        self._put()

    def advance(self, epoch: int, step: int = 0) -> bool:
        """Let learn what learns after ``epoch`` epochs and ``step`` steps; whether that changed anything."""
        self._applied()
        if not self._waiting or not _is_due(self._waiting[0], (epoch, step)):
            return False
        self._at = (epoch, step)
        self._put()
        return True

    def release(self) -> None:
        """Undo ``apply``."""
        if self._model is not None:
            release(self._model)
        self._model = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self._at[0], "step": self._at[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Be where the plan was that was saved."""
        self._at, self._sums = (state["epoch"], state["step"]), None
        if self._model is not None:
            self._put()

    def _put(self) -> None:
        model = self._applied()
        release(model)
        held, frozen = self._held, self.frozen
        is_shared = {id(module) for name, (module, _) in self._modules.items() if name not in held}
        for name, (module, _) in self._modules.items():
            own = [key for key, p in module._parameters.items()
                   if p is not None and p.requires_grad and joined(name, key) in frozen]  # fmt: skip
            holds_mode = name in held and id(module) not in is_shared
            if isinstance(module.__dict__.get("train"), _Hold) or not (own or holds_mode):
                continue
            was_eval = model.training and not module.training
            module.__dict__["train"] = _Hold(module, own, holds_mode, was_eval)
            module.training = module.training and not holds_mode
            for key in own:
                parameter = module.get_parameter(key).requires_grad_(False)
                parameter.grad = None
        self._waiting = [begin for begin in self._begins if not _is_due(begin, self._at)]

    def _applied(self) -> nn.Module:
        if self._model is None:
            raise ModelError("this plan has no model yet", where="tk.FreezePlan", fix="plan.apply(model)")
        return self._model

    # --- what the settings mean for this model

    def _resolve(self, model: nn.Module) -> None:
        claims = self._claims(model)

        def part_of(name: str, module: nn.Module) -> _Part:
            around = prefixes(name)
            part = next((part for names, part in claims if not names.isdisjoint(around)), _FREE)
            if _ADAPTER in name:
                return replace(_FREE, label="adapters")
            if part.normalisation == "part" or not is_normalisation(module):
                return part
            begin = _START if part.normalisation == "learn" else None
            return replace(part, label=f"normalisation in {part.label}", begin=begin)

        depths = layer_depths(model) if self.settings.layer_decay else {}
        top = max(depths.values(), default=0)
        modules = dict(model.named_modules(remove_duplicate=False))
        self._modules = {name: (module, part_of(name, module).begin) for name, module in modules.items()}
        self._rows = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            part = part_of(name, modules[name.rpartition(".")[0]])
            depth = next((depths[around] for around in prefixes(name) if around in depths), 0)
            scale = part.rate_scale * (self.settings.layer_decay or 1.0) ** (top - depth)
            self._rows[name] = _Row(parameter, part, scale, parameter.requires_grad)
        learning_from = {row.begin for row in self._rows.values()}
        begins = learning_from | {begin for _, begin in self._modules.values()}
        self._begins = sorted(begin for begin in begins if begin is not None)
        self._check_shared()
        if _START not in learning_from:
            raise SettingsError(
                "nothing in this model would learn at the start", where="freeze", got=self._label(),
                expected="at least one part that learns", fix="tk.inspect(model) lists the parts",
            )  # fmt: skip

    def _claims(self, model: nn.Module) -> list[tuple[set[str], _Part]]:
        """The names that each part is made of; the first that has a name counts, so stages by their time, then all."""
        settings, claims = self.settings, []
        for number, stage in enumerate(settings.stages):
            names = {n for pattern in stage.modules for n in matching(pattern, model, f"freeze.stages[{number}]")}
            begin = (stage.at_epoch or 0, stage.at_step or 0)
            scale = settings.rate_scale if stage.rate_scale is None else stage.rate_scale
            kind = stage.normalisation or settings.normalisation
            claims.append((names, _Part(", ".join(stage.modules), begin, scale, kind)))
        claims.sort(key=lambda claim: claim[1].begin or _START)
        names = {n for pattern in settings.modules for n in matching(pattern, model, "freeze.modules")}
        if self.head is not None and settings.is_all_but_head:
            names |= set(all_but(matching(self.head, model, "freeze.head")[0], model))
        part = _Part(self._label(), settings.begin, settings.rate_scale, settings.normalisation)
        return [*claims, (names, part)]

    def _label(self) -> str:
        return ", ".join([*self.settings.modules, *[f"all but {self.head}"] * self.settings.is_all_but_head])

    def _check_shared(self) -> None:
        first: dict[int, str] = {}
        for name, row in self._rows.items():
            other = first.setdefault(id(row.parameter), name)
            begins = [self._rows[other].begin, row.begin]
            if begins[0] != begins[1]:
                raise SettingsError(
                    "one tensor is shared by parts that do not begin to learn together", where="freeze",
                    got=f"{other} learns from: {_when(begins[0])}; {name} from: {_when(begins[1])}",
                    expected="both or neither in a part", fix=f"name {other} and {name} together in freeze.modules",
                )  # fmt: skip

    # --- what it says

    def groups(
        self, model: nn.Module, learning_rate: float, weight_decay: float = 0.0, decay: str = "matrices"
    ) -> list[dict[str, Any]]:
        """Parameter groups for any torch optimiser: of every part that ever learns, the fastest first.

        Parts that begin to learn at other times have other groups: a fused optimiser takes momenta of one age alone.
        """
        if self._model is not model:
            self.apply(model)
        found: dict[tuple[float, tuple[int, int]], list[nn.Parameter]] = {}
        for row in self._distinct():
            if row.begin is not None:
                found.setdefault((-row.rate_scale, row.begin), []).append(row.parameter)
        return [
            {**group, "lr": learning_rate * -key[0]}
            for key in sorted(found)
            for group in decay_groups(found[key], weight_decay, decay)
        ]

    def adopt(self, optimizers: Iterable[torch.optim.Optimizer], is_scheduled: bool = False) -> None:
        """Scale the rates of optimisers that were made without ``groups``; ``is_scheduled`` by an object of their own.

        Raises:  SettingsError where their groups do not fit the plan
        """
        rows, groups = {id(row.parameter): row for row in self._distinct()}, []
        for optimizer in optimizers:
            groups += optimizer.param_groups
        for number, group in enumerate(groups):
            found = [rows[id(p)] for p in group["params"] if id(p) in rows and rows[id(p)].begin is not None]
            scales, begins = {row.rate_scale for row in found}, {row.begin for row in found}
            mixed = len(scales) > 1 or (len(begins) > 1 and group.get("fused") and group.get("momentum"))
            if mixed or (is_scheduled and scales - {1.0}):
                raise SettingsError(
                    "this optimiser does not fit the plan", where=f"parameter group {number}",
                    got=f"rate scales {sorted(scales)}, learning from {sorted(map(_when, begins))}",
                    expected="groups whose parts learn at one rate and, with a fused momentum, from one moment; and "
                    "no scheduler object that was made for other rates",
                    fix="make it of plan.groups(model, learning_rate, weight_decay), or leave optimizer= and its "
                    "scheduler to the settings",
                )  # fmt: skip
            scale = scales.pop() if scales else 1.0
            group["lr"] *= scale / group.get("rate_scale", 1.0)  # the same object may come a second time
            group["rate_scale"] = scale
        moved = {id(p) for group in groups for p in group["params"]}
        late = [name for name, row in self._rows.items() if row.begin not in (None, _START)]
        lost = [name for name in late if id(self._rows[name].parameter) not in moved]
        if lost:
            raise SettingsError(
                "a part is to learn later, and no optimiser has it", where="optimizer",
                got=f"{lost[0]} and {len(lost) - 1} more", expected="parameters that do not learn yet too",
                fix="give the optimiser model.parameters(), or plan.groups(model, learning_rate)",
            )  # fmt: skip

    @property
    def frozen(self) -> frozenset[str]:
        """The names of the parameters that the plan keeps from learning now."""
        return self._frozen_at(self._at)

    @property
    def spans(self) -> list[tuple[tuple[int, int], frozenset[str]]]:
        """From which (epoch, step) on which parameters are frozen, in order."""
        return [(begin, self._frozen_at(begin)) for begin in self._begins]

    def _frozen_at(self, at: tuple[int, int]) -> frozenset[str]:
        return frozenset(name for name, row in self._rows.items() if not _is_due(row.part.begin, at))

    @property
    def _held(self) -> set[str]:
        """The names of the modules in which nothing learns now."""
        begins = {name: begin for name, (_, begin) in self._modules.items()}
        begins |= {name: row.part.begin for name, row in self._rows.items()}
        moving = {around for name, begin in begins.items() if _is_due(begin, self._at) for around in prefixes(name)}
        return self._modules.keys() - moving

    def _distinct(self) -> list[_Row]:
        found: dict[int, _Row] = {}
        for row in self._rows.values():
            found.setdefault(id(row.parameter), row)
        return list(found.values())

    def sums(self) -> dict[str, str]:
        """A checksum of each tensor of the frozen part, buffers too, by name."""
        held, frozen = self._held, self.frozen
        kept = {
            name: tensor
            for name, tensor in self._applied().state_dict().items()
            if isinstance(tensor, Tensor) and (name in frozen or name.rpartition(".")[0] in held)
        }
        return {name: checksum(to_safetensors({name: tensor})[1]) for name, tensor in kept.items()}

    def hash(self) -> str:
        """One checksum of the whole frozen part."""
        return checksum("\n".join(f"{name} {found}" for name, found in sorted(self.sums().items())).encode())

    def check(self) -> None:
        """Compare the frozen part with what it was at the first call after ``apply`` or ``load_state_dict``.

        Raises:  RunFailedError naming the first tensor that has changed
        """
        found = self.sums()
        before = self._sums = self._sums or found
        changed = [name for name in found if before.get(name, found[name]) != found[name]]
        if changed:
            raise RunFailedError(
                "a frozen tensor has changed", where=changed[0],
                got=f"checksum {found[changed[0]]}, and {len(changed) - 1} more that changed",
                expected=f"checksum {before[changed[0]]}",
                fix="leave it out of freeze.modules, or mend the code that writes to it",
            )  # fmt: skip

    def map(self) -> list[dict[str, Json]]:
        """What learns now, module by module, the model first and as deep as it differs, for the record."""
        rows: list[dict[str, Json]] = []
        own_rows: dict[str, dict[int, _Row]] = {}
        for name, row in self._rows.items():
            for around in prefixes(name):
                own_rows.setdefault(around, {})[id(row.parameter)] = row

        def visit(name: str, module: nn.Module) -> None:
            own = list(own_rows.get(name, {}).values())
            if own:
                rows.append(_map_row(name, module, own, self._at))
            if name.count(".") < 1 or len({(row.begin, row.rate_scale) for row in own}) > 1:
                for child_name, child in module.named_children():
                    visit(joined(name, child_name), child)

        visit("", self._applied())
        return rows

    def rows(self) -> list[DecisionRow]:
        """What, value, reason and setting, for the table of decisions."""
        rows, found = self._distinct(), dict[_Part, int]()
        total = sum(row.parameter.numel() for row in rows)
        for row in rows:
            if row.part != _FREE:
                found[row.part] = found.get(row.part, 0) + row.parameter.numel()
        said = []
        for part, count in found.items():
            state = "frozen" if part.begin is None else f"learns from {_when(part.begin)}"
            rate = f", at {part.rate_scale:g} × the rate" if part.begin is not None and part.rate_scale != 1 else ""
            reason = f"{count:,} of {total:,} parameters ({count / total:.1%})"
            said.append(("freeze", f"{part.label}: {state}{rate}", reason, "freeze"))
        if self.settings.head is None and self.settings.is_all_but_head:
            said.append(("head", str(self.head), "the last linear layer", "freeze.head"))
        if self.settings.layer_decay is not None:
            low = min(row.rate_scale for row in rows)
            reason = f"from {low:.2g} × the rate in the first layer to 1 × in the last"
            said.append(("layer-wise rates", f"{self.settings.layer_decay:g} a layer", reason, "freeze.layer_decay"))
        return said


def _map_row(name: str, module: nn.Module, own: list[_Row], at: tuple[int, int]) -> dict[str, Json]:
    states = {_is_due(row.begin, at) for row in own}
    scales, begins = {row.rate_scale for row in own}, {row.begin for row in own}
    return {
        "name": name or "(model)",
        "kind": type(module).__name__,
        "depth": name.count(".") + 1 if name else 0,
        "num_parameters": sum(row.parameter.numel() for row in own),
        "learns": "partly" if len(states) > 1 else states.pop(),
        "rate_scale": scales.pop() if len(scales) == 1 and begins != {None} else None,
        "learns_from": _when(begins.pop()) if len(begins) == 1 else None,
        "time_fraction": None,
        "is_cached": False,
    }
