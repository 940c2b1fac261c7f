"""Train the embedded demo model: a small OPT with its own tokenizer, on text that any Python installation carries.

    python -m sparsegpt.calib_data.train_demo --out calib_data/demo --work /tmp/demo_work --minutes 60 --seed 0

Bounded by wall-clock time: the schedule follows the minutes spent, so a slower machine trains on fewer tokens. Stopped
and started again with the same `--work`, it goes on from the last checkpoint. Held-out topics are looked at only for
the figure printed along the way and at the end; nothing is chosen by it.
"""

import argparse
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from .demo_text import DemoText, gather_text
from .pydoc_topics import held_out_topics

END_OF_TEXT, PADDING = "</s>", "<pad>"  # ids 0 and 1; the first also begins every document, as OPT's does
LAYERS, HIDDEN, HEADS, FEED_FORWARD = 6, 256, 4, 1024

# Share of the windows taken from topics, standard library and packages, at the start and at the end of the training:
# the genre of the evaluation gains weight while the learning rate falls.
SHARES_AT_START, SHARES_AT_END = (0.04, 0.24, 0.72), (0.12, 0.44, 0.44)

SECONDS_BETWEEN_CHECKPOINTS = 120


@dataclass(frozen=True)
class Settings:
    """What the command line sets."""

    out: Path
    work: Path
    minutes: float
    seed: int = 0
    vocabulary: int = 3584
    context: int = 512
    batch: int = 8
    learning_rate: float = 2e-3
    warm_up: int = 200  # steps
    weight_decay: float = 0.1
    threads: int = os.cpu_count() or 1


@dataclass
class Progress:
    """How far a training has come; kept in the checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Gather text, train tokenizer and model, save both, print the held-out figures."""
    settings = parse_arguments(arguments)
    settings.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    tokenizer, streams = prepare(settings)
    model = build_model(settings)
    log(f"{model.num_parameters():,} parameters; tokens in each group: {[len(stream) for stream in streams]}")
    progress = train(model, streams, settings, lambda: bits_per_byte(model, tokenizer, settings.context))
    save(model, tokenizer, settings)
    log(f"{progress.tokens:,} tokens in {progress.seconds / 60:.1f} minutes")
    log(json.dumps(bits_per_byte(model, tokenizer, settings.context)))
    print(sample(model, tokenizer, "The statement"))


def parse_arguments(arguments: Sequence[str] | None) -> Settings:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description="Train the embedded demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished model")
    parser.add_argument("--work", type=Path, help="folder of text, tokenizer and checkpoint (default: OUT-work)")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock length of the training")
    for name in ("seed", "vocabulary", "context", "batch", "warm_up", "threads"):
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(Settings, name))
    for name in ("learning_rate", "weight_decay"):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=getattr(Settings, name))
    given = vars(parser.parse_args(arguments))
    work = given.pop("work") or given["out"].with_name(given["out"].name + "-work")
    return Settings(work=work, **given)


def prepare(settings: Settings) -> tuple[Any, list[torch.Tensor]]:
    """Tokenizer and one token stream, LongTensor [tokens], a group; those that an earlier start left, where it did."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder, streams_file = settings.work / "tokenizer", settings.work / "streams.pt"
    if streams_file.exists():
        return AutoTokenizer.from_pretrained(folder), torch.load(streams_file)
    text = gather_text()
    log(f"characters in each group: {[sum(map(len, group)) for group in text.groups]}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_tokenizer(text, settings.vocabulary),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=settings.context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    streams = [token_stream(tokenizer, group) for group in text.groups]
    torch.save(streams, streams_file)
    return tokenizer, streams


def train_tokenizer(text: DemoText, vocabulary: int) -> Any:
    """Byte-level BPE with the full alphabet of 256 bytes, so that no text is unknown to it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    weighted = [*text.topics * 8, *text.standard_library * 2, *text.packages[::8]]  # roughly a third of each
    tokenizer.train_from_iterator(weighted, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A {END_OF_TEXT} $B",
        special_tokens=[(END_OF_TEXT, 0)],
    )
    return tokenizer


def token_stream(tokenizer: Any, documents: Sequence[str]) -> torch.Tensor:
    """All documents one after the other, each begun by the end-of-text token: LongTensor [tokens]."""
    encoded = tokenizer.backend_tokenizer.encode_batch(list(documents))
    return torch.cat([torch.tensor(document.ids) for document in encoded])


