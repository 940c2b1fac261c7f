"""Routers are known by where they stand and how many outputs they have; experts by their lists and parameters.

The blocks are made here, in every way that a name or a width could mislead.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import prunable_linears
from sparsegpt.model.routers import expert_of, mixture_of, named_expert
from sparsegpt.model.unfuse import unfused
from tests.more_architectures import CONFIGS
from tests.support import tiny_model

HIDDEN, INNER, EXPERTS = 16, 12, 5


class MLP(nn.Module):
    def __init__(self, hidden: int = HIDDEN, inner: int = INNER) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner), nn.Linear(hidden, inner)
        self.down_proj = nn.Linear(inner, hidden)


class Experts(nn.Module):
    """All experts in two parameters, as transformers keeps them."""

    def __init__(self, count: int = EXPERTS, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(count, 2 * INNER, hidden))
        self.down_proj = nn.Parameter(torch.zeros(count, hidden, INNER))


class Choosing(nn.Module):
    """A router in a module of its own; the matrix under whatever name."""

    def __init__(self, name: str, *, parameter: bool = False) -> None:
        super().__init__()
        matrix = nn.Parameter(torch.zeros(EXPERTS, HIDDEN)) if parameter else nn.Linear(HIDDEN, EXPERTS)
        setattr(self, name, matrix)


def members(count: int = EXPERTS, hidden: int = HIDDEN) -> nn.ModuleList:
    return nn.ModuleList(MLP(hidden) for _ in range(count))


def block_of(**parts: nn.Module) -> nn.Module:
    """A block with attention and an `mlp` of these parts."""
    attention = nn.ModuleDict({name: nn.Linear(HIDDEN, HIDDEN) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
    return nn.ModuleDict({"self_attn": attention, "mlp": nn.ModuleDict(parts)})


def left_out(block: nn.Module) -> set[str]:
    """Linears that are not offered for pruning."""
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    return linears - prunable_linears(block).keys()


ROUTERS = {
    "gate": ({"gate": nn.Linear(HIDDEN, EXPERTS)}, {"mlp.gate"}),
    "gate.wg": ({"gate": Choosing("wg")}, {"mlp.gate.wg"}),
    "router.layer": ({"router": Choosing("layer")}, {"mlp.router.layer"}),
    "router.classifier, more outputs": (
        {"router": nn.ModuleDict({"classifier": nn.Linear(HIDDEN, EXPERTS + 7)})},
        {"mlp.router.classifier"},
    ),
    "a name of its own": ({"chooser": nn.Linear(HIDDEN, EXPERTS)}, {"mlp.chooser"}),
    "deeper": ({"chooser": nn.ModuleDict({"to_scores": nn.Linear(HIDDEN, EXPERTS)})}, {"mlp.chooser.to_scores"}),
    "in steps": (
        {"gate": nn.Sequential(nn.Linear(HIDDEN, 8), nn.GELU(), nn.Linear(8, EXPERTS + 1))},
        {"mlp.gate.0", "mlp.gate.2"},
    ),
    "in steps, without a name": (
        {"pick": nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, EXPERTS))},
        {"mlp.pick.0", "mlp.pick.2"},
    ),
    "a parameter": ({"gate": Choosing("weight", parameter=True)}, set()),
    "a gate of the shared expert": (
        {"gate": nn.Linear(HIDDEN, EXPERTS), "shared_expert": MLP(), "shared_expert_gate": nn.Linear(HIDDEN, 1)},
        {"mlp.gate", "mlp.shared_expert_gate"},
    ),
    "one output, another name": (
        {"gate": nn.Linear(HIDDEN, EXPERTS), "shared": MLP(), "mix": nn.Linear(HIDDEN, 1)},
        {"mlp.gate", "mlp.mix"},
    ),
}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("case", ROUTERS)
def test_whatever_chooses_among_experts_is_left_out_and_nothing_else(case, fused):
    parts, expected = ROUTERS[case]
    block = block_of(experts=Experts() if fused else members(), **parts)
    assert left_out(block) == expected
    with unfused(block):
        assert left_out(block) == expected
        experts = [name for name in prunable_linears(block) if ".experts." in name]
        assert len(experts) == EXPERTS * (2 if fused else 3)


ORDINARY = {
    "the hidden size is the number of experts": (
        {"experts": Experts(HIDDEN), "gate": nn.Linear(HIDDEN, HIDDEN), "shared_expert": MLP()},
        {"mlp.gate"},
    ),
    "so it is, and the router has no name": (
        {"experts": Experts(HIDDEN), "chooser": nn.Linear(HIDDEN, HIDDEN), "shared_expert": MLP()},
        {"mlp.chooser"},
    ),
    "a shared expert as wide inside as there are experts": (
        {"experts": Experts(INNER), "chooser": nn.Linear(HIDDEN, INNER), "shared": MLP()},
        {"mlp.chooser"},
    ),
    "a projection to a narrower space and back": (
        {
            "experts": Experts(INNER, hidden=INNER),
            "gate": Choosing("weight", parameter=True),
            "fc1": nn.Linear(HIDDEN, INNER),
            "fc2": nn.Linear(INNER, HIDDEN),
        },
        set(),
    ),
    "a router that is a parameter, the hidden size the number of experts": (
        {"experts": Experts(HIDDEN), "gate": nn.ModuleDict({}), "shared_expert": MLP()},
        set(),
    ),
}


@pytest.mark.parametrize("case", ORDINARY)
def test_an_ordinary_linear_is_not_taken_for_a_router_by_its_width(case):
    parts, expected = ORDINARY[case]
    if case.startswith("a router that is a parameter"):
        parts["gate"].register_parameter("weight", nn.Parameter(torch.zeros(HIDDEN, HIDDEN)))
    assert left_out(block_of(**parts)) == expected


def test_a_block_without_experts_has_no_router_but_what_is_called_so():
    block = block_of(gate=nn.Linear(HIDDEN, 4), up=nn.Linear(HIDDEN, 4), skip_router=nn.Linear(HIDDEN, 1))
    assert left_out(block) == {"mlp.skip_router"}


def test_a_layer_without_experts_beside_one_with_them_keeps_its_gate():
    dense = nn.ModuleDict({"gate": nn.Linear(HIDDEN, INNER), "down": nn.Linear(INNER, HIDDEN)})
    block = nn.ModuleDict({"moe": block_of(experts=Experts(), gate=nn.Linear(HIDDEN, EXPERTS)).mlp, "dense": dense})
    assert left_out(block) == {"moe.gate"}


def test_experts_right_in_the_block_leave_attention_alone():
    """As many keys as experts, and a gate in attention that has as many outputs, too."""
    attention = nn.ModuleDict({"q_proj": nn.Linear(HIDDEN, HIDDEN), "k_proj": nn.Linear(HIDDEN, EXPERTS)})
    attention["gate"] = nn.Linear(HIDDEN, EXPERTS)
    for name in ("router", "pick"):
        block = nn.ModuleDict({"self_attn": attention, name: nn.Linear(HIDDEN, EXPERTS), "experts": Experts()})
        assert left_out(block) == {name}


def test_the_configuration_tells_how_many_experts_a_flat_parameter_holds():
    """Two-dimensional parameters, one expert above the other; the router has no telling name."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(moe_num_experts=EXPERTS, to_dict=dict)
            self.w1 = nn.Parameter(torch.zeros(EXPERTS * INNER, HIDDEN))
            self.w2 = nn.Parameter(torch.zeros(EXPERTS * INNER, HIDDEN))

    shared = MLP(inner=EXPERTS)
    block = block_of(experts=Flat(), chooser=nn.Linear(HIDDEN, EXPERTS), shared_mlp=shared)
    assert left_out(block) == {"mlp.chooser"}
    assert mixture_of(block).groups[0].count == EXPERTS


