"""Problems, oracles and tiny models shared by the tests. Everything here comes from the definitions, in float64."""

import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import safetensors.torch
import torch
import typer.main
from _pytest.mark import ParameterSet
from torch import Tensor, nn

import sparsegpt
from sparsegpt.driver.reports import PruneReport
from sparsegpt.errors import SparseGPTError
from sparsegpt.eval import tasks
from sparsegpt.rotation import search
from sparsegpt.rotation.learning import Schedule
from sparsegpt.sparsity import NM, Sparsity, parse_sparsity

T = TypeVar("T")
every_task = tasks._harness_tasks
# One thread and no network, also in the processes that tests start.
CHILD_ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "COLUMNS": "160"}


@contextmanager
def refused(*fragments: str, settings: Iterable[str] = ()) -> Iterator[None]:
    """The code inside raises SparseGPTError with a one-line message that holds every fragment, and these settings."""
    with pytest.raises(SparseGPTError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    assert set(caught.value.settings) >= set(settings)


def one_line_or_none(call: Callable[[], T]) -> T | None:
    """What `call()` returns, None where it refuses with one line; any other exception is a failure."""
    try:
        return call()
    except SparseGPTError as error:
        assert str(error)
        assert "\n" not in str(error)
        return None


def prune_model(model: nn.Module, windows: object, sparsity: object, **options: object) -> PruneReport:
    """`sparsegpt.prune_model`, unless asked otherwise in the model's own bases: there the definitions are written."""
    return sparsegpt.prune_model(model, windows, sparsity, **{"rotate": "off", **options})


def look_for_bases_quickly() -> None:
    """A few steps of learning in every run of this process: in any basis at all a run must do what is tested."""
    search.STREAM, search.VALUES = Schedule(4, 0.03), Schedule(3, 0.02)


def look_for_tasks_quickly() -> None:
    """Those of two of lm-eval's own folders, for all of this process: its 10,000 take seconds to find."""
    tasks._harness_tasks = functools.cache(_few_tasks)


def _few_tasks() -> object:
    import lm_eval.tasks

    home = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=[home / "arc", home / "hellaswag"], include_defaults=False)


def make_commands_once() -> None:
    """The options of all commands are made at the first of this process, and not for each of a thousand."""
    if not hasattr(typer.main.get_command, "cache_clear"):
        typer.main.get_command = functools.cache(typer.main.get_command)


def in_short(cases: Iterable[T], short: Iterable[T]) -> list[T | ParameterSet]:
    """Parameters of a test: these as they are, all other cases for its long form, `make test-long`."""
    cases, short = list(cases), list(short)
    assert all(case in cases for case in short), short
    return [case if case in short else in_long(case) for case in cases]


def in_long(case: object) -> ParameterSet:
    """A parameter, or a tuple of several, for the long form of a test."""
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.long)


def crossed(names: str, *tables: Iterable[object], also: Iterable[tuple] = ()) -> pytest.MarkDecorator:
    """Parametrize a test with all that its tables' values can be together, in its long form.

    The short form has each value of each table at least once, beside the others' in turns, and what `also` names.
    """
    listed = [list(table) for table in tables]
    turns = [tuple(table[turn % len(table)] for table in listed) for turn in range(max(map(len, listed)))]
    return pytest.mark.parametrize(names, in_short(itertools.product(*listed), [*turns, *also]))


# Layer problems


def _sums_int8_exactly() -> bool:
    """Where a CPU lacks instructions for it, sums of large products may saturate on their way."""
    large = torch.full((32, 64), 127, dtype=torch.int8)
    return bool((torch._int_mm(large, large.T) == 64 * 127**2).all())


# What quick products may round to, here.
QUICK_DTYPES = [
    torch.bfloat16,
    pytest.param(torch.int8, marks=pytest.mark.skipif(not _sums_int8_exactly(), reason="this CPU sums int8 inexactly")),
]


