"""What a run would still have to ask for, given what is stored."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from reidctl.captioning.asking import judge_again
from reidctl.captioning.backends.base import Request
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.estimate import MARGIN, Ask, Estimate, asks, estimate_total, most_tokens, text_tokens
from reidctl.captioning.journal import Index
from reidctl.captioning.plan import Plan
from reidctl.captioning.pricing import Price
from reidctl.captioning.prompts import neutral_prompt, retry_text


def forecast(plan: Plan, neutral: Sequence[Request], stored: Index, price: Price | None) -> dict[str, Any]:
    """Return the requests, tokens and price of all texts that have no final reply yet.

    Args:
        plan: the texts of the images.
        neutral: requests that neutralise captions; empty where nobody is asked for that.
        stored: replies of earlier runs.
        price: of the model, or None.

    Returns:
        `texts` wanted, `stored` of them, and the fields of `Estimate` over the rest.
    """
    config, describer = plan.config, plan.describer
    sizes: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for request, size in plan.sized_requests():
        if not _done(stored, request, plan):
            sizes[request.kind].append(size)
    asked = asks(config, plan.instructions, describer.model)
    parts = []
    for kind, found in sizes.items():
        widths, heights = zip(*found, strict=True)
        of_kind = [ask for ask in asked if ask.kind == kind]
        parts.append(estimate_total(of_kind, widths, heights, price, config, repeats=describer.repeats))
    rest = [request for request in neutral if not _done(stored, request, plan)]
    if rest:
        parts.append(_of_captions(rest, plan, price))
    total = len(plan) + len(neutral)
    ahead = sum(parts, estimate_total(asked, [], [], price, config))
    return {"texts": total, "stored": total - ahead.requests, **ahead.as_dict()}


def _done(stored: Index, request: Request, plan: Plan) -> bool:
    """Whether nobody will be asked: a text that other check settings judged is judged by today's, without a trace."""
    slot = stored.find(request.key)
    if slot is None or not slot.final or not slot.stale:
        return slot is not None and slot.final
    return judge_again(request, stored.read(slot), plan.describer, plan.config).final


def _of_captions(requests: Sequence[Request], plan: Plan, price: Price | None) -> Estimate:
    """Captions have no image; a pixel of nothing stands for it, and the answer is as long as the caption."""
    mean = sum(text_tokens(request.prompt + request.system) for request in requests) / len(requests)
    words = sum(len(request.attributes["caption"].split()) for request in requests) / len(requests)
    ask = Ask("neutral", round(mean), round(mean * 1.5), words)
    blind = None if price is None else replace(price, image=type(price.image)())
    ones = [1] * len(requests)
    return estimate_total([ask], ones, ones, blind, plan.config, repeats=plan.describer.repeats)


def dearest(
    asked: Sequence[Ask], images: pd.DataFrame, captions: Sequence[str], price: Price, config: CaptionConfig, model: str
) -> tuple[int, int]:
    """Return the tokens, in and out, of the dearest request of a run: what to reserve before one is sent.

    Args:
        asked: see `estimate.asks`.
        images: with columns `width` and `height`.
        captions: those a model is to neutralise.
        price: of the model.
        config: the `caption` section.
        model: `Describer.model`.
    """
    sent, received = most_tokens(asked, images["width"], images["height"], price, config)
    if not captions:
        return sent, received
    longest = neutral_prompt(max(captions, key=text_tokens), config, model=model)
    frame = "x" * 400  # the two messages and the JSON schema around them
    again = math.ceil(MARGIN * text_tokens(retry_text(longest.system + longest.text + frame, "x" * 300)))
    return max(sent, again), config.remote.max_tokens
