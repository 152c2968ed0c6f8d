"""A training as a plain PyTorch script: what a recipe asks for and nothing else, from the data to the best checkpoint.

The script is put together from functions whose sources it holds (``ejected``, and the models' own), and from a few
blocks that the recipe chooses between. Before it is given away it is tried beside the run that it stands for: the same
samples in each split, the same batches, the same first weights, the same groups of parameters.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from textwrap import indent
from typing import Any

from torch import nn

from .. import gradients
from ..files import write_durable
from ..generators import kept_generators
from ..model.build import BUILT_IN, NO_WEIGHTS, LinearInUnits
from ..model.freeze import evaluating
from ..model.heads import find_head
from ..model.hub import is_hub_name
from ..training.prepare import Prepared
from ..training.recipe import Recipe
from ..usercode import is_reference, read_reference
from . import ejected
from .ejecting import NUMBERED, Place, Reading, quoted, reading_of, refused
from .sourcing import imports_of, written_out
from .tried import frozen_by_step, rates_of, try_script

_FEW = 256  # samples, up to which an order is a sort
_WIDTH, _JOINED = 120, 96  # signs of a line, and of one of several constants
_ALIASES = (
    "Array = np.ndarray[Any, Any]", "Columns = dict[str, Any]", "Seen = list[tuple[Tensor, Tensor]]",
    "F32 = np.ndarray[Any, np.dtype[np.float32]]",
)  # fmt: skip
_PLAINER = dict.fromkeys((f"{alias}\n" for alias in _ALIASES), "") | {
    "x: Any) -> Any": "x: np.ndarray) -> np.ndarray", "Array": "np.ndarray", "Columns": "dict", "Seen": "list",
    "F32": "np.ndarray",
}  # fmt: skip
_PARTED = ("matrices, others = [p for p in learning if p.ndim > 1], [p for p in learning if p.ndim < 2]",)
_MEAN = 'f"{split}/loss": total / count'
_SHORT = {
    "accuracy": "sum(int((o.argmax(1) == t).sum()) for o, t in seen) / size",
    "mean_absolute_error": "float(sum((o - t).abs().sum() for o, t in seen)) / size",
}
_TOP = "sum(int((o.topk(min({0}, o.shape[1]), 1).indices == t.unsqueeze(1)).sum()) for o, t in seen) / size"
_PAIRS = {")": "(", "]": "[", "}": "{"}


def write_script(prepared: Prepared, recipe: Recipe, base: Path, output: Path) -> Path:
    """Write the training that was prepared as a script, and beside it, as tables, what code has given of its data.

    Raises:  SettingsError for what no short script can do, before anything is written; StorageError
    """
    _check_possible(prepared, recipe)
    script = _Script(prepared, recipe, base, output)
    text, beside = script.text(), script.reading.beside
    try_script(text, output, beside, prepared)
    for name, data in beside.items():
        write_durable(output.with_name(name), data)
    write_durable(output, text.encode())
    return output


def _check_possible(prepared: Prepared, recipe: Recipe) -> None:
    """Raises:  SettingsError naming the setting that a script cannot follow"""
    train, data, freeze, objective = recipe.train, recipe.data, recipe.freeze, prepared.objective.name
    odd = {
        "data.weights": data.weights, "data.on_bad": data.on_bad if data.on_bad != "raise" else None,
        "train.mixup": train.mixup, "train.cutmix": train.cutmix, "train.train_metrics": train.train_metrics,
        "train.precision": prepared.precision if prepared.precision == "fp16" else None,
        "freeze.adapters": freeze is not None and freeze.adapters, "seed": recipe.seed if recipe.seed < 0 else None,
        "model.name": recipe.model.name if is_hub_name(recipe.model.name) else None,
        "train.loss": objective if objective not in ("cross_entropy", "mse") else None,
        "data.split_by": data.split_by if data.valid_fraction and ":" in data.split_by else None,
    }  # fmt: skip
    for where, got in odd.items():
        if got:
            raise refused("a recipe without it", where, got, "torchkeep train does it")
    with kept_generators(), evaluating(prepared.work.model), gradients.none_needed():
        output = prepared.forward(prepared.mover(prepared.example))
    if getattr(output, "ndim", 0) != 2:
        raise refused("a model that gives one tensor (B, K)", "model.name", getattr(output, "shape", type(output)))
    report = prepared.work.built.report if prepared.work.built is not None else None
    if report is not None and (report.found or Path(report.source).suffix not in (".pth", ".pt", ".safetensors")):
        raise refused("a file of tensors under the model's own names", "model.weights", report.source)


class _Script:
    """The script of one training, block by block."""

    def __init__(self, prepared: Prepared, recipe: Recipe, base: Path, output: Path):
        self.prepared, self.recipe, self.base = prepared, recipe, base
        self.place, self.work, self.train = Place(output, base), prepared.work, recipe.train
        self.reading: Reading = reading_of(prepared.work, recipe, self.place)
        self.target, self.is_regression = prepared.binding.targets[0], prepared.objective.name == "mse"
        self.frozen, self.rates = frozen_by_step(prepared), rates_of(prepared)
        self.is_divided = recipe.data.valid_fraction is not None and not self.reading.is_split
        self.shuffle: Any = ejected.shuffled_few if len(prepared.work.train) <= _FEW else ejected.shuffled
        if self.reading.augments and not self.reading.has_buckets:  # the losses differ anyway: NumPy's order is shorter
            self.shuffle = None
        self.factor = recipe.optimizer.schedule != "constant" or bool(recipe.optimizer.warmup)
        self.is_own_optimizer = is_reference(recipe.optimizer.name)
        self.is_own_model, self.is_dropping = is_reference(recipe.model.name), recipe.data.last == "drop"
        self.is_averaged = bool(self.train.ema or self.train.swa)

    def text(self) -> str:
        """The script as it is to be written."""
        made, load = self.reading, self._load()
        chance: list[Any] = [] if self.shuffle is None else [self.shuffle]
        chance += [ejected.bucketed] * made.has_buckets + [ejected.split] * self.is_divided
        sections = {
            "chance: a function of the seed": [written_out(chance)],
            "data": [written_out(made.pieces), load, self._make_batch()],
            "model": [written_out(self._model_pieces()), self._make_training()],
            "training": [written_out(self._training_pieces()), self._evaluate(), self._main()],
        }
        blocks = ["\n".join(self._constants())]
        blocks += [
            f"# --- {title}\n" + "\n\n".join(filter(None, parts)) for title, parts in sections.items() if any(parts)
        ]
        body = "\n\n".join([*blocks, 'if __name__ == "__main__":\n    main()']) + "\n"
        for house, plain in _PLAINER.items():
            body = body.replace(house, plain)
        return f"{self._docstring()}\n\n{imports_of(body)}\n\n{body}"

    def _docstring(self) -> str:
        said = "Its losses are those of the run to the last bit, on the same machine with as many threads."
        if self.reading.augments:
            said = "Augmentation is of the same kinds as in the run, but drawn by NumPy, and so is the order."
        elif self.frozen[0] and self.recipe.features.cache != "off":
            said += "\nWhere the run computes the frozen part only once, the last bits may differ."
        return f'"""{self.recipe.name}, trained in plain PyTorch: written by torchkeep eject.\n{said}"""'

    # --- constants

    def _constants(self) -> list[str]:
        optimizer, train = self.recipe.optimizer, self.train
        named = {
            "SEED": self.recipe.seed, "DEVICE": str(self.prepared.device), "EPOCHS": train.epochs,
            "BATCH_SIZE": self.work.batch_size, "ACCUMULATE": train.accumulate if train.accumulate > 1 else None,
            "MAX_STEPS": train.max_steps,
            "LEARNING_RATE": None if self.is_own_optimizer or self.rates else optimizer.learning_rate,
            "WEIGHT_DECAY": None if self.is_own_optimizer else optimizer.weight_decay,
            "CLIP_NORM": train.clip_norm, "EMA": train.ema, "SWA": train.swa,
            "PATIENCE": self.recipe.early_stopping.patience,
        }  # fmt: skip
        lines = [f"{name} = {quoted(value)}" for name, value in named.items() if value is not None]
        lines.append('BEST, LAST = Path(__file__).with_suffix(".best.pt"), Path(__file__).with_suffix(".last.pt")')
        lines += ["HERE = Path(__file__).parent"] if any("HERE / " in row for row in self.reading.constants) else []
        if train.class_weights:
            lines.append(f"CLASS_WEIGHTS = torch.tensor({quoted(train.class_weights)}, device=DEVICE)")
        if self._weights:
            lines.append(f"WEIGHTS = {self.place.named(self._weights)}")
        if self.frozen[0]:
            held = [f"{step}: {quoted(names)}" for step, names in self.frozen.items()]
            lines.append(f"FROZEN = {{{', '.join(held)}}}" if len(held) > 1 else f"FROZEN = {quoted(self.frozen[0])}")
        if self.rates:
            lines.append(f"RATES = {quoted(self.rates)}")
        lines += self.reading.constants
        return [wrapped for line in _joined(lines) for wrapped in _wrapped(line)]

    @property
    def _weights(self) -> str | None:
        weights = self.recipe.model.weights
        return None if weights == NO_WEIGHTS else weights

    # --- data

    def _load(self) -> str:
        made, label = self.reading, f"columns[{quoted(self.reading.label)}]"
        is_whole = not self.is_divided
        lines = [f"{'train' if is_whole else 'columns'} = {made.columns['train']}"]
        if not self.is_regression:
            classes = list(self.work.train.schema[self.target].classes)
            held = label.replace("columns", "train") if is_whole else label
            known = NUMBERED.format(f"set({held}){', key=float' * (classes != sorted(classes))}", "")
            lines.append(f"classes = {known}")
            made.encoded["label"] = f"np.array([classes[name] for name in {label}])"
            made.gives["classes"] = "classes"
        lines += [*self._split(label), *made.learns]
        encoded = ", ".join(f"{quoted(name)}: {value}" for name, value in made.encoded.items())
        lines += ["def encoded(columns: Columns) -> Columns:", f"    return {{{encoded}}}", ""]
        splits = {name: f"encoded({value})" for name, value in self._splits().items()} | made.gives
        lines.append(f"return {{{', '.join(f'{quoted(name)}: {value}' for name, value in splits.items())}}}")
        return _function("load() -> Columns", "The splits as columns, and what the training rows say.", lines)

    def _split(self, label: str) -> list[str]:
        data = self.recipe.data
        if not self.is_divided:
            return []
        by_class = data.split_by == "label" and not self.is_regression
        labels = f"np.array([classes[name] for name in {label}])" if by_class else f"np.zeros(len({label}), int)"
        names = ["train", "valid", *(["test"] if data.test_fraction else [])]
        rows = [f'rows, valid_rows = split({labels}, VALID_FRACTION, SEED, "split")']
        if data.test_fraction:
            rows = [
                f"labels = {labels}", 'rest, test_rows = split(labels, TEST_FRACTION, SEED, "split/test")',
                'rows, valid_rows = split(labels[rest], VALID_FRACTION, SEED, "split")',
                "rows, valid_rows = rest[rows], rest[valid_rows]",
            ]  # fmt: skip
        chosen = ", ".join(["rows", *(f"{name}_rows" for name in names[1:])])
        return [*rows, f"{', '.join(names)} = ({{n: c[part] for n, c in columns.items()}} for part in ({chosen}))"]

    def _splits(self) -> dict[str, str]:
        """The columns of each split."""
        data, read = self.recipe.data, self.reading.columns
        fractions = {"train": 1, "valid": self.is_divided, "test": self.is_divided and data.test_fraction}
        own = {name: name for name, fraction in fractions.items() if fraction}
        return own | {name: value for name, value in read.items() if name != "train"}

    def _make_batch(self) -> str:
        said = (
            "Some rows as the model gets them" + "; changed by chance where an epoch is given." * self.reading.augments
        )
        epoch = ", epoch: int | None = None" * self.reading.augments
        name = f"make_batch(columns: Columns, rows: Array{epoch}) -> Columns"
        return _function(name, said.removesuffix(".") + ".", self.reading.batch)

    # --- model

    def _model_pieces(self) -> list[Any]:
        name = self.recipe.model.name
        wanted: list[Any] = [ejected.load_function] if self.is_own_model or self.is_own_optimizer else []
        wanted += [] if self.is_own_model else [BUILT_IN[name]]
        wanted += [LinearInUnits] if self._in_units else []
        wanted += [ejected.fitting] if self._weights else []
        return wanted + ([ejected.set_frozen] if self.frozen[0] else [ejected.within] if self.rates else [])

    @property
    def _in_units(self) -> str | None:
        """The name of the layer whose outputs are in the target's units."""
        found = (name for name, module in self.work.model.named_modules() if isinstance(module, LinearInUnits))
        return next(found, None)

    def _make_training(self) -> str:
        settings = self.recipe.model
        function = self.work.load(settings.name) if self.is_own_model else BUILT_IN[settings.name]
        outputs = "1" if self.is_regression else 'len(data["classes"])'
        sizes = {**self.reading.sizes, "num_outputs": outputs, "num_classes": outputs}
        known = inspect.signature(function).parameters
        given = {name: value for name, value in sizes.items() if name in known and value != "[]"}
        given |= {name: quoted(value) for name, value in settings.args.items()}
        called = self._loaded(settings.name) if self.is_own_model else function.__name__
        lines = [*self._seeds(), f"model = {called}({', '.join(f'{name}={value}' for name, value in given.items())})"]
        lines += self._new_head(outputs) + self._load_weights()
        if name := self._in_units:
            layer = f'LinearInUnits(model.{name}, data["mean"], data["std"])'
            lines.append(f"model.set_submodule({quoted(name)}, {layer})")
        if self.frozen[0]:
            lines.append(f"set_frozen(model, FROZEN{'[0]' * (len(self.frozen) > 1)})")
        said = "The model as it begins, by the seed, and its optimiser."
        name = "make_training(data: Columns) -> tuple[nn.Module, torch.optim.Optimizer]"
        return _function(name, said, lines + self._optimizer())

    def _seeds(self) -> list[str]:
        own = ["random.seed(SEED)", "np.random.seed(SEED & 0xFFFFFFFF)"] if self.is_own_model else []
        return [*own, "torch.manual_seed(SEED)"]

    def _loaded(self, name: str) -> str:
        reference = read_reference(name, self.base)
        return f"load_function({self.place.named(reference.path)}, {quoted(reference.function)})"

    def _new_head(self, outputs: str) -> list[str]:
        built = self.work.built
        if built is None or not any(row[0] == "head" for row in built.notes):
            return []
        name = find_head(self.work.model, built.head) or ""
        layer = self.work.model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise refused("a linear layer", "model.head", type(layer).__name__)
        bias = "" if layer.bias is not None else ", bias=False"
        return [f"model.set_submodule({quoted(name)}, nn.Linear({layer.in_features}, {outputs}{bias}))"]

    def _load_weights(self) -> list[str]:
        if not self._weights:
            return []
        is_plain = Path(self._weights).suffix == ".safetensors"
        read = "load_file(WEIGHTS)" if is_plain else 'torch.load(WEIGHTS, map_location="cpu", weights_only=True)'
        return [f"model.load_state_dict(fitting(model, {read}), strict=False)"]

    @property
    def _call(self) -> str:
        """The model called with a batch."""
        how = self.prepared.binding.how
        names = [name.rpartition("=") for name in how.removeprefix("a dict of ").split(", ")]
        given = ", ".join(f"{word}{sign}batch[{quoted(name)}]" for word, sign, name in names)
        if how.startswith("a dict of "):
            given = f"{{{', '.join(f'{quoted(name)}: batch[{quoted(name)}]' for _, _, name in names)}}}"
        return f"model({given}){'.squeeze(-1)' if self.is_regression else ''}"

    def _forward(self) -> list[str]:
        """From a batch to its loss."""
        lines = [f'output, target = {self._call}, batch["{self.target}"]']
        if len(lines[0]) > _WIDTH - 12:
            lines = [f"output = {self._call}", f'target = batch["{self.target}"]']
        if self.prepared.precision == "bf16":
            cast = "with torch.autocast(torch.device(DEVICE).type, torch.bfloat16):"
            lines = [cast, *(f"    {line}" for line in lines), "output = output.float()"]
        return [*lines, f"loss = {self._loss()}"]

    # --- training

    def _training_pieces(self) -> list[Any]:
        names = [name for name in self._metrics if name not in _SHORT and not name.startswith("top")]
        metrics = [getattr(ejected, name) for name in names]
        settings = self.recipe.optimizer
        schedule: list[Any] = [ejected.warmed_up] if settings.warmup else []
        schedule = [ejected.one_cycle] if settings.schedule == "one_cycle" else schedule
        averages = [ejected.join] if self.train.swa else []
        return list(dict.fromkeys([*schedule, *averages, *metrics]))

    def _loss(self) -> str:
        if self.is_regression:
            divided = ' / data["std"] ** 2' if self.work.train.schema[self.target].std != 1.0 else ""
            return f"F.mse_loss(output, target){divided}"
        weight = ", CLASS_WEIGHTS" if self.train.class_weights else ""
        smoothing = f", label_smoothing={self.train.label_smoothing}" if self.train.label_smoothing else ""
        return f"F.cross_entropy(output, target{weight}{smoothing})"

    def _optimizer(self) -> list[str]:
        settings, groups = self.recipe.optimizer, self.prepared.optimizers.main.param_groups
        if self.is_own_optimizer:
            return [f"return model.to(DEVICE), {self._loaded(settings.name)}(model)"]
        plain = type(settings)()
        kind, keys = {"adamw": ("AdamW", ("betas", "eps")), "sgd": ("SGD", ("momentum", "nesterov"))}[settings.name]
        given = [f"{key}={quoted(getattr(settings, key))}" for key in keys
                 if getattr(settings, key) != getattr(plain, key) or key == "momentum"]  # fmt: skip
        given += ["fused=True"] if groups[0].get("fused") else []
        if self.rates:
            return self._groups_by_rate(f"return model.to(DEVICE), torch.optim.{kind}({', '.join(['groups', *given])})")
        given.insert(0, "lr=LEARNING_RATE")
        learning = "[p for p in model.parameters() if p.requires_grad]"
        if len(groups) == 1:
            decay = "WEIGHT_DECAY" if groups[0]["weight_decay"] else "0.0"
            given.insert(1, f"weight_decay={decay}")
            return [
                f"learning = {learning}",
                f"return model.to(DEVICE), torch.optim.{kind}(learning, {', '.join(given)})",
            ]
        return [
            f"learning = {learning}", *_PARTED,
            'groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]',
            f"return model.to(DEVICE), torch.optim.{kind}(groups, {', '.join(given)})",
        ]  # fmt: skip

    def _groups_by_rate(self, made: str) -> list[str]:
        settings, row = self.recipe.optimizer, '{{"params": {0}, "lr": rate, "initial_lr": rate, "weight_decay": {1}}}'
        rows = [row.format("learning", "WEIGHT_DECAY")]
        is_parted = settings.decay == "matrices" and settings.weight_decay > 0
        if is_parted:
            rows = [row.format("matrices", "WEIGHT_DECAY"), row.format("others", "0.0")]
        return [
            "groups = []", "for rate, names in RATES:",
            "    learning = [p for name, p in model.named_parameters() if within(name, names)]",
            *(f"    {line}" for line in _PARTED if is_parted), *(f"    groups.append({one})" for one in rows),
            *(['groups = [group for group in groups if group["params"]]'] if is_parted else []), made,
        ]  # fmt: skip

    @property
    def _metrics(self) -> list[str]:
        return [name for name in self.train.metrics if name != "loss"]

    def _evaluate(self) -> str:
        number = "float(CLASS_WEIGHTS[target].sum())" if self.train.class_weights else "len(target)"
        short = {name: _TOP.format(name[3:]) for name in self._metrics if name.startswith("top")} | _SHORT
        measured = [f'f"{{split}}/{name}": {short.get(name, f"{name}(seen)")}' for name in self._metrics]
        size = f'len(data[split]["{self.target}"])'
        lines = [
            "model.eval()", f"total, count, seen, size = 0.0, 0, [], {size}",
            "for rows in np.split(np.arange(size), range(BATCH_SIZE, size, BATCH_SIZE)):",
            "    batch = make_batch(data[split], rows)", *(f"    {line}" for line in self._forward()),
            f"    total, count = total + float(loss) * {number}, count + {number}",
            *(["    seen.append((output, target))"] if measured else []),
            f"return {{{', '.join([_MEAN, *measured])}}}",
        ]  # fmt: skip
        name = "evaluate(model: nn.Module, data: Columns, split: str) -> Columns"
        return "@torch.no_grad()\n" + _function(name, "The mean loss and the metrics of a split.", lines)

    def _main(self) -> str:
        begin: list[str] = []
        begin += [f"torch.set_num_threads({self.train.threads})"] if self.train.threads else []
        begin += ["torch.use_deterministic_algorithms(True)"] if self.train.deterministic else []
        begin += ["data = load()", "model, optimizer = make_training(data)"]
        begin += ["frozen = FROZEN[0]"] if len(self.frozen) > 1 else []
        begin += ["averaged = copy.deepcopy(model)"] if self.is_averaged else []
        begin += [*self._seeds()[:-1], "torch.manual_seed(SEED)  # what dropout draws from"]
        begin += ['lengths = data["train"]["length"]'] if self.reading.has_buckets else []
        worst = "-math.inf" if self.prepared.best_mode == "max" else "math.inf"
        begin += [f'size, step, best = len(data["train"]["{self.target}"]), 0, {worst}']
        if self.factor:
            batches = "size // BATCH_SIZE" if self.is_dropping else "-(-size // BATCH_SIZE)"
            steps = f"-(-({batches}) // ACCUMULATE)" if self.train.accumulate > 1 else f"({batches})"
            whole = f"EPOCHS * {steps}"
            begin += [f"total_steps = {f'min(MAX_STEPS, {whole})' if self.train.max_steps else whole}"]
        begin += self._stopping()[0]
        loop = ["for epoch in range(EPOCHS):", *(f"    {line}" for line in [*self._epoch(), *self._after_epoch()])]
        said = "Train; the losses and metrics of each epoch are printed as a line of JSON."
        return _function("main() -> None", said, begin + loop + self._test())

    def _epoch(self) -> list[str]:
        order = "np.random.default_rng((SEED, epoch)).permutation(size)"
        if self.shuffle is not None:
            order = f"{self.shuffle.__name__}(SEED, epoch, size)"
        if self.reading.has_buckets:
            order = f"bucketed(SEED, epoch, {order}, lengths, BATCH_SIZE)"
        modes = "model.train()" if not self.frozen[0] else "set_frozen(model, FROZEN)"
        lines = [
            modes if len(self.frozen) == 1 else "set_frozen(model, frozen)",
            f"order, total, count = {order}, 0.0, 0",
        ]
        lines += ["order = order[: size // BATCH_SIZE * BATCH_SIZE]"] if self.is_dropping else []
        step = [*self._before_step(), "optimizer.zero_grad()"]
        batches = "np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE))"
        if self.train.accumulate > 1:
            lines += [f"batches = {batches}", "for first in range(0, len(batches), ACCUMULATE):"]
            step += [
                "group, parts = batches[first : first + ACCUMULATE], []", "num_rows = sum(map(len, group))",
                "for rows in group:", *(f"    {line}" for line in [self._batch, *self._forward()]),
                "    loss = loss * len(rows) / num_rows", "    loss.backward()", "    parts.append(loss.detach())",
                "loss = torch.stack(parts).sum()",
            ]  # fmt: skip
        else:
            lines += [f"for rows in {batches}:"]
            step += [self._batch, *self._forward(), "loss.backward()"]
        number = "num_rows" if self.train.accumulate > 1 else "len(rows)"
        step += self._after_step(number)
        return [*lines, *(f"    {line}" for line in step)]

    def _before_step(self) -> list[str]:
        lines = []
        if len(self.frozen) > 1:
            lines += ["if step in FROZEN:", "    set_frozen(model, frozen := FROZEN[step])"]
        if self.factor:
            factor = self._rate_factor
            rate = 'group["initial_lr"]' if self.rates or self.is_own_optimizer else "LEARNING_RATE"
            if self.is_own_optimizer:
                lines += ["for group in optimizer.param_groups:",
                          f'    group["lr"] = group.setdefault("initial_lr", group["lr"]) * {factor}']  # fmt: skip
            else:
                lines += ["for group in optimizer.param_groups:", f'    group["lr"] = {rate} * {factor}']
        return lines

    @property
    def _rate_factor(self) -> str:
        settings = self.recipe.optimizer
        if settings.schedule == "one_cycle":
            return f"one_cycle(step, total_steps, {settings.warmup or 0.3})"
        rise = repr(settings.warmup) if settings.warmup >= 1 else f"{settings.warmup} * total_steps"
        done = f"(step - {rise}) / max(1.0, total_steps - {rise})" if settings.warmup else "step / total_steps"
        factor = {"cosine": f"0.5 * (1.0 + math.cos(math.pi * {done}))", "linear": f"1.0 - {done}"}
        plain = factor.get(settings.schedule, "1.0")
        return f"warmed_up(step, {rise}, {plain})" if settings.warmup else f"({plain})"

    @property
    def _batch(self) -> str:
        return f'batch = make_batch(data["train"], rows{", epoch" if self.reading.augments else ""})'

    def _after_step(self, number: str) -> list[str]:
        parameters = '[p for group in optimizer.param_groups for p in group["params"]]'
        lines = [f"nn.utils.clip_grad_norm_({parameters}, CLIP_NORM)"] if self.train.clip_norm else []
        lines += ["optimizer.step()", *self._follow()]
        lines += [f"step, total, count = step + 1, total + loss.item() * {number}, count + {number}"]
        return lines + (["if step == MAX_STEPS:", "    break"] if self.train.max_steps else [])

    def _follow(self) -> list[str]:
        if not self.train.ema:
            return []
        pairs = "zip(averaged.{0}(), model.{0}(), strict=True)"
        lines = ["with torch.no_grad():", f"    for kept, live in {pairs.format('parameters')}:",
                 "        kept.lerp_(live, 1 - EMA)"]  # fmt: skip
        if any(True for _ in self.work.model.buffers()):
            lines += [f"    for held, now in {pairs.format('buffers')}:", "        held.copy_(now)"]
        return lines

    def _after_epoch(self) -> list[str]:
        lines, judged = [], "averaged" if self.train.ema else "model"
        if self.train.swa:
            lines += ["if epoch + 1 >= SWA:", "    join(averaged, model, 1 / (epoch + 2 - SWA))"]
            judged = "(averaged if epoch + 1 >= SWA else model)"
        metric, better = self.prepared.best_metric, ">" if self.prepared.best_mode == "max" else "<"
        valid = f', **evaluate({judged}, data, "valid")' if metric else ""
        lines += [f'said = {{"epoch": epoch + 1, "train/loss": total / count{valid}}}',
                  "print(json.dumps(said), flush=True)",
                  'torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, LAST)']  # fmt: skip
        if metric:
            waits = self._stops_by_best
            found = f'    best, waited = said["{metric}"], 0' if waits else f'    best = said["{metric}"]'
            save = f"    torch.save({judged}.state_dict(), BEST)"
            lines += [f'if said["{metric}"] {better} best:', found, save]
            lines += ["else:", "    waited += 1", "if waited >= PATIENCE:", "    break"] if waits else []
        lines += self._stopping()[1]
        return lines + (["if step == MAX_STEPS:", "    break"] if self.train.max_steps else [])

    @property
    def _stops_by_best(self) -> bool:
        """Whether early stopping waits for what makes a checkpoint the best."""
        stopper, best = self.prepared.stopper, (self.prepared.best_metric, self.prepared.best_mode)
        return stopper is not None and (stopper.metric, stopper.mode, stopper.min_delta, stopper.warmup) == (
            *best,
            0,
            0,
        )

    def _stopping(self) -> tuple[list[str], list[str]]:
        """What early stopping begins with, and what it does after an epoch."""
        stopper = self.prepared.stopper
        if stopper is None or self._stops_by_best:
            return ["waited = 0"] if stopper is not None else [], []
        is_max = stopper.mode == "max"
        delta = f" {'+' if is_max else '-'} {stopper.min_delta}" if stopper.min_delta else ""
        waits = f"elif epoch + 1 > {stopper.warmup}:" if stopper.warmup else "else:"
        return [f"waited, watched = 0, {'-' * is_max}math.inf"], [
            f'if said["{stopper.metric}"] {">" if is_max else "<"} watched{delta}:',
            f'    waited, watched = 0, said["{stopper.metric}"]', waits, "    waited += 1",
            "if waited >= PATIENCE:", "    break",
        ]  # fmt: skip

    def _test(self) -> list[str]:
        if self.work.test is None:
            return []
        load = "model.load_state_dict(torch.load(BEST, map_location=DEVICE, weights_only=True))"
        said = 'print(json.dumps(evaluate(model, data, "test")))'
        return [load, said] if self.prepared.best_metric else [said]


