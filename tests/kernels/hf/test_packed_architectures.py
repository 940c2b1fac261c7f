"""Every architecture packs: loaded packed it computes what the pruned model does, and unpacked it is the same bits."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from sparsegpt.files.tensor_files import INDEX
from sparsegpt.kernels.checkpoint.archive import pack_folder, unpack_folder
from sparsegpt.kernels.checkpoint.packed_config import QUANT_METHOD, read_packed_config
from sparsegpt.kernels.format.pack import padded_columns
from sparsegpt.kernels.format.quantized import IntegerValues
from sparsegpt.kernels.hf.in_place import pack_linears
from sparsegpt.kernels.hf.quantizer import register
from sparsegpt.kernels.layers.experts import PackedExperts
from sparsegpt.kernels.layers.linear import explain, packed_layers, set_kernels
from sparsegpt.model.loading import auto_class
from tests.architectures import COVERING, MIXTURES, VARIANTS, WRAPPERS, save_pruned
from tests.support import in_short, logits_of, random_windows, refused

TOKENS = random_windows(2, 16)
# How checkpoints keep them: transposed; experts apart, under two kinds of names; all in one tensor, transposed.
FORMS = ("gpt2", "mixtral", "qwen2_moe", "gpt_oss", "llama4_text")
# With a tied head, projections around the blocks, and in another model.
SAVED = (*FORMS, "llama-tied", "opt-projected", "gemma3", "llama4")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register()


@pytest.fixture(scope="module", params=FORMS)
def folder(request, tmp_path_factory):
    """A pruned folder and its packed form; not to be changed."""
    path = tmp_path_factory.mktemp(request.param)
    save_pruned(path / "pruned", request.param)
    pack_folder(path / "pruned", path / "packed")
    return path


def loaded(path, **options):
    from transformers import AutoConfig

    return auto_class(AutoConfig.from_pretrained(path)).from_pretrained(path, **options)


def weights(path):
    return load_file(path / "model.safetensors")


def assert_same_files(found, expected):
    found, expected = weights(found), weights(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def assert_saved_alike(packed, dense, folder):
    """What transformers saves of the two is, unpacked, the same."""
    packed.save_pretrained(folder / "packed-again")
    dense.save_pretrained(folder / "dense-again")
    unpack_folder(folder / "packed-again", folder / "unpacked-again")
    assert_same_files(folder / "unpacked-again", folder / "dense-again")
    settings = json.loads((folder / "packed-again" / "config.json").read_text())["quantization_config"]
    for name in read_packed_config(settings, folder).ordinary_shapes():
        assert weights(folder / "packed-again")[name].shape == (1,)  # where a dense model has the packed weight


def assert_refused_by_transformers_alone(path):
    """Without this package's quantizer: an error, and not random weights in place of the packed ones."""
    with pytest.MonkeyPatch.context() as patch:
        for known in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
            patch.delitem(known, QUANT_METHOD)
        with pytest.raises(RuntimeError):
            loaded(path)


def assert_same_logits(found, expected):
    torch.testing.assert_close(logits_of(found, TOKENS), logits_of(expected, TOKENS), rtol=1e-3, atol=1e-3)


def change_weights(path, change):
    """Edit the tensors of a folder in place; without its report, which would not be true any more."""
    tensors = weights(path)
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "report.json").unlink(missing_ok=True)


# There and back


@pytest.mark.parametrize("variant", in_short([*VARIANTS, *WRAPPERS], [*COVERING, *SAVED, *WRAPPERS]))
def test_packed_it_computes_the_same_and_unpacked_it_has_the_same_bits(variant, tmp_path):
    model, matrices = save_pruned(tmp_path / "pruned", variant)
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed")
    dense_info = loaded(tmp_path / "pruned", output_loading_info=True)[1]  # of llama4 the language tower alone
    packed, info = loaded(tmp_path / "packed", output_loading_info=True)
    assert not info["missing_keys"]
    assert info == dense_info
    assert_same_logits(packed, model)
    layers = packed_layers(packed)
    assert len(report.packed) == len(layers)
    assert sum(layer.weight.numel() for layer in layers.values()) == sum(matrix.numel() for matrix in matrices.values())
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_same_files(tmp_path / "unpacked", tmp_path / "pruned")


@pytest.mark.parametrize("variant", in_short([*VARIANTS, *WRAPPERS], SAVED))
def test_what_transformers_saves_of_it_unpacks_too_and_transformers_alone_refuses_both(variant, tmp_path):
    save_pruned(tmp_path / "pruned", variant)
    pack_folder(tmp_path / "pruned", tmp_path / "packed")
    packed, dense = (loaded(tmp_path / name) for name in ("packed", "pruned"))
    assert_saved_alike(packed, dense, tmp_path)
    assert_refused_by_transformers_alone(tmp_path / "packed")
    assert_refused_by_transformers_alone(tmp_path / "packed-again")


