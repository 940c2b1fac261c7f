"""What a table of routes is made of, and how one is chosen: the same for every packed format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.dispatch.measured import ANY, Measured, Step, in_words


@dataclass(frozen=True)
class Route:
    """One way to multiply.

    Attributes:
        refusal: why this route cannot serve a weight (device, dtype, shape, missing tool), or None.
        prepare: the state kept beside the weight, made on first use.
        run: (state, inputs [T, K] contiguous, bias [N] or None) -> outputs [T, N].
        swiglu: (state of gate, state of up, inputs [T, K] contiguous) -> silu(x gate^T) * (x up^T) [T, N], where the
            route has such a kernel; used up to `swiglu_tokens` tokens.
        any_shape: run and swiglu take contiguous inputs [..., K] of any number of dimensions.
    """

    refusal: Callable[[Any], str | None]  # Any: a packed weight, or the form that a layer of integers has
    prepare: Callable[[Any], Any]
    run: Callable[[Any, Tensor, Tensor | None], Tensor]
    swiglu: Callable[[Any, Any, Tensor], Tensor] | None = None
    any_shape: bool = False
    swiglu_tokens: int = ANY


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


def asked_for(name: str, weight: Any, routes: Mapping[str, Route]) -> Choice:
    """One route for every call; raises SparseGPTError for one that cannot serve this weight."""
    reason = routes[name].refusal(weight)
    if reason is not None:
        raise SparseGPTError(f"kernels={name}: {reason}; use --kernels auto or dense")
    return Choice(((ANY, name),), "asked for")


def from_measured(measured: Measured | None, weight: Any, routes: Mapping[str, Route], dense: str = "dense") -> Choice:
    """The choice that a row of measurements gives; a route that cannot serve this weight leaves its place to dense."""
    if measured is None:
        able = any(route.refusal(weight) is None for name, route in routes.items() if name not in ("dense", "resident"))
        why = (
            "no kernel measured here yet; `python -m sparsegpt tune` measures" if able else "no sparse kernel serves it"
        )
        return Choice(((ANY, dense),), why)
    steps: list[Step] = []
    for limit, name in measured.closed(dense):
        serves = name in routes and routes[name].refusal(weight) is None
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
