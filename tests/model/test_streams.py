"""What flows through the blocks of every architecture, against runs of the whole model; what projections are added to.

Residual correction is checked by its meaning: with both shares at 1 and everything else fixed, no change of the
projection's weight may bring the stream behind the addition any closer to the dense model's.
"""

import pytest
import torch

from sparsegpt.driver.block_job import BlockJob
from sparsegpt.driver.groups import GroupSolver
from sparsegpt.driver.reports import Listener, PruneReport
from sparsegpt.model.capture import ModelInputs, run_watched
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import FAMILIES, family_of, prunable_linears
from sparsegpt.model.streams import ActivationStore, Streams
from sparsegpt.model.unfuse import unfused
from sparsegpt.settings.prune_settings import resolve_settings
from tests.architectures import (
    MIXTURES,
    VARIANTS,
    WRAPPERS,
    block_matrices,
    expected_inputs,
    tiny_variant,
    tiny_wrapper,
)
from tests.support import logits_of, prune_model, random_windows, relative_error

MODELS = [*VARIANTS, *WRAPPERS]


def tiny(variant: str) -> torch.nn.Module:
    return tiny_wrapper(variant) if variant in WRAPPERS else tiny_variant(variant)


@pytest.fixture(params=MODELS)
def model(request):
    return tiny(request.param)


