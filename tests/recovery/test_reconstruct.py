"""Block reconstruction: never worse on held-out windows, masks fixed, nothing but weights left changed."""

import copy
from functools import partial

import pytest
import torch

from sparsegpt.driver import block_job
from sparsegpt.model.capture import ModelInputs
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.recovery import training
from sparsegpt.recovery.reconstruct import reconstruct_block
from tests.support import assert_pattern, block_linears, logits_of, prune_model, random_windows, tiny_model

PRUNED = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.fixture
def job():
    """A pruned block, what enters it and what should leave it, and how to call it."""
    model, windows = tiny_model("llama"), random_windows(40)
    block = model.model.layers[0]
    inputs = ModelInputs(DecoderModel.of(model), windows.split(10))

    def forward(block, tokens, hidden):
        return inputs.calls(tokens, "test")[0].run(block, hidden)

    with torch.no_grad():
        targets = [forward(block, *pair) for pair in zip(inputs.batches, inputs.hidden, strict=True)]
        for name in PRUNED:
            weight = block.get_submodule(name).weight
            weight.masked_fill_(torch.arange(weight.shape[1]) % 4 < 2, 0)
    return block, list(zip(inputs.batches, inputs.hidden, targets, strict=True)), forward


@torch.no_grad()
def loss_of(block, batches, forward) -> float:
    """Mean over tokens of ||output - target||^2 / ||target||^2 on the given micro-batches, in float64."""
    outputs = [(forward(block, tokens, x).double(), y.double()) for tokens, x, y in batches]
    errors = [(output - y).square().sum(-1) / y.square().sum(-1) for output, y in outputs]
    return float(torch.cat(errors).mean())


def run(job, **options):
    block, batches, forward = job
    choices = {"epochs": 5, "learning_rate": 5e-3, **options}
    batches = training.training_batches(*zip(*batches, strict=True))
    return reconstruct_block(block, PRUNED, batches, partial(forward, block), **choices)


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(training, "TOKENS_PER_BATCH", 16 * 5)  # five windows a step, eight batches


def test_training_lowers_the_error_on_windows_it_never_saw(job):
    block, batches, forward = job
    held_out = [[part[5:] for part in batches[-1]]]  # the last of eight batches
    before = loss_of(block, held_out, forward)
    result = run(job)
    after = loss_of(block, held_out, forward)
    # Where the hardware has them, products are bfloat16 while training.
    assert result.before == pytest.approx(before, rel=0.02)
    assert result.after == pytest.approx(after, rel=0.02)
    assert after < 0.9 * before
    assert 1 <= result.best_epoch <= 5
    assert not result.diverged


def test_zeros_stay_zeros_and_other_weights_move(job):
    block = job[0]
    before = copy.deepcopy(block.state_dict())
    run(job)
    for name, tensor in block.state_dict().items():
        module = name.removesuffix(".weight")
        if module in PRUNED:
            assert torch.equal(tensor == 0, before[name] == 0)
            assert not torch.signbit(tensor[tensor == 0]).any()
            assert not torch.equal(tensor, before[name])
        elif tensor.ndim == 2:  # a linear that was not pruned is not touched
            assert torch.equal(tensor, before[name])
        else:
            assert not torch.equal(tensor, before[name])


@pytest.mark.parametrize("learning_rate", [1e3, 1e30, float("inf")])
def test_training_that_diverges_is_rolled_back_to_the_bit(job, learning_rate):
    block = job[0]
    before = copy.deepcopy(block.state_dict())
    result = run(job, learning_rate=learning_rate)
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert result.best_epoch == 0
    assert result.after == result.before


def test_a_loss_that_is_no_number_counts_as_diverged(job):
    result = run(job, learning_rate=1e30)
    assert result.diverged


def test_gradients_switches_and_dtypes_come_back(job):
    block, batches, forward = job
    block.to(torch.bfloat16)
    block.mlp.up_proj.weight.requires_grad_(False)
    asked = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    halves = [(tokens, hidden.bfloat16(), target.bfloat16()) for tokens, hidden, target in batches]
    run((block, halves, forward))
    for name, parameter in block.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad == asked[name]
        assert parameter.grad is None
    for name in PRUNED:
        weight = block.get_submodule(name).weight
        assert (weight[:, torch.arange(weight.shape[1]) % 4 < 2] == 0).all()


def test_trains_inside_no_grad_as_the_driver_calls_it(job):
    with torch.no_grad():
        result = run(job)
        assert not torch.is_grad_enabled()
    assert result.after < result.before


def test_the_same_job_gives_the_same_bits(job):
    block, batches, forward = job
    twin = copy.deepcopy(block)
    for one in (block, twin):
        run((one, batches, forward))
    for name, tensor in block.state_dict().items():
        assert torch.equal(tensor, twin.state_dict()[name]), name


