"""What a terminal shows while a run goes on."""

import io
import re

from rich.console import Console

from sparsegpt.cli.display import RunDisplay
from sparsegpt.counting import StepReport
from sparsegpt.driver.reports import BlockReport, LayerReport

PART = "scoring the dense model on a[/b].txt"  # no markup


class Terminal:
    """A terminal of a width, and a display on it."""

    def __init__(self, width, **options):
        self.file = io.StringIO()
        console = Console(file=self.file, force_terminal=True, width=width, markup=False, highlight=False)
        self.display = RunDisplay(console, **{"quiet": False, **options})

    def after(self, *reports):
        """What is drawn once these steps are told."""
        for done, seconds in reports:
            self.display.step(StepReport(PART, "windows", done, 4, seconds))
        self.file.truncate(0)
        self.display.progress.refresh()
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.file.getvalue())


def test_a_part_of_the_work_has_a_bar_until_it_is_done():
    terminal = Terminal(120)
    with terminal.display:
        shown = terminal.after((0, 0.0), (1, 9.0), (2, 11.0))
        assert PART in shown
        assert "2/4 windows" in shown
        assert "0:04 left" in shown
        assert PART not in terminal.after((3, 13.0), (4, 15.0))


def test_steps_stand_below_the_blocks_and_go_with_the_next_one():
    terminal = Terminal(160)
    layer = LayerReport("model.layers.0.mlp.up_proj", (4, 4), "2:4", "admm", 0.5, 0.1, 0.01, 100, 0.5)
    with terminal.display:
        terminal.display.block(BlockReport(0, 3, 7, 0.25, 2.0))
        terminal.display.layer(layer)
        shown = terminal.after((0, 0.0), (1, 9.0))
        for said in ("blocks", "1/3", "error 0.2500", "0:04 left", "mlp.up_proj (200 tokens/s)", PART, "1/4"):
            assert said in shown
        terminal.display.block(BlockReport(1, 3, 7, 0.5, 2.0))
        assert PART not in terminal.after()


def test_a_narrow_terminal_and_a_quiet_one_take_it_too():
    terminal = Terminal(20)
    with terminal.display:
        assert terminal.after((0, 0.0), (1, 9.0))
    terminal = Terminal(120, quiet=True)
    with terminal.display:
        assert terminal.after((0, 0.0), (1, 9.0)) == ""
