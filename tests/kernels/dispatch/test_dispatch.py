"""The choice of kernels: the table's rows, its limits, and what `resident` keeps."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sparsegpt.kernels import Packed24, cpu
from sparsegpt.kernels.dispatch import measured
from sparsegpt.kernels.dispatch import packed24 as dispatch
from sparsegpt.kernels.dispatch.dense import block_rows
from sparsegpt.kernels.dispatch.measured import ANY, MEASURED, Measured
from sparsegpt.kernels.dispatch.packed24 import ROUTES, choose
from sparsegpt.kernels.dispatch.route import Choice
from sparsegpt.kernels.dispatch.trial import UNTRIED
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.layers.linear import Sparse24Linear, explain
from tests.kernels.helpers import relative_error, weight24

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A table of two rows on a machine of the best level, whatever this one is."""
    rows = (
        Measured("avx512_bf16", F32, 64 * 96, ((7, "cpu"),), ((3, "cpu"),), "2.0"),
        Measured("avx512_bf16", F32, ANY, ((20, "cpu"),), ((9, "cpu"),), "3.0"),
    )
    monkeypatch.setattr(measured, "MEASURED", rows)
    monkeypatch.setattr(cpu, "machine_level", lambda: "avx512_bf16")
    monkeypatch.setitem(ROUTES, "cpu", replace(ROUTES["cpu"], refusal=lambda weight: None))
    yield


def packed(rows: int, columns: int = 96, dtype: torch.dtype = F32) -> Packed24:
    return pack(weight24(rows, columns, dtype))


def test_the_first_row_that_fits_decides(table: None) -> None:
    small, large = choose(packed(64)), choose(packed(65))
    assert small.steps == ((7, "cpu"), (ANY, "dense"))
    assert [small.route(tokens) for tokens in (1, 7, 8, 1000)] == ["cpu", "cpu", "dense", "dense"]
    assert large.steps[0] == (20, "cpu") and "3.0 times the library" in large.why
    kept = choose(packed(64), "resident")
    assert [kept.route(tokens) for tokens in (3, 4)] == ["cpu", "resident"]
    unknown = choose(packed(64, dtype=BF16))
    assert unknown.route(1) == "dense" and "sparsegpt tune" in unknown.why
    assert choose(packed(64, dtype=BF16), "resident").route(1) == "resident"


def test_a_row_needs_its_path_and_a_route_that_serves(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "machine_level", lambda: "avx2")
    assert choose(packed(64)).route(1) == "dense"
    monkeypatch.setattr(cpu, "machine_level", lambda: "avx512_bf16")
    monkeypatch.setitem(ROUTES, "cpu", replace(ROUTES["cpu"], refusal=lambda weight: "no"))
    assert choose(packed(64)).route(1) == "dense"


def test_untried_kernels_are_not_in_the_shipped_table() -> None:
    assert {"portable", "mma_sp", "wgmma_sp"} == set(UNTRIED) <= ROUTES.keys()
    assert not set(UNTRIED) & {route for row in MEASURED for _, route in row.steps}


def test_resident_decompresses_once(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(cpu, "unpack_fast", lambda weight: (made.append(weight.shape), dispatch_unpack(weight))[1])
    dispatch_unpack = cpu.unpack
    layer = Sparse24Linear.from_packed(packed(64), None, kernels="resident")
    weight = weight24(64, 96)
    for tokens in (4, 50, 50):
        inputs = torch.randn(tokens, 96)
        assert relative_error(layer(inputs), inputs.double() @ weight.double().T) < 2e-6
    assert made == [(64, 96)]
    assert "up to 3 tokens, resident above" in explain(torch.nn.Sequential(layer))


@pytest.mark.parametrize("bias", [True, False])
def test_dense_in_blocks_of_rows(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "BLOCK_BYTES", 64 * 96 * 4)
    assert [block_rows(size) for size in (1, 96 * 4, 96 * 4 + 1, 1 << 20)] == [64 * 96 * 4, 64, 64, 64]
    weight = weight24(200, 96)
    given: Tensor | None = torch.randn(200) if bias else None
    layer = Sparse24Linear.from_packed(pack(weight), given, kernels="dense")
    inputs = torch.randn(5, 96)
    expected = inputs.double() @ weight.double().T + (0 if given is None else given.double())
    assert relative_error(layer(inputs), expected) < 2e-6


def test_forced_kernels_serve_every_call() -> None:
    choice = choose(packed(64), "dense")
    assert choice == Choice(((ANY, "dense"),), "asked for") and choice.route(10**6) == "dense"
