"""What decides a result besides the settings: the model to its last bit, and the versions and machine that compute."""

import functools
import hashlib
import importlib.metadata
import json
import platform
from dataclasses import asdict
from typing import Any

import torch

from sparsegpt.model.loading import LoadedModel
from sparsegpt.run.options import RunOptions
from sparsegpt.settings.prune_settings import PruneSettings
from sparsegpt.solvers.products import QUICK_WIDTH, quick_dtype

# Options that may be each rank's own.
OF_ONE_RANK = ("device", "scratch")
PACKAGES = ("sparsegpt", "torch", "transformers", "datasets", "safetensors")
# Those of them that compute: another version may end with other bits.
COMPUTING = ("sparsegpt", "torch", "transformers")
version = functools.cache(importlib.metadata.version)


def versions() -> dict[str, str]:
    """Of Python and of the packages that a report names."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def surroundings() -> dict[str, str]:
    """What decides the last bits besides a run's inputs: versions that compute, threads, instructions, products."""
    found = {name: version(name) for name in COMPUTING}
    found |= {"threads": str(torch.get_num_threads()), "instructions": torch.backends.cpu.get_cpu_capability()}
    return found | {"products": str(quick_dtype(torch.eye(QUICK_WIDTH))).removeprefix("torch.")}


def facts(options: RunOptions, settings: PruneSettings) -> dict[str, Any]:
    """What must be the same on every rank of a run before anything is loaded."""
    told = {name: value for name, value in asdict(options).items() if name not in OF_ONE_RANK}
    return {
        **versions(),
        **surroundings(),
        **told,
        **settings.as_dict(),
        "recipe": "; ".join(map(str, settings.recipe)),
    }


def fingerprint(loaded: LoadedModel) -> str:
    """sha256 over every bit of the weights, the configuration, and code that came with the model."""
    model = loaded.model
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps([loaded.content, config], sort_keys=True, default=str).encode())
    for path in sorted(loaded.source.folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
