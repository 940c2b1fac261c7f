"""Looking into blocks: who shares an input, what hooks see, and that everything temporary goes away again."""

import pytest
import torch
from torch import nn

from sparsegpt.model.capture import (
    BlockCall,
    ModelInputs,
    follow,
    run_watched,
    skip_products,
    stand_ins,
    to_device,
    watch_inputs,
)
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import Family
from tests.support import logits_of, random_windows, refused, tiny_model

PLAIN = BlockCall((), {})


class Block(nn.Module):
    """q, k and v share an input; gate and up share one; o and down have their own."""

    def __init__(self, *, returns_tuple: bool = False, calls_down: bool = True) -> None:
        super().__init__()
        for name in ("v", "q", "k", "up", "gate", "down", "o"):  # declared in another order than used
            setattr(self, name, nn.Linear(8, 8))
        self.norm = nn.LayerNorm(8)
        self.returns_tuple, self.calls_down = returns_tuple, calls_down

    def forward(self, hidden_states, scale=1.0, *, shift=0.0):
        normed = self.norm(hidden_states)
        hidden = hidden_states + self.o(self.q(normed) * self.k(normed) + self.v(normed)) * scale + shift
        normed = self.norm(hidden)
        inner = self.gate(normed) * self.up(normed)
        hidden = hidden + (self.down(inner) if self.calls_down else inner)
        return (hidden, "cache") if self.returns_tuple else hidden


LINEARS = ["v", "q", "k", "up", "gate", "down", "o"]


@pytest.fixture
def block():
    torch.manual_seed(0)
    return Block()


@pytest.fixture
def hidden():
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def has_hooks(module: nn.Module) -> bool:
    return any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())


# Shared inputs


@torch.no_grad()
def test_linears_that_read_one_tensor_form_a_group_in_the_order_of_use(block, hidden):
    groups = follow(block, PLAIN, hidden).shared_inputs(LINEARS)
    assert [set(group) for group in groups] == [{"q", "k", "v"}, {"o"}, {"gate", "up"}, {"down"}]
    assert not has_hooks(block)


@torch.no_grad()
def test_equal_values_in_different_tensors_are_different_inputs(hidden):
    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden_states):
            return self.first(hidden_states) + self.second(hidden_states.clone())

    assert follow(Copies(), PLAIN, hidden).shared_inputs(["first", "second"]) == [("first",), ("second",)]


@torch.no_grad()
def test_only_the_names_asked_for_are_grouped(block, hidden):
    assert follow(block, PLAIN, hidden).shared_inputs(["down", "k"]) == [("k",), ("down",)]


@torch.no_grad()
def test_a_linear_that_is_never_called_is_an_error_that_names_it(hidden):
    with refused("down"):
        follow(Block(calls_down=False), PLAIN, hidden).shared_inputs(LINEARS)


@torch.no_grad()
def test_a_linear_whose_weight_is_used_without_its_forward_is_an_error(hidden):
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.expert, self.plain = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden_states):
            return self.plain(hidden_states @ self.expert.weight.T)

    with refused("expert"):
        follow(Grouped(), PLAIN, hidden).shared_inputs(["expert", "plain"])


# Calls


@torch.no_grad()
def test_tuple_and_tensor_returns_give_the_same_hidden_states(hidden):
    torch.manual_seed(0)
    plain = Block()
    tupled = Block(returns_tuple=True)
    tupled.load_state_dict(plain.state_dict())
    assert torch.equal(PLAIN.run(plain, hidden), plain(hidden))
    assert torch.equal(PLAIN.run(tupled, hidden), plain(hidden))


@torch.no_grad()
def test_a_call_passes_every_argument_on(block, hidden):
    call = BlockCall((2.0,), {"shift": torch.tensor(0.5)})
    assert torch.equal(call.run(block, hidden), block(hidden, 2.0, shift=0.5))


def test_to_device_walks_through_nested_arguments():
    value = {"a": (torch.ones(2), [torch.zeros(1), "text", None, 3]), "b": torch.tensor(True)}
    moved = to_device(value, torch.device("meta"))
    assert moved["a"][0].device.type == moved["a"][1][0].device.type == moved["b"].device.type == "meta"
    assert moved["a"][1][1:] == ["text", None, 3]
    assert isinstance(moved["a"], tuple)
    assert isinstance(moved["a"][1], list)


# Hooks


def test_watched_inputs_are_what_the_submodules_receive(block, hidden):
    with torch.no_grad():
        seen, output = run_watched(block, PLAIN, hidden, ["q", "down", "norm"])
        assert torch.equal(seen["q"], block.norm(hidden))
        assert torch.equal(output, block(hidden))
    assert set(seen) == {"q", "down", "norm"}


