"""What pictures and people a dataset must not share between its splits: pure functions from its tables to findings."""

from collections import Counter

import numpy as np
import numpy.typing as npt
import pandas as pd

from reidctl.datasets.checks import EXAMPLES, Finding, are, finding
from reidctl.datasets.scan import nearest_hashes


def check_duplicates(images: pd.DataFrame, *, known_people: bool = True) -> list[Finding]:
    """Pictures that occur twice, by their decoded pixels: across splits, across people, within one person.

    Equal files have equal pixels, so this includes them; how many are equal byte for byte is told.
    """
    good = images[images["pixels"] != ""]
    twins = good[good["pixels"].duplicated(keep=False)]
    if not len(twins):
        return []
    people, splits = (twins.groupby("pixels")[column].transform("nunique") for column in ("person_id", "split"))
    if not known_people:
        people = people.clip(upper=1)
    findings = _leaked(twins[splits > 1], len(good))
    many = twins[people > 1]
    if len(many):
        who = many["person_id"].nunique()
        names = f"{who:,} people, {_equal_files(many)}"
        text = f"{are(len(many), 'image')} also a picture of another person ({names}): a label is wrong."
        findings.append(finding("ambiguous-images", "error", len(many), len(good), "images", text, _groups(many)))
    alone = twins[(people == 1) & (splits == 1)]
    if len(alone):
        extra = len(alone) - alone["pixels"].nunique()
        text = f"{extra:,} further copies of a picture of the same person and split ({_equal_files(alone)})."
        findings.append(finding("duplicate-images", "note", extra, len(good), "images", text, _groups(alone)))
        findings += _answered(alone, good)
    return findings


def _leaked(twins: pd.DataFrame, total: int) -> list[Finding]:
    if not len(twins):
        return []
    order = twins["split"].map({"train": 0, "val": 1, "test": 2})
    last = order.groupby(twins["pixels"]).transform("max")
    early = twins[order < last]
    pairs = (early["split"] + " also in " + last[order < last].map({1: "val", 2: "test"})).value_counts()
    told = ", ".join(f"{count:,} of {pair}" for pair, count in pairs.items())
    text = f"{are(len(early), 'picture')} in two splits ({told}; {_equal_files(twins)}): what is tested was trained on."
    examples = _groups(twins, by="split")
    return [finding("leaked-images", "error", len(early), total, "images", text, examples, pairs=pairs.to_dict())]


def _equal_files(twins: pd.DataFrame) -> str:
    same = int(twins["file_sha256"].duplicated(keep=False).sum())
    return f"{same:,} of {len(twins):,} equal byte for byte"


def _groups(twins: pd.DataFrame, by: str = "image_id") -> list[str]:
    """`a = b` for the first groups of equal pictures."""
    first = twins["pixels"].drop_duplicates().iloc[:EXAMPLES]
    ordered = twins[twins["pixels"].isin(first)].drop_duplicates(["pixels", by])
    names = ordered.groupby("pixels", sort=False)["image_id"]
    return [" = ".join(group.iloc[:4]) for _, group in names]


def _answered(twins: pd.DataFrame, images: pd.DataFrame) -> list[Finding]:
    roles = twins[twins["role"].isin(["query", "gallery"])]
    queries, gallery = (roles[roles["role"] == role] for role in ("query", "gallery"))
    if not len(queries) or not len(gallery):
        return []
    pairs = queries.merge(gallery, on=["dataset", "split", "pixels"], suffixes=("", "_gallery"))
    # Market-1501's rule drops gallery images of the query's person and camera.
    free = pairs[pairs["camera_id"].isna() | (pairs["camera_id"] != pairs["camera_id_gallery"])]
    found = free["image_id"].unique()
    if not len(found):
        return []
    text = f"{are(len(found), 'query', 'queries')} also in the gallery as the same picture: a match for nothing."
    examples = free["image_id"] + " = " + free["image_id_gallery"]
    total = int((images["role"] == "query").sum())
    return [finding("query-in-gallery", "warning", len(found), total, "queries", text, examples)]


