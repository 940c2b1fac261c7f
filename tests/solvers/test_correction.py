"""Error correction: the target against a dense float64 solve, and exactly the weight while nothing has drifted."""

import pytest
import torch

from sparsegpt.solvers import products
from sparsegpt.solvers.correction import DriftAccumulator, corrected_target, drift_pull
from sparsegpt.solvers.hessian import DampedHessian, HessianAccumulator
from tests.support import damped


def streams(tokens: int = 200, width: int = 12, out: int = 5, drift: float = 0.2):
    """Dense and pruned inputs [tokens, width], dense and pruned residual streams [tokens, out], and a weight."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    dense = normal(tokens, width) @ normal(width, width)
    pruned = dense + drift * normal(tokens, width)
    stream = normal(tokens, out)
    return dense, pruned, stream, stream + drift * normal(tokens, out), normal(out, width)


def target_of(dense, pruned, stream, pruned_stream, weight, shares, damping=0.01, dtype=torch.float64):
    gram, drift = HessianAccumulator(pruned.shape[-1]), DriftAccumulator()
    for part in range(0, len(dense), 64):  # as micro-batches with a batch dimension
        rows = slice(part, part + 64)
        gram.add(pruned[None, rows])
        drift.add_inputs(dense[None, rows], pruned[None, rows])
        drift.add_residual(stream[None, rows], pruned_stream[None, rows], pruned[None, rows])
    return corrected_target(
        weight, DampedHessian(gram.hessian, damping, dtype=dtype), drift_pull(weight.to(dtype), drift, *shares)
    )


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.0, 1.0), (0.75, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("damping", [0.01, 0.5])
@pytest.mark.parametrize("piece", [1, 3 * 12, 1 << 21])
def test_target_is_the_formula_with_a_dense_inverse(shares, damping, piece, monkeypatch):
    monkeypatch.setattr(products, "PIECE", piece)
    dense, pruned, stream, pruned_stream, weight = streams()
    found = target_of(dense, pruned, stream, pruned_stream, weight, shares, damping)
    x, y, r, s, w = (tensor.double() for tensor in (dense, pruned, stream, pruned_stream, weight))
    a, b = shares
    inverse = torch.linalg.inv(damped(y.T @ y, damping))
    expected = w + (a * w @ ((x - y).T @ y) + b * (r - s).T @ y) @ inverse
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_full_correction_is_the_least_squares_fit_to_the_dense_output():
    dense, pruned, stream, _, weight = streams()
    found = target_of(dense, pruned, stream, stream, weight, (1.0, 0.0), damping=1e-9)
    expected = torch.linalg.lstsq(pruned.double(), dense.double() @ weight.double().T).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_both_corrections_fit_what_the_stream_should_be_after_the_addition():
    dense, pruned, stream, pruned_stream, weight = streams()
    found = target_of(dense, pruned, stream, pruned_stream, weight, (1.0, 1.0), damping=1e-9)
    wanted = (dense @ weight.T + stream - pruned_stream).double()
    expected = torch.linalg.lstsq(pruned.double(), wanted).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_without_drift_the_target_is_the_weight_to_the_bit(dtype):
    dense, _, stream, _, weight = (tensor.to(dtype) for tensor in streams())
    found = target_of(dense, dense, stream, stream, weight, (1.0, 1.0), dtype=torch.float32)
    assert torch.equal(found, weight.float())


def test_nothing_gathered_means_nothing_to_correct():
    weight = streams()[-1]
    found = corrected_target(weight, DampedHessian(torch.eye(12)), drift_pull(weight, DriftAccumulator(), 1.0, 1.0))
    assert torch.equal(found, weight)


def test_small_drifts_of_large_activations_do_not_drown_in_rounding():
    dense = streams(drift=0)[0]
    pruned = (dense.double() * 1000 + 0.01 * torch.sign(dense.double())).float()
    dense = dense * 1000
    gathered = DriftAccumulator()
    gathered.add_inputs(dense, pruned)
    expected = (dense.double() - pruned.double()).T @ pruned.double()
    torch.testing.assert_close(gathered.inputs.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
