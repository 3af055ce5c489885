"""The interpret stage on untrained micro models: what is explained, what is refused, what is written."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from fakerun import finish, make_data

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.data import build_corpus
from reidctl.errors import DataError, UsageError
from reidctl.explain.explainers import EXPLAINERS
from reidctl.explain.maps import USER_QUERY
from reidctl.methods.base import build_method, save_method
from reidctl.runs import Run, digest
from reidctl.stages import gates, interpret, report
from reidctl.stages.interpret_tests import TESTS

BDAM = {"depth": 1, "heads": 2, "text_pool": "end"}
CHEAP = {"samples": 2, "pictures": 0, "device": "cpu", "explainer": "centre"}
QUICK_MASK = {"what": ["masking"], "fractions": (0.25,), "controls": ["random"]}
ODD_TEXT = "[red]coat[/red] <b>bold</b> $x_1$ \\alpha"


def make_model(run, name="clip", spec="clip:micro", *, settings=None, seed=0, data=None, people=4, **options):
    """Save an untrained model as the finished training of a run."""
    torch.manual_seed(seed)
    method = build_method(name, settings or {}, build(spec, **options), people)
    folder = run.stage_dir("finetune")
    save_method(method, folder)
    tables.write_table(run.table("finetune", "seen"), "seen", tables.empty("seen"))
    home = data or run.stage_dir("data")
    run.finish(
        "finetune", settings={"seed": 3, "method": {"name": name}}, inputs={"images": digest(home / "images.parquet")},
        outputs=[folder / "model.safetensors", run.table("finetune", "seen")], started=datetime.now(UTC),
        extra={"method": name, "data": str(home.resolve()), "described": None, "selected_on": "val"},
    )  # fmt: skip
    return method.eval()


def make_trained(folder, name="bdam", described=True, *, splits=("test",), people=4, **options):
    """A run with data, texts and an untrained model."""
    run = Run(folder)
    make_data(run.stage_dir("data"), people=people, each=2, splits=splits)
    finish(run, "data")
    images = tables.read_table(run.table("data", "images"), "images")
    if described:
        rows = [
            {
                "caption_id": f"{n}-{kind}", "image_id": n, "kind": kind, "source": "template", "status": "ok",
                "conditioned_on": "image", "text": f"a {kind} text",
            }
            for n in images["image_id"] for kind in ("identity", "clothing")
        ]  # fmt: skip
        tables.write_table(run.table("caption", "captions"), "captions", pd.DataFrame(rows))
        finish(run, "caption")
    options.setdefault("settings", BDAM if name == "bdam" else None)
    return run, make_model(run, name, **options)


def explained(run):
    return tables.read_table(run.table("interpret", "explanations"), "explanations")


def state_of(run):
    """Every file of the finished stage and its content."""
    folder = run.stage_dir("interpret")
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    run, method = make_trained(tmp_path_factory.mktemp("i") / "r")
    return run, method, interpret.run(run, samples=5, pictures=3, device="cpu")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A run of `clip` with the people of two splits: p0 and p2 in test, p1 and p3 in val."""
    return make_trained(tmp_path_factory.mktemp("c") / "r", "clip", described=False, splits=("test", "val"))[0]


@pytest.fixture(scope="module")
def finished(clip, tmp_path_factory):
    """A run whose stage is finished; nothing of what is refused may touch it."""
    run = Run(tmp_path_factory.mktemp("f") / "r")
    data = clip.stage_dir("data")
    make_model(run, data=data)
    interpret.run(run, **CHEAP)
    return run


# What is written


@pytest.mark.covers(180)
def test_explanations_and_overlays_are_written(made):
    run, _, record = made
    table = explained(run)
    assert len(table) == record["explained"] == 15  # every caption and its two phrases
    whole = table[table["phrase"].str.startswith("A person")]
    assert len(whole) == 5 and (whole["char_end"] == whole["phrase"].str.len()).all()
    rest = table.drop(whole.index)
    assert set(rest["phrase"].str.split().str[1]) == {"shirt", "trousers"}
    relevance = tables.matrix(table["relevance"])
    assert relevance.min() >= 0 and relevance.max() <= 1 and relevance.shape == (15, 8)
    assert len(list((run.stage_dir("interpret") / "pictures").glob("*.png"))) == 3


