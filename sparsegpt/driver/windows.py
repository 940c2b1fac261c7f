"""Calibration windows in whatever form people hold them, as micro-batches of equal length."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsegpt.driver.ranks import Ranks
from sparsegpt.errors import SparseGPTError
from sparsegpt.model.decoder import DecoderModel

# Tokens of one forward pass through a block, unless the caller says how many windows go together.
TOKENS_PER_STEP = 4096
EXPECTED = (
    "expected calibration windows: a LongTensor [samples, sequence_length], a list of token lists or tensors, dicts "
    "with input_ids and attention_mask, or an iterable of these such as a DataLoader"
)

# Token ids: a tensor or an array of one or two dimensions, lists, mappings with input_ids, or iterables of these.
Windows = Any


def micro_batches(windows: Windows, decoder: DecoderModel, size: int | None = None) -> tuple[Tensor, ...]:
    """Windows of any form -> LongTensors [batch, sequence] of at most `size` windows, by default some 4096 tokens.

    Tokens that an attention mask leaves out are taken away: they count in no statistic. Windows of different lengths
    go into micro-batches of their own, in the order in which their lengths first came.
    Raises SparseGPTError for another form, no tokens, ids outside the vocabulary, and windows beyond the positions.
    """
    if isinstance(windows, Tensor) and windows.ndim == 2:
        groups = [_as_ids(windows)]
    elif _is_plain(windows) and not (hasattr(windows, "ndim") and windows.ndim == 2):
        groups = []  # one window or one stream of text: nobody knows
    else:
        by_length: dict[int, list[Tensor]] = {}
        for row in _rows(windows):
            by_length.setdefault(len(row), []).append(row)
        by_length.pop(0, None)  # nothing but padding
        groups = [torch.stack(rows) for rows in by_length.values()]
    if not groups or not all(group.numel() for group in groups):
        raise SparseGPTError(f"{EXPECTED}; found {_shown(windows)}")
    for group in groups:
        _check(group, decoder)
    return tuple(batch for group in groups for batch in group.split(size or max(1, TOKENS_PER_STEP // group.shape[1])))


def share_of(batches: Sequence[Tensor], ranks: Ranks, *, trained: bool) -> tuple[Tensor, ...]:
    """Micro-batches [batch, sequence] of all ranks -> this rank's, of as many windows each, as far as they go.

    trained: steps of a training go with them, of which every rank takes as many.
    Raises SparseGPTError for fewer windows than ranks, and for a training on unequal shares.
    """
    count = sum(map(len, batches))
    if count < ranks.world:
        raise SparseGPTError(
            f"{ranks.world} ranks have {count} calibration windows: give each at least one, or start fewer",
            settings=("samples",),
        )
    share = dealt(batches, ranks)
    shapes = ranks.gather([part.shape for part in share])
    if trained and any(others != shapes[0] for others in shapes):
        raise SparseGPTError(
            f"training by {ranks.world} ranks needs equal shares: expected calibration windows, of each length, whose "
            f"number is a multiple of {ranks.world}; give other samples, or do not train",
            settings=("samples", "reconstruct", "distill"),
        )
    return share


def dealt(batches: Sequence[Tensor], ranks: Ranks) -> tuple[Tensor, ...]:
    """This rank's part of the windows of micro-batches [batch, sequence], in micro-batches of the same sizes."""
    by_length: dict[int, list[Tensor]] = {}
    for row in ranks.share([row for batch in batches for row in batch]):
        by_length.setdefault(len(row), []).append(row)
    sizes = {batch.shape[1]: len(batch) for batch in reversed(batches)}
    return tuple(part for length, rows in by_length.items() for part in torch.stack(rows).split(sizes[length]))


def _rows(windows: Windows) -> Iterator[Tensor]:
    """Every window, LongTensor [tokens], without what its mask leaves out."""
    if isinstance(windows, Mapping) and "input_ids" in windows:
        rows = [_as_ids(row) for row in _plain_rows(windows["input_ids"])]
        mask = windows.get("attention_mask")
        kept = [torch.ones_like(row) for row in rows] if mask is None else list(_plain_rows(mask))
        if [row.shape for row in rows] != [row.shape for row in kept]:
            raise SparseGPTError(
                f"expected an attention_mask of the shape of input_ids, found {len(kept)} rows of {_lengths(kept)} "
                f"tokens beside {len(rows)} of {_lengths(rows)}"
            )
        yield from (row[keep.bool()] for row, keep in zip(rows, kept, strict=True))
    elif _is_plain(windows):
        yield from map(_as_ids, _plain_rows(windows))
    elif isinstance(windows, Iterable) and not isinstance(windows, str | bytes | Mapping):
        for part in windows:
            yield from _rows(part)
    else:
        raise SparseGPTError(f"{EXPECTED}; found {_shown(windows)}")


def _is_plain(value: Any) -> bool:
    """Whether a value is token ids of one window or, in a tensor or array, of several."""
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, int) for item in value)


def _plain_rows(value: Any) -> Iterator[Tensor]:
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int):
        for part in value:
            yield from _plain_rows(part)
        return
    try:
        ids = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SparseGPTError(f"{EXPECTED}; found {_shown(value)}") from error
    if ids.ndim not in (1, 2):
        raise SparseGPTError(f"{EXPECTED}; found {_shown(value)}")
    yield from (ids if ids.ndim == 2 else [ids])


def _lengths(rows: list[Tensor]) -> str:
    return ", ".join(map(str, sorted({len(row) for row in rows})))


def _as_ids(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.is_complex():
        raise SparseGPTError(f"{EXPECTED}; found {_shown(ids)}")
    return ids.long()


def _check(windows: Tensor, decoder: DecoderModel) -> None:
    known, limit = decoder.vocabulary, decoder.positions
    if windows.min() < 0 or windows.max() >= known:
        raise SparseGPTError(
            f"expected token ids below {known}, found {int(windows.min())} to {int(windows.max())}: "
            "the tokenizer must be the model's own"
        )
    if limit is not None and windows.shape[1] > limit:
        raise SparseGPTError(
            f"the model has {limit} positions: calibration windows of {windows.shape[1]} tokens are too long"
        )


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{list(value.shape)} in {value.dtype}"
    return f"{type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