def _joined(lines: list[str]) -> list[str]:
    """Constants, as many numbers and names on a line as are easily read."""
    rows: list[tuple[str, str]] = []
    for line in lines:
        name, _, value = line.partition(" = ")
        joined = (f"{rows[-1][0]}, {name}", f"{rows[-1][1]}, {value}") if rows else ("", "")
        if rows and sum(map(len, joined)) < _JOINED and "(" not in joined[1]:
            rows[-1] = joined
        else:
            rows.append((name, value))
    return [f"{name} = {value}" for name, value in rows]


def _function(head: str, said: str, lines: list[str]) -> str:
    body = "\n".join([f'"""{said}"""', *(wrapped for line in lines for wrapped in _wrapped(line, 4))])
    return f"def {head}:\n{indent(body, '    ')}"


def _wrapped(line: str, margin: int = 0) -> list[str]:
    """A line; one that is too long with what its last bracket holds on lines of their own."""
    start, room = len(line) - len(line.lstrip()), _WIDTH - margin
    cuts, opened = _cuts(line) if len(line) > room and line[-1] in _PAIRS else ([], 0)
    if not cuts:
        return [line]
    rows = [""]
    for begin, end in zip([opened, *cuts], [*cuts, len(line) - 2], strict=True):
        item = f"{line[begin + 1 : end + 1].strip().rstrip(',')},"
        if rows[-1] and len(rows[-1]) + len(item) + start + 5 > room:
            rows.append("")
        rows[-1] += f" {item}" if rows[-1] else item
    return [line[: opened + 1], *(f"{' ' * (start + 4)}{row}" for row in rows), " " * start + line[-1]]


def _cuts(line: str) -> tuple[list[int], int]:
    """Where the commas stand within the bracket that a line ends with, and where it opens."""
    depth, quote, stack = 0, "", list[int]()
    found: dict[int, list[int]] = {}
    for place, sign in enumerate(line):
        if quote:
            quote = "" if sign == quote and line[place - 1] != "\\" else quote
        elif sign in "\"'":
            quote = sign
        elif sign in _PAIRS.values():
            stack.append(place)
            found[place] = []
        elif sign in _PAIRS:
            depth = stack.pop()
        elif sign == "," and stack:
            found[stack[-1]].append(place)
    return found[depth], depth
