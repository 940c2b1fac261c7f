"""A format is a Form, a table, a layer and one row: a third one, of weights of no pattern, goes everywhere by that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.bench.kernels import bench_kernels
from sparsegpt.kernels.checkpoint.archive import pack_folder, unpack_folder
from sparsegpt.kernels.dispatch.dense import dense_route, everywhere, nowhere
from sparsegpt.kernels.dispatch.route import Table
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.hf.quantizer import register
from sparsegpt.kernels.layers.forms import LAYERS
from sparsegpt.kernels.layers.linear import PackedLinear, Plan, explain, packed_layers, set_kernels
from sparsegpt.kernels.layers.schemas import introduce
from sparsegpt.run.inspection import inspect_folder
from tests.architectures import save_pruned
from tests.kernels.helpers import relative_error
from tests.kernels.hf.test_hf import TOKENS, pruned_model


@dataclass(frozen=True, eq=False)
class Listed:
    """Values that are not zero, as many as there are, and where they are in the weight, counted along its rows."""

    values: Tensor
    at: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.at.nbytes

    def dense(self) -> Tensor:
        whole = self.values.new_zeros(self.shape[0] * self.shape[1])
        return whole.scatter_(0, self.at.long(), self.values).view(self.shape)


@dataclass(frozen=True)
class ListedValues(Form):
    pattern: ClassVar[str] = "listed"
    parts: ClassVar[tuple[str, ...]] = ("values", "at")

    @classmethod
    def read(cls, settings: Mapping[str, Any]) -> Self | None:
        return cls() if settings.get("pattern") == cls.pattern else None

    def settings(self) -> dict[str, Any]:
        return {"pattern": self.pattern}

    @classmethod
    def samples(cls) -> Sequence[Form]:
        return (cls(),)

    def of_model(self, dtype: torch.dtype) -> Form:
        return self

    def promised(self, sparsity: str) -> bool:
        return True

    def keeps(self, weight: Tensor) -> bool:
        return 2 * int(weight.count_nonzero()) <= weight.numel()

    def pack(self, weight: Tensor, name: str) -> Listed:
        flat = weight.flatten()
        at = flat.nonzero()[:, 0]
        return Listed(flat[at], at.int(), (weight.shape[0], weight.shape[1]))

    def unpack(self, packed: Listed) -> Tensor:
        return packed.dense()

    def tensors(self, packed: Listed) -> tuple[Tensor, ...]:
        return packed.values, packed.at

    def packed(self, tensors: Sequence[Tensor], shape: tuple[int, int]) -> Listed:
        return Listed(*tensors, shape)

    def check(self, packed: Listed) -> None:
        rows, columns = packed.shape
        if not bool(((packed.at >= 0) & (packed.at < rows * columns)).all()):
            raise SparseGPTError("a value is outside of the weight")

    def stored(self, packed: Listed) -> str:
        return f"listed {len(packed.values)}"


def rows_of(weight: Listed, rows: slice, out: Tensor | None) -> Tensor:
    dense = weight.dense()[rows]
    return dense if out is None else out.copy_(dense)


class ListedLinear(PackedLinear):
    table = Table(
        rows_of=rows_of,
        values=lambda weight: "listed",
        routes={"dense": dense_route(rows_of, nowhere), "resident": dense_route(rows_of, everywhere)},
    )

    @classmethod
    def from_packed(cls, packed: Listed, bias: Tensor | None, *, kernels: str = "auto") -> ListedLinear:
        layer = cls(ListedValues(), packed.shape[1], packed.shape[0], kernels)
        for name, tensor in zip(("values", "at", "bias"), (packed.values, packed.at, bias), strict=True):
            layer.register_buffer(name, None if tensor is None else tensor.detach())
        return layer

    @staticmethod
    def for_inputs(packed: Listed, dtype: torch.dtype) -> Listed:
        return packed

    def computes_in(self, dtype: torch.dtype) -> torch.dtype:
        return self.values.dtype

    def plan(self, dtype: torch.dtype | None = None) -> Plan:
        weight, parts = self.packed, tuple(part for part in self._buffers.values() if part is not None)
        plan = Plan(weight, parts, self.bias, weight.dtype, self.table.choose(weight, self.kernels), self.table)
        introduce(self)
        return plan


@pytest.fixture(autouse=True)
def _row(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    monkeypatch.setitem(LAYERS, ListedValues, ListedLinear)  # type: ignore[arg-type]


def unstructured(model: nn.Module) -> nn.Module:
    """The smallest six of ten weights of each linear zeroed, wherever they are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = torch.randn_like(module.weight)
            module.weight.data = weight.masked_fill(weight.abs() < weight.abs().flatten().quantile(0.6), 0)
    return model


