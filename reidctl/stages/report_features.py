"""Sections of the report about what features hold: analyses, t-SNE maps, gates."""

from typing import Any

from reidctl.report import analyses, beside, space
from reidctl.stages.report_parts import Material, Section, damaged

_FIGURES = (
    ("probes", "What probes read from each feature", "Dots with intervals of the table of probes"),
    ("clones", "Look-alikes", "Dots with intervals of the table of look-alikes"),
    ("cam", "Relevance in single images", "Pictures beside maps of relevance"),
    ("pseudo", "Pseudo-tokens of images and captions", "Two-dimensional map of pseudo-tokens, pairs joined by lines"),
)
_TITLES = {
    "streams": "Identity and clothing features",
    "embedding": "The retrieved feature",
    "this": "This model",
    "against": "Another model",
}
_POINTS = ("panel", "feature", "image_id", "person_id", "x", "y")


def features(material: Material) -> Section:
    """Return the numbers and figures of `analyse`, and its maps of points."""
    record = material.record("analyse")
    if not record:
        return None
    rows = material.table("analyse", "analysis")
    drawn = [material.kept_figure("analyse", name, title, alt) for name, title, alt in _FIGURES]
    found = {
        "space": _space(material),
        "parts": analyses.analysis_parts(rows) if len(rows) else [],
        "figures": [figure for figure in drawn if figure is not None],
        "architecture": _architecture(material),
    }
    if not any(found.values()):
        return None
    return {**found, "images": record.get("images", 0), "people": record.get("people", 0),
            "notes": beside.unique(record.get("notes", []))}  # fmt: skip


def _space(material: Material) -> list[dict[str, Any]]:
    """The maps of points, of this model and beside another, with the pictures of their points."""
    asked = material.record("analyse").get("settings", {}).get("analyse", {}).get("highlight", [])
    groups: list[dict[str, Any]] = []
    for name, shown in (("tsne", 2), ("tsne_against", 7)):
        points = material.points("analyse", f"{name}.csv", _POINTS)
        if points is None:
            continue
        highlight = [str(person) for person in asked] or space.most_pictured(points, shown)
        order = space.thumbnail_order(points, highlight)
        thumbs = {name: item for name in order if (item := material.picture(name, small=True)) is not None}
        images = int(points["image_id"].nunique())
        groups.append(
            {
                "id": name.replace("_", "-"),
                "maps": space.point_maps(points, highlight=highlight, titles=_TITLES),
                "people": sorted(set(points["person_id"])),
                "thumbs": thumbs,
                "images": images,
                "file": f"analyse/{name}.{{png,svg,csv}}",
                "about": _about(images, len(thumbs)),
                "side": space.SIDE,
            }
        )
    return groups


def _about(images: int, pictures: int) -> str:
    shown = ", with their pictures" if pictures == images else f", with the pictures of {pictures:,} of them"
    return (
        f"{images:,} images. Point at a dot, or move with the arrow keys, to see who it is{shown if pictures else ''}. "
        "Neighbours can be read from a t-SNE map; sizes, gaps and distances cannot."
    )


def _architecture(material: Material) -> str | None:
    path = material.run.stage_dir("analyse") / "architecture.md"
    if "analyse" not in material.records or not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, "analyse") from error


def gates(material: Material) -> Section:
    """Return the gates' histograms, of `interpret` or else of `analyse`."""
    stage = next((name for name in ("interpret", "analyse") if _has_gates(material, name)), None)
    if stage is None:
        return None
    path = material.run.stage_dir(stage) / "gates.json"
    found = material.json(path, stage)
    try:
        rows = [{"name": name, **entry} for name, entry in found["summary"].items()]
        alt = "Histogram; " + "; ".join(f"{row['name']}: mean {row['mean']:.2f}, std {row['std']:.2f}" for row in rows)
        facts = {"rule": found["rule"], "samples": len(found["samples"]), "rows": rows}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise damaged(path, stage) from error
    figure = material.kept_figure(stage, "gates", "Distribution of gate activations", alt)
    return {**facts, "figure": figure} if rows and figure else None


def _has_gates(material: Material, stage: str) -> bool:
    return stage in material.records and (material.run.stage_dir(stage) / "gates.json").is_file()
