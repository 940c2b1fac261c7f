"""Is a kernel right? Asked before it is timed.

    relative error = ||found - expected|| / ||expected||, expected in float32 on the dense weight

A kernel of UNTRIED has never run on a GPU, or not on this one. It is asked in a process of its own first: a fault on a
GPU ends all later work of the process, and a kernel that waits for ever ends nothing.
`python -m sparsegpt.eval.bench.trial ROUTE DEVICE [OUTxIN ...]` is that process.

Dimension key: N out_features, K in_features, T tokens."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.dispatch.route import Table
from sparsegpt.kernels.format.form import Form, PackedWeight
from sparsegpt.kernels.format.pack import Packed24, packed_shapes, unpack
from sparsegpt.kernels.layers.forms import LAYERS, layer_class, samples

UNTRIED = ("portable", "mma_sp", "wgmma_sp")
# one rounding of the result, twice; float32 sums in any order
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-5}
_SECONDS = 180.0  # loading torch, compiling, and a kernel that hangs
_SHAPES = ((256, 256), (200, 1312))
_TOKENS = (1, 33, 64, 65, 300, 2048)
_NIBBLES = (4, 8, 9, 12, 13, 14)  # the six pairs i0 < i1


@dataclass(frozen=True, eq=False)
class Sample:
    """A weight in one of the forms that kernels multiply by."""

    form: Form
    weight: PackedWeight

    @property
    def table(self) -> Table:
        """What multiplies by it."""
        return layer_class(self.form).table

    @property
    def values(self) -> str:
        """What measurements call its values; "" where they are as they were."""
        return self.table.values(self.weight)

    def dense(self) -> Tensor:
        """The weight that it stands for, [N, K] float32, by the format's torch twin."""
        return self.form.unpack(layer_class(self.form).for_inputs(self.weight, torch.float32)).float()


def samples_of(dense: Tensor) -> Iterator[Sample]:
    """A dense 2:4 weight [N, K] -> it in every form, to be multiplied in its dtype."""
    for form in samples():
        yield Sample(form, layer_class(form).for_inputs(form.pack(dense, "sample").settled(), dense.dtype))


def failure(run: Callable[[], Tensor], expected: Tensor) -> str | None:
    """What is wrong with a product [T, N], or None; what it raises is wrong too."""
    try:
        found = run()
        if found.shape != expected.shape:
            return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
        error = float((found.float() - expected).norm() / expected.norm())  # what a GPU raises, it raises here
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    if not error < TOLERANCE[found.dtype]:  # also where it is not a number
        return f"relative error {error:.2g}, above {TOLERANCE[found.dtype]}"
    return None


def trials(
    device: torch.device, dtype: torch.dtype, shapes: Iterable[tuple[int, int]] = (), seconds: float = _SECONDS
) -> dict[str, str | None]:
    """{route: why it fails, or None} for those of UNTRIED that serve here, side by side; `shapes` are tried as well."""
    few = samples_of(random_dense((32, 32), dtype, device))
    serving = {name for sample in few for name in sample.table.serving(sample.weight)}
    names, shapes = [name for name in UNTRIED if name in serving], tuple(shapes)
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return dict(zip(names, pool.map(lambda name: trial(name, device, shapes, seconds), names), strict=True))


def trial(
    route: str, device: torch.device, shapes: Iterable[tuple[int, int]] = (), seconds: float = _SECONDS
) -> str | None:
    """Why a route fails in a process of its own on a device, on small shapes and on `shapes`, or None."""
    more = [f"{rows}x{columns}" for rows, columns in shapes]
    command = [sys.executable, "-m", "sparsegpt.eval.bench.trial", route, str(device), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    return None if done.returncode == 0 else last_error(done.stderr, done.returncode)


def last_error(output: str, code: int) -> str:
    """What a process that failed says was wrong: its last exception (CUDA's have advice after them) or last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return [f"exit code {code}", *lines[-1:], *raised[-1:]][-1]


def try_route(route: str, device: torch.device, shapes: Iterable[tuple[int, int]] = ()) -> None:
    """Raise SparseGPTError where a route gives a wrong product in bfloat16 or float16 on small shapes and on `shapes`.

    All forms of weights that it serves are tried. A route that no table has is an error too.
    """
    if not any(route in layer.table.routes for layer in LAYERS.values()):
        raise SparseGPTError(f"{route}: no table has such a route")
    for dtype in (torch.bfloat16, torch.float16):
        for shape in (*_SHAPES, *shapes):
            for sample in samples_of(random_dense(shape, dtype, device)):
                if route in sample.table.serving(sample.weight):
                    _try_products(route, sample)


def _try_products(route: str, sample: Sample) -> None:
    found, weight = sample.table.routes[route], sample.weight
    state, dense = found.prepare(weight), sample.dense()
    for tokens in _TOKENS:
        inputs = torch.randn(tokens, dense.shape[1], device=dense.device).to(weight.dtype)
        expected = functional.linear(inputs.float(), dense)
        reason = failure(functools.partial(found.run, state, inputs, None), expected)
        if reason is not None:
            name = " ".join(filter(None, (route, sample.values, str(weight.dtype), str(weight.shape))))
            raise SparseGPTError(f"{name}, {tokens} tokens: {reason}")


def random_dense(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A dense 2:4 weight [N, K] of normal values and uniformly random patterns; SparseGPTError as `packed_shapes`."""
    return unpack(random_packed(shape, dtype, device))


def random_packed(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Packed24:
    """A packed weight of normal values and uniformly random patterns."""
    generator = torch.Generator(device).manual_seed(seed)
    values_shape, (rows, words) = packed_shapes(shape)
    values = torch.randn(values_shape, generator=generator, device=device, dtype=torch.float32).to(dtype)
    values[:, shape[1] // 2 :] = 0  # padding
    table = torch.tensor(_NIBBLES, dtype=torch.uint8, device=device)
    nibbles = table[torch.randint(6, (rows, 8 * words), generator=generator, device=device)]
    meta = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int32)
    return Packed24(values, meta, shape)


if __name__ == "__main__":
    given = [tuple(map(int, shape.split("x"))) for shape in sys.argv[3:]]
    try_route(sys.argv[1], torch.device(sys.argv[2]), [(rows, columns) for rows, columns in given])