def test_to_a_file_and_back(tmp_path: Path) -> None:
    dense = unstructured(pruned_model())
    dense.save_pretrained(tmp_path / "dense")
    report = pack_folder(tmp_path / "dense", tmp_path / "packed", form=ListedValues())
    assert len(report.packed) == 14 and report.left_dense["lm_head.weight"] == "not the weight of a linear layer"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert (
        all(type(layer) is ListedLinear for layer in packed_layers(model).values()) and len(packed_layers(model)) == 14
    )
    model.save_pretrained(tmp_path / "again")
    unpack_folder(tmp_path / "again", tmp_path / "unpacked")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    with torch.no_grad():
        for other in (model, again, plain, model.dequantize()):
            torch.testing.assert_close(other(TOKENS).logits, dense(TOKENS).logits, atol=1e-5, rtol=1e-4)
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in plain.state_dict().items())
    found = {finding.name: finding for finding in inspect_folder(tmp_path / "packed")}
    assert found["model.layers.0.self_attn.q_proj"].stored.startswith("packed listed 4")
    assert found["model.layers.0.self_attn.q_proj"].pattern == "unstructured"


def test_experts(tmp_path: Path) -> None:
    save_pruned(tmp_path / "pruned", "mixtral")
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed", form=ListedValues())
    assert any(".experts." in name for name in report.packed)
    packed, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "pruned"))
    assert all(type(layer) is ListedLinear for layer in packed_layers(packed).values())
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS).logits, dense(TOKENS).logits, atol=1e-4, rtol=1e-3)


def test_in_memory_and_in_a_graph() -> None:
    dense = unstructured(pruned_model())
    expected = dense(TOKENS).logits.detach()
    assert len(pack_linears(dense, form=ListedValues())) == 14
    assert explain(dense) == "14 packed listed layers: dense (no sparse kernel serves it)"
    assert set_kernels(dense, "resident") == 14
    layer, inputs = packed_layers(dense)["model.layers.0.mlp.up_proj"], torch.randn(3, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for run in (layer, compiled):
        outputs = run(inputs)
        assert relative_error(outputs.detach(), inputs.detach().double() @ layer.weight.double().T) < 2e-6
        (found,) = torch.autograd.grad(outputs.sum(), inputs)
        assert relative_error(found, layer.weight.double().sum(0).expand(3, -1)) < 2e-6
    with torch.no_grad():
        torch.testing.assert_close(dense(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)


def test_its_routes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    routes: Any = ListedLinear.table.routes
    monkeypatch.setitem(routes, "portable", routes["dense"])  # dense alone would not be worth a row
    found = bench_kernels(
        shapes=[(32, 64)], tokens=(2,), dtypes=[torch.float32], rounds=1, copy_bytes=1 << 16, tried={}
    )
    rows = {row.kernel: row for row in found.rows}
    assert {"dense listed", "portable listed"} <= rows.keys() and not found.failed
    assert rows["dense listed"].ceiling == pytest.approx(1.0)  # half of the values, each with a number of as many bytes
