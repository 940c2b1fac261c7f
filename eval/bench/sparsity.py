"""What sparsity buys in speed: one layer at several shares of zeros against the library's dense product.

Per pattern and number of tokens the library multiplies by the dense weight, on a CPU also with that weight in huge
pages, torch by the same weight in its compressed rows (CSR), and every route of this package that can serve by the
packed one. All take turns in the same rounds. A product that is wrong or does not run is left out.

CLAIMED are the figures of the article that this engine began with, to be compared and not believed.
Dimension key: N out_features, K in_features, T tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.eval.bench.kernels import time_in_turns
from sparsegpt.eval.bench.trial import failure, random_dense
from sparsegpt.eval.drawing import new_figure, saved
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.dispatch.route import RESIDENT
from sparsegpt.kernels.layers.forms import layer_class, usual_forms
from sparsegpt.sparsity import NM, parse_sparsity

PATTERNS = ("2:4", "0.5", "0.6", "0.7", "0.8", "0.9", "0.95", "0.99")
TOKENS = (1, 16, 256)
# Times faster than dense, by the share of zeros, on a CPU; on a GPU one range for all.
CLAIMED = {0.5: (1.0, 1.2), 0.9: (1.5, 2.0), 0.95: (2.0, 3.0), 0.99: (3.0, 5.0)}
CLAIMED_ON_GPU = (1.0, 2.5)
LIBRARY, HUGE_PAGES, CSR = "library", "library, huge pages", "CSR"


@dataclass(frozen=True)
class SparsityRow:
    """One pattern and number of tokens.

    microseconds: of the library, of `route`, the fastest of this package's, and of what else was there; None where it
    was not. claimed: times faster than dense, from and to, or None.
    """

    pattern: str
    tokens: int
    library_microseconds: float
    huge_pages_microseconds: float | None
    csr_microseconds: float | None
    route: str
    microseconds: float
    claimed: tuple[float, float] | None

    @property
    def best_dense(self) -> float:
        """Microseconds of the library where it was faster: in ordinary memory or in huge pages."""
        return min(filter(None, (self.library_microseconds, self.huge_pages_microseconds)))

    @property
    def speedup(self) -> float:
        """Best dense time / time of this package's fastest route."""
        return self.best_dense / self.microseconds

    @property
    def csr_speedup(self) -> float | None:
        """Best dense time / time of torch's compressed rows."""
        return None if self.csr_microseconds is None else self.best_dense / self.csr_microseconds


def bench_sparsity(
    *,
    device: str = "cpu",
    shape: tuple[int, int] = (4096, 4096),
    patterns: Sequence[str] = PATTERNS,
    tokens: Sequence[int] = TOKENS,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 11,
    tell: Callable[[str], object] = lambda line: None,
) -> Iterator[SparsityRow]:
    """Rows as they are measured, pattern by pattern. tell(line) is called as each pattern begins.

    Raises SparseGPTError for a pattern that is not understood or does not fit the shape.
    """
    target = torch.device(device)
    for pattern in patterns:
        tell(pattern)
        dense = _weight(pattern, shape, dtype, target)
        candidates = _candidates(pattern, dense)
        for count in tokens:
            inputs = torch.randn(count, shape[1], device=target).to(dtype)
            expected = functional.linear(inputs.float(), dense.float())
            runs = {name: partial(run, inputs) for name, run in candidates.items()}
            right = {name: run for name, run in runs.items() if name == LIBRARY or failure(run, expected) is None}
            yield _row(pattern, count, time_in_turns(right, target, rounds), target)


def _row(pattern: str, tokens: int, seconds: dict[str, float], device: torch.device) -> SparsityRow:
    found = {name: 1e6 * taken for name, taken in seconds.items()}
    ours = {name: taken for name, taken in found.items() if name not in (LIBRARY, HUGE_PAGES, CSR)}
    route = min(ours, key=lambda name: ours[name])
    claimed = CLAIMED.get(parse_sparsity(pattern).zeros) if device.type == "cpu" else CLAIMED_ON_GPU
    return SparsityRow(
        pattern, tokens, found[LIBRARY], found.get(HUGE_PAGES), found.get(CSR), route, ours[route], claimed
    )


def _weight(pattern: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N, K] of normal values, zeros wherever chance puts them in the pattern."""
    wanted = parse_sparsity(pattern)
    if wanted == NM(2, 4):
        return random_dense(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    chance = torch.rand(shape, generator=generator, device=device)
    weight = torch.randn(shape, generator=generator, device=device)
    if isinstance(wanted, NM):
        wanted.check(shape[1], "weight")
        ranks = chance.unflatten(1, (-1, wanted.m)).argsort(-1).argsort(-1).flatten(1)
        return weight.masked_fill_(ranks >= wanted.n, 0).to(dtype)
    return weight.masked_fill_(chance < wanted.zeros, 0).to(dtype)


def _candidates(pattern: str, dense: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """{name: a product with the weight [N, K]}: inputs [T, K] -> [T, N]."""
    found: dict[str, Callable[[Tensor], Tensor]] = {LIBRARY: lambda inputs: functional.linear(inputs, dense)}
    if dense.is_cpu:
        huge = dense.clone()
        library.to_huge_pages(huge)
        found[HUGE_PAGES] = lambda inputs: functional.linear(inputs, huge)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch announces that its compressed rows are in beta
        rows = dense.to_sparse_csr()
    found[CSR] = lambda inputs: (rows @ inputs.T).T
    (form,) = usual_forms("2:4" if parse_sparsity(pattern) == NM(2, 4) else "bitmask")
    table, weight = layer_class(form).table, form.pack(dense, "weight").settled()
    for name in table.serving(weight):
        if name != RESIDENT:  # that is the library's product
            found[name] = _prepared(table.routes[name], weight)
    return found


def _prepared(route: Any, weight: Any) -> Callable[[Tensor], Tensor]:
    state = route.prepare(weight)
    return lambda inputs: route.run(state, inputs, None)


def draw_sparsity(rows: Sequence[SparsityRow], title: str, path: Path) -> list[Path]:
    """Times faster than dense against the share of zeros, a panel a number of tokens, with what was claimed."""
    counts = sorted({row.tokens for row in rows})
    figure, panels = new_figure(1, len(counts), figsize=(4 * len(counts), 4), sharey=True)
    for count, axes in zip(counts, panels[0], strict=True):
        of_count = [row for row in rows if row.tokens == count]
        lines = sorted((parse_sparsity(row.pattern).zeros, row) for row in of_count if ":" not in row.pattern)
        zeros = [share for share, _ in lines]
        axes.axhline(1, color="grey", linestyle=":", label="dense library, the faster")
        axes.plot(zeros, [row.speedup for _, row in lines], marker="o", label="bitmask")
        if compressed := [(share, row.csr_speedup) for share, row in lines if row.csr_speedup]:
            axes.plot(*zip(*compressed, strict=True), marker=".", label="torch CSR")
        for row in of_count:
            if ":" in row.pattern:
                axes.plot(parse_sparsity(row.pattern).zeros, row.speedup, "s", label=row.pattern)
        claimed = [(share, row.claimed) for share, row in lines if row.claimed]
        if claimed:
            low, high = zip(*(claim for _, claim in claimed), strict=True)
            axes.fill_between([share for share, _ in claimed], low, high, alpha=0.2, label="claimed")
        axes.set(xlabel="share of zeros", yscale="log", title=f"{count} token{'s' if count > 1 else ''}")
        for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            which("{x:g}x")
    panels[0][0].set(ylabel="times faster than dense")
    panels[0][0].legend()
    figure.suptitle(title)
    return saved(figure, path)
