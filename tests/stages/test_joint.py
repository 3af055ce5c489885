"""`evaluate --joint`: the queries of all datasets in one gallery of all, on vectors and ranks worked by hand."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import write_dataset
from twotask import install, trained

from reidctl import tables
from reidctl.errors import DataError
from reidctl.evaluation import protocols
from reidctl.methods import clip
from reidctl.retrieval.store import EmbeddingTable, Stored
from reidctl.stages import evaluate, measuring

# People p0 and p1 are of dataset a, p2 is of b; image -0 is a query by camera c0, image -1 is searched, by camera c1.
IMAGES = {
    "p0-0": (1, 0, 0), "p0-1": (0.8, 0, 0.6), "p1-0": (0, 0, 1), "p1-1": (0.6, 0, 0.8),
    "p2-0": (0, 1, 0), "p2-1": (0.96, 0.28, 0),
}  # fmt: skip
TEXTS = {"p0-0-full": (0.8, 0.6, 0)}


def of_two_datasets(folder, **columns):
    """Write the data; a column is given as image -> value."""
    write_dataset(folder, people=3, per_person=2, splits=dict.fromkeys(range(3), "test"))
    images = tables.read_table(folder / "images.parquet", "images")
    images["dataset"] = ["b" if name.startswith("p2") else "a" for name in images["image_id"]]
    for column, values in columns.items():
        images[column] = [values.get(name, old) for name, old in zip(images["image_id"], images[column], strict=True)]
    captions = tables.read_table(folder / "captions.parquet", "captions")
    tables.write_table(folder / "images.parquet", "images", images)
    tables.write_table(folder / "captions.parquet", "captions", captions[captions["caption_id"].isin(TEXTS)])
    return folder


def by_hand(subject=None):
    """The vectors above, whatever the model says."""
    rows = pd.DataFrame(
        {
            "item_id": [*IMAGES, *TEXTS],
            "role": "gallery",
            "modality": ["image"] * len(IMAGES) + ["text"] * len(TEXTS),
            "condition": "standard",
        }
    )
    table = EmbeddingTable(rows, np.array([*IMAGES.values(), *TEXTS.values()], np.float32))
    return Stored(table, table)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Return a run with a model of those vectors, and data with some columns changed."""
    install(monkeypatch, clip.Clip)
    monkeypatch.setattr(evaluate, "embed", by_hand)
    return lambda **columns: trained(tmp_path / "run", of_two_datasets(tmp_path / "data", **columns))


def joint(run, *directions):
    """The joint protocols by direction, and the notes."""
    subject = measuring.told_apart(measuring.find_subject(run, device="cpu"))
    parts = {name: measuring.protocols_of(subject, by_hand(), name)[0] for name in measuring.datasets_of(subject)}
    found, notes = measuring.joint_protocols(subject, by_hand(), parts, directions=directions)
    return {protocol.direction: protocol for protocol in found}, notes


def matches(protocol):
    """Query -> the right images in its ranking, best first."""
    rows = protocols.evaluate(protocol).rankings
    return {name: list(part.loc[part["match"], "gallery_id"]) for name, part in rows.groupby("query_id")}