def random_layer(rows: int, columns: int, seed: int = 0, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """A float32 weight [rows, columns] and the Hessian of correlated inputs of unequal size [columns, columns]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mixing = torch.eye(columns, dtype=torch.float64) + normal(columns, columns) / columns**0.5
    inputs = normal(tokens or 4 * columns, columns) @ mixing * (0.5 * normal(columns)).exp()
    return normal(rows, columns).float(), (inputs.T @ inputs).float()


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """H + damping * mean(diag H) in float64; an input that never fired gets the mean of the others."""
    matrix = hessian.double().clone()
    diagonal = matrix.diagonal()
    alive = diagonal != 0
    mean = diagonal[alive].mean() if alive.any() else torch.tensor(1.0, dtype=torch.float64)
    diagonal[~alive] = mean
    diagonal += damping * mean
    return matrix


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """||(W - W')X||^2 / ||WX||^2 from the Hessian of X, in float64."""

    def energy(matrix: Tensor) -> Tensor:
        return (matrix.double() @ hessian.double() * matrix.double()).sum()

    return float(energy(weight.double() - pruned.double()) / energy(weight))


def brute_mask(saliency: Tensor, kept: int) -> Tensor:
    """Keep the `kept` most salient elements of a flat list; among equals the earlier. One element at a time."""
    values = saliency.flatten().tolist()
    order = sorted(range(len(values)), key=lambda place: (-values[place], place))
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[order[:kept]] = True
    return mask.view(saliency.shape)


def brute_nm_mask(saliency: Tensor, pattern: NM) -> Tensor:
    """`brute_mask` of every group of every row."""
    groups = saliency.reshape(-1, pattern.m)
    masks = [brute_mask(group, pattern.n) for group in groups]
    return torch.stack(masks).view(saliency.shape) if masks else torch.ones_like(saliency, dtype=torch.bool)


def brute_row_mask(saliency: Tensor, zeros: int) -> Tensor:
    """`brute_mask` of every row, each with the same number of zeros."""
    return torch.stack([brute_mask(row, len(row) - zeros) for row in saliency])


def brute_layer_mask(saliency: Tensor, pattern: Sparsity) -> Tensor:
    """The mask of a whole layer [R, C] by any pattern."""
    if isinstance(pattern, NM):
        return brute_nm_mask(saliency, pattern)
    if pattern.per_row:
        return brute_row_mask(saliency, round(pattern.fraction * saliency.shape[1]))
    return brute_mask(saliency, saliency.numel() - round(pattern.fraction * saliency.numel()))


def obs_oracle(
    weight: Tensor, hessian: Tensor, pattern: Sparsity, *, block_size: int = 128, dead: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, left to right, from the definition: a fresh inverse for every column, float64.

    With H_j the (damped) Hessian of the columns from j on: dropping w_j costs w_j^2 / [H_j^-1]_00 and moves the columns
    from j on by -w_j / [H_j^-1]_00 times the first row of H_j^-1. Masks are chosen a group of m, or a block, at a time.
    """
    weight, hessian = weight.double().clone(), hessian.double()
    rows, columns = weight.shape
    mask = torch.ones(rows, columns, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    unit = pattern.m if isinstance(pattern, NM) else block_size
    for start in range(0, columns, unit):
        end = min(start + unit, columns)
        saliency = torch.stack([weight[:, j].square() / inverses[j][0, 0] for j in range(start, end)], dim=1)
        if dead is not None:
            saliency[:, dead[start:end]] = 0
        if isinstance(pattern, NM):
            mask[:, start:end] = brute_nm_mask(saliency, pattern)
        else:
            members = 1 if pattern.per_row else rows
            zeros = round(pattern.fraction * end * members) - round(pattern.fraction * start * members)
            if pattern.per_row:
                mask[:, start:end] = brute_row_mask(saliency, zeros)
            else:  # ties go by column, then by row
                mask[:, start:end] = brute_mask(saliency.T, saliency.numel() - zeros).T
        for j in range(start, end):
            error = weight[:, j].masked_fill(mask[:, j], 0) / inverses[j][0, 0]
            weight[:, j:] -= torch.outer(error, inverses[j][0])
            weight[~mask[:, j], j] = 0
    return weight, mask


def best_on_mask(target: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The optimum on a fixed mask, one dense float64 solve a row: H_SS w_S = (H t)_S."""
    target, hessian = target.double(), hessian.double()
    result = torch.zeros_like(target)
    for row, kept in enumerate(mask):
        if kept.any():
            result[row, kept] = torch.linalg.solve(hessian[kept][:, kept], (hessian @ target[row])[kept])
    return result


def assert_pattern(weight: Tensor, sparsity: str | float | Sparsity) -> None:
    """Exactly the pattern: n non-zeros in every group of m, or the rounded count of zeros; no negative zero."""
    pattern = parse_sparsity(sparsity)
    if isinstance(pattern, NM):
        counts = (weight != 0).reshape(-1, pattern.m).sum(1)
        assert (counts == pattern.n).all()
    elif pattern.per_row:
        assert ((weight == 0).sum(1) == round(pattern.fraction * weight.shape[1])).all()
    else:
        assert int((weight == 0).sum()) == round(pattern.fraction * weight.numel())
    assert not torch.signbit(weight[weight == 0]).any()


# Tiny models

VOCABULARY = 96
# What a configuration of a family needs besides the sizes that all share; tests/architectures.py has many more.
EXTRA_CONFIG = {
    "opt": {
        "ffn_dim": 64,
        "dropout": 0.0,
        "word_embed_proj_dim": 32,
        "intermediate_size": None,
        "num_key_value_heads": None,
    },
    "qwen3": {"head_dim": 8},
}


def tiny_model(model_type: str, *, seed: int = 0, spread: float = 0.2, **overrides: object) -> nn.Module:
    """A random two-block model of width 32 with grouped queries where the family has them.

    spread: standard deviation of the weights; the library's 0.02 would leave attention without any contrast. Of the
    sizes that all share, None leaves one out.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": spread}
    choices = {**sizes, **special, **EXTRA_CONFIG.get(model_type, {}), **overrides}
    choices = {key: value for key, value in choices.items() if key not in sizes or value is not None}
    if model_type == "opt":
        choices["init_std"] = choices.pop("initializer_range")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **choices)).eval()
    return unsettled(model)


@torch.no_grad()
def unsettled(model: nn.Module) -> nn.Module:
    """The same model with other biases and norms: they start at 0 and 1, where mistakes cannot be seen."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_windows(samples: int = 12, length: int = 16, seed: int = 1) -> Tensor:
    """Calibration tokens [samples, length] for `tiny_model`."""
    return torch.randint(VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear inside a decoder block, by full name; found by name, not through the table under test."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".layers." in name
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def logits_of(model: nn.Module, windows: Tensor) -> Tensor:
    return model(input_ids=windows).logits


def record(model: nn.Module, windows: Tensor, modules: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and output of each module over all windows, as float64 rows, from a run of the whole model.

    Rows, because OPT flattens its batch inside a block.
    """
    seen = {}

    def hook_for(name):
        def hook(module, args, kwargs, output):
            first_input = args[0] if args else kwargs["hidden_states"]
            first_output = output[0] if isinstance(output, tuple) else output
            seen[name] = tuple(t.double().reshape(-1, t.shape[-1]) for t in (first_input, first_output))

        return hook

    handles = [module.register_forward_hook(hook_for(name), with_kwargs=True) for name, module in modules.items()]
    logits_of(model, windows)
    for handle in handles:
        handle.remove()
    return seen


# Model folders

WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "seven",
    "small",
    "birds",
    "sang",
    "about",
    "rain",
    "and",
    "wind",
)


def prose(words: int, seed: int = 0) -> str:
    """Random sentences of a few words: text that a byte-level tokenizer of 90 tokens knows whole."""
    picks = torch.randint(len(WORDS), (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(WORDS[pick] + ("." if place % 9 == 8 else "") for place, pick in enumerate(picks))


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE with fewer tokens than `tiny_model` has embeddings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 6, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([prose(2000)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    fast.save_pretrained(folder)


def save_model(folder: Path, model_type: str = "llama", **overrides: object) -> Path:
    """A tiny model and its tokenizer in a folder, as transformers writes them."""
    tiny_model(model_type, **overrides).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def write_text(path: Path, words: int = 3000, seed: int = 0) -> Path:
    path.write_text(prose(words, seed), encoding="utf-8")
    return path


# Model folders that must be refused


def _edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _poison(value: float) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][2, 3] = value

    return lambda folder: _edit_weights(folder, change)


def _lose_tensor(folder: Path) -> None:
    _edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def _shrink_embedding(folder: Path) -> None:
    tiny_model("llama", vocab_size=20).save_pretrained(folder)


# What is done to a good folder, and what the refusal must then say.
BROKEN_FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), ("config.json",)),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), ("config.json", "JSON")),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), ()),
    "config is binary": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), ("config.json",)),
    "unknown model type": (lambda folder: _edit_config(folder, model_type="mystery"), ("mystery",)),
    "other width": (lambda folder: _edit_config(folder, hidden_size=48), ()),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), ("no weights", "safetensors")),
    "truncated": (_truncate, ("model.safetensors", "truncated or damaged")),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), ("model.safetensors",)),
    "garbage": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 999), ("model.safetensors",)),
    "nan": (_poison(float("nan")), ("model.layers.1.mlp.up_proj.weight", "NaN")),
    "inf": (_poison(float("inf")), ("model.layers.1.mlp.up_proj.weight", "infinite")),
    "missing tensor": (_lose_tensor, ("model.layers.1.mlp.up_proj.weight", "lacks")),
    "small embedding": (_shrink_embedding, ("tokenizer", "20", "embedding")),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], ()),
}


def broken_folder(good: Path, target: Path, how: str) -> tuple[Path, tuple[str, ...]]:
    """A copy of a good llama folder, broken as a key of BROKEN_FOLDERS says, and what the refusal must say."""
    breaking, fragments = BROKEN_FOLDERS[how]
    shutil.copytree(good, target)
    breaking(target)
    return target, fragments


class Outcome:
    """How a command ended."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def refused(self, *fragments: str) -> None:
        """Exit 1 (or 2 for wrong usage), one line on stderr with every fragment, no traceback."""
        assert self.code in (1, 2), self.out + self.err
        assert "Traceback" not in self.err
        if self.code == 1:
            assert self.err.count("\n") == 1
            assert self.err.startswith("sparsegpt: ")
        for fragment in fragments:
            assert fragment in self.err
