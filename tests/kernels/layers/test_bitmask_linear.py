"""Weights of any pattern go everywhere that 2:4 goes: a format is a Form, a table, a layer and one row."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from sparsegpt.errors import SparseGPTError
from sparsegpt.eval.bench.kernels import bench_kernels
from sparsegpt.kernels.checkpoint.archive import pack_folder, unpack_folder
from sparsegpt.kernels.format.bitmask import BitmaskValues, pack_bitmask
from sparsegpt.kernels.format.bitmask_integers import BitmaskIntegers, quantize_bitmask
from sparsegpt.kernels.format.form import Form
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.hf.quantizer import register
from sparsegpt.kernels.layers.bitmask_linear import BitmaskLinear, QuantizedBitmaskLinear
from sparsegpt.kernels.layers.forms import layer_class, usual_forms
from sparsegpt.kernels.layers.linear import explain, packed_layers, set_kernels
from sparsegpt.run.inspection import inspect_folder
from tests.architectures import save_pruned
from tests.kernels.helpers import relative_error, sparse_weight
from tests.kernels.hf.test_hf import TOKENS, pruned_model
from tests.support import refused

FORMS = [BitmaskValues(), BitmaskIntegers(8, 32), BitmaskIntegers(4, 32)]
register()


def unstructured(model: nn.Module) -> nn.Module:
    """The smallest six of ten weights of each linear zeroed, wherever they are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            weight = torch.randn_like(module.weight)
            module.weight.data = weight.masked_fill(weight.abs() < weight.abs().flatten().quantile(0.6), 0)
    return model


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_to_a_file_and_back(form: Form, tmp_path: Path) -> None:
    dense = unstructured(pruned_model())
    dense.save_pretrained(tmp_path / "dense")
    report = pack_folder(tmp_path / "dense", tmp_path / "packed", form=form)
    assert len(report.packed) == 14 and report.left_dense["lm_head.weight"] == "not the weight of a linear layer"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    layers = packed_layers(model).values()
    assert all(type(layer) is layer_class(form) for layer in layers) and len(layers) == 14
    model.save_pretrained(tmp_path / "again")
    unpack_folder(tmp_path / "again", tmp_path / "unpacked")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    expected = plain if form.rounding else dense
    with torch.no_grad():
        for other in (model, again, plain, model.dequantize()):
            torch.testing.assert_close(other(TOKENS).logits, expected(TOKENS).logits, atol=1e-5, rtol=1e-4)
    if not form.rounding:
        assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in plain.state_dict().items())
    found = {finding.name: finding for finding in inspect_folder(tmp_path / "packed")}
    assert found["model.layers.0.self_attn.q_proj"].stored.startswith("packed bitmask")
    assert found["model.layers.0.self_attn.q_proj"].pattern == "unstructured"


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
@pytest.mark.parametrize("variant", ["mixtral", "gpt2", "gpt_oss"])
def test_experts_and_transposed_weights(variant: str, form: Form, tmp_path: Path) -> None:
    save_pruned(tmp_path / "pruned", variant)
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed", form=form)
    assert any(".experts." in name for name in report.packed) == (variant != "gpt2")
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    packed, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("packed", "unpacked"))
    assert all(type(layer) is layer_class(form) for layer in packed_layers(packed).values())
    with torch.no_grad():
        torch.testing.assert_close(packed(TOKENS).logits, dense(TOKENS).logits, atol=1e-3, rtol=1e-3)
    packed.save_pretrained(tmp_path / "again")
    unpack_folder(tmp_path / "again", tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in twice.state_dict().items())


# ---------------------------------------------------------------- which format


def test_the_pattern_chooses_the_format(tmp_path: Path) -> None:
    for name, model in (("2of4", pruned_model()), ("any", unstructured(pruned_model()))):
        model.save_pretrained(tmp_path / name)
    assert pack_folder(tmp_path / "2of4", tmp_path / "a").form.pattern == "2:4"
    assert pack_folder(tmp_path / "any", tmp_path / "b").form.pattern == "bitmask"
    assert pack_folder(tmp_path / "2of4", tmp_path / "c", form=usual_forms("bitmask")).form.pattern == "bitmask"
    found = pack_folder(tmp_path / "any", tmp_path / "d", form=usual_forms(bits=4, group_size=32)).form
    assert found == BitmaskIntegers(4, 32, torch.float32)
    with refused("no linear layer keeps 2:4"):
        pack_folder(tmp_path / "any", tmp_path / "e", form=usual_forms("2:4"))
    with refused("format: expected one of 2:4, bitmask"):
        usual_forms("4:8")


