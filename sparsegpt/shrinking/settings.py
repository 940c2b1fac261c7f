"""How a model is made smaller, each setting written once: name, type, default and help."""

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Any

from sparsegpt.errors import SparseGPTError, unknown
from sparsegpt.settings.option import Group, option

SIZE, METHOD, RECOVERY = Group.PATTERN, Group.PATTERN, Group.RECOVERY
BUDGETS = ("keep", "parameters", "size", "speedup")
PARTS = ("heads", "channels", "experts", "blocks")
METHODS = ("obs", "wanda", "magnitude", "random")  # rows of rankings.RANKINGS
# Those whose kept weights move to make up for what has left.
UPDATES = frozenset({"obs"})
DEPTHS = ("divergence", "similarity")
CHOICES = ("even", "divergence")
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGB]?)(?:i?B)?", re.I)


@dataclass(frozen=True)
class Amount:
    """How many of something are kept: a count, or a share of them."""

    text: str
    count: int | None = None
    share: float | None = None

    def of(self, full: int) -> int:
        """The number kept of so many, one at least."""
        return self.count if self.count is not None else max(1, round(full * (self.share or 0)))


def parse_amount(text: str, setting: str) -> Amount:
    """Turn "75%" or "0.75" into a share, "6" into a count. Raises SparseGPTError for anything else, 0 among it."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", str(text))
    value = float(found[1]) / (100 if found[2] else 1) if found else math.nan
    if found and not found[2] and "." not in found[1] and value >= 1:
        return Amount(str(text), count=int(value))
    if not 0 < value <= 1:
        raise SparseGPTError(
            f"{setting} {text!r}: expected what is kept of them, a share above 0 such as 75% or 0.75, or a number",
            settings=(setting,),
        )
    return Amount(str(text), share=value)


def parse_quantity(text: str, setting: str) -> int:
    """Turn "100M", "1.5B", "200MB" or "123456" into a number. Raises SparseGPTError for anything else."""
    found = _QUANTITY.fullmatch(str(text).strip())
    value = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not value:
        raise SparseGPTError(
            f"{setting} {text!r} is not understood: expected a number such as 100M or 1.5G", settings=(setting,)
        )
    return int(value)


@dataclass(frozen=True)
class ShrinkSettings:
    """Everything that decides the smaller model, apart from the larger one and the calibration windows.

    Of the budgets (keep, parameters, size, speedup) one may be given, of the parts (heads, channels, experts, blocks)
    any; what is given of a part is fixed, and the budget decides the rest. Raises SparseGPTError for values that
    contradict each other.
    """

    keep: str | None = field(
        default=None,
        metadata=option("Share of the decoder blocks' weights that is kept, as 75% or 0.75.", SIZE, unset="no budget"),
    )
    parameters: str | None = field(
        default=None, metadata=option("Parameters of the smaller model, as 100M.", SIZE, unset="no budget")
    )
    size: str | None = field(default=None, metadata=option("Bytes of its weights, as 200MB.", SIZE, unset="no budget"))
    speedup: float | None = field(
        default=None,
        metadata=option("Times as fast on this machine, by a table measured first.", SIZE, unset="no budget"),
    )
    heads: str | None = field(
        default=None,
        metadata=option("Attention heads kept, as 75% or 6; whole key-value groups.", SIZE, unset="by the budget"),
    )
    channels: str | None = field(
        default=None, metadata=option("Channels of the MLPs kept, as 75% or 1152.", SIZE, unset="by the budget")
    )
    experts: str | None = field(
        default=None, metadata=option("Experts of a mixture kept, as 75% or 6.", SIZE, unset="all")
    )
    blocks: str | None = field(default=None, metadata=option("Decoder blocks kept, as 75% or 24.", SIZE, unset="all"))
    multiple: int | None = field(
        default=None,
        metadata=option(
            "Channels that the budget decides are a multiple of this.",
            SIZE,
            minimum=1,
            unset="64, and for narrow models the power of two below a sixteenth of the width",
        ),
    )
    choose: str = field(
        default="even",
        metadata=option("Between heads, channels and blocks: even shares, or by measured divergence.", SIZE),
    )
    method: str = field(
        default="obs",
        metadata=option("Which heads and channels leave: obs, wanda, magnitude or random.", METHOD),
    )
    depth: str = field(
        default="divergence",
        metadata=option("Which blocks leave: by divergence (a search) or similarity (of a block's ends).", METHOD),
    )
    damping: float | None = field(
        default=None,
        metadata=option("Share of the mean diagonal added to the Hessian.", METHOD, unset="by sample size"),
    )
    error_correction: float | None = field(
        default=None,
        metadata=option("Share of upstream errors that each layer undoes, 0 to 1.", RECOVERY, unset="0.5 with obs"),
    )
    residual_correction: float | None = field(
        default=None,
        metadata=option(
            "Share of the residual stream's drift that projections undo, 0 to 1.", RECOVERY, unset="0.75 with obs"
        ),
    )
    reconstruct: int = field(default=0, metadata=option("Epochs of block-wise training.", RECOVERY, minimum=0))
    learning_rate: float = field(default=5e-4, metadata=option("Learning rate of the block-wise training.", RECOVERY))
    distill: int = field(
        default=0, metadata=option("Epochs of training on the dense model's predictions.", RECOVERY, minimum=0)
    )
    distill_rate: float = field(default=1e-4, metadata=option("Learning rate of the distillation.", RECOVERY))

    def __post_init__(self) -> None:
        for name, known in (("method", METHODS), ("depth", DEPTHS), ("choose", CHOICES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known, settings=(name,))
        self._check_size()
        for name in ("error_correction", "residual_correction"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise SparseGPTError(f"{name.replace('_', ' ')} {value:g} must lie between 0 and 1", settings=(name,))
            if value and self.method not in UPDATES:
                raise SparseGPTError(
                    f"method {self.method!r} never updates weights, so it cannot correct errors: use obs, or leave the "
                    "correction out",
                    settings=("method", name),
                )
        if min(self.reconstruct, self.distill) < 0 or not all(
            0 < rate < math.inf for rate in (self.learning_rate, self.distill_rate)
        ):
            raise SparseGPTError("training needs a number of epochs >= 0 and a learning rate above 0")

    def _check_size(self) -> None:
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        parts = [name for name in PARTS if getattr(self, name) is not None]
        if not budgets and not parts:
            raise SparseGPTError(
                "nothing says how small: give a budget, or what is kept of heads, channels or blocks",
                settings=(*BUDGETS, *PARTS),
            )
        if len(budgets) > 1:
            raise SparseGPTError(f"{' and '.join(budgets)} are two budgets: give one of them", settings=budgets)
        if budgets and self.channels is not None:
            raise SparseGPTError(
                f"channels are what the budget ({budgets[0]}) decides: give one of the two",
                settings=(budgets[0], "channels"),
            )
        if not budgets and self.choose != "even":
            raise SparseGPTError("without a budget there is nothing to choose: give one", settings=("choose", *BUDGETS))
        if self.keep is not None and parse_amount(self.keep, "keep").share is None and str(self.keep) != "1":
            raise SparseGPTError(f"keep {self.keep}: expected a share, as 75% or 0.75", settings=("keep",))
        for name in ("parameters", "size"):
            if getattr(self, name) is not None:
                parse_quantity(getattr(self, name), name)
        if self.speedup is not None and not 1 < self.speedup < math.inf:
            raise SparseGPTError(f"speedup {self.speedup:g}: expected a number above 1", settings=("speedup",))
        for name in parts:
            parse_amount(getattr(self, name), name)

    def amount(self, part: str) -> Amount | None:
        """What was said of a part, None for nothing."""
        text = getattr(self, part)
        return None if text is None else parse_amount(text, part)

    @property
    def corrections(self) -> tuple[float, float]:
        """Shares of upstream errors and of the stream's drift that are undone."""
        usual = (0.5, 0.75) if self.method in UPDATES else (0.0, 0.0)
        given = (self.error_correction, self.residual_correction)
        error, residual = (default if value is None else value for value, default in zip(given, usual, strict=True))
        return error, residual

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        error, residual = self.corrections
        return {**asdict(self), "error_correction": error, "residual_correction": residual}
