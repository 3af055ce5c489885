"""Sections of the report about how its numbers came about: training, recipe, descriptions, data, provenance."""

import json
from typing import Any

from reidctl.report import content, figures, recipe
from reidctl.report.figures import named_rows
from reidctl.stages.report_parts import Material, Section

PICTURES = 10
"""How many sample pictures are shown."""
_HOW = {
    "data": ("There is no dataset.", "reidctl data synth --run {run}"),
    "caption": ("The images are not described.", "reidctl caption --run {run}"),
    "finetune": ("No model is trained.", "reidctl finetune --method bdam --run {run}"),
    "evaluate": ("Nothing is evaluated.", "reidctl evaluate --run {run}"),
    "robustness": ("Nothing was spoilt to see what it costs.", "reidctl evaluate --setting all --run {run}"),
    "analyse": ("The features are not analysed.", "reidctl analyse --run {run}"),
    "interpret": ("No phrase is explained.", "reidctl interpret --run {run}"),
}
_MEASURED = ("evaluate", "robustness", "epochs", "analyse", "interpret")


def training(material: Material) -> Section:
    """Return the losses and the metrics on the split that chooses the epoch."""
    history = material.table("finetune", "history")
    if not len(history):
        return None
    record = material.record("finetune")
    best = record.get("best_epoch")
    drawn = []
    if history["name"].str.startswith("loss/").any():
        alt = "Line chart of every loss over the epochs; the numbers are in the CSV file beside the figure"
        drawn.append(material.figure(figures.training_curves(history, material.stem("losses")), "Every loss", alt))
    if (history["split"] != "train").any():
        paths = figures.validation_curve(history, material.stem("validation"), best_epoch=best)
        alt = f"Line chart of the validation metrics; epoch {best} was chosen"
        drawn.append(material.figure(paths, "Metrics on the split that chooses the epoch", alt))
    facts = [f"{history['epoch'].max() + 1} epochs"]
    if record.get("images_per_second"):
        facts.append(f"{record['images_per_second']:,.0f} images per second")
    facts.append(f"device {record.get('device', 'unknown')}")
    return {"text": ", ".join(facts) + ".", "figures": drawn}


def recipe_text(material: Material) -> Section:
    """Return the resolved settings of the training."""
    settings = material.record("finetune").get("settings")
    if not settings:
        return None
    command = " ".join(str(word) for word in material.record("finetune").get("command", []))
    return {"text": recipe.as_yaml(settings), "command": command}


def captioning(material: Material) -> Section:
    """Return what was written about the images, with examples."""
    table = material.table("caption", "captions")
    if not len(table):
        return None
    status = ", ".join(f"{count:,} {name}" for name, count in table["status"].value_counts().items())
    models = ", ".join(sorted({str(name) for name in table["model"] if name})) or "unknown"
    accepted = table[(table["status"] == "ok") & table["text"].notna() & table["kind"].isin(["identity", "clothing"])]
    known = material.images[material.images["image_id"].isin(set(accepted["image_id"]))]
    samples = []
    for name in content.pick_images(known, shown=3, seed=material.seed):
        texts = accepted[accepted["image_id"] == name].sort_values("kind", ascending=False)
        pairs = list(zip(texts["kind"], texts["text"], strict=True))
        samples.append({"image_id": name, "picture": material.picture(name), "texts": pairs})
    text = f"{len(table):,} texts written by {models}: {status}. Examples are drawn at random (seed {material.seed})."
    return {"text": text, "styles": _styles(material), "samples": samples}


def _styles(material: Material) -> list[dict[str, Any]]:
    return [
        {
            "id": row.style_id,
            "size": f"{row.size:,}",
            "instruction": row.instruction,
            "example": row.exemplars[0] if row.exemplars is not None and len(row.exemplars) else "–",
        }
        for row in named_rows(material.table("caption", "styles"))
    ]


