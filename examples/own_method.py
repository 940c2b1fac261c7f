"""Prune with a method of your own: a function from a weight and its Hessian to a saliency.

python examples/own_method.py [MODEL]
"""

import sys

from sparsegpt import Method, prune_model
from sparsegpt.calib_data import draw_windows, load_text
from sparsegpt.model.loading import load_model


def by_energy(weight, hessian):
    """[R, C], DampedHessian -> saliency [R, C]: each weight's share of the energy of its row's output."""
    energy = weight.square() * hessian.raw.diagonal()
    return energy / energy.sum(dim=1, keepdim=True).clamp_min(1e-12)


method = Method("energy", saliency=by_energy)
loaded = load_model(sys.argv[1] if len(sys.argv) > 1 else "demo")
windows = draw_windows(load_text("pydoc", "calibration"), loaded.tokenizer, 8, 64, seed=0).windows
report = prune_model(loaded.model, windows, "2:4", preset="paper", method=method)
for layer in sorted(report.layers, key=lambda layer: layer.relative_error)[-3:]:
    print(f"{layer.name}: relative error {layer.relative_error:.3f}")
