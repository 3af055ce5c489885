"""What people read for the short names in tables: conditions, directions, and which images a protocol drops."""

LABELS = {
    "standard": "model",
    "cloth-changing": "model, cloth-changing",
    "same-clothes": "model, same clothes",
    "single-shot": "model, single-shot",
    "single-shot-cloth-changing": "model, single-shot, cloth-changing",
    "single-shot-same-clothes": "model, single-shot, same clothes",
    "histogram": "colour histogram",
    "oracle-caption": "oracle, attributes in the caption",
    "oracle": "oracle, all attributes",
    "shuffled": "label-shuffle control",
    "chance": "chance",
    "single-shot-chance": "chance, single-shot",
}
"""What people read for a condition."""

DIRECTIONS = {"t2i": "text to image", "i2i": "image to image", "it2i": "image and text to image"}
"""What people read for a direction."""

RULES = {
    "same_camera": "same person in the same camera dropped",
    "same_item": "only the query's own image dropped",
    "same_outfit": "same person in the same outfit dropped",
    "cloth_changing": "same person in the same camera or outfit dropped",
    "same_clothes": "same person in the same camera or another outfit dropped",
}
"""Which gallery images of the query's person are neither right nor wrong; `none` has no entry."""

ABOUT = {"single-shot": "one image of each person, mean of 10 draws"}
"""What people read for a gallery that is not the whole one."""


def label(condition: str) -> str:
    """Return what people read for a condition; a name without a label stays itself."""
    name, _, parameters = condition.partition("rerank-")
    if parameters and name in ("", *(f"{known}+" for known in LABELS)):
        return f"{label(name.removesuffix('+') or 'standard')}, re-ranked {parameters}"
    return LABELS.get(condition, condition)
