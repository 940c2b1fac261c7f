"""What a long prune keeps, so that another run can go on from there; by default nothing beyond the model itself."""

from torch import Tensor

from sparsegpt.driver.reports import PruneReport


class Progress:
    """Where finished blocks and finished epochs go, and which were finished before."""

    finished = 0

    def load_bases(self) -> dict[str, Tensor] | None:
        """The bases in which the model was written before; None where nobody has looked for any."""
        return None

    def keep_bases(self, tensors: dict[str, Tensor], report: PruneReport) -> None:
        """Keep the bases in which the model is to be written, which may be none, and what the report says of them."""

    def keep_outside(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep rotated tensors of a module that is in no block; the model goes on with those returned."""
        return tensors

    def load(self, index: int) -> dict[str, Tensor]:
        """The stored tensors of a finished block, by their names inside it."""
        raise LookupError(index)

    def keep(self, index: int, tensors: dict[str, Tensor], report: PruneReport) -> dict[str, Tensor]:
        """Keep the stored tensors of a block that is finished now; the model goes on with those returned."""
        return tensors

    def load_training(self) -> dict[str, Tensor]:
        """What distillation needs to go on after its last finished epoch; empty before the first."""
        return {}

    def keep_training(self, epoch: int, tensors: dict[str, Tensor], report: PruneReport) -> None:
        """Keep that after an epoch, and what the report says of the epochs so far."""

    def keep_distilled(self, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Keep the stored tensors of a block that distillation has changed; the model goes on with those returned."""
        return tensors
