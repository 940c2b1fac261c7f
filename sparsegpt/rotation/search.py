"""From a few windows to bases: what the linears of some blocks read, and the bases in which least of them is dropped.

The stream's basis is one for all blocks, so some blocks stand for all, some rows of each linear for its rows, and a
few experts for a mixture's. Then each block's values are looked at, with the stream turned already.

Dimension key: D width of the stream, G key-value heads, F values of a head, C in_features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from sparsegpt.model.capture import ModelInputs, run_watched
from sparsegpt.model.residence import Residence
from sparsegpt.model.routers import mixture_of
from sparsegpt.model.unfuse import unfused
from sparsegpt.rotation.bases import Bases, fold_gains, rotate_block
from sparsegpt.rotation.learning import Schedule, learn_basis
from sparsegpt.rotation.objective import HeadsTerm, InputTerm, OutputTerm, Term, ValuesTerm, group_of, some
from sparsegpt.rotation.rotatable import Rotatable, ValueHeads
from sparsegpt.rotation.statistics import Statistics, Watched
from sparsegpt.sparsity import Sparsity

# Calibration tokens that are looked at, and at least so many for each input of the stream.
TOKENS, TOKENS_PER_INPUT = 16384, 4
# Blocks and experts that stand for all, and the lines of a linear that are held.
BLOCKS, EXPERTS, LINES = 12, 4, 1024
# Of those, what a step looks at.
BLOCKS_A_STEP, LINES_A_STEP = 6, 256
STREAM, VALUES = Schedule(100, 0.03), Schedule(60, 0.02)

# Before and after, the mean share of saliency that the pattern drops.
Shares = tuple[float, float]
# Turns sums over some calibration batches into those over all.
AddUp = Callable[..., None]


@dataclass(frozen=True)
class Found:
    """Bases that drop less than the model's own; what was found to drop less, of stream and values."""

    bases: Bases
    stream: Shares | None = None
    values: Shares | None = None


def find_bases(
    model: Rotatable,
    batches: Sequence[Tensor],
    residence: Residence,
    patterns: Mapping[str, Sparsity],
    *,
    stream: bool,
    values: bool,
    seed: int = 0,
    add_up: AddUp = lambda *sums: None,
) -> Found:
    """Bases for these calibration batches [batch, sequence] in which pruning the linears drops least.

    patterns: of the linears that are pruned, by their full names. The model stays as it is. seed: draws what is looked
    at. add_up: turns sums over these batches into those over the batches of all who look together.
    Raises SparseGPTError where the model has no such basis.
    """
    model.check(stream=stream, values=values)
    generator = torch.Generator().manual_seed(seed)
    search = _Search(model, ModelInputs(model.decoder, batches), residence, patterns, generator, add_up)
    basis, stream_shares = search.stream() if stream else (None, None)
    by_block, value_shares = search.values(basis) if values else ({}, None)
    return Found(Bases(basis, by_block), stream_shares, value_shares)


def tokens_wanted(model: Rotatable) -> int:
    """How many calibration tokens are enough to find the bases of a model."""
    return max(TOKENS, TOKENS_PER_INPUT * model.width)


