"""`python -m sparsegpt generate`: what anyone does first with a pruned model."""

import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from sparsegpt.cli.console import say, silence_libraries
from sparsegpt.cli.model_commands import Kernels, use_kernels
from sparsegpt.cli.options import AsJson, Device, Dtype, Model, Revision, TrustRemoteCode
from sparsegpt.settings.option import Group

TEXT = Group.MODEL


def generate(
    prompt: Annotated[
        str, typer.Option(help="What the model goes on from; - reads it from stdin.", rich_help_panel=TEXT)
    ],
    model: Model = "demo",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write at most.", rich_help_panel=TEXT)] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; 1 draws as the model says.", rich_help_panel=TEXT)
    ] = 0,
    top_p: Annotated[
        float | None,
        typer.Option(
            min=0.01, max=1, help="Draw among the likeliest tokens that have this share.", rich_help_panel=TEXT
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Draws the tokens.", rich_help_panel=TEXT)] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt through the chat template.", rich_help_panel=TEXT)
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    kernels: Kernels = None,
    as_json: AsJson = False,
) -> None:
    """Let a model write, dense, pruned or packed: the text as it comes, then how fast it came, on stderr."""
    from sparsegpt.eval.generation import Drawing, write
    from sparsegpt.model import loading
    from sparsegpt.run.planning import check_scoring

    silence_libraries()
    drawing = Drawing(temperature, top_p, seed)
    check_scoring((), kernels=kernels, bos="auto", dtype=dtype, device=device)
    loading.check_model(model, revision)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = loading.load_model(
        model, dtype=dtype, device=device, revision=revision, trust_remote_code=trust_remote_code
    )
    chosen = use_kernels(loaded.model, kernels) if kernels is not None else None

    def show(piece: str) -> None:
        if not as_json:
            print(piece, end="", flush=True)

    with loaded.source.files.meanwhile():
        found = write(loaded.model, loaded.tokenizer, text, new_tokens, show, drawing=drawing, chat=chat)
    if as_json:
        print(json.dumps({**asdict(found), "tokens_per_second": found.tokens_per_second, "kernels": chosen}))
        return
    print()
    speed = f", then {found.tokens_per_second:.1f} tokens/s" if found.tokens_per_second else ""
    say(
        f"{found.tokens} tokens: the first after {found.first_seconds:.2f} s{speed}" + (f"; {chosen}" if chosen else "")
    )