def check_people(images: pd.DataFrame) -> list[Finding]:
    """Splits by identity, people who cannot be matched, and queries that nothing answers."""
    findings = []
    by_person = images.groupby("person_id")
    total = by_person.ngroups
    splits = images.drop_duplicates(["person_id", "split"]).groupby("person_id")["split"].agg(list)
    shared = splits[splits.map(len) > 1]
    if len(shared):
        text = f"{are(len(shared), 'person', 'people')} in two splits: a test would measure what was trained on."
        examples = (f"{person} ({', '.join(names)})" for person, names in shared.items())
        findings.append(finding("people-in-two-splits", "error", len(shared), total, "people", text, examples))
    sizes = by_person.size()
    single = sizes.index[sizes == 1]
    if len(single):
        text = f"{are(len(single), 'person', 'people')} in one image only: no image search can find them again."
        findings.append(finding("single-image-people", "note", len(single), total, "people", text, single))
    if images["camera_id"].notna().any():
        cameras = by_person["camera_id"].nunique()
        lone = sizes.index[(sizes > 1) & (cameras == 1)]
        if len(lone):
            text = f"{are(len(lone), 'person', 'people')} under one camera only: no match across cameras."
            findings.append(finding("single-camera-people", "note", len(lone), total, "people", text, lone))
    return findings + _unanswered(images)


def check_queries(images: pd.DataFrame, captions: pd.DataFrame) -> list[Finding]:
    """Splits with a gallery that nothing searches: no query image, and no caption that could be the query."""
    captioned = images["image_id"].isin(captions.loc[captions["kind"] == "full", "image_id"])
    places = images.assign(asks=captioned | (images["role"] == "query"), answers=images["role"] == "gallery")
    any_of = places.groupby(["dataset", "split"])[["asks", "answers"]].any()
    shown = any_of[any_of["answers"]]
    mute = shown[~shown["asks"]]
    if not len(mute):
        return []
    text = f"{are(len(mute), 'split')} a gallery without a query, so nothing can be measured there."
    names = (f"{dataset} {split}" for dataset, split in mute.index)
    return [finding("no-queries", "warning", len(mute), len(shown), "splits", text, names)]


def _unanswered(images: pd.DataFrame) -> list[Finding]:
    queries, gallery = (images[images["role"] == role] for role in ("query", "gallery"))
    if not len(queries):
        return []
    place = ["dataset", "split", "person_id"]
    answers = _count(gallery, queries, place)
    # Where cameras are known, an image of the query's own camera does not count as an answer.
    seen = queries["camera_id"].notna().to_numpy()
    alone = queries[answers == np.where(seen, _count(gallery, queries, [*place, "camera_id"]), 0)]
    if not len(alone):
        return []
    text = f"{are(len(alone), 'query image')} without a match in the gallery (of another camera, where known)."
    return [finding("queries-without-match", "warning", len(alone), len(queries), "queries", text, alone["image_id"])]


def _count(gallery: pd.DataFrame, queries: pd.DataFrame, keys: list[str]) -> npt.NDArray[np.int64]:
    """How many gallery images share these columns with each query."""
    sizes = Counter(zip(*(gallery[key] for key in keys), strict=True))
    return np.asarray([sizes[row] for row in zip(*(queries[key] for key in keys), strict=True)], dtype=np.int64)


def check_near(images: pd.DataFrame, *, distance: int = 4) -> list[Finding]:
    """Training images whose difference hash is near that of an image of another split: resized or re-encoded copies.

    Equal pixels are `leaked-images`' business. Flat pictures, whose hash says little, are not compared.
    """
    good = images[(images["pixels"] != "") & (images["dhash"].map(int.bit_count).between(8, 56))]
    train, other = good[good["split"] == "train"], good[good["split"] != "train"]
    mine, theirs = (np.unique(side["dhash"].to_numpy(dtype=np.uint64)) for side in (train, other))
    if not len(mine) or not len(theirs):
        return []
    nearest = nearest_hashes(mine, theirs, distance=distance)
    partner = pd.Series(theirs[nearest], index=mine)[nearest >= 0]
    close = train[train["dhash"].isin(partner.index)]
    names = other.drop_duplicates("dhash").set_index("dhash")
    matched = names.loc[close["dhash"].map(partner)]
    differ = close["pixels"].to_numpy() != matched["pixels"].to_numpy()
    close, matched = close[differ], matched[differ]
    if not len(close):
        return []
    text = f"{are(len(close), 'training image')} nearly equal to an image of val or test: look at them."
    examples = (f"{a} ~ {b}" for a, b in zip(close["image_id"], matched["image_id"], strict=True))
    return [finding("near-duplicates", "warning", len(close), len(train), "images", text, examples)]