def build_model(settings: Settings) -> Any:
    """A freshly initialised OPT in float32."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=settings.vocabulary,
        hidden_size=HIDDEN,
        word_embed_proj_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        ffn_dim=FEED_FORWARD,
        max_position_embeddings=settings.context,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    return OPTForCausalLM(config)


def train(model: Any, streams: Sequence[torch.Tensor], settings: Settings, evaluate: Callable[[], object]) -> Progress:
    """Train on streams [tokens] until the minutes are over; now and then a checkpoint and the held-out figure."""
    optimizer = build_optimizer(model, settings)
    checkpoint = settings.work / "checkpoint.pt"
    progress = load_checkpoint(checkpoint, model, optimizer)
    generator = torch.Generator().manual_seed(settings.seed + progress.step)
    losses: list[float] = []
    started, last_saved = time.monotonic() - progress.seconds, progress.seconds
    while (spent := progress.seconds / (60 * settings.minutes)) < 1:
        if progress.step % 20 == 0:
            torch.set_num_threads(free_cores(settings.threads))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(progress.step, spent, settings.warm_up)
        windows = draw_batch(streams, shares(spent), *batch_shape(spent, settings), generator)
        losses.append(step(model, optimizer, windows))
        progress.step += 1
        progress.tokens += windows[:, 1:].numel()
        progress.seconds = time.monotonic() - started
        if progress.step % 100 == 0:
            log(f"step {progress.step} {spent:.0%} loss {sum(losses) / len(losses):.3f} tokens {progress.tokens:,}")
            losses.clear()
        if progress.step % 1000 == 0:
            log(f"held out: {evaluate()}")
        if progress.seconds - last_saved > SECONDS_BETWEEN_CHECKPOINTS:
            save_checkpoint(checkpoint, model, optimizer, progress)
            last_saved = progress.seconds
    save_checkpoint(checkpoint, model, optimizer, progress)
    return progress


def free_cores(threads: int) -> int:
    """How many of `threads` the machine has free for this process, by its load of the last minute; at least one.

    Threads that share a core with another program wait for one another: on two cores with one of them taken, two
    threads were measured 3.5 times slower than one.
    """
    others = os.getloadavg()[0] - torch.get_num_threads()
    return max(1, min(threads, round((os.cpu_count() or 1) - others)))


def build_optimizer(model: Any, settings: Settings) -> torch.optim.Optimizer:
    """AdamW; matrices decay, biases and norms do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)


def schedule(step: int, spent: float, warm_up: int) -> float:
    """Share of the peak learning rate: linear warm-up by steps, cosine by the share of time spent, down to 2%."""
    cosine = 0.02 + 0.98 * (1 + math.cos(math.pi * spent)) / 2
    return min(1.0, (step + 1) / warm_up) * cosine


def shares(spent: float) -> torch.Tensor:
    """Probability of each group, [groups], at this share of the training time."""
    return torch.lerp(torch.tensor(SHARES_AT_START), torch.tensor(SHARES_AT_END), spent)


def batch_shape(spent: float, settings: Settings) -> tuple[int, int]:
    """Windows and tokens a window: half the context, for attention costs less, until half of the time is spent."""
    divisor = 2 if spent < 0.5 else 1
    return settings.batch * divisor, settings.context // divisor


def draw_batch(
    streams: Sequence[torch.Tensor], probabilities: torch.Tensor, batch: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Streams [tokens] -> windows from random starts in randomly chosen groups: LongTensor [batch, length + 1]."""
    groups = torch.multinomial(probabilities, batch, replacement=True, generator=generator).tolist()
    starts = torch.rand(batch, generator=generator).tolist()
    windows = []
    for group, share in zip(groups, starts, strict=True):
        start = int(share * (len(streams[group]) - length))
        windows.append(streams[group][start : start + length + 1])
    return torch.stack(windows)


def step(model: Any, optimizer: torch.optim.Optimizer, windows: torch.Tensor) -> float:
    """[batch, length + 1] -> loss in nats: one AdamW step on next-token cross-entropy, matrix products in bfloat16."""
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    loss = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def load_checkpoint(path: Path, model: Any, optimizer: torch.optim.Optimizer) -> Progress:
    """Put an earlier state back, if there is one."""
    if not path.exists():
        return Progress()
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return Progress(**state["progress"])


def save_checkpoint(path: Path, model: Any, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
    """Write the state beside the old one, then swap: a stop in between loses nothing."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": vars(progress)}
    unfinished = path.with_suffix(".unfinished")
    torch.save(state, unfinished)
    unfinished.replace(path)


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, context: int) -> dict[str, float]:
    """Held-out topics joined by blank lines, non-overlapping windows, float32: bits per byte, perplexity per token."""
    text = "\n\n".join(held_out_topics().values())
    tokens = torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
    model.eval()
    nats, predicted = 0.0, 0
    for window in torch.split(tokens, context):
        logits = model(input_ids=window[None, :], use_cache=False).logits[0].float()
        nats += functional.cross_entropy(logits[:-1], window[1:], reduction="sum").item()
        predicted += len(window) - 1
    mean = nats / predicted
    bits = mean * len(tokens) / math.log(2)  # the first token of each window is charged the mean
    return {
        "bits_per_byte": bits / len(text.encode()),
        "perplexity": math.exp(mean),
        "tokens": len(tokens),
        "bytes": len(text.encode()),
    }


def save(model: Any, tokenizer: Any, settings: Settings) -> None:
    """Hugging Face folder with float16 weights; the model goes on in float32, rounded as it was saved."""
    model.half().save_pretrained(settings.out)
    tokenizer.save_pretrained(settings.out)
    model.float()
    log(f"weights sha256 {hashlib.sha256((settings.out / 'model.safetensors').read_bytes()).hexdigest()}")


def sample(model: Any, tokenizer: Any, prompt: str, length: int = 120) -> str:
    """A paragraph drawn from the model at temperature 0.7."""
    ids = torch.tensor([tokenizer.backend_tokenizer.encode(prompt).ids])
    longest = model.config.max_position_embeddings - ids.shape[1]
    drawn = model.generate(ids, max_new_tokens=min(length, longest), do_sample=True, temperature=0.7, top_k=50)
    return str(tokenizer.decode(drawn[0], skip_special_tokens=True))


def log(line: str) -> None:
    """One line with the time of day."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    main()