def test_it_generates_the_same_tokens(folder):
    settings = {"max_new_tokens": 8, "do_sample": False}
    dense, packed = (loaded(folder / name).generate(TOKENS, **settings) for name in ("pruned", "packed"))
    assert torch.equal(packed, dense)


def test_no_weight_is_dense_in_memory(folder):
    packed = loaded(folder / "packed")
    kept = [tensor for name, tensor in packed.named_parameters() if "embed" not in name and not name.startswith("lm_")]
    assert all(tensor.ndim < 3 for tensor in kept)
    for layer in packed_layers(packed).values():
        columns = padded_columns(layer.in_features)
        assert layer.packed.nbytes == layer.out_features * (4 * columns // 2 + columns // 8)  # float32


@pytest.mark.parametrize("variant", FORMS)
def test_without_a_report_whatever_keeps_the_pattern_is_packed(variant, tmp_path):
    save_pruned(tmp_path / "pruned", variant)
    (tmp_path / "pruned" / "report.json").unlink()
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed")
    assert len(report.packed) == len(packed_layers(loaded(tmp_path / "packed")))
    assert not any("experts." in name for name in report.left_dense if not name.endswith("_bias"))


@pytest.mark.parametrize("values", [IntegerValues(8), IntegerValues(4, 32)])
def test_values_rounded_to_integers(folder, values, tmp_path):
    pack_folder(folder / "pruned", tmp_path / "small", form=values)
    unpack_folder(tmp_path / "small", tmp_path / "rounded")
    rounded, pruned = weights(tmp_path / "rounded"), weights(folder / "pruned")
    assert rounded.keys() == pruned.keys()
    for name, tensor in pruned.items():  # half a step of the largest weight
        step = float(tensor.abs().max()) / (2 ** (values.bits - 1) - 1)
        assert float((rounded[name] - tensor).abs().max()) <= 0.51 * step
    packed = loaded(tmp_path / "small")
    assert_same_logits(packed, loaded(tmp_path / "rounded"))
    packed.save_pretrained(tmp_path / "again")
    unpack_folder(tmp_path / "again", tmp_path / "again-rounded")
    assert_same_files(tmp_path / "again-rounded", tmp_path / "rounded")


def test_shards(folder, tmp_path):
    pack_folder(folder / "pruned", tmp_path / "packed", shard_bytes=20_000)
    assert (tmp_path / "packed" / INDEX).is_file()
    assert_same_logits(loaded(tmp_path / "packed"), loaded(folder / "packed"))
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_same_files(tmp_path / "unpacked", folder / "pruned")


def test_half_precision_stays_what_it_was(folder, tmp_path):
    model = loaded(folder / "pruned", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    pack_folder(tmp_path / "half", tmp_path / "packed")
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_same_files(tmp_path / "unpacked", tmp_path / "half")
    packed = loaded(tmp_path / "packed", dtype=torch.float32)
    assert_same_logits(packed, loaded(tmp_path / "half", dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", ["deepseek_v3", "mixtral", "gemma3"])
def test_other_tensors_get_the_dtypes_of_an_ordinary_loading(variant, dtype, tmp_path):
    """DeepSeek keeps a router's bias in float32 whatever is asked for; Mixtral and Gemma 3 are renamed on loading."""
    save_pruned(tmp_path / "pruned", variant)
    pack_folder(tmp_path / "pruned", tmp_path / "packed")
    expected, found = (
        {name: tensor.dtype for name, tensor in loaded(tmp_path / folder, dtype=dtype).state_dict().items()}
        for folder in ("pruned", "packed")
    )
    same = expected.keys() & found.keys()
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}
    assert {tensor for name, tensor in found.items() if name.endswith(".values")} == {dtype}


def test_the_model_without_its_head(folder):
    from transformers import AutoModel

    base = AutoModel.from_pretrained(folder / "packed")
    assert len(packed_layers(base)) == len(packed_layers(loaded(folder / "packed")))


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Published GPT-2 files call their tensors h.0..., without the head's `transformer.` in front."""
    model, _ = save_pruned(tmp_path / "pruned", "gpt2")
    change_weights(tmp_path / "pruned", _without_prefix)
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed")
    assert "h.0.attn.c_attn" in report.packed
    packed = loaded(tmp_path / "packed")
    assert_same_logits(packed, model)
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_same_files(tmp_path / "unpacked", tmp_path / "pruned")
    assert_saved_alike(packed, loaded(tmp_path / "pruned"), tmp_path)


def _without_prefix(tensors):
    for name in list(tensors):
        tensors[name.removeprefix("transformer.")] = tensors.pop(name)


# A part of the experts


def drop(*fragments):
    """Undo the pruning of the tensors whose names hold a fragment."""

    def change(tensors):
        for name, tensor in tensors.items():
            if any(fragment in name for fragment in fragments):
                tensor[tensor == 0] = 0.01

    return change


@pytest.mark.parametrize(
    ("variant", "fragments", "banks"),
    [
        ("mixtral", ("w2",), {0: {"gate_up_proj"}, 1: {"gate_up_proj"}}),
        (
            "mixtral",
            ("layers.0.mlp.experts.", "layers.0.block_sparse_moe.experts."),
            {1: {"gate_up_proj", "down_proj"}},
        ),
        ("qwen3_moe", ("layers.0.mlp.experts.2.up_proj",), {0: {"down_proj"}, 1: {"gate_up_proj", "down_proj"}}),
        ("gpt_oss", ("gate_up_proj",), {0: {"down_proj"}, 1: {"down_proj"}}),
        ("llama4_text", ("experts.down_proj",), {1: {"gate_up_proj"}}),
    ],
)
def test_a_projection_of_experts_is_packed_whole_or_not_at_all(variant, fragments, banks, tmp_path):
    """One expert that does not keep the pattern leaves that projection dense, and that projection alone."""
    save_pruned(tmp_path / "pruned", variant)
    change_weights(tmp_path / "pruned", drop(*fragments))
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed")
    assert "not every expert keeps 2:4" in report.left_dense.values()
    packed = loaded(tmp_path / "packed")
    assert_same_logits(packed, loaded(tmp_path / "pruned"))
    found = [module for module in packed.modules() if isinstance(module, PackedExperts)]
    assert [set(module.parts) for module in found] == list(banks.values())
    unpack_folder(tmp_path / "packed", tmp_path / "unpacked")
    assert_same_files(tmp_path / "unpacked", tmp_path / "pruned")
    assert_saved_alike(packed, loaded(tmp_path / "pruned"), tmp_path)


@pytest.mark.parametrize(
    ("variant", "tensor", "named"),
    [
        ("mixtral", "model.layers.1.mlp.experts.3.w3.weight", "experts.3.w3.weight"),
        ("gpt_oss", "model.layers.1.mlp.experts.down_proj", "experts.0.down_proj.weight"),
        ("gpt2", "transformer.h.1.mlp.c_fc.weight", "c_fc.weight"),
    ],
)
def test_a_reported_layer_that_breaks_the_pattern_is_refused(variant, tensor, named, tmp_path):
    save_pruned(tmp_path / "pruned", variant)
    report = (tmp_path / "pruned" / "report.json").read_text()
    tensor = tensor if tensor in weights(tmp_path / "pruned") else tensor.replace(".mlp.", ".block_sparse_moe.")
    change_weights(tmp_path / "pruned", drop(tensor))
    (tmp_path / "pruned" / "report.json").write_text(report)
    with refused(named, "not 2:4: row 0, columns 0..3"):
        pack_folder(tmp_path / "pruned", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_experts_that_were_not_all_pruned_stay_dense(tmp_path):
    save_pruned(tmp_path / "pruned", "olmoe")
    path = tmp_path / "pruned" / "report.json"
    layers = json.loads(path.read_text())["layers"]
    path.write_text(json.dumps({"layers": [layer for layer in layers if ".experts.3." not in layer["name"]]}))
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed")
    assert not any(".experts." in name for name in report.packed)
    assert (
        report.left_dense["model.layers.0.mlp.experts.1.up_proj.weight"] == "not all experts of the layer were pruned"
    )


# What is not known


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_experts_of_an_unknown_model_are_refused(tmp_path):
    save_pruned(tmp_path / "pruned", "mixtral")
    edit_config(tmp_path / "pruned", model_type="mystery")
    with refused("could not be loaded", "mystery"):
        pack_folder(tmp_path / "pruned", tmp_path / "packed")


@torch.no_grad()
def test_experts_in_an_unknown_form_are_refused_and_without_a_report_stay_dense(tmp_path):
    """Granite MoE's files call the experts' weights input_linear and output_linear: the rest can be packed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("granitemoe", **sizes, **heads))
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim > 1:
            parameter.view(-1, 4)[:, :2] = 0
    model.save_pretrained(tmp_path / "pruned")
    layer = "model.layers.0.block_sparse_moe.experts.0.gate_up_proj"
    (tmp_path / "pruned" / "report.json").write_text(json.dumps({"layers": [{"name": layer, "sparsity": "2:4"}]}))
    with refused(layer, "remove report.json"):
        pack_folder(tmp_path / "pruned", tmp_path / "packed")
    (tmp_path / "pruned" / "report.json").unlink()
    report = pack_folder(tmp_path / "pruned", tmp_path / "packed")
    assert len(report.packed) == 8
    assert len([name for name in report.left_dense if "put_linear" in name]) == 4
    assert_same_logits(loaded(tmp_path / "packed"), loaded(tmp_path / "pruned"))


def test_other_sizes_than_the_configs_are_refused(folder, tmp_path):
    config = json.loads((folder / "packed" / "config.json").read_text())
    name, shape = next((n, s) for n, s in config["quantization_config"]["modules"].items() if "*" in n or "c_fc" in n)
    (tmp_path / "odd").mkdir()
    for path in (folder / "packed").iterdir():
        (tmp_path / "odd" / path.name).write_bytes(path.read_bytes())
    widths = ("n_inner", "intermediate_size", "moe_intermediate_size")
    other = config | {key: (config[key] or 128) + 32 for key in widths if key in config}
    (tmp_path / "odd" / "config.json").write_text(json.dumps(other))
    with refused("packed as", "the model's config says"):
        loaded(tmp_path / "odd")
    config["quantization_config"]["modules"][name] = [*shape[:-1], shape[-1] + 32]
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    with refused(str(tmp_path / "odd"), "packed weight of shape", "found"):
        loaded(tmp_path / "odd")


# In memory


def test_a_model_in_memory_is_packed_where_it_is(folder):
    model = loaded(folder / "pruned")
    expected = logits_of(model, TOKENS)
    names = pack_linears(model, kernels="dense")
    assert set(names) == set(packed_layers(model))
    assert set_kernels(model, "auto") == len(names)
    assert explain(model).startswith(f"{len(names)} packed 2:4 layers")
    torch.testing.assert_close(logits_of(model, TOKENS), expected, rtol=1e-3, atol=1e-3)
    assert not any(parameter.ndim == 3 for parameter in model.parameters())
    assert pack_linears(model) == []


def test_a_model_packed_in_memory_is_not_saved(folder, tmp_path):
    model = loaded(folder / "pruned")
    pack_linears(model)
    for part in (model, model.base_model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with refused("packed in memory", "python -m sparsegpt pack"):
            part.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    untouched = loaded(folder / "packed")
    assert pack_linears(untouched) == []
    untouched.save_pretrained(tmp_path / "saved")
    assert_same_logits(loaded(tmp_path / "saved"), untouched)


@pytest.mark.parametrize("kernels", ["dense", "resident"])
def test_every_kernel_serves(folder, kernels):
    packed = loaded(folder / "packed")
    set_kernels(packed, kernels)
    assert_same_logits(packed, loaded(folder / "pruned"))


def test_dequantize_gives_the_original_modules_back(folder, tmp_path):
    dense = loaded(folder / "pruned")
    back = loaded(folder / "packed").dequantize()
    assert not packed_layers(back)
    assert [type(module) for module in back.modules()] == [type(module) for module in dense.modules()]
    expected = dense.state_dict()
    assert back.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())
    assert torch.equal(logits_of(back, TOKENS), logits_of(dense, TOKENS))


def test_copies_casts_and_gradients(folder):
    packed, dense = loaded(folder / "packed"), loaded(folder / "pruned")
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(logits_of(other, TOKENS), logits_of(packed, TOKENS))
    gradients = []
    for model in (packed, dense):
        embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_(True)
        gradients.append(torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-2, atol=1e-2 * float(gradients[1].abs().max()))
    half = packed.to(torch.bfloat16)
    assert logits_of(half, TOKENS).dtype == torch.bfloat16


@pytest.mark.parametrize("variant", MIXTURES)
def test_an_expert_that_no_token_reaches_is_not_called(variant, tmp_path):
    save_pruned(tmp_path / "pruned", variant)
    pack_folder(tmp_path / "pruned", tmp_path / "packed")
    packed, called = loaded(tmp_path / "packed"), set()
    for name, layer in packed_layers(packed).items():
        layer.register_forward_hook(lambda *_, name=name: called.add(name))
    logits_of(packed, TOKENS[:1, :1])
    experts = {name for name in packed_layers(packed) if ".experts." in name}
    assert 0 < len(experts & called) < len(experts)
