"""Metrics on parts of the queries: parts by hand, disjoint and complete, and what they show of a model that fails."""

import numpy as np
import pandas as pd
import pytest

from reidctl import tables
from reidctl.errors import DataError
from reidctl.evaluation.protocols import Protocol, Side, evaluate, image_to_image, text_to_image
from reidctl.evaluation.slices import FEWEST_PEOPLE, MOST_PARTS, slice_rows
from reidctl.retrieval.store import from_frame
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

LENGTHS = (3, 10, 11, 20, 21, 40, 41, 90)


def side(rows, vectors):
    frame = pd.DataFrame(rows).astype(object).where(lambda f: f.notna(), None)
    columns = [frame[name].to_numpy(dtype=object) for name in ("item", "image", "person", "camera")]
    return Side(*columns, np.full(len(frame), None, dtype=object), np.asarray(vectors, np.float32))


def made(seed=0, *, people=12, each=4, direction="t2i", noise=0.8):
    """A protocol, its images and captions: random cameras, views and lengths; some people without a second image."""
    rng = np.random.default_rng(seed)
    images, captions, query, gallery, asked, shown = [], [], [], [], [], []
    centres = rng.normal(size=(people, 8))
    for person in range(people):
        for shot in range(1 if person % 5 == 4 else each):
            name = f"p{person}s{shot}"
            camera = str(rng.choice(["c1", "c2", "c3"])) if rng.random() < 0.9 else None
            known = {"view": str(rng.choice(["front", "back"])), "occluder": str(rng.choice(["", "car"]))}
            images.append({"image_id": name, "attributes": known if rng.random() < 0.8 else None})
            row = {"image": name, "person": f"toy:{person}", "camera": camera}
            gallery.append({"item": name, **row})
            shown.append(centres[person] + noise * rng.normal(size=8))
            item = name if direction == "i2i" else f"{name}-t"
            query.append({"item": item, **row})
            asked.append(centres[person] + noise * rng.normal(size=8))
            captions.append({"caption_id": f"{name}-t", "text": " ".join(["word"] * int(rng.choice(LENGTHS)))})
    unit = [np.asarray(v) / np.linalg.norm(v, axis=1, keepdims=True) * (1 - 1e-6) for v in (asked, shown)]
    exclude = "none" if direction == "t2i" else "same_item"
    protocol = Protocol(direction, "toy", "test", "standard", side(query, unit[0]), side(gallery, unit[1]), exclude)
    return protocol, evaluate(protocol, resamples=20), pd.DataFrame(images), pd.DataFrame(captions)


def parts(rows, name, column="queries"):
    found = rows[(rows["slice"] == name) & (rows["metric"] == "rank1")]
    return dict(zip(found["part"], found[column], strict=True))


def hand_made():
    """Five queries of three people; only person a is found."""
    cameras, owners = ["c1", "c1", "c2", "c2", "c9"], list("aabbc")
    rows = [
        {"item": f"t{n}", "image": f"i{n}", "person": p, "camera": c}
        for n, (p, c) in enumerate(zip(owners, cameras, strict=True))
    ]
    gallery = [{**row, "item": row["image"]} for row in rows[:4]]
    asked = np.eye(4)[[0, 0, 0, 0, 0]]
    shown = np.eye(4)[[0, 0, 1, 1]]
    protocol = Protocol("t2i", "toy", "test", "standard", side(rows, asked), side(gallery, shown), "none")
    images = pd.DataFrame({"image_id": [f"i{n}" for n in range(5)], "attributes": [{"view": "front"}] * 5})
    captions = pd.DataFrame({"caption_id": [f"t{n}" for n in range(5)], "text": ["a b", "a b", "a b", "a " * 15, "a"]})
    return protocol, evaluate(protocol), images, captions


def test_parts_by_hand():
    protocol, evaluation, images, captions = hand_made()
    rows = slice_rows(protocol, evaluation, images, captions, cut=lambda text: len(text) > 20)
    # c9's only query has no match: no row. One view and two matches for everyone: no slice.
    assert set(rows["slice"]) == {"camera", "words", "cut"}
    assert parts(rows, "camera", "value") == {"c1": 1.0, "c2": 0.0}
    assert parts(rows, "words") == {"1-10": 3, "11-20": 1}
    assert parts(rows, "words", "value") == {"1-10": 2 / 3, "11-20": 0.0}
    assert parts(rows, "words", "skipped") == {"1-10": 1, "11-20": 0}
    assert parts(rows, "cut") == {"no": 3, "yes": 1}
    assert parts(rows, "words", "people") == {"1-10": 2, "11-20": 1}
    assert set(rows["metric"]) == set(evaluation.summary) and set(rows["condition"]) == {"standard"}


