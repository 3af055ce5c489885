"""The analyses of `hpl`: an untrained micro model for everything around them, planted pseudo-words for what is said."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from methods.test_method_contract import SETTINGS
from PIL import Image
from stages.test_analyse import trained

from reidctl import tables
from reidctl.backbones.tokenizers import ClipTokenizer, WordPieceTokenizer
from reidctl.batch import Batch
from reidctl.errors import DataError
from reidctl.evaluation import alarms as rules
from reidctl.methods.base import load_method, save_method
from reidctl.methods.hpl import Hpl
from reidctl.runs import digest
from reidctl.stages import analyse, analyse_prompts, analyse_tokens
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset

HPL = SETTINGS["hpl"][1]
WHAT = ["attention", "cam", "pseudo", "words"]
SOME = 48


def hpl(folder, data, **changes):
    return trained(folder, data, name="hpl", config={**HPL, **changes})


def analysed(run, *what, **flags):
    return analyse.run(run, what=what, device="cpu", limit=SOME, **flags)


def changed(run, change):
    """The run with another model: `change` gets the method."""
    method = load_method(run.stage_dir("finetune"), "cpu")
    with torch.no_grad():
        change(method)
    save_method(method, run.stage_dir("finetune"))
    return run


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Rendered people, 20 of them in the test split, who all carry something."""
    folder = tmp_path_factory.mktemp("people") / "data"
    config = SynthConfig(
        people=24, images_per_person=3, size=(32, 16), train_fraction=0.1, val_fraction=0.05, cameras=2, carry=0.9
    )
    write_dataset(config, folder, workers=1)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, people):
    run = hpl(tmp_path_factory.mktemp("made") / "r", people)
    return run, analysed(run, *WHAT)


def test_an_untrained_model_gives_every_number_and_file(made):
    run, record = made
    assert record["analyses"] == WHAT
    names = {path.name for path in run.stage_dir("analyse").iterdir()}
    figures = {f"{stem}.{end}" for stem in ("cam", "pseudo") for end in ("png", "svg", "csv")}
    assert names == figures | {"words.csv", "analysis.parquet", "stage.json"}
    assert set(record["outputs"]) == {f"analyse/{name}" for name in names - {"stage.json"}}
    found = record["metrics"]
    sides = {"t2i.objects", "i2i.objects", "both.objects-difference"}
    expected = {f"attention.{name}" for name in sides | {"t2i.entropy", "i2i.entropy", "both.js", "both.cosine"}}
    expected |= {f"cam.{name}" for name in sides | {side.replace("objects", "person") for side in sides}}
    expected |= {"cam.activation.person", "cam.activation.objects", "cam.activation.variation"}
    expected |= {"cam.both.correlation", "pseudo.caption.auc", "pseudo.spearman.all", "pseudo.spearman.matched"}
    expected |= {f"pseudo.distance.{name}" for name in ("matched", "mismatched", "difference")}
    expected |= {f"pseudo.{name}" for name in ("diversity-image", "diversity-text", "mismatch")}
    expected |= {f"words.caption.{name}{end}" for name in ("similarity", "hits") for end in ("", "-difference")}
    expected |= {"words.cosine", "words.distinct", "words.upper_colour.purity", "words.upper_colour.nmi"}
    assert expected <= set(found)
    table = tables.read_table(run.table("analyse", "analysis"), "analysis")
    assert np.isfinite(table["value"]).all() and (table["items"] > 0).all()


def test_numbers_are_in_their_ranges_beside_their_controls(made):
    run, record = made
    found = record["metrics"]
    patches = math.prod(load_method(run.stage_dir("finetune"), "cpu").backbone.grid)
    for task in ("t2i", "i2i"):
        entropy = found[f"attention.{task}.entropy"]
        assert 0 < entropy["low"] <= entropy["value"] <= entropy["chance"] == pytest.approx(math.log(patches))
        for name in ("attention", "cam"):
            mass = found[f"{name}.{task}.objects"]
            assert 0 < mass["value"] < 1 and 0 < mass["control"] < 1 and 0 < mass["chance"] < 0.5
    for name in ("attention", "cam"):
        sides = [found[f"{name}.{task}.objects"]["value"] for task in ("t2i", "i2i")]
        assert found[f"{name}.both.objects-difference"]["value"] == pytest.approx(sides[0] - sides[1])
    # An untrained tower hardly looks anywhere: its attention is close to uniform, and objects get their area.
    assert found["attention.t2i.objects"]["value"] == pytest.approx(found["attention.t2i.objects"]["chance"], rel=0.3)
    assert found["pseudo.caption.auc"]["control"] == pytest.approx(0.5, abs=0.1)
    apart = [found[f"pseudo.distance.{name}"]["value"] for name in ("mismatched", "matched", "difference")]
    assert apart[0] - apart[1] == pytest.approx(apart[2])
    assert any("A photo of {inst} person" in note for note in record["notes"])


