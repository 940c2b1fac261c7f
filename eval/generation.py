"""Text that a model writes: streamed to a reader, or a few words after openings of a text, for a report."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsegpt.calib_data import TextSource, bos_token
from sparsegpt.calib_data.windows import encode
from sparsegpt.errors import SparseGPTError, first_line
from sparsegpt.model.decoder import evaluating, position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of an opening, openings in all, and of at most so many texts.
OPENING, OPENINGS, TEXTS = 24, 3, 3
# Letters of a text that surely hold a token.
LETTERS = 16
# The likeliest token each time; what a model's own settings say of drawing would only be a contradiction.
_LIKELIEST = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Sample:
    """An opening from a text, how the text goes on, and how models do: {"dense": ..., "pruned": ...}."""

    data: str
    opening: str
    text: str
    written: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, str]:
        """A row of "samples" in report.json."""
        return {"data": self.data, "opening": self.opening, "text": self.text, **self.written}


@dataclass(frozen=True)
class Openings:
    """Openings of a text: tokens [openings, length], each with a beginning-of-sequence token where one is needed.

    new_tokens: to be written after each. samples: what is known of them so far.
    """

    tokens: Tensor
    new_tokens: int
    samples: tuple[Sample, ...]

    def continued(self, model: "PreTrainedModel", tokenizer: Any, which: str) -> "Openings":
        """The same with what a model writes. Raises SparseGPTError where it cannot write."""
        found = greedy(model, self.tokens, self.new_tokens, _padding(tokenizer))
        texts = [_after(row, self.tokens.shape[1], tokenizer) for row in found]
        pairs = zip(self.samples, texts, strict=True)
        return replace(self, samples=tuple(replace(one, written={**one.written, which: text}) for one, text in pairs))


def openings_of(
    sources: dict[str, TextSource], tokenizer: Any, model_type: str, sequence_length: int, new_tokens: int, bos: str
) -> list[Openings]:
    """A few openings from each of a few texts, spread evenly; shorter where windows are short. None of short texts.

    sequence_length: an opening and what is written after it have at most so many tokens. bos: as for `score_text`.
    """
    opening = min(OPENING, sequence_length // 2)
    new_tokens = min(new_tokens, sequence_length - opening)
    first = bos_token(tokenizer, model_type, bos)
    found = []
    for data, source in list(sources.items())[:TEXTS]:
        pieces = _pieces(source.text, max(1, OPENINGS // len(sources)), LETTERS * (opening + new_tokens))
        rows = [tokens[: opening + new_tokens] for tokens in (encode(piece, tokenizer) for piece in pieces)]
        rows = [row for row in rows if len(row) == opening + new_tokens]
        if not rows or new_tokens < 1:
            continue
        begun = torch.stack(rows)[:, :opening]
        if first is not None:
            begun = torch.cat([begun.new_full((len(rows), 1), first), begun], dim=1)
        known = [Sample(data, *_decoded(row, opening, tokenizer)) for row in rows]
        found.append(Openings(begun, new_tokens, tuple(known)))
    return found


def _pieces(text: str, count: int, letters: int) -> list[str]:
    """So many pieces of a text, spread evenly, each from the beginning of a line on, or of a word."""
    places = [len(text) * place // count for place in range(count)]
    starts = [_next(text, place) if place else 0 for place in places]
    return [text[start : start + letters] for start in starts]


def _next(text: str, place: int) -> int:
    """Where a line begins after this place, else a word, else the place itself."""
    found = (text.find(end, place) + 1 for end in ("\n", " "))
    return next((start for start in found if start), place)


def greedy(model: "PreTrainedModel", tokens: Tensor, new_tokens: int, padding: int) -> Tensor:
    """Tokens [batch, length] -> [batch, length + at most new_tokens], the likeliest each time, then padding.

    Raises SparseGPTError for whatever a model or transformers refuses.
    """
    return _generated(model, tokens, {**_LIKELIEST, "max_new_tokens": new_tokens, "pad_token_id": padding})


def _generated(model: "PreTrainedModel", tokens: Tensor, settings: dict[str, Any]) -> Tensor:
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    with evaluating(model), torch.no_grad():
        try:
            found: Tensor = model.generate(tokens, attention_mask=torch.ones_like(tokens), **settings)
        except SparseGPTError:
            raise
        except Exception as error:  # of any type, as models bring their own code for it
            raise SparseGPTError(f"this model cannot write text: {first_line(error)}") from error
    return found


@dataclass(frozen=True)
class Drawing:
    """How tokens are chosen: the likeliest at temperature 0, else drawn among the likeliest of mass top_p."""

    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("top_p", "seed") if getattr(self, name) is not None]
        if not self.temperature and given:
            raise SparseGPTError(
                f"{given[0]} is for drawing tokens, and at temperature 0 the likeliest is taken: give a temperature",
                settings=("temperature", *given),
            )

    def settings(self) -> dict[str, Any]:
        """For transformers."""
        if not self.temperature:
            return _LIKELIEST
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p or 1.0, "top_k": 0}


@dataclass(frozen=True)
class Written:
    """What a model wrote: new tokens; seconds to the first, and of all after it."""

    text: str
    prompt_tokens: int
    tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of those after the first, which waits for the prompt; None where there is no other."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 and self.seconds > 0 else None


def write(
    model: "PreTrainedModel",
    tokenizer: Any,
    prompt: str,
    new_tokens: int,
    tell: Callable[[str], None],
    *,
    drawing: Drawing | None = None,
    chat: bool = False,
) -> Written:
    """Let a model go on after a prompt; `tell` gets the text piece by piece, the prompt first unless it is a chat.

    chat: put the prompt through the tokenizer's chat template, as what a user says. Raises SparseGPTError for prompts
    without tokens or longer than the model, templates that are not there or fail, and models that cannot write.
    """
    from transformers import TextStreamer

    drawing = drawing or Drawing()
    tokens = prompt_tokens(tokenizer, prompt, chat=chat)
    _check_length(model, tokens.shape[1], new_tokens)
    pieces: list[str] = []

    def hear(text: str, stream_end: bool = False) -> None:
        pieces.append(text)
        tell(text)

    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True)
    streamer.on_finalized_text = hear
    watch = _Watch(streamer)
    if drawing.seed is not None:
        torch.manual_seed(drawing.seed)
    settings = {**drawing.settings(), "max_new_tokens": new_tokens, "pad_token_id": _padding(tokenizer)}
    _generated(model, tokens, {**settings, "streamer": watch})
    start, first, *rest = watch.moments
    return Written("".join(pieces), tokens.shape[1], 1 + len(rest), first - start, rest[-1] - first if rest else 0.0)


def prompt_tokens(tokenizer: Any, prompt: str, *, chat: bool) -> Tensor:
    """A prompt -> tokens [1, length], as the tokenizer begins a text. Raises SparseGPTError as `write`."""
    if not chat:
        tokens = tokenizer(prompt, return_tensors="pt")["input_ids"]
    elif getattr(tokenizer, "chat_template", None) is None:
        raise SparseGPTError("the model's tokenizer has no chat template: give a plain prompt", settings=("chat",))
    else:
        messages = [{"role": "user", "content": prompt}]
        try:
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of its own
            raise SparseGPTError(
                f"the model's chat template fails: {first_line(error)}; give a plain prompt", settings=("chat",)
            ) from error
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if not tokens.shape[1]:
        raise SparseGPTError("the prompt has no tokens: give some text to begin with", settings=("prompt",))
    found: Tensor = tokens.long()
    return found


class _Watch:
    """Passes tokens on to a streamer, and notes when they come; the first are the prompt's."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.moments = streamer, list[float]()

    def put(self, tokens: Tensor) -> None:
        self.moments.append(time.perf_counter())
        self.streamer.put(tokens)

    def end(self) -> None:
        self.streamer.end()


