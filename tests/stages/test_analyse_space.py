"""Two models on the same images, and how tight people are in each: planted features for what is said of them."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from stages.test_analyse import trained, write_people

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.runs import Run
from reidctl.stages import analyse, analyse_space, kept_features

PEOPLE, EACH = 24, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """People of two datasets under four cameras, without pictures."""
    folder = write_people(tmp_path_factory.mktemp("space") / "data", people=PEOPLE, each=EACH)
    images = tables.read_table(folder / "images.parquet", "images")
    images["dataset"] = ["x" if number < PEOPLE * EACH // 3 else "y" for number in range(len(images))]
    tables.write_table(folder / "images.parquet", "images", images)
    return folder


def plant(monkeypatch, **angle):
    """Make the images of a person lie `angle` from a direction of their own, by the name of the run."""
    asked = []

    def collect(subject_run):
        def of(method, corpus, *, device):
            asked.append((subject_run, list(corpus.images["image_id"])))
            people = sorted(set(corpus.images["person_id"]))
            rows = np.zeros((len(corpus.images), 2 * len(people)), np.float32)
            for row, person in enumerate(corpus.images["person_id"]):
                place, turn = people.index(person), angle[subject_run] * (-1) ** row
                rows[row, 2 * place : 2 * place + 2] = np.cos(turn), np.sin(turn)
            return {"embedding": rows} | ({"i2i": rows} if subject_run == "two" else {})

        return of

    original = kept_features.kept_features

    def kept(subject, corpus, *, cache=True):
        monkeypatch.setattr(kept_features, "collect_features", collect(subject.run.path.name))
        return original(subject, corpus, cache=cache)

    monkeypatch.setattr("reidctl.stages.analyse_parts.kept_features", kept)
    return asked


@pytest.fixture
def pair(tmp_path, data, monkeypatch):
    """A tight model, a loose one, and what was computed."""
    runs = [trained(tmp_path / name, data, name="clip", config={}, described=False) for name in ("ours", "base")]
    return *runs, plant(monkeypatch, ours=0.2, base=0.6, two=0.6)


def apart(angle):
    """Mean distance of four images at +-angle: of six pairs four lie across and two coincide."""
    return 4 / 6 * (1 - np.cos(2 * angle))


@pytest.mark.covers(219)
def test_planted_people_have_the_known_distances_as_a_whole_and_in_each_dataset(pair):
    record = analyse.run(pair[0], what=["compactness"], device="cpu")
    found = record["metrics"]
    for name in ("", "x.", "y."):
        intra, inter, ratio, silhouette = (
            found[f"compactness.embedding.{name}{metric}"] for metric in ("intra", "inter", "ratio", "silhouette")
        )
        assert intra["value"] == pytest.approx(apart(0.2), abs=1e-6) and inter["value"] == pytest.approx(1, abs=1e-6)
        assert ratio["value"] == pytest.approx(apart(0.2), abs=1e-6) and ratio["chance"] == 1
        assert silhouette["value"] == pytest.approx(1 - apart(0.2), abs=1e-6) and silhouette["control"] < 0
        for entry in (intra, inter, ratio, silhouette):
            assert entry["low"] - 1e-9 <= entry["value"] <= entry["high"] + 1e-9
    assert any("every person counts the same" in note for note in record["notes"])


def test_images_under_one_camera_do_not_count(data, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    images = tables.read_table(data / "images.parquet", "images").assign(camera_id="c0")
    tables.write_table(folder / "images.parquet", "images", images)
    plant(monkeypatch, ours=0.2)
    run = trained(tmp_path / "ours", folder, name="clip", config={}, described=False)
    with pytest.raises(DataError, match="nobody has two images under different cameras"):
        analyse.run(run, what=["compactness"], device="cpu")
    images["camera_id"] = None
    tables.write_table(folder / "images.parquet", "images", images)
    found = analyse.run(run, what=["compactness"], device="cpu")["metrics"]
    assert found["compactness.embedding.intra"]["value"] == pytest.approx(apart(0.2), abs=1e-6)


@pytest.mark.covers(217)
def test_another_model_is_measured_on_the_same_images_and_the_difference_is_paired(pair):
    ours, base, asked = pair
    record = analyse.run(ours, what=["tsne,compactness"], against=base, limit=60, device="cpu")
    assert [name for name, _ in asked] == ["ours", "base"] and asked[0][1] == asked[1][1]
    assert len(asked[0][1]) == record["images"] <= 60
    found = record["metrics"]
    for name, expected in (("embedding", apart(0.2)), ("against.embedding", apart(0.6))):
        assert found[f"compactness.{name}.ratio"]["value"] == pytest.approx(expected, abs=1e-6)
        assert found[f"tsne.{name}.person"]["value"] == pytest.approx(1 - expected, abs=1e-6)
    for name in ("compactness.difference.embedding.ratio", "compactness.difference.embedding.y.ratio"):
        assert found[name]["value"] == pytest.approx(apart(0.2) - apart(0.6), abs=1e-6) and found[name]["high"] < 0
    for name in ("compactness.difference.embedding.silhouette", "tsne.difference.embedding.person"):
        assert found[name]["value"] == pytest.approx(apart(0.6) - apart(0.2), abs=1e-6) and found[name]["low"] > 0
    assert record["against"]["run"] == str(base.path.resolve()) and record["against"]["method"] == "clip"
    assert any("less `embedding` of clip (base)" in note for note in record["notes"])
    json.dumps(record, allow_nan=False)


@pytest.mark.covers(216, 217)
def test_the_figure_is_drawn_from_what_both_runs_keep(pair):
    ours, base, asked = pair
    first = analyse.run(ours, what=["tsne"], against=base, device="cpu")
    assert len(asked) == 2 and first["against"]["features"]["cached"] is False
    kept = {name: sorted(path.name for path in (run.path / "features").iterdir()) for name, run in
            (("ours", ours), ("base", base))}  # fmt: skip
    assert kept == {"ours": [first["features"]["key"]], "base": [first["against"]["features"]["key"]]}
    again = analyse.run(ours, what=["tsne"], against=base, device="cpu", force=True)
    assert len(asked) == 2 and again["features"]["cached"] and again["against"]["features"]["cached"]
    assert again["outputs"] == first["outputs"] and again["metrics"] == first["metrics"]
    assert analyse.run(base, what=["compactness"], device="cpu")["features"]["cached"], "its own analysis reads it too"


@pytest.mark.covers(217)
def test_both_panels_hold_the_same_images_and_name_models_and_numbers(pair):
    ours, base, _ = pair
    record = analyse.run(ours, what=["tsne"], against=base, highlight=["x:003"], seed=4, device="cpu")
    folder = ours.stage_dir("analyse")
    points = pd.read_csv(folder / "tsne_against.csv")
    assert list(points.columns) == ["panel", "model", "feature", "image_id", "person_id", "x", "y"]
    left, right = (points[points["panel"] == panel] for panel in ("against", "this"))
    assert list(left["image_id"]) == list(right["image_id"]) and len(left) == record["images"]
    assert set(left["model"]) == {"clip (base)"} and set(right["model"]) == {"clip (ours)"}
    assert not np.allclose(left[["x", "y"]], right[["x", "y"]].to_numpy())
    svg = " ".join((folder / "tsne_against.svg").read_text().split())
    value = record["metrics"]["tsne.embedding.person"]["value"]
    for text in (
        "clip (base)",
        "clip (ours)",
        f"silhouette of people {value:.3f}",
        "x:003",
        "everybody else",
        "seed 4",
    ):
        assert text in svg
    assert "two t-SNE maps cannot be compared" in svg
    with Image.open(folder / "tsne_against.png") as picture:
        assert picture.width > 1000
    alone = analyse.run(ours, what=["tsne"], seed=4, device="cpu")
    assert not (folder / "tsne_against.png").exists() and "against" not in alone


def test_images_are_compared_by_what_each_model_compares_images_by(pair, data, tmp_path):
    two = trained(tmp_path / "two", data, name="clip", config={}, described=False)
    record = analyse.run(pair[0], what=["compactness", "tsne"], against=two, device="cpu")
    found = set(record["metrics"])
    assert {"compactness.against.i2i.ratio", "compactness.difference.embedding.ratio"} <= found
    assert {"tsne.against.i2i.person", "tsne.difference.embedding.person"} <= found
    other = set(analyse.run(two, what=["compactness"], against=pair[0], device="cpu")["metrics"])
    assert {"compactness.against.embedding.ratio", "compactness.difference.i2i.ratio"} <= other


def test_another_run_that_cannot_be_compared_is_refused_in_a_sentence(pair, tmp_path, data):
    ours, base, _ = pair
    kept = analyse.run(ours, what=["compactness"], device="cpu")
    with pytest.raises(UsageError, match="compared with itself"):
        analyse.run(ours, what=["tsne"], against=Run(ours.path), device="cpu")
    with pytest.raises(UsageError, match="compares tsne and compactness"):
        analyse.run(ours, what=["probes"], against=base, device="cpu")
    with pytest.raises(DataError, match="nobody has no finished `finetune` stage"):
        analyse.run(ours, what=["tsne"], against=Run(tmp_path / "nobody"), device="cpu")
    source = analyse.find_source(base)
    people = source.person_digests(tables.read_table(data / "images.parquet", "images")).head(5)
    seen = pd.DataFrame({"kind": "person", "digest": people["digest"]})
    tables.write_table(base.table("finetune", "seen"), "seen", seen)
    with pytest.raises(DataError, match=r"--against .*base: 5 people of the test split were used to train this model"):
        analyse.run(ours, what=["tsne"], against=base, device="cpu")
    assert analyse.run(ours, what=["compactness"], device="cpu")["status"] == "up-to-date"
    assert ours.record("analyse")["metrics"] == kept["metrics"]


def test_the_stage_is_up_to_date_until_the_other_model_changes(pair):
    ours, base, _ = pair
    asked = {"what": ["compactness"], "against": base, "device": "cpu"}
    analyse.run(ours, **asked)
    assert analyse.run(ours, **asked)["status"] == "up-to-date"
    path = base.stage_dir("finetune") / "stage.json"
    record = json.loads(path.read_text())
    record["outputs"]["finetune/model.safetensors"]["sha256"] = "00"
    path.write_text(json.dumps(record))
    assert analyse.run(ours, **asked)["status"] == "done"


def test_people_of_every_dataset_stand_out_in_turns():
    people = ["p"] * 3 + ["q"] * 2 + ["x"] * 4 + ["y"]
    images = pd.DataFrame({"person_id": people, "dataset": ["a"] * 5 + ["b"] * 5})
    assert analyse_space.of_each_dataset(images, 3) == ("p", "x", "q")
    assert analyse_space.of_each_dataset(images, 9) == ("p", "x", "q", "y")
