"""Fixtures of the kernel tests."""

from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors from `new_empty` start as NaN, or -1 for integers, so that an element nobody writes is seen."""

    def filled(self: Tensor, *size: int | tuple[int, ...], **options: Any) -> Tensor:
        shape = torch.Size(size[0]) if isinstance(size[0], tuple) else size
        poison = float("nan") if options.get("dtype", self.dtype).is_floating_point else -1
        return self.new_full(shape, poison, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", filled)
