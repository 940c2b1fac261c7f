"""Models that the table does not know: found where their structure leaves no doubt, else refused with the reason."""

import functools

import pytest
import torch
from torch import nn

from sparsegpt.model.capture import BlockCall, ModelInputs
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import FAMILIES, Family, family_of
from sparsegpt.model.loading import load_config
from sparsegpt.run.memory_plan import shape_of
from tests.architectures import WRAPPERS, block_matrices, stored_keys, tiny_wrapper
from tests.support import assert_pattern, logits_of, prune_model, random_windows, refused, tiny_model, weights_of

# Architectures without a row, whose blocks return tensors and tuples, and where the list of blocks lies.
UNKNOWN = {
    "codegen": ("transformer.h", {"n_inner": 64, "rotary_dim": 4, "intermediate_size": None}),
    "glm4": ("model.layers", {"head_dim": 8}),
    "granitemoe": ("model.layers", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "nemotron": ("model.layers", {}),
    "olmo": ("model.layers", {}),
    "stablelm": ("model.layers", {}),
}


def tiny_unknown(model_type: str) -> nn.Module:
    changes = UNKNOWN[model_type][1]
    if "intermediate_size" in changes:
        changes = {"num_key_value_heads": None, **changes}
    return tiny_model(model_type, **changes)


@pytest.mark.parametrize("model_type", UNKNOWN)
def test_one_list_of_equal_blocks_is_found_and_said_so(model_type):
    assert model_type not in FAMILIES
    model = tiny_unknown(model_type)
    logits = logits_of(model, random_windows())
    prune_model(model, random_windows(), 0.0)
    assert torch.equal(logits_of(model, random_windows()), logits)
    report = prune_model(model, random_windows(), "2:4")
    matrices = block_matrices(model)
    assert {layer.name for layer in report.layers} == matrices.keys()
    for matrix in matrices.values():
        assert_pattern(matrix, "2:4")
    assert any(
        all(part in line for part in (model_type, "2 blocks", "structure", UNKNOWN[model_type][0]))
        for line in report.warnings
    )
    assert any("residual correction" in line for line in report.warnings)
    assert report.settings.residual_correction == 0
    assert report.settings.error_correction > 0


def test_what_is_not_known_cannot_be_asked_for():
    with refused("residual correction", "not known", settings=["residual_correction"]):
        prune_model(tiny_unknown("stablelm"), random_windows(), "2:4", residual_correction=0.5)


def unnamed(model: nn.Module) -> nn.Module:
    model.config.model_type = "mystery"
    return model


def twice(model: nn.Module) -> nn.Module:
    model.model.more = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    return unnamed(model)


def mixed(model: nn.Module) -> nn.Module:
    model.model.layers[1] = nn.Linear(4, 4)
    return unnamed(model)


def single(model: nn.Module) -> nn.Module:
    del model.model.layers[1]
    return unnamed(model)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (twice, "found 2 (model.layers, model.more)"),
        (mixed, "found none"),
        (single, "found none"),
    ],
)
def test_structure_that_leaves_doubt_is_refused_with_the_known_types_and_the_way_out(change, reason):
    model = change(tiny_model("llama"))
    with refused("'mystery'", reason, *FAMILIES, "FAMILIES", "sparsegpt/model/families.py"):
        prune_model(model, random_windows(), "2:4")


def test_of_several_lists_the_one_as_long_as_the_model_is_taken():
    model = twice(tiny_model("llama"))
    model.model.more.append(nn.Linear(4, 4))
    assert family_of(model).blocks == "model.layers"


def test_blocks_of_several_classes_from_one_file_are_one_list():
    class Other(type(tiny_model("llama").model.layers[0])):
        """Hybrids keep attention and Mamba in two classes."""

    Other.__module__ = Other.__base__.__module__
    model = unnamed(tiny_model("llama"))
    model.model.layers[1].__class__ = Other
    assert family_of(model).blocks == "model.layers"
    assert "LlamaDecoderLayer, Other" in family_of(model).note


def test_a_head_called_decoder_is_not_taken_for_the_language_tower():
    model = unnamed(tiny_model("llama"))
    model.get_decoder = lambda: model.lm_head
    assert family_of(model).blocks == "model.layers"


# Encoders


def encoder_decoder(model: nn.Module) -> nn.Module:
    model.config.is_encoder_decoder = True
    return model