@pytest.mark.covers(188)
def test_grounding_is_scored_against_the_true_parts_with_controls(made):
    run, _, record = made
    scores = pd.read_csv(run.stage_dir("interpret") / "grounding.csv")
    assert len(scores) == record["grounded"] == 10 and record["parts"] == "true"
    np.testing.assert_allclose(scores["pointing.random"], scores["area"])
    assert scores["iou.pooled"].mean() > 2 * scores["iou.random"].mean()
    for name in ("pointing", "mass", "iou", "pointing-centre", "mass-random"):
        entry = record["metrics"][name]
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert record["metrics"][f"gradcam.{name}"]["value"] == pytest.approx(entry["value"])


@pytest.mark.covers(158)
def test_gate_means_of_complements_sum_to_one_and_every_sample_is_kept(made):
    run, _, _ = made
    found = json.loads((run.stage_dir("interpret") / "gates.json").read_text())
    means = {name: entry["mean"] for name, entry in found["summary"].items()}
    assert list(means) == ["identity", "clothing", "image", "text"]
    assert means["identity"] + means["clothing"] == pytest.approx(1, abs=1e-5)
    assert means["image"] + means["text"] == pytest.approx(1, abs=1e-5)
    assert len(found["samples"]) == 8
    saved = pd.read_csv(run.stage_dir("interpret") / "gates.csv")
    assert saved["image"].mean() == pytest.approx(means["image"], abs=1e-6)
    for ending in ("png", "svg"):
        assert (run.stage_dir("interpret") / f"gates.{ending}").is_file()


def test_gates_come_from_the_images_whatever_the_batch(made):
    run, method, _ = made
    folder = run.stage_dir("data")
    images, captions = (tables.read_table(folder / f"{n}.parquet", n) for n in ("images", "captions"))
    described = tables.read_table(run.table("caption", "captions"), "captions")
    corpus = build_corpus(images, captions, described, folder)
    names, one = gates.collect_gates(method, corpus, device=torch.device("cpu"), batch=3)
    _, other = gates.collect_gates(method, corpus, device=torch.device("cpu"), batch=8)
    assert names == list(images["image_id"])
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5)


def test_a_method_without_gates_leaves_no_gate_files(tmp_path):
    run, _ = make_trained(tmp_path / "r", name="clip", described=False)
    (run.stage_dir("interpret")).mkdir()
    (run.stage_dir("interpret") / "gates.json").write_text("{}")  # left by an earlier model
    record = interpret.run(run, samples=2, pictures=1, device="cpu", explainer="patch")
    assert record["gates"] == {}
    assert not (run.stage_dir("interpret") / "gates.json").exists()


@pytest.mark.covers(200)
def test_every_parameter_of_the_metrics_is_in_the_record(clip):
    asked = {"fractions": (0.3, 0.1), "fills": ("zero", "blur"), "controls": ["least"], "draws": 12, "level": "phrase"}
    kept = interpret.run(clip, **CHEAP, **asked, aggregate="max", seed=4)["settings"]
    assert kept["seed"] == 4
    expected = {
        "fractions": [0.3, 0.1], "fills": ["zero", "blur"], "controls": ["least"], "draws": 12, "placements": 3,
        "scope": "target", "level": "phrase", "aggregate": "max", "samples": 2, "explainer": ["centre"],
        "what": ["grounding", "concentration"], "split": "test", "judges": [], "encoder": None, "phrases": "given",
        "curve_steps": 11, "curve_temperature": 0.02, "alignment_window": [0.35, 0.6], "alignment_draws": 10,
        "sanity_phrases": 200,
    }  # fmt: skip
    assert {name: kept["interpret"][name] for name in expected} == expected
    saved = json.loads((clip.stage_dir("interpret") / "stage.json").read_text())["settings"]
    assert saved == json.loads(json.dumps(kept))


