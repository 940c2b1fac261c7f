"""What a run will need, from shapes alone: memory, GPU memory and disk, before a single weight is read.

Every figure is a sum of named parts. Coefficients that no shape gives (copies that a solver makes) are measured;
BENCHMARKS.md compares the predictions with measured peaks. Letters: h hidden size, C the inputs and R the outputs of a
linear, N calibration tokens, T tokens of one forward pass.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from sparsegpt.calib_data.own_text import documents_at_once
from sparsegpt.driver.rotating import wanted_bases
from sparsegpt.driver.windows import TOKENS_PER_STEP
from sparsegpt.errors import SparseGPTError
from sparsegpt.model.decoder import DecoderModel
from sparsegpt.model.loading import without_weights
from sparsegpt.recovery.training import HELD_OUT, TOKENS_PER_BATCH
from sparsegpt.rotation.rotatable import Rotatable
from sparsegpt.rotation.search import BLOCKS, LINES
from sparsegpt.run.memory import available_memory, readable
from sparsegpt.settings.prune_settings import CORRECTIONS, PruneSettings
from sparsegpt.solvers.hessian import GRAM_BLOCK
from sparsegpt.solvers.methods import Copies, parse_method
from sparsegpt.solvers.products import PIECE, PIECE_ON_GPU
from sparsegpt.strips import strips

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Python, torch and transformers, the tokenizer and its text, and what the allocator keeps.
LIBRARIES = 400 << 20
CUDA_CONTEXT = 600 << 20
# A GPU's library copies what it inverts, and weights in halves become float32; not measured yet.
MORE_ON_GPU = (1.0, 1.0)
# While targets are corrected: Hessian and drift, then the factor in its place; each linear's target waits for its turn.
# While a pass gathers: the Hessian, and with corrections the drift.
CORRECTION_COPIES, GATHERED, GATHERED_FOR_CORRECTION = Copies(2.3, 1.0, 3), 1, 2
# While weights are rounded: the Hessian, its damped and its scaled copy; what a descent keeps of every weight.
ROUNDING_COPIES = Copies(4.0, 11.0)
# Copies of a token's hidden state, and of its widest input, while a block computes and while it is trained.
FORWARD_COPIES, TRAINING_COPIES = (8, 4), (24, 8)
# Parameters in float32, gradients, two moments, the best state so far.
TRAINED_COPIES = 5
# Distillation: of the block at work its weights, those of the training and its gradients; of a weight, its value and
# two moments in float32; epochs on disk while a new one is written; logits of both models and the gradient.
DISTILLED_COPIES, DISTILLED_BYTES, KEPT_EPOCHS, LOGIT_COPIES = 3, 12, 2, 3
# A GPU takes larger micro-batches, as many tokens as fit in this share of its free memory, at most so many.
MICRO_BATCH_SHARE, MICRO_BATCH_TOKENS = 0.25, 16384
# What `--activations disk` puts into files of the scratch folder.
SCRATCH_PARTS = ("activations", "weights in training")
# Large models whose plans the README shows; no weights are needed for a plan.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "opt-175b": (
        "opt",
        {
            "hidden_size": 12288,
            "word_embed_proj_dim": 12288,
            "ffn_dim": 49152,
            "num_hidden_layers": 96,
            "num_attention_heads": 96,
            "dtype": torch.float16,
        },
    ),
    "llama-3-405b": (
        "llama",
        {
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 126,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "dtype": torch.bfloat16,
        },
    ),
}


class SharedInput(NamedTuple):
    """Inputs C, outputs R of the widest linear, how many linears read them, and how many experts have such inputs."""

    inputs: int
    outputs: int
    linears: int
    experts: int = 1


@dataclass(frozen=True)
class ModelShape:
    """What a plan must know of a model. groups: one for each input that linears share."""

    blocks: int
    block_parameters: int
    outside_parameters: int
    hidden: int
    vocabulary: int
    groups: tuple[SharedInput, ...]
    residual_projections: int
    stored: torch.dtype
    rotatable: Rotatable

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return self.blocks * self.block_parameters + self.outside_parameters


@dataclass(frozen=True)
class Workload:
    """How much is calibrated and where; gpu_memory: bytes of the GPU that computes, None for the CPU.

    packed: windows hold several documents, and each has a mask of its own. writes: the model writes the text itself.
    ranks: how many processes share the windows.
    """

    samples: int
    sequence_length: int
    computing: torch.dtype
    gpu_memory: int | None = None
    activations: str = "memory"
    micro_batch: int | None = None
    scored: bool = True
    packed: bool = False
    writes: bool = False
    ranks: int = 1

    @property
    def windows(self) -> int:
        """Calibration windows of one rank, at most."""
        return math.ceil(self.samples / self.ranks)


@dataclass(frozen=True)
class Plan:
    """Bytes of one rank at the peak, each with its parts by name. micro_batch: windows of one forward pass.

    traffic: bytes that a rank sends to the others in the whole run; empty where it has none.
    """

    memory: dict[str, int]
    gpu: dict[str, int]
    disk: dict[str, int]
    micro_batch: int
    traffic: dict[str, int] = field(default_factory=dict)

    def total(self, kind: str) -> int:
        """Sum of the parts of "memory", "gpu", "disk" or "traffic"."""
        parts: dict[str, int] = getattr(self, kind)
        return sum(parts.values())

    def totals(self) -> dict[str, int]:
        """What there must be room for."""
        return {kind: self.total(kind) for kind in ("memory", "gpu", "disk")}


def shape_of(config: "PretrainedConfig", stored: torch.dtype, *, trust_remote_code: bool = False) -> ModelShape:
    """The shape of a model from its configuration, without its weights, which are stored as `stored`."""
    decoder = DecoderModel.of(without_weights(config, trust_remote_code=trust_remote_code))
    model, blocks, residuals = decoder.model, decoder.blocks, decoder.family.residuals
    largest = max(blocks, key=_parameters)
    groups = [tuple(_groups(block, frozenset(residuals))) for block in blocks]
    return ModelShape(
        blocks=len(blocks),
        block_parameters=_parameters(largest),
        outside_parameters=_parameters(model) - sum(_parameters(block) for block in blocks),
        hidden=config.get_text_config().hidden_size,
        vocabulary=config.get_text_config().vocab_size,
        groups=max(groups, key=lambda found: sum(group.inputs**2 for group in found)),
        residual_projections=len(residuals),
        stored=stored,
        rotatable=Rotatable(decoder),
    )


def published_config(name: str) -> "PretrainedConfig":
    """The configuration of a model in PUBLISHED."""
    from transformers import AutoConfig

    model_type, sizes = PUBLISHED[name]
    config: PretrainedConfig = AutoConfig.for_model(model_type, **sizes)
    return config


def plan(shape: ModelShape, settings: PruneSettings, work: Workload) -> Plan:
    """What pruning a model of this shape needs."""
    width = work.computing.itemsize
    on_gpu = work.gpu_memory is not None
    block = shape.block_parameters * width
    rotation, outside, added = _rotation_bytes(shape, settings, width)
    solve, gathered = _solve_bytes(shape, settings, on_gpu=on_gpu), _gathered_bytes(shape, settings)
    batch = min(work.windows, work.micro_batch or _micro_batch(shape, work, block + max(solve, gathered)))
    tokens = batch * work.sequence_length
    widest = max(group.inputs for group in shape.groups)
    forward = tokens * width * (FORWARD_COPIES[0] * shape.hidden + FORWARD_COPIES[1] * widest)
    training = _training_bytes(shape, settings, work, widest)
    compute = {"one block": block, "work on it": max(solve, gathered + forward, training, rotation)}
    streams = _activation_bytes(shape, settings, work)
    memory = {"libraries": LIBRARIES}
    disk = {
        "finished blocks": shape.blocks * shape.block_parameters * shape.stored.itemsize,
        "result": shape.parameters * shape.stored.itemsize + added,
        **({"rotated embedding and head": outside} if outside else {}),
    }
    gpu: dict[str, int] = {}
    if on_gpu:
        gpu = {"CUDA": CUDA_CONTEXT, **compute}
    else:
        memory |= compute
        if work.scored:
            scoring = TOKENS_PER_STEP * (FORWARD_COPIES[0] * shape.hidden + FORWARD_COPIES[1] * widest) * width
            head = shape.vocabulary * shape.hidden * width
            logits = max(TOKENS_PER_STEP, work.sequence_length) * shape.vocabulary * width
            memory["work on it"] = max(memory["work on it"], scoring + head + logits)
    if work.writes:
        computer = gpu if on_gpu else memory
        computer["work on it"] = max(computer["work on it"], _writing_bytes(shape, work))
    if work.packed:
        memory["masks of packed windows"] = work.samples * work.sequence_length**2
    (disk if work.activations == "disk" else memory)["activations"] = streams
    if settings.distill:
        trained = shape.blocks * shape.block_parameters
        (disk if work.activations == "disk" else memory)["weights in training"] = DISTILLED_BYTES * trained
        disk["epochs of distillation"] = KEPT_EPOCHS * DISTILLED_BYTES * trained
        disk["distilled blocks"] = trained * shape.stored.itemsize
    return Plan(memory, gpu, disk, batch, _traffic(shape, settings, work))


def check_fits(planned: Plan, gpu_memory: int | None, out: Path, scratch: Path, ranks: int = 1) -> None:
    """Refuse a run that this machine cannot hold, so many ranks together, naming the switch that would make it fit."""
    if gpu_memory is not None and planned.total("gpu") > gpu_memory:
        raise SparseGPTError(
            f"the run needs {readable(planned.total('gpu'))} of GPU memory and {readable(gpu_memory)} are free: "
            "give a smaller --micro-batch, --preset paper, or --device cpu"
        )
    without = " or --distill 0" if "epochs of distillation" in planned.disk else ""
    free = available_memory()
    if free is not None and ranks * planned.total("memory") > free:
        saved = sum(planned.memory.get(part, 0) for part in SCRATCH_PARTS)
        way_out = "--activations disk" if ranks * (planned.total("memory") - saved) < free else "fewer --samples"
        raise SparseGPTError(
            f"the run needs {readable(ranks * planned.total('memory'))} of memory and {readable(free)} are available: "
            f"give {way_out}{without}"
        )
    kept = ("finished blocks", "rotated embedding and head", "epochs of distillation", "distilled blocks", "result")
    for folder, parts in ((out, kept), (scratch, SCRATCH_PARTS)):
        needed = sum(planned.disk.get(part, 0) for part in parts)
        there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        left = shutil.disk_usage(there).free
        if needed > left:
            switch = "--scratch" if parts == SCRATCH_PARTS else "--out"
            raise SparseGPTError(
                f"the run needs {readable(needed)} of disk in {there} and {readable(left)} are free: "
                f"give another {switch}{without}"
            )


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _groups(block: nn.Module, own_input: frozenset[str]) -> Iterator[SharedInput]:
    """Each shared input: a projection into the residual stream has its own, siblings of one width share."""
    shared: dict[tuple[str, int], list[int]] = defaultdict(list)
    experts: dict[tuple[str, int], int] = {}
    for name, parameter in block.named_parameters():
        if parameter.ndim < 2:
            continue
        outputs, inputs = sorted(parameter.shape[-2:]) if parameter.ndim == 3 else parameter.shape
        linear, _, _ = name.rpartition(".")
        reader = linear if linear in own_input else linear.rpartition(".")[0]
        shared[reader, inputs].append(outputs)
        experts[reader, inputs] = len(parameter) if parameter.ndim == 3 else 1
    for (reader, inputs), found in shared.items():
        yield SharedInput(inputs, max(found), len(found), experts[reader, inputs])


def _solve_bytes(shape: ModelShape, settings: PruneSettings, *, on_gpu: bool) -> int:
    """Of the hungriest group; in the published order the Hessians of the others wait meanwhile."""
    worst = max(_group_elements(group, settings, on_gpu=on_gpu) for group in shape.groups)
    widths = [group.inputs**2 for group in shape.groups]
    return math.ceil(4 * (worst + (sum(widths) - max(widths) if settings.order == "block" else 0)))


def _group_elements(group: SharedInput, settings: PruneSettings, *, on_gpu: bool) -> float:
    """What the solver holds at its worst moment; the factor stays for those that share it."""
    square, layer = group.inputs**2, group.inputs * group.outputs
    piece = min(layer, PIECE_ON_GPU if on_gpu else PIECE)
    moments = [copies for method in settings.values_of("method") for copies in parse_method(method).copies]
    rounds = settings.values_of("quantize") != {None}
    if rounds:
        moments.append(ROUNDING_COPIES)
    targets = 0
    if _corrects(settings):
        moments.append(CORRECTION_COPIES)
        targets = group.linears
    worst = max(squares * square + layers * layer + pieces * piece for squares, layers, pieces in moments)
    more_squares, more_layers = MORE_ON_GPU if on_gpu else (0.0, 0.0)
    kept_factor = 1 if rounds or group.linears > 1 else 0
    return worst + (more_squares + kept_factor) * square + (more_layers + targets) * layer


def _training_bytes(shape: ModelShape, settings: PruneSettings, work: Workload, widest: int) -> int:
    """What a step of either training holds besides the block's weights, whichever is more."""
    tokens = max(TOKENS_PER_BATCH, work.sequence_length)
    a_token = TRAINING_COPIES[0] * shape.hidden + TRAINING_COPIES[1] * widest
    needed = [0]
    if settings.reconstruct:
        parameters = (TRAINED_COPIES + settings.look_ahead) * shape.block_parameters
        needed.append(4 * (parameters + tokens * (1 + settings.look_ahead) * a_token))
    if settings.distill:
        between = tokens * (shape.blocks + 1) * shape.hidden
        in_block = DISTILLED_COPIES * shape.block_parameters + tokens * a_token
        head = shape.vocabulary * shape.hidden + LOGIT_COPIES * tokens * shape.vocabulary
        needed.append(4 * (between + max(in_block, head)))
    return max(needed)


