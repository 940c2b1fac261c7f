"""Calibrate on conversations and short documents, each a window of its own, and on text of the model's own.

python examples/own_calibration.py [MODEL]
"""

import json
import sys
import tempfile
from pathlib import Path

from sparsegpt import prune_model
from sparsegpt.calib_data import draw_mixture, load_texts
from sparsegpt.model.loading import load_model

loaded = load_model(sys.argv[1] if len(sys.argv) > 1 else "demo")
with tempfile.TemporaryDirectory() as folder:
    pairs = Path(folder) / "pairs.jsonl"
    rows = [{"prompt": f"What does {word} do?", "completion": f" It ends a {word}."} for word in ("break", "return")]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    texts = load_texts(f"pydoc=2,{pairs}=1,self=1", "calibration")
    drawn = draw_mixture(texts, loaded.tokenizer, 8, 64, seed=0, documents="single", model=loaded.model)

print(f"{len(drawn.rows)} windows of {min(map(len, drawn.rows))} to {max(map(len, drawn.rows))} tokens: {drawn.source}")
report = prune_model(loaded.model, drawn.windows, "2:4", preset="paper")
print(f"{1 - report.density:.0%} zeros, {len(report.warnings)} warnings")
