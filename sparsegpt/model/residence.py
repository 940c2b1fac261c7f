"""Weights at home and weights at work.

A model's parameters stay where they were loaded, usually as pages of the checkpoint's files. A module that computes
gets private copies on the computing device in the computing dtype, and gives them up when it is done. So a model of
any size runs with the memory of its largest block.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparsegpt.files.unchanged import Unchanged
from sparsegpt.model.decoder import DecoderModel


@dataclass
class Residence:
    """Where a model computes.

    device, dtype: of the copies; None for the device where each parameter is. stored: the dtype of the parameters at
    home that are computed in `dtype`; others keep their own, except those of `working`: {parameter: the dtype that it
    is computed in}. reversible: remember the tensors that settled ones replace, which costs nothing where they are
    mapped from files. files: those whose pages the parameters at home may be; each read of them looks whether they are
    as they were, and is a SparseGPTError where they are not.
    """

    device: torch.device | None
    dtype: torch.dtype
    stored: torch.dtype
    reversible: bool = False
    working: Mapping[Tensor, torch.dtype] = field(default_factory=dict)
    files: Unchanged = field(default_factory=Unchanged)
    # The tensors at home of every parameter that is at work now; those that a settled one had before; nested visits.
    _home: dict[Tensor, Tensor] = field(default_factory=dict)
    _originals: dict[Tensor, Tensor] = field(default_factory=dict)
    _visits: list[list[Tensor]] = field(default_factory=list)
    # What is done to a module each time it comes to work, until it is settled.
    _arrivals: dict[nn.Module, Callable[[], None]] = field(default_factory=dict)
    # What came to work by being called and stays until `staying` ends; None outside of it.
    _held: list[Tensor] | None = None

    @contextmanager
    def visit(self, module: nn.Module) -> Iterator[None]:
        """Private copies of the module's parameters for this long; whatever is done to them is gone afterwards.

        May be nested: the outermost visit counts.
        """
        brought: list[Tensor] = []
        try:
            self._bring(module, brought)
            yield
        finally:
            self._send_home(brought)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """What comes to work by being called (`attach`) stays for this long: gradients go back through its weights."""
        self._held = []
        try:
            yield
        finally:
            held, self._held = self._held, None
            self._send_home(held)

    def settle(self, parameter: nn.Parameter, tensor: Tensor) -> None:
        """Give a parameter a new tensor at home; a copy that is at work takes its values."""
        home = self._home.get(parameter, parameter.data)
        if self.reversible:
            self._originals.setdefault(parameter, home)
        if parameter in self._home:
            self._home[parameter] = tensor.to(home.device)
            parameter.data.copy_(tensor)
        else:
            parameter.data = tensor.to(home.device)

    def settle_all(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        """`settle` every parameter of a module, by its name inside it; nothing more is done to it on arrival."""
        for name, parameter in module.named_parameters():
            self.settle(parameter, tensors[name])
        self._arrivals.pop(module, None)

    def on_arrival(self, module: nn.Module, change: Callable[[], None]) -> None:
        """From now on change the copies of a module's parameters each time it comes to work, until it is settled."""
        self._arrivals[module] = change

    def unsettle(self) -> None:
        """Put back everything that was ever settled: the dense model again."""
        self._arrivals.clear()
        self._send_home(list(self._home))
        for parameter, tensor in self._originals.items():
            parameter.data = tensor
        self._originals.clear()
        self._visits.clear()

    def as_stored(self, values: Tensor, place: Tensor) -> Tensor:
        """New values of a parameter, or of a part of it, in the dtype in which it is stored.

        place: the parameter, or any view of its memory.
        """
        home = self._home_of(place)
        usual = self.stored if values.dtype == self.dtype else values.dtype
        return values.to(usual if home is None else home.dtype)

    def to_store(self, module: nn.Module) -> dict[str, Tensor]:
        """The module's tensors as they are now, each parameter in the dtype that it has at home."""
        tensors = module.state_dict(keep_vars=True)
        return {name: tensor.detach().to(self._home.get(tensor, tensor).dtype) for name, tensor in tensors.items()}

    def attach(self, decoder: DecoderModel, *, keep: bool = False) -> None:
        """From now on every block, and every module outside of them, is at work while its forward runs.

        The input embedding brings the rows of the tokens that it is asked for, not its table. keep: what came to work
        once stays there, for a device with room for the whole model.
        """
        model = decoder.model
        inside = {id(module) for block in decoder.blocks for module in block.modules()}
        outside = [
            module
            for module in model.modules()
            if id(module) not in inside and any(parameter is not None for parameter in module._parameters.values())
        ]
        embedding = decoder.embedding
        for module in [*decoder.blocks, *outside]:
            by_rows = module is embedding and not keep
            if by_rows:
                module.register_forward_pre_hook(self._arrive_by_rows, with_kwargs=True)
            else:
                module.register_forward_pre_hook(self._arrive)
            if not keep:
                module.register_forward_hook(self._leave if by_rows else self._leave_or_stay, always_call=True)
        for module in model.modules():  # small, and some are in no checkpoint: they move for good
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def _arrive(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._visits.append([])  # first: the hook that takes it runs even when bringing fails
        self._bring(module, self._visits[-1])

    def _arrive_by_rows(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Only the rows of the tokens asked for, which are renumbered to match."""
        table = module.weight
        assert isinstance(table, nn.Parameter)
        self._visits.append([])
        if table in self._home:  # all of it is at work, in a visit around this call
            return None
        name, tokens = ("", args[0]) if args else next(iter(kwargs.items()))
        self._visits[-1].append(table)
        self._home[table] = table.data
        module.__dict__["padding_idx"] = None  # matters to gradients alone, and would point outside of the few rows
        wanted, rows = tokens.to(table.device).unique(return_inverse=True)
        with self.files.meanwhile():
            table.data = table.data[wanted].to(self.device, self._working_dtype(table))
        rows = rows.to(self.device)
        return (args, {**kwargs, name: rows}) if name else ((rows, *args[1:]), kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._send_home(self._visits.pop())

    def _leave_or_stay(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._held is None:
            self._leave(module, args, output)
        else:
            self._held += self._visits.pop()

    def _bring(self, module: nn.Module, brought: list[Tensor]) -> None:
        """Copy to work what is at home, and note it in `brought`, one parameter at a time."""
        parameters = list(module.parameters())
        arriving = [parameter for parameter in parameters if parameter not in self._home]
        with self.files.meanwhile():
            for parameter in arriving:
                self._home[parameter] = parameter.data
                brought.append(parameter)
                dtype = self._working_dtype(parameter)
                parameter.data = parameter.data.to(self.device or parameter.device, dtype, copy=True)
        if module in self._arrivals and len(arriving) == len(parameters):  # not views of what is at work already
            self._arrivals[module]()
            for parameter in arriving:  # as they would come from a file
                parameter.data.copy_(parameter.data.to(self._home[parameter].dtype))

    def _home_of(self, place: Tensor) -> Tensor | None:
        """The tensor at home of a parameter, or of the parameter at work that it shows a part of; None if unknown."""
        if place in self._home or place in self.working:
            return self._home.get(place, place)
        memory = _memory(place)
        return next((home for parameter, home in self._home.items() if _memory(parameter) == memory), None)

    def _working_dtype(self, parameter: Tensor) -> torch.dtype:
        usual = self.dtype if parameter.dtype == self.stored else parameter.dtype
        return self.working.get(parameter, usual)

    def _send_home(self, parameters: list[Tensor]) -> None:
        for parameter in parameters:
            parameter.data = self._home.pop(parameter)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
