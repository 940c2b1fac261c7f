"""Short documents side by side in windows, each behind a boundary token by which attention tells them apart.

A window is full to its last token: a document that does not fit goes on in the next one, as one of its own.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError

# For each window the documents in it, LongTensors [tokens] without the boundary before them.
Layout = list[list[torch.Tensor]]


def lay_out(documents: Iterator[torch.Tensor], samples: int, sequence_length: int) -> Layout:
    """Documents [tokens] that never end -> what goes into each of so many windows, boundaries counted."""
    windows: Layout = []
    rest = torch.empty(0, dtype=torch.long)
    while len(windows) < samples:
        window: list[torch.Tensor] = []
        room = sequence_length
        while room > 0:
            tokens = rest if len(rest) else next(documents)
            window.append(tokens[: room - 1])
            rest = tokens[room - 1 :]
            room -= 1 + len(window[-1])
        windows.append(window)
    return windows


def boundary_token(layout: Layout, tokenizer: Any, bos: int | None) -> int:
    """Documents [tokens] -> a special token that none contains: `bos` where windows begin with it, else any.

    Raises SparseGPTError where there is none.
    """
    special = [bos] if bos is not None else _special_tokens(tokenizer)
    inside = set(torch.cat([document for window in layout for document in window]).tolist())
    for token in special:
        if token not in inside:
            return token
    raise SparseGPTError(
        "packed documents need a special token before each that is in none of them: "
        f"{f'token {bos}, with which windows begin, is' if bos is not None else 'all that the tokenizer has are'} "
        "in the text; make each document a window of its own",
        settings=("documents",),
    )


def assemble(layout: Layout, boundary: int) -> tuple[torch.Tensor, ...]:
    """Each window of a layout as one LongTensor [tokens]."""
    start = torch.tensor([boundary])
    return tuple(torch.cat([part for document in window for part in (start, document)]) for window in layout)


def without_own_start(tokens: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """A document [tokens] without a beginning-of-sequence token of its own, which its boundary replaces."""
    start = getattr(tokenizer, "bos_token_id", None)
    return tokens[1:] if start is not None and (tokens == start).nonzero().flatten().tolist() == [0] else tokens


def _special_tokens(tokenizer: Any) -> Iterable[int]:
    """The usual ones at the beginning or the end of a text first; none that stands for something else."""
    named = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk", "pad")}
    others = [token for token in getattr(tokenizer, "all_special_ids", ()) if token not in named.values()]
    return [token for token in dict.fromkeys([named["bos"], named["eos"], *others]) if token is not None]