def test_few_people_have_values_but_no_interval():
    protocol, evaluation, images, captions = made(people=30)
    images.loc[:1, "attributes"] = pd.Series([{"pose": "lying"}] * 2)  # of one person
    rows = slice_rows(protocol, evaluation, images, captions)
    few = rows["people"] < FEWEST_PEOPLE
    assert few.any() and not few.all()
    assert rows.loc[few, ["low", "high"]].isna().all(axis=None) and rows["value"].notna().all()
    assert rows.loc[~few, ["low", "high"]].notna().all(axis=None)
    assert (rows.loc[~few, "low"] <= rows.loc[~few, "high"]).all()


def test_five_people_are_enough_for_an_interval_and_four_are_not():
    protocol, evaluation, images, _ = made(people=12)
    number = images["image_id"].str.extract(r"p(\d+)s")[0].astype(int)
    images["attributes"] = [{"pose": "few" if n < 4 else "enough" if n < 9 else "rest"} for n in number]
    rows = slice_rows(protocol, evaluation, images, None)
    assert parts(rows, "pose", "people") == {"enough": 5, "few": 4, "rest": 3}
    assert {part: not np.isnan(low) for part, low in parts(rows, "pose", "low").items()} == {
        "enough": True, "few": False, "rest": False,
    }  # fmt: skip


@pytest.mark.parametrize("direction", ["t2i", "i2i"])
@pytest.mark.parametrize("seed", range(6))
def test_parts_are_disjoint_and_their_weighted_mean_is_the_whole(seed, direction):
    protocol, evaluation, images, captions = made(seed, direction=direction, noise=0.3 + 0.3 * seed)
    rows = slice_rows(protocol, evaluation, images, captions, cut=lambda text: len(text) > 100, resamples=20)
    assert {"camera", "view", "occluder"} <= set(rows["slice"])
    assert ({"words", "cut", "match-camera"} & set(rows["slice"]) == set()) == (direction == "i2i")
    assert evaluation.ranking.queries.skipped or direction == "t2i"
    for (_, metric), found in rows.groupby(["slice", "metric"]):
        assert found["queries"].sum() == evaluation.ranking.queries.scored
        whole = (found["value"] * found["queries"]).sum() / found["queries"].sum()
        assert whole == pytest.approx(evaluation.summary[metric].value)
        assert len(found) > 1 and not found["part"].duplicated().any()


def test_unrecorded_values_are_a_part_of_their_own_and_empty_ones_are_none():
    rows = slice_rows(*made(5, people=20))
    assert list(parts(rows, "camera")) == ["c1", "c2", "c3", "unknown"]
    assert list(parts(rows, "occluder")) == ["car", "none", "unknown"]


def test_an_attribute_with_many_values_or_an_unlisted_one_is_no_slice():
    protocol, evaluation, images, captions = made(people=30)
    images["attributes"] = [
        {"weather": f"w{n}", "gender": "ab"[n % 2], "pose": "ab"[n % 2]} for n in range(len(images))
    ]
    assert len(images) > MOST_PARTS
    names = set(slice_rows(protocol, evaluation, images, captions)["slice"])
    assert "pose" in names and not {"weather", "gender"} & names


def test_carried_things_make_two_parts():
    protocol, evaluation, images, captions = made()
    images["attributes"] = [{"carried": ["", "red bag", "phone"][n % 3]} for n in range(len(images))]
    assert list(parts(slice_rows(protocol, evaluation, images, captions), "carried")) == ["nothing", "something"]


def test_match_camera_says_where_the_relevant_images_are():
    cameras = ["c1", "c1", "c1", "c2", "c2"]
    rows = [
        {"item": f"t{n}", "image": f"i{n}", "person": p, "camera": c}
        for n, (p, c) in enumerate(zip("aabbc", cameras, strict=True))
    ]
    gallery = [{**row, "item": row["image"]} for row in rows]
    gallery[4]["camera"] = "c3"
    vectors = np.eye(5)
    protocol = Protocol("t2i", "toy", "test", "standard", side(rows, vectors), side(gallery, vectors), "none")
    images = pd.DataFrame({"image_id": [f"i{n}" for n in range(5)], "attributes": None})
    assert parts(slice_rows(protocol, evaluate(protocol), images, None), "match-camera") == {
        "same": 2, "both": 2, "other": 1,
    }  # fmt: skip


