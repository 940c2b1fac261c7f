"""The fused sweep in Triton's interpreter against the column loop; run by test_fused.py in a process of its own."""

import pytest
import torch

from sparsegpt.solvers import sparsegpt as solver
from sparsegpt.solvers.hessian import DampedHessian
from sparsegpt.sparsity import parse_sparsity
from tests.support import in_long

LARGER = [
    (320, 40, "2:4", 128),
    (300, 33, "0.5", 128),
    (304, 33, "0.7", 256),
    (192, 7, "4:8", 128),
    (128, 16, "16:32", 128),
    (90, 33, "2:3", 128),
]


@pytest.mark.parametrize(
    ("columns", "rows", "pattern", "block_size"),
    [
        (264, 33, "2:4", 128),  # three strips, and rows for two programs
        (164, 7, "0.5", 128),  # a last block that does not fill the strip
        (304, 7, "0.7", 256),  # a threshold over two strips
        (136, 7, "4:8", 128),
        (64, 7, "16:32", 128),
        (90, 7, "2:3", 128),  # a group that is no power of two
        *map(in_long, LARGER),
    ],
)
def test_fused_sweep_gives_the_weights_of_the_column_loop(monkeypatch, columns, rows, pattern, block_size):
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = inputs.T @ inputs
    gram[5], gram[:, 5] = 0, 0  # an input that never fired
    hessian = DampedHessian(gram)
    weight = torch.randn(rows, columns, generator=generator)
    expected, expected_mask = solver.sparsegpt(weight, hessian, parse_sparsity(pattern), block_size=block_size)
    monkeypatch.setattr(solver, "_strip_width", lambda *_: 128)
    monkeypatch.setattr(torch, "empty_like", lambda tensor: torch.full_like(tensor, float("nan")))
    found, found_mask = solver.sparsegpt(weight, hessian, parse_sparsity(pattern), block_size=block_size)
    assert torch.equal(found_mask, expected_mask)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not found[~found_mask].any()
