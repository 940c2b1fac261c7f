"""What can multiply by packed weights, and how one way is chosen: the same for every format.

A format has one table of routes. By itself a sparse route is chosen only where a row of measurements says that it was
faster than dense (measured.py); asked for by name it serves every call, or says why it cannot.

Dimension key: N out_features, K in_features, T tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.cpu.library import Call
from sparsegpt.kernels.dispatch.measured import ANY, Measured, Step, find, in_words

# What a user may ask for: a choice by measurements, and every name that a route may have.
AUTO, DENSE, RESIDENT = "auto", "dense", "resident"
KERNELS = (AUTO, DENSE, RESIDENT, "cpu", "portable", "mma_sp", "wgmma_sp", "cutlass", "cusparselt")

# (weight, rows, out) -> those rows of the dense weight [n, K], in `out` where one is given. rows: slice(start, stop).
RowsOf = Callable[[Any, slice, Tensor | None], Tensor]


@dataclass(frozen=True)
class Route:
    """One way to multiply: inputs [T, K] -> outputs [T, N].

    Attributes:
        refusal: why this route cannot serve a weight (device, dtype, shape, missing tool), or None.
        prepare: the state kept beside the weight, made on first use.
        run: (state, inputs [T, K] contiguous, bias [N] or None) -> outputs [T, N].
        swiglu: (state of gate, state of up, inputs [T, K] contiguous) -> silu(x gate^T) * (x up^T) [T, N], where the
            route has such a kernel; used up to `swiglu_tokens` tokens.
        any_shape: run and swiglu take contiguous inputs [..., K] of any number of dimensions.
        call, gated_call: what run and swiglu call the CPU library with, where that is all they do, for inputs whose K
            is whole words, and outputs: calls that can be part of a program (cpu/program.py).
    """

    refusal: Callable[[Any], str | None]  # Any: a packed weight of the format
    prepare: Callable[[Any], Any]
    run: Callable[[Any, Tensor, Tensor | None], Tensor]
    swiglu: Callable[[Any, Any, Tensor], Tensor] | None = None
    any_shape: bool = False
    swiglu_tokens: int = ANY
    call: Callable[[Any, Tensor, Tensor | None, Tensor], Call] | None = None
    gated_call: Callable[[Any, Any, Tensor, Tensor], Call] | None = None


@dataclass(frozen=True)
class Choice:
    """Which route serves how many tokens: ascending steps, the last without a limit. `why` is a clause for the user."""

    steps: tuple[Step, ...]
    why: str

    def route(self, tokens: int) -> str:
        """The route for so many tokens."""
        for limit, route in self.steps:  # asked for every product: a generator would cost more
            if tokens <= limit:
                return route
        return self.steps[-1][1]

    def __str__(self) -> str:
        return f"{in_words(self.steps)} ({self.why})"


@dataclass(frozen=True)
class Table:
    """Everything that can multiply by the weights [N, K] of one format.

    Attributes:
        rows_of: how rows of a weight are decompressed.
        values: what measurements call a weight's values: "" where they are as they were, or "int8", say.
        routes: by a name of KERNELS; "dense" is always there and refuses nothing.
    """

    rows_of: RowsOf
    values: Callable[[Any], str]
    routes: Mapping[str, Route]

    def choose(self, weight: Any, kernels: str = AUTO) -> Choice:
        """The choice for a weight.

        Raises:
            SparseGPTError: `kernels` is neither "auto" nor a route of the table, or names one that cannot serve.
        """
        if kernels not in (AUTO, *self.routes):
            names = ", ".join((AUTO, *self.routes))
            raise SparseGPTError(f"kernels={kernels} does not take {self._described(weight)}; expected one of {names}")
        if kernels in (AUTO, RESIDENT):
            rows, columns = weight.shape
            measured = find(weight.device, weight.dtype, self.values(weight), rows * columns)
            return self.by_measurement(measured, weight, DENSE if kernels == AUTO else kernels)
        reason = self.routes[kernels].refusal(weight)
        if reason is not None:
            raise SparseGPTError(f"kernels={kernels}: {reason}; use auto or dense")
        return Choice(((ANY, kernels),), "asked for")

    def by_measurement(self, measured: Measured | None, weight: Any, dense: str = DENSE) -> Choice:
        """The choice that a row of measurements gives; dense takes the tokens of a route that cannot serve the weight.

        dense: the route of that name, "dense" or "resident".
        """
        if measured is None:
            return Choice(((ANY, dense),), self._why_unmeasured(weight))
        steps: list[Step] = []
        for limit, name in measured.closed(dense):
            serves = name in self.routes and self.routes[name].refusal(weight) is None
            route = name if serves else dense
            if steps and steps[-1][1] == route:
                steps.pop()
            steps.append((limit, route))
        if len(steps) == 1 and steps[0][1] == dense:
            return Choice(tuple(steps), f"no sparse kernel was faster on {measured.path}")
        gain = ""
        if measured.winner in {route for _, route in steps}:
            gain = f"{measured.ratio} times the library's dense product "
        return Choice(tuple(steps), f"measured {gain}on {measured.path}")

    def dense(self, weight: Any) -> Tensor:
        """A packed weight -> [N, K] in its dtype."""
        return self.rows_of(weight, slice(0, weight.shape[0]), None)

    def serving(self, weight: Any) -> list[str]:
        """The routes that can serve a weight."""
        return [name for name, route in self.routes.items() if route.refusal(weight) is None]

    def _why_unmeasured(self, weight: Any) -> str:
        if set(self.serving(weight)) <= {DENSE, RESIDENT}:
            return "no sparse kernel serves it"
        return "no kernel measured here yet; `python -m sparsegpt tune` measures"

    def _described(self, weight: Any) -> str:
        return f"{self.values(weight) or weight.dtype} values"
