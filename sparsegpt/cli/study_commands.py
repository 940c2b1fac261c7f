"""`python -m sparsegpt study ...`: ideas that train sparse, beside pruning at once; what was trained before is kept."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

from sparsegpt.cli.bench_options import check_figure
from sparsegpt.cli.console import open_console, silence_libraries
from sparsegpt.cli.options import Command, at_home

study = typer.Typer(
    help="Ideas that train sparse, beside pruning at once, on a model that trains here.", no_args_is_help=True
)

Size = Annotated[str, typer.Option(help="Of the language model: tiny, small, base (1.06M parameters) or demo.")]
Steps = Annotated[int, typer.Option(min=1, help="Of one training.")]
Seeds = Annotated[int, typer.Option(min=1, help="So many, from 0. A later call may ask for more.")]
Out = Annotated[Path, typer.Option(help="Folder of trainings, study.json and the picture.", callback=at_home)]


@study.command("ticket", cls=Command)
def study_ticket(size: Size = "base", steps: Steps = 100, seeds: Seeds = 3, out: Out = Path("studies/ticket")) -> None:
    """The lottery ticket: train, prune, rewind, train again, beside masks by chance and pruning at once."""
    from sparsegpt.eval.studies import ticket

    _do("ticket", ticket, size, steps, seeds, out)


@study.command("day-one", cls=Command)
def study_day_one(
    size: Size = "base", steps: Steps = 240, seeds: Seeds = 3, out: Out = Path("studies/day-one")
) -> None:
    """Sparse from the first step, by SR-STE and RigL, beside pruning a dense training at once."""
    from sparsegpt.eval.studies import day_one

    _do("day-one", day_one, size, steps, seeds, out)


@study.command("game", cls=Command)
def study_game(size: Size = "base", steps: Steps = 1565, seeds: Seeds = 3, out: Out = Path("studies/game")) -> None:
    """Pruning as a game, as its paper writes it: hidden units of a classifier and of a language model are players."""
    from sparsegpt.eval.studies import game

    _do("game", game, size, steps, seeds, out)


def _do(name: str, module: ModuleType, size: str, steps: int, seeds: int, out: Path) -> None:
    """Trainings, tables, picture."""
    from sparsegpt.eval.studies.record import Plan, Record, draw
    from sparsegpt.eval.studies.training import check_size

    check_size(size)
    check_figure(out / "study.png")
    silence_libraries()
    console = open_console()
    with Record.opened(out, Plan(name, size, steps), lambda line: print(line, file=sys.stderr)) as record:
        record.finish(module.run(record, seeds))
        for table in module.tables(record, seeds):
            console.print(table)
        drawn = draw(record.rows, module.PANELS, out / "study.png")
    spent = f"{record.total('seconds'):.0f} s of training, {record.total('cpu_seconds'):.0f} s of them on processors"
    print(f"{spent}; drawn: {', '.join(map(str, drawn))}", file=sys.stderr)
