"""The engine on a CUDA device against the same definitions; skipped where there is none."""

import copy

import pytest
import torch

from sparsegpt import HessianAccumulator, parse_sparsity, prune_weight
from sparsegpt.solvers.hessian import exact_product
from tests.support import (
    assert_pattern,
    block_linears,
    damped,
    obs_oracle,
    prune_model,
    random_layer,
    random_windows,
    tiny_model,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_gram_products_are_exact_whatever_the_process_allows(dtype):
    inputs = torch.randn(4096, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.set_float32_matmul_precision("medium")
    try:
        accumulator = HessianAccumulator(96, "cuda")
        accumulator.add(inputs.cuda())
        product = exact_product(inputs.cuda().T, inputs.cuda())
    finally:
        torch.set_float32_matmul_precision("highest")
    expected = inputs.double().T @ inputs.double()
    for found in (accumulator.hessian, product):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("sparsity", ["2:4", "16:32", "0.5", "0.5/row"])
def test_sparsegpt_is_the_definition(sparsity):
    weight, hessian = random_layer(12, 96)
    expected, mask = obs_oracle(weight, damped(hessian), parse_sparsity(sparsity), block_size=96)
    found = prune_weight(weight.cuda(), hessian.cuda(), sparsity, method="sparsegpt", block_size=96)
    assert torch.equal(found.mask.cpu(), mask)
    torch.testing.assert_close(found.weight.cpu().double(), expected, rtol=1e-3, atol=1e-3)


def test_blocks_compute_on_the_gpu_while_the_model_stays_on_the_cpu():
    model = tiny_model("llama")
    moved = copy.deepcopy(model).cuda()
    report = prune_model(model, random_windows(), "2:4", device="cuda")
    for linear in block_linears(model).values():
        assert linear.weight.device.type == "cpu"
        assert_pattern(linear.weight, "2:4")
    whole = prune_model(moved, random_windows(), "2:4")
    for here, there in zip(report.layers, whole.layers, strict=True):
        assert here.relative_error == pytest.approx(there.relative_error, rel=0.05)


def test_reconstruction_in_mixed_precision_helps_and_keeps_the_masks():
    model = tiny_model("llama").cuda()
    report = prune_model(model, random_windows(100), "2:4", preset="fast", reconstruct=5, learning_rate=5e-3)
    assert all(block.reconstruction < 1 for block in report.blocks)
    for linear in block_linears(model).values():
        assert_pattern(linear.weight, "2:4")


@pytest.mark.parametrize("resident", [True, False])
def test_distillation_in_mixed_precision_helps_and_keeps_the_masks(resident):
    """With all of the model on the GPU, and with one block at a time there."""
    model = tiny_model("llama").to("cuda" if resident else "cpu")
    settings = {"preset": "paper", "method": "magnitude", "distill": 2, "distill_rate": 1e-3, "device": "cuda"}
    report = prune_model(model, random_windows(400), "2:4", **settings)
    assert report.epochs[-1].loss < report.epochs[0].loss
    for linear in block_linears(model).values():
        assert_pattern(linear.weight, "2:4")
