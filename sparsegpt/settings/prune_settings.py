"""How to prune: one frozen value for all choices, what of it a single linear needs, and the named presets.

A preset is a row of defaults; whatever is given explicitly wins over it. The rules of a recipe win over both, for the
linears that they match.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from sparsegpt import solvers  # with torch, once a name of it is used
from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.grid import Grid, parse_grid
from sparsegpt.settings.option import Group, option
from sparsegpt.settings.selection import compile_regex
from sparsegpt.sparsity import BLOCK_SIZE, NM, Sparsity, Unstructured, check_block_size, parse_sparsity

Order = Literal["input", "block", "linear"]
ALLOCATIONS = ("uniform", "owl")
ROTATIONS = ("auto", "off", "values", "stream", "all")
CORRECTIONS = ("error_correction", "residual_correction")
# What decides the last training alone: finished blocks do not depend on it.
DISTILLATION = ("distill", "distill_rate")
# Damping by sample size: this times width / tokens, within this range.
DAMPING_PER_SHARE = 0.8
DAMPING_RANGE = (0.001, 0.05)


def _plain(value: Any) -> Any:
    """A setting as JSON holds it."""
    if isinstance(value, solvers.Method):
        return value.name
    return str(value) if isinstance(value, NM | Unstructured | Grid) else value


@dataclass(frozen=True)
class LinearSettings:
    """How one linear is pruned.

    damping: share of the mean diagonal added to the Hessian; None: by sample size, see `damping_for`. block_size:
    columns that share a threshold. quantize: the integers that kept weights are rounded to; quantizer: how, a key of
    QUANTIZERS. error_correction, residual_correction in [0, 1]: share of the upstream drift that a layer is asked to
    undo.
    """

    sparsity: Sparsity = field(
        metadata=option(
            'Pattern "n:m" (keep n of m), or share of zeros: 2:4, 0.5, 50%, 50%/row.', Group.PATTERN, typed=str
        )
    )
    method: "str | solvers.Method" = field(
        default="admm",
        metadata=option(
            "magnitude, wanda, sparsegpt, each also with +refit, admm, or a method of yours as module:name.",
            Group.PATTERN,
            typed=str,
        ),
    )
    damping: float | None = field(
        default=None,
        metadata=option("Share of the mean diagonal added to the Hessian.", Group.PATTERN, unset="by sample size"),
    )
    block_size: int = field(
        default=BLOCK_SIZE,
        metadata=option("Columns that share a threshold (sparsegpt, fractions).", Group.PATTERN),
    )
    quantize: Grid | None = field(
        default=None,
        metadata=option(
            "Round kept weights to integers: int4, int8, int3, int4:32 (weights a scale), int8:row, or none.",
            Group.PATTERN,
            typed=str,
            unset="none",
        ),
    )
    quantizer: str = field(
        default="gptq",
        metadata=option(
            "How: gptq (in the solver), rtn (to nearest) or awq (to nearest, inputs scaled).", Group.PATTERN
        ),
    )
    error_correction: float = field(
        default=0.0,
        metadata=option("Share of upstream errors that each layer undoes, 0 to 1.", Group.RECOVERY),
    )
    residual_correction: float = field(
        default=0.0,
        metadata=option("Share of the residual stream's drift that projections undo, 0 to 1.", Group.RECOVERY),
    )

    def __post_init__(self) -> None:
        method = solvers.parse_method(self.method)
        if self.damping is not None and not 0 <= self.damping < math.inf:
            raise SparseGPTError(
                f"damping {self.damping:g} is out of range: expected a share of the mean diagonal, like 0.01"
            )
        check_block_size(self.block_size, self.sparsity)
        if self.rounding is not None:
            self.rounding.grid.check(self.sparsity)
        for name in CORRECTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise SparseGPTError(f"{name.replace('_', ' ')} {getattr(self, name):g} must lie between 0 and 1")
        if self.corrects and not method.updates_weights:
            raise SparseGPTError(
                f"method {method.name!r} never updates weights, so it cannot correct errors; "
                f"use {method.name}+refit, sparsegpt or admm, or set both corrections to 0"
            )

    def damping_for(self, width: int, tokens: int) -> float:
        """The damping of a Hessian of `width` inputs estimated from `tokens` tokens.

        Unless one is set, it grows with width / tokens, as the sampling error of the Hessian does.
        """
        if self.damping is not None:
            return self.damping
        low, high = DAMPING_RANGE
        return min(high, max(low, DAMPING_PER_SHARE * width / tokens))

    @property
    def rounding(self) -> "solvers.Rounding | None":
        """How kept weights become integers; None where they do not. Raises SparseGPTError for an unknown quantizer."""
        return solvers.Rounding.of(self.quantize, self.quantizer)

    @property
    def corrects(self) -> bool:
        """Whether a layer's target differs from its dense weight."""
        return self.error_correction > 0 or self.residual_correction > 0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, the pattern and a method of one's own as text."""
        return {setting.name: _plain(getattr(self, setting.name)) for setting in fields(self)}

    @property
    def method_name(self) -> str:
        """What reports call the method."""
        return str(_plain(self.method))