def test_dense_layers_stay_dense(tmp_path: Path) -> None:
    model = unstructured(pruned_model())
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(up, nn.Linear)
    up.weight.data = torch.randn_like(up.weight)
    model.save_pretrained(tmp_path / "dense")
    report = pack_folder(tmp_path / "dense", tmp_path / "packed")
    assert len(report.packed) == 13
    assert report.left_dense["model.layers.0.mlp.up_proj.weight"] == "does not keep a zero in eight weights"
    name = "model.layers.0.mlp.up_proj"
    (tmp_path / "dense" / "report.json").write_text(
        f'{{"layers": [{{"name": "{name}", "sparsity": "0.5", "shape": {list(up.weight.shape)}}}]}}'
    )
    with refused(f"{name}.weight: 0.0% of its weights are zero"):
        pack_folder(tmp_path / "dense", tmp_path / "again")


def test_in_memory_each_layer_takes_the_format_it_keeps() -> None:
    dense = pruned_model()
    layer = dense.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, nn.Linear)
    layer.weight.data = sparse_weight(*layer.weight.shape, 0.7)
    expected = dense(TOKENS).logits.detach()
    assert len(pack_linears(dense)) == 14
    assert explain(dense).startswith("13 packed 2:4 layers: ") and "1 packed bitmask layers: " in explain(dense)
    with torch.no_grad():
        torch.testing.assert_close(dense(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    assert set_kernels(dense, "dense") == 14


# ---------------------------------------------------------------- the layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_layer_graph_and_gradient(bits: int | None, dtype: torch.dtype) -> None:
    weight = sparse_weight(24, 50, 0.6, dtype)
    layer: Any
    if bits is None:
        layer = BitmaskLinear.from_packed(pack_bitmask(weight), torch.randn(24).to(dtype))
    else:
        layer = QuantizedBitmaskLinear.from_packed(quantize_bitmask(weight, bits, 32), torch.randn(24).to(dtype))
    inputs = torch.randn(2, 3, 50).to(dtype).requires_grad_()
    stands_for = layer.weight.double()
    expected = inputs.detach().double() @ stands_for.T + layer.bias.double()
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.compiler.reset()  # as many dtypes as here are more than it keeps
    for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        outputs = run(inputs)
        assert outputs.dtype == dtype and relative_error(outputs.detach(), expected) < tolerance
        (found,) = torch.autograd.grad(outputs.sum(), inputs)
        assert relative_error(found, stands_for.sum(0).expand(2, 3, -1)) < tolerance
    assert layer(torch.empty(0, 50, dtype=dtype)).shape == (0, 24)


def test_export() -> None:
    layer = BitmaskLinear.from_packed(pack_bitmask(sparse_weight(24, 50, 0.6)), None)
    inputs = torch.randn(3, 50)
    program = torch.export.export(layer, (inputs,))
    assert torch.equal(program.module()(inputs), layer(inputs))


def test_a_layer_with_offsets_of_another_mask_is_refused_before_a_kernel_reads() -> None:
    layer = BitmaskLinear.from_packed(pack_bitmask(sparse_weight(24, 50, 0.6)), None)
    layer(torch.randn(1, 50))
    layer.offsets[-1] = 1 << 30
    with pytest.raises(SparseGPTError, match="before row 24"):
        layer(torch.randn(1, 50))
    layer = BitmaskLinear.from_packed(pack_bitmask(sparse_weight(24, 50, 0.6)), None)
    layer.mask = torch.full_like(layer.mask, -1)
    with pytest.raises(SparseGPTError, match="before row"):
        layer(torch.randn(1, 50))


def test_its_routes_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in (BitmaskLinear, QuantizedBitmaskLinear):
        routes: Any = layer.table.routes
        monkeypatch.setitem(routes, "portable", routes["dense"])  # dense alone would not be worth a row
    found = bench_kernels(
        shapes=[(32, 512)], tokens=(2,), dtypes=[torch.float32], rounds=1, copy_bytes=1 << 16, tried={}
    )
    rows = {row.kernel: row for row in found.rows}
    assert {"dense bitmask", "portable bitmask", "portable bitmask int4"} <= rows.keys() and not found.failed
    assert rows["dense bitmask"].ceiling == pytest.approx(1 / (0.5 + 1 / 32), rel=0.02)