def _rotation_bytes(shape: ModelShape, settings: PruneSettings, width: int) -> tuple[int, int, int]:
    """(memory to look for bases and to turn what is outside of the blocks, its file, what a head of its own adds)."""
    model = shape.rotatable
    wanted = wanted_bases(model, settings.rotate)
    if not wanted:
        return 0, 0, 0
    lines = sum(group.linears * min(LINES, group.outputs) for group in shape.groups)
    held = 4 * min(BLOCKS, shape.blocks) * shape.hidden * (2 * shape.hidden + lines) if wanted.stream else 0
    outside = shape.outside_parameters + (model.head_parameters if wanted.stream and model.unties else 0)
    turned = width * outside if wanted.stream else 0
    added = model.head_parameters * shape.stored.itemsize if wanted.stream and model.unties else 0
    looking = held + 4 * 4 * shape.hidden**2
    return max(looking, turned), outside * shape.stored.itemsize if wanted.stream else 0, added


def _gathered_bytes(shape: ModelShape, settings: PruneSettings) -> int:
    """What a pass sums up for the widest group, or for all of them in the published order."""
    copies = GATHERED_FOR_CORRECTION if _corrects(settings) else GATHERED
    widths = [group.inputs**2 for group in shape.groups]
    return 4 * copies * (sum(widths) if settings.order == "block" else max(widths))


