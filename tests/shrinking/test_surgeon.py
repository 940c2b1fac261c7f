"""Structured OBS against its definition, in float64: a fresh inverse and a least-squares solve for every group."""

import pytest
import torch
from torch import Tensor

from sparsegpt.shrinking.rankings import RANKINGS, Columns, structured
from sparsegpt.shrinking.settings import METHODS, UPDATES
from sparsegpt.shrinking.surgeon import choose_groups, group_costs, refit_columns
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.solvers.layer import prune_layer
from tests.support import best_on_mask, damped, random_layer

GROUPS = pytest.mark.parametrize("group", [1, 3, 4])


def loss(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """tr((W - W') H (W - W')^T) in float64."""
    change = weight.double() - pruned.double()
    return float((change @ hessian.double() * change).sum())


def without(weight: Tensor, hessian: Tensor, groups: list[int], group: int) -> Tensor:
    """The float64 optimum where these groups of columns are zero."""
    mask = torch.ones_like(weight, dtype=torch.bool)
    for index in groups:
        mask[:, index * group : (index + 1) * group] = False
    return best_on_mask(weight, mask, hessian)


@GROUPS
def test_the_cost_of_a_group_is_what_the_loss_grows_by(group):
    weight, hessian = random_layer(5, 24)
    matrix = damped(hessian)
    costs = group_costs(weight.double(), torch.linalg.inv(matrix), group)
    expected = [loss(weight, without(weight, matrix, [index], group), matrix) for index in range(24 // group)]
    torch.testing.assert_close(costs, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=0)


@GROUPS
def test_groups_leave_by_the_exact_loss_of_what_is_left(group):
    """Greedily, one at a time: each choice is the group that the float64 solve with all those gone misses least."""
    weight, hessian = random_layer(5, 24, seed=1)
    matrix = damped(hessian)
    found = choose_groups(weight.double(), torch.linalg.inv(matrix), group, 4, at_once=1).tolist()
    gone: list[int] = []
    for chosen in found:
        losses = {
            index: loss(weight, without(weight, matrix, [*gone, index], group), matrix)
            for index in range(24 // group)
            if index not in gone
        }
        assert chosen == min(losses, key=lambda index: losses[index])
        gone.append(chosen)


@GROUPS
@pytest.mark.parametrize("seed", range(4))
def test_no_group_at_random_beats_the_chosen_one(group, seed):
    weight, hessian = random_layer(6, 24, seed=seed)
    matrix = damped(hessian)
    chosen = choose_groups(weight.double(), torch.linalg.inv(matrix), group, 1).tolist()
    best = loss(weight, without(weight, matrix, chosen, group), matrix)
    for other in torch.randint(24 // group, (5,), generator=torch.Generator().manual_seed(seed)).tolist():
        assert loss(weight, without(weight, matrix, [other], group), matrix) >= best * (1 - 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dampened", [0.01, 1e-4])
def test_what_stays_is_the_least_squares_solution_on_its_columns(dtype, dampened):
    weight, hessian = random_layer(7, 48, seed=3)
    matrix = damped(hessian, dampened)
    kept = torch.rand(48, generator=torch.Generator().manual_seed(0)) < 0.6
    found = refit_columns(weight.to(dtype), matrix.to(dtype), kept)
    expected = best_on_mask(weight, kept.expand_as(weight), matrix)
    assert float((found - expected).norm() / expected.norm()) < (1e-5 if dtype == torch.float32 else 1e-12)
    assert not found[:, ~kept].any()


@GROUPS
@pytest.mark.parametrize("name", RANKINGS)
def test_whole_groups_leave_exactly_as_many_as_asked(name, group):
    weight, hessian = random_layer(5, 24)
    method = structured(name, torch.zeros(24 // group))
    pattern = Columns.of(24, group, 3)
    found = prune_layer(weight, DampedHessian(hessian), pattern, method)
    gone = (found.weight == 0).all(0).unflatten(0, (-1, group)).all(-1)
    assert int(gone.sum()) == 3
    assert str(pattern) == f"3 groups of {group} columns"
    if name == "obs":
        expected = without(weight, damped(hessian), gone.nonzero()[:, 0].tolist(), group)
        assert float((found.weight - expected).norm() / expected.norm()) < 1e-5
    else:
        assert torch.equal(found.weight[:, ~gone.repeat_interleave(group)], weight[:, ~gone.repeat_interleave(group)])


def test_the_surgeon_beats_the_baselines_on_the_layer_loss():
    weight, hessian = random_layer(16, 48, seed=5)
    losses = {
        name: prune_layer(weight, DampedHessian(hessian), Columns.of(48, 1, 16), structured(name, torch.zeros(48))).loss
        for name in RANKINGS
    }
    assert losses["obs"] < min(losses["wanda"], losses["magnitude"], losses["random"])


def test_groups_without_loss_leave_without_a_trace():
    """Columns of zeros and inputs that never fire: W'x is Wx for every input seen."""
    weight, _ = random_layer(5, 16)
    inputs = torch.randn(200, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs[:, 3] = 0
    weight[:, 7] = 0
    hessian = (inputs.T @ inputs).float()
    found = prune_layer(weight, DampedHessian(hessian), Columns.of(16, 1, 2), structured("obs", torch.zeros(16)))
    assert (found.weight == 0).all(0).nonzero()[:, 0].tolist() == [3, 7]
    assert float((inputs @ (weight - found.weight).double().T).norm() / (inputs @ weight.double().T).norm()) < 1e-6


def test_magnitude_counts_what_feeds_a_group():
    weight, hessian = torch.ones(2, 4), torch.eye(4)
    fed = structured("magnitude", torch.tensor([4.0, 1.0, 3.0, 2.0]))
    found = prune_layer(weight, DampedHessian(hessian), Columns.of(4, 1, 2), fed)
    assert found.mask[0].tolist() == [True, False, True, False]


def test_wanda_weighs_by_the_inputs():
    weight, hessian = torch.tensor([[1.0, 2.0, 3.0]]), torch.diag(torch.tensor([16.0, 1.0, 1.0]))  # 4, 2 and 3
    found = prune_layer(weight, DampedHessian(hessian), Columns.of(3, 1, 1), structured("wanda", torch.zeros(3)))
    assert found.mask[0].tolist() == [True, False, True]


def test_the_settings_know_every_ranking():
    assert set(METHODS) == RANKINGS.keys() and set(METHODS) > UPDATES
