"""Weights at home and weights at work: a streamed model computes what a loaded one does and its home stays as it is."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from sparsegpt.files.mapped import is_mapped
from sparsegpt.model import loading
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.families import FAMILIES
from sparsegpt.model.loading import load_model
from sparsegpt.model.residence import Residence
from tests.support import logits_of, random_windows, save_tokenizer, tiny_model, weights_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def stored(folder, dtype, model_type="llama", **overrides):
    tiny_model(model_type, **overrides).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def streamed(name, folder, **options):
    return load_model(name, device="cpu", stream_through=folder, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("opt", {"tie_word_embeddings": True}), ("qwen3", {})],
)
def test_a_streamed_model_gives_the_logits_of_a_loaded_one(tmp_path, dtype, model_type, overrides):
    name = stored(tmp_path / "model", dtype, model_type, **overrides)
    loaded, away = load_model(name, device="cpu"), streamed(name, tmp_path)
    assert (loaded.model.dtype, away.model.dtype) == (torch.float32, dtype)
    home = weights_of(away.model)
    places = {key: tensor.data_ptr() for key, tensor in away.model.state_dict().items()}
    for windows in (random_windows(3), random_windows(1, 7, seed=5), random_windows(3)):
        assert torch.equal(logits_of(away.model, windows), logits_of(loaded.model, windows))
    after = away.model.state_dict()
    assert places == {key: tensor.data_ptr() for key, tensor in after.items()}
    assert all(torch.equal(home[key], after[key]) and home[key].dtype == after[key].dtype for key in home)


def test_a_table_that_is_in_no_file_has_the_digits_of_the_computing_dtype(tmp_path, monkeypatch):
    """Gemma's embedding scale, the root of 32, is no number of bfloat16."""
    monkeypatch.setitem(FAMILIES, "gemma2", FAMILIES["llama"])
    name = stored(tmp_path / "model", torch.bfloat16, "gemma2", head_dim=8)
    loaded, away = load_model(name, device="cpu"), streamed(name, tmp_path)
    assert torch.equal(logits_of(away.model, random_windows(2)), logits_of(loaded.model, random_windows(2)))
    assert away.model.dtype == away.model.config.dtype == torch.bfloat16


def test_an_explicit_dtype_computes_in_it(tmp_path):
    name = stored(tmp_path / "model", torch.float32)
    away = streamed(name, tmp_path, dtype="bfloat16")
    loaded = load_model(name, device="cpu", dtype="bfloat16")
    assert torch.equal(logits_of(away.model, random_windows(2)), logits_of(loaded.model, random_windows(2)))


def mix(folder):
    """Norms and one matrix in float32 beside halves, in the files of a folder."""
    path = Path(folder) / "model.safetensors"
    content = safetensors.torch.load_file(path)
    kept = {name for name, tensor in content.items() if tensor.ndim == 1 or name.endswith("1.mlp.up_proj.weight")}
    generator = torch.Generator().manual_seed(0)
    content = {
        name: tensor.float() + 1e-4 * torch.rand(tensor.shape, generator=generator) if name in kept else tensor
        for name, tensor in content.items()
    }
    safetensors.torch.save_file(content, path, metadata={"format": "pt"})
    return content


def test_files_of_several_dtypes_compute_as_the_loader_says_and_stay_as_they_are(tmp_path, monkeypatch):
    """As on a GPU, which computes in the dtype of the blocks."""
    name = stored(tmp_path / "model", torch.bfloat16)
    content = mix(name)
    monkeypatch.setattr(loading, "dtypes_for", lambda *args: (torch.bfloat16, torch.bfloat16))
    loaded, away = load_model(name, device="cpu"), streamed(name, tmp_path)
    assert loaded.model.dtype == torch.bfloat16
    assert torch.equal(logits_of(away.model, random_windows(2)), logits_of(loaded.model, random_windows(2)))
    home = weights_of(away.model)
    assert all(torch.equal(home[key], content[key]) and home[key].dtype == content[key].dtype for key in content)


