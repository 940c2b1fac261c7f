"""From a budget to shapes: how many heads, channels, experts and blocks a smaller model has.

A budget is a cost of a shape and its limit: parameters, bytes or seconds. Channels can be cut finest, so they take
what the other parts leave of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from sparsegpt.errors import SparseGPTError
from sparsegpt.shrinking.settings import ShrinkSettings, parse_amount, parse_quantity
from sparsegpt.shrinking.shapes import HEADS, Anatomy, Shape

# Widths that are no multiple of this lose speed; narrower models take a power of two up to a sixteenth of their width.
MULTIPLE, SIXTEENTH = 64, 16
# Shapes that are compared where divergence chooses.
CANDIDATES = 6


@dataclass(frozen=True)
class Budget:
    """The cost of a shape may be `limit` at most; words: what that is, for messages."""

    cost: Callable[[Shape], float]
    limit: float
    words: str
    setting: str


def budget_of(
    anatomy: Anatomy, settings: ShrinkSettings, bytes_each: int, seconds: Callable[[Shape], float] | None = None
) -> Budget | None:
    """The budget of the settings, None without one. seconds: what a shape takes, where a speed-up is asked for."""
    if settings.keep is not None:
        share = parse_amount(settings.keep, "keep").share or 1.0
        limit = share * anatomy.size(anatomy.full).blocks
        return Budget(lambda shape: anatomy.size(shape).blocks, limit, f"{settings.keep} of its blocks", "keep")
    if settings.parameters is not None:
        most = parse_quantity(settings.parameters, "parameters")
        return Budget(lambda shape: anatomy.size(shape).total, most, f"{settings.parameters} parameters", "parameters")
    if settings.size is not None:
        most = parse_quantity(settings.size, "size")
        return Budget(lambda shape: bytes_each * anatomy.size(shape).total, most, settings.size, "size")
    if settings.speedup is not None:
        assert seconds is not None
        most_seconds = seconds(anatomy.full) / settings.speedup
        return Budget(seconds, most_seconds, f"a speed-up of {settings.speedup:g}", "speedup")
    return None


def shapes_for(anatomy: Anatomy, settings: ShrinkSettings, budget: Budget | None) -> list[Shape]:
    """The shapes that come into question, the even one first. Blocks are placeholders: the first so many.

    Raises SparseGPTError where nothing fits, and for parts that the model cannot do with less of.
    """
    base = _given(anatomy, settings)
    if budget is None:
        return [base]
    depths = [len(base.blocks)]
    if settings.choose == "divergence" and settings.blocks is None:
        depths += _fewer_blocks(anatomy, base, budget)
    found = [shape for count in depths for shape in _fitting(anatomy, settings, _with_blocks(base, count), budget)]
    if not found:
        least = _least(anatomy, settings, base)
        raise SparseGPTError(
            f"{budget.words} cannot be had: with a single key-value head and the fewest channels ({least}) the model "
            f"still costs {budget.cost(least) / budget.limit:.2f} times that; keep more, or fewer blocks",
            settings=(budget.setting, "blocks"),
        )
    found.sort(key=partial(_unevenness, anatomy))
    return found[: CANDIDATES if settings.choose == "divergence" else 1]


def multiple_of(anatomy: Anatomy, settings: ShrinkSettings) -> int:
    """What numbers of channels are a multiple of."""
    if settings.multiple is not None:
        return settings.multiple
    most = anatomy.full.channels[anatomy.first_key] // SIXTEENTH
    return min(MULTIPLE, 1 << max(0, most.bit_length() - 1))


def _given(anatomy: Anatomy, settings: ShrinkSettings) -> Shape:
    """The full shape with what was said of its parts."""
    shape, full = anatomy.full, anatomy.full
    if (amount := settings.amount("blocks")) is not None:
        shape = _with_blocks(shape, _within(amount.of(len(full.blocks)), len(full.blocks), "blocks"))
    if (amount := settings.amount("channels")) is not None:
        most = full.channels[anatomy.first_key]
        shape = anatomy.with_channels(shape, _within(amount.of(most), most, "channels"))
    if settings.heads is not None:
        shape = replace(shape, groups=_groups(anatomy, settings))
    if (amount := settings.amount("experts")) is not None:
        shape = replace(shape, experts=_experts(anatomy, amount.of(full.experts or 1)))
    return shape


def _within(count: int, full: int, what: str) -> int:
    if not 1 <= count <= full:
        raise SparseGPTError(f"{what} {count} are out of range: the model has {full}", settings=(what,))
    return count


def _groups(anatomy: Anatomy, settings: ShrinkSettings) -> int:
    """Key-value heads kept; a number of heads must fill whole groups."""
    full, amount = anatomy.full.groups, settings.amount("heads")
    assert amount is not None
    if full is None:
        raise SparseGPTError(
            f"heads of model type {anatomy.decoder.model.config.model_type!r} cannot leave: "
            f"{anatomy.layout.no_heads or 'its attention is built otherwise'}; leave channels or blocks out instead",
            settings=("heads",),
        )
    if amount.count is None:
        return amount.of(full)
    heads = int(getattr(anatomy.decoder.model.config, HEADS))
    ratio = heads // full
    if amount.count % ratio:
        raise SparseGPTError(
            f"heads {amount.count}: {ratio} heads share a key-value head here, and leave with it: expected a multiple "
            f"of {ratio}",
            settings=("heads",),
        )
    return _within(amount.count, heads, "heads") // ratio


def _experts(anatomy: Anatomy, count: int) -> int:
    config, full = anatomy.decoder.model.config, anatomy.full.experts
    if full is None:
        raise SparseGPTError(f"{anatomy.decoder.name} has no experts: leave them out", settings=("experts",))
    chosen = int(getattr(config, "num_experts_per_tok", 1))
    if not chosen <= count <= full:
        raise SparseGPTError(
            f"experts {count} are out of range: a token is sent to {chosen} of {full}", settings=("experts",)
        )
    if (groups := getattr(config, "n_group", None) or 1) > 1:
        raise SparseGPTError(
            f"its {full} experts are tied in {groups} groups, of which a token chooses some: experts of this model "
            "cannot leave",
            settings=("experts",),
        )
    return count


def _with_blocks(shape: Shape, count: int) -> Shape:
    return replace(shape, blocks=shape.blocks[:count])


def _least(anatomy: Anatomy, settings: ShrinkSettings, base: Shape) -> Shape:
    groups = base.groups if base.groups is None or settings.heads is not None else 1
    return anatomy.with_channels(replace(base, groups=groups), multiple_of(anatomy, settings))


def _fewer_blocks(anatomy: Anatomy, base: Shape, budget: Budget) -> list[int]:
    """Numbers of blocks between all and those that meet the budget alone: the latter, and one halfway."""
    count = len(base.blocks)
    alone = next((n for n in range(count - 1, 0, -1) if budget.cost(_with_blocks(base, n)) <= budget.limit), None)
    return [] if alone is None else sorted({alone, (alone + count) // 2} - {count}, reverse=True)


def _fitting(anatomy: Anatomy, settings: ShrinkSettings, base: Shape, budget: Budget) -> Iterator[Shape]:
    """For every number of key-value heads the shape with the most channels within the budget, if there is one."""
    fixed = base.groups is None or settings.heads is not None
    for groups in [base.groups] if fixed else range(base.groups or 1, 0, -1):
        shape = _widest(anatomy, settings, replace(base, groups=groups), budget)
        if shape is not None:
            yield shape


def _widest(anatomy: Anatomy, settings: ShrinkSettings, base: Shape, budget: Budget) -> Shape | None:
    """By halving: cost grows with the number of channels."""
    step, full = multiple_of(anatomy, settings), anatomy.full.channels[anatomy.first_key]
    if budget.cost(base) <= budget.limit:
        return base
    low, high = 0, -(-full // step)
    while high - low > 1:
        middle = (low + high) // 2
        fits = budget.cost(anatomy.with_channels(base, middle * step)) <= budget.limit
        low, high = (middle, high) if fits else (low, middle)
    if not low or budget.cost(anatomy.with_channels(base, step)) > budget.limit:
        return None
    return anatomy.with_channels(base, low * step)


def _unevenness(anatomy: Anatomy, shape: Shape) -> tuple[int, float]:
    """How far the kept shares of heads and channels lie apart; shapes of fewer blocks come after."""
    channels = shape.channels[anatomy.first_key] / anatomy.full.channels[anatomy.first_key]
    groups = channels if not shape.groups or not anatomy.full.groups else shape.groups / anatomy.full.groups
    return len(anatomy.full.blocks) - len(shape.blocks), abs(groups - channels)
