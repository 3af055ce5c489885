"""Settings of losses, as sections of a recipe; `losses.py` itself never sees one."""

from typing import Literal

from reidctl.config import Section


class HsicConfig(Section):
    """The decoupling loss; see `losses.hsic`."""

    kernel: Literal["linear", "rbf"] = "linear"
    normalize: Literal["none", "l2", "cka"] = "l2"


class InfoNceConfig(Section):
    """The image-text loss; see `losses.info_nce`. The papers print one direction and no temperature."""

    temperature: float = 0.05
    direction: Literal["both", "v2t"] = "both"
    positives: Literal["id", "pair"] = "id"
    multiple: Literal["mass", "mean"] = "mass"
    """With several positives: `mass` is content with the easiest one, `mean` pulls each of them."""
    fused_share: float = 0.5
    """Share of the fused features (image + another identity text of the person) in the loss; the rest is image-only."""


class TripletConfig(Section):
    """The identity loss; see `losses.batch_hard_triplet`. The papers do not state the margin."""

    margin: float = 0.3
    squared: bool = True
    mining: Literal["batch_hard", "random", "all"] = "batch_hard"
    """`batch_hard` can collapse a model that starts from nothing to one point; `all` averages over every triplet."""
    normalize: bool = True
    """Put the features on the unit sphere first, so that the margin has a scale."""


class PlainTripletConfig(TripletConfig):
    """The same with plain distances, as in the image-to-image papers; one setting alone leaves the others so."""

    squared: bool = False


class RawTripletConfig(PlainTripletConfig):
    """The same on features as they are, as in CLIP-ReID's code."""

    normalize: bool = False