@dataclass(frozen=True)
class Rule:
    """A rule of a recipe: what it changes for linears in whose full names the regex `modules` is found.

    changes: fields of LinearSettings. skip: leave the linears dense, or take them up again; None: as it was.
    origin: where the rule was read, for messages.
    """

    modules: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    skip: bool | None = None
    origin: str = field(default="recipe", compare=False)

    def __post_init__(self) -> None:
        compile_regex(self.modules, "modules =")
        LinearSettings(**{"sparsity": Unstructured(0), **self.changes})  # each value alone, and all of them together

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the linear of this full name."""
        return compile_regex(self.modules, "modules =").found_in(name)

    def __str__(self) -> str:
        return ", ".join(f"{key} = {value!r}" for key, value in self.as_dict().items())

    def as_dict(self) -> dict[str, Any]:
        """The rule as it was read, in plain data."""
        skip = {} if self.skip is None else {"skip": self.skip}
        return {"modules": self.modules, **skip, **{key: _plain(value) for key, value in self.changes.items()}}


@dataclass(frozen=True)
class PruneSettings(LinearSettings):
    """Everything that decides the pruned weights, apart from the model and the calibration windows.

    What LinearSettings holds is for every linear that no rule of the recipe changes. order: "input" solves input by
    input, each seeing what is pruned already; "block" is the published order, all linears of a block from one capture;
    "linear" gives every linear a capture and a Hessian of its own (the costly baseline of the benchmark). allocation:
    how a fraction is spread over the blocks. rotate: which bases the model is written in first, see
    driver/rotating.py. reconstruct: epochs of block-wise training of the kept weights.
    look_ahead: dense blocks after a block at whose end its training compares outputs; 0: at its own. distill: epochs
    of training the kept weights of all blocks together on the dense model's predictions. learning_rate, distill_rate:
    Adam's, of the two trainings. recipe: rules for single linears, see `recipe.choose`. asked: names of the settings
    that were given, rather than taken from a preset.
    """

    order: Order = "input"
    allocation: str = field(
        default="uniform",
        metadata=option("How a fraction is spread over the blocks: uniform or owl (by outliers).", Group.PATTERN),
    )
    rotate: str = field(
        default="off",
        metadata=option(
            "Bases in which pruning costs less, merged into the weights: off, values, stream, all, or auto (all that "
            "does not untie a head of some size).",
            Group.PATTERN,
        ),
    )
    reconstruct: int = field(
        default=0, metadata=option("Epochs of block-wise training of the kept weights.", Group.RECOVERY)
    )
    look_ahead: int = field(
        default=0,
        metadata=option("The training compares outputs so many dense blocks further on.", Group.RECOVERY),
    )
    learning_rate: float = field(
        default=5e-4, metadata=option("Learning rate of the block-wise training.", Group.RECOVERY)
    )
    distill: int = field(
        default=0,
        metadata=option("Epochs of training all kept weights on the dense model's predictions.", Group.RECOVERY),
    )
    distill_rate: float = field(default=1e-4, metadata=option("Learning rate of the distillation.", Group.RECOVERY))
    recipe: tuple[Rule, ...] = field(
        default=(),
        metadata=option(
            "TOML file with rules for single layers: sparsity, method, skip and more.",
            Group.SELECTION,
            typed=Path,
            unset="no rules",
        ),
    )
    asked: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in get_args(Order):
            raise unknown("order", self.order, get_args(Order))
        if self.rotate not in ROTATIONS:
            raise unknown("rotate", self.rotate, ROTATIONS, settings=("rotate",))
        if self.allocation not in ALLOCATIONS:
            raise unknown("allocation", self.allocation, ALLOCATIONS)
        if self.allocation != "uniform" and (isinstance(self.sparsity, NM) or self.sparsity.per_row):
            raise SparseGPTError(
                f"allocation {self.allocation!r} needs a fraction of the layer, such as 0.5: "
                f"{self.sparsity} fixes the share of every group or row"
            )
        if "quantizer" in self.asked and self.values_of("quantize") == {None}:
            raise SparseGPTError(
                "a quantizer rounds to integers: say which, or leave it out", settings=("quantize", "quantizer")
            )
        if self.reconstruct < 0 or not 0 < self.learning_rate < math.inf:
            raise SparseGPTError("reconstruction needs a number of epochs >= 0 and a learning rate above 0")
        if self.distill < 0 or not 0 < self.distill_rate < math.inf:
            raise SparseGPTError("distillation needs a number of epochs >= 0 and a rate above 0")
        if self.look_ahead < 0:
            raise SparseGPTError(f"look-ahead {self.look_ahead} must be a number of blocks >= 0")
        if "look_ahead" in self.asked and self.look_ahead and not self.reconstruct:
            raise SparseGPTError(
                "look-ahead is where training block by block compares outputs: give its epochs too, or leave it out",
                settings=("reconstruct", "look_ahead"),
            )
        if "learning_rate" in self.asked and not self.reconstruct:
            raise SparseGPTError(
                "a learning rate is for training block by block: give its epochs too, or leave the rate out",
                settings=("reconstruct", "learning_rate"),
            )
        if "distill_rate" in self.asked and not self.distill:
            raise SparseGPTError(
                "a distillation rate is for training the whole model: give its epochs too, or leave the rate out",
                settings=("distill", "distill_rate"),
            )
        if not all(isinstance(rule, Rule) for rule in self.recipe):
            raise SparseGPTError("a recipe is a tuple of rules: recipe.read_recipe(path) reads them from a file")

    @property
    def needs_dense_stream(self) -> bool:
        """Whether the dense model's activations are carried along: some linear may be corrected, or all are trained."""
        return any(max(self.values_of(share)) > 0 for share in CORRECTIONS) or self.reconstruct + self.distill > 0

    def values_of(self, name: str) -> set[Any]:
        """What the run, and any rule of its recipe, says for a field of LinearSettings."""
        return {getattr(self, name), *(rule.changes[name] for rule in self.recipe if name in rule.changes)}

    def as_dict(self) -> dict[str, Any]:
        """Plain data of all that decides the result, without the recipe, which a report tells apart."""
        return {name: value for name, value in super().as_dict().items() if name not in ("recipe", "asked")}


