"""A bar for notebooks and scripts, by tqdm: `prune_model(model, windows, "2:4", listener=Bars())`."""

from typing import Any

from sparsegpt.counting import StepReport
from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, Listener
from sparsegpt.listeners.time_left import StepsLeft, TimeLeft, in_words


class Bars(Listener):
    """A bar over blocks that names the linear at work, the error so far and the time left; then one over epochs.

    A training has a bar of its own over its steps, which goes when it is done.
    tqdm.auto draws it as a widget in Jupyter, and as a line of text anywhere else. options: of tqdm, such as file=...
    """

    def __init__(self, **options: Any) -> None:
        self._options = {"bar_format": "{desc}{bar} {n_fmt}/{total_fmt} [{elapsed}{postfix}]", **options}
        self._bar: Any = None
        self._steps: Any = None
        self._left, self._steps_left = TimeLeft(), StepsLeft()

    def layer(self, report: LayerReport) -> None:
        """Name the linear that was pruned, and its error."""
        if self._bar is not None:
            self._bar.set_description(f"{report.name} {report.relative_error:.4f}")

    def block(self, report: BlockReport) -> None:
        """Move the bar on; it ends with the last block."""
        self._end_steps()
        bar = self._opened(report.blocks, report.index)
        left = in_words(self._left.after(report))
        bar.set_postfix_str(f"error {report.relative_error:.4f}, {left} left", refresh=False)
        self._move(report.index + 1)

    def epoch(self, report: EpochReport) -> None:
        """The same for distillation; epoch 0 is the model before it."""
        bar = self._opened(report.epochs, 0)
        bar.set_postfix_str(f"divergence {report.loss:.4f}", refresh=False)
        self._move(report.epoch)

    def step(self, report: StepReport) -> None:
        """Move the bar of the part of the work that is at hand."""
        left = self._steps_left.after(report)
        if left is None:
            self._end_steps()
            self._steps = self._new(report.total, report.done, desc=report.part, leave=False)
        else:
            self._steps.set_postfix_str(f"{in_words(left)} left", refresh=False)
        self._steps.update(report.done - self._steps.n)
        if report.done == report.total:
            self._end_steps()

    def _end_steps(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None

    def _opened(self, total: int, first: int) -> Any:
        if self._bar is None:
            self._bar = self._new(total, first)
        return self._bar

    def _new(self, total: int, first: int, **options: Any) -> Any:
        from tqdm.auto import tqdm

        return tqdm(total=total, initial=first, **{**self._options, **options})

    def _move(self, place: int) -> None:
        self._bar.update(place - self._bar.n)
        if place == self._bar.total:
            self._bar.close()
            self._bar = None
