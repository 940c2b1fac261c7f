"""Where a model computes and in what: devices and dtypes by the names that people give them."""

import re

import torch

from sparsegpt.errors import SparseGPTError, did_you_mean, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# What else they are called; "torch." may stand before each name.
ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}
_DEVICES = "expected auto, cpu, cuda or cuda:N"


def parse_dtype(text: str) -> torch.dtype | None:
    """The dtype of this name, or of another name in use for it; None for "auto". Raises SparseGPTError for others."""
    name = text.lower().removeprefix("torch.")
    if name == "auto":
        return None
    if (name := ALIASES.get(name, name)) not in DTYPES:
        raise SparseGPTError(
            f"dtype {text!r} is not known: expected auto, float32 (fp32), float16 (fp16) or bfloat16 (bf16)"
            f"{did_you_mean(text, (*DTYPES, *ALIASES))}",
            settings=("dtype",),
        )
    return DTYPES[name]


def pick_device(device: str) -> torch.device:
    """The device named, or a GPU when there is one for "auto"; SparseGPTError for one that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise _refusal(device, f"is not known: {_DEVICES}{_question(device)}") from error
    if found.type not in ("cpu", "cuda"):
        raise _refusal(device, f"is not supported: {_DEVICES}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise _refusal(device, "was asked for, but torch finds no CUDA device: use cpu, or a torch built for CUDA")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise _refusal(device, f"is not here: torch finds cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return found


def _refusal(device: str, why: str) -> SparseGPTError:
    return SparseGPTError(f"device {device!r} {why}", settings=("device",))


def _question(device: str) -> str:
    """Which device was meant by gpu, gpu:1, CUDA, cuda0 or 0."""
    found = re.match(r"([a-z]*)[^a-z0-9]*(\d*)", device.strip().lower())
    assert found is not None
    word, number = found.groups()
    known = "cuda" if word in ("gpu", "nvidia") or (number and not word) else nearest(word, ("auto", "cpu", "cuda"))
    if known == "cuda" and number:
        known = f"cuda:{number}"
    return f"; did you mean {known}?" if known else ""
