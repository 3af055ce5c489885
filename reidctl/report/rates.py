"""The picture of a search for a learning rate."""

from io import BytesIO

import matplotlib
from matplotlib.figure import Figure

from reidctl.report.figures import GRID, INK, PAPER, SERIES


def draw_rates(rates: list[float], objectives: list[float], suggested: float | None, now: float) -> bytes:
    """Return a PNG of the smoothed objective over the learning rate, with the suggested rate and the one that is set.

    Args:
        rates: values of `train.lr`, rising.
        objectives: at each of them.
        suggested: where the objective fell fastest; None draws no line.
        now: `train.lr` of the recipe.
    """
    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, objectives, color=SERIES[0], linewidth=1.8)
    axes.set_xscale("log")
    if objectives:
        # The end blows up; what matters is the fall before it.
        start, low = objectives[0], min(objectives)
        axes.set_ylim(low - 0.1 * max(start - low, 1e-6), start + 0.5 * max(start - low, 1e-6))
    axes.set_xlabel("train.lr", color=INK)
    axes.set_ylabel("objective, smoothed", color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    lines = [(now, "recipe", SERIES[7], ":")]
    if suggested is not None:
        lines.append((suggested, "fastest fall", SERIES[1], "--"))
    for rate, name, colour, dashes in lines:
        axes.axvline(rate, color=colour, linestyle=dashes, linewidth=1.4, label=f"{name}: {rate:.1e}")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with matplotlib.rc_context({"savefig.facecolor": PAPER}):
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=140, metadata={"Software": None}, facecolor=PAPER)
    return drawn.getvalue()
