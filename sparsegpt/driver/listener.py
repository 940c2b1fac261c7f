"""Who is told what happens during a prune; by default nobody."""

from sparsegpt.driver.reports import BlockReport, EpochReport, LayerReport, RotationReport


class Listener:
    """Override what you want to hear: this one listens in silence."""

    def rotated(self, report: RotationReport) -> None:
        """The model is written in bases in which less is dropped; none where its own are best."""

    def layer(self, report: LayerReport) -> None:
        """One linear is pruned."""

    def block(self, report: BlockReport) -> None:
        """One decoder block is finished."""

    def epoch(self, report: EpochReport) -> None:
        """One epoch of distillation is finished."""