def test_hooks_are_gone_after_the_block(block, hidden):
    with watch_inputs(block, LINEARS, lambda name, inputs: None):
        assert has_hooks(block)
        block(hidden)
    assert not has_hooks(block)


def test_hooks_are_gone_after_an_exception(block, hidden):
    def explode(name, inputs):
        raise RuntimeError("in a hook")

    with pytest.raises(RuntimeError, match="in a hook"), watch_inputs(block, LINEARS, explode):
        block(hidden)
    assert not has_hooks(block)


def test_input_given_by_keyword_is_seen(hidden):
    class Inner(nn.Module):
        def forward(self, *, hidden_states):
            return hidden_states * 2

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, hidden_states):
            return self.inner(hidden_states=hidden_states)

    seen, output = run_watched(Outer(), PLAIN, hidden, ["inner"])
    assert torch.equal(seen["inner"], hidden)
    assert torch.equal(output, hidden * 2)


# Skipped products


@torch.no_grad()
def test_skipped_linears_give_zeros_and_work_again_afterwards(block, hidden):
    before = block(hidden)
    with skip_products([block.o, block.down]):
        assert torch.equal(block(hidden), hidden)
        assert block.o(torch.ones(5, 2, 8)).shape == (5, 2, 8)
    assert torch.equal(block(hidden), before)
    assert "forward" not in vars(block.o)


@torch.no_grad()
def test_skipped_linears_work_again_after_an_exception(block, hidden):
    with pytest.raises(ZeroDivisionError), skip_products([block.o, block.down]):
        _ = 1 / 0
    assert "forward" not in vars(block.o)
    assert not torch.equal(block(hidden), hidden)


@torch.no_grad()
def test_inputs_before_skipped_products_are_the_true_ones(block, hidden):
    full, _ = run_watched(block, PLAIN, hidden, ["gate", "o"])
    short, _ = run_watched(block, PLAIN, hidden, ["gate", "o"], unused=["gate", "up", "down"])
    assert torch.equal(full["gate"], short["gate"])
    assert torch.equal(full["o"], short["o"])


# What lies behind


