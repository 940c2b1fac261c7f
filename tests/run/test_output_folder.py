"""A pruned folder is the source's with other weights: what else it says and holds stays as it was."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sparsegpt.files.checked_json import read_checked
from sparsegpt.files.results import MARKER
from sparsegpt.model.loading import load_model
from sparsegpt.run.job import Listener, run
from sparsegpt.run.options import RunOptions
from sparsegpt.run.planning import plan_run
from sparsegpt.settings.prune_settings import resolve_settings
from tests.architectures import tiny_variant, tiny_wrapper
from tests.model.test_source import hub, in_cache  # noqa: F401 - a fixture
from tests.support import assert_pattern, logits_of, random_windows, refused, save_model, save_tokenizer, tiny_model

SETTINGS = resolve_settings("2:4", "paper")


@pytest.fixture
def options(tmp_path, text_file):
    """Of a run on a folder `model`, which a test fills."""
    return RunOptions(
        str(tmp_path / "model"), str(text_file), (), tmp_path / "out", samples=6, sequence_length=16, micro_batch=4
    )


def changed(options, **changes):
    return RunOptions(**{**vars(options), **changes})


def tensors(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


def edit_config(folder, drop=(), **changes):
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in drop}))


class Watch(Listener):
    """Notes the warnings and how many blocks were pruned."""

    def __init__(self):
        self.blocks = 0
        self.warnings = []

    def block(self, report):
        self.blocks += 1

    def warn(self, text):
        self.warnings.append(text)


def test_every_file_but_the_weights_comes_along_to_the_byte(options, tmp_path):
    source = save_model(tmp_path / "model")
    older = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "torch_dtype": "float32"}
    edit_config(source, drop=("rope_parameters", "dtype"), **older)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (source / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))
    for name in ("LICENSE", ".gitattributes", "chat_template.jinja", "video_preprocessor_config.json", "sub/a/b.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(name.encode() + b"\r\n\xc3\xa9")
    (source / "generation_config.json").write_text('{"temperature":0.25 }')
    (source / "report.json").write_text('{"layers": "of another run"}')
    run(options, SETTINGS)
    before, after = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (source, options.out)
    )
    new = {"README.md", "report.html", "report.json", "model.safetensors"}
    assert after.keys() == before.keys() | new | {MARKER}
    assert {name: after[name] for name in before.keys() - new} == {name: before[name] for name in before.keys() - new}
    assert read_checked(options.out / "report.json")["model"] == options.model


def test_a_config_that_transformers_would_not_save_makes_no_finished_run_fail(options, tmp_path):
    source = save_model(tmp_path / "model")
    edit_config(source, output_attentions=True)
    run(options, SETTINGS)
    assert (options.out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_what_cannot_be_written_is_refused_before_the_first_block(options, tmp_path, monkeypatch):
    source = save_model(tmp_path / "model")
    (source / "asset.txt").write_text("")
    real = shutil.copyfile

    def copyfile(origin, target):
        if Path(origin).name == "asset.txt":
            raise OSError("File name too long")
        return real(origin, target)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    watch = Watch()
    with refused(options.model, "File name too long"):
        run(options, SETTINGS, watch)
    assert watch.blocks == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_tensors_that_find_no_way_back_are_refused_before_the_first_block(options, tmp_path, monkeypatch):
    """Experts that the loader joins, with a transformers that cannot part them."""
    from transformers import core_model_loading

    folder = tmp_path / "model"
    tiny_variant("mixtral").save_pretrained(folder)
    save_tokenizer(folder)
    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", lambda model, state: state)
    watch = Watch()
    with refused("experts", "save the model anew"):
        run(options, SETTINGS, watch)
    assert watch.blocks == 0


@pytest.mark.parametrize("preset", ["paper", "best"])
def test_weights_of_several_dtypes_are_pruned_in_their_own_and_resume_to_the_same_bits(options, tmp_path, preset):
    source = save_model(tmp_path / "model")
    content = tensors(source)
    kept = (".1.mlp.up_proj.weight", "layernorm.weight", "norm.weight")
    content = {name: tensor if name.endswith(kept) else tensor.bfloat16() for name, tensor in content.items()}
    safetensors.torch.save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    settings = resolve_settings("2:4", preset, method="sparsegpt", distill=1 if preset == "best" else 0)
    report = run(changed(options, out=tmp_path / "whole"), settings)
    pruned = tensors(tmp_path / "whole")
    assert {name: tensor.dtype for name, tensor in pruned.items()} == {n: t.dtype for n, t in content.items()}
    for layer in report["layers"]:
        assert_pattern(pruned[f"{layer['name']}.weight"], "2:4")
    wide = pruned["model.layers.1.mlp.up_proj.weight"]
    assert not torch.equal(wide, wide.bfloat16().float())  # its digits are all there

    class Stop(Listener):
        def block(self, report):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(options, settings, Stop())
    run(changed(options, resume=True), settings)
    assert (options.out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_experts_of_several_dtypes_are_pruned_in_their_own_and_resume_to_the_same_bits(options, tmp_path):
    """Even where the loader joins tensors of two dtypes; those of GPT-2 are transposed besides."""
    for variant in ("mixtral", "gpt2"):
        source = tmp_path / variant
        tiny_variant(variant).save_pretrained(source)
        save_tokenizer(source)
        wide = ("w2.weight", "1.w1.weight", "0.attn.c_attn.weight", "1.self_attn.k_proj.weight")
        content = {n: t if n.endswith(wide) else t.bfloat16() for n, t in tensors(source).items()}
        safetensors.torch.save_file(content, source / "model.safetensors", metadata={"format": "pt"})
        chosen = changed(options, model=str(source), out=tmp_path / f"{variant}-out")
        whole = changed(chosen, out=tmp_path / f"{variant}-whole")
        run(whole, SETTINGS)
        pruned = tensors(whole.out)
        assert {name: tensor.dtype for name, tensor in pruned.items()} == {n: t.dtype for n, t in content.items()}
        changed_ones = [name for name in content if not torch.equal(pruned[name], content[name])]
        assert {name.endswith(wide) for name in changed_ones} == {True, False}

        class Stop(Listener):
            def block(self, report):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(chosen, SETTINGS, Stop())
        run(changed(chosen, resume=True), SETTINGS)
        assert (chosen.out / "model.safetensors").read_bytes() == (whole.out / "model.safetensors").read_bytes()


def test_surplus_tensors_are_kept_and_told(options, tmp_path):
    source = save_model(tmp_path / "model")
    name = "model.layers.0.self_attn.q_proj.bias"
    content = {**tensors(source), name: torch.randn(32)}
    safetensors.torch.save_file(content, source / "model.safetensors", metadata={"format": "pt"})
    watch = Watch()
    report = run(options, SETTINGS, watch)
    assert torch.equal(tensors(options.out)[name], content[name])
    assert [name in warning for warning in watch.warnings] == [True]
    assert watch.warnings == report["warnings"]


def test_a_multimodal_model_keeps_its_processor_and_its_vision_tower(options, tmp_path):
    source = tmp_path / "model"
    tiny_wrapper("llava").save_pretrained(source)
    save_tokenizer(source)
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (source / name).write_text("{}")
    run(options, SETTINGS)
    assert {path.name for path in source.iterdir()} <= {path.name for path in options.out.iterdir()}
    before, after = tensors(source), tensors(options.out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if "vision" in name)
    assert b"AutoProcessor" in (options.out / "README.md").read_bytes()


def test_a_hub_model_comes_from_the_cache_and_its_card_names_it(options, tmp_path, hub):  # noqa: F811
    model = save_model(tmp_path / "local")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    in_cache(model, hub)
    report = run(changed(options, model="org/tiny"), SETTINGS)
    card = (options.out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\nbase_model: org/tiny\n")
    assert "# Tiny" in card
    assert report["model"] == "org/tiny"
    assert not any(path.is_symlink() for path in options.out.iterdir())
    assert (options.out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_report_and_card_of_a_run_from_python(options, tmp_path, text_file):
    save_model(tmp_path / "model")
    started = datetime.now(UTC)
    report = run(changed(options, evaluate=(str(text_file),), eval_windows=2), SETTINGS)
    assert (report["preset"], report["command"]) == (None, None)
    assert 0 <= (datetime.fromisoformat(report["date"]) - started.replace(microsecond=0)).total_seconds() < 600
    card = (options.out / "README.md").read_text()
    scores = report["perplexity"][str(text_file)]
    assert f"| {text_file} | {scores['dense']:.4f} | {scores['pruned']:.4f} |" in card


def test_the_plan_counts_what_the_files_hold(options, tmp_path):
    source = save_model(tmp_path / "model")
    tiny_variant("llama").bfloat16().save_pretrained(source)
    half = plan_run(options, SETTINGS).disk
    edit_config(source, dtype="float32")
    assert plan_run(options, SETTINGS).disk == half
    assert 2 * half["result"] == plan_run(changed(options, dtype="float32"), SETTINGS).disk["result"]


def test_the_command_line_is_in_the_report_and_rounding_takes_the_figures_away(run_cli, options, tmp_path, text_file):
    save_model(tmp_path / "model")
    given = ("--model", options.model, "--sparsity", "2:4", "--preset", "fast", "--samples", 6, "--seqlen", 16)
    texts = ("--calib", text_file, "--eval", text_file, "--eval-windows", 2, "--only", "mlp|self_attn", "--quiet")
    assert run_cli("run", *given, *texts, "--out", options.out).code == 0
    report = read_checked(options.out / "report.json")
    assert report["preset"] == "fast"
    assert report["command"].startswith(f"sparsegpt run --model {options.model} --sparsity 2:4")
    assert "--only 'mlp|self_attn'" in report["command"]
    pruned = f"{report['perplexity'][str(text_file)]['pruned']:.4f}"
    cards = {}
    for values in ("", "int8"):
        packed = tmp_path / f"packed{values}"
        assert run_cli("pack", options.out, packed, *(("--values", values) if values else ())).code == 0
        cards[values] = (packed / "README.md").read_text()
        assert bool(read_checked(packed / "report.json")["perplexity"]) == (not values)
    assert pruned in cards[""]
    assert pruned not in cards["int8"]
    assert "values rounded to int8" in cards["int8"]
    assert run_cli("inspect", tmp_path / "packedint8").code == 0
    assert cards[""].count("import sparsegpt") == cards["int8"].count("import sparsegpt") == 1
    assert run_cli("unpack", tmp_path / "packed", tmp_path / "unpacked").code == 0
    assert (tmp_path / "unpacked" / "README.md").read_bytes() == (options.out / "README.md").read_bytes()


REMOTE = {
    "configuration_mine.py": """
