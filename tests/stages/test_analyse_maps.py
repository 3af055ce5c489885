"""Where any model looks, measured by true masks; and which words learnt prompts are near to."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from methods.test_method_contract import SETTINGS
from PIL import Image
from stages.test_analyse import BDAM, trained
from stages.test_analyse_prompts import changed

from reidctl import tables
from reidctl.errors import DataError
from reidctl.methods.base import load_method
from reidctl.methods.clip import Clip
from reidctl.stages import analyse, analyse_prompts, analyse_tokens
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

SOME = 24


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people") / "data"
    config = SynthConfig(
        people=16, images_per_person=3, size=(32, 16), train_fraction=0.1, val_fraction=0.1, cameras=2, carry=0.9
    )
    write_dataset(config, folder, workers=1)
    return folder


def with_tables(people, folder, *, captions=False, parts=True):
    """The same pictures as a dataset that has only some of the tables."""
    images = tables.read_table(people / "images.parquet", "images")
    images["path"] = [str((people / path).resolve()) for path in images["path"]]
    tables.write_table(folder / "images.parquet", "images", images)
    for name, wanted in (("captions", captions), ("parts", parts)):
        if wanted:
            tables.write_table(folder / f"{name}.parquet", name, tables.read_table(people / f"{name}.parquet", name))
    return folder


def analysed(run, *what, **flags):
    return analyse.run(run, what=what or ("cam",), device="cpu", limit=SOME, **flags)


@pytest.mark.covers(218)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_says_how_much_of_its_maps_lies_on_the_person(people, tmp_path, name):
    run = trained(tmp_path / "r", people, name=name, config=SETTINGS[name][1] if name != "bdam" else BDAM)
    record = analysed(run)
    found = record["metrics"]
    names = {f"{side}.{region}" for side in ("t2i", "i2i", "activation") for region in ("person", "objects")}
    names |= {"both.person-difference", "both.objects-difference", "both.correlation", "activation.variation"}
    assert set(found) == {f"cam.{name}" for name in names}
    for side in ("t2i", "i2i", "activation"):
        entry = found[f"cam.{side}.person"]
        assert 0 < entry["low"] <= entry["value"] <= entry["high"] < 1
        assert 0 < entry["control"] < 1 and 0.05 < entry["chance"] < 0.6
    assert found["cam.t2i.person"]["chance"] == found["cam.activation.person"]["chance"]
    rows = pd.read_csv(run.stage_dir("analyse") / "cam.csv")
    assert list(rows.columns) == ["image_id", "y", "x", "t2i", "i2i", "activation"]
    by_image = rows.groupby("image_id")["activation"]
    assert by_image.min().to_numpy() == pytest.approx(0) and (by_image.max() <= 1).all()
    svg = (run.stage_dir("analyse") / "cam.svg").read_text()
    assert all(text in svg for text in (">picture<", ">t2i<", ">i2i<", ">activation<"))


@pytest.mark.covers(218)
def test_maps_on_the_person_are_told_from_maps_anywhere(people, tmp_path, monkeypatch):
    run = trained(tmp_path / "r", people, name="clip", config={})
    grid = load_method(run.stage_dir("finetune"), "cpu").backbone.grid
    images = tables.read_table(people / "images.parquet", "images").set_index("image_id")
    parts = tables.read_table(people / "parts.parquet", "parts")

    def shares(name):
        size = int(images.loc[name, "height"]), int(images.loc[name, "width"])
        members = list(parts[parts["image_id"] == name].itertuples())
        return torch.from_numpy(analyse_tokens.looking.union_shares(members, size, grid)).float()

    def on_person(self, batch):
        inside = [shares(name) for name in batch.image_id]
        return torch.stack([5 * (share == share.max()).float() for share in inside])

    def maps(self, batch, partner):
        even = torch.ones(len(batch), *grid)
        return {"t2i": on_person(self, batch), "i2i": even}

    monkeypatch.setattr(Clip, "activation", on_person)
    monkeypatch.setattr(Clip, "token_maps", maps)
    found = analysed(run)["metrics"]
    for side in ("t2i", "activation"):
        entry = found[f"cam.{side}.person"]
        assert entry["low"] > entry["control"] > entry["chance"], "people stand in the middle of most pictures"
    even = found["cam.i2i.person"]
    assert even["value"] == pytest.approx(even["chance"], rel=1e-3)
    assert found["cam.both.person-difference"]["low"] > 0
    assert found["cam.activation.variation"]["low"] > 0.5


@pytest.mark.covers(218)
def test_images_without_captions_have_the_maps_that_need_none(people, tmp_path):
    run = trained(tmp_path / "r", with_tables(people, tmp_path / "d"), name="clip", config={}, described=False)
    record = analysed(run)
    names = {name.split(".")[1] for name in record["metrics"]}
    assert names == {"i2i", "activation"}
    assert any("no image has a caption, so there is no t2i map" in note for note in record["notes"])
    rows = pd.read_csv(run.stage_dir("analyse") / "cam.csv")
    assert list(rows.columns) == ["image_id", "y", "x", "i2i", "activation"]
    with Image.open(run.stage_dir("analyse") / "cam.png") as picture:
        assert picture.width > 1200


def test_only_captioned_images_are_taken_where_some_have_no_caption(people, tmp_path):
    folder = with_tables(people, tmp_path / "d", captions=True)
    captions = tables.read_table(folder / "captions.parquet", "captions")
    images = tables.read_table(folder / "images.parquet", "images")
    first = images.loc[images["split"] == "test", "image_id"].iloc[0]
    tables.write_table(folder / "captions.parquet", "captions", captions[captions["image_id"] != first])
    run = trained(tmp_path / "r", folder, name="clip", config={}, described=False)
    record = analyse.run(run, what=["cam"], device="cpu")
    assert any("without a caption are left out" in note for note in record["notes"])
    assert "cam.t2i.person" in record["metrics"]


def test_without_masks_maps_are_drawn_and_not_measured(people, tmp_path):
    run = trained(
        tmp_path / "r", with_tables(people, tmp_path / "d", parts=False), name="clip", described=False, config={}
    )
    record = analysed(run)
    assert set(record["metrics"]) == {"cam.activation.variation"}
    assert any("drawn and not measured" in note for note in record["notes"])
    assert (run.stage_dir("analyse") / "cam.png").is_file()


def test_what_has_no_partner_or_reads_texts_is_told_why(people, tmp_path):
    folder = with_tables(people, tmp_path / "d")
    images = tables.read_table(folder / "images.parquet", "images")
    tables.write_table(folder / "images.parquet", "images", images.drop_duplicates("person_id"))
    with pytest.raises(DataError, match="nobody has two images"):
        analysed(trained(tmp_path / "r", folder, name="clip", config={}, described=False))
    with pytest.raises(DataError, match="embeds an image with a text"):
        analysed(trained(tmp_path / "b", people, config={**BDAM, "protocol": "own_text"}))


def test_activations_that_hardly_differ_are_called_that(people, tmp_path):
    record = analysed(trained(tmp_path / "r", people, name="clip", config={}))
    flat = record["metrics"]["cam.activation.variation"]["value"] < analyse_tokens.FLAT
    assert flat == any("hardly differ" in note for note in record["notes"])


class Prompted(Clip):
    """`clip` with prompts that are words."""

    said = ("red", "shirt")

    def prompt_rows(self, persons):
        ids = torch.tensor([[self.backbone.tokenizer.encode(word)[0] for word in self.said]])
        words = self.backbone.embed_tokens(ids)[0]
        noise = torch.randn(2, words.shape[1], generator=torch.Generator().manual_seed(0))
        shared = [("shared", "", 3 * words), ("domain", "a", words[:1]), ("domain", "b", words[1:])]
        return shared + [
            ("person", name, words.flip(0) if number == 1 else noise) for number, name in enumerate(persons)
        ]


def test_learnt_prompts_are_read_as_their_nearest_words(people, tmp_path, monkeypatch):
    monkeypatch.setattr("reidctl.methods.clip.METHOD", Prompted)
    run = trained(tmp_path / "r", people, name="clip", config={})
    record = analysed(run, "words")
    rows = pd.read_csv(run.stage_dir("analyse") / "words.csv", keep_default_na=False)
    assert list(rows.columns) == ["scope", "key", "position", "word", "cosine"]
    read = {(row.scope, row.key, row.position): row.word for row in rows.itertuples()}
    assert [read["shared", "", 0], read["shared", "", 1]] == ["red", "shirt"]
    assert read["domain", "a", 0] == "red" and read["domain", "b", 0] == "shirt"
    assert [read["person", "1", 0], read["person", "1", 1]] == ["shirt", "red"]
    found = record["metrics"]
    assert found["words.shared.cosine"] == pytest.approx(1) and found["words.shared.distinct"] == 2
    assert 0 < found["words.person.cosine"] < 1 and found["words.domain.distinct"] == 2
    monkeypatch.setattr(analyse_prompts, "PEOPLE", 2)
    few = analysed(run, "words", force=True)
    assert any("of 2 of 4 people" in note for note in few["notes"])


def test_a_flat_map_has_no_correlation_and_everything_stays_finite(people, tmp_path):
    def silence(method):
        method.backbone.image.class_token.zero_()

    run = changed(trained(tmp_path / "r", people, name="clip", config={}), silence)
    rows = tables.read_table(run.table("finetune", "seen"), "seen")
    assert not len(rows)
    found = analysed(run)["metrics"]
    assert all(math.isfinite(entry["value"]) for entry in found.values())
    assert np.isfinite(pd.read_csv(run.stage_dir("analyse") / "cam.csv")[["t2i", "i2i", "activation"]].to_numpy()).all()