class Attention(nn.Module):
    """q and k read what enters; o makes the output, beside something that is no tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, *, hidden_states):
        return self.o(self.q(hidden_states) * self.k(hidden_states)), None


class TwoBranches(nn.Module):
    """A norm, attention, a norm and an MLP, whose output is doubled in place where it `changes`."""

    def __init__(self, *, changes: bool = False) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.first, self.second = nn.LayerNorm(8), nn.LayerNorm(8)
        self.changes = changes

    def forward(self, hidden_states):
        hidden = hidden_states + self.attention(hidden_states=self.first(hidden_states))[0]
        inner = self.mlp(self.second(hidden))
        return hidden + (inner.mul_(2) if self.changes else inner)


BEFORE_O = {"first", "attention", "attention.q", "attention.k"}


@pytest.mark.parametrize(
    ("watched", "computed"),
    [
        (["attention.q"], {"first"}),
        (["first", "attention.k"], {"first"}),
        (["attention.o"], BEFORE_O | {"attention.o"}),
        (["attention()"], BEFORE_O | {"attention.o"}),
        (["mlp.0"], BEFORE_O | {"attention.o", "second"}),
    ],
)
@torch.no_grad()
def test_what_is_watched_is_seen_and_what_lies_behind_does_not_run(watched, computed, hidden):
    block = TwoBranches()
    course = follow(block, PLAIN, torch.randn(2, 3, 8))
    truth, _ = run_watched(block, PLAIN, hidden, watched)
    ran = set()
    for name, module in block.named_modules():
        own = type(module).forward
        module.__class__ = type(type(module).__name__, (type(module),), {"forward": noting(ran, name, own)})
    seen, _ = run_watched(block, PLAIN, hidden, watched, behind=course.behind(watched))
    assert seen.keys() == truth.keys()
    assert all(torch.equal(seen[name], truth[name]) for name in truth)
    assert ran - {""} == computed
    assert not any("forward" in vars(module) for module in block.modules())
    assert not has_hooks(block)


def noting(ran: set[str], name: str, forward):
    def noted(self, *args, **kwargs):
        ran.add(name)
        return forward(self, *args, **kwargs)

    return noted


@torch.no_grad()
def test_other_shapes_and_what_is_needed_run_whole(hidden):
    block = TwoBranches()
    course = follow(block, PLAIN, hidden)
    assert course.behind(["attention.q"], needed=["mlp"]).answers.keys() == {"attention", "second"}
    assert course.behind(["no such place"]).answers == {}
    longer = torch.randn(2, 5, 8)
    seen, output = run_watched(block, PLAIN, longer, ["attention.q"], behind=course.behind(["attention.q"]))
    assert torch.equal(output, block(longer))
    assert torch.equal(seen["attention.q"], block.first(longer))


@torch.no_grad()
def test_an_outlet_hands_on_what_its_linear_does(hidden):
    block = TwoBranches()
    course = follow(block, PLAIN, hidden)
    assert course.outlets == {"attention.o": "attention", "mlp.2": "mlp"}
    assert course.handed_on("attention.o", hidden) == (hidden, None)
    assert course.handed_on("mlp.2", hidden) is hidden


@pytest.mark.parametrize("changes", [False, True])
@torch.no_grad()
def test_an_output_that_is_changed_in_place_is_told(changes, hidden):
    assert follow(TwoBranches(changes=changes), PLAIN, hidden).changed == ({"mlp"} if changes else set())


# Stand-ins and model inputs


def test_stand_ins_put_the_blocks_back_after_an_exception():
    blocks = nn.ModuleList([Block(), Block()])
    originals = list(blocks)
    with pytest.raises(ZeroDivisionError), stand_ins(blocks):
        assert all(now is not before for now, before in zip(blocks, originals, strict=True))
        _ = 1 / 0
    assert all(now is before for now, before in zip(blocks, originals, strict=True))


def test_stand_ins_show_the_blocks_attributes_and_own_no_weights():
    blocks = nn.ModuleList([Block()])
    blocks[0].attention_type = "sliding"
    with stand_ins(blocks) as recorders:
        assert blocks[0].attention_type == "sliding"
        assert not list(recorders[0].parameters())
        with pytest.raises(AttributeError):
            _ = blocks[0].no_such_thing


class Config:
    model_type = "toy"


class ToyModel(nn.Module):
    """A model that gives each of its blocks arguments of its own, some of them by batch size."""

    def __init__(self, *, skips_blocks: bool = False) -> None:
        super().__init__()
        self.config = Config()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block(returns_tuple=True), Block()])
        self.skips_blocks = skips_blocks

    @property
    def base_model(self):
        return self

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for index, block in enumerate([] if self.skips_blocks else self.blocks):
            hidden = block(hidden, float(index), shift=torch.full((len(input_ids), 1, 1), 0.1 * index))
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden


@torch.no_grad()
def test_every_block_is_called_with_its_own_arguments():
    torch.manual_seed(0)
    model = ToyModel()
    windows = torch.arange(35).remainder(10).view(7, 5)
    inputs = ModelInputs(DecoderModel(model, Family("blocks"), model.blocks), windows.split(3))
    assert [len(hidden) for hidden in inputs.hidden] == [3, 3, 1]
    for batch, hidden in zip(windows.split(3), inputs.hidden, strict=True):
        for index, block in enumerate(model.blocks):
            hidden = inputs.calls(batch, "test")[index].run(block, hidden)  # noqa: PLW2901
        assert torch.equal(hidden, model(batch, use_cache=False))


@torch.no_grad()
def test_arguments_for_a_batch_size_not_seen_before_are_recorded_then():
    model = ToyModel()
    inputs = ModelInputs(DecoderModel(model, Family("blocks"), model.blocks), [torch.zeros(4, 5, dtype=torch.long)])
    call = inputs.calls(torch.ones(2, 5, dtype=torch.long), "test")[1]
    assert call.args == (1.0,)
    assert call.kwargs["shift"].shape == (2, 1, 1)


def test_a_model_that_never_calls_its_first_block_is_refused():
    model = ToyModel(skips_blocks=True)
    with refused("ToyModel", "never called"):
        ModelInputs(DecoderModel(model, Family("blocks"), model.blocks), [torch.zeros(1, 5, dtype=torch.long)])


@pytest.mark.parametrize("model_type", ["llama", "opt"])
@torch.no_grad()
def test_blocks_run_one_by_one_give_the_models_own_hidden_states(model_type):
    model, windows = tiny_model(model_type), random_windows(5)
    before = logits_of(model, windows)
    blocks = model.get_submodule("model.layers" if model_type == "llama" else "model.decoder.layers")
    inputs = ModelInputs(DecoderModel.of(model), windows.split(2))
    every = model(input_ids=windows, output_hidden_states=True).hidden_states
    hidden = inputs.hidden
    for index, block in enumerate(blocks):
        torch.testing.assert_close(torch.cat(hidden), every[index], rtol=1e-5, atol=1e-6)
        hidden = [
            inputs.calls(tokens, "test")[index].run(block, part)
            for tokens, part in zip(inputs.batches, hidden, strict=True)
        ]
    assert torch.equal(logits_of(model, windows), before)