def _check_length(model: "PreTrainedModel", prompt: int, new_tokens: int) -> None:
    limit = position_limit(model.config)
    if limit is not None and prompt + new_tokens > limit:
        raise SparseGPTError(
            f"a prompt of {prompt} tokens and {new_tokens} new ones are more than the {limit} positions of the model: "
            "shorten the prompt or ask for fewer",
            settings=("prompt", "new_tokens"),
        )


def _padding(tokenizer: Any) -> int:
    """Any token will do: rows are cut where the model ended them."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in known if token is not None)


def _decoded(tokens: Tensor, opening: int, tokenizer: Any) -> tuple[str, str]:
    """The text of the first tokens, and how it goes on."""
    begin = tokenizer.decode(tokens[:opening], skip_special_tokens=True)
    return begin, _after(tokens, opening, tokenizer)


def _after(tokens: Tensor, opening: int, tokenizer: Any) -> str:
    """The text of the tokens after the first ones, up to the end that a model set."""
    rows = (tokens[:opening], _cut(tokens, opening, tokenizer))
    begin, whole = (tokenizer.decode(row, skip_special_tokens=True) for row in rows)
    return str(whole[len(begin) :])


def _cut(tokens: Tensor, opening: int, tokenizer: Any) -> Tensor:
    """The tokens up to the first end of a text among what was written."""
    if tokenizer.eos_token_id is None:
        return tokens
    ends = torch.nonzero(tokens[opening:] == tokenizer.eos_token_id)
    return tokens[: opening + int(ends[0])] if len(ends) else tokens