def test_the_order_of_the_queries_changes_no_bit():
    protocol, _, images, captions = made(4, people=20)
    order = np.random.default_rng(0).permutation(len(protocol.query))
    names = ("item", "image", "person", "camera", "outfit", "vectors")
    mixed = Side(*(getattr(protocol.query, name)[order] for name in names))
    other = Protocol("t2i", "toy", "test", "standard", mixed, protocol.gallery, "none")
    first = slice_rows(protocol, evaluate(protocol), images, captions, resamples=50)
    second = slice_rows(other, evaluate(other), images.iloc[::-1], captions.iloc[::-1], resamples=50)
    pd.testing.assert_frame_equal(first, second, check_exact=True)


def test_rows_fit_their_table(tmp_path):
    tables.write_table(tmp_path / "slices.parquet", "slices", slice_rows(*made(), resamples=20))
    protocol, evaluation, images, _ = hand_made()
    nothing = slice_rows(protocol, evaluation, images.assign(attributes=None), None).iloc[:0]
    tables.write_table(tmp_path / "empty.parquet", "slices", nothing)
    assert len(tables.read_table(tmp_path / "slices.parquet", "slices"))


def test_unknown_images_and_captions_are_refused():
    protocol, evaluation, images, captions = hand_made()
    with pytest.raises(DataError, match=r"1 images of queries are not in the images table, e\.g\. `i0`"):
        slice_rows(protocol, evaluation, images.iloc[1:], captions)
    with pytest.raises(DataError, match=r"1 text queries are not in the captions table, e\.g\. `t4`"):
        slice_rows(protocol, evaluation, images, captions.iloc[:4])


@pytest.fixture(scope="module")
def synthped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthped")
    config = SynthConfig(
        people=40, images_per_person=6, size=(64, 32), occlusion=0.5, train_fraction=0.1, val_fraction=0
    )
    write_dataset(config, folder, workers=1)
    images = tables.read_table(folder / "images.parquet", "images")
    captions = tables.read_table(folder / "captions.parquet", "captions")
    return images[images["split"] == "test"], captions[captions["kind"] == "full"]


def blind_under_occlusion(images, captions, seed=0):
    """Vectors of a model that knows everybody, except in pictures (or of texts) where the person is occluded."""
    rng = np.random.default_rng(seed)
    hidden = {row.image_id: row.attributes["occluded"] == "yes" for row in images.itertuples()}
    person = dict(zip(images["image_id"], images["person_id"], strict=True))
    centre = {name: rng.normal(size=32) for name in sorted(set(person.values()))}
    items = [(name, "image", name) for name in images["image_id"]]
    items += [(c, "text", i) for c, i in zip(captions["caption_id"], captions["image_id"], strict=True) if i in person]
    values = np.stack([rng.normal(size=32) + (0 if hidden[i] else 50) * centre[person[i]] for _, _, i in items])
    frame = pd.DataFrame(items, columns=["item_id", "modality", "image_id"])
    frame["person_id"] = frame["image_id"].map(person)
    fixed = {"role": "query", "condition": "standard", "dataset": "synthped-a", "split": "test", "camera_id": None}
    frame = frame.drop(columns="image_id").assign(**fixed)
    return from_frame(frame.assign(embedding=tables.vectors(values / np.linalg.norm(values, axis=1, keepdims=True))))


@pytest.mark.covers(169)
@pytest.mark.parametrize("direction", ["t2i", "i2i"])
def test_a_model_that_fails_under_occlusion_shows_it_and_cameras_come_apart(synthped, direction):
    images, captions = synthped
    name = images["dataset"].iloc[0]
    vectors = blind_under_occlusion(images, captions)
    if direction == "t2i":
        protocol = text_to_image(images, captions, vectors, dataset=name, split="test")
    else:
        protocol = image_to_image(images, vectors, dataset=name, split="test")
    evaluation = evaluate(protocol)
    rows = slice_rows(protocol, evaluation, images, captions)
    rank1, low = parts(rows, "occlusion", "value"), parts(rows, "occlusion", "low")
    assert set(rank1) == {"yes", "no"}
    high = parts(rows, "occlusion", "high")
    assert rank1["no"] > 0.9 and rank1["yes"] < 0.4 and high["yes"] < low["no"]
    # The same people, the cameras differ in nothing: no camera stands out as occlusion does.
    cameras = parts(rows, "camera", "value")
    assert set(cameras) == set(images["camera_id"]) and len(cameras) == 4
    assert max(cameras.values()) - min(cameras.values()) < rank1["no"] - rank1["yes"]
    assert {"pose", "view", "blur"} <= set(rows["slice"])