def dataset(material: Material) -> Section:
    """Return the splits and some pictures."""
    images = material.images
    if not len(images) or material.source is None:
        return None
    chosen = content.pick_images(images, shown=PICTURES, seed=material.seed)
    return {
        "caption": f"{', '.join(sorted(set(images['dataset'])))} in {material.source.folder}",
        "rows": content.split_rows(images, material.captions),
        "samples": [{"image_id": name, "picture": material.picture(name)} for name in chosen],
        "rule": f"{len(chosen)} pictures of different people where possible, drawn at random (seed {material.seed}).",
    }


def missing(material: Material) -> list[dict[str, str]]:
    """Return the stages that have not run, and the command of each."""
    done = set(material.records) | ({"data"} if len(material.images) else set())
    found = [(text, command) for stage, (text, command) in _HOW.items() if stage not in done]
    if "interpret" in done and not len(material.table("interpret", "interpretability")):
        found.append(("The maps are drawn but not tested.", "reidctl interpret --run {run} --force"))
    return [{"text": text, "command": command.format(run=material.run.path)} for text, command in found]


def stages(material: Material) -> list[dict[str, Any]]:
    """Return one line of the provenance table per stage, in order of finishing."""
    ordered = sorted(material.records.values(), key=lambda record: str(record.get("finished", "")))
    return [
        {
            **content.provenance_row(record),
            "settings": json.dumps(record.get("settings", {}), indent=2, default=str, ensure_ascii=False),
        }
        for record in ordered
    ]


def libraries(material: Material) -> str:
    """Return what the last stage ran on."""
    last = max(material.records.values(), key=lambda record: str(record.get("finished", "")))
    facts = {"libraries": last.get("libraries", {}), "machine": last.get("machine", {})}
    return json.dumps(facts, indent=2, default=str)


def title(material: Material) -> str:
    """Return the page's title: method and data."""
    trained = material.record("finetune").get("method")
    datasets = ", ".join(sorted(set(material.images["dataset"])))
    return " on ".join(part for part in (trained, datasets) if part) or material.run.path.name


def about(material: Material) -> str:
    """Return what the run is, in a few sentences."""
    sentences = []
    if len(material.images):
        people = material.images["person_id"].nunique()
        sentences.append(f"{len(material.images):,} images of {people:,} people, {len(material.captions):,} texts.")
    trained = material.record("finetune")
    if "parameters" in trained:
        sentences.append(f"The model has {trained['parameters'] / 1e6:.1f} million parameters.")
    if "best_epoch" in trained:
        sentences.append(
            f"Of {trained['epochs']} epochs, epoch {trained['best_epoch']} was chosen on the "
            f"{trained['selected_on']} split."
        )
    return " ".join(sentences) or f"What the run {material.run.path} has so far."


def banners(material: Material) -> list[dict[str, str]]:
    """Return what readers must know before they read any number."""
    found = []
    if any(str(name).startswith("synthped") for name in set(material.images["dataset"])):
        text = "The people are rendered. The numbers compare settings with each other, not with published results."
        found.append({"head": "Synthetic data, not comparable with published numbers.", "text": text})
    if material.record("finetune").get("selected_on") == "test":
        text = "The result is not a test of anything unseen."
        found.append({"head": "The epoch was chosen on the test split.", "text": text})
    if material.record("interpret").get("parts") == "user-supplied":
        text = "Pointing, mass and IoU of maps are measured against them; the benchmark has no part annotation."
        found.append({"head": "User-supplied parsing masks.", "text": text})
    return found + _outdated(material)


def _outdated(material: Material) -> list[dict[str, str]]:
    """A banner if stages measured another model than the one that the run holds now."""
    outputs = material.record("finetune").get("outputs", {})
    now = outputs.get("finetune/model.safetensors", {}).get("sha256")
    stale = [name for name in _MEASURED if _model(material.record(name)) not in (None, now)] if now else []
    if not stale:
        return []
    text = f"The numbers of {', '.join(stale)} are those of the older model: measure again."
    return [{"head": "The model was trained again since.", "text": text}]


def _model(record: dict[str, Any]) -> str | None:
    found = record.get("settings", {}).get("model") or record.get("inputs", {}).get("model")
    return found if isinstance(found, str) else None