def test_new_values_are_rounded_to_what_is_at_home(tmp_path):
    name = stored(tmp_path / "model", torch.bfloat16)
    mix(name)
    away = streamed(name, tmp_path)
    residence, block = away.residence, away.model.model.layers[1]
    values = torch.rand(3)
    with residence.visit(block):
        for linear, dtype in ((block.mlp.up_proj, torch.float32), (block.mlp.down_proj, torch.bfloat16)):
            assert linear.weight.dtype == torch.float32
            assert torch.equal(residence.as_stored(values, linear.weight), values.to(dtype))
            assert torch.equal(residence.as_stored(values, linear.weight[1:].T), values.to(dtype))  # a view of it
    assert torch.equal(residence.as_stored(values, block.mlp.up_proj.weight), values)
    assert residence.as_stored(values, torch.rand(3)).dtype == torch.bfloat16  # of nobody who is known


def residence_of(module, **options):
    return Residence(None, torch.float64, torch.float32, **options)


def test_what_is_done_to_a_visitor_is_gone_afterwards():
    module = nn.Linear(3, 2)
    before = weights_of(module)
    with residence_of(module).visit(module):
        assert module.weight.dtype == torch.float64
        module.weight.data.zero_()
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_of_nested_visits_the_outermost_counts():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    residence, home = residence_of(module), module[0].weight.data_ptr()
    with residence.visit(module[0]):
        at_work = module[0].weight.data_ptr()
        with residence.visit(module):
            assert module[0].weight.data_ptr() == at_work != home
            assert module[1].weight.dtype == torch.float64
        assert module[0].weight.data_ptr() == at_work
        assert module[1].weight.dtype == torch.float32
    assert module[0].weight.data_ptr() == home


def test_an_exception_inside_a_visit_sends_everything_home():
    module = nn.Linear(3, 2)
    residence, home = residence_of(module), module.weight.data_ptr()
    with pytest.raises(ValueError, match="inside"), residence.visit(module):
        raise ValueError("inside")
    assert (module.weight.data_ptr(), module.weight.dtype) == (home, torch.float32)
    with residence.visit(module):
        assert module.weight.dtype == torch.float64