# Which expert a linear belongs to


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp.experts.3.down_proj", ("mlp.experts", 3, "down_proj")),
        ("moe.local_experts.3.net.up", ("moe.local_experts", 3, "net.up")),
        ("mlp.experts.experts.12.w1", ("mlp.experts.experts", 12, "w1")),
        ("model.layers.0.moe.experts.3.w1", ("model.layers.0.moe.experts", 3, "w1")),
        ("mlp.input_linear.experts.3.linear", ("mlp.input_linear.experts", 3, "linear")),
        ("mlp.experts.expert_3.wi", ("mlp.experts", 3, "wi")),
        ("mlp.expert_3.wi", ("mlp.expert", 3, "wi")),
        ("mlp.shared_experts.0.up_proj", None),
        ("mlp.shared_expert.up_proj", None),
        ("mlp.experts.router", None),
        ("model.layers.3.mlp.up_proj", None),
    ],
)
def test_an_experts_linear_is_known_by_its_name(name, expected):
    assert expert_of(name) == expected


def test_experts_in_a_list_of_another_name_are_known_by_their_number():
    class Moe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_local_experts = EXPERTS
            self.pick, self.members = nn.Linear(HIDDEN, EXPERTS), members()
            self.branches = nn.ModuleList(MLP() for _ in range(2))

    mixture = mixture_of(nn.ModuleDict({"mlp": Moe()}))
    assert mixture.expert_of("mlp.members.3.up_proj") == ("mlp.members", 3, "up_proj")
    assert mixture.expert_of("mlp.branches.1.up_proj") is None
    assert mixture.expert_of("mlp.pick") is None
    assert mixture.routers == {"mlp.pick"}
    assert named_expert("model.layers.0.mlp.members.3.up_proj") == ("model.layers.0.mlp.members", 3, "up_proj")


# In models of transformers: a hidden size, or heads, of as many as there are experts


COINCIDENCES = {
    "hunyuan_v1_moe": {"num_experts": 32, "moe_topk": 2},
    "dbrx": {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 32, "moe_top_k": 2}},
    "jetmoe": {"num_local_experts": 32},
    "qwen3_next": {"num_experts": 32, "shared_expert_intermediate_size": 32},
    "phimoe": {"num_local_experts": 32},
    "afmoe": {"num_experts": 16, "num_key_value_heads": 2},
    "granitemoehybrid": {"num_local_experts": 32},
}


@pytest.mark.parametrize("model_type", COINCIDENCES)
def test_in_real_models_a_coincidence_of_widths_hides_no_router_and_makes_none(model_type):
    usual = tiny_model(model_type, **CONFIGS[model_type])
    unusual = tiny_model(model_type, **{**CONFIGS[model_type], **COINCIDENCES[model_type]})
    for one, other in zip(DecoderModel.of(usual).blocks, DecoderModel.of(unusual).blocks, strict=True):
        assert mixture_of(one).routers == mixture_of(other).routers
        assert left_out(one) == left_out(other)
