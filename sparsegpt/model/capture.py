"""Running decoder blocks one at a time and looking at what flows through them.

The only file that knows how a block is called and what it returns. Everything temporary, hooks and stand-ins, lives
in a context manager that takes it away again.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.model.arguments import SharedArguments, tensors_within, to_device, with_own_objects
from sparsegpt.model.decoder import DecoderModel


@dataclass(frozen=True)
class BlockCall:
    """The arguments that the model gives to one block besides the hidden states, for one micro-batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states [batch, sequence, features] -> the block's, whether it returns a tensor, a tuple or a list.

        Raises SparseGPTError when it returns neither.
        """
        args = [to_device(value, hidden.device) for value in self.args]
        kwargs = {name: to_device(value, hidden.device) for name, value in self.kwargs.items()}
        output = block(hidden, *args, **kwargs)
        hidden_states = first_of(output)
        if not isinstance(hidden_states, Tensor):
            raise SparseGPTError(
                f"{type(block).__name__} returned {type(hidden_states).__name__}: expected the hidden states, alone or "
                "first in a tuple"
            )
        return hidden_states


def first_of(output: Any) -> Any:
    """Of what a module returns the first, if it is a tuple or a list."""
    return output[0] if isinstance(output, tuple | list) else output


# Of one micro-batch, for every block.
Calls = tuple[BlockCall, ...]


class ModelInputs:
    """What enters the first block for each micro-batch, and how the model calls each block for it.

    batches: LongTensors [batch, sequence] of tokens. hidden: what they become [batch, sequence, features], on the
    embedding's device. keep(role, step, tensor): may move each of them elsewhere.

    No block runs for this: stand-ins hand the hidden states on, so that rotary tables, masks and per-layer arguments
    (sliding windows, several rotary bases, embeddings of the tokens for one block) are the model's own.
    """

    def __init__(
        self,
        decoder: DecoderModel,
        batches: Sequence[Tensor],
        keep: Callable[[str, int, Tensor], Tensor] = lambda role, step, tensor: tensor,
    ) -> None:
        self.batches = tuple(batches)
        self._decoder = decoder
        self._arguments = SharedArguments()
        # By memory and shape of the tokens: these, and the calls as the model makes them.
        self._recorded: dict[tuple[int, torch.Size], tuple[Tensor, Calls]] = {}
        self._of_stream: dict[tuple[str, int, torch.Size], Calls] = {}
        self.hidden = [keep("pruned", step, self.enter(batch)) for step, batch in enumerate(self.batches)]

    def calls(self, tokens: Tensor, stream: str) -> Calls:
        """How each block is called for tokens [batch, sequence].

        stream: who runs the blocks. What blocks hand on to later blocks through a shared object (keys and values, say)
        stays within one stream.
        """
        key = (tokens.data_ptr(), tokens.shape)
        if (stream, *key) not in self._of_stream:
            if key not in self._recorded:
                self.enter(tokens)
            self._of_stream[stream, *key] = with_own_objects(self._recorded[key][1])
        return self._of_stream[stream, *key]

    def hands_on(self, stream: str) -> bool:
        """Whether blocks that ran in a stream have left tensors for later blocks in an object that they share."""
        return any(
            tensors_within(calls) != tensors_within(self._recorded[memory, shape][1])
            for (of, memory, shape), calls in self._of_stream.items()
            if of == stream
        )

    @torch.no_grad()
    def enter(self, tokens: Tensor) -> Tensor:
        """Tokens [batch, sequence] -> the hidden states that enter the first block."""
        device, blocks = self._decoder.device, self._decoder.blocks
        with stand_ins(blocks) as recorders:
            run_body(self._decoder, tokens)
        hidden = _unchanged(recorders, self._decoder.name)
        key = (tokens.data_ptr(), tokens.shape)
        if key not in self._recorded:
            self._recorded[key] = tokens, self._arguments.share(tuple(recorder.call for recorder in recorders))
        return hidden.to(device)


def run_body(decoder: DecoderModel, tokens: Tensor) -> Any:
    """What the model without its head returns for tokens [batch, sequence].

    Raises SparseGPTError where its own code fails, with these blocks or with what stands in for them.
    """
    try:
        return body_of(decoder.model, decoder.blocks)(**decoder.inputs(tokens))
    except (SparseGPTError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # anything, as it is anybody's code
        raise SparseGPTError(
            f"{decoder.name} cannot be run on tokens alone, block by block ({type(error).__name__}: "
            f"{first_line(error)}): models of this form cannot be pruned"
        ) from error


def body_of(model: nn.Module, blocks: nn.ModuleList) -> nn.Module:
    """The model without its head: what turns tokens into the hidden states after the final norm."""
    body = getattr(model, "base_model", model)
    if body is not model:
        return body
    around = [child for child in model.children() if child is not blocks and any(m is blocks for m in child.modules())]
    return body_of(around[0], blocks) if around else model


class _Handed(Tensor):
    """Hidden states as a stand-in returns them: a tensor, and also the tuple (hidden states, None).

    Some models take a block's output as it is, others its first element; which, no row says. Whatever is computed
    from it is an ordinary tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Any:
        plain = self.as_subclass(Tensor)
        return plain if isinstance(index, int) and index == 0 else plain[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.as_subclass(Tensor), None))


