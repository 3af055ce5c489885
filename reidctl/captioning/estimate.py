"""What a run will ask for and cost, before anything is sent.

Tokens of a text are guessed at 4 characters each: OpenAI's tokenizers are not installed. On our own prompts that is 7
to 18 % more than CLIP's byte pairs and BERT's word pieces make of them (test_pricing.py checks it); on 216 short texts
of the template describer it is 14 % less to 25 % more. Where money is reserved, the guess is raised by `MARGIN`.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.form import parse_instruction
from reidctl.captioning.pricing import FREE, Price
from reidctl.captioning.prompts import build_prompt, retry_text

MARGIN = 1.5
_CHARS_PER_TOKEN = 4
# The mean of the same 216 texts with CLIP's byte pairs; single ones have 1.1 to 2.
_TOKENS_PER_WORD = 1.4
# Two messages and a text of five words were billed as 12 tokens (prices.yaml, D).
_FRAME_TOKENS = 12
# The JSON schema that goes with a request, and the JSON around an answer; by their length, not checked at a provider.
_SCHEMA_TOKENS, _ENVELOPE_TOKENS = 60, 8
_LONGEST_REASON = "x" * 300
# Who has no use for tokens: their texts are there already.
_SILENT = ("template", "replay:", "file:")


@dataclass(frozen=True)
class Ask:
    """One kind of request: a prompt in one style.

    Attributes:
        kind: `identity` or `clothing`.
        tokens, tokens_again: of the text that is sent, the first time and after a failed check; at least.
        words: expected in the answer.
    """

    kind: str
    tokens: int
    tokens_again: int
    words: float


@dataclass(frozen=True)
class Estimate:
    """A run.

    Attributes:
        requests: texts to ask for.
        requests_max: if every answer failed its checks and was asked again `retries` times.
        tokens_in, tokens_out: expected if no answer fails a check: how many will is not known.
        tokens_in_max, tokens_out_max: upper bounds over `requests_max`, with `MARGIN` on what is guessed.
        price, price_max: of both; None if the model's price is not known.
        batch: whether at the price of the Batch API.
        images_counted: whether the images' tokens are in; without a price it is not known how to count them.

    The sum of two estimates is that of both runs: estimate kinds one by one where some of their texts are stored.
    """

    requests: int
    requests_max: int
    tokens_in: int
    tokens_out: int
    tokens_in_max: int
    tokens_out_max: int
    price: float | None
    price_max: float | None
    batch: bool
    images_counted: bool

    def __add__(self, other: "Estimate") -> "Estimate":
        return Estimate(
            requests=self.requests + other.requests,
            requests_max=self.requests_max + other.requests_max,
            tokens_in=self.tokens_in + other.tokens_in,
            tokens_out=self.tokens_out + other.tokens_out,
            tokens_in_max=self.tokens_in_max + other.tokens_in_max,
            tokens_out_max=self.tokens_out_max + other.tokens_out_max,
            price=None if self.price is None or other.price is None else self.price + other.price,
            price_max=None if self.price_max is None or other.price_max is None else self.price_max + other.price_max,
            batch=self.batch or other.batch,
            images_counted=self.images_counted and other.images_counted,
        )

    def as_dict(self) -> dict[str, float | bool | None]:
        """Return all fields, for JSON."""
        return asdict(self)


def text_tokens(text: str) -> int:
    """Return the guessed tokens of a text: one per 4 ASCII characters, one per other character."""
    others = sum(not character.isascii() for character in text)
    return math.ceil((len(text) - others) / _CHARS_PER_TOKEN) + others


def asks(config: CaptionConfig, instructions: Sequence[str], model: str) -> list[Ask]:
    """Return the kinds of request of a run: every kind of text in every style.

    Args:
        config: the `caption` section.
        instructions: of the styles; empty for no style.
        model: `Describer.model`.
    """
    return [_ask(kind, style, config, model) for kind in config.kinds for style in (instructions or [""])]


def _ask(kind: str, instruction: str, config: CaptionConfig, model: str) -> Ask:
    prompt = build_prompt(kind, instruction, config, model=model)
    fixed = _FRAME_TOKENS + text_tokens(prompt.system) + _SCHEMA_TOKENS * config.remote.structured
    again = retry_text(prompt.text, _LONGEST_REASON)
    return Ask(kind, fixed + text_tokens(prompt.text), fixed + text_tokens(again), _expected_words(instruction, config))


def _expected_words(instruction: str, config: CaptionConfig) -> float:
    """What the style asks for, within the bounds; without a style the middle of the bounds."""
    low, high = config.check.min_words, config.check.max_words
    return min(max(parse_instruction(instruction).words, low), high) if instruction else (low + high) / 2


def sent_size(
    widths: npt.ArrayLike, heights: npt.ArrayLike, side: int | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the sizes of images as they are sent: the longest side at most `side`, within a pixel of Pillow's.

    A size that is not known (0, NaN) is taken as a square of `side`, or of 512 pixels.
    """
    width, height = np.asarray(widths, np.float64), np.asarray(heights, np.float64)
    known = (width > 0) & (height > 0)
    unknown = float(side or 512)
    width, height = np.where(known, width, unknown), np.where(known, height, unknown)
    if side is None:
        return width, height
    scale = np.minimum(1.0, side / np.maximum(width, height))
    return np.maximum(np.rint(width * scale), 1.0), np.maximum(np.rint(height * scale), 1.0)


