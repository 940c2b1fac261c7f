"""`python -m sparsegpt report`, `compare` and `push`: runs for people to look at, side by side, and for all to have."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsegpt.cli.console import open_console, say, silence_hub
from sparsegpt.cli.options import AsJson, Overwrite, Revision, TrustRemoteCode, at_home, folder_of
from sparsegpt.errors import SparseGPTError


def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, or their report.json files.")],
    out: Annotated[Path, typer.Option(help="The page to write.", callback=at_home)] = Path("report.html"),
    overwrite: Overwrite = False,
) -> None:
    """Write a page about one run or many: one HTML file that works without a network."""
    from sparsegpt.eval.report.page import page, write_page
    from sparsegpt.eval.report.reading import read_runs

    runs, skipped = read_runs(list(map(at_home, folders)))
    for line in skipped:
        say(f"skipped: {line}")
    write_page(out, page(runs, tuple(f"skipped: {line}" for line in skipped)), overwrite=overwrite)
    print(f"wrote {out}: {len(runs)} run{'s' if len(runs) > 1 else ''}")


def compare(
    models: Annotated[list[str], typer.Argument(help="Two or more model folders or Hub ids; the first is compared.")],
    masks: Annotated[
        bool, typer.Option("--masks/--no-masks", help="Read the weights, and say where their zeros differ.")
    ] = True,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexities, zeros and bytes of models side by side, and in which layers the zeros of each differ."""
    from sparsegpt.cli.comparison import print_comparison
    from sparsegpt.eval.report.differences import compare_folders

    if len(models) < 2:
        raise SparseGPTError(f"one model was given, {models[0]}: give two or more to compare")
    folders = [folder_of(model, revision) for model in models]
    found = compare_folders(dict(zip(models, folders, strict=True)), masks=masks, trust_remote_code=trust_remote_code)
    for line in found.notes:
        say(line)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        print_comparison(open_console(), found)


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