@dataclass(frozen=True)
class _Search:
    model: Rotatable
    inputs: ModelInputs
    residence: Residence
    patterns: Mapping[str, Sparsity]
    generator: torch.Generator
    add_up: AddUp

    def stream(self) -> tuple[Tensor | None, Shares | None]:
        """[D, D]: the stream's basis, and the shares dropped; None where there is none that drops less."""
        sampled, held = self._sampled_blocks(), list[list[Term]]()
        hidden = self.inputs.hidden
        for index in self._visited():
            fold_gains(self.model, self._block(index))
            watched = self._stream_linears(index) if index in sampled else {}
            hidden, statistics = self._look(index, hidden, watched)
            if terms := list(self._stream_terms(index, statistics)):
                held.append(terms)
        if not held:
            return None, None

        def loss(basis: Tensor, lines: int | None = LINES_A_STEP, blocks: int = BLOCKS_A_STEP) -> Tensor:
            drawn = torch.randperm(len(held), generator=self.generator)[:blocks].tolist()
            return _mean_loss([term for index in drawn for term in held[index]], basis, lines, self.generator)

        start = torch.eye(self.model.width, device=_device(held[0]))
        basis = learn_basis(loss, start, STREAM, fixes_ones=self.model.layout.centred)
        before, after = (float(loss(each, None, len(held))) for each in (start, basis.float()))
        return (basis, (before, after)) if after < before else (None, None)

    def values(self, stream: Tensor | None) -> tuple[dict[int, Tensor], Shares | None]:
        """{block: [G, F, F]}: bases of the values where the stream is in its basis already, and the mean shares."""
        bases, shares = dict[int, Tensor](), list[Shares]()
        hidden = self.inputs.hidden
        if stream is not None:
            hidden = [part @ stream.to(part) for part in hidden]
        for index in self._visited():
            if stream is not None:
                rotate_block(self.model, index, Bases(stream))
            hidden, statistics = self._look(index, hidden, self._value_linears(index))
            terms = list(self._value_terms(index, statistics))
            if not terms:
                continue

            def loss(basis: Tensor, lines: int | None = LINES_A_STEP, terms: list[Term] = terms) -> Tensor:
                return _mean_loss(terms, basis, lines, self.generator)

            heads = self.model.value_heads(self._block(index))
            assert heads is not None
            start = torch.eye(heads.width, device=_device(terms)).repeat(heads.groups, 1, 1)
            basis = learn_basis(loss, start, VALUES)
            before, after = (float(loss(each, None)) for each in (start, basis.float()))
            if after < before:
                bases[index] = basis
                shares.append((before, after))
        return bases, _mean(shares)

    def _visited(self) -> Iterator[int]:
        """Each block in turn, with weights of its own that may be changed, shown as linears."""
        for index, block in enumerate(self.model.decoder.blocks):
            with self.residence.visit(block), unfused(block):
                yield index

    def _block(self, index: int) -> nn.Module:
        return self.model.decoder.blocks[index]

    def _look(
        self, index: int, hidden: list[Tensor], watched: Mapping[str, Watched]
    ) -> tuple[list[Tensor], Statistics]:
        """Carry the micro-batches through a block: the hidden states after it, and what was watched in it."""
        block, moved = self._block(index), list[Tensor]()
        device = next(block.parameters()).device
        statistics = Statistics.of(self.model.decoder.prefix(index), watched, device)
        for tokens, part in zip(self.inputs.batches, hidden, strict=True):
            call = self.inputs.calls(tokens, "rotation")[index]
            seen, output = run_watched(block, call, part.to(device), list(watched))
            moved.append(output.to(part.device))
            for name, tensor in seen.items():
                statistics.see(name, tensor)
        self.add_up(*statistics.sums.values())
        return moved, statistics

    def _stream_linears(self, index: int) -> dict[str, Watched]:
        """What of a block to watch for the stream's basis."""
        block, watched = self._block(index), dict[str, Watched]()
        for norm, found in self.model.readers(block):
            for linear in self._chosen(index, found).values():
                watched[f"{norm}()"] = Watched(linear.in_features, whole=True)
        for name, linear in self._chosen(index, self.model.writers(block)).items():
            watched[name] = Watched(linear.in_features, whole=False)
        return watched

    def _stream_terms(self, index: int, statistics: Statistics) -> Iterator[Term]:
        block = self._block(index)
        for norm, found in self.model.readers(block):
            if statistics.has(f"{norm}()"):
                chosen = self._chosen(index, found)
                rows = [some(linear.out_features, LINES, self.generator) for linear in chosen.values()]
                weights = [linear.weight.data[row] for linear, row in zip(chosen.values(), rows, strict=True)]
                patterns = tuple(self._pattern(index, name) for name in chosen)
                inverse = statistics.inverse(f"{norm}()")
                yield InputTerm(tuple(weight.float() for weight in weights), patterns, inverse)
        for name, linear in self._chosen(index, self.model.writers(block)).items():
            if statistics.has(name):
                pattern = self._pattern(index, name)
                columns = some(linear.in_features, LINES, self.generator, group_of(pattern))
                yield OutputTerm(linear.weight.data[:, columns].float(), statistics.scale(name)[columns], pattern)

    def _value_linears(self, index: int) -> dict[str, Watched]:
        """What of a block to watch for its values' basis."""
        values, heads = self.model.layout.values, self.model.value_heads(self._block(index))
        if values is None or heads is None or not self._is_pruned(index, values.output):
            return {}
        watched = {values.output: Watched(heads.output.in_features, whole=True)}
        if self._is_pruned(index, values.source):
            watched[values.source] = Watched(int(heads.source.in_features), whole=False)  # type: ignore[arg-type]
        return watched

    def _value_terms(self, index: int, statistics: Statistics) -> Iterator[Term]:
        values, heads = self.model.layout.values, self.model.value_heads(self._block(index))
        if values is None or heads is None or not statistics.has(values.output):
            return
        rows = some(heads.output.out_features, LINES, self.generator)
        inverse = _within_heads(statistics.inverse(values.output), heads)
        yield HeadsTerm(heads.columns()[rows].float(), inverse, self._pattern(index, values.output))
        if statistics.has(values.source):
            weight = heads.source.weight
            assert isinstance(weight, Tensor)
            scale = statistics.scale(values.source)
            yield ValuesTerm(heads.rows(weight).float(), scale, self._pattern(index, values.source))

    def _chosen(self, index: int, found: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
        """Of matrices found those that are pruned, and of a mixture's experts a few."""
        expert_of = mixture_of(self._block(index)).expert_of
        chosen = {}
        for name, module in found.items():
            expert = expert_of(name)
            is_chosen = expert is None or expert[1] < EXPERTS
            if is_chosen and isinstance(module, nn.Linear) and self._is_pruned(index, name):
                chosen[name] = module
        return chosen

    def _pattern(self, index: int, name: str) -> Sparsity:
        return self.patterns[self.model.decoder.prefix(index) + name]

    def _is_pruned(self, index: int, name: str) -> bool:
        full = self.model.decoder.prefix(index) + name
        return full in self.patterns and self.patterns[full].zeros > 0

    def _sampled_blocks(self) -> set[int]:
        """Blocks with pruned linears, evenly spaced among them."""
        prefixes = [prefix for prefix, _ in self.model.decoder.by_prefix()]
        busy = [i for i, prefix in enumerate(prefixes) if any(name.startswith(prefix) for name in self.patterns)]
        count = min(BLOCKS, len(busy))
        return {busy[(2 * place + 1) * len(busy) // (2 * count)] for place in range(count)}


def _within_heads(inverse_CC: Tensor, heads: ValueHeads) -> Tensor:
    """[C, C] -> [G, H, F, F]: the parts of a matrix that lie within the heads."""
    count = heads.output.in_features // heads.width
    by_head = rearrange(inverse_CC, "(h f) (k e) -> h f k e", h=count, k=count)
    diagonal = torch.stack([by_head[head, :, head] for head in range(count)])
    return rearrange(diagonal, "(g h) f e -> g h f e", g=heads.groups)


def _mean_loss(terms: Sequence[Term], basis: Tensor, lines: int | None, generator: torch.Generator) -> Tensor:
    return torch.stack([loss for term in terms for loss in term.losses(basis, lines, generator)]).mean()


def _device(terms: Sequence[Term]) -> torch.device:
    first = terms[0]
    return first.inverse.device if isinstance(first, InputTerm | HeadsTerm) else first.scale.device


def _mean(shares: Sequence[Shares]) -> Shares | None:
    if not shares:
        return None
    before, after = (sum(each) / len(shares) for each in zip(*shares, strict=True))
    return before, after
