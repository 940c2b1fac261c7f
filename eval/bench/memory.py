"""`bench memory`: the private memory of whole runs on models of equal blocks, one with twice as many as the other.

The models are written for the occasion: one random block of a Llama, under as many names as there are blocks.
"""

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.checked_json import REPORT_NAME

HIDDEN, INTERMEDIATE, HEADS = 1536, 4864, 12
# The words of the calibration text are the tokenizer's whole vocabulary.
WORDS = [f"w{number}" for number in range(96)]
SAMPLES, LENGTH = 8, 64


@dataclass(frozen=True)
class MemoryRow:
    """One run. block_bytes: of one block as it computes; peak_bytes: of private memory; planned_bytes: as predicted."""

    blocks: int
    preset: str
    pattern: str
    model_bytes: int
    block_bytes: int
    peak_bytes: int
    planned_bytes: int


def bench_memory(
    blocks: tuple[int, ...], presets: tuple[str, ...], patterns: tuple[str, ...] = ("2:4",)
) -> Iterator[MemoryRow]:
    """One row a model, preset and pattern; needs disk for two float32 models of that many blocks."""
    with tempfile.TemporaryDirectory() as folder:
        for count in blocks:
            model = Path(folder) / f"blocks-{count}"
            block_bytes = write_model_of_equal_blocks(model, count)
            for preset, pattern in itertools.product(presets, patterns):
                report = _run(model, preset, pattern)
                yield MemoryRow(
                    blocks=count,
                    preset=preset,
                    pattern=pattern,
                    model_bytes=sum(path.stat().st_size for path in model.glob("*.safetensors")),
                    block_bytes=block_bytes,
                    peak_bytes=report["peak_private_memory_bytes"],
                    planned_bytes=report["planned_bytes"]["memory"],
                )


def write_model_of_equal_blocks(folder: Path, blocks: int) -> int:
    """A Llama of float32 blocks that are all the same; returns the bytes of one."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        vocab_size=len(WORDS),
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
    )
    state = LlamaForCausalLM(config).state_dict()
    block = {name: tensor for name, tensor in state.items() if ".layers.0." in name}
    files = {"outside.safetensors": {name: tensor for name, tensor in state.items() if name not in block}}
    for index in range(blocks):
        names = {name.replace(".layers.0.", f".layers.{index}."): tensor for name, tensor in block.items()}
        files[f"block-{index}.safetensors"] = names
    for name, tensors in files.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    file_of = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    config.num_hidden_layers, config.architectures, config.dtype = blocks, ["LlamaForCausalLM"], torch.float32
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(WORDS)}, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=WORDS[0], eos_token=WORDS[1]).save_pretrained(folder)
    picks = torch.randint(len(WORDS), (4 * SAMPLES * LENGTH,), generator=torch.Generator().manual_seed(0)).tolist()
    (folder / "calibration.txt").write_text(" ".join(WORDS[pick] for pick in picks))
    return sum(tensor.nbytes for tensor in block.values())


def _run(model: Path, preset: str, pattern: str) -> dict[str, Any]:
    """A whole run in a process of its own, so that the peak is its own."""
    out = model.with_name(f"{model.name}-{preset}")
    words = (
        f"run --model {model} --calib {model / 'calibration.txt'} --eval none --sparsity {pattern} --preset {preset}"
    )
    words += f" --samples {SAMPLES} --seqlen {LENGTH} --activations disk --out {out} --overwrite --quiet --device cpu"
    command = [sys.executable, "-m", "sparsegpt", *words.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SparseGPTError(f"bench memory: the run failed: {done.stderr.strip()}")
    report: dict[str, Any] = json.loads((out / REPORT_NAME).read_text(encoding="utf-8"))
    return report