def test_what_an_earlier_run_left_and_this_one_does_not_write_goes(clip):
    interpret.run(clip, **(CHEAP | QUICK_MASK | {"pictures": 2, "what": ["masking", "grounding"]}))
    assert {"faithfulness.parquet", "grounding.csv"} <= {path.name for path in state_of(clip)}
    interpret.run(clip, **CHEAP, what=["concentration"])
    assert {str(path) for path in state_of(clip)} == {
        "stage.json", "explanations.parquet", "interpretability.parquet",
    }  # fmt: skip


# Which explainers and which tests


@pytest.mark.covers(181)
def test_the_default_explainer_is_the_methods_own_module_else_grad_cam(clip, tmp_path):
    assert interpret.run(clip, **(CHEAP | {"explainer": ()}))["explainers"] == ["gradcam"]
    parts = Run(tmp_path / "parts")
    make_model(parts, "interpart", data=clip.stage_dir("data"))
    assert interpret.run(parts, **(CHEAP | {"explainer": ()}))["explainers"] == ["ppim"]


@pytest.mark.covers(181)
def test_all_explainers_are_those_that_the_method_has_and_their_rows_stand_together(clip, tmp_path):
    found = interpret.run(clip, **(CHEAP | {"explainer": ("all",)}))
    assert found["explainers"] == [name for name in EXPLAINERS if name != "ppim"]
    table = explained(clip)
    assert len(table) == found["explained"] * 8 and list(table["explainer"][:8]) == found["explainers"]
    assert table["phrase"].iloc[:8].nunique() == 1
    assert {f"{name}.entropy" for name in found["explainers"]} <= set(found["metrics"])
    parts = Run(tmp_path / "parts")
    make_model(parts, "interpart", data=clip.stage_dir("data"))
    assert interpret.run(parts, **(CHEAP | {"explainer": "all"}))["explainers"] == list(EXPLAINERS)


def test_explainers_come_with_commas_or_repeated_once_each_in_the_order_asked(clip):
    found = interpret.run(clip, **(CHEAP | {"explainer": ("random, patch", "random")}))
    assert found["explainers"] == ["random", "patch"]


@pytest.mark.parametrize("name", TESTS)
def test_each_test_can_be_asked_for_alone(clip, tmp_path, name):
    other = Run(tmp_path / "other")
    make_model(other, seed=1, data=clip.stage_dir("data"))
    extra = {"stability": {"judges": [other]}, "alignment": {"encoder": str(other.path)}}.get(name, {})
    small = {"fractions": (0.25,), "controls": ["random"]}
    record = interpret.run(clip, **CHEAP, **small, **extra, what=[name])
    rows = tables.read_table(clip.table("interpret", "interpretability"), "interpretability")
    wanted = {
        "grounding": {"pointing", "mass", "iou"},
        "concentration": {"entropy", "top10_mass", "spread"},
        "masking": {"similarity_drop", "rank_shift", "rank1_drop", "mAP_drop"},
        "curves": {"deletion", "insertion"},
        "specificity": {"specificity"},
        "alignment": {"alignment"},
        "sanity": {"sanity.weights", "sanity.phrases"},
        "stability": {"stability"},
        "binding": {"binding.swap", "binding.random"},
    }
    assert set(rows["metric"]) == wanted[name] and record["notes"] == []
    assert record["settings"]["interpret"]["what"] == [name]


@pytest.mark.parametrize("what", [["all"], ["all,masking"], ["binding", " all"]])
def test_all_tests_are_those_that_apply_and_the_others_are_noted(clip, what):
    record = interpret.run(clip, **CHEAP, fractions=(0.25,), controls=["random"], what=what, force=True)
    assert [note.split(":")[0] for note in record["notes"]] == ["alignment", "stability"]
    assert "--encoder" in record["notes"][0] and "--judge" in record["notes"][1]
    rows = tables.read_table(clip.table("interpret", "interpretability"), "interpretability")
    assert {"mAP_drop", "deletion", "specificity", "sanity.weights", "binding.swap"} <= set(rows["metric"])


