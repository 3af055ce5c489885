"""Sections of the report with pictures: ranked lists, maps of phrases, and how far the maps can be trusted."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from reidctl.errors import DataError
from reidctl.explain.maps import USER_QUERY, grid_map
from reidctl.explain.pictures import overlay
from reidctl.pixels import read_pixels
from reidctl.report import beside, content, curves, faithfulness, grids, html
from reidctl.report.figures import named_rows
from reidctl.stages.report_parts import Material, Section

QUERIES, HITS, EXPLAINED = 8, 10, 6
"""How many ranked lists (per direction), results in each, and explained captions are shown."""
_MAP_SIZE = (256, 128)


def rankings(material: Material) -> list[dict[str, Any]]:
    """Return ranked lists of each direction, drawn at random."""
    ranks = material.table("evaluate", "rankings")
    queries = material.table("evaluate", "queries")
    if dict(material.record("evaluate").get("settings", {})).get("joint"):
        # The same queries once more, against the images of all datasets: the lists show those of each dataset.
        ranks, queries = (part[part["dataset"] != "joint"] for part in (ranks, queries))
    ranks = ranks[ranks["condition"] == "standard"]
    facts = {row.query_id: row for row in named_rows(queries[queries["condition"] == "standard"])}
    unmatched = {name for name, row in facts.items() if row.matches == 0}
    ranks = ranks[~ranks["query_id"].isin(unmatched)]
    groups = []
    for title, direction in (("Text queries", "t2i"), ("Image queries", "i2i")):
        part = ranks[ranks["direction"] == direction]
        if not len(part):
            continue
        chosen, rule = content.pick_queries(part, shown=QUERIES, seed=material.seed)
        lists = dict(list(part.groupby("query_id")))
        shown = [_query(material, name, lists[name], facts.get(name), direction) for name in chosen]
        found = sum(query["found"] for query in shown)
        groups.append({"title": title, "rule": rule, "queries": shown, "found": found})
    return groups


def _query(material: Material, name: str, hits: pd.DataFrame, facts: Any, direction: str) -> dict[str, Any]:
    hits = hits.sort_values("rank").head(HITS)
    described = ""
    if facts is not None and not pd.isna(facts.first_match):
        described = f"first right image at {facts.first_match:.0f}, AP {100 * facts.average_precision:.0f} %"
    rows = [
        {
            "rank": int(hit.rank),
            "score": f"{hit.score:.3f}",
            "match": bool(hit.match),
            "picture": material.picture(hit.gallery_id),
        }
        for hit in named_rows(hits)
    ]
    text = material.sentences.get(name, f"{name} (its text is gone)") if direction == "t2i" else None
    return {
        "id": name,
        "text": text,
        "picture": None if text is not None else material.picture(name),
        "person": getattr(facts, "person_id", ""),
        "facts": described,
        "found": bool(rows and rows[0]["match"]),
        "hits": rows,
    }


def maps(material: Material) -> Section:
    """Return phrases in their sentences and their maps over the pictures, one row of maps per explainer."""
    rows = material.table("interpret", "explanations")
    if not len(rows):
        return None
    record = material.record("interpret")
    rows = rows.assign(explainer=rows["explainer"].astype(str))
    explainers = list(dict.fromkeys(rows["explainer"]))
    pairs = list(dict.fromkeys(zip(rows["query_id"], rows["image_id"], strict=True)))
    shown = pairs[:EXPLAINED]
    many = f"Explainers: {', '.join(explainers)}." if len(explainers) > 1 else f"Explainer: {explainers[0]}."
    rule = (
        f"{many} {_drawn(record, len(shown), len(pairs))} Every map is scaled to its own maximum: brightness compares "
        "places in one map, never two maps. A map without any relevance is grey."
    )
    # The table of explainers holds these numbers too, and more of them.
    summarised = material.table("interpret", "interpretability")["metric"].isin(faithfulness.ON_PARTS).any()
    columns, scores = content.grounding_rows({} if summarised else record.get("metrics", {}))
    mark = ", measured against user-supplied masks" if record.get("parts") == "user-supplied" else ""
    return {
        "rule": rule,
        "explainers": explainers,
        "captions": [_explained(material, rows, query, image) for query, image in shown],
        "columns": columns,
        "scores": scores,
        "scores_caption": f"Percent over {record.get('grounded', 0):,} phrases with a mask{mark}, 95 % intervals over "
        "people. A map beats a control when the interval of the difference is above 0.",
    }


def _drawn(record: Mapping[str, Any], shown: int, pairs: int) -> str:
    """What was explained, as the settings say."""
    asked = dict(dict(record.get("settings") or {}).get("interpret") or {})
    first = f"The first {shown} of {pairs}" if shown < pairs else f"All {pairs}"
    if asked.get("phrase") or asked.get("query"):
        where = "on the image that was named" if asked.get("image") else "on images that were drawn at random"
        own = "" if asked.get("image") or asked.get("phrase") else ", a caption of the data on its own image"
        return f"{first}: words that were given, {where}{own}."
    if asked.get("image"):
        return f"{first} captions of the image that was named."
    own = "with all images of its person" if asked.get("scope") == "all_positives" else "each on its own image"
    return f"{first} captions that were drawn at random, {own}."


def _explained(material: Material, rows: pd.DataFrame, query: str, image: str) -> dict[str, Any]:
    found = rows[(rows["query_id"] == query) & (rows["image_id"] == image)].sort_values("char_start", kind="stable")
    keys = list(zip(found["char_start"], found["char_end"], found["phrase"].astype(str), strict=True))
    sentence = _sentence(material, query, list(dict.fromkeys(keys)))
    parts = [key for key in dict.fromkeys(keys) if key[2] != sentence or len(set(keys)) == 1]
    number = {key: place for place, key in enumerate(parts, start=1)}
    spans = [(int(start), int(end), place) for (start, end, _), place in number.items()]
    strips: dict[str, list[dict[str, Any]]] = {name: [] for name in dict.fromkeys(rows["explainer"])}
    for row, key in zip(named_rows(found), keys, strict=True):
        strips[row.explainer].append(
            {
                "number": number.get(key),
                "phrase": row.phrase if key in number else "the whole caption",
                "similarity": grids.number(row.similarity, digits=3),
                "picture": _overlay(material, row),
            }
        )
    return {
        "sentence": html.mark_phrases(sentence, spans),
        "image_id": image,
        "picture": material.picture(image),
        "strips": [{"explainer": name, "views": views} for name, views in strips.items() if views],
    }


def _sentence(material: Material, query: str, keys: list[tuple[int, int, str]]) -> str:
    """The caption of a query; of one that is not in the data the text that holds all its phrases."""
    known = material.sentences.get(query)
    if known is not None and query != USER_QUERY:
        return known
    longest = max((phrase for _, _, phrase in keys), key=len)
    inside = all(longest[start:end] == phrase for start, end, phrase in keys)
    return longest if inside else " · ".join(phrase for _, _, phrase in keys)


def _overlay(material: Material, row: Any) -> html.Embedded | None:
    path = material.path(row.image_id)
    if path is None:
        return None
    try:
        width, height = _size(material, row.image_id, path)
        size = (_MAP_SIZE[0], max(1, round(_MAP_SIZE[0] * width / max(height, 1))))
        return html.embed_pixels(overlay(read_pixels(path, size), grid_map(row)))
    except DataError:
        return None


def _size(material: Material, image_id: str, path: Path) -> tuple[int, int]:
    """Width and height of an image, from the data or from its file.

    Raises:
        DataError: it belongs to no dataset and cannot be read.
    """
    row = material.row_of.get(image_id)
    if row is not None:
        return int(row.width), int(row.height)
    try:
        with Image.open(path) as opened:
            return opened.size
    except (OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}).") from None


def faith(material: Material) -> Section:
    """Return what masking, sanity checks and binding tests say about the maps."""
    frame = material.table("interpret", "interpretability")
    if not len(frame):
        return None
    record = material.record("interpret")
    frame = faithfulness.in_order(frame, record.get("explainers", []))
    # Scores on parts, of meaning and of form remove nothing, so no fill changes them.
    plain = faithfulness.plain_rows(frame)
    others = sorted(set(plain["judge"].astype(str)) - {""})
    encoder = [f"Alignment is judged by {', '.join(others)}, which had no part in the maps."] if others else []
    fills = faithfulness.fills(frame)
    return {
        "limits": faithfulness.limits(record.get("parts")),
        **_tables(material, plain, "95 % intervals over people"),
        "fills": [_fill(material, frame[frame["fill"] == name], name, place) for place, name in enumerate(fills)],
        "terms": faithfulness.terms(frame),
        "sentences": faithfulness.sentences(frame),
        "notes": beside.unique([*encoder, *record.get("cautions", []), *record.get("notes", [])]),
    }


def _tables(material: Material, rows: pd.DataFrame, caption: str) -> dict[str, Any]:
    """Explainers beside their first control, and folded away beside every one."""
    given = material.record("interpret").get("parts") == "user-supplied"
    return {
        "grids": faithfulness.metric_grids(rows, caption=caption, user_supplied=given),
        "controls": faithfulness.control_grids(rows, user_supplied=given),
    }


def _fill(material: Material, frame: pd.DataFrame, name: str, place: int) -> dict[str, Any]:
    """What was measured with one filling: the table, every control, the curves, other judges."""
    some = faithfulness.at_headline(frame)
    shares = sorted(set(some["removed"].dropna()))
    share = f"{100 * shares[0]:.0f} % of the patches removed, " if shares else ""
    caption = f"{share}filled by {name}; 95 % intervals over people"
    own = frame[frame["judge"] == ""]
    drawn = [_curves(material, own, metric, name, place) for metric in faithfulness.DRAWN]
    return {
        "name": name,
        **_tables(material, some[some["judge"] == ""], caption),
        "judges": faithfulness.judge_grid(some, caption=f"Damage to this model and to others. {caption}"),
        "figures": [figure for figure in drawn if figure is not None],
    }


def _curves(material: Material, frame: pd.DataFrame, metric: str, fill: str, place: int) -> dict[str, Any] | None:
    rows = curves.curve_rows(frame, metric, fill)
    if not len(rows):
        return None
    # A fill may be a path of a user's function, which is no file name.
    paths = curves.faithfulness_curves(rows, material.stem(f"faithfulness-{place + 1}-{metric}"))
    name = faithfulness.measure(metric).name
    title = f"Over the removed share, filled by {fill}: {name}"
    alt = (
        f"Line charts of {name}: the map and its controls, one panel for each of {rows['explainer'].nunique()} "
        "explainers, with 95 % bands; the numbers are in the CSV file beside the figure"
    )
    return material.figure(paths, title, alt)
