"""A model written in other bases: the same function, in ordinary weights.

    stream  R [D, D]      who reads it:     W -> W diag(g) R, g the gain of the norm before it
                          who writes it:    W -> R^T W, b -> R^T b; embeddings E -> E R
    values  V [G, F, F]   who makes them:   W -> V^T W, b -> V^T b, for each key-value head
                          who reads them:   W -> W V

Where a norm has a bias b, its readers' biases take W b; where these have none, the norm keeps R^T (b / g).
Dimension key: D width of the stream, G key-value heads, F values of a head, R out_features, C in_features.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.model.unfuse import unfused
from sparsegpt.rotation.rotatable import Rotatable, ValueHeads


@dataclass(frozen=True)
class Bases:
    """Orthonormal bases. stream: [D, D], None to leave it. values: {block: [G, F, F]} for some of the blocks."""

    stream: Tensor | None = None
    values: Mapping[int, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.stream is not None or bool(self.values)

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, as a file holds them."""
        stream = {} if self.stream is None else {"stream": self.stream}
        return stream | {f"values.{index}": basis for index, basis in self.values.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Bases":
        """What `tensors` gave."""
        values = {int(name.removeprefix("values.")): basis for name, basis in tensors.items() if name != "stream"}
        return cls(tensors.get("stream"), values)


@torch.no_grad()
def rotate_block(model: Rotatable, index: int, bases: Bases) -> None:
    """Write one decoder block in these bases, in place.

    Raises SparseGPTError where the model has no such basis.
    """
    model.check(stream=bases.stream is not None, values=index in bases.values)
    block = model.decoder.blocks[index]
    with unfused(block):
        heads = model.value_heads(block)
        if heads is not None and index in bases.values:
            _rotate_values(heads, bases.values[index])
        if bases.stream is not None:
            fold_gains(model, block)
            _rotate_stream(model, block, bases.stream)


@torch.no_grad()
def rotate_entry(module: nn.Module, basis_DD: Tensor) -> None:
    """Write an embedding, or a linear that stands before the blocks, in the stream's basis, in place."""
    if isinstance(module, nn.Embedding):
        _times(module.weight, basis_DD)
    else:
        _rotate_outputs(module, basis_DD)


@torch.no_grad()
def rotate_exit(norm: nn.Module | None, reader: nn.Module, unit: float, basis_DD: Tensor) -> None:
    """Write the norm after the blocks, and the linear that reads it, in the stream's basis, in place.

    unit: what the norm's weight is where it does nothing.
    """
    if norm is not None:
        _fold(norm, [reader], unit)
        _rotate_bias(norm, basis_DD)
    _times(_weight(reader), basis_DD)


@torch.no_grad()
def fold_gains(model: Rotatable, block: nn.Module) -> None:
    """Inside `unfused`: move the gains of a block's norms into the matrices that read them, in place."""
    for norm, readers in model.readers(block):
        _fold(block.get_submodule(norm), list(readers.values()), model.layout.unit)


def _fold(norm: nn.Module, readers: Sequence[nn.Module], unit: float) -> None:
    if not isinstance(norm.weight, Tensor):  # a norm without a gain
        return
    gain_D = norm.weight.data - unit + 1
    bias_D = getattr(norm, "bias", None)
    if isinstance(bias_D, Tensor) and bias_D.any():
        biases = [bias for reader in readers if isinstance(bias := getattr(reader, "bias", None), Tensor)]
        if len(biases) == len(readers):
            for reader, bias in zip(readers, biases, strict=True):
                bias.data += _weight(reader).data @ bias_D.to(_weight(reader))
            bias_D.data.zero_()
        else:
            if (gain_D[bias_D != 0] == 0).any():
                raise SparseGPTError("a norm with a bias has gains of 0: its model's stream cannot be rotated")
            bias_D.data.copy_((bias_D / gain_D).masked_fill(bias_D == 0, 0))
    for reader in readers:
        _weight(reader).data.mul_(gain_D.to(_weight(reader)))
    norm.weight.data.fill_(unit)


def _rotate_stream(model: Rotatable, block: nn.Module, basis_DD: Tensor) -> None:
    for norm, readers in model.readers(block):
        _rotate_bias(block.get_submodule(norm), basis_DD)
        for reader in readers.values():
            _times(_weight(reader), basis_DD)
    for writer in model.writers(block).values():
        _rotate_outputs(writer, basis_DD)


def _rotate_values(heads: ValueHeads, basis_GFF: Tensor) -> None:
    for parameter in (heads.source.weight, getattr(heads.source, "bias", None)):
        if isinstance(parameter, Tensor):
            rows = heads.rows(parameter)
            basis, values = _alike(basis_GFF, rows)
            rows.copy_(torch.einsum("gfe,gf...->ge...", basis, values))
    columns_RGHF = heads.columns()
    basis, columns = _alike(basis_GFF, columns_RGHF)
    columns_RGHF.copy_(torch.einsum("rghf,gfe->rghe", columns, basis))


def _rotate_outputs(linear: nn.Module, basis_DD: Tensor) -> None:
    """W -> R^T W, b -> R^T b."""
    weight_RC = _weight(linear).data
    basis, weight = _alike(basis_DD, weight_RC)
    weight_RC.copy_(basis.T @ weight)
    _rotate_bias(linear, basis_DD)


def _rotate_bias(module: nn.Module, basis_DD: Tensor) -> None:
    if isinstance(getattr(module, "bias", None), Tensor):
        _times(module.bias, basis_DD)  # type: ignore[arg-type]


def _times(parameter: Tensor, basis_DD: Tensor) -> None:
    """[..., D] -> [..., D] @ R, in place."""
    basis, values = _alike(basis_DD, parameter.data)
    parameter.data.copy_(values @ basis)


def _weight(module: nn.Module) -> Tensor:
    assert isinstance(module.weight, Tensor)
    return module.weight


def _alike(basis: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype of the arithmetic, halves in float32, where the values are."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return basis.to(values.device, dtype), values.to(dtype)
