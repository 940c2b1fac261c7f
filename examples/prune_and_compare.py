"""Prune one model with three methods and compare what each costs.

python examples/prune_and_compare.py [MODEL]
"""

import sys

from sparsegpt import perplexity, prune_model
from sparsegpt.calib_data import draw_windows, evaluation_tokens, load_text
from sparsegpt.model.loading import load_model

LENGTH = 64
name = sys.argv[1] if len(sys.argv) > 1 else "demo"
loaded = load_model(name)
windows = draw_windows(load_text("pydoc", "calibration"), loaded.tokenizer, 8, LENGTH, seed=0).windows
held_out, _ = evaluation_tokens(load_text("pydoc", "evaluation"), loaded.tokenizer)
held_out = held_out[: 32 * LENGTH]

print(f"{'dense':12} perplexity {perplexity(loaded.model, held_out, LENGTH):8.2f}")
for method in ("magnitude", "wanda", "sparsegpt"):
    model = load_model(name).model
    report = prune_model(model, windows, "2:4", preset="paper", method=method)
    error = sum(layer.relative_error for layer in report.layers) / len(report.layers)
    print(f"{method:12} perplexity {perplexity(model, held_out, LENGTH):8.2f}, mean layer error {error:.3f}")
