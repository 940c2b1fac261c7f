"""What the commands share: option types, the console, quiet libraries."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

Model = Annotated[str, typer.Option(help="Hub id, folder, short name such as opt-1.3b, or the embedded demo.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str, typer.Option(help="auto, float32, float16 or bfloat16; auto is float32 on a CPU, else the file's.")
]
Length = Annotated[
    int | None, typer.Option("--seqlen", min=2, help="Tokens a window; default min(2048, the model's limit).")
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Windows scored in one forward pass.")]
EvalWindows = Annotated[
    int | None, typer.Option(min=1, help="Score at most so many windows of each text; default the published number.")
]
BosChoice = Annotated[
    str, typer.Option(help="Beginning-of-sequence token before each scored window: auto, always, never.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there, once the new is whole.")]
KERNEL_NAMES = "auto, dense, resident, cpu, portable, mma_sp, wgmma_sp, cutlass or cusparselt"
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but warnings and errors.")]

TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model. Only if you trust it.")
]


def typed_command() -> str | None:
    """The command line as typed, fit for a shell; None when a program that is not ours calls the commands."""
    called = Path(sys.argv[0]).name
    if called == "__main__.py":
        return shlex.join(["python", "-m", "sparsegpt", *sys.argv[1:]])
    return shlex.join(["sparsegpt", *sys.argv[1:]]) if Path(called).stem == "sparsegpt" else None


def open_console() -> Console:
    """Colours and bars on a terminal; plain, unwrapped lines anywhere else."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160, no_color=True)


def silence_libraries() -> None:
    """Progress bars and advice of transformers would break the display; its errors still come through."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