def looking_ahead(model: nn.Module) -> nn.Module:
    """Attention in both directions, whatever the configuration says."""
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    model.config._attn_implementation = "sdpa"
    model.model.forward = functools.partial(_unmasked, model.model.forward)
    return model


def _unmasked(forward, **options):
    tokens = options["input_ids"]
    return forward(**options, attention_mask=torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1]))


@pytest.mark.parametrize(
    ("change", "words"),
    [(encoder_decoder, ("'llama'", "has an encoder")), (looking_ahead, ("no causal language model", "encoder"))],
)
def test_encoders_are_refused_before_anything_changes(change, words):
    model = change(tiny_model("llama"))
    before = weights_of(model)
    with refused(*words, "decoder"):
        prune_model(model, random_windows(), "2:4")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


BERT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODERS = {
    "bert": ("AutoModelForMaskedLM", BERT),
    "modernbert": ("AutoModelForMaskedLM", {**BERT, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 1}),
    "t5": ("AutoModelForSeq2SeqLM", {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2}),
}


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_of_transformers_are_refused_in_memory_and_before_a_run(model_type, tmp_path):
    import transformers

    kind, sizes = ENCODERS[model_type]
    config = transformers.AutoConfig.for_model(model_type, **sizes)
    model = getattr(transformers, kind).from_config(config).eval()
    with refused("decoder"):
        prune_model(model, random_windows(), "2:4")
    model.save_pretrained(tmp_path)
    with refused("expected", repr(model_type)):
        shape_of(load_config(str(tmp_path)), torch.float32)


def test_a_decoder_of_bert_is_no_encoder():
    model = tiny_model("bert", is_decoder=True)
    assert prune_model(model, random_windows(), "2:4", preset="paper").layers


# Against the rows


def test_a_row_wins_over_structure():
    model = tiny_model("llama")
    model.model.more = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    assert family_of(model).blocks == "model.layers"
    assert not family_of(model).note


# Multimodal models


@pytest.mark.parametrize("model_type", WRAPPERS)
@pytest.mark.parametrize("known", [True, False])
def test_of_a_multimodal_model_the_language_tower_alone_is_pruned(model_type, known):
    model = tiny_wrapper(model_type)
    text, before = model.config.get_text_config(), weights_of(model)
    row = text.model_type
    text.model_type = row if known else "mystery"
    report = prune_model(model, random_windows(), "2:4", preset="paper")
    text.model_type = row
    assert {layer.name for layer in report.layers} == block_matrices(model).keys()
    assert all("language_model." in layer.name for layer in report.layers)
    for matrix in block_matrices(model).values():
        assert_pattern(matrix, "2:4")
    pruned = stored_keys(block_matrices(model))
    assert any("vis" in name for name in before)
    for name, tensor in model.state_dict().items():
        assert name in pruned or torch.equal(tensor, before[name]), name
    assert any("structure" in line for line in report.warnings) != known


# Between the blocks


class Chain(nn.Module):
    """A model that takes its blocks' outputs as tensors or as tuples, and may meddle with them in between."""

    class config:  # noqa: N801
        model_type = "toy"

    def __init__(self, *, tuples: str = "", meddles: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.tuples, self.meddles = tuples, meddles

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            output = block(hidden)
            if self.tuples == "index":
                hidden = output[0]
            elif self.tuples == "unpack":
                hidden, _ = output
            else:
                hidden = output
            if self.meddles:
                hidden = hidden * 2
        return hidden


@pytest.mark.parametrize("tuples", ["", "index", "unpack"])
def test_a_models_way_to_take_outputs_needs_no_row(tuples):
    model = Chain(tuples=tuples)
    model.__dict__["base_model"] = model
    windows = random_windows(2, 5)
    inputs = ModelInputs(DecoderModel(model, Family("blocks"), model.blocks), windows.split(2))
    assert torch.equal(inputs.hidden[0], model.embed(windows))
    assert type(inputs.hidden[0]) is torch.Tensor


def test_a_model_that_does_more_between_its_blocks_is_refused():
    model = Chain(meddles=True)
    model.__dict__["base_model"] = model
    with refused("Chain", "between its blocks 0 and 1", "chain"):
        ModelInputs(DecoderModel(model, Family("blocks"), model.blocks), [random_windows(2, 5)])


def test_a_block_that_returns_something_else_is_refused():
    class Odd(nn.Module):
        def forward(self, hidden_states):
            return {"hidden": hidden_states}

    with refused("Odd", "dict", "hidden states"):
        BlockCall((), {}).run(Odd(), torch.zeros(1, 2, 4))
