"""What a basis is measured by, against the definition; and that learning finds a basis that is known."""

import pytest
import torch

from sparsegpt.rotation.learning import Schedule, learn_basis
from sparsegpt.rotation.objective import HeadsTerm, InputTerm, OutputTerm, ValuesTerm, dropped_share, some
from sparsegpt.sparsity import NM, Unstructured
from tests.support import brute_nm_mask, brute_row_mask, damped, random_layer

PATTERNS = [NM(2, 4), NM(1, 8), Unstructured(0.6), Unstructured(0.25, per_row=True)]
ALL = torch.Generator().manual_seed(0)


def basis_of(size, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


def lost(saliency, pattern):
    """By the definition: of each row's sum the part that is not kept, in the mean."""
    if isinstance(pattern, NM):
        kept = brute_nm_mask(saliency, pattern)
    else:
        kept = brute_row_mask(saliency, round(pattern.zeros * saliency.shape[1]))
    return float(sum(row[~mask].sum() / row.sum() for row, mask in zip(saliency, kept, strict=True)) / len(saliency))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_basis_of_inputs_costs_what_obs_says(pattern):
    weight, hessian = random_layer(6, 16)
    basis, inverse = basis_of(16), torch.linalg.inv(damped(hessian))
    turned = torch.linalg.inv(basis.T @ damped(hessian) @ basis)  # of the inputs as the new basis shows them
    saliency = (weight.double() @ basis) ** 2 / turned.diagonal()
    other = NM(1, 2)
    losses = InputTerm((weight.double(), weight.double()), (pattern, other), inverse).losses(basis, None, ALL)
    assert list(map(float, losses)) == pytest.approx([lost(saliency, pattern), lost(saliency, other)], rel=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_basis_of_outputs_costs_what_wanda_says(pattern):
    weight, hessian = random_layer(8, 16)
    basis, scale = basis_of(8), hessian.diagonal().double()
    term = OutputTerm(weight.double(), scale, pattern)
    saliency = (basis.T @ weight.double()) ** 2 * scale
    assert float(*term.losses(basis, None, ALL)) == pytest.approx(lost(saliency, pattern), rel=1e-9)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_bases_of_values_cost_what_the_whole_matrix_would(pattern):
    """Two key-value heads of 4 values, two heads each: one block-diagonal basis of 16 columns."""
    weight, hessian = random_layer(6, 16)
    bases = torch.stack([basis_of(4, 1), basis_of(4, 2)])
    whole = torch.block_diag(bases[0], bases[0], bases[1], bases[1])
    inverse = torch.linalg.inv(damped(hessian))
    within = torch.stack([inverse[4 * h : 4 * h + 4, 4 * h : 4 * h + 4] for h in range(4)]).view(2, 2, 4, 4)
    term = HeadsTerm(weight.double().view(6, 2, 2, 4), within, pattern)
    (expected,) = InputTerm((weight.double(),), (pattern,), inverse).losses(whole, None, ALL)
    assert float(*term.losses(bases, None, ALL)) == pytest.approx(float(expected), rel=1e-9)
    made, scale = random_layer(8, 16, seed=1)[0].double(), hessian.diagonal().double()
    by_head = torch.block_diag(bases[0], bases[1])
    (expected,) = OutputTerm(made, scale, pattern).losses(by_head, None, ALL)
    term = ValuesTerm(made.view(2, 4, 16), scale, pattern)
    assert float(*term.losses(bases, None, ALL)) == pytest.approx(float(expected), rel=1e-9)


def test_lines_are_drawn_in_whole_groups():
    drawn = some(64, 16, torch.Generator().manual_seed(1), group=4)
    assert len(drawn) == len(set(drawn.tolist())) == 16
    assert all(start % 4 == 0 for start in drawn[::4].tolist())
    assert (drawn.view(-1, 4) - drawn[::4, None] == torch.arange(4)).all()
    assert some(16, 16, torch.Generator()) == slice(None)


@pytest.mark.parametrize("fixes_ones", [False, True])
def test_learning_finds_a_basis_in_which_nothing_is_dropped(fixes_ones):
    """Weights that are 2:4 in a hidden basis: a few degrees away from it, learning comes back."""
    generator = torch.Generator().manual_seed(0)
    size = 8
    sparse = torch.randn(256, size, generator=generator, dtype=torch.float64)
    sparse.view(256, -1, 4).masked_fill_(
        ~brute_nm_mask(torch.rand(256, size, generator=generator), NM(2, 4)).view(256, -1, 4), 0
    )
    skew = 0.15 * torch.randn(size, size, generator=generator, dtype=torch.float64)
    skew = skew - skew.T
    if fixes_ones:
        projection = torch.eye(size, dtype=torch.float64) - 1 / size
        skew = projection @ skew @ projection
    hidden = torch.linalg.matrix_exp(skew)
    weight, identity = sparse @ hidden.T, torch.eye(size, dtype=torch.float64)

    def objective(basis):
        return dropped_share((weight @ basis).square(), NM(2, 4))

    basis = learn_basis(objective, identity, Schedule(200, 0.05), fixes_ones=fixes_ones)
    assert torch.allclose(basis.T @ basis, identity, atol=1e-12)
    assert objective(identity) > 0.02
    assert objective(basis) < 0.1 * objective(identity)
    if fixes_ones:
        assert torch.allclose(basis.sum(1), torch.ones(size, dtype=torch.float64), atol=1e-9)
