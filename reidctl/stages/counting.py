"""Counts that data stages print."""

import pandas as pd


def count_splits(images: pd.DataFrame, captions: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Return the number of people, images and captions (kind `full`) of every split, train first."""
    split_of = dict(zip(images["image_id"], images["split"], strict=True))
    full = captions.loc[captions["kind"] == "full", "image_id"].map(split_of)
    found = {}
    for split in sorted(set(images["split"]), key=lambda name: ["train", "val", "test", name].index(name)):
        rows = images[images["split"] == split]
        found[split] = {
            "people": int(rows["person_id"].nunique()),
            "images": len(rows),
            "captions": int((full == split).sum()),
        }
    return found
