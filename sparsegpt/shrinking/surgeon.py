"""Structured optimal brain surgeon: whole groups of input columns leave one projection.

A projection W [R, C] reads inputs of the damped Hessian H; a group g of its columns is one channel of an MLP, or all
heads of one key-value head. After Hassibi & Stork 1993 and, for groups, Kurtic et al. 2023 (ZipLM, arXiv:2302.04089):

    cost       rho_g = tr(W_g ((H^-1)_gg)^-1 W_g^T)
    removal    W <- W - W_g ((H^-1)_gg)^-1 (H^-1)_g,:         and with H^-1 in the place of W
    refit      W_K = (W H)_:,K (H_KK)^-1                      on the columns K that are left

Dimension key: R out_features, C in_features, G groups, K columns of a group, N columns that are kept.
"""

import torch
from einops import rearrange
from torch import Tensor

# Columns that leave before all others are scored again, and rounds of that at most.
COLUMNS_A_ROUND = 16
ROUNDS = 256


def group_costs(weight: Tensor, inverse: Tensor, group: int) -> Tensor:
    """Weight [R, C], H^-1 [C, C] -> [G]: what the loss grows by if a group of `group` columns leaves alone."""
    diagonal_GKK = _diagonal_blocks(inverse, group)
    columns_GKR = rearrange(weight, "r (g k) -> g k r", k=group)
    costs_G: Tensor = (columns_GKR * torch.linalg.solve(diagonal_GKK, columns_GKR)).sum((1, 2))
    return costs_G


def choose_groups(weight: Tensor, inverse: Tensor, group: int, remove: int, at_once: int | None = None) -> Tensor:
    """Weight [R, C], H^-1 [C, C] -> LongTensor [remove]: the groups that leave, in the order in which they do.

    A few at a time, the cheapest first; what is left is updated and scored again. at_once: groups of one round.
    """
    at_once = at_once or max(1, COLUMNS_A_ROUND // group, -(-remove // ROUNDS))
    left_G = torch.arange(weight.shape[1] // group, device=weight.device)
    gone: list[Tensor] = []
    while (missing := remove - sum(map(len, gone))) > 0:
        cheapest = group_costs(weight, inverse, group).argsort(stable=True)[: min(at_once, missing)]
        gone.append(left_G[cheapest])
        stays_G = torch.ones_like(left_G, dtype=torch.bool)
        stays_G[cheapest] = False
        weight, inverse = _without(weight, inverse, stays_G.repeat_interleave(group))
        left_G = left_G[stays_G]
    return torch.cat(gone) if gone else left_G[:0]


def refit_columns(target: Tensor, hessian: Tensor, kept: Tensor) -> Tensor:
    """Target [R, C], damped H [C, C], kept bool [C] -> [R, C]: the optimum on these columns, zero elsewhere.

    It minimises tr((T - W) H (T - W)^T); H is positive definite.
    """
    columns_N = kept.nonzero()[:, 0]
    factor_NN = torch.linalg.cholesky(hessian[columns_N][:, columns_N])
    right_NR = (target @ hessian[:, columns_N]).T
    result = torch.zeros_like(target)
    result[:, columns_N] = torch.cholesky_solve(right_NR, factor_NN).T
    return result


def _diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """[C, C] -> [G, K, K]: the square blocks along its diagonal."""
    return rearrange(matrix, "(g k) (h l) -> g h k l", k=size, l=size).diagonal().permute(2, 0, 1)


def _without(weight: Tensor, inverse: Tensor, stays: Tensor) -> tuple[Tensor, Tensor]:
    """[R, C], [C, C], bool [C] -> [R, N], [N, N]: the weight updated for columns that leave, and its H^-1."""
    goes_K, stays_N = (~stays).nonzero()[:, 0], stays.nonzero()[:, 0]
    across_KN = inverse[goes_K][:, stays_N]
    solved_KN = torch.linalg.solve(inverse[goes_K][:, goes_K], across_KN)
    return weight[:, stays_N] - weight[:, goes_K] @ solved_KN, inverse[stays_N][:, stays_N] - across_KN.T @ solved_KN