@pytest.mark.covers(220)
def test_the_image_of_another_dataset_that_ranks_first_counts_in_the_joint_table_alone(made):
    run = made()
    record = evaluate.run(run, device="cpu", joint=True)
    found = {name: facts["rows"]["standard"] for name, facts in record["tables"].items()}
    assert set(found) == {"t2i:a", "i2i:a", "i2i:b", "t2i:joint", "i2i:joint"}
    assert all(found[name]["mAP"][0] == found[name]["rank1"][0] == 1 for name in ("t2i:a", "i2i:a", "i2i:b"))
    # p0-0 finds p2-1 (cosine 0.96) before p0-1 (0.8); the other two queries find their own person first.
    assert found["i2i:joint"]["rank1"][0] == pytest.approx(2 / 3)
    assert found["i2i:joint"]["mAP"][0] == pytest.approx((1 / 2 + 1 + 1) / 3)
    # The text finds p2-1 (0.936), p0-0 (0.8), p0-1 (0.64), ...
    assert found["t2i:joint"]["rank1"][0] == 0
    assert found["t2i:joint"]["mAP"][0] == pytest.approx((1 / 2 + 2 / 3) / 2)
    counts = {name: (facts["queries"], facts["gallery"], facts["rule"]) for name, facts in record["tables"].items()}
    assert counts["i2i:joint"] == (3, 3, "same_camera") and counts["t2i:joint"] == (1, 6, "none")
    assert any("b without captions: the images are searched" in note for note in record["notes"])
    # What guards the datasets is not moved by it.
    assert record["metrics"]["i2i"]["rank1"] == record["metrics"]["t2i"]["rank1"] == 1
    assert record["metrics"]["joint.i2i"]["rank1"] == pytest.approx(2 / 3)
    assert record["metrics"]["joint.t2i"]["mAP"] == pytest.approx(7 / 12)
    frame = tables.read_table(run.table("evaluate", "metrics"), "metrics")
    frame = frame[(frame["dataset"] == "joint") & (frame["metric"] == "mAP")]
    own = frame[frame["condition"] == "standard"].set_index("direction")
    assert own.loc["i2i", "value"] == pytest.approx(5 / 6) and own.loc["i2i", "low"] <= 5 / 6 <= own.loc["i2i", "high"]
    assert set(frame["condition"]) >= {"standard", "chance", "shuffled", "histogram"}


def test_a_camera_of_one_dataset_is_not_the_camera_of_that_name_of_another(made):
    # One person in both datasets; b's image was taken by b's camera c0, the query by a's.
    protocol = joint(made(person_id={"p2-0": "blocks:0", "p2-1": "blocks:0"}, camera_id={"p2-1": "c0"}), "i2i")[0][
        "i2i"
    ]
    assert matches(protocol)["p0-0"] == ["p2-1", "p0-1"]
    assert matches(protocol)["p2-0"] == ["p0-1"]  # p2-1 is by its own camera, b's c0


def test_within_a_dataset_the_same_camera_is_dropped_and_an_unknown_one_is_no_other_s(made):
    run = made(camera_id={"p0-1": "c0", "p1-0": None, "p1-1": None})
    found = joint(run, "i2i")[0]["i2i"]
    assert found.exclude == "same_camera"
    assert matches(found) == {"p0-0": [], "p1-0": ["p1-1"], "p2-0": ["p2-1"]}


def test_a_dataset_without_roles_asks_with_every_image_beside_one_that_has_roles(made):
    found = joint(made(role={"p2-0": None, "p2-1": None}), "i2i")[0]["i2i"]
    assert sorted(found.query.item) == ["p0-0", "p1-0", "p2-0", "p2-1"]
    assert sorted(found.gallery.item) == ["p0-1", "p1-1", "p2-0", "p2-1"]
    assert found.query.camera[list(found.query.item).index("p2-1")] == "b/c1"


@pytest.mark.parametrize(
    ("rules", "joined"),
    [
        (("same_camera", "same_camera"), "same_camera"),
        (("same_item", "same_item"), "same_item"),
        (("cloth_changing", "cloth_changing"), "cloth_changing"),
        (("same_camera", "same_item"), "same_camera"),
        (("cloth_changing", "same_item"), "same_camera"),
        (("same_outfit", "same_item"), "same_item"),
    ],
)
def test_what_is_dropped_is_what_the_datasets_agree_to_drop(made, rules, joined):
    (part,) = joint(made(), "i2i")[0].values()
    parts = [replace(part, exclude=rule, dataset=name) for name, rule in zip("ab", rules, strict=True)]
    found = protocols.together(parts)
    assert (found.exclude, found.dataset, len(found.gallery)) == (joined, "joint", 2 * len(part.gallery))


