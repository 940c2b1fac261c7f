"""Is a kernel right? Asked before it is timed.

    relative error = ||found - expected|| / ||expected||, expected in float32 on the dense weight

A kernel of UNTRIED has never run on a GPU, or not on this one. It is asked in a process of its own first: a fault on a
GPU ends all later work of the process, and a kernel that waits for ever ends nothing.
`python -m sparsegpt.kernels.dispatch.trial ROUTE DEVICE [OUTxIN ...]` is that process.

Dimension key: N out_features, K in_features, T tokens."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional

from sparsegpt.errors import SparseGPTError
from sparsegpt.kernels.dispatch.integer24 import INTEGER_ROUTES
from sparsegpt.kernels.dispatch.packed24 import ROUTES
from sparsegpt.kernels.dispatch.route import Route
from sparsegpt.kernels.format.pack import Packed24, packed_shapes, unpack
from sparsegpt.kernels.format.quantized import Typed24, dequantize, quantize

UNTRIED = ("portable", "mma_sp", "wgmma_sp")
# one rounding of the result, twice; float32 sums in any order
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-5}
_SECONDS = 180.0  # loading torch, compiling, and a kernel that hangs
_SHAPES = ((256, 256), (200, 1312))
_TOKENS = (1, 33, 64, 65, 300, 2048)
_NIBBLES = (4, 8, 9, 12, 13, 14)  # the six pairs i0 < i1


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
    sample, shapes = random_packed((32, 32), dtype, device), tuple(shapes)
    names = [name for name in UNTRIED if ROUTES[name].refusal(sample) is None]
    with ThreadPoolExecutor(max(1, len(names))) as pool:
        return dict(zip(names, pool.map(lambda name: trial(name, device, shapes, seconds), names), strict=True))


def trial(
    route: str, device: torch.device, shapes: Iterable[tuple[int, int]] = (), seconds: float = _SECONDS
) -> str | None:
    """Why a route fails in a process of its own on a device, on small shapes and on `shapes`, or None."""
    more = [f"{rows}x{columns}" for rows, columns in shapes]
    command = [sys.executable, "-m", "sparsegpt.kernels.dispatch.trial", route, str(device), *more]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done after {seconds:.0f} s"
    return None if done.returncode == 0 else last_error(done.stderr, done.returncode)


def last_error(output: str, code: int) -> str:
    """What a process that failed says was wrong: its last exception (CUDA's have advice behind them) or last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return [f"exit code {code}", *lines[-1:], *raised[-1:]][-1]


def try_route(route: str, device: torch.device, shapes: Iterable[tuple[int, int]] = ()) -> None:
    """Raise SparseGPTError where a route gives a wrong product in bfloat16 or float16 on small shapes and on `shapes`.

    Its kernels for integer values, where it has some, are tried as well.
    """
    for dtype in (torch.bfloat16, torch.float16):
        for shape in (*_SHAPES, *shapes):
            weight = random_packed(shape, dtype, device)
            _try_product(f"{route} {dtype} {shape}", ROUTES[route], weight, unpack(weight))
            for bits in (8, 4) if route in INTEGER_ROUTES else ():
                small = Typed24(quantize(weight, bits), dtype)
                if INTEGER_ROUTES[route].refusal(small) is None:
                    dense = unpack(dequantize(small.weight, torch.float32))
                    _try_product(f"{route} int{bits} {dtype} {shape}", INTEGER_ROUTES[route], small, dense)


def _try_product(name: str, route: Route, weight: Packed24 | Typed24, dense: Tensor) -> None:
    state, dtype = route.prepare(weight), weight.dtype if isinstance(weight, Typed24) else weight.values.dtype
    for tokens in _TOKENS:
        inputs = torch.randn(tokens, dense.shape[1], device=dense.device).to(dtype)
        expected = functional.linear(inputs.float(), dense.float())
        reason = failure(functools.partial(route.run, state, inputs, None), expected)
        if reason is not None:
            raise SparseGPTError(f"{name}, {tokens} tokens: {reason}")


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
