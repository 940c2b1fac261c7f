"""Does a model compute the same block by block, as the driver runs it, as in one piece?

Beside a plain forward of the whole model every block is run once more the driver's way: with the arguments that were
recorded for it, its weights shown as linears. What each linear receives and what the block returns must agree. A model
that hands anything on between blocks that was not recorded is found here, before the first block is pruned.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.capture import ModelInputs, first_of, run_body, watch_inputs
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.head import head_inputs
from sparsegpt.model.residence import Residence
from sparsegpt.model.routers import mixture_of
from sparsegpt.model.unfuse import unfused

# Windows that are compared: the model is one program for all of them.
WINDOWS = 2
# How far a token's vector may be off, as a share of its length: the rounding of sums taken in another order.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
# Share of tokens that may be further off where there are experts: a tie of two experts can fall either way.
SHARE_WITH_EXPERTS = 0.02
# From this share of tokens on, those that change with later ones tell of attention in both directions; of their length
# that is what sums cannot explain that are taken in the same order.
SHARE_THAT_LOOKS_AHEAD = 0.1
SAME = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}
# Shorter vectors than this share of the mean are measured against it: what is zero but for rounding differs by 100%.
SHORT = 1e-3


@dataclass(frozen=True)
class Agreement:
    """What was compared: linears whose inputs were, and the largest difference of a token found.

    unreached: linears, experts' apart, that were not called: the model may still read their weights. separable: a
    block's output depends on its hidden states alone, [batch, sequence, features], and not on what earlier blocks have
    left for it; only such blocks can be trained.
    """

    linears: int
    largest_difference: float
    separable: bool
    unreached: tuple[str, ...] = ()


@torch.no_grad()
def verify_blocks(decoder: DecoderModel, tokens: Tensor, residence: Residence) -> Agreement:
    """Compare blocks run one by one with the whole model, on tokens [windows, sequence].

    Raises SparseGPTError, naming the block, for a difference beyond rounding, and for a model that looks ahead.
    """
    tokens = with_another_end(tokens)
    inputs = ModelInputs(decoder, [tokens])
    comparison = _Comparison(decoder, inputs, residence, inputs.hidden[0])
    with comparison.listening():
        output = run_body(decoder, tokens)
    if comparison.passed < len(decoder.blocks):
        raise SparseGPTError(
            f"{decoder.name} ran {comparison.passed} of its {len(decoder.blocks)} blocks in a plain forward: expected "
            "a plain chain of blocks; models of this form cannot be pruned"
        )
    _check_causal(decoder, tokens, output.last_hidden_state)
    final = head_inputs(decoder, tokens, comparison.hidden)
    comparison.compare("the model", "final hidden states", final, output.last_hidden_state, share=0.0)
    alone = not inputs.hands_on("verification") and inputs.hidden[0].shape[:2] == tokens.shape
    return Agreement(comparison.linears, comparison.largest, alone, tuple(comparison.unreached))


def with_another_end(tokens: Tensor) -> Tensor:
    """[windows, sequence] -> the same and a window more: the first, whose second half is its first half once more.

    None is added where that makes no difference.
    """
    first, half = tokens[0], tokens.shape[1] // 2
    changed = torch.cat([first[:half], first[: len(first) - half]])
    return tokens if not half or torch.equal(changed, first) else torch.cat([tokens, changed[None]])


def _check_causal(decoder: DecoderModel, tokens: Tensor, hidden: Tensor) -> None:
    """Refuse a model in which tokens change what comes before them, as in an encoder.

    tokens: [windows, sequence] from `with_another_end`. hidden: what the model makes of them [windows, sequence, F].
    """
    half = tokens.shape[1] // 2
    if not torch.equal(tokens[0, :half], tokens[-1, :half]) or hidden.shape[:2] != tokens.shape:
        return
    difference_T = token_differences(hidden[0, :half], hidden[-1, :half])
    changed = float((difference_T > SAME[hidden.dtype]).float().mean())
    if changed > SHARE_THAT_LOOKS_AHEAD:
        raise SparseGPTError(
            f"{decoder.name} is no causal language model: the second half of a window changes {changed:.0%} of the "
            "hidden states of the first, as in an encoder; expected a decoder"
        )


@torch.no_grad()
def check_boundaries(decoder: DecoderModel, batches: Sequence[Tensor]) -> None:
    """Refuse a model in which documents of one window see each other, where `decoder.boundary` keeps them apart.

    batches: calibration tokens [batch, sequence]. What comes before a boundary is turned round in one window of the
    first batch that has one inside: what comes after must stay as it is. Raises SparseGPTError, also for a model that
    takes no positions.
    """
    if decoder.boundary is None:
        return
    starts = [(row, start) for row, start in (batches[0] == decoder.boundary).nonzero().tolist() if start > 2]
    if not starts:
        return
    row, start = starts[-1]
    window = batches[0][row]
    turned = torch.cat([window[:1], window[1:start].flip(0), window[start:]])
    hidden = run_body(decoder, torch.stack([window, turned])).last_hidden_state
    difference_T = token_differences(hidden[0, start:], hidden[1, start:])
    if float(difference_T.max()) > TOLERANCE[hidden.dtype]:
        raise SparseGPTError(
            f"{decoder.name} does not keep packed documents apart: what comes before a boundary changes what comes "
            "after it; make each document a window of its own",
            settings=("documents",),
        )


@dataclass
class _Comparison:
    """Follows a plain forward from block to block. hidden: what enters the block that comes next."""

    decoder: DecoderModel
    inputs: ModelInputs
    residence: Residence
    hidden: Tensor
    linears: int = 0
    largest: float = 0.0
    passed: int = 0
    unreached: list[str] = field(default_factory=list)
    _theirs: dict[str, list[Tensor]] = field(default_factory=dict)
    _is_ours: bool = False  # a block runs for the comparison, not for the model

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Watch each block of the model while this lasts."""
        with ExitStack() as stack:
            for index, block in enumerate(self.decoder.blocks):
                names = _names_of(block)
                stack.enter_context(watch_inputs(block, names, self._note_theirs))
                hook = block.register_forward_hook(
                    lambda module, args, output, index=index, names=names: self._after(index, names, output)
                )
                stack.callback(hook.remove)
            yield

    def _note_theirs(self, name: str, inputs: Tensor) -> None:
        if not self._is_ours:
            self._theirs.setdefault(name, []).append(inputs)

    def _after(self, index: int, names: list[str], output: Any) -> None:
        """Run the block again, the driver's way, and compare."""
        if self._is_ours:
            return
        theirs, self._theirs = self._theirs, {}
        seen: dict[str, list[Tensor]] = {}
        share = self._run_ours(index, names, seen)
        where, result = self.decoder.prefix(index)[:-1], first_of(output)
        expert_of = mixture_of(self.decoder.blocks[index]).expert_of
        self.unreached += [f"{where}.{name}" for name in names if name not in theirs and not expert_of(name)]
        for name in names:
            self._compare_inputs(f"{where}.{name}", seen.get(name, []), theirs.get(name, []), share)
        self.compare(where, "hidden states", self.hidden, result, share)
        self.hidden, self.passed = result.to(self.decoder.device), self.passed + 1

    def _run_ours(self, index: int, names: list[str], seen: dict[str, list[Tensor]]) -> float:
        """Move `hidden` through a block, note what its linears receive; returns the share of tokens that may be off."""
        block = self.decoder.blocks[index]
        call = self.inputs.calls(self.inputs.batches[0], "verification")[index]
        self._is_ours = True
        try:
            with self.residence.visit(block), unfused(block):
                experts = len(prunable_linears(block)) > len(names)
                hidden = self.hidden.to(next(block.parameters()).device)
                with watch_inputs(block, names, lambda name, inputs: seen.setdefault(name, []).append(inputs)):
                    self.hidden = call.run(block, hidden)
        finally:
            self._is_ours = False
        return SHARE_WITH_EXPERTS if experts else 0.0

    def _compare_inputs(self, linear: str, ours: list[Tensor], theirs: list[Tensor], share: float) -> None:
        if len(ours) != len(theirs):
            raise SparseGPTError(
                f"{linear} runs {len(theirs)} times in the model, and {len(ours)} times when its block is run by "
                "itself: models of this form cannot be pruned"
            )
        for pair in zip(ours, theirs, strict=True):
            self.compare(linear, "inputs", *pair, share)
            self.linears += 1

    def compare(self, where: str, what: str, ours: Tensor, theirs: Tensor, share: float) -> None:
        """Raise SparseGPTError unless all but a share of the tokens agree; tensors [..., features]."""
        if ours.shape != theirs.shape:
            off, most = 1.0, float("inf")
        else:
            difference_T = token_differences(ours, theirs.to(ours.device))
            most = float(difference_T.max()) if difference_T.numel() else 0.0
            off = float((difference_T > TOLERANCE[ours.dtype]).float().mean()) if difference_T.numel() else 0.0
        self.largest = max(self.largest, most)
        if off > share:
            raise SparseGPTError(
                f"{where}: run block by block its {what} are others than in the whole model, for {off:.1%} of the "
                f"tokens by up to {most:.2g} of their length: something passes between the blocks of "
                f"{self.decoder.name} that is not known; models of this form cannot be pruned"
            )


def token_differences(ours: Tensor, theirs: Tensor) -> Tensor:
    """[..., F] and [..., F] -> [T]: how far each vector is off, as a share of its length.

    Vectors that are not finite on both sides count as equal: who gathers them says so.
    """
    ours_TF, theirs_TF = (tensor.flatten(0, -2).float() for tensor in (ours, theirs))
    lengths_T = theirs_TF.norm(dim=-1)
    finite_T = lengths_T.isfinite()
    floor = SHORT * lengths_T[finite_T].mean() if finite_T.any() else lengths_T.new_tensor(1.0)
    difference_T = (ours_TF - theirs_TF).norm(dim=-1) / lengths_T.maximum(floor).clamp_min(torch.finfo().tiny)
    both_broken_T = ~finite_T & ~ours_TF.norm(dim=-1).isfinite()
    found_T: Tensor = difference_T.masked_fill(both_broken_T, 0).nan_to_num(nan=torch.inf)
    return found_T


def _names_of(block: nn.Module) -> list[str]:
    """Linears that the model runs as modules of their own, by their names inside the block."""
    own = {name for name, _ in block.named_modules()}
    with unfused(block):
        return [name for name in prunable_linears(block) if name in own]