def test_a_direction_that_a_dataset_does_not_allow_is_left_out_and_named(made):
    run = made(role={"p2-0": None, "p2-1": None}, camera_id={"p2-0": None})
    record = evaluate.run(run, device="cpu", joint=True, measure=("t2i", "i2i", "it2i"))
    assert [name for name in record["tables"] if name.endswith("joint")] == ["t2i:joint"]
    said = [note for note in record["notes"] if note.startswith("joint, ")]
    assert any(note.startswith("joint, i2i: b without images of both roles, or cameras") for note in said)
    assert any(note.startswith("joint, it2i: b without captions") for note in said)
    # What was not asked for is not missed.
    assert joint(run, "t2i")[1] == [
        "joint, t2i: b without captions: the images are searched, and no text asks for them."
    ]


def test_every_further_protocol_and_ranking_is_measured_jointly_too(made, monkeypatch):
    run = made()
    monkeypatch.setitem(TEXTS, "p2-0-full", (0.6, 0.8, 0))
    of_two_datasets(measuring.find_source(run).folder)
    asked = {"measure": ("t2i", "i2i", "it2i", "single-shot"), "rerank": ("1/1/0.3",), "joint": True}
    found = evaluate.run(run, device="cpu", **asked)["tables"]
    assert {"t2i:joint", "i2i:joint", "it2i:joint", "i2i:joint:single-shot"} <= set(found)
    assert found["it2i:joint"]["queries"] == 2 and found["it2i:joint"]["gallery"] == 3
    assert "rerank-1/1/0.3" in found["i2i:joint"]["rows"] and found["i2i:joint:single-shot"]["gallery"] == 3
    parts = tables.read_table(run.table("evaluate", "slices"), "slices")
    assert {"a/c0", "b/c0"} <= set(parts.loc[(parts["dataset"] == "joint") & (parts["slice"] == "camera"), "part"])


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (dict.fromkeys(IMAGES, "a"), "single dataset, a, so there is no gallery of several"),
        (dict.fromkeys(("p2-0", "p2-1"), "joint"), "A dataset here is called `joint`"),
    ],
)
def test_data_without_a_joint_gallery_are_refused_and_the_old_result_stays(made, dataset, words):
    run = made(dataset=dataset)
    before = evaluate.run(run, device="cpu")
    with pytest.raises(DataError, match=words):
        evaluate.run(run, device="cpu", joint=True)
    assert evaluate.run(run, device="cpu") == {**before, "status": "up-to-date"}


def test_an_evaluation_without_it_is_what_it_was_and_an_analysis_takes_the_one_with_it(made):
    run = made()
    plain = evaluate.run(run, device="cpu")
    # These settings made the fingerprints of evaluations before there was a joint gallery.
    names = {"split", "query", "seed", "model", "training", "measure", "cutoffs", "rerank", "weight"}
    assert set(plain["settings"]) == names and not any("joint" in name for name in plain["tables"])
    assert not any("joint" in note for note in plain["notes"])
    both = evaluate.run(run, device="cpu", joint=True)
    assert both["status"] == "done" and both["settings"] == {**plain["settings"], "joint": True}
    assert {name: both["tables"][name] for name in plain["tables"]} == plain["tables"]
    assert evaluate.run(run, device="cpu", reuse=True) == {**both, "status": "up-to-date"}
    assert evaluate.run(run, device="cpu")["tables"] == plain["tables"]


def test_an_analysis_of_another_seed_does_not_record_what_it_did_not_measure(made):
    run = made()
    evaluate.run(run, device="cpu", joint=True, rerank=("1/1/0.3",))
    anew = evaluate.run(run, device="cpu", seed=1, reuse=True)
    assert anew["status"] == "done" and "joint" not in anew["settings"] and anew["settings"]["rerank"] == []
    assert evaluate.run(run, device="cpu", seed=1, joint=True, rerank=("1/1/0.3",))["status"] == "done"
