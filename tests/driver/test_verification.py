"""Blocks run one by one must compute what the whole model computes, or nothing is pruned."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sparsegpt.driver.verification import token_differences, verify_blocks
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.residence import Residence
from tests.support import prune_model, random_windows, refused, tiny_model

GEMMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 128,
    "pad_token_id": None,
}


def gemma(shared: int):
    """A Gemma 4 with embeddings of the tokens for every block; its last `shared` blocks reuse keys and values."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma4_text", **GEMMA, num_kv_shared_layers=shared, initializer_range=0.1)
    return AutoModelForCausalLM.from_config(config).eval()


def verified(model, tokens):
    return verify_blocks(DecoderModel.of(model), tokens, Residence(None, model.dtype, model.dtype))


def test_a_plain_model_agrees_to_the_bit():
    found = verified(tiny_model("llama"), random_windows(2))
    assert (found.linears, found.largest_difference, found.separable) == (14, 0.0, True)


@pytest.mark.parametrize("shared", [0, 2])
def test_what_a_model_computes_from_the_tokens_for_its_blocks_is_there(shared):
    found = verified(gemma(shared), random_windows(2))
    assert found.linears > 20
    assert found.separable == (not shared)


@pytest.mark.parametrize("shared", [0, 2])
def test_every_micro_batch_is_calibrated_with_its_own_arguments(shared):
    """One micro-batch of all windows, and one for each window: the same statistics, so the same weights."""
    windows = random_windows(6)
    pruned = []
    for micro_batch in (6, 1):
        model = gemma(shared)
        prune_model(model, windows, "2:4", preset="paper", micro_batch=micro_batch)
        pruned.append(model.state_dict())
    for name, tensor in pruned[0].items():
        torch.testing.assert_close(tensor, pruned[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("training", ["reconstruct", "distill"])
def test_blocks_that_leave_something_for_later_ones_are_not_trained(training):
    with refused("later blocks", "reconstruct and distill to 0"):
        prune_model(gemma(2), random_windows(6), "2:4", **{training: 1})


class Remembers(nn.Module):
    """A block whose output depends on what an earlier one has left in a module that they share."""

    def __init__(self, block: nn.Module, memory: dict[str, torch.Tensor], *, writes: bool) -> None:
        super().__init__()
        self.block, self.writes = block, writes
        self.__dict__["memory"] = memory

    def forward(self, hidden_states, *args, **kwargs):
        if self.writes:
            self.memory["first"] = hidden_states
        else:
            hidden_states = hidden_states + self.memory.pop("first", 0)
        return self.block(hidden_states, *args, **kwargs)


def test_what_passes_between_blocks_unseen_is_refused_with_the_blocks_name_before_anything_changes():
    model, memory = tiny_model("llama"), {}
    layers = model.model.layers
    layers[0] = Remembers(layers[0], memory, writes=True)
    layers[1] = Remembers(layers[1], memory, writes=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refused("model.layers.1", "others than in the whole model"):
        prune_model(model, random_windows(), "2:4")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_it_can_be_left_out():
    report = prune_model(tiny_model("llama"), random_windows(), "2:4", preset="paper", verify=False)
    assert report.verification == {}


def test_the_report_tells_how_far_they_agree_before_and_after():
    report = prune_model(tiny_model("llama"), random_windows(), "2:4", preset="paper")
    found = report.as_dict()["verification"]
    assert found.keys() == {"before", "after"}
    assert all(entry["linears"] == 14 and entry["largest_difference"] < 1e-5 for entry in found.values())
    assert report.seconds["verify"] > 0


def test_differences_are_shares_of_a_tokens_length():
    theirs = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [float("inf"), 0.0]])
    ours = theirs + torch.tensor([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert token_differences(ours, theirs).tolist() == pytest.approx([0.1, 0, 0, 0])
    broken = theirs.clone()
    broken[2, 0] = float("nan")
    assert token_differences(broken, theirs)[2] == float("inf")