def estimate_total(
    asked: Sequence[Ask],
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
    price: Price | None,
    config: CaptionConfig,
    *,
    repeats: bool = False,
) -> Estimate:
    """Return what a run over images takes; every image is drawn into one of the styles with equal chance.

    Args:
        asked: see `asks`; all of one kind are its styles.
        widths, heights: of the image files, shape (N,); columns of the `images` table.
        price: see `pricing.price_of`.
        config: the `caption` section.
        repeats: the describer gives the same text again (`Describer.repeats`), so nothing is asked twice.
    """
    images = _image_tokens(widths, heights, price, config)
    count, pixels = len(images), int(images.sum())
    kinds = [[ask for ask in asked if ask.kind == kind] for kind in dict.fromkeys(ask.kind for ask in asked)]
    retries = 0 if repeats else config.retries
    silent = config.mllm.startswith(_SILENT)
    sent = written = sent_max = 0.0
    for styles in () if silent else kinds:
        sent += pixels + count * _mean([ask.tokens for ask in styles])
        written += count * _mean([min(_answer_tokens(ask, config), config.remote.max_tokens) for ask in styles])
        first = math.ceil(max(ask.tokens for ask in styles) * MARGIN)
        again = math.ceil(max(ask.tokens_again for ask in styles) * MARGIN)
        sent_max += pixels * (retries + 1) + count * (first + retries * again)
    requests = count * len(kinds)
    tokens = math.ceil(sent), math.ceil(written)
    most = math.ceil(sent_max), 0 if silent else requests * (retries + 1) * config.remote.max_tokens
    batch = config.batch.enabled
    return Estimate(
        requests=requests,
        requests_max=requests * (retries + 1),
        tokens_in=tokens[0],
        tokens_out=tokens[1],
        tokens_in_max=most[0],
        tokens_out_max=most[1],
        price=None if price is None else price.cost(*tokens, batch=batch),
        price_max=None if price is None else price.cost(*most, batch=batch),
        batch=batch,
        images_counted=silent or price not in (None, FREE),
    )


def most_tokens(
    asked: Sequence[Ask], widths: npt.ArrayLike, heights: npt.ArrayLike, price: Price, config: CaptionConfig
) -> tuple[int, int]:
    """Return the tokens, in and out, that the dearest single request of a run can take.

    It is the largest image, the longest prompt with the longest reason of a retry, and an answer of `max_tokens`. The
    text tokens are the guess times `MARGIN` (1.5, where the guess was 14 % short at worst); image tokens follow the
    table's rule as they are. It does not hold for a server that writes more than `max_tokens`, nor for one that bills
    a request that broke off and was sent again.
    """
    images = _image_tokens(widths, heights, price, config)
    if not len(images) or not asked:
        return 0, 0
    text = math.ceil(max(ask.tokens_again for ask in asked) * MARGIN)
    return int(images.max()) + text, config.remote.max_tokens


def _image_tokens(
    widths: npt.ArrayLike, heights: npt.ArrayLike, price: Price | None, config: CaptionConfig
) -> npt.NDArray[np.int64]:
    width, height = sent_size(widths, heights, config.remote.image_side)
    if price is None:
        return np.zeros(width.shape, np.int64)
    return price.image.tokens(width, height, config.remote.image_detail)


def _answer_tokens(ask: Ask, config: CaptionConfig) -> int:
    return math.ceil(ask.words * _TOKENS_PER_WORD) + _ENVELOPE_TOKENS * config.remote.structured


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
