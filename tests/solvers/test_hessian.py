"""The Hessian: exact sums, damping that escalates in stated steps, and its inverse's Cholesky factor."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsegpt import HessianAccumulator
from sparsegpt.solvers import hessian
from sparsegpt.solvers.hessian import DampedHessian, ScaledHessian, exact_product, full_precision_matmul
from tests.support import damped, random_layer, refused


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Accumulation


@pytest.mark.parametrize("width", [1, 5, 16, 37])
@pytest.mark.parametrize("gram_block", [4, 512])
def test_accumulated_batches_give_the_gram_matrix(width, gram_block, monkeypatch):
    monkeypatch.setattr(hessian, "GRAM_BLOCK", gram_block)
    batches = [normal(*shape, width, seed=seed) for seed, shape in enumerate([(3, 7), (11,), (1, 1, 5), (2, 0), (1,)])]
    accumulator = HessianAccumulator(width)
    for batch in batches:
        accumulator.add(batch)
    rows = torch.cat([batch.reshape(-1, width) for batch in batches]).double()
    assert accumulator.tokens == len(rows) == 38
    assert accumulator.hessian.dtype == torch.float32
    torch.testing.assert_close(accumulator.hessian.double(), rows.T @ rows, rtol=1e-5, atol=1e-5)


def test_hessian_is_symmetric_to_the_bit(monkeypatch):
    monkeypatch.setattr(hessian, "GRAM_BLOCK", 8)
    accumulator = HessianAccumulator(29)
    for seed in range(3):
        accumulator.add(normal(50, 29, seed=seed))
    assert torch.equal(accumulator.hessian, accumulator.hessian.T)


def test_reading_the_hessian_does_not_stop_the_sum():
    accumulator = HessianAccumulator(4)
    accumulator.add(torch.ones(2, 4))
    first = accumulator.hessian
    accumulator.add(torch.ones(1, 4))
    assert (first == 2).all()
    assert (accumulator.hessian == 3).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    inputs = normal(4000, 6).to(dtype)
    accumulator = HessianAccumulator(6)
    accumulator.add(inputs)
    torch.testing.assert_close(accumulator.hessian.double(), inputs.double().T @ inputs.double(), rtol=1e-5, atol=1e-2)


def test_accumulation_needs_no_gradient_and_keeps_none():
    inputs = normal(5, 4).requires_grad_()
    accumulator = HessianAccumulator(4)
    accumulator.add(inputs)
    assert not accumulator.hessian.requires_grad


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_matmul_precision_of_the_process_comes_back(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        with full_precision_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
        exact_product(normal(2, 3), normal(3, 2))
        assert torch.get_float32_matmul_precision() == precision
        with pytest.raises(RuntimeError):
            exact_product(normal(2, 3), normal(2, 3))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


# Damping


def test_solve_is_a_product_with_the_inverse():
    weight, raw = random_layer(5, 24)
    expected = weight.double() @ torch.linalg.inv(damped(raw, 0.05))
    found = DampedHessian(raw, 0.05, dtype=torch.float64).solve(weight.double())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@given(damping=st.floats(1e-4, 1.0), scale=st.floats(1e-6, 1e6))
def test_damping_is_a_share_of_the_mean_diagonal(damping, scale):
    raw = random_layer(1, 8)[1] * scale
    found = DampedHessian(raw, damping)
    assert found.damping == damping
    torch.testing.assert_close(found.damped.double(), damped(raw, damping), rtol=1e-5, atol=0)


def with_smallest_eigenvalue(value: float, size: int = 12) -> torch.Tensor:
    """A symmetric matrix with unit mean diagonal, eigenvalues near 1 and one eigenvalue that is given."""
    basis = torch.linalg.qr(normal(size, size).double()).Q
    eigenvalues = torch.full((size,), (size - value) / (size - 1), dtype=torch.float64)
    eigenvalues[0] = value
    matrix = basis @ eigenvalues.diag() @ basis.T
    return (matrix + matrix.T) / 2


@pytest.mark.parametrize(("smallest", "used"), [(0.001, 0.01), (-0.05, 0.1), (-0.5, 1.0)])
def test_damping_escalates_in_steps_and_reports_what_was_used(smallest, used):
    raw = with_smallest_eigenvalue(smallest)
    found = DampedHessian(raw.float(), 0.01, name="fc1")
    assert found.damping == pytest.approx(used)
    expected = torch.linalg.inv(damped(raw, used))
    torch.testing.assert_close((found.inverse_factor.T @ found.inverse_factor).double(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.damped.double(), damped(raw, used), rtol=1e-5, atol=1e-6)


def test_hessian_beyond_every_step_is_an_error_with_the_layers_name():
    found = DampedHessian(with_smallest_eigenvalue(-2.0), 0.01, name="model.layers.7.mlp.down_proj")
    with refused("model.layers.7.mlp.down_proj", "not positive definite", "damping=1", "raise the damping"):
        _ = found.inverse_factor


def test_float64_rescues_what_float32_cannot_factor(monkeypatch):
    raw = random_layer(1, 12)[1]
    real = hessian.inverse_factor
    monkeypatch.setattr(hessian, "inverse_factor", lambda m: None if m.dtype == torch.float32 else real(m))
    found = DampedHessian(raw, 0.01)
    assert found.damping == 0.01
    assert found.inverse_factor.dtype == torch.float32
    torch.testing.assert_close(found.inverse_factor.double(), real(damped(raw)), rtol=1e-4, atol=1e-6)


# Dead inputs


def test_inputs_that_never_fired_neither_break_nor_bend_the_rest():
    raw = random_layer(1, 12)[1]
    raw[3] = raw[:, 3] = 0
    raw[7] = raw[:, 7] = 0
    found = DampedHessian(raw, 0.01, dtype=torch.float64)
    assert found.dead.nonzero().flatten().tolist() == [3, 7]
    torch.testing.assert_close(found.damped, damped(raw))
    alive = ~found.dead
    inverse = found.inverse_factor.T @ found.inverse_factor
    torch.testing.assert_close(
        inverse[alive][:, alive], torch.linalg.inv(damped(raw[alive][:, alive])), rtol=1e-9, atol=1e-12
    )


def test_hessian_of_dead_inputs_alone_still_factors():
    found = DampedHessian(torch.zeros(4, 4), 0.01)
    assert found.dead.all()
    assert torch.isfinite(found.inverse_factor).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_name_the_layer(value):
    accumulator = HessianAccumulator(4)
    accumulator.add(torch.ones(3, 4))
    accumulator.add(torch.tensor([[1.0, value, 1.0, 1.0]]))
    with refused("layers.1.fc2", "NaN or infinite"):
        DampedHessian(accumulator.hessian, name="layers.1.fc2")


def test_rows_of_a_scaled_hessian_are_those_of_the_definition():
    raw = random_layer(1, 16)[1].double()
    raw[5] = raw[:, 5] = 0  # a dead input
    scale = torch.linspace(0.5, 2, 16, dtype=torch.float64)
    scaled = ScaledHessian(DampedHessian(raw, 0.1, dtype=torch.float64), scale)
    expected = torch.diag(1 / scale) @ raw @ torch.diag(1 / scale)
    expected.diagonal().copy_(damped(raw, 0.1).diagonal() / scale**2)
    torch.testing.assert_close(scaled[:], expected)
    torch.testing.assert_close(torch.cat([scaled[slice(0, 7)], scaled[slice(7, 16)]]), expected)
    torch.testing.assert_close(scaled.diagonal(), expected.diagonal())


def test_a_released_factor_leaves_what_was_derived_from_it_and_can_be_had_again():
    raw = random_layer(1, 16)[1]
    hessian = DampedHessian(raw, 0.05)
    factor = hessian.inverse_factor.clone()
    hessian.release_factor()
    assert "_factorised" not in vars(hessian)
    assert hessian.damping == 0.05
    torch.testing.assert_close(hessian.inverse_diagonal, torch.linalg.inv(damped(raw, 0.05)).diagonal().float())
    assert "_factorised" not in vars(hessian)
    assert torch.equal(hessian.inverse_factor, factor)


def test_a_factor_that_others_wait_for_is_kept():
    hessian = DampedHessian(random_layer(1, 16)[1])
    factor, hessian.keep_factor = hessian.inverse_factor, True
    hessian.release_factor()
    assert hessian.inverse_factor is factor
