"""Calibration text that the dense model writes itself, for when there is no data at hand.

Documents are sampled from the model's own distribution, from the token with which text begins to the one with which it
ends (Williams, Chrysostomou & Aletras 2024, arXiv:2410.17170, without their schedule of temperatures).
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError, first_line

from .sources import OWN_TEXT, TextSource

# Tokens of the documents that are written at the same time.
TOKENS_AT_ONCE = 32_768
# A model that soon ends what it writes is asked again, this many times as often as one that does not.
PATIENCE = 8


def with_own_text(
    source: TextSource, model: Any, tokenizer: Any, samples: int, sequence_length: int, seed: int
) -> TextSource:
    """The source; one that stands for the model's own text with as much of it as so many windows hold.

    The same text for the same model, seed, machine and number of threads.
    Raises SparseGPTError where there is no model to write it, or it cannot.
    """
    if source.name != OWN_TEXT or source.documents:
        return source
    if model is None:
        raise SparseGPTError(f"{OWN_TEXT}: expected the model that writes the text, found none; give it or a text")
    return replace(source, documents=tuple(_documents(model, tokenizer, samples, sequence_length, seed)))


def documents_at_once(samples: int, sequence_length: int) -> int:
    """How many documents of at most so many tokens are written side by side."""
    return max(1, min(samples, TOKENS_AT_ONCE // sequence_length))


@torch.no_grad()
def _documents(model: Any, tokenizer: Any, samples: int, sequence_length: int, seed: int) -> Iterator[str]:
    start, wanted, found = _start_token(tokenizer), samples * sequence_length, 0
    count = documents_at_once(samples, sequence_length)
    device = model.get_input_embeddings().weight.device
    devices = [device] if device.type == "cuda" else []
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for _ in range(PATIENCE * -(-wanted // (count * sequence_length))):
                beginning = torch.full((count, 1), start, device=device)
                for row in _written(model, tokenizer, beginning, sequence_length):
                    text = tokenizer.decode(row, skip_special_tokens=True)
                    found += len(row) - 1
                    yield text
                if found >= wanted:
                    return
    finally:
        model.train(was_training)


def _written(model: Any, tokenizer: Any, beginning: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Beginnings [documents, 1] -> each document [tokens] up to its end, at most `length` tokens after the first."""
    from transformers import GenerationConfig

    end = tokenizer.eos_token_id
    plain = GenerationConfig(  # all said, as what is left out comes from the model's own settings
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=length,
        eos_token_id=end,
        pad_token_id=end if end is not None else 0,
    )
    try:
        rows = model.generate(beginning, attention_mask=torch.ones_like(beginning), generation_config=plain)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's own code
        raise SparseGPTError(
            f"{OWN_TEXT}: the model cannot write text ({type(error).__name__}: {first_line(error)}); give a text"
        ) from error
    for row in rows:
        ends = (row[1:] == end).nonzero() if end is not None else row.new_empty(0)
        yield row[: int(ends[0]) + 1] if len(ends) else row


def _start_token(tokenizer: Any) -> int:
    """The token with which text begins; where there is none, the one with which the text before it ends."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise SparseGPTError(f"{OWN_TEXT}: the tokenizer has no token with which a text begins or ends; give a text")