def test_a_visit_that_fails_half_way_sends_home_what_had_come(monkeypatch):
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    homes = [parameter.data_ptr() for parameter in module.parameters()]
    real, calls = torch.Tensor.to, []

    def to(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(torch.Tensor, "to", to)
        with residence_of(module).visit(module):
            pytest.fail("nobody may work with half of the weights")
    assert [parameter.data_ptr() for parameter in module.parameters()] == homes


def test_an_exception_inside_the_model_sends_everything_home(tmp_path):
    away = streamed(stored(tmp_path / "model", torch.float16), tmp_path)
    expected = logits_of(away.model, random_windows(2))
    home = {name: tensor.data_ptr() for name, tensor in away.model.state_dict().items()}
    handle = away.model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *call: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits_of(away.model, random_windows(2))
    handle.remove()
    assert home == {name: tensor.data_ptr() for name, tensor in away.model.state_dict().items()}
    assert torch.equal(logits_of(away.model, random_windows(2)), expected)


def test_a_module_that_finds_no_room_leaves_the_others_alone(tmp_path, monkeypatch):
    """The hook that sends home runs after a failed arrival too, and must not take another module's turn."""
    away = streamed(stored(tmp_path / "model", torch.float16), tmp_path)
    model, residence = away.model, away.residence
    expected = logits_of(model, random_windows(2))
    real = Residence._bring

    def bring(self, module, brought):
        if module is model.model.layers[0]:
            raise MemoryError
        real(self, module, brought)

    with residence.visit(model.model.norm):
        at_work = model.model.norm.weight.data_ptr()
        with monkeypatch.context() as patch, pytest.raises(MemoryError):
            patch.setattr(Residence, "_bring", bring)
            logits_of(model, random_windows(2))
        assert model.model.norm.weight.data_ptr() == at_work
    assert torch.equal(logits_of(model, random_windows(2)), expected)


# Embeddings


@pytest.fixture
def embedding(tmp_path):
    """The input embedding of a streamed model with a padding row, and its table in float32."""
    away = streamed(stored(tmp_path / "model", torch.float16, pad_token_id=95), tmp_path)
    table = away.model.get_input_embeddings()
    assert table.padding_idx == 95
    return away, table, table.weight.detach().float().clone()


@pytest.mark.parametrize("keyword", [False, True])
def test_an_embedding_brings_the_rows_asked_for(embedding, keyword):
    _, module, table = embedding
    tokens = torch.tensor([[95, 3, 3], [0, 41, 95]])
    seen = []
    module.register_forward_pre_hook(lambda module, args: seen.append(len(module.weight)))
    found = module(input=tokens) if keyword else module(tokens)
    assert torch.equal(found, table[tokens])
    assert seen == [4]
    assert module.weight.dtype == torch.float16
    assert len(module.weight) == 96


def test_a_tied_table_serves_the_embedding_and_the_head(tmp_path):
    name = stored(tmp_path / "model", torch.float16, tie_word_embeddings=True, pad_token_id=0)
    away, loaded = streamed(name, tmp_path), load_model(name, device="cpu")
    assert away.model.lm_head.weight is away.model.model.embed_tokens.weight
    assert torch.equal(logits_of(away.model, random_windows(2)), logits_of(loaded.model, random_windows(2)))
    assert away.model.lm_head.weight is away.model.model.embed_tokens.weight


def test_an_embedding_inside_a_visit_of_the_whole_model_uses_what_is_there(embedding):
    away, module, table = embedding
    expected = logits_of(away.model, random_windows(2))
    home = module.weight.data_ptr()
    with away.residence.visit(away.model):
        assert torch.equal(logits_of(away.model, random_windows(2)), expected)
        assert len(module.weight) == 96
    assert module.weight.data_ptr() == home
    assert torch.equal(module.weight.float(), table)


# Settling


@pytest.mark.parametrize("keep", [False, True])
def test_a_settled_weight_is_what_the_model_computes_with_from_then_on(tmp_path, keep):
    """keep: as on a GPU with room for the whole model, where it has been at work already."""
    model, other = tiny_model("llama").half(), tiny_model("llama", seed=3).half()
    residence = Residence(torch.device("cpu"), torch.float32, torch.float16, reversible=True)
    residence.attach(DecoderModel.of(model), keep=keep)
    dense = logits_of(model, random_windows(2))
    for name, parameter in model.model.layers[1].named_parameters():
        residence.settle(parameter, other.model.layers[1].get_parameter(name).data)
    expected = tiny_model("llama").half()
    expected.model.layers[1] = other.model.layers[1]
    assert torch.equal(logits_of(model, random_windows(2)), logits_of(expected.float(), random_windows(2)))
    residence.unsettle()
    assert torch.equal(logits_of(model, random_windows(2)), dense)


def test_a_tensor_is_stored_in_the_dtype_that_it_has_at_home():
    module = nn.Sequential(nn.Linear(3, 3).half(), nn.LayerNorm(3))
    module.register_buffer("table", torch.ones(2))
    residence = Residence(None, torch.float32, torch.float16)
    with residence.visit(module):
        assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
        module[0].weight.data.mul_(2)
        found = residence.to_store(module)
    assert {name: tensor.dtype for name, tensor in found.items()} == {
        "table": torch.float32,
        "0.weight": torch.float16,
        "0.bias": torch.float16,
        "1.weight": torch.float32,
        "1.bias": torch.float32,
    }
    assert torch.equal(found["0.weight"], module[0].weight * 2)


def test_a_visit_of_mapped_weights_is_private(tmp_path):
    away = streamed(stored(tmp_path / "model", torch.float32, vocab_size=2**14), tmp_path)
    head = away.model.lm_head
    assert is_mapped(head.weight)
    with away.residence.visit(head):
        assert not is_mapped(head.weight)
    assert is_mapped(head.weight)
