"""`report`: one self-contained HTML file with what a run has measured."""

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from reidctl import __version__, tables
from reidctl.errors import DataError
from reidctl.report import content, html
from reidctl.runs import Run, digest
from reidctl.stages import report_features as features
from reidctl.stages import report_making as making
from reidctl.stages import report_maps as maps
from reidctl.stages import report_results as results
from reidctl.stages.report_parts import STAGE, Material

READ = (
    *("data", "caption", "prompt-stage", "finetune", "index", "evaluate", "against", "seeds", "epochs", "matrix"),
    *("robustness", "analyse", "interpret"),
)
"""The stages that are shown."""

LAYOUT = 2
"""Raised when the page changes, so that an older page is made again."""


def run(run: Run, *, out: Path | None = None, seed: int = 0, force: bool = False) -> dict[str, Any]:
    """Write `report/report.html` and its figures.

    Args:
        run: whose finished stages are reported; what is missing is named on the page with the command that makes it.
        out: also copy the page here.
        seed: of the choice of queries and pictures that are shown.
        force: write again even if nothing changed.

    Returns:
        The stage's record with `status` `done` or `up-to-date`.

    Raises:
        DataError: no stage of the run has finished, or a table is damaged.
    """
    records = {stage: record for stage in READ if (record := run.record(stage)) is not None}
    if not records:
        raise DataError(
            f"{run.path} has no finished stage to report.", hint=f"Start with `reidctl data synth --run {run.path}`."
        )
    settings = {"seed": seed, "layout": LAYOUT}
    inputs = {stage: digest(run.stage_dir(stage) / "stage.json") for stage in records}
    page = run.stage_dir(STAGE) / "report.html"
    record = None if force else run.up_to_date(STAGE, settings, inputs)
    status = "done" if record is None else "up-to-date"
    if record is None:
        started = datetime.now(UTC)
        run.unfinish(STAGE)
        material = Material(run, records, seed)
        shown = compose(material)
        tables.write_text(page, html.render(shown))
        outputs = [page, *material.files]
        sections = [anchor for anchor, _ in shown["nav"]]
        record = run.finish(
            STAGE, settings=settings, inputs=inputs, outputs=outputs, started=started, extra={"sections": sections}
        )
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, out)
    return {**record, "status": status}


def compose(material: Material) -> dict[str, Any]:
    """Return the values of the page; every section is empty when its stage has not run."""
    metrics = material.table("evaluate", "metrics")
    # (name in the template, anchor, title, value), in the order of the page.
    sections: list[tuple[str, str, str, Any]] = [
        ("results", "results", "Results", results.results(material, metrics)),
        ("compared", "comparison", "Comparison", results.compared(material)),
        ("robustness", "robustness", "Robustness", results.robustness(material)),
        ("rankings", "rankings", "Ranked lists", maps.rankings(material)),
        ("maps", "maps", "Phrase maps", maps.maps(material)),
        ("faith", "faithfulness", "Faithfulness", maps.faith(material)),
        ("features", "features", "Features", features.features(material)),
        ("gates", "gates", "Gates", features.gates(material)),
        ("training", "training", "Training", making.training(material)),
        ("recipe", "recipe", "Recipe", making.recipe_text(material)),
        ("captioning", "captions", "Descriptions", making.captioning(material)),
        ("dataset", "data", "Data", making.dataset(material)),
        ("missing", "missing", "Missing", making.missing(material)),
    ]
    shown = [(anchor, title, value) for _, anchor, title, value in sections]
    return {
        **{name: value for name, _, _, value in sections},
        "nav": html.navigation([*shown, ("provenance", "Provenance", True)]),
        "title": making.title(material),
        "about": making.about(material),
        "banners": making.banners(material),
        "cards": content.headline_cards(metrics),
        "conditions": results.condition_texts(metrics),
        "notes": material.record("evaluate").get("notes", []),
        "stages": making.stages(material),
        "libraries": making.libraries(material),
        "version": __version__,
        "run": str(material.run.path),
    }
