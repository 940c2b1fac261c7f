"""Reports of runs that never were, as `run` writes them."""

from pathlib import Path
from typing import Any

from sparsegpt.files.checked_json import write_checked

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def report(blocks: int = 3, **changes: Any) -> dict[str, Any]:
    """Of a model of so many blocks; errors grow with the block's number, the last kind's most."""
    layers = [
        {
            "name": f"model.layers.{block}.{kind}",
            "shape": [64, 32],
            "sparsity": "2:4",
            "method": "admm",
            "zeros": 0.5,
            "relative_error": 0.001 * (block + 1) * (place + 1),
            "damping": 0.01,
            "tokens": 512,
            "seconds": 0.5,
            "grid": None,
            "bits": None,
        }
        for block in range(blocks)
        for place, kind in enumerate(KINDS)
    ]
    found = {
        "report_version": 1,
        "model": "tiny",
        "preset": "fast",
        "command": "sparsegpt run --model tiny",
        "sparsity": "2:4",
        "method": "admm",
        "settings": {"sparsity": "2:4", "damping": None, "distill": 2},
        "layers": layers,
        "blocks": [
            {"index": n, "relative_error": 0.01 * (n + 1), "reconstruction": 0.5, "losses": [0.4, 0.3, 0.2]}
            for n in range(blocks)
        ],
        "epochs": [{"epoch": n, "epochs": 2, "loss": 0.1 / (n + 1)} for n in range(3)],
        "parameters": {"total": 2 * blocks * len(KINDS) * 64 * 32, "left_dense_by_choice": [], "not_prunable": []},
        "calibration": {"source": "pydoc", "samples": 8, "sequence_length": 64, "seed": 0},
        "seed": 0,
        "perplexity": {"held-out": {"dense": 10.0, "pruned": 12.5}},
        "tasks": {"arc_easy": {"acc": {"dense": {"value": 0.5, "stderr": 0.0158}, "pruned": {"value": 0.46875}}}},
        "samples": [{"data": "held-out", "opening": "Once", "text": "upon", "dense": "more", "pruned": "less"}],
        "seconds": {"load": 1.0, "capture": 20.0, "solve": 40.0, "total": 65.0},
        "peak_memory_bytes": 1 << 30,
        "peak_bytes_by_phase": {"load": 1 << 28, "prune": 1 << 29},
        "stored_dtype": "float16",
        "warnings": ["a warning of this run"],
        "versions": {"sparsegpt": "0.1.0"},
    }
    return {**found, **changes}


def folder(place: Path, **changes: Any) -> Path:
    """A folder with such a report."""
    place.mkdir(parents=True)
    write_checked(place / "report.json", report(**changes))
    return place