@torch.no_grad()
def hidden_states_of(model, windows):
    """What enters each block, and what leaves the last, seen by hooks while the whole model runs."""
    blocks, seen = list(DecoderModel.of(model).blocks), []

    def enter(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def leave(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks]
    handles.append(blocks[-1].register_forward_hook(leave))
    logits_of(model, windows)
    for handle in handles:
        handle.remove()
    return seen


@torch.no_grad()
def test_blocks_run_one_by_one_give_the_models_own_hidden_states(model):
    windows = random_windows(5)
    decoder = DecoderModel.of(model)
    every = hidden_states_of(model, windows)
    inputs = ModelInputs(decoder, windows.split(2))
    hidden = inputs.hidden
    for index, block in enumerate(decoder.blocks):
        torch.testing.assert_close(torch.cat(hidden), every[index], rtol=1e-4, atol=1e-5)
        with unfused(block):
            hidden = [
                inputs.calls(tokens, "test")[index].run(block, part)
                for tokens, part in zip(inputs.batches, hidden, strict=True)
            ]
    torch.testing.assert_close(torch.cat(hidden), every[-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_linear_is_seen_to_receive_what_the_model_gives_it(model):
    windows, decoder = random_windows(4), DecoderModel.of(model)
    expected = expected_inputs(model, windows)
    inputs = ModelInputs(decoder, [windows])
    calls = inputs.calls(windows, "test")
    hidden, compared = inputs.hidden[0], 0
    for index, block in enumerate(decoder.blocks):
        with unfused(block):
            seen, hidden = run_watched(block, calls[index], hidden, prunable_linears(block))
        for name, found in seen.items():
            wanted = expected[decoder.prefix(index) + name]
            torch.testing.assert_close(found.double().flatten(0, -2), wanted, rtol=1e-4, atol=1e-5)
            compared += 1
    assert compared == sum(len(rows) > 0 for rows in expected.values()) == len(block_matrices(model))


def test_reported_errors_are_those_on_the_pruned_models_own_inputs(model):
    """In input order everything before a layer is final when it is solved; so the pruned stream was the right one."""
    windows = random_windows(24)
    dense = {name: matrix.detach().clone() for name, matrix in block_matrices(model).items()}
    report = prune_model(model, windows, "2:4", preset="default", method="sparsegpt", micro_batch=5)
    expected, matrices = expected_inputs(model, windows), block_matrices(model)
    for layer in report.layers:
        inputs = expected[layer.name]
        assert layer.tokens == len(inputs), layer.name
        wanted = relative_error(dense[layer.name], matrices[layer.name], inputs.T @ inputs)
        assert layer.relative_error == pytest.approx(wanted, rel=1e-2), layer.name


# Residual correction

# Where the stream behind a projection can be looked at: the input of this submodule. For projections not listed it is
# the block's output, with the MLP's own projection silenced when it comes later.
BEHIND = {variant: {"self_attn.o_proj": "post_attention_layernorm"} for variant in VARIANTS}
BEHIND |= {
    "bloom-post-norm": {"self_attention.dense": "post_attention_layernorm"},
    "opt-post-norm": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
    "cohere": {},
    "cohere2": {},
}


def corrected(variant):
    """The projections of a variant's last block whose targets undo drift."""
    model = tiny_variant(variant)
    names = " ".join(block_matrices(model))
    return [name for name in family_of(model).residuals if f".1.{name}" in names]


class Drifted:
    """The last block of a tiny model between a dense and a pruned stream that differ."""

    def __init__(self, variant):
        self.behind = BEHIND[variant]
        model = tiny_variant(variant)
        self.decoder = DecoderModel.of(model)
        self.family, self.block = self.decoder.family, self.decoder.blocks[-1]
        self.inputs = ModelInputs(self.decoder, [random_windows(40)])
        self.dense = self.inputs.hidden[0]
        noise = torch.randn(self.dense.shape, generator=torch.Generator().manual_seed(5))
        self.pruned = self.dense + 0.3 * noise

    def correct(self, name):
        """Let the projection's corrected target become its weight: a pattern without zeros keeps all of it."""
        settings = resolve_settings(0.0, error_correction=1.0, residual_correction=1.0, damping=1e-7)
        solver = GroupSolver(settings, PruneReport(settings), Listener())
        streams = Streams(self.inputs, ActivationStore(), [self.pruned.clone()], [self.dense.clone()])
        with unfused(self.block):
            BlockJob(solver, streams, self.decoder, 1, {name: settings}).prune_linears()

    def observe(self, hidden, name):
        """Input of a projection, and the stream behind its addition."""
        place = self.behind.get(name)
        with unfused(self.block):
            call = self.inputs.calls(self.inputs.batches[0], "test")[1]
            if place:
                seen, _ = run_watched(self.block, call, hidden, [name, place])
                return seen[name], seen[place]
            order = list(self.family.residuals)
            later = [key for key in order[order.index(name) + 1 :] if key in prunable_linears(self.block)]
            silenced = [parameter for key in later for parameter in self.block.get_submodule(key).parameters()]
            before = [parameter.clone() for parameter in silenced]
            for parameter in silenced:
                parameter.zero_()
            seen, output = run_watched(self.block, call, hidden, [name])
            for parameter, saved in zip(silenced, before, strict=True):
                parameter.copy_(saved)
            return seen[name], output


def correlation(error, inputs):
    """The largest correlation of any output's error with any input: 0 where least squares can do no more."""
    error, inputs = (tensor.double().reshape(-1, tensor.shape[-1]) for tensor in (error, inputs))
    return float(((error.T @ inputs) / (error.norm(dim=0)[:, None] * inputs.norm(dim=0)).clamp_min(1e-9)).abs().max())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_corrected_projection_brings_the_stream_as_close_as_a_weight_can(variant):
    for name in corrected(variant):
        job = Drifted(variant)
        target = job.observe(job.dense, name)[1]
        inputs, before = job.observe(job.pruned, name)
        job.correct(name)
        inputs, after = job.observe(job.pruned, name)
        assert correlation(target - after, inputs) < 2e-3, name
        assert correlation(target - before, inputs) > 0.05, name
        assert (target - after).norm() < (target - before).norm(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_row_but_those_behind_norms_corrects_attention_and_what_is_no_expert(variant):
    model_type = VARIANTS[variant][0]
    if not FAMILIES[model_type].uncorrectable:
        assert len(corrected(variant)) == (1 if model_type in MIXTURES and not model_type.startswith("deepseek") else 2)


@torch.no_grad()
def test_in_a_parallel_block_the_mlp_undoes_only_what_attention_left():
    """With everything pruned at once and full shares, the sum of both is no further from the dense output than one."""
    job = Drifted("gptj")
    target = job.observe(job.dense, "mlp.fc_out")[1]
    distances = []
    for name in (None, "attn.out_proj", "mlp.fc_out"):
        if name:
            job.correct(name)
        distances.append(float((target - job.observe(job.pruned, "mlp.fc_out")[1]).norm()))
    assert distances[2] < distances[1]
    assert distances[2] < distances[0]
