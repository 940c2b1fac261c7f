"""Layers and folders with integer values: within half a step of the weights, and the same through a file."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from sparsegpt.cli.commands import app
from sparsegpt.errors import SparseGPTError
from sparsegpt.files.tensor_files import WEIGHTS
from sparsegpt.kernels import dequantize, quantize, unpack
from sparsegpt.kernels.checkpoint.archive import pack_folder, unpack_folder
from sparsegpt.kernels.cpu import integer24
from sparsegpt.kernels.cpu.library import machine_level
from sparsegpt.kernels.dispatch import dense as dense_route
from sparsegpt.kernels.format.pack import pack
from sparsegpt.kernels.format.quantized import IntegerValues, Quantized24
from sparsegpt.kernels.hf.quantizer import load_packed, register
from sparsegpt.kernels.layers.linear import packed_layers, set_kernels
from sparsegpt.kernels.layers.quantized_linear import Quantized24Linear
from sparsegpt.run.inspection import inspect_folder
from tests.kernels.helpers import relative_error, weight24
from tests.kernels.hf.test_hf import TOKENS, pruned_model

# one rounding of the weight and one of the output to 8, 11 or 24 bits; float32 also sums in another order
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def layer(
    shape: tuple[int, int], bits: int, bias: bool, group_size: int = 64
) -> tuple[torch.Tensor, Quantized24Linear]:
    """A layer and the dense float64 weight that its integers stand for."""
    small = quantize(pack(weight24(*shape)), bits, 64)
    dense = unpack(dequantize(small, torch.float64))  # q * scale is exact in float32
    return dense, Quantized24Linear.from_packed(small, torch.randn(shape[0]) if bias else None)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernels", ["auto", "dense"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 20), (0, 4)])
def test_products(lead: tuple[int, ...], kernels: str, dtype: torch.dtype, bits: int) -> None:
    for bias in (True, False):
        dense, packed = layer((40, 100), bits, bias)
        packed.kernels = kernels
        inputs = torch.randn(*lead, 100).to(dtype)
        expected = inputs.double() @ dense.T + (0 if packed.bias is None else packed.bias.double())
        found = packed(inputs)
        assert found.dtype == dtype and found.shape == expected.shape
        assert relative_error(found, expected) < TOLERANCE[dtype]


def test_dense_route_in_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_route, "BLOCK_BYTES", 4 * 100 * 70)
    dense, packed = layer((150, 100), 4, True)
    inputs = torch.randn(5, 100)
    assert packed.bias is not None
    assert relative_error(packed(inputs), inputs.double() @ dense.T + packed.bias.double()) < 2e-6


@pytest.mark.skipif(machine_level() not in integer24.LEVELS, reason="needs AVX2")
def test_the_cpu_kernel_serves_few_tokens() -> None:
    _, packed = layer((40, 128), 4, False)
    assert packed(torch.randn(2, 128).bfloat16()).shape == (2, 40) and packed.choice.route(1) == "cpu"
    assert packed(torch.randn(2, 128)).dtype == torch.float32 and packed.choice.route(1) == "dense"
    assert "no sparse kernel serves it" in packed.choice.why
    with pytest.raises(SparseGPTError, match="computes in bfloat16"):
        packed.kernels = "cpu"
        packed(torch.randn(2, 128))


def test_casting_leaves_the_integers_alone() -> None:
    dense, packed = layer((24, 64), 8, True)
    before = packed.packed
    for dtype in (torch.bfloat16, torch.float32):
        cast = copy.deepcopy(packed).to(dtype)
        assert cast.scales.dtype == torch.int16 and torch.equal(cast.scales, packed.scales)
        assert cast.bias is not None and cast.bias.dtype == dtype
    fresh = Quantized24Linear(64, 24, bits=8, group_size=64)
    assert torch.equal(fresh(torch.ones(1, 64)), torch.zeros(1, 24))
    fresh.load_state_dict(packed.state_dict())
    assert torch.equal(fresh(torch.ones(1, 64)), packed(torch.ones(1, 64)))
    assert torch.equal(packed.packed.words, before.words) and "int8, groups of 64" in repr(packed)
    assert relative_error(packed.weight, dense) < 1e-7


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kernels", ["auto", "dense"])
def test_writing_to_the_buffers_is_noticed(kernels: str, dtype: torch.dtype) -> None:
    dense, packed = layer((24, 64), 8, True)
    packed.kernels = kernels
    inputs = torch.randn(3, 64).to(dtype)
    packed(inputs)  # from here on a copy of the bias in `dtype` is kept
    assert packed.bias is not None
    packed.bias.add_(5)
    assert relative_error(packed(inputs), inputs.double() @ dense.T + packed.bias.double()) < TOLERANCE[dtype]
    small = quantize(pack(weight24(24, 64, seed=1)), 8, 64)
    other = Quantized24Linear.from_packed(small, torch.randn(24), kernels=kernels)
    packed.load_state_dict(other.state_dict())
    assert torch.equal(packed(inputs), other(inputs))


def test_strided_parts_and_a_bias_that_does_not_fit() -> None:
    whole = quantize(pack(weight24(48, 256)), 8, 64)
    parts = [part[::2] for part in (whole.words, whole.scales, whole.meta)]
    strided = Quantized24(*parts, (24, 256), 8, 64)
    bias, inputs = torch.randn(48)[::2], torch.randn(3, 256).bfloat16()
    expected = inputs.double() @ unpack(dequantize(whole, torch.float64))[::2].T + bias.double()
    assert relative_error(Quantized24Linear.from_packed(strided, bias)(inputs), expected) < 6e-3
    with pytest.raises(SparseGPTError, match=r"expected a bias \[24\]"):
        Quantized24Linear.from_packed(strided, torch.zeros(4))(inputs)
    with pytest.raises(SparseGPTError, match=r"in int32, float16, int32; found .* torch\.int8"):
        Quantized24(parts[0].to(torch.int8), parts[1], parts[2], (24, 256), 8, 64)


@pytest.mark.parametrize("tokens", [1, 300])
def test_autocast_changes_no_product(tokens: int) -> None:
    dense, packed = layer((24, 64), 8, True)
    inputs, grads = torch.randn(tokens, 64, requires_grad=True), torch.randn(tokens, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed(inputs)
        found.backward(grads)
    assert packed.bias is not None and inputs.grad is not None
    assert found.dtype == torch.float32
    expected = inputs.detach().double() @ dense.T + packed.bias.double()
    assert relative_error(found.detach(), expected) < 2e-6
    assert relative_error(inputs.grad, grads.double() @ dense) < 2e-6


@pytest.mark.parametrize("group_size", [2**40, 2**70])
def test_a_group_wider_than_the_row_is_the_row(group_size: int) -> None:
    packed = pack(weight24(24, 100))
    wide, whole = quantize(packed, 8, group_size), quantize(packed, 8, 128)
    assert wide.group_size == group_size and wide.scales.shape == (24, 1)
    assert torch.equal(wide.words, whole.words) and torch.equal(wide.scales, whole.scales)
    assert torch.equal(unpack(dequantize(wide, torch.float32)), unpack(dequantize(whole, torch.float32)))
    for dtype in TOLERANCE:
        inputs = torch.randn(3, 100).to(dtype)
        layers = (Quantized24Linear.from_packed(weight, None) for weight in (wide, whole))
        assert torch.equal(*(each(inputs) for each in layers))


def test_gradient_for_the_input() -> None:
    dense, packed = layer((24, 64), 4, False)
    inputs = torch.randn(2, 3, 64, requires_grad=True)
    (found,) = torch.autograd.grad(packed(inputs).square().sum(), inputs)
    outputs = inputs.detach().double() @ dense.T
    assert relative_error(found, 2 * outputs @ dense) < 1e-5


def test_refusals() -> None:
    with pytest.raises(SparseGPTError, match="4 or 8 bits"):
        Quantized24Linear(64, 24, bits=3)
    with pytest.raises(SparseGPTError, match="multiple of 32"):
        Quantized24Linear(64, 24, bits=4, group_size=40)
    _, packed = layer((24, 64), 4, False)
    with pytest.raises(SparseGPTError, match=r"found inputs in torch\.float64"):
        packed(torch.randn(2, 64).double())
    with pytest.raises(SparseGPTError, match="expected inputs"):
        packed(torch.randn(2, 60))
    for kernels, message in (("cutlass", "does not take int4"), ("portable", "need a GPU"), ("mma_sp", "NVIDIA GPU")):
        with pytest.raises(SparseGPTError, match=message):
            packed.kernels = kernels
            packed(torch.randn(2, 64))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    register()
    base = tmp_path_factory.mktemp("integers")
    pruned_model().save_pretrained(base / "dense")
    pack_folder(base / "dense", base / "packed", form=IntegerValues(4, 32))
    return base / "dense", base / "packed"


@pytest.mark.parametrize(("bits", "group_size"), [(8, 128), (4, 32), (4, 128)])
def test_round_trip_within_half_a_step(bits: int, group_size: int, folders: tuple[Path, Path], tmp_path: Path) -> None:
    report = pack_folder(folders[0], tmp_path / "packed", form=IntegerValues(bits, group_size))
    unpack_folder(tmp_path / "packed", tmp_path / "back")
    dense, back = (load_file(folder / WEIGHTS) for folder in (folders[0], tmp_path / "back"))
    stored = load_file(tmp_path / "packed" / WEIGHTS)
    assert back.keys() == dense.keys() and len(report.packed) == 14
    for name, weight in dense.items():
        module = name.removesuffix(".weight")
        if module not in report.packed:
            assert torch.equal(back[name], weight)
            continue
        scales = stored[f"{module}.scales"].view(torch.float16).double().repeat_interleave(group_size, 1)
        # half a step; beyond it only what rounding the largest value's scale to float16 (11 bits) cuts off
        step = scales[:, : weight.shape[1]] * (0.5 + 2 ** (bits - 1) * 2**-11)
        assert bool(((back[name].double() - weight.double()).abs() <= step).all())
        assert torch.equal(back[name] != 0, (weight != 0) & (back[name] != 0))  # no weight appears where none was


def test_loads_generates_and_saves(folders: tuple[Path, Path], tmp_path: Path) -> None:
    unpack_folder(folders[1], tmp_path / "back")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    assert all(isinstance(layer, Quantized24Linear) for layer in packed_layers(model).values())
    with torch.no_grad():
        expected = plain(TOKENS).logits
        torch.testing.assert_close(model(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
        assert model.generate(TOKENS, max_new_tokens=5, do_sample=False).shape == (1, 15)
        half = load_packed(folders[1], dtype=torch.bfloat16)
        assert relative_error(half(TOKENS).logits, expected) < 0.03
        assert set_kernels(half, "dense") == 14
        assert relative_error(half(TOKENS).logits, expected) < 0.03
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(load_packed(tmp_path / "again")(TOKENS).logits, model(TOKENS).logits)
        torch.testing.assert_close(model.dequantize()(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)


def test_inspect_says_how_values_are_stored(folders: tuple[Path, Path]) -> None:
    found = {finding.name: finding for finding in inspect_folder(folders[1])}
    assert found["model.layers.0.mlp.up_proj"].stored == "packed int4, groups of 32"
    assert found["model.layers.0.mlp.up_proj"].pattern == "2:4"
    assert found["lm_head"].stored == "float32"
    assert inspect_folder(folders[0])[0].stored == "float32"


def test_damage_and_unknown_values_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folders[1].iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["values"]["bits"] = 2
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match="update sparsegpt"):
        unpack_folder(broken, tmp_path / "back")
    with pytest.raises(SparseGPTError, match="update sparsegpt"):
        AutoModelForCausalLM.from_pretrained(broken)
    del config["quantization_config"]["values"]
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(SparseGPTError, match=r"promises .*\.values"):
        unpack_folder(broken, tmp_path / "back")
    (broken / "config.json").write_bytes((folders[1] / "config.json").read_bytes())
    data = bytearray((broken / WEIGHTS).read_bytes())
    data[-9] ^= 1
    (broken / WEIGHTS).write_bytes(data)
    for load in (AutoModelForCausalLM.from_pretrained, lambda path: unpack_folder(path, tmp_path / "back")):
        with pytest.raises(SparseGPTError, match="checksum of"):
            load(broken)


def test_on_the_command_line(folders: tuple[Path, Path], tmp_path: Path) -> None:
    command = ["pack", str(folders[0]), str(tmp_path / "out"), "--values", "int8", "--group-size", "64"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0 and "values rounded to int8, groups of 64" in result.output.replace("\n", " ")
    assert isinstance(CliRunner().invoke(app, [*command[:-3], "int3", "--overwrite"]).exception, SparseGPTError)
