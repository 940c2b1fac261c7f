"""Perplexity by the published protocol: non-overlapping windows, float32 cross-entropy, mean over tokens.

Of each window of L tokens the model predicts the last L - 1 from what stands before them in the window. A remainder
shorter than a window is left out.

As a script: python eval/perplexity.py --model demo --data pydoc
"""

import argparse
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparsegpt.calib_data import TextSource, bos_token, evaluation_tokens, load_text
from sparsegpt.counting import Counted, unheard
from sparsegpt.driver.ranks import ONE_RANK, Ranks
from sparsegpt.errors import SparseGPTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Positions whose logits are expanded to float32 at a time: 50k vocabulary x 512 x 4 bytes is 100 MB.
LOGIT_POSITIONS = 512
TOKENS_PER_STEP = 4096

# No trained language model is this bad on natural text in its language: the set-up is broken, not the model weak.
ABSURD_PERPLEXITY = 1000.0


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy of a text. nats: per predicted token; tokens: predicted; windows: scored."""

    nats: float
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        """exp(mean cross-entropy); infinite when it overflows."""
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def bits_per_byte(self, tokens: int, text_bytes: int) -> float:
        """Cross-entropy per UTF-8 byte, comparable between tokenizers; tokens and bytes of the whole text."""
        return self.nats / math.log(2) * tokens / text_bytes


@torch.no_grad()
def score(
    model: "PreTrainedModel",
    tokens: Tensor,
    sequence_length: int,
    *,
    batch_size: int | None = None,
    bos: int | None = None,
    max_windows: int | None = None,
    ranks: Ranks = ONE_RANK,
    counted: Counted = unheard,
) -> Score:
    """Tokens [N] or [1, N] -> Score: cross-entropy of a model on a stream of them.

    tokens: LongTensor. sequence_length: tokens a window, the beginning-of-sequence token `bos`, which
    is put before each window where given, not counted. batch_size: windows a forward pass. max_windows: at most these.
    ranks: who scores this model together; each calls this, and gets the score of all windows.
    counted: is told of every forward pass, in windows of this rank.
    Raises SparseGPTError when the stream is shorter than one window or a token lies outside the vocabulary.
    """
    windows = _windows(tokens, sequence_length, model)[:max_windows]
    device = model.get_input_embeddings().weight.device
    batches = ranks.share(windows.split(batch_size or max(1, TOKENS_PER_STEP // sequence_length)))
    nats, done, total = [], 0, sum(map(len, batches))
    counted(done, total)
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            inputs = batch.to(device)
            if bos is not None:
                inputs = torch.cat([inputs.new_full((len(inputs), 1), bos), inputs], dim=1)
            logits = model(input_ids=inputs, use_cache=False).logits[:, -sequence_length:-1]
            targets = batch[:, 1:].to(logits.device)
            # A window at a time: together they would be copied, and logits are the largest tensor of a small model.
            nats.append(sum(_cross_entropy(*window) for window in zip(logits, targets, strict=True)))
            done += len(batch)
            counted(done, total)
    finally:
        model.train(was_training)
    count = len(windows) * (sequence_length - 1)
    return Score(sum(ranks.in_turn(nats)) / count, count, len(windows))


def perplexity(model: "PreTrainedModel", tokens: Tensor, sequence_length: int) -> float:
    """Tokens [N] -> perplexity: exp of the mean cross-entropy of `model`, in nats, in non-overlapping windows.

    tokens: LongTensor [N] or [1, N]. sequence_length: tokens a window; of each the model predicts all but the first.
    Raises SparseGPTError when the stream is shorter than one window or a token lies outside the vocabulary.
    """
    return score(model, tokens, sequence_length).perplexity


def _windows(tokens: Tensor, sequence_length: int, model: "PreTrainedModel") -> Tensor:
    """[N] -> [windows, sequence_length], without a remainder that is shorter than a window."""
    stream = tokens.flatten()
    if sequence_length < 2:
        raise SparseGPTError(f"a window of {sequence_length} tokens has nothing to predict: expected at least 2")
    count = len(stream) // sequence_length
    if count == 0:
        raise SparseGPTError(
            f"the text has {len(stream)} tokens, less than one window of {sequence_length}; "
            "give more text or a shorter sequence length",
            settings=("sequence_length",),
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if int(stream.max()) >= vocabulary:
        raise SparseGPTError(
            f"token {int(stream.max())} lies outside the model's vocabulary of {vocabulary}: "
            "the tokenizer does not belong to this model"
        )
    return stream[: count * sequence_length].view(count, sequence_length)


def _cross_entropy(logits: Tensor, targets: Tensor) -> float:
    """Logits [P, V], targets [P] -> summed cross-entropy in nats, in float32, a few positions at a time."""
    pieces = zip(logits.split(LOGIT_POSITIONS), targets.split(LOGIT_POSITIONS), strict=True)
    return float(
        sum(nn.functional.cross_entropy(part.float(), target, reduction="sum").double() for part, target in pieces)
    )


@dataclass(frozen=True)
class TextScore:
    """A model's score on a named text."""

    data: str
    perplexity: float
    bits_per_byte: float
    tokens: int
    windows: int
    tokens_per_second: float

    @property
    def alarm(self) -> str | None:
        """A sentence when the score cannot belong to a working dense model, else None."""
        if self.perplexity < ABSURD_PERPLEXITY:
            return None
        return (
            f"dense perplexity {self.perplexity:.4g} on {self.data} is beyond anything a trained model shows: "
            "the model, its tokenizer, its dtype or the text is wrong, and every number that follows is meaningless"
        )


