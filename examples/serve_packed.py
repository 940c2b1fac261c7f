"""Serve a packed model behind an OpenAI-compatible endpoint, by transformers' own server.

pip install 'transformers[serving]'
python examples/serve_packed.py pruned/demo-packed --port 8000     # any option of `transformers serve`
curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "pruned/demo-packed", "prompt": "The with statement", "max_tokens": 20}'
"""

import sys

from transformers.cli.transformers import main

import sparsegpt  # noqa: F401  # from here on transformers reads packed folders

sys.argv = ["transformers", "serve", *sys.argv[1:]]
main()