def test_what_follows_the_block_takes_part_and_stays_as_it_was(job):
    """A linear after the block: only what it lets through of the errors counts."""
    block, batches, through_block = job
    width = batches[0][2].shape[-1]
    after = torch.nn.Linear(width, width).bfloat16()
    after.weight.requires_grad_(False)
    with torch.no_grad():
        after.weight[width // 4 :] = 0
        after.weight.mul_(3)
        twin = copy.deepcopy(after).float()
        batches = [(tokens, hidden, twin(target)) for tokens, hidden, target in batches]
    state = copy.deepcopy(after.state_dict())

    def forward(tokens, hidden, after=after):
        return after(through_block(block, tokens, hidden))

    @torch.no_grad()
    def loss() -> float:
        tokens, hidden, target = (part[5:] for part in batches[-1])
        errors = (forward(tokens, hidden, twin) - target).double().square().sum(-1)
        return float((errors / target.double().square().sum(-1)).mean())

    before = loss()
    batches_of_steps = training.training_batches(*zip(*batches, strict=True))
    result = reconstruct_block(block, PRUNED, batches_of_steps, forward, ahead=[after], epochs=5, learning_rate=5e-3)
    assert result.before == pytest.approx(before, rel=0.05)
    assert result.after == pytest.approx(loss(), rel=0.05)
    assert result.after < 0.9 * before
    assert [parameter.requires_grad for parameter in after.parameters()] == [False, True]
    for name, parameter in after.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.grad is None
        assert torch.equal(parameter, state[name])


# Through the driver


def test_looking_ahead_aims_at_the_dense_stream_after_the_blocks_that_follow(monkeypatch):
    model, windows = tiny_model("llama", num_hidden_layers=4), random_windows(6)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        states = dense.model(windows, output_hidden_states=True).hidden_states  # the last one is normed
    seen = []
    real = block_job.reconstruct_block

    def spy(block, linears, batches, forward, **options):
        tokens, inputs, targets = zip(*batches, strict=True)
        index = len(seen)
        ahead = options["ahead"]
        assert [id(b) for b in ahead] == [id(b) for b in model.model.layers[index + 1 : index + 3]]
        if index + len(ahead) + 1 < 4:
            torch.testing.assert_close(torch.cat(targets), states[index + len(ahead) + 1], rtol=1e-4, atol=1e-5)
        calls = ModelInputs(DecoderModel.of(model), [windows]).calls(windows, "test")
        hidden = torch.cat(inputs)
        expected = hidden
        with torch.no_grad():
            for number, one in enumerate([block, *dense.model.layers[index + 1 : index + 3]], index):
                expected = calls[number].run(one, expected)
            found = torch.cat([forward(*pair) for pair in zip(tokens, inputs, strict=True)])
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        seen.append(block)
        return real(block, linears, batches, forward, **options)

    monkeypatch.setattr(block_job, "reconstruct_block", spy)
    prune_model(model, windows, "2:4", preset="fast", reconstruct=1, look_ahead=2)
    assert len(seen) == 4


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_pruning_with_reconstruction_comes_closer_to_the_dense_model(model_type):
    model, windows = tiny_model(model_type), random_windows(100)
    dense = logits_of(model, windows)
    distances = []
    for trained in ({}, {"reconstruct": 5, "learning_rate": 5e-3}):
        pruned = copy.deepcopy(model)
        report = prune_model(pruned, windows, "2:4", preset="fast", **trained)
        distances.append(float((logits_of(pruned, windows) - dense).square().mean()))
        for linear in block_linears(pruned).values():
            assert_pattern(linear.weight, "2:4")
    assert distances[1] < distances[0]
    assert all(block.reconstruction < 1 for block in report.blocks)
    assert report.seconds["reconstruct"] > 0


def test_reconstruction_of_a_block_that_lost_nothing_changes_nothing():
    model, windows = tiny_model("llama"), random_windows()
    before = logits_of(model, windows)
    report = prune_model(model, windows, 0.0, preset="fast", reconstruct=1)
    torch.testing.assert_close(logits_of(model, windows), before, rtol=1e-3, atol=1e-4)
    assert len(report.blocks) == 2


def test_divergence_is_told_to_the_user():
    report = prune_model(tiny_model("llama"), random_windows(), "2:4", reconstruct=1, learning_rate=1e30)
    assert any("reconstruction" in warning for warning in report.warnings)


def test_a_single_window_is_enough_to_run():
    model = tiny_model("llama")
    prune_model(model, random_windows(1, 40), "2:4", reconstruct=1)
    assert torch.isfinite(logits_of(model, random_windows())).all()


def test_experts_that_get_no_token_in_a_batch_are_trained_by_the_others(monkeypatch):
    monkeypatch.setattr(training, "TOKENS_PER_BATCH", 16)  # one window, for sixteen experts
    model = tiny_model("mixtral", num_local_experts=16, num_experts_per_tok=1)
    report = prune_model(model, random_windows(40), "2:4", reconstruct=1)
    assert all(0 < block.reconstruction <= 1 for block in report.blocks)
    for linear in block_linears(model).values():
        assert_pattern(linear.weight, "2:4")
