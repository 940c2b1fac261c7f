"""`python -m sparsegpt push`: a result to the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from sparsegpt.cli.console import silence_hub
from sparsegpt.cli.options import at_home


def push(
    folder: Annotated[Path, typer.Argument(help="The model folder to upload.", callback=at_home)],
    repository: Annotated[str, typer.Argument(help="Where to, as ORG/NAME.")],
    public: Annotated[
        bool, typer.Option("--public", help="If the repository must be made, for all to see.", show_default="private")
    ] = False,
    branch: Annotated[
        str | None, typer.Option(help="Branch to write to, made if it is not there.", show_default="main")
    ] = None,
) -> None:
    """Upload a model folder with its card to the Hub, in one commit."""
    from sparsegpt.run.push import check_push, push_folder

    silence_hub()
    check_push(repository)
    print(f"pushed {folder} to {push_folder(folder, repository, public=public, branch=branch)}")