class _Recorder(nn.Module):
    """Stands in for a block: notes its arguments, returns the hidden states as they came or those to replay."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: a stand-in owns no weights
        self.hidden: Tensor | None = None
        self.replay: Tensor | None = None
        self.call = BlockCall((), {})

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = hidden_states.as_subclass(Tensor)
        self.hidden, self.call = hidden.detach(), BlockCall(args, kwargs)
        return (hidden if self.replay is None else self.replay.to(hidden.device)).as_subclass(_Handed)

    def __getattr__(self, name: str) -> Any:
        # Some models read a block's attributes (attention_type, layer_idx) while they loop over the list.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)


def _unchanged(recorders: list[_Recorder], model: str) -> Tensor:
    """What entered the first block; it must also have entered every other one, as each hands on what it got."""
    entered = [recorder.hidden for recorder in recorders]
    if entered[0] is None:
        raise SparseGPTError(f"the first block of {model} was never called: its row in FAMILIES is wrong")
    for index, hidden in enumerate(entered):
        if hidden is None or not (hidden.data_ptr() == entered[0].data_ptr() or torch.equal(hidden, entered[0])):
            raise SparseGPTError(
                f"{model} does more between its blocks {index - 1} and {index} than handing hidden states on: expected "
                "a plain chain of blocks; models of this form cannot be pruned"
            )
    return entered[0]


@contextmanager
def stand_ins(blocks: nn.ModuleList) -> Iterator[list[_Recorder]]:
    """Replace every block by a recorder, and put the blocks back."""
    originals = list(blocks)
    recorders = [_Recorder(block) for block in originals]
    try:
        for index, recorder in enumerate(recorders):
            blocks[index] = recorder
        yield recorders
    finally:
        for index, original in enumerate(originals):
            blocks[index] = original


def shared_inputs(
    block: nn.Module,
    names: Iterable[str],
    call: BlockCall,
    hidden: Tensor,
    *,
    may_rest: Callable[[str], bool] = lambda name: False,
) -> list[tuple[str, ...]]:
    """Group linears by the tensor that they read, in the order in which the block uses them.

    q, k and v come out as one group, because they receive the very same tensor. Raises SparseGPTError for a linear
    that the forward pass never used: its weights would silently stay dense. may_rest(name): whether a linear may
    go unused in this one pass, as an expert to which nothing is sent; those that did are groups of their own, last.
    """
    seen: list[tuple[Tensor, list[str]]] = []

    def note(name: str, inputs: Tensor) -> None:
        for tensor, group in seen:
            if tensor is inputs:
                group.append(name)
                return
        seen.append((inputs, [name]))

    expected = list(names)
    with watch_inputs(block, expected, note):
        call.run(block, hidden)
    groups = [tuple(dict.fromkeys(group)) for _, group in seen]
    used = {name for group in groups for name in group}
    unused = [name for name in expected if name not in used]
    if lost := [name for name in unused if not may_rest(name)]:
        raise SparseGPTError(
            f"no input ever reached {', '.join(lost)}: the block runs it in a way that hooks cannot see"
        )
    return groups + [(name,) for name in unused]


def run_watched(
    block: nn.Module, call: BlockCall, hidden: Tensor, watched: Iterable[str], unused: Iterable[str] = ()
) -> tuple[dict[str, Tensor], Tensor]:
    """One forward pass: the inputs of the watched submodules by name, and the block's output.

    watched: "name" for a submodule's input, "name()" for its output. unused: linears whose products may be skipped;
    with any, the output is meaningless.
    """
    seen: dict[str, Tensor] = {}
    watched = list(watched)
    inputs = [name for name in watched if not name.endswith("()")]
    outputs = [name.removesuffix("()") for name in watched if name.endswith("()")]
    with (
        watch_inputs(block, inputs, seen.__setitem__),
        _watch_outputs(block, outputs, lambda name, tensor: seen.update({f"{name}()": tensor})),
        skip_products(block.get_submodule(name) for name in unused),
    ):
        output = call.run(block, hidden)
    return seen, output


@contextmanager
def watch_inputs(block: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call see(name, input) whenever a submodule of the block is about to run."""

    def hook_for(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args[0] if args else kwargs["hidden_states"])

        return hook

    with _hooks(
        block.get_submodule(name).register_forward_pre_hook(hook_for(name), with_kwargs=True) for name in names
    ):
        yield


@contextmanager
def _watch_outputs(
    block: nn.Module, names: Iterable[str], see: Callable[[str, Any], None], *, first: bool = True
) -> Iterator[None]:
    """Call see(name, output) whenever a submodule of the block has run; of a tuple, with its first element or all."""

    def hook_for(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, first_of(output) if first else output)

    with _hooks(block.get_submodule(name).register_forward_hook(hook_for(name)) for name in names):
        yield


@contextmanager
def _hooks(registered: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks afterwards."""
    handles = list(registered)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skip_products(linears: Iterable[nn.Module]) -> Iterator[None]:
    """Let these linears return zeros at once: for a pass that only looks at what lies before them."""
    muted = list(linears)
    try:
        for linear in muted:
            linear.forward = _zeros_of(int(linear.out_features))  # type: ignore[arg-type]
        yield
    finally:
        for linear in muted:
            del linear.forward


@contextmanager
def remember_outputs(block: nn.Module, names: Iterable[str], memo: dict[str, Any]) -> Iterator[None]:
    """Let finished submodules answer from `memo` instead of computing; those not in it yet run and are noted there.

    For one micro-batch. Right as long as neither the submodule nor anything before it changes between the passes.
    """
    known = [name for name in names if name in memo]
    unknown = [name for name in names if name not in memo]
    with _watch_outputs(block, unknown, memo.__setitem__, first=False):
        try:
            for name in known:
                block.get_submodule(name).forward = _answer(memo[name])
            yield
        finally:
            for name in known:
                del block.get_submodule(name).forward


def _answer(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _zeros_of(out_features: int) -> Callable[[Tensor], Tensor]:
    return lambda inputs: inputs.new_zeros(*inputs.shape[:-1], out_features)
