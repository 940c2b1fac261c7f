"""Why a GPU kernel cannot multiply in a dtype on a device: asked before a kernel's module is imported."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

# Why kernels cannot multiply in a dtype on a device, or None.
Refusal = Callable[[torch.device, torch.dtype], str | None]


def refuse_portable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the portable Triton kernels cannot multiply in `dtype` on a device, or None."""
    if device.type not in ("cuda", "xpu"):
        return f"Triton kernels need a GPU; the weight is on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return "bfloat16 in Triton needs compute capability 8.0 (Ampere) or newer; load the model in float16"
    return None


def _gluon_refusal(instruction: str, module: str) -> Refusal:
    """What a module of Gluon kernels says, which is imported only where there is a GPU and Triton."""

    def refuse(device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type != "cuda" or importlib.util.find_spec("triton") is None:
            return f"{instruction} needs an NVIDIA GPU and Triton; the weight is on {device.type}"
        reason: str | None = importlib.import_module(f".{module}", __package__).refuse(device, dtype)
        return reason

    return refuse


refuse_mma_sp = _gluon_refusal("mma.sp", "mma_sp")
refuse_wgmma_sp = _gluon_refusal("wgmma.sp", "wgmma_sp")
