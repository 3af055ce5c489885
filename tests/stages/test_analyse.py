"""The analyse stage: planted features of rendered people, and an untrained micro model for everything around it."""

import json
from datetime import UTC, datetime
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.batch import Batch
from reidctl.cli.analyse import _lines
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import build_method, load_method, save_method
from reidctl.methods.clip import Clip
from reidctl.pixels import normalise, read_pixels
from reidctl.runs import Run, digest
from reidctl.stages import analyse, features, kept_features
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

BDAM = {"depth": 1, "heads": 2, "text_pool": "end"}
BODY = {"gender": ("man", "woman"), "build": ("slim", "average", "heavy")}
CLOTHES = {"upper_colour": ("red", "blue", "green", "black"), "lower_type": ("trousers", "skirt", "shorts")}
SKIN = ("pale", "dark")
SOME = 48  # images: probes of all are slow
OF_HPL = {"attention", "pseudo", "words", "alarms"}
DONE = [name for name in analyse.DEFAULT if name not in OF_HPL]


def trained(folder, data, *, name="bdam", config=BDAM, described=True, selected_on="val"):
    """A run whose untrained model claims to have been trained on nobody in `data`."""
    run = Run(folder)
    torch.manual_seed(0)
    files = save_method(build_method(name, config, build("clip:micro"), 4), run.stage_dir("finetune"))
    tables.write_table(run.table("finetune", "seen"), "seen", tables.empty("seen"))
    run.finish(
        "finetune", settings={}, inputs={"images": digest(data / "images.parquet")}, outputs=files,
        started=datetime.now(UTC),
        extra={
            "method": name, "data": str(data.resolve()), "selected_on": selected_on,
            "described": str(data / "captions.parquet") if described else None,
        },
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Rendered people: 44 of them in the test split, most with a look-alike."""
    folder = tmp_path_factory.mktemp("people") / "data"
    config = SynthConfig(
        people=50, images_per_person=4, size=(32, 16), train_fraction=0.1, val_fraction=0.02, clone_pairs=16, cameras=2
    )
    write_dataset(config, folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, people):
    run = trained(tmp_path_factory.mktemp("made") / "r", people)
    return run, analyse.run(run, limit=SOME, device="cpu")


def rows_of(run):
    frame = tables.read_table(run.table("analyse", "analysis"), "analysis")
    return {tuple(row[:4]): row for row in frame.itertuples(index=False)}


def hot(images, names):
    """One-hot true attributes."""
    columns = [pd.get_dummies([row[name] for row in images["attributes"]]).to_numpy(float) for name in names]
    return np.hstack(columns)


def write_people(folder, people=72, each=3):
    """A table of people, every body in every outfit, every third pair of them look-alikes; without pictures."""
    rng = np.random.default_rng(0)
    combined = [dict(zip(BODY | CLOTHES, values, strict=True)) for values in product(*(BODY | CLOTHES).values())]
    every = [{**combined[n % len(combined)], "skin": SKIN[n // 3 % 2]} for n in rng.permutation(people)]
    for first in range(0, people - 1, 6):
        kind = "outfit" if first % 12 == 0 else "body"
        one, other = every[first], every[first + 1]
        shared, changed = (CLOTHES, BODY) if kind == "outfit" else (BODY, CLOTHES)
        other |= {name: one[name] for name in shared}
        for name, values in changed.items():
            other[name] = values[values.index(one[name]) - 1]
        one |= {"clone_of": f"x:{first + 1:03d}", "clone_kind": kind}
        other |= {"clone_of": f"x:{first:03d}", "clone_kind": kind}
    rows = [
        {
            "image_id": f"{person:03d}-{number}", "path": "none.png", "dataset": "x", "split": "test",
            "person_id": f"x:{person:03d}", "width": 8, "height": 16, "sha256": f"{person}-{number}",
            "camera_id": f"c{number}", "outfit_id": None, "attributes": known,
        }
        for person, known in enumerate(every)
        for number in range(each)
    ]  # fmt: skip
    tables.write_table(folder / "images.parquet", "images", pd.DataFrame(rows))
    return folder


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """What is found in features that are the true attributes: identity holds bodies, clothing holds clothes."""
    folder = tmp_path_factory.mktemp("planted")
    run = trained(folder / "r", write_people(folder / "data"), described=False)

    def collect(method, corpus, *, device):
        body, clothes = hot(corpus.images, BODY), hot(corpus.images, CLOTHES)
        noise = np.random.default_rng(0).normal(size=body.shape)
        streams = {"identity": body, "clothing": clothes, "pooled_identity": noise, "pooled_clothing": 2 * clothes}
        return {"embedding": np.hstack([body, clothes]), **streams}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_features, "collect_features", collect)
        return run, analyse.run(run, what=["probes", "dependence,clones"], sensitive=True, device="cpu")["metrics"]


@pytest.mark.covers(160)
def test_attributes_are_read_from_the_feature_that_holds_them_and_from_others_at_the_controls_rate(planted):
    found = planted[1]
    holds = {"clothing": CLOTHES, "pooled_clothing": CLOTHES, "identity": BODY, "embedding": BODY | CLOTHES}
    for feature in (*holds, "pooled_identity"):
        for attribute in BODY | CLOTHES:
            entry = found[f"probes.{feature}.{attribute}"]
            assert entry["low"] <= entry["value"] <= entry["high"]
            if attribute in holds.get(feature, ()):
                assert entry["value"] > 0.95 and entry["low"] > entry["control"] + 0.3
            else:
                assert entry["low"] - 0.08 < entry["control"] < entry["high"] + 0.08
    for group, own, other in (("clothing", "clothing", "identity"), ("body", "identity", "clothing")):
        assert found[f"probes.{own}.{group}.excess"]["low"] > 0.3
        assert found[f"probes.{other}.{group}.excess"]["high"] < 0.2
    for group in ("clothing", "body"):
        noise = found[f"probes.pooled_identity.{group}.excess"]
        assert noise["low"] <= 0 <= noise["high"]
        whole = found[f"probes.embedding.{group}"]
        gain = found[f"probes.embedding.{group}.excess"]["value"]
        assert whole["value"] - whole["control"] == pytest.approx(gain)


@pytest.mark.covers(160)
def test_who_somebody_is_can_be_read_from_clothes_as_far_as_outfits_differ(planted):
    run, found = planted
    images = tables.read_table(Path(run.record("finetune")["data"]) / "images.parquet", "images")
    # Everybody in one outfit shares the vote, so of people in k outfits k / people are named on average.
    people = images.drop_duplicates("person_id")
    outfits = len({tuple(row[name] for name in CLOTHES) for row in people["attributes"]})
    assert found["probes.clothing.person"]["value"] == pytest.approx(outfits / len(people))
    assert found["probes.embedding.person"]["value"] > 2 * found["probes.clothing.person"]["value"]
    assert found["probes.clothing.person"]["control"] < 0.05
    assert "probes.clothing.person-across-outfits" not in found


def test_skin_is_probed_only_when_asked_for(planted, made):
    assert "probes.embedding.skin" in planted[1]
    assert not [name for name in made[1]["metrics"] if "skin" in name]


@pytest.mark.covers(166)
def test_look_alikes_are_told_apart_by_the_feature_that_holds_what_they_do_not_share(planted):
    found = planted[1]
    for feature, outfit, body in (("identity", 1, 0.5), ("clothing", 0.5, 1), ("embedding", 1, 1)):
        assert found[f"clones.{feature}.outfit"] == pytest.approx(
            {"value": outfit, "low": outfit, "high": outfit, "chance": 0.5}
        )
        assert found[f"clones.{feature}.body"]["value"] == body
    assert found["clones.pooled_identity.outfit"]["low"] <= 0.5 <= found["clones.pooled_identity.outfit"]["high"]
    assert 0.85 < found["clones.embedding.strangers"]["value"] < 1


def test_dependence_tells_independent_streams_from_a_copy(planted, monkeypatch):
    run, found = planted
    for pair in ("identity.clothing", "pooled_identity.pooled_clothing"):
        for measure in ("hsic-linear", "hsic-linear-unit", "cka-linear", "cka-rbf"):
            entry = found[f"dependence.{pair}.{measure}"]
            assert entry["p_value"] > 0.1 and entry["value"] < 2 * entry["control"]

    def collect(method, corpus, *, device):
        clothes = hot(corpus.images, CLOTHES)
        return {"embedding": clothes, "identity": clothes[:, :3], "clothing": clothes}

    monkeypatch.setattr(kept_features, "collect_features", collect)
    copied = analyse.run(run, what=["dependence"], cache=False, device="cpu")["metrics"]
    for measure in ("hsic-linear", "hsic-linear-unit", "cka-linear", "cka-rbf"):
        entry = copied[f"dependence.identity.clothing.{measure}"]
        assert entry["p_value"] < 0.01 and entry["value"] > 2 * entry["control_high"]


def test_an_untrained_model_gives_every_analysis_and_its_files(made):
    run, record = made
    assert record["analyses"] == DONE and 0 < SOME - record["images"] < 8
    folder = run.stage_dir("analyse")
    names = {path.name for path in folder.iterdir()}
    figures = {
        f"{stem}.{end}" for stem in ("probes", "clones", "gates", "tsne", "cam") for end in ("png", "svg", "csv")
    }
    assert names == figures | {"analysis.parquet", "gates.json", "architecture.md", "stage.json"}
    assert {f"analyse/{name}" for name in names - {"stage.json"}} == set(record["outputs"])
    rows = rows_of(run)
    assert {key[0] for key in rows} == set(DONE) - {"architecture"}
    assert {key[1] for key in rows if key[0] == "probes"} == {
        "embedding", "identity", "clothing", "pooled_identity", "pooled_clothing"
    }  # fmt: skip
    for row in rows.values():
        assert row.items > 0 and row.people > 0 and np.isfinite(row.value)


def test_the_records_numbers_are_those_of_the_table(made):
    run, record = made
    rows = rows_of(run)
    assert len(record["metrics"]) == len(rows)
    entry, row = (
        record["metrics"]["probes.identity.person"],
        rows["probes", "identity", "person", "accuracy"],
    )
    assert entry == {key: getattr(row, key) for key in ("value", "low", "high", "control", "chance")}
    assert record["metrics"]["gates.identity.std"] == rows["gates", "identity", "", "std"].value
    text = rows["clones", "embedding", "outfit", "t2i"]
    assert record["metrics"]["clones.embedding.outfit.t2i"]["value"] == text.value
    json.dumps(record["metrics"], allow_nan=False)


@pytest.mark.covers(158)
def test_gate_means_of_complements_sum_to_one(made):
    found = made[1]["metrics"]
    assert found["gates.identity"]["value"] + found["gates.clothing"]["value"] == pytest.approx(1, abs=1e-5)
    assert found["gates.image"]["value"] + found["gates.text"]["value"] == pytest.approx(1, abs=1e-5)
    assert found["gates.identity.std"] > 0
    samples = pd.read_csv(made[0].stage_dir("analyse") / "gates.csv")
    assert samples["identity"].mean() == pytest.approx(found["gates.identity"]["value"], abs=1e-6)


@pytest.mark.covers(159)
def test_the_map_has_every_image_once_per_feature_and_says_what_it_does_not_show(made):
    run, record = made
    points = pd.read_csv(run.stage_dir("analyse") / "tsne.csv")
    counts = points.groupby(["panel", "feature"])["image_id"].nunique()
    assert counts.to_dict() == {
        ("embedding", "embedding"): record["images"],
        ("streams", "clothing"): record["images"],
        ("streams", "identity"): record["images"],
    }
    assert np.isfinite(points[["x", "y"]].to_numpy()).all()
    assert any(
        note.startswith("tsne: Identity and clothing features come from different heads") for note in record["notes"]
    )
    assert "different heads" in " ".join((run.stage_dir("analyse") / "tsne.svg").read_text().split())
    entry = record["metrics"]["tsne.identity.person"]
    assert -1 <= entry["low"] <= entry["value"] <= entry["high"] <= 1 and -1 <= entry["control"] <= 1


def test_the_stage_is_up_to_date_until_something_changes(made):
    run = made[0]
    assert analyse.run(run, limit=SOME, device="cpu")["status"] == "up-to-date"
    again = analyse.run(run, limit=SOME, device="cpu", force=True)
    assert again["status"] == "done"
    assert again["outputs"] == made[1]["outputs"] and again["metrics"] == made[1]["metrics"]


def test_features_are_those_of_the_method_image_by_image(made, people):
    run = made[0]
    method = load_method(run.stage_dir("finetune"), "cpu")
    corpus = features.part_of(analyse.find_source(run).corpus(), np.array([3, 7, 20]))
    found = features.collect_features(method, corpus, device=torch.device("cpu"), batch=2)
    for row, path in enumerate(corpus.paths()):
        pixels = read_pixels(path, method.backbone.image_size, method.backbone.interpolation)
        image = normalise(pixels[None], method.backbone.mean, method.backbone.std)
        with torch.inference_mode():
            alone = method.features(Batch(image=image))
        assert set(alone) == set(found)
        for name, value in alone.items():
            np.testing.assert_allclose(found[name][row], value[0].numpy(), atol=2e-5)


def test_a_part_of_a_corpus_keeps_texts_beside_their_images(made):
    corpus = analyse.find_source(made[0]).corpus()
    part = features.part_of(corpus, np.array([5, 9]))
    assert list(part.captions["image_id"]) == [
        name for name in corpus.captions["image_id"] if name in set(corpus.images["image_id"].iloc[[5, 9]])
    ]
    assert (part.images["image_id"].iloc[part.captions["row"]].to_numpy() == part.captions["image_id"]).all()
    assert part.identity == [corpus.identity[5], corpus.identity[9]]


def test_a_sample_holds_whole_families_and_whoever_must_be_in_it(made):
    images = analyse.find_source(made[0]).corpus().images
    family = features.families(images)
    assert len(set(family)) == images["person_id"].nunique() - 16
    for seed in range(3):
        rows = features.whole_families(images, 50, seed=seed, first=[images["person_id"].iloc[-1]])
        assert 40 < len(rows) <= 50 and (np.diff(rows) > 0).all()
        assert not set(family[rows]) & set(np.delete(family, rows)) and family[-1] in family[rows]
    assert not np.array_equal(features.whole_families(images, 50), features.whole_families(images, 50, seed=1))
    assert len(features.whole_families(images, 3)) == 3


def test_fewer_images_are_analysed_and_it_is_said(made, people, tmp_path):
    record = analyse.run(trained(tmp_path / "r", people), what=["gates"], limit=40, device="cpu")
    assert 30 <= record["images"] <= 40 and any("of 176 images" in note for note in record["notes"])


def test_what_does_not_apply_is_a_note_and_an_error_if_it_was_asked_for(people, tmp_path):
    run = trained(tmp_path / "r", people, name="clip", config={}, described=False)
    record = analyse.run(run, device="cpu", limit=40)
    assert record["analyses"] == ["probes", "clones", "compactness", "tsne", "architecture", "cam"]
    for name in ("dependence", "gates"):
        assert any(note.startswith(f"{name}: not done: the method `clip`") for note in record["notes"])
    kept = run.table("analyse", "analysis").read_bytes()
    for name in ("dependence", "gates"):
        with pytest.raises(DataError, match=f"`--what {name}` does not apply: the method `clip`"):
            analyse.run(run, what=["probes", name], device="cpu", limit=40)
    assert run.record("analyse") is not None and run.table("analyse", "analysis").read_bytes() == kept


def test_images_without_attributes_or_look_alikes(people, tmp_path):
    folder = tmp_path / "data"
    images = tables.read_table(people / "images.parquet", "images").assign(attributes=None)
    images["path"] = [str((people / path).resolve()) for path in images["path"]]
    tables.write_table(folder / "images.parquet", "images", images)
    run = trained(tmp_path / "r", folder, described=False)
    record = analyse.run(run, device="cpu", limit=40)
    assert "clones" not in record["analyses"] and "probes" in record["analyses"]
    assert set(key.split(".")[2] for key in record["metrics"] if key.startswith("probes")) == {"person"}
    assert any("no attributes" in note for note in record["notes"])
    assert any("no identity texts" in note for note in record["notes"])
    with pytest.raises(DataError, match="clone_of"):
        analyse.run(run, what=["clones"], device="cpu", limit=40)


def test_highlighted_people_are_coloured_and_must_exist(made, people, tmp_path):
    run = trained(tmp_path / "r", people)
    name = str(tables.read_table(people / "images.parquet", "images")["person_id"].iloc[-1])
    analyse.run(run, what=["tsne"], highlight=[name], limit=40, device="cpu")
    svg = (run.stage_dir("analyse") / "tsne.svg").read_text()
    assert name in svg
    with Image.open(run.stage_dir("analyse") / "tsne.png") as picture:
        assert picture.width > 1000
    with pytest.raises(DataError, match="`nobody` has no image in the test split"):
        analyse.run(run, what=["tsne"], highlight=["nobody"], device="cpu")
    with pytest.raises(DataError, match="`nobody`"):
        analyse.run(run, highlight=["nobody"], device="cpu")


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"what": ["magic"]}, UsageError, "probes, dependence"),
        ({"what": ["probes,"]}, UsageError, "`--what `"),
        ({"split": "nowhere"}, DataError, "`nowhere`"),
        ({"device": "gpu"}, UsageError, "gpu"),
    ],
)
def test_wrong_flags_are_refused_and_keep_the_old_result(made, flags, error, message):
    with pytest.raises(error, match=message):
        analyse.run(made[0], **{"device": "cpu", **flags})
    assert made[0].record("analyse") is not None


def test_no_model_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="has no dataset"):
        analyse.run(Run(tmp_path), device="cpu")


def test_a_model_that_was_chosen_on_the_split_says_so(people, tmp_path):
    record = analyse.run(trained(tmp_path / "r", people, selected_on="test"), what=["gates"], limit=20, device="cpu")
    assert any("chosen on the test split" in note for note in record["notes"])


@pytest.mark.covers(163)
def test_the_architecture_is_written_from_the_built_model(made):
    run, _ = made
    text = (run.stage_dir("analyse") / "architecture.md").read_text()
    assert "```mermaid" in text and "critic" in text
    total = sum(p.numel() for p in load_method(run.stage_dir("finetune")).parameters())
    assert f"{total:,} parameters" in text


@pytest.mark.covers(161, 233)
def test_costs_are_measured_when_asked_for_by_name_alone(made):
    run, record = made
    assert "efficiency" not in record["analyses"], "timings differ from run to run"
    found = analyse.run(run, what=["efficiency"], device="cpu")["metrics"]
    method = load_method(run.stage_dir("finetune"))
    # An image and a text are both there, so the vectors that stand for a missing one are not read.
    read = [p.numel() for name, p in method.fusion.named_parameters() if not name.startswith("null")]
    assert found["efficiency.fusion.parameters"] == sum(read)
    for part in ("image", "text", "fusion", "step"):
        measured = ("flops", "kept_bytes", "items_per_second", "milliseconds")
        assert all(found[f"efficiency.{part}.{name}"] > 0 for name in measured)
    printed = "\n".join(_lines(run.path))
    parameters = sum(read)
    assert "ms/batch" in printed and f"{parameters:,}" in printed
    assert f"{found['efficiency.fusion.milliseconds']:.3g}" in printed


class Adapted(Clip):
    """`clip` with a module of its own, as light as it gets."""

    def extra_parts(self, batch):
        patches = self.backbone.encode_image(batch.require("image")).hidden_patches
        return {"adapter": lambda: self.backbone.image.last_norm(patches)}


@pytest.mark.covers(221)
def test_the_overhead_of_a_methods_own_part_is_printed(people, tmp_path, monkeypatch):
    monkeypatch.setattr("reidctl.methods.clip.METHOD", Adapted)
    run = trained(tmp_path / "r", people, name="clip", config={}, described=False)
    record = analyse.run(run, what=["efficiency"], device="cpu")
    found = record["metrics"]
    width = load_method(run.stage_dir("finetune")).backbone.width_image
    assert found["efficiency.adapter.parameters"] == 2 * width
    printed = "\n".join(_lines(run.path))
    line = next(line for line in printed.splitlines() if "adapter" in line)
    assert f" {2 * width} " in line and f" {found['efficiency.adapter.milliseconds']:.3g} " in line
    share = 100 * 2 * width / found["efficiency.image.parameters"]
    note = next(note for note in record["notes"] if "adapter" in note)
    assert f"{2 * width:,} parameters ({share:.3g} %" in note and "ms per batch" in note


def test_probes_read_the_features_that_were_asked_for(made):
    run, _ = made
    found = analyse.run(run, what=["probes"], features=["identity"], device="cpu")["metrics"]
    assert {name.split(".")[1] for name in found} == {"identity"}
    with pytest.raises(DataError, match="none of the features magic"):
        analyse.run(run, what=["probes"], features=["magic"], device="cpu")


def test_what_does_not_apply_is_an_error_by_name_and_a_note_when_lenient(made):
    run, _ = made
    asked = {"what": ["probes"], "features": ["magic"], "device": "cpu"}
    record = analyse.run(run, lenient=True, **asked)
    assert record["metrics"] == {} and any("none of the features magic" in note for note in record["notes"])
