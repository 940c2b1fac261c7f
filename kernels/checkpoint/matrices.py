"""The weight matrices of an ordinary checkpoint: in which tensor each lies, and which pruned layer it belongs to.

A tensor <module>.weight [N, K] is one matrix; a Conv1D keeps it as [K, N]. Of experts a checkpoint keeps

    <...>.<expert>.<part>.weight [N, K]      the gate and up projections apart (Mixtral, Qwen MoE, OLMoE, DeepSeek), or
    <...>.<part> [E, N, K] or [E, K, N]      all in one tensor (GPT-OSS, Llama 4)

while report.json speaks of the linears that were pruned, by the names of the loaded model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sparsegpt.errors import SparseGPTError
from sparsegpt.files.model_files import CONFIG, read_config
from sparsegpt.files.tensor_files import OpenTensors
from sparsegpt.kernels.checkpoint.model_names import Bank, Destination, ModelNames
from sparsegpt.model.experts import is_conv1d
from sparsegpt.model.loading import load_config, without_weights

# Weights of these model types are stored transposed, [in, out] (transformers' Conv1D): their groups run down columns.
TRANSPOSED_MODEL_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_NOT_LINEAR = re.compile(r"(^|\.)(\w*embed\w*|wte|wpe|shared|lm_head|embed_out|\w*norm\w*|ln_\w+)\.weight$")
_OF_EXPERTS = re.compile(r"(^|\.)\w*experts\.")
_EXPERT_NUMBER = re.compile(r"(?<=\.)\d+(?=\.\w+$)")


@dataclass(frozen=True)
class Matrix:
    """One weight matrix.

    name: its linear's, as checkpoints name it. group: the same with a * for the expert's number. layer: what
    report.json calls the pruned layer that it is, or is a part of. tensor, expert: where it lies. transposed: it lies
    there as [K, N]. bank: the experts' projection it belongs to. linear: whether a linear layer is multiplied by it.
    """

    name: str
    layer: str
    tensor: str
    expert: int | None = None
    transposed: bool = False
    bank: Bank | None = None
    linear: bool = True

    @property
    def group(self) -> str:
        """The name under which all experts of a bank are listed together."""
        return self.name if self.bank is None else _EXPERT_NUMBER.sub("*", self.name)

    def read(self, tensors: OpenTensors) -> Tensor:
        """The dense weight [N, K]."""
        weight = tensors[self.tensor] if self.expert is None else tensors.row(self.tensor, self.expert)
        return weight.T if self.transposed else weight


def checkpoint_matrices(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    layers: Iterable[str] = (),
    *,
    trust_remote_code: bool = False,
) -> list[Matrix]:
    """Every weight matrix among the tensors {name: shape} of a folder.

    layers: names that report.json uses. transformers is asked what the model calls a tensor only where names may not
    say: experts, other 3-D weights, a layer of no tensor's name. trust_remote_code: for that, run code of the folder.
    Raises SparseGPTError when it does not know a model with experts or such layers.
    """
    plain = list(plain_matrices(folder, shapes))
    needed = any(map(_OF_EXPERTS.search, shapes)) or not {matrix.name for matrix in plain}.issuperset(layers)
    if not needed and all(len(shape) != 3 for shape in shapes.values()):
        return plain
    try:
        config = load_config(str(folder.absolute()), trust_remote_code=trust_remote_code)
        names = ModelNames(without_weights(config, as_saved=True, trust_remote_code=trust_remote_code))
    except SparseGPTError:
        if needed:
            raise
        return plain
    return [
        matrix for tensor, shape in shapes.items() for matrix in _of_tensor(names.destination(tensor), tensor, shape)
    ]


def plain_matrices(folder: Path, shapes: Mapping[str, Sequence[int]]) -> Iterator[Matrix]:
    """The matrices of modules of their own, from names alone."""
    transposed = _model_type(folder) in TRANSPOSED_MODEL_TYPES
    for tensor, shape in shapes.items():
        if _is_weight(tensor, shape):
            linear, name = not _NOT_LINEAR.search(tensor), tensor.removesuffix(".weight")
            yield Matrix(name, name, tensor, transposed=transposed and linear, linear=linear)


def _of_tensor(target: Destination | None, tensor: str, shape: Sequence[int]) -> Iterator[Matrix]:
    """The matrices in one tensor, given what it becomes in the model."""
    name = tensor.removesuffix(".weight")
    bank = target.bank if target else None
    if bank is not None and bank.stacked:
        path, _, part = tensor.rpartition(".")
        for expert in range(shape[0]):
            layer = f"{bank.experts}.{expert}.{bank.projection}"
            yield Matrix(f"{path}.{expert}.{part}", layer, tensor, expert, bank.transposed, bank)
    elif bank is not None:
        number = _EXPERT_NUMBER.search(name)
        assert number is not None
        yield Matrix(name, f"{bank.experts}.{number[0]}.{bank.projection}", tensor, bank=bank)
    elif _is_weight(tensor, shape):
        module = target.module if target else None
        transposed = module is not None and is_conv1d(module)
        linear = (transposed or isinstance(module, nn.Linear)) and not _NOT_LINEAR.search(tensor)
        layer = target.parameter.removesuffix(".weight") if target else name
        yield Matrix(name, layer, tensor, transposed=transposed, linear=linear)


def _is_weight(tensor: str, shape: Sequence[int]) -> bool:
    return len(shape) == 2 and tensor.endswith(".weight")


def _model_type(folder: Path) -> str:
    return str(read_config(folder).get("model_type")) if (folder / CONFIG).is_file() else ""
