"""The choice of kernels: the table's rows, its limits, and what `resident` keeps."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.bench.trial import UNTRIED
from sparsegpt.kernels import Packed24, quantize, unpack
from sparsegpt.kernels.cpu import library
from sparsegpt.kernels.cpu import packed24 as on_cpu
from sparsegpt.kernels.dispatch import dense, measured
from sparsegpt.kernels.dispatch.dense import block_rows, dense_route, everywhere, nowhere
from sparsegpt.kernels.dispatch.integer24 import INTEGER24
from sparsegpt.kernels.dispatch.measured import ANY, MEASURED, Measured
from sparsegpt.kernels.dispatch.packed24 import PACKED24
from sparsegpt.kernels.dispatch.route import DENSE, KERNELS, Choice, Table
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.format.quantized import IntegerValues
from sparsegpt.kernels.layers.forms import LAYERS
from sparsegpt.kernels.layers.linear import explain
from sparsegpt.kernels.layers.sparse_linear import Sparse24Linear
from tests.kernels.helpers import relative_error, weight24

BF16, F32 = torch.bfloat16, torch.float32
ROUTES, choose = PACKED24.routes, PACKED24.choose


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A table of two rows on a machine of the best level, whatever this one is."""
    rows = (
        Measured("avx512_bf16", F32, 64 * 96, ((7, "cpu"),), ((3, "cpu"),), "2.0"),
        Measured("avx512_bf16", F32, ANY, ((20, "cpu"),), ((9, "cpu"),), "3.0"),
    )
    monkeypatch.setattr(measured, "MEASURED", rows)
    monkeypatch.setattr(measured, "measured_file", lambda: tmp_path / "measured.json")
    monkeypatch.setattr(library, "machine_level", lambda: "avx512_bf16")
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
    monkeypatch.setattr(library, "machine_level", lambda: "avx2")
    assert choose(packed(64)).route(1) == "dense"
    monkeypatch.setattr(library, "machine_level", lambda: "avx512_bf16")
    monkeypatch.setitem(ROUTES, "cpu", replace(ROUTES["cpu"], refusal=lambda weight: "no"))
    assert choose(packed(64)).route(1) == "dense"


def test_untried_kernels_are_not_in_the_shipped_table() -> None:
    assert {"portable", "mma_sp", "wgmma_sp"} == set(UNTRIED) <= ROUTES.keys()
    assert not set(UNTRIED) & {route for row in MEASURED for _, route in row.steps}


def test_resident_decompresses_once(table: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(on_cpu, "unpack_fast", lambda weight, *, out: (made.append(weight.shape), unpack(weight))[1])
    layer = Sparse24Linear.from_packed(packed(64), None, kernels="resident")
    weight = weight24(64, 96)
    for tokens in (4, 50, 50):
        inputs = torch.randn(tokens, 96)
        assert relative_error(layer(inputs), inputs.double() @ weight.double().T) < 2e-6
    assert made == [(64, 96)]
    assert "up to 3 tokens, resident above" in explain(torch.nn.Sequential(layer))


@pytest.mark.parametrize("bias", [True, False])
def test_dense_in_blocks_of_rows(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "BLOCK_BYTES", 64 * 96 * 4)
    assert [block_rows(size) for size in (1, 96 * 4, 96 * 4 + 1, 1 << 20)] == [64 * 96 * 4, 64, 64, 64]
    weight = weight24(200, 96)
    given: Tensor | None = torch.randn(200) if bias else None
    layer = Sparse24Linear.from_packed(pack(weight), given, kernels="dense")
    inputs = torch.randn(5, 96)
    expected = inputs.double() @ weight.double().T + (0 if given is None else given.double())
    assert relative_error(layer(inputs), expected) < 2e-6


@pytest.mark.parametrize("keeps", [everywhere, nowhere])
def test_the_dense_route_of_any_format(keeps: dense.Keeps, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a format that keeps its rows as they are: blocks of rows, the last one shorter, or all of them once."""
    monkeypatch.setattr(dense, "BLOCK_BYTES", 64 * 40 * 4)
    asked: list[slice] = []

    def rows_of(weight: Tensor, rows: slice, out: Tensor | None) -> Tensor:
        asked.append(rows)
        return weight[rows] if out is None else out.copy_(weight[rows])

    # not a Tensor, which is what a kept weight is told by
    class Rows:
        shape, device, dense = (150, 40), torch.device("cpu"), torch.randn(150, 40)

        def __getitem__(self, rows: slice) -> Tensor:
            return self.dense[rows]

    route, inputs, bias = dense_route(rows_of, keeps), torch.randn(3, 40), torch.randn(150)
    state = route.prepare(Rows())
    for _ in range(2):
        expected = inputs.double() @ Rows.dense.double().T + bias.double()
        assert relative_error(route.run(state, inputs, bias), expected) < 2e-6
    blocks = [slice(0, 64), slice(64, 128), slice(128, 150)]
    assert asked == ([slice(0, 150)] if keeps is everywhere else blocks * 2)


def test_forced_kernels_serve_every_call() -> None:
    choice = choose(packed(64), "dense")
    assert choice == Choice(((ANY, "dense"),), "asked for") and choice.route(10**6) == "dense"


@pytest.mark.parametrize("table", [layer.table for layer in LAYERS.values()])
def test_tables_use_the_names_a_user_may_ask_for(table: Table) -> None:
    assert {DENSE} < table.routes.keys() < set(KERNELS)
    assert table.routes[DENSE].refusal(None) is None


@pytest.mark.parametrize("kernels", ["resident", "cutlass", "fastest"])
def test_a_name_that_a_table_does_not_have_is_refused(kernels: str) -> None:
    small = quantize(packed(64), 4)
    with pytest.raises(SparseGPTError, match=f"{kernels} does not take int4 values; expected one of auto, dense, cpu"):
        INTEGER24.choose(small, kernels)


def test_integers_are_decompressed_as_their_torch_twin_says() -> None:
    small = IntegerValues(4, 32).of_model(F32).pack(weight24(40, 96), "w")
    expected = IntegerValues(4, 32).unpack(small)
    out = torch.empty(10, 96)
    assert torch.equal(INTEGER24.dense(small), expected)
    assert INTEGER24.rows_of(small, slice(20, 30), out) is out and torch.equal(out, expected[20:30])