@pytest.mark.covers(90, 93)
def test_tied_tokens_do_not_diverge_and_free_ones_do(people, tmp_path):
    def tie(method):
        method.second_token.copy_(method.backbone.image.class_token[None].view_as(method.second_token))

    def free(method):
        method.second_token.copy_(3 * torch.randn(method.second_token.shape))

    run = hpl(tmp_path / "r", people)
    tied = analysed(changed(run, tie), "attention")["metrics"]
    assert tied["attention.both.js"]["value"] == pytest.approx(0, abs=1e-9)
    assert tied["attention.both.cosine"]["value"] == pytest.approx(1)
    assert tied["attention.both.objects-difference"]["value"] == pytest.approx(0, abs=1e-6)
    apart = analysed(changed(run, free), "attention", force=True)["metrics"]
    assert apart["attention.both.js"]["low"] > 1e-4 and apart["attention.both.cosine"]["high"] < 0.999
    assert apart["attention.t2i.entropy"]["value"] != apart["attention.i2i.entropy"]["value"]


@pytest.mark.covers(94)
def test_a_token_that_looks_at_objects_is_told_from_one_that_looks_everywhere(people, tmp_path, monkeypatch):
    def look(material, method):
        rows = np.arange(len(material.images))
        shares = analyse_tokens._part_shares(material, rows, analyse_tokens.looking.OBJECTS)
        patches = math.prod(method.backbone.grid)
        at = np.full((len(rows), patches), 1 / patches)
        for row, share in shares.items():
            at[row] = np.eye(patches)[share.argmax()]
        return {"t2i": at, "i2i": np.full_like(at, 1 / patches)}, np.ones((len(rows), 2, 3))

    monkeypatch.setattr(analyse_tokens, "_attention", look)
    found = analysed(hpl(tmp_path / "r", people), "attention")["metrics"]
    on, off = found["attention.t2i.objects"], found["attention.i2i.objects"]
    assert on["control"] < on["low"] and on["low"] > 1.3 * on["chance"], "the objects of other images lie elsewhere"
    assert off["value"] == pytest.approx(off["chance"]) and off["control"] == pytest.approx(off["chance"], rel=0.2)
    assert found["attention.both.objects-difference"]["low"] > 0


def test_a_model_with_one_token_has_an_entropy_and_nothing_that_diverges(people, tmp_path):
    record = analysed(hpl(tmp_path / "r", people, trt={"dual": False}), "attention,cam,pseudo")
    names = {name for name in record["metrics"] if name.startswith("attention")}
    assert names == {"attention.t2i.entropy", "attention.t2i.objects"}
    assert any("one class token serves both tasks" in note for note in record["notes"])
    assert "cam.both.correlation" in record["metrics"]
    assert not any("second_token" in name for name in record["metrics"])


@pytest.mark.covers(87)
def test_the_two_class_tokens_have_maps_of_their_own(made):
    method = load_method(made[0].stage_dir("finetune"), "cpu")
    torch.manual_seed(1)
    image, partner = torch.randn(2, 3, 3, *method.backbone.image_size)
    batch = Batch(image=image, texts={"full": method.backbone.tokenize(["a red shirt", "blue", "a man"])})
    found = method.token_maps(batch, partner)
    assert set(found) == {"t2i", "i2i"}
    for value in found.values():
        assert value.shape == (3, *method.backbone.grid) and not value.requires_grad
        assert value.min() >= 0 and torch.allclose(value.flatten(1).amax(1), torch.ones(3))
    assert not torch.allclose(found["t2i"], found["i2i"], atol=0.05)
    assert torch.allclose(found["t2i"], method.explain(batch), atol=1e-6)
    other = method.token_maps(batch, partner.flip(0))
    assert torch.allclose(other["t2i"], found["t2i"], atol=1e-6)
    assert not torch.allclose(other["i2i"][0], found["i2i"][0], atol=0.05), "it follows the partner"


