"""Pixel statistics by name; they belong to the checkpoint, and choosing others is allowed but said."""

import difflib
import math
from collections.abc import Sequence
from typing import Literal

from reidctl.errors import UsageError

Triple = tuple[float, float, float]
StatisticsName = Literal["checkpoint", "clip", "imagenet", "half"]

STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""(mean, std) of the sets that are used by name, for pixels in [0, 1]."""

# Checkpoints state theirs with three to eight digits; half a step of one byte makes no difference to anyone.
_SAME = 0.5 / 255


def check_statistics(
    backbone_mean: Sequence[float], backbone_std: Sequence[float], wanted: str = "checkpoint"
) -> tuple[Triple, Triple, str | None]:
    """Return (mean, std, warning): what to normalise with, and one sentence if that is not the checkpoint's own.

    Args:
        backbone_mean, backbone_std: the checkpoint's own, one number per channel.
        wanted: `checkpoint`, or one of `STATISTICS`. CLIP-ReID and TransReID train with `half`, CLIP-ReID on CLIP
            weights that were trained with `clip` (Syliz517/CLIP-ReID, configs/person/vit_clipreid.yml:20-21; its issue
            69 asks why and has no answer); its ResNet-50 uses `imagenet`.

    Raises:
        UsageError: no statistics of that name.
    """
    own = (_triple(backbone_mean), _triple(backbone_std))
    if wanted == "checkpoint":
        return (*own, None)
    if wanted not in STATISTICS:
        known = ["checkpoint", *STATISTICS]
        close = difflib.get_close_matches(wanted.lower(), known, n=1, cutoff=0.5)
        hint = f"Did you mean `{close[0]}`?" if close else f"Known statistics: {', '.join(known)}."
        raise UsageError(f"Unknown pixel statistics `{wanted}`.", hint=hint)
    chosen = STATISTICS[wanted]
    if _same(chosen, own):
        return (*own, None)
    name = next((name for name, pair in STATISTICS.items() if _same(pair, own)), "other")
    warning = (
        f"Pixels are normalised with the `{wanted}` statistics ({_shown(chosen)}), but the checkpoint was trained with "
        f"the `{name}` ones ({_shown(own)}), so its first layer sees other numbers than it learnt from."
    )
    return (*chosen, warning)


def _triple(values: Sequence[float]) -> Triple:
    first, second, third = (float(value) for value in values)
    return first, second, third


def _same(one: tuple[Triple, Triple], other: tuple[Triple, Triple]) -> bool:
    return all(
        math.isclose(a, b, rel_tol=0, abs_tol=_SAME)
        for ours, theirs in zip(one, other, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def _shown(pair: tuple[Triple, Triple]) -> str:
    mean, std = ("/".join(f"{value:.3g}" for value in triple) for triple in pair)
    return f"mean {mean}, std {std}"
