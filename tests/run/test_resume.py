"""`run` interrupted, resumed, repeated: the same bits, and a clear line for what is another run."""

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from sparsegpt.recovery import training
from sparsegpt.recovery.distill import Distiller
from sparsegpt.run import identity
from sparsegpt.run import job as run_module
from sparsegpt.run.job import Listener, run
from sparsegpt.run.options import RunOptions
from sparsegpt.run.work_folder import WorkFolder, unfinished_blocks
from sparsegpt.settings.prune_settings import resolve_settings
from tests.support import refused, save_model, write_text

SETTINGS = resolve_settings("2:4", "default", method="sparsegpt")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out"


class Stop(Listener):
    """Ends the run behind a block, as Ctrl-C does."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.stages = []

    def stage(self, text):
        self.stages.append(text)

    def block(self, report):
        if report.index + 1 == self.blocks:
            raise KeyboardInterrupt


@pytest.fixture
def options(llama_folder, text_file, target):
    return RunOptions(str(llama_folder), str(text_file), (), target, samples=6, sequence_length=16, micro_batch=4)


def changed(options, **changes):
    return RunOptions(**{**vars(options), **changes})


def interrupted(options, blocks=1):
    with pytest.raises(KeyboardInterrupt):
        run(options, SETTINGS, Stop(blocks))


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("preset", ["paper", "default", "best"])
def test_an_interrupted_run_resumes_to_the_same_bits(options, tmp_path, text_file, preset):
    settings = resolve_settings(
        "2:4", preset, method="sparsegpt", **({"reconstruct": 1, "distill": 1} if preset == "best" else {})
    )
    options = changed(options, evaluate=(str(text_file),), eval_windows=4, include_head=True)
    whole = run(changed(options, out=tmp_path / "whole"), settings)
    with pytest.raises(KeyboardInterrupt):
        run(options, settings, Stop(1))
    listener = Stop(0)
    # Where activations live and what is scored decide no weight.
    resumed = run(changed(options, resume=True, activations="disk", bos="never"), settings, listener)
    assert "going on after block 1" in listener.stages
    assert weights(options.out) == weights(tmp_path / "whole")
    assert [layer["relative_error"] for layer in resumed["layers"]] == [
        layer["relative_error"] for layer in whole["layers"]
    ]
    assert whole["warnings"] == resumed["warnings"]
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


DISTILLED = resolve_settings("2:4", "paper", method="magnitude", distill=2, distill_rate=1e-3)
BATCH = 32  # tokens: two windows


@pytest.fixture(scope="module")
def undisturbed(llama_folder, text_file, tmp_path_factory):
    """Epochs and weights of a run with two epochs of distillation."""
    out = tmp_path_factory.mktemp("undisturbed") / "whole"
    options = RunOptions(str(llama_folder), str(text_file), (), out, samples=12, sequence_length=16, micro_batch=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "TOKENS_PER_BATCH", BATCH)
        report = run(options, DISTILLED)
    assert report["epochs"][-1]["loss"] < report["epochs"][0]["loss"]
    return report["epochs"], weights(out)


@pytest.fixture
def distilled(options, undisturbed, monkeypatch):
    """Options of the same run, its settings, epochs and weights when nothing interrupts it."""
    monkeypatch.setattr(training, "TOKENS_PER_BATCH", BATCH)
    return changed(options, samples=12), DISTILLED, *undisturbed


@contextmanager
def step_that_fails(number):
    """Ends a run in this step of the training, as a kill does."""
    real, taken = Distiller.step, []

    def step(self, *args):
        taken.append(1)
        if len(taken) == number:
            raise KeyboardInterrupt
        real(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Distiller, "step", step)
        yield


@pytest.mark.parametrize("step", [1, 3, 6, 8])  # of ten, five in each epoch
def test_an_interrupted_distillation_resumes_to_the_same_bits(distilled, step):
    options, settings, epochs, expected = distilled
    with step_that_fails(step):
        run(options, settings)
    report = run(changed(options, resume=True, activations="disk"), settings)
    assert weights(options.out) == expected
    assert report["epochs"] == epochs


def test_finished_blocks_serve_a_run_that_distills_otherwise(distilled, tmp_path):
    options, settings, _, expected = distilled
    less = replace(settings, distill=1)
    run(changed(options, out=tmp_path / "less"), less)
    with step_that_fails(8):
        run(options, settings)
    listener = Stop(0)
    report = run(changed(options, resume=True), less, listener)
    assert "going on after block 2" in listener.stages
    assert len(report["epochs"]) == 2
    assert weights(options.out) == weights(tmp_path / "less") != expected


def test_a_damaged_training_is_begun_again(distilled):
    options, settings, epochs, expected = distilled
    with step_that_fails(8):
        run(options, settings)
    [path] = (options.out.parent / f".{options.out.name}.unfinished").glob("training-*")
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)
    assert run(changed(options, resume=True), settings)["epochs"] == epochs
    assert weights(options.out) == expected


def test_other_versions_than_those_of_the_beginning_are_a_lasting_warning(options, monkeypatch):
    interrupted(options)
    real = identity.version
    monkeypatch.setattr(identity, "version", lambda name: "0.0" if name == "torch" else real(name))
    with pytest.raises(KeyboardInterrupt):
        run(changed(options, resume=True), SETTINGS, Stop(2))
    monkeypatch.undo()
    [warning] = [text for text in run(changed(options, resume=True), SETTINGS)["warnings"] if "surroundings" in text]
    assert f"torch {real('torch')} then, 0.0 now" in warning
    assert "transformers" not in warning


def test_the_same_versions_are_no_reason_to_warn(options):
    interrupted(options)
    assert not any("surroundings" in text for text in run(changed(options, resume=True), SETTINGS)["warnings"])


def test_a_run_that_finished_no_block_begins_with_the_versions_of_now(options, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(identity, "version", lambda name: "0.0")
        patch.setattr(run_module._Job, "prune", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(options, SETTINGS)
    assert not any("surroundings" in text for text in run(changed(options, resume=True), SETTINGS)["warnings"])


def test_the_dense_score_is_not_computed_twice(options, text_file):
    options = changed(options, evaluate=(str(text_file),), eval_windows=4)
    interrupted(options)
    listener = Stop(0)
    report = run(changed(options, resume=True), SETTINGS, listener)
    assert [stage for stage in listener.stages if "scoring" in stage] == [f"scoring the pruned model on {text_file}"]
    assert report["perplexity"][str(text_file)].keys() == {"dense", "pruned"}


def test_resuming_what_is_finished_says_so_and_changes_nothing(options):
    first = run(options, SETTINGS)
    before = (options.out / "report.json").read_bytes()
    listener = Stop(0)
    again = run(changed(options, resume=True), SETTINGS, listener)
    assert listener.stages[-1] == f"{options.out} is finished already"
    assert again["layers"] == json.loads(json.dumps(first["layers"]))
    assert (options.out / "report.json").read_bytes() == before
    assert not list(options.out.parent.glob(".*"))
    with refused("not empty", settings=["overwrite"]):  # another run
        run(changed(options, resume=True, seed=1), SETTINGS)


def test_resuming_what_is_finished_tells_which_scores_it_lacks(options, text_file):
    options = changed(options, evaluate=(str(text_file),), eval_windows=2)
    run(options, SETTINGS)
    warnings = []
    listener = Stop(0)
    listener.warn = warnings.append
    run(changed(options, resume=True), SETTINGS, listener)
    assert warnings == []
    run(changed(options, resume=True, evaluate=(str(text_file), "pydoc"), kernels="auto"), SETTINGS, listener)
    [warning] = warnings
    assert "not scored on pydoc," in warning
    assert f"{text_file} through kernels" in warning


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-30] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["report.json", "config.json", "tokenizer_config.json"])
def test_a_finished_result_whose_texts_have_changed_is_neither_taken_for_finished_nor_replaced(options, name):
    """Nobody knows whether a disk or its owner has changed it."""
    run(options, SETTINGS)
    flip_a_bit(options.out / name)
    before = (options.out / name).read_bytes()
    for overwrite in (False, True):
        with refused(name, "changed since"):
            run(changed(options, resume=True, overwrite=overwrite), SETTINGS)
    assert (options.out / name).read_bytes() == before


def test_a_finished_result_that_is_damaged_is_not_taken_for_finished(options):
    run(options, SETTINGS)
    good = weights(options.out)
    flip_a_bit(options.out / "model.safetensors")
    with refused("not empty", settings=["overwrite"]):
        run(changed(options, resume=True), SETTINGS)
    run(changed(options, resume=True, overwrite=True), SETTINGS)
    assert weights(options.out) == good


def test_a_kill_between_the_result_and_the_clearing_up_is_finished_on_resume(options, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "_clear", lambda self, **how: None)
        run(options, SETTINGS)
    assert unfinished_blocks(options.out) == 2
    before = weights(options.out)
    run(changed(options, resume=True), SETTINGS)
    assert weights(options.out) == before
    assert not list(options.out.parent.glob(".*"))


def test_other_settings_are_refused_by_their_names(options, text_file, tmp_path):
    interrupted(options)
    for changes, fragment in (
        ({"seed": 1}, "calibration windows: "),
        ({"samples": 5}, "calibration windows: "),
        ({"only": "mlp"}, "--only: None then, mlp now"),
        ({"micro_batch": 2}, "--micro-batch: 4 then, 2 now"),
        ({"dtype": "bfloat16"}, "dtype: "),
        ({"model": str(save_model(tmp_path / "other", seed=5))}, "model: "),
    ):
        with refused("was another one", fragment, "--overwrite instead of --resume"):
            run(changed(options, resume=True, **changes), SETTINGS)
    with refused("damping: "):
        run(changed(options, resume=True), resolve_settings("2:4", "default", method="sparsegpt", damping=0.3))
    with refused("sparsity: 2:4 then, 4:8 now"):
        run(changed(options, resume=True), resolve_settings("4:8", "default", method="sparsegpt"))
    assert unfinished_blocks(options.out) == 1


def test_the_models_own_files_are_never_written_to(options, llama_folder):
    before = {path.name: path.read_bytes() for path in llama_folder.iterdir()}
    run(changed(options, include_head=True), SETTINGS)
    assert {path.name: path.read_bytes() for path in llama_folder.iterdir()} == before


@pytest.mark.parametrize("what", ["threads", "products"])
def test_other_threads_and_products_are_said_too(options, monkeypatch, what):
    interrupted(options)
    real = run_module.surroundings()
    monkeypatch.setattr(run_module, "surroundings", lambda: {**real, what: "other"})
    [warning] = [text for text in run(changed(options, resume=True), SETTINGS)["warnings"] if "surroundings" in text]
    assert f"({what} {real[what]} then, other now)" in warning


def edit(path, change):
    content = safetensors.torch.load_file(path)
    change(content)
    safetensors.torch.save_file(content, path, metadata={"format": "pt"})


def last_bit(content):
    """Of one weight in the middle of a matrix."""
    weight = content["model.layers.0.mlp.up_proj.weight"]
    weight.view(torch.int32)[weight.shape[0] // 2, 3] ^= 1


def test_any_change_of_the_model_is_seen(options, tmp_path):
    folder = save_model(tmp_path / "mine", seed=5)
    options = changed(options, model=str(folder))
    interrupted(options)
    edit(folder / "model.safetensors", last_bit)
    with refused("was another one", "model: "):
        run(changed(options, resume=True), SETTINGS)
    edit(folder / "model.safetensors", last_bit)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    with refused("was another one", "model: "):
        run(changed(options, resume=True), SETTINGS)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_mine.py").write_text("# code that came with the model")
    with refused("was another one", "model: "):
        run(changed(options, resume=True), SETTINGS)
    (folder / "modeling_mine.py").unlink()
    assert run(changed(options, resume=True), SETTINGS)["layers"]


def test_an_edited_text_is_scored_anew(options, tmp_path):
    text = write_text(tmp_path / "held-out.txt", words=400)
    options = changed(options, evaluate=(str(text),))
    interrupted(options)
    text.write_text(" ".join(text.read_text().split()[::-1]))
    resumed = run(changed(options, resume=True), SETTINGS)["perplexity"]
    fresh = run(changed(options, out=tmp_path / "fresh"), SETTINGS)["perplexity"]
    assert resumed == fresh


def test_a_changed_method_of_ones_own_is_seen(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "from sparsegpt import Method\nmine = Method('mine', saliency=lambda weight, hessian: {})\n"
    (tmp_path / "changing_method.py").write_text(code.format("weight.abs()"))
    settings = resolve_settings("2:4", "paper", method="changing_method:mine")
    with pytest.raises(KeyboardInterrupt):
        run(options, settings, Stop(1))
    (tmp_path / "changing_method.py").write_text(code.format("weight.square()"))
    with refused("was another one", "mine: "):
        run(changed(options, resume=True), settings)