@pytest.mark.covers(87)
def test_maps_are_drawn_for_different_people_with_objects_first(made):
    run, _ = made
    rows = pd.read_csv(run.stage_dir("analyse") / "cam.csv")
    names = list(dict.fromkeys(rows["image_id"]))
    data = tables.read_table(analyse.find_source(run).images, "images").set_index("image_id")
    assert len(names) == 8 and data.loc[names, "person_id"].nunique() == 8
    assert all(dict(known)["carried"] for known in data.loc[names, "attributes"])
    grid = load_method(run.stage_dir("finetune"), "cpu").backbone.grid
    assert len(rows) == 8 * grid[0] * grid[1] and rows[["t2i", "i2i"]].to_numpy().max() == pytest.approx(1)
    with Image.open(run.stage_dir("analyse") / "cam.png") as picture:
        assert picture.width > 1200
    carried = dict(data.loc[names[0], "attributes"])["carried"].split(",")[0]
    assert carried in (run.stage_dir("analyse") / "cam.svg").read_text()


@pytest.fixture
def plant(monkeypatch):
    """Make P^v and P^t a function of the image's id: `plant(image, text)`, each from id to vectors (M, W)."""
    now = {}
    batches = analyse_tokens.batches

    def remembered(*args):
        for batch in batches(*args):
            now["ids"] = batch.image_id
            yield batch

    def put(image, text=None):
        def of(make):
            return lambda *_: torch.stack([make(name) for name in now["ids"]])

        monkeypatch.setattr(analyse_prompts, "batches", remembered)
        monkeypatch.setattr(Hpl, "pseudo_image", of(image))
        monkeypatch.setattr(Hpl, "pseudo_text", of(text or image))

    return put


def images_of(folder):
    images = tables.read_table(folder / "images.parquet", "images").set_index("image_id")
    return {name: dict(known) for name, known in images["attributes"].items()}, images["person_id"].astype(str)


