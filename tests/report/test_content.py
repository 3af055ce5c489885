"""What is chosen for the page, and how it is ordered."""

import pandas as pd
import pytest

from reidctl.report import content


def rankings(found, missed):
    rows = [
        {"query_id": f"{kind}{n:02d}", "rank": rank, "match": (rank == 1) == (kind == "f")}
        for kind, count in (("f", found), ("m", missed))
        for n in range(count)
        for rank in (1, 2)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("found", "missed", "right", "wrong"), [(20, 20, 3, 3), (20, 1, 5, 1), (1, 20, 1, 5), (0, 2, 0, 2), (9, 0, 6, 0)]
)
def test_half_of_the_shown_queries_are_failures_where_there_are_enough(found, missed, right, wrong):
    chosen, rule = content.pick_queries(rankings(found, missed), shown=6, seed=0)
    assert [sum(name[0] == kind for name in chosen) for kind in "fm"] == [right, wrong]
    assert f"{found} of {found + missed} queries" in rule and "seed 0" in rule


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_rows():
    frame = rankings(20, 20)
    first = content.pick_queries(frame, shown=6, seed=1)
    assert first == content.pick_queries(frame.sample(frac=1, random_state=0), shown=6, seed=1)
    assert first != content.pick_queries(frame, shown=6, seed=2)


def metrics():
    rows = [
        {
            "direction": d, "dataset": "x", "split": "test", "condition": c, "metric": m, "value": v, "low": None,
            "high": None, "queries": 1000, "skipped": 2, "gallery": 500,
        }
        for d in ("i2i", "t2i")
        for c, v in (("chance", 0.01), ("standard", 0.5))
        for m in ("mAP", "rank1")
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_metric_groups_put_text_to_image_and_the_model_first():
    groups = content.metric_groups(metrics())
    assert [group["title"].split(",")[0] for group in groups] == ["Text to image", "Image to image"]
    assert [row["name"] for row in groups[0]["rows"]] == ["model", "chance"]
    assert groups[0]["metrics"] == ["rank-1", "mAP"]
    assert groups[0]["rows"][0]["cells"][0] == content.Cell(0.5)
    assert groups[0]["rows"][0]["queries"] == "1,000"


def test_cards_hold_the_model_beside_chance():
    cards = content.headline_cards(metrics())
    assert cards[0] == {"label": "rank-1, text to image", "value": "50.0 %", "note": "chance 1.0"}


def test_pictures_show_different_people_first():
    images = pd.DataFrame({"image_id": list("abcd"), "person_id": ["1", "1", "1", "2"]})
    for seed in range(5):
        assert "d" in content.pick_images(images, shown=2, seed=seed)
    assert len(content.pick_images(images, shown=9, seed=0)) == 4


def test_grounding_rows_keep_the_order_of_controls():
    entry = {"value": 0.5, "low": 0.4, "high": 0.6}
    columns, rows = content.grounding_rows({"pointing": entry, "pointing.random": entry})
    assert columns[0] == "map" and len(columns) == 6
    assert [row["name"] for row in rows] == ["pointing"]
    assert rows[0]["cells"][2] is None
