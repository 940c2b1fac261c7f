"""Several documents in a window, kept apart: the prune sees each as if it were alone."""

import pytest
import torch

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.capture import run_body
from sparsegpt.model.decoder import DecoderModel, positions_within
from tests.architectures import CONFIGS
from tests.support import prune_model, refused, tiny_model

BOUNDARY = 2
# Their attention takes no positions, or does not tell by them where a document begins.
NOT_APART = ("bloom", "falcon", "gpt_oss", "mpt", "opt")


def documents(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor([BOUNDARY])
    return [torch.cat([start, torch.randint(3, 90, (length - 1,), generator=generator)]) for length in lengths]


def test_positions_begin_anew_at_each_boundary():
    tokens = torch.tensor([[2, 7, 7, 2, 7], [7, 2, 2, 7, 7]])
    assert positions_within(tokens, 2).tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 1, 2]]


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - set(NOT_APART)))
def test_hidden_states_are_those_of_each_document_alone(name):
    model = tiny_model(name, **CONFIGS[name])
    parts = documents(5, 7, 4)
    with torch.no_grad():
        packed = run_body(DecoderModel.of(model, BOUNDARY), torch.cat(parts)[None]).last_hidden_state
        alone = [run_body(DecoderModel.of(model), part[None]).last_hidden_state for part in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_a_prune_of_packed_windows_is_that_of_single_documents():
    """The same Hessians, up to the order of sums: the same mask and weights as close as float32 allows."""
    parts = documents(5, 7, 4, 6, 3, 7)
    windows = torch.stack([torch.cat(parts[:3]), torch.cat(parts[3:])])
    packed, single = tiny_model("llama"), tiny_model("llama")
    prune_model(packed, windows, "2:4", boundary=BOUNDARY, preset="paper")
    prune_model(single, parts, "2:4", preset="paper")
    for (name, ours), theirs in zip(packed.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(ours == 0, theirs == 0), name
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_training_keeps_documents_apart_too():
    """The default's corrections, and both trainings, run on packed windows; the loss falls."""
    model = tiny_model("llama")
    windows = torch.stack([torch.cat(documents(9, 7, seed=seed)) for seed in range(12)])
    report = prune_model(model, windows, "2:4", boundary=BOUNDARY, reconstruct=2, distill=1)
    assert report.epochs[-1].loss < report.epochs[0].loss


@pytest.mark.parametrize("name", NOT_APART)
def test_a_model_that_cannot_is_refused_before_anything_changes(name):
    model = tiny_model(name, **CONFIGS[name])
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(SparseGPTError, match=r"keep packed documents apart|cannot be run on tokens"):
        prune_model(model, torch.stack([torch.cat(documents(9, 7))]), "2:4", boundary=BOUNDARY)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), before, strict=True))


def test_a_window_without_a_boundary_inside_asks_nothing_of_the_model():
    model = tiny_model("opt")
    windows = torch.stack(documents(16, 16))
    with refused("keep packed documents apart", settings=["documents"]):
        prune_model(model, torch.stack([torch.cat(documents(9, 7))]), "2:4", boundary=BOUNDARY)
    prune_model(model, windows, "2:4", boundary=BOUNDARY, preset="paper")
