"""Training for studies: one loop with a rule of sparsity in it, and a small language model on the demo's text.

The text is the training side of `pydoc`, the tokenizer the demo's, the model an OPT as the demo is, and what judges are
the held-out topics in bits per byte. Batches are drawn by seed and step alone, so a training that goes on from step k
sees what the first one saw.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsegpt.calib_data import demo_folder, evaluation_tokens, load_text
from sparsegpt.driver.pipeline import prune_model
from sparsegpt.errors import unknown
from sparsegpt.eval.perplexity import score
from sparsegpt.recovery.training import BETAS, autocast

CONTEXT = 64
BATCH = 4  # windows a step
HELD_OUT_WINDOWS = 128
LEARNING_RATE, WEIGHT_DECAY, LONGEST_GRADIENT = 2e-3, 0.1, 1.0
WARM_UP = 1 / 20  # of the steps
# Of one-shot pruning, from the training text.
CALIBRATION_WINDOWS = 128
Masks = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    """Of an OPT with the demo's vocabulary."""

    layers: int
    hidden: int
    heads: int = 4


# tiny: for tests. base: 1.06 million parameters, 0.59 of them in the linears that are pruned. demo: 5.8 million.
SIZES = {"tiny": Size(1, 16, 2), "small": Size(2, 64), "base": Size(3, 128), "demo": Size(6, 256)}


def check_size(size: str) -> None:
    """Raise SparseGPTError for a size that is no row of SIZES."""
    if size not in SIZES:
        raise unknown("size", size, SIZES, settings=("size",))


class Rule:
    """What a way to train sparse does around the optimizer. This one does nothing: dense training."""

    def before(self, step: int) -> None:
        """Before the weights are used in `step`, which counts from 0."""

    def gradients(self, step: int) -> bool:
        """After gradients are there: change them, and say whether the optimizer steps."""
        return True

    def after(self, step: int) -> None:
        """After the optimizer's step."""

    def finish(self) -> None:
        """After the last step: leave the weights as they are to be used."""


class Masked(Rule):
    """Weights [R, C] outside fixed masks, bool [R, C], True = kept, by name, stay zero."""

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        self.weights = {name: model.get_parameter(name) for name in masks}
        self.masks = masks
        self.after(-1)

    def gradients(self, step: int) -> bool:
        """No gradient, so no moment of Adam, for what is not kept."""
        for name, weight in self.weights.items():
            assert weight.grad is not None
            weight.grad.masked_fill_(~self.masks[name], 0)
        return True

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Moments from before the mask may have moved a weight."""
        for name, weight in self.weights.items():
            weight.masked_fill_(~self.masks[name], 0)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    steps: range,
    rule: Rule | None = None,
    rate_at: Callable[[int], float] | None = None,
    longest: float = math.inf,
) -> None:
    """Train in place. loss_at(step): scalar loss; rate_at(step): learning rate, where it is not the optimizer's own.

    longest: the length to which gradients are cut.
    """
    rule = rule or Rule()
    for step in steps:
        if rate_at:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
        rule.before(step)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss_at(step))
        if rule.gradients(step):
            nn.utils.clip_grad_norm_(model.parameters(), longest)
            optimizer.step()
        rule.after(step)
    rule.finish()


@dataclass(frozen=True)
class Text:
    """training, held_out: tokens, LongTensor [N]; held_out_bytes: of the held-out text."""

    training: Tensor
    held_out: Tensor
    held_out_bytes: int
    vocabulary: int


@cache
def demo_text() -> Text:
    """`pydoc` in the demo's tokens; LongTensor [tokens] twice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder())
    (training, _), (held_out, size) = (
        evaluation_tokens(load_text("pydoc", split), tokenizer) for split in ("calibration", "evaluation")
    )
    return Text(training, held_out, size, len(tokenizer))


class LanguageTraining:
    """A language model in training: steps in all, drawn by the seed `order`, by one schedule whatever is restored."""

    def __init__(self, size: str, steps: int, seed: int, order: int | None = None) -> None:
        check_size(size)
        self.text, self.steps, self.order = demo_text(), steps, seed if order is None else order
        torch.manual_seed(seed)
        self.model = _opt(SIZES[size], self.text.vocabulary)
        matrices = [parameter for parameter in self.model.parameters() if parameter.ndim > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS)

    def run(self, first: int = 0, end: int | None = None, rule: Rule | None = None) -> None:
        """Steps first to end - 1."""
        steps = range(first, self.steps if end is None else end)
        train(self.model, self.optimizer, self._loss, steps, rule, self._rate, LONGEST_GRADIENT)

    def state(self) -> dict[str, Tensor]:
        """Copies of all weights and of Adam's moments, by name."""
        found = {f"weight.{name}": parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state.get(parameter, {})
            found |= {f"{moment}.{name}": tensor.clone() for moment, tensor in moments.items()}
        return found

    @torch.no_grad()
    def restore(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` copied, bit for bit: tensors by name."""
        self.optimizer.state.clear()
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[f"weight.{name}"])
            moments = [key.partition(".")[0] for key in state if key.partition(".")[2] == name]
            if len(moments) > 1:
                self.optimizer.state[parameter] = {
                    key: state[f"{key}.{name}"].clone() for key in moments if key != "weight"
                }

    def bits_per_byte(self) -> float:
        """Of the held-out text, in windows of the training's length."""
        found = score(self.model, self.text.held_out, CONTEXT, max_windows=HELD_OUT_WINDOWS)
        return found.bits_per_byte(len(self.text.held_out), self.text.held_out_bytes)

    def linears(self) -> dict[str, Tensor]:
        """The weights [R, C] that are pruned: of the linears in the blocks, by name."""
        return {
            f"{name}.weight": module.weight
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and ".layers." in name
        }

    def prune(self, sparsity: str) -> Masks:
        """Prune at once by this engine's default, admm, in the model's own bases -> masks, bool [R, C] by name."""
        windows = self._windows(CALIBRATION_WINDOWS, CONTEXT, torch.Generator().manual_seed(self.order))
        prune_model(self.model, windows, sparsity, rotate="off")
        return {name: weight != 0 for name, weight in self.linears().items()}

    def _loss(self, step: int) -> Tensor:
        self.model.train()
        generator = torch.Generator().manual_seed(self.order * 1_000_003 + step)
        windows = self._windows(BATCH, CONTEXT + 1, generator)
        with autocast(windows.device):
            logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine down to a fiftieth."""
        cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * step / self.steps)) / 2
        return LEARNING_RATE * min(1.0, (step + 1) / max(1.0, WARM_UP * self.steps)) * cosine

    def _windows(self, count: int, length: int, generator: torch.Generator) -> Tensor:
        starts = torch.randint(len(self.text.training) - length + 1, (count,), generator=generator)
        return torch.stack([self.text.training[start : start + length] for start in starts.tolist()])


@contextmanager
def gated(layers: dict[str, nn.Linear], gates: dict[str, Tensor]) -> Iterator[None]:
    """Multiply the outputs of linears by gates [R], by name; before a ReLU a gate of zero removes the unit."""
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output, gate=gates[name]: output * gate)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _opt(size: Size, vocabulary: int) -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        word_embed_proj_dim=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        ffn_dim=4 * size.hidden,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
    )
    return OPTForCausalLM(config)
