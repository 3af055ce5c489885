"""Relevance maps drawn over the picture they explain."""

from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure

from reidctl import tables
from reidctl.explain.grounding import Mask
from reidctl.explain.maps import Heat, upsample

COLOURS = "inferno"
"""Perceptually uniform, ordered in grey too, and readable with every common colour-vision deficiency."""

ALPHA = 0.7
"""Share of the colour where relevance is 1; half of it where relevance is 0, so that the person stays visible."""


def overlay(picture: npt.NDArray[np.uint8], relevance: Heat, *, alpha: float = ALPHA) -> npt.NDArray[np.uint8]:
    """Return the picture in grey under the colours of its map, shape (H, W, 3).

    out = a colour(relevance) + (1 - a) grey,  a = alpha (1 + relevance) / 2

    The picture is grey so that every colour means relevance.

    Args:
        picture: RGB, shape (H, W, 3).
        relevance: values in [0, 1] over any grid, shape (h, w); bilinear in between.
        alpha: share of the colour at relevance 1, in [0, 1].
    """
    heat = upsample(relevance, (picture.shape[0], picture.shape[1])).clip(0, 1)
    colour = matplotlib.colormaps[COLOURS](heat)[..., :3]
    grey = (picture.astype(np.float32) @ np.asarray([0.299, 0.587, 0.114], np.float32))[..., None] / 255
    share = alpha * (1 + heat[..., None]) / 2
    return np.asarray(np.round((share * colour + (1 - share) * grey) * 255), np.uint8)


def draw_explanation(
    picture: npt.NDArray[np.uint8],
    relevance: Heat,
    phrase: str,
    out: Path,
    *,
    note: str = "",
    truth: Mask | None = None,
) -> None:
    """Write a PNG: the picture, the same picture under its map, the scale, and the phrase as title.

    Args:
        picture: RGB, shape (H, W, 3).
        relevance: values in [0, 1], shape (h, w).
        phrase: the title.
        out: the PNG file.
        note: a second line, for instance the similarity.
        truth: the true region, shape (H, W); outlined on the map.

    Raises:
        DataError: the file cannot be written.
    """
    figure = Figure(figsize=(4.6, 4.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.imshow(picture, interpolation="nearest")
    left.set_title("picture", fontsize=9)
    right.imshow(overlay(picture, relevance), interpolation="nearest")
    right.set_title("relevance" if truth is None else "relevance, true region", fontsize=9)
    if truth is not None and truth.any() and not truth.all():
        right.contour(truth.astype(float), levels=[0.5], colors="black", linewidths=2.4)
        right.contour(truth.astype(float), levels=[0.5], colors="white", linewidths=1.2)
    for axes in (left, right):
        axes.set_axis_off()
    _add_scale(figure, right)
    # parse_math=False: a dollar sign in a phrase is a dollar sign.
    figure.suptitle(_wrapped(phrase), fontsize=11, fontweight="bold", parse_math=False)
    if note:
        figure.supxlabel(note, fontsize=8, parse_math=False)
    drawn = BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    tables.write_bytes(out, drawn.getvalue())


def _add_scale(figure: Figure, axes: object) -> None:
    scale = ScalarMappable(cmap=COLOURS)
    scale.set_clim(0, 1)
    bar = figure.colorbar(scale, ax=axes, fraction=0.08, pad=0.04)  # type: ignore[arg-type]
    bar.set_label("relevance (1 = most)", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _wrapped(text: str, width: int = 42, lines: int = 3) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" …")) or " "
