"""What can be wrong with the captions of a dataset: pure functions from its tables to findings."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from reidctl.datasets.base import CODE
from reidctl.datasets.checks import Finding, Severity, are, finding
from reidctl.sides import mentions_side

# UTF-8 read as Latin-1 or Windows-1252, the replacement character, a stray byte order mark, control characters.
_ENCODING = re.compile(
    "\u00c3[\u0080-\u00bf\u0192\u2019-\u203a]|\u00c2[\u0080-\u00bf]|\u00e2[\u20ac\u0080]|\u00ef\u00bf\u00bd|\u00ef\u00bb\u00bf|"
    "[\ufffd\ufeff\u0000-\u0008\u000b-\u001f\u007f-\u009f]"
)
_SHORT = 3
# A caption of so few words fits many people by nature.
_GENERIC = 6
KINDS = ("full", "identity", "clothing")


def caption_texts(images: pd.DataFrame, captions: pd.DataFrame) -> pd.DataFrame:
    """Return the captions of whole images (not phrases, not failed ones) with person_id, split, dataset and `text`."""
    kept = captions[captions["kind"].isin(KINDS) & (captions["status"] == "ok")]
    known = images.drop_duplicates("image_id")[["image_id", "person_id", "split", "dataset"]]
    joined = kept[["caption_id", "image_id", "kind", "text"]].merge(known, on="image_id", how="inner")
    return joined.assign(text=joined["text"].fillna("").astype(str))


def check_captions(images: pd.DataFrame, captions: pd.DataFrame, *, known_people: bool = True) -> list[Finding]:
    """Captions that are orphaned, absent, empty, damaged, short, shared or doubled, and those that name a side."""
    if not len(captions):
        return []
    texts = caption_texts(images, captions)
    findings = _orphans(images, captions) + _uncaptioned(images, texts)
    blank = texts["text"].str.strip() == ""
    if blank.any():
        text = f"{are(int(blank.sum()), 'caption')} empty."
        findings.append(
            finding(
                "empty-captions", "warning", blank.sum(), len(texts), "captions", text, texts.loc[blank, "caption_id"]
            )
        )
    texts = texts[~blank]
    if not len(texts):
        return findings
    findings += _odd(texts)
    full = texts[texts["kind"] == "full"]
    plain = full["text"].str.casefold().str.split().str.join(" ").str.rstrip(" .!")
    return findings + (_shared(full, plain) if known_people else []) + _repeated(full, plain) + _sides(texts)


def _words(text: str) -> int:
    return len(text.split())


def _orphans(images: pd.DataFrame, captions: pd.DataFrame) -> list[Finding]:
    lost = captions[~captions["image_id"].isin(images["image_id"])]
    if not len(lost):
        return []
    text = f"{are(len(lost), 'caption')} about images that are not in the table."
    return [finding("orphan-captions", "error", len(lost), len(captions), "captions", text, lost["caption_id"])]


def _uncaptioned(images: pd.DataFrame, texts: pd.DataFrame) -> list[Finding]:
    full = texts[texts["kind"] == "full"]
    places = set(zip(full["dataset"], full["split"], strict=True))
    expected = images[[place in places for place in zip(images["dataset"], images["split"], strict=True)]]
    bare = expected[~expected["image_id"].isin(full["image_id"])]
    if not len(bare):
        return []
    text = f"{are(len(bare), 'image')} without a caption in a split that has captions."
    return [finding("uncaptioned-images", "warning", len(bare), len(expected), "images", text, bare["image_id"])]


def _odd(texts: pd.DataFrame) -> list[Finding]:
    words = texts["text"].map(_words)
    full = texts["kind"] == "full"
    odd = {
        "code-captions": (texts["text"].str.contains(CODE), "code-like"),
        "encoding-captions": (texts["text"].str.contains(_ENCODING), "in a broken encoding or with control characters"),
        "short-captions": (full & (words < _SHORT), f"of fewer than {_SHORT} words"),
    }
    findings = []
    for check, (which, what) in odd.items():
        if which.any():
            rows = texts[which]
            text = f"{are(len(rows), 'caption')} {what}."
            examples = (f"{name}: {said!r}" for name, said in zip(rows["caption_id"], rows["text"], strict=True))
            findings.append(finding(check, "warning", len(rows), len(texts), "captions", text, examples))
    return findings


def _shared(full: pd.DataFrame, plain: "pd.Series[str]") -> list[Finding]:
    who = full.assign(plain=plain).groupby("plain")["person_id"].agg(["nunique", "size"])
    many = who[who["nunique"] > 1].sort_values("nunique", ascending=False, kind="stable")
    if not len(many):
        return []
    generic = int((many.index.map(_words) < _GENERIC).sum())
    captions, people = int(many["size"].sum()), int(full.loc[plain.isin(many.index), "person_id"].nunique())
    text = (
        f"{are(captions, 'caption')} shared by several people ({len(many):,} texts, {people:,} people; {generic:,} of "
        f"the texts have fewer than {_GENERIC} words): as queries they have several right answers, scored as one."
    )
    examples = (f"{said!r} ({count} people)" for said, count in many["nunique"].items())
    severity: Severity = "note" if generic == len(many) else "warning"
    more = {"texts": len(many), "people": people, "generic_texts": generic}
    return [finding("shared-captions", severity, captions, len(full), "captions", text, examples, **more)]


def _repeated(full: pd.DataFrame, plain: "pd.Series[str]") -> list[Finding]:
    twice = full[full.assign(plain=plain).duplicated(["image_id", "plain"])]
    if not len(twice):
        return []
    text = f"{are(len(twice), 'caption')} a repetition of another caption of the same image."
    return [finding("duplicate-captions", "note", len(twice), len(full), "captions", text, twice["caption_id"])]


def _sides(texts: pd.DataFrame) -> list[Finding]:
    sided = texts[texts["text"].map(mentions_side)]
    if not len(sided):
        return []
    text = f"{are(len(sided), 'caption')} about left or right: horizontal flips must leave their images alone."
    return [finding("left-right", "note", len(sided), len(texts), "captions", text, sided["caption_id"])]


def check_truncation(
    texts: pd.DataFrame, lengths: Sequence[int], name: str, contexts: Sequence[int], *, estimate: bool = False
) -> tuple[list[Finding], dict[str, dict[str, float]]]:
    """Return findings for texts that a tokenizer cuts, and the rate by dataset and context.

    Args:
        texts: rows of `caption_texts`.
        lengths: tokens of each text, special ones included.
        name: the tokenizer's.
        contexts: the most tokens that models give it.
        estimate: whether the lengths are upper estimates.
    """
    size = np.asarray(lengths)
    findings: list[Finding] = []
    how = "; counted with the small vocabulary shipped here, an upper estimate" if estimate else ""
    rates: dict[str, dict[str, float]] = {}
    for dataset in sorted(set(texts["dataset"])):
        here = (texts["dataset"] == dataset).to_numpy()
        for context in contexts:
            cut = here & (size > context)
            count, total = int(cut.sum()), int(here.sum())
            rates.setdefault(dataset, {})[f"{name} {context}"] = count / total
            if count:
                text = (
                    f"{dataset}: {are(count, 'text')} longer than {name}'s {context} tokens and would lose the end "
                    f"(longest: {size[here].max()} tokens{how})."
                )
                longest = texts["caption_id"].to_numpy()[cut][np.argsort(-size[cut], kind="stable")]
                more = {"dataset": dataset, "tokenizer": name, "context": context, "longest": int(size[here].max())}
                findings.append(
                    finding("truncated-captions", "warning", count, total, "captions", text, longest, **more)
                )
    return findings, rates