# The corrections and the damping are tuned at 2:4 on a 15M- and a 135M-parameter Llama (BENCHMARKS.md).
_CORRECTED = {"method": "admm", "rotate": "auto", "error_correction": 0.5, "residual_correction": 0.75}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"method": "sparsegpt", "order": "block", "damping": 0.01},
    "fast": {"method": "admm", "rotate": "auto", "order": "block"},
    "default": _CORRECTED,
    "best": {**_CORRECTED, "reconstruct": 3, "look_ahead": 3, "distill": 8},
}


def resolve_settings(sparsity: "str | float | Sparsity", preset: str = "default", **explicit: Any) -> PruneSettings:
    """Settings of a preset with the explicit ones (those not None) on top.

    Raises SparseGPTError for an unknown preset or values that contradict each other.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    pattern = parse_sparsity(sparsity)  # before the solvers load: a slip is answered at once
    given = {key: value for key, value in explicit.items() if value is not None}
    defaults = dict(PRESETS[preset])
    if not solvers.parse_method(given.get("method", defaults["method"])).updates_weights:
        # A method that moves no weight has nothing to correct with: the preset's corrections do not apply to it.
        for share in CORRECTIONS:
            defaults.pop(share, None)
    if "quantize" in given:
        given["quantize"] = parse_grid(given["quantize"])
    return PruneSettings(pattern, **{**defaults, **given, "asked": tuple(sorted(given))})


def without_residual_correction(settings: PruneSettings, reason: str) -> tuple[PruneSettings, list[str]]:
    """Settings for a model whose stream cannot be corrected for this reason, and what to tell; "" is no reason.

    Raises SparseGPTError when residual correction was asked for, and not merely a preset's default.
    """
    if not reason or not max(settings.values_of("residual_correction")):
        return settings, []
    refusal = f"residual correction is not possible in this model: {reason}"
    if "residual_correction" in settings.asked:
        raise SparseGPTError(f"{refusal}; leave it out or set it to 0", settings=("residual_correction",))
    if any(rule.changes.get("residual_correction") for rule in settings.recipe):
        raise SparseGPTError(f"{refusal}; leave residual_correction out of the recipe or set it to 0")
    return replace(settings, residual_correction=0.0), [f"{refusal}; it is off, and errors are corrected without it"]