def score_text(
    model: "PreTrainedModel",
    tokenizer: Any,
    data: str | TextSource,
    sequence_length: int,
    *,
    batch_size: int | None = None,
    bos: str = "auto",
    max_windows: int | None = None,
    ranks: Ranks = ONE_RANK,
    counted: Counted = unheard,
) -> TextScore:
    """Score a model on a text, by its name or path (see calib_data.sources), in the source's published protocol.

    bos: put the tokenizer's beginning-of-sequence token before every window, never, or where the family needs it.
    max_windows: score at most these, from the text's start; None: as many as the protocol says. ranks, counted: as in
    `score`.
    Raises SparseGPTError for a text or `bos` that is not known, and as `score` does.
    """
    source = data if isinstance(data, TextSource) else load_text(data, "evaluation")
    tokens, text_bytes = evaluation_tokens(source, tokenizer)
    started = time.perf_counter()
    result = score(
        model,
        tokens,
        sequence_length,
        batch_size=batch_size,
        bos=bos_token(tokenizer, model.config.model_type, bos),
        max_windows=source.evaluation_windows if max_windows is None else max_windows,
        ranks=ranks,
        counted=counted,
    )
    return TextScore(
        source.name if isinstance(data, TextSource) else data,
        result.perplexity,
        result.bits_per_byte(len(tokens), text_bytes),
        result.tokens,
        result.windows,
        result.tokens / (time.perf_counter() - started),
    )


def main() -> None:
    """Score one model on texts, a line each; `python -m sparsegpt eval` offers the same and more."""
    import transformers

    from sparsegpt.model.loading import load_model

    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="demo", help="Hub id, folder, short name or demo")
    parser.add_argument("--data", nargs="+", default=["pydoc"], help="wikitext2, ptb, c4, pydoc, files or folders")
    parser.add_argument("--seqlen", type=int, help="tokens a window; default min(2048, the model's limit)")
    arguments = parser.parse_args()
    try:
        loaded = load_model(arguments.model)
        length = loaded.sequence_length(arguments.seqlen)
        for data in arguments.data:
            found = score_text(loaded.model, loaded.tokenizer, data, length)
            print(f"{data}: perplexity {found.perplexity:.4f}, {found.bits_per_byte:.4f} bits per byte")
            if found.alarm:
                print(f"WARNING: {found.alarm}")
    except SparseGPTError as error:
        parser.exit(1, f"perplexity: {error}\n")


if __name__ == "__main__":
    main()