def test_a_test_that_does_not_apply_may_be_asked_for_leniently(clip):
    record = interpret.run(clip, **CHEAP, what=["stability", "concentration"], lenient=True)
    assert len(record["notes"]) == 1 and "centre.entropy" in record["metrics"]
    with pytest.raises(DataError, match="stability"):
        interpret.run(clip, **CHEAP, what=["stability", "concentration"])


# Up to date


def test_the_stage_is_up_to_date_until_a_setting_changes(made):
    run = made[0]
    assert interpret.run(run, samples=5, pictures=3, device="cpu")["status"] == "up-to-date"


CHANGES = [
    {"samples": 3}, {"explainer": "random"}, {"what": ["grounding"]}, {"phrase": "red shirt"}, {"seed": 1},
    {"query": "p0s0-c"}, {"image": "p0s1"}, {"split": "val"}, {"fractions": (0.1,)}, {"fills": ("zero",)},
    {"controls": ["least"]}, {"draws": 11}, {"scope": "all_positives"}, {"level": "phrase"}, {"aggregate": "max"},
    {"encoder": "clip:micro"}, {"phrases": "rules"}, {"pictures": 1},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_a_changed_flag_runs_again_and_an_unchanged_one_does_not(finished, change):
    before = {"force": True} | CHEAP
    interpret.run(finished, **before)
    changed = CHEAP | change
    assert interpret.run(finished, **changed)["status"] == "done"
    assert interpret.run(finished, **changed)["status"] == "up-to-date"
    assert interpret.run(finished, **changed, batch=3)["status"] == "up-to-date", "the batch decides nothing"


def test_a_changed_judge_encoder_or_parts_file_runs_again(clip, tmp_path):
    other, data = Run(tmp_path / "other"), clip.stage_dir("data")
    make_model(other, seed=1, data=data)
    masks = tmp_path / "masks.parquet"
    masks.write_bytes((data / "parts.parquet").read_bytes())
    asked = CHEAP | {"judges": [other], "encoder": str(other.path), "parts": masks}
    assert interpret.run(clip, **asked)["status"] == "done"
    assert interpret.run(clip, **asked)["status"] == "up-to-date"
    make_model(other, seed=2, data=data)
    assert interpret.run(clip, **asked)["status"] == "done"
    tables.write_table(masks, "parts", tables.read_table(masks, "parts").iloc[1:])
    assert interpret.run(clip, **asked)["status"] == "done"
    assert interpret.run(clip, **asked)["status"] == "up-to-date"


# Words and pictures of the user


@pytest.mark.covers(173)
def test_a_phrase_never_seen_is_explained_but_not_scored(tmp_path):
    run, _ = make_trained(tmp_path / "r", name="clip", described=False)
    record = interpret.run(run, samples=3, pictures=0, device="cpu", phrase="long purple hair")
    assert record["explained"] == 3 and record["grounded"] == 0
    assert set(record["metrics"]) == {"gradcam.entropy", "gradcam.top10_mass", "gradcam.spread"}
    assert any("no explained phrase names a part" in note for note in record["notes"])
    assert not (run.stage_dir("interpret") / "grounding.csv").exists()
    assert report.run(run)["status"] == "done"
    assert "long purple hair" in (run.stage_dir("report") / "report.html").read_text()


@pytest.mark.covers(173)
def test_a_phrase_on_a_named_image_gives_one_map(clip):
    record = interpret.run(clip, **(CHEAP | {"explainer": "patch,gradcam"}), phrase="green hat", image="p2s1")
    assert record["explained"] == 1
    table = explained(clip)
    assert list(table["image_id"]) == ["p2s1"] * 2 and list(table["query_id"]) == [USER_QUERY] * 2
    assert list(table["explainer"]) == ["patch", "gradcam"] and set(table["phrase"]) == {"green hat"}


@pytest.mark.covers(173)
@pytest.mark.parametrize(("size", "mode"), [((1, 1), "RGB"), ((700, 30), "L"), ((33, 301), "RGBA"), ((20, 20), "P")])
def test_a_phrase_on_any_picture_file(clip, tmp_path, size, mode):
    path = tmp_path / "some photo.png"
    Image.new(mode, size).save(path)
    asked = CHEAP | {"explainer": "patch,gradcam", "pictures": 2}
    record = interpret.run(clip, **asked, phrase="green hat", image=str(path))
    table = explained(clip)
    assert record["explained"] == 1 and list(table["image_id"]) == ["some photo.png"] * 2
    drawn = list((clip.stage_dir("interpret") / "pictures").glob("*.png"))
    assert len(drawn) == 1


def test_a_query_by_id_stands_on_its_own_image_with_its_phrases_or_on_another(clip):
    interpret.run(clip, **CHEAP, query="p2s1-c")
    table = explained(clip)
    assert set(table["image_id"]) == {"p2s1"} and set(table["query_id"]) == {"p2s1-c"} and len(table) == 3
    record = interpret.run(clip, **CHEAP, query="p2s1-c", image="p0s0")
    table = explained(clip)
    assert set(table["image_id"]) == {"p0s0"} and set(table["query_id"]) == {"p2s1-c"} and len(table) == 3
    assert record["explained"] == 3


def test_free_words_are_split_into_phrases_and_seen_on_random_images_or_the_named_one(clip):
    interpret.run(clip, **CHEAP, query="a woman with a green hat and grey boots")
    table = explained(clip)
    assert table["image_id"].nunique() == 2 and set(table["query_id"]) == {USER_QUERY}
    assert {"green hat", "grey boots"} < set(table["phrase"])
    interpret.run(clip, **CHEAP, query="a woman with a green hat and grey boots", image="p0s0")
    assert set(explained(clip)["image_id"]) == {"p0s0"}


def test_an_image_alone_is_explained_by_its_own_captions(clip):
    interpret.run(clip, **CHEAP, image="p2s0")
    assert set(explained(clip)["query_id"]) == {"p2s0-c"}


def test_the_split_decides_whose_captions(clip):
    interpret.run(clip, **(CHEAP | {"samples": 99}), split="val")
    assert set(explained(clip)["image_id"]) == {"p1s0", "p1s1", "p3s0", "p3s1"}


@pytest.mark.covers(171)
def test_a_backend_asked_for_by_name_finds_phrases_that_the_dataset_does_not_have(clip):
    data = clip.stage_dir("data")
    captions = tables.read_table(data / "captions.parquet", "captions")
    held = (data / "captions.parquet").read_bytes()
    worn = captions["kind"] == "full"
    captions.loc[worn, "text"] += " He has a yellow backpack."
    tables.write_table(data / "captions.parquet", "captions", captions)
    try:
        interpret.run(clip, **CHEAP)
        assert not explained(clip)["phrase"].str.fullmatch("yellow backpack").any()
        interpret.run(clip, **CHEAP, phrases="rules")
        assert explained(clip)["phrase"].str.fullmatch("yellow backpack").any()
    finally:
        (data / "captions.parquet").write_bytes(held)


@pytest.mark.covers(199)
def test_masks_of_the_users_own_are_marked_as_such(clip, tmp_path):
    folder = tmp_path / "parsing"
    folder.mkdir()
    (folder / "labels.json").write_text('{"1": "upper clothes", "2": "pants"}')
    for name in ("p0s0", "p0s1", "p2s0", "p2s1"):
        label = np.zeros((64, 32), np.uint8)
        label[15:35, 8:24], label[35:59, 8:24] = 1, 2
        Image.fromarray(label).save(folder / f"{name}.png")
    record = interpret.run(clip, **CHEAP, parts=folder)
    scores = pd.read_csv(clip.stage_dir("interpret") / "grounding.csv")
    assert record["parts"] == "user-supplied" and record["grounded"] == 4
    assert set(scores["area"]) == {16 * 20 / 2048, 16 * 24 / 2048}
    assert interpret.run(clip, **CHEAP)["parts"] == "true"
    same = clip.stage_dir("data") / "parts.parquet"
    assert interpret.run(clip, **CHEAP, parts=same)["parts"] == "user-supplied"


def test_markup_in_phrases_stays_text_in_tables_pictures_and_the_report(clip):
    record = interpret.run(clip, **(CHEAP | {"pictures": 2}), phrase=ODD_TEXT)
    assert list(explained(clip)["phrase"]) == [ODD_TEXT] * 2 and record["pictures"] == 2
    report.run(clip)
    page = (clip.stage_dir("report") / "report.html").read_text()
    assert "<b>bold</b>" not in page and "[red]coat[/red] &lt;b&gt;bold" in page


# What is refused


def write_picture(path, kind):
    Image.new("RGB", (40, 80), (9, 200, 9)).save(path)
    whole = path.read_bytes()
    path.write_bytes({"text": b"not a picture", "cut": whole[: len(whole) // 2], "empty": b""}[kind])


REFUSED = {
    "explainer": ({"explainer": "magic"}, UsageError, "gradcam"),
    "explainer beside all": ({"explainer": "all,magic"}, UsageError, "magic"),
    "ppim of clip": ({"explainer": "ppim"}, UsageError, "interpart"),
    "test": ({"what": ["tea-leaves"]}, UsageError, "tea-leaves"),
    "empty phrase": ({"phrase": " "}, UsageError, "empty"),
    "empty query": ({"query": ""}, UsageError, "empty"),
    "empty image": ({"image": " "}, UsageError, "empty"),
    "phrase and query": ({"phrase": "hat", "query": "a hat"}, UsageError, "exclude each other"),
    "level": ({"level": "word"}, UsageError, "caption, phrase"),
    "aggregate": ({"aggregate": "sum"}, UsageError, "weighted"),
    "scope": ({"scope": "gallery"}, UsageError, "all_positives"),
    "phrases": ({"phrases": "magic"}, UsageError, "spacy"),
    "fill": ({"fills": ("paint",)}, UsageError, "paint"),
    "plugin": ({"fills": ("plugin:no.such.module:f",)}, UsageError, "no.such.module"),
    "control": ({"controls": ["nothing"]}, UsageError, "nothing"),
    "no fraction": ({"fractions": ()}, UsageError, "fractions"),
    "too large a fraction": ({"fractions": (1.5,)}, UsageError, "fractions"),
    "too few draws": ({"draws": 3}, UsageError, "at least 10"),
    "device": ({"device": "abacus"}, UsageError, "abacus"),
    "drop everything": ({"what": ["masking"], "fills": ("drop",), "fractions": (1.0,)}, UsageError, "every patch"),
    "split": ({"split": "nowhere"}, DataError, "nowhere"),
    "image": ({"image": "nobody.jpg"}, DataError, "no image of the test split and no file"),
    "image of another split": ({"image": "p1s0"}, DataError, "no image of the test split"),
    "very long image": ({"image": "x" * 5000, "phrase": "hat"}, DataError, "no file"),
    "null image": ({"image": "a\0b", "phrase": "hat"}, DataError, "no file"),
    "folder as image": ({"image": "/tmp", "phrase": "hat"}, DataError, "no file"),
    "query of another split": ({"query": "p1s0-c"}, DataError, "not in this split"),
    "data": ({"data": Path("/nowhere")}, DataError, "/nowhere"),
    "captions": ({"captions": Path("/nowhere.parquet")}, DataError, "/nowhere"),
    "parts": ({"parts": Path("/nowhere.parquet")}, DataError, "/nowhere"),
    "parts that are none": ({"parts": Path(__file__)}, DataError, "test_interpret.py"),
    "judge": ({"judges": [Run(Path("/nowhere"))]}, DataError, "no finished `finetune`"),
    "encoder": ({"encoder": "/nowhere"}, DataError, "no finished `finetune`"),
    "encoder spec": ({"encoder": "magic:thing"}, UsageError, "magic:thing"),
    "long encoder": ({"encoder": "y" * 5000 + ":x"}, UsageError, "Unknown backbone"),
    "stability without a judge": ({"what": ["stability"]}, DataError, "--judge"),
    "alignment without an encoder": ({"what": ["alignment"]}, DataError, "--encoder"),
    "masking of a phrase": ({"what": ["masking"], "phrase": "hat"}, DataError, "no caption of the split"),
    "masking of a stranger": ({"what": ["masking"], "query": "p0s0-c", "image": "p2s0"}, DataError, "no caption"),
    "binding of one phrase": ({"what": ["binding"], "phrase": "hat"}, DataError, "caption of the split"),
    "specificity of one phrase": ({"what": ["specificity"], "phrase": "hat"}, DataError, "two phrases"),
    "specificity by swaps": ({"what": ["specificity"], "fills": ("swap",)}, DataError, "swap"),
    "grounding of nothing": ({"what": ["grounding"], "phrase": "sky"}, DataError, "names a part"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_input_is_one_sentence_and_leaves_the_finished_stage_as_it_was(finished, case):
    flags, error, words = REFUSED[case]
    before = state_of(finished)
    with pytest.raises(error) as caught:
        interpret.run(finished, **(CHEAP | flags))
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == (2 if error is UsageError else 3)
    assert state_of(finished) == before and Path("stage.json") in before


@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_a_picture_that_cannot_be_read_is_named_and_the_finished_stage_stays(finished, tmp_path, kind):
    path = tmp_path / "bad.png"
    write_picture(path, kind)
    before = state_of(finished)
    with pytest.raises(DataError, match=r"bad\.png.*cannot be read"):
        interpret.run(finished, **CHEAP, phrase="hat", image=str(path))
    assert state_of(finished) == before


def test_a_picture_of_nobodys_without_words_says_what_is_lacking(finished, picture):
    with pytest.raises(DataError, match=r"person\.png.*has no caption.*--query"):
        interpret.run(finished, **CHEAP, image=picture)


def test_people_that_the_model_was_trained_on_are_not_masked(finished, clip):
    images = tables.read_table(clip.table("data", "images"), "images")
    seen = pd.DataFrame({"kind": ["image"], "digest": [images["sha256"].iloc[0]]})
    held = finished.table("finetune", "seen").read_bytes()
    tables.write_table(finished.table("finetune", "seen"), "seen", seen)
    try:
        before = state_of(finished)
        with pytest.raises(DataError, match="no test"):
            interpret.run(finished, **(CHEAP | QUICK_MASK))
        assert state_of(finished) == before
        assert interpret.run(finished, **CHEAP, force=True)["status"] == "done", "looking is allowed"
    finally:
        finished.table("finetune", "seen").write_bytes(held)


def test_no_model_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="finetune"):
        interpret.run(Run(tmp_path), device="cpu")


def test_the_report_shows_a_picture_that_belongs_to_no_dataset_and_says_what_was_asked(tmp_path):
    run, _ = make_trained(tmp_path / "r", "clip", False)
    file = tmp_path / "street.png"
    Image.fromarray(np.full((40, 30, 3), 90, np.uint8)).save(file)
    record = interpret.run(run, explainer="patch,centre", phrase="green hat", image=str(file))
    assert record["file"] == str(file)
    report.run(run)
    page = (run.stage_dir("report") / "report.html").read_text(encoding="utf-8")
    shown = page[page.index('id="maps"') :]
    assert (
        "words that were given, on the image that was named" in page and "drawn at random, each on its own" not in page
    )
    assert shown.count("data:image") >= 3 and "unreadable" not in shown[: shown.index("</section>")]


def test_a_single_phrase_is_compared_by_weights_though_it_cannot_be_exchanged(tmp_path):
    run, _ = make_trained(tmp_path / "r", "clip", False)
    interpret.run(run, explainer="patch", samples=4, phrase="green hat", what=["sanity"])
    rows = tables.read_table(run.table("interpret", "interpretability"), "interpretability")
    assert set(rows["metric"]) == {"sanity.weights"}


def test_a_caption_that_is_its_own_phrase_is_explained_once(tmp_path):
    run, _ = make_trained(tmp_path / "r", "clip", False)
    interpret.run(run, explainer="patch", query="red shirt", samples=2)
    table = tables.read_table(run.table("interpret", "explanations"), "explanations")
    assert table["phrase"].tolist() == ["red shirt", "red shirt"] and table["image_id"].nunique() == 2