from transformers import LlamaConfig


class MineConfig(LlamaConfig):
    model_type = "mine"
""",
    "modeling_mine.py": """
from transformers import LlamaForCausalLM

from .configuration_mine import MineConfig


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
""",
}


def test_code_that_comes_with_the_model_is_trusted_everywhere_and_stays_with_it(
    run_cli, options, tmp_path, text_file, monkeypatch
):
    from transformers import AutoModelForCausalLM, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    source = save_model(tmp_path / "model")
    for name, content in REMOTE.items():
        (source / name).write_text(content)
    places = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit_config(source, model_type="mine", architectures=["MineForCausalLM"], auto_map=places)
    given = ("run", "--model", source, "--sparsity", "2:4", "--preset", "paper", "--samples", 6, "--seqlen", 16)
    given = (*given, "--calib", text_file, "--eval", "none", "--out", options.out, "--quiet")
    run_cli(*given).refused("--trust-remote-code")
    assert run_cli(*given, "--trust-remote-code", "--plan").code == 0
    assert run_cli(*given, "--trust-remote-code").code == 0
    shutil.rmtree(source)
    assert json.loads((options.out / "config.json").read_text())["auto_map"] == places
    score = ("eval", "--model", options.out, "--data", text_file, "--seqlen", 16, "--eval-windows", 2)
    run_cli(*score).refused("--trust-remote-code")
    assert run_cli(*score, "--trust-remote-code").code == 0
    model = AutoModelForCausalLM.from_pretrained(options.out, trust_remote_code=True).eval()
    assert type(model).__name__ == "MineForCausalLM"
    assert torch.isfinite(logits_of(model, random_windows(1))).all()


def test_a_source_that_goes_away_meanwhile_is_not_missed(options, tmp_path, text_file):
    source = save_model(tmp_path / "model")
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("# Mine")

    class Remove(Listener):
        def block(self, report):
            shutil.rmtree(source, ignore_errors=True)

    run(changed(options, evaluate=(str(text_file),), eval_windows=2), SETTINGS, Remove())
    assert not source.exists()
    assert (options.out / "LICENSE").read_text() == "free"
    assert (options.out / "README.md").read_text().count("# Mine") == 1
    assert "| perplexity | dense | pruned |" in (options.out / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_links_that_lead_out_of_the_source_are_told_and_refused_where_the_result_needs_them(options, tmp_path):
    source = save_model(tmp_path / "model")
    (tmp_path / "notes.txt").write_text("of somebody else")
    (source / "notes.txt").symlink_to(tmp_path / "notes.txt")
    watch = Watch()
    run(options, SETTINGS, watch)
    assert any("notes.txt" in warning for warning in watch.warnings)
    assert not (options.out / "notes.txt").exists()
    (source / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    watch = Watch()
    with refused("links out of its folder", "tokenizer.json"):
        run(changed(options, overwrite=True), SETTINGS, watch)
    assert watch.blocks == 0


STALE = {"pytorch_model.bin.index.json": "pytorch_model-00001-of-00002.bin"}
OTHER = {"model.safetensors.index.json": "model-00001-of-00009.safetensors"}


@pytest.mark.parametrize(("shards", "stale"), [("1MB", STALE), ("30KB", STALE), ("1MB", STALE | OTHER)])
def test_an_index_of_weights_that_are_not_there_misleads_nobody(options, hub, shards, stale):  # noqa: F811
    """As in Llama-2-hf, which holds safetensors and the index of the pickled files that were there before."""
    model = save_model(Path(options.model))
    tiny_model("llama").save_pretrained(model, max_shard_size=shards)
    for name, shard in stale.items():
        (model / name).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": shard}}))
    in_cache(model, hub)
    for name in (options.model, "org/tiny"):
        run(changed(options, model=name, overwrite=True), SETTINGS)
        written = {path.name for path in options.out.iterdir()}
        assert not {path for path in written if path.endswith(("index.json", ".bin"))}
        weights = tensors(options.out)
        assert_pattern(weights["model.layers.0.mlp.up_proj.weight"], "2:4")
        logits = logits_of(load_model(str(options.out), device="cpu").model, random_windows())
        assert torch.isfinite(logits).all()