def _traffic(shape: ModelShape, settings: PruneSettings, work: Workload) -> dict[str, int]:
    """What a rank sends: twice a sum's bytes when it is all-reduced in a ring, once those of what is passed on.

    The share (W - 1) / W of it, for W ranks. A Hessian goes as its upper half, by blocks of columns.
    """
    corrects, streams = _corrects(settings), max(settings.values_of("residual_correction")) > 0
    sums = 0
    for inputs, outputs, linears, experts in shape.groups:
        halves = sum(block.stop * (block.stop - block.start) for block in strips(inputs, GRAM_BLOCK))
        drift = inputs**2 if corrects and experts == 1 else 0
        stream = inputs * outputs if streams and linears == 1 and outputs == shape.hidden else 0
        sums += 4 * (experts * halves + drift + stream)
    a_step = work.ranks * max(1, TOKENS_PER_BATCH // work.sequence_length // work.ranks)
    steps = math.ceil((1 - HELD_OUT) * work.samples / a_step)
    gradients = 4 * shape.block_parameters * steps * (settings.reconstruct + settings.distill)
    sent = {"sums": 2 * sums, "solved weights": shape.block_parameters * work.computing.itemsize}
    sent["gradients"] = 2 * gradients
    others = work.ranks - 1
    return {name: shape.blocks * count * others // work.ranks for name, count in sent.items() if count * others}


def _corrects(settings: PruneSettings) -> bool:
    return any(max(settings.values_of(share)) > 0 for share in CORRECTIONS)


def _activation_bytes(shape: ModelShape, settings: PruneSettings, work: Workload) -> int:
    """Both streams and the one ahead, dense inputs that corrections compare, outputs that are not computed twice."""
    features = shape.hidden
    if settings.needs_dense_stream:
        features += shape.hidden
    if settings.reconstruct and settings.look_ahead:
        features += shape.hidden
    if _corrects(settings):
        features += sum(group.inputs for group in shape.groups)
    if max(settings.values_of("residual_correction")) > 0:
        features += shape.residual_projections * shape.hidden
    if settings.order != "block" and work.activations == "memory":
        features += shape.hidden
    return work.windows * work.sequence_length * features * work.computing.itemsize


def _writing_bytes(shape: ModelShape, work: Workload) -> int:
    """Keys and values of what the model writes, as wide as its hidden states at most, and logits of one step."""
    documents = documents_at_once(work.samples, work.sequence_length)
    kept = 2 * shape.blocks * shape.hidden * work.sequence_length
    return documents * work.computing.itemsize * (kept + LOGIT_COPIES * shape.vocabulary)


def _micro_batch(shape: ModelShape, work: Workload, taken: int) -> int:
    """Windows of one forward pass: about TOKENS_PER_STEP tokens, on a GPU as many as its memory takes."""
    tokens = TOKENS_PER_STEP
    if work.gpu_memory is not None:
        widest = max(group.inputs for group in shape.groups)
        a_token = work.computing.itemsize * (FORWARD_COPIES[0] * shape.hidden + FORWARD_COPIES[1] * widest)
        tokens = min(MICRO_BATCH_TOKENS, int(MICRO_BATCH_SHARE * max(0, work.gpu_memory - taken)) // a_token)
    return max(1, tokens // work.sequence_length)