@pytest.mark.covers(88, 103)
def test_texts_that_invert_to_the_same_as_their_image_are_matched(people, tmp_path, plant):
    _, person = images_of(people)
    run = hpl(tmp_path / "r", people)

    width = load_method(run.stage_dir("finetune"), "cpu").backbone.width_text

    def own(name):
        generator = torch.Generator().manual_seed(int(person[name].split(":")[-1]))
        return torch.randn(2, width, generator=generator)

    plant(own)
    found = analysed(run, "pseudo")["metrics"]
    assert found["pseudo.distance.matched"]["value"] == 0 < found["pseudo.distance.mismatched"]["low"]
    assert found["pseudo.distance.difference"]["low"] > 0 and found["pseudo.mismatch"] == 0
    assert found["pseudo.spearman.all"]["high"] < -0.5, "equal tokens make equal prompts"
    points = pd.read_csv(run.stage_dir("analyse") / "pseudo.csv")
    assert points["modality"].value_counts().to_dict() == {"image": len(points) / 2, "text": len(points) / 2}
    assert list(points["image_id"][: len(points) // 2]) == list(points["image_id"][len(points) // 2 :])

    plant(own, lambda name: torch.randn(2, width))
    foreign = analysed(run, "pseudo", force=True)["metrics"]
    assert foreign["pseudo.distance.difference"]["low"] < 0.2 * found["pseudo.distance.difference"]["value"]


@pytest.mark.covers(96)
def test_a_prompt_that_says_the_caption_is_found_by_it(people, tmp_path, monkeypatch):
    original = analyse_prompts._invert_batch

    def spoken(method, batch):
        found = original(method, batch)
        return {**found, "image_prompt": found["caption"]}

    monkeypatch.setattr(analyse_prompts, "_invert_batch", spoken)
    auc = analysed(hpl(tmp_path / "r", people), "pseudo")["metrics"]["pseudo.caption.auc"]
    assert auc["low"] > 0.95 and auc["control"] == pytest.approx(0.5, abs=0.1) and auc["control_high"] < auc["low"]


@pytest.mark.covers(95, 100)
def test_a_planted_word_is_decoded_and_predicts_what_it_names(people, tmp_path, plant):
    run = hpl(tmp_path / "r", people)
    method = load_method(run.stage_dir("finetune"), "cpu")
    known, _ = images_of(people)
    table = method.word_table.detach()
    colours = {value["upper_colour"] for value in known.values()}
    ids = {colour: method.backbone.tokenizer.encode(colour)[0] for colour in colours}
    # A word's own direction at any length, at the second place; the first says nothing.
    plant(lambda name: torch.stack([table[ids["red"]], 3 * table[ids[known[name]["upper_colour"]]]]))
    record = analysed(run, "words")
    rows = pd.read_csv(run.stage_dir("analyse") / "words.csv")
    assert list(rows.columns) == ["image_id", "position", "word", "cosine"] and len(rows) == 2 * record["images"]
    assert rows["cosine"].to_numpy() == pytest.approx(1, abs=1e-5)
    second = rows[rows["position"] == 1]
    assert list(second["word"]) == [known[name]["upper_colour"] for name in second["image_id"]]
    assert set(rows.loc[rows["position"] == 0, "word"]) == {"red"}
    found = record["metrics"]
    purity, nmi = found["words.upper_colour.purity"], found["words.upper_colour.nmi"]
    assert purity["value"] == pytest.approx((1 + purity["chance"]) / 2) and purity["value"] > purity["control_high"]
    assert nmi["value"] == pytest.approx(1 / 2) and nmi["value"] > nmi["control_high"] + 0.1
    assert found["words.gender.nmi"]["value"] < found["words.gender.nmi"]["control_high"] + 0.1
    assert found["words.caption.hits-difference"]["low"] > 0 < found["words.caption.similarity-difference"]["low"]


def test_tokens_read_as_the_words_they_came_from():
    for tokenizer in (ClipTokenizer(), WordPieceTokenizer()):
        for word in ("red", "shirt", "backpack", "woman"):
            assert tokenizer.word(tokenizer.encode(word)[0]) == word
        assert all(tokenizer.word(token) for token in (*tokenizer.word_ids[:300], *tokenizer.word_ids[-300:]))
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused7]", "red", "##ish")
    assert [WordPieceTokenizer(vocabulary=pieces).word(token) for token in (5, 6, 7)] == ["[unused7]", "red", "##ish"]


@pytest.mark.covers(104)
def test_the_overhead_is_that_of_the_built_model(made):
    run, record = made
    method, found = load_method(run.stage_dir("finetune")), record["metrics"]
    towers = sum(value.numel() for value in method.backbone.parameters())
    modules = {"inversion_image": method.invert_image, "inversion_text": method.invert_text}
    modules |= {"prompt_encoder": method.prompt_text}
    sizes = {name: sum(value.numel() for value in module.parameters()) for name, module in modules.items()}
    sizes |= {"second_token": method.backbone.width_image, "identity_tokens": method.id_tokens.numel()}
    assert found["pseudo.parameters.towers"] == towers
    for name, size in sizes.items():
        assert found[f"pseudo.parameters.{name}"] == size
        assert found[f"pseudo.overhead.{name}"] == pytest.approx(size / towers)


@pytest.mark.covers(102)
def test_probes_read_pseudo_tokens(made, people, tmp_path):
    record = analysed(hpl(tmp_path / "r", people), "probes", features=["pseudo"])
    probed = {name for name in record["metrics"] if name.startswith("probes.pseudo.")}
    assert {"probes.pseudo.person", "probes.pseudo.upper_colour"} <= probed == set(record["metrics"])


def write_history(run, **values):
    rows = [
        {"stage": "finetune", "step": step, "epoch": step, "split": "train", "name": name, "value": v, "seconds": 0.0}
        for name, series in values.items()
        for step, v in enumerate(series)
    ]
    tables.write_table(run.table("finetune", "history"), "history", pd.DataFrame(rows))
    return run


@pytest.mark.covers(90, 91, 92)
def test_alarms_are_read_from_the_history_of_the_run(people, tmp_path):
    run = hpl(tmp_path / "r", people)
    with pytest.raises(DataError, match="no history"):
        analysed(run, "alarms")
    write_history(run, **{"loss/sdm": (1.0, 0.5)})
    with pytest.raises(DataError, match="none of the numbers"):
        analysed(run, "alarms")
    shrunk = {"pseudo/diversity": (0.5, 0.01), "pseudo/mismatch": (0.5, 0.01)}
    record = analysed(write_history(run, **shrunk), "alarms")
    assert record["metrics"] == {"alarms.collapse": 1, "alarms.over_regularisation": 1}
    assert sum(note.startswith("alarms: ") for note in record["notes"]) == 3
    assert any("holds no `task_cosine`" in note for note in record["notes"])
    healthy = {"pseudo/diversity": (0.5, 0.4), "pseudo/mismatch": (0.5, 0.4), "task_cosine": (0.1, 0.2)}
    record = analysed(write_history(run, **healthy), "alarms", force=True)
    assert set(record["metrics"]) == {f"alarms.{name}" for name in rules.ALARMS}
    assert not any(record["metrics"].values()) and not any("alarms" in note for note in record["notes"])
    record = analysed(write_history(run, **{**healthy, "task_cosine": (0.1, -0.5)}), "alarms", force=True)
    assert record["metrics"]["alarms.interference"] == 1 and any("oppose" in note for note in record["notes"])


@pytest.mark.covers(91)
def test_a_constant_inversion_network_raises_the_alarm_and_a_fresh_one_does_not(made):
    def report(method):
        torch.manual_seed(0)
        image = torch.randn(8, 3, *method.backbone.image_size)
        texts = {"full": method.backbone.tokenize([f"a person in colour {n}" for n in range(8)])}
        method.losses(Batch(image=image, person=torch.arange(8) % 4, texts=texts), "finetune")
        numbers = method.training_report()
        return pd.DataFrame(
            [{"split": "train", "name": n, "epoch": 0, "step": 0, "value": v} for n, v in numbers.items()]
        )

    method = load_method(made[0].stage_dir("finetune"), "cpu")
    method.begin("finetune")
    assert rules.collapse(report(method)) is None
    with torch.no_grad():
        method.invert_image.leave.weight.zero_()
        method.invert_image.leave.bias.fill_(0.02)
    assert rules.collapse(report(method)) is not None


def test_other_methods_and_models_without_pseudo_words_are_told_why(people, tmp_path):
    run = trained(tmp_path / "clip", people, name="clip", config={})
    for name in ("attention", "pseudo", "words", "alarms"):
        with pytest.raises(DataError, match=f"`--what {name}` does not apply: the method `clip`"):
            analysed(run, name)
    plain = hpl(tmp_path / "plain", people, prompts="plain")
    with pytest.raises(DataError, match="no inversion networks"):
        analysed(plain, "words")
    record = analysed(plain, "pseudo")
    assert {name.split(".")[1] for name in record["metrics"]} == {"parameters", "overhead"}


def test_images_without_captions_or_parts(people, tmp_path):
    folder = tmp_path / "data"
    images = tables.read_table(people / "images.parquet", "images")
    images["path"] = [str((people / path).resolve()) for path in images["path"]]
    tables.write_table(folder / "images.parquet", "images", images)
    run = trained(tmp_path / "r", folder, name="hpl", config=HPL, described=False)
    record = analysed(run, "attention,words")
    assert any("no image has a true mask" in note for note in record["notes"])
    assert any("fewer than two people have a caption" in note for note in record["notes"])
    assert "words.cosine" in record["metrics"] and "words.caption.hits" not in record["metrics"]
    with pytest.raises(DataError, match="fewer than two people"):
        analysed(run, "pseudo")


def test_masks_count_as_input_only_where_they_are_read(made, people):
    run, record = made
    assert record["inputs"]["parts"] == digest(people / "parts.parquet")
    assert "parts" not in analysed(run, "pseudo")["inputs"]


def test_the_same_model_gives_the_same_bytes(people, tmp_path):
    run = hpl(tmp_path / "r", people)
    first = analysed(run, "cam,words")
    again = analysed(run, "cam,words", force=True)
    assert first["outputs"] == again["outputs"] and first["metrics"] == again["metrics"]
