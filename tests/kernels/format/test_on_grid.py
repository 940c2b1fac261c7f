"""Integers that a solver has chosen are packed as they are: what was scored is what is multiplied."""

import pytest
import torch

from sparsegpt.kernels.format.bitmask_integers import BitmaskIntegers
from sparsegpt.kernels.format.quantized import IntegerValues
from sparsegpt.sparsity import NM
from tests.support import brute_nm_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def solved(bits, group, dtype):
    """A 2:4 weight of all integers but the largest, scales of 8 significant bits and either sign."""
    generator = torch.Generator().manual_seed(bits)
    most = 2 ** (bits - 1) - 1
    steps = torch.randint(-most - (bits < 8), most, (16, 256), generator=generator)
    steps.masked_fill_(~brute_nm_mask(torch.rand(16, 256, generator=generator), NM(2, 4)), 0)
    scales = torch.randint(128, 256, (16, 256 // group), generator=generator) / 2**14
    scales[::2] *= -1
    weight = (steps * scales.repeat_interleave(group, 1)).float()
    return weight.to(dtype)


@pytest.mark.parametrize("form", [IntegerValues, BitmaskIntegers])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64)])
def test_a_weight_on_a_grid_comes_back_to_the_bit(form, dtype, bits, group):
    weight = solved(bits, group, dtype)
    packing = form(bits, group, dtype)
    assert torch.equal(packing.unpack(packing.pack(weight, "w")), weight)


@pytest.mark.parametrize("form", [IntegerValues, BitmaskIntegers])
def test_a_weight_on_no_grid_is_rounded_to_nearest(form):
    weight = solved(4, 128, torch.float32) + 0
    weight[weight != 0] += 1e-4 * torch.randn(int((weight != 0).sum()), generator=torch.Generator().manual_seed(0))
    packing = form(4, 128, torch.float32)
    again = packing.unpack(packing.pack(weight, "w"))
    step = weight.view(16, 2, 128).abs().amax(-1) / 7
    assert not torch.equal(again, weight)
    assert ((again - weight).abs().view(16, 2, 128) <= 0.51 * step[..., None]).all()
