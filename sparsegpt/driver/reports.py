"""What the driver tells about its work, as plain values, and who is told: by default nobody."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from sparsegpt.counting import StepReport
from sparsegpt.driver.accounting import Accounting
from sparsegpt.driver.verification import Agreement
from sparsegpt.settings.prune_settings import LinearSettings, PruneSettings

# Of a prune, each with its seconds.
PARTS = ("rotate", "verify", "capture", "solve", "reconstruct", "distill")


@dataclass(frozen=True)
class LayerReport:
    """One pruned linear.

    sparsity: the pattern asked for; method: how it was solved; zeros: the share of zeros of the weight as it is stored;
    relative_error: ||(W - W')X||^2 / ||WX||^2 on the inputs of the pruned model; damping: what the Hessian needed;
    tokens: calibration tokens that reached it. grid: the integers that its weights lie on, and
    bits: of a weight in the smaller of two forms, dense or packed without its zeros; None where there is no grid.
    Of an expert that too few reached, relative_error is ||W - W'||^2 / ||W||^2.
    """

    name: str
    shape: tuple[int, int]
    sparsity: str
    method: str
    zeros: float
    relative_error: float
    damping: float
    tokens: int
    seconds: float
    grid: str | None = None
    bits: float | None = None


@dataclass(frozen=True)
class BlockReport:
    """One finished block: its index, how many linears were pruned, their mean relative error, wall seconds.

    reconstruction: held-out loss after block-wise training as a share of the loss before; None without training.
    losses: this loss before the first epoch and after each.
    """

    index: int
    blocks: int
    linears: int
    relative_error: float
    seconds: float
    reconstruction: float | None = None
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class EpochReport:
    """One epoch of distillation, of so many: the held-out divergence from the dense model, in nats a token.

    Epoch 0 is before the first.
    """

    epoch: int
    epochs: int
    loss: float


@dataclass(frozen=True)
class RotationReport:
    """What writing the model in other bases has brought.

    stream, values: the mean share of what a row's weights are worth that the pattern drops, before and after; None
    where that basis is the model's own. blocks: those whose values have a basis of their own. untied_parameters: of the
    head that has parted from the embedding.
    """

    stream: tuple[float, float] | None
    values: tuple[float, float] | None
    blocks: int
    untied_parameters: int

    def __bool__(self) -> bool:
        return bool(self.turned)

    @property
    def turned(self) -> str:
        """What has a basis of its own, in words; "" for nothing."""
        parts = {"the residual stream": self.stream is not None, f"the values of {self.blocks} blocks": self.blocks > 0}
        return ", ".join(part for part, is_so in parts.items() if is_so)


@dataclass
class PruneReport:
    """What `prune_model` returns: one LayerReport a linear, one BlockReport a block, and where the time went.

    epochs: of distillation, epoch 0 among them; empty without it. choices: what the settings and the recipe say of each
    selected linear; None: left dense. parameters: every weight of the model in one of three lists. verification:
    "before" and "after", how far blocks run one by one agree with the whole model. rotation: None without it.
    """

    settings: PruneSettings
    layers: list[LayerReport] = field(default_factory=list)
    blocks: list[BlockReport] = field(default_factory=list)
    epochs: list[EpochReport] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    warnings: list[str] = field(default_factory=list)
    choices: dict[str, LinearSettings | None] = field(default_factory=dict)
    parameters: Accounting = field(default_factory=Accounting)
    verification: dict[str, Agreement] = field(default_factory=dict)
    rotation: RotationReport | None = None

    def begin(self, settings: PruneSettings, choices: dict[str, LinearSettings | None], notes: tuple[str, ...]) -> None:
        """Take up what is to be done; a report may know finished blocks already."""
        self.settings, self.choices = settings, choices
        self.warnings += [note for note in notes if note not in self.warnings]

    def recount(self, weights: Mapping[str, Tensor]) -> None:
        """Count the zeros of these linears anew, weights [R, C] by full name: training has changed them."""
        self.layers[:] = [
            replace(layer, zeros=share_of_zeros(weights[layer.name])) if layer.name in weights else layer
            for layer in self.layers
        ]

    @property
    def density(self) -> float:
        """Share of non-zero weights in the pruned linears."""
        sizes = [layer.shape[0] * layer.shape[1] for layer in self.layers]
        kept = sum((1 - layer.zeros) * size for layer, size in zip(self.layers, sizes, strict=True))
        return kept / sum(sizes)

    @property
    def bits(self) -> float | None:
        """Bits of a weight of the pruned linears that are on grids, in the mean; None without any."""
        sized = [(layer.bits, layer.shape[0] * layer.shape[1]) for layer in self.layers if layer.bits is not None]
        return sum(bits * size for bits, size in sized) / sum(size for _, size in sized) if sized else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for report.json."""
        return {
            "sparsity": str(self.settings.sparsity),
            "method": self.settings.method_name,
            "settings": self.settings.as_dict(),
            "recipe": self._recipe() if self.settings.recipe else None,
            "density_of_pruned_linears": self.density,
            "bits_per_weight": self.bits,
            "parameters": self.parameters.as_dict(),
            "rotation": None if self.rotation is None else asdict(self.rotation),
            "layers": [asdict(layer) for layer in self.layers],
            "blocks": [asdict(block) for block in self.blocks],
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "verification": {when: asdict(found) for when, found in self.verification.items()},
        }

    def _recipe(self) -> dict[str, Any]:
        """The rules as read, and what they come to: each choice of settings once, with the linears it applies to."""
        linears: dict[LinearSettings | None, list[str]] = {}
        for name, choice in self.choices.items():
            linears.setdefault(choice, []).append(name)
        return {
            "rules": [rule.as_dict() for rule in self.settings.recipe],
            "resolved": [
                {**(choice.as_dict() if choice else {"skip": True}), "linears": names}
                for choice, names in linears.items()
            ],
        }


class Listener:
    """Override what you want to hear: this one listens in silence."""

    def rotated(self, report: RotationReport) -> None:
        """The model is written in bases in which less is dropped; none where its own are best."""

    def layer(self, report: LayerReport) -> None:
        """One linear is pruned."""

    def block(self, report: BlockReport) -> None:
        """One decoder block is finished."""

    def epoch(self, report: EpochReport) -> None:
        """One epoch of distillation is finished."""

    def step(self, report: StepReport) -> None:
        """A part of the work that is counted begins, or has got one further."""


def share_of_zeros(weight: Tensor) -> float:
    """[R, C] -> the share of weights that are exactly zero."""
    return float((weight == 0).sum()) / weight.numel()
