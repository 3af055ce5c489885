"""The robustness stage on untrained micro models: what is measured, paired, explained, resumed and refused."""

import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import corpus_of, write_dataset

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.console import log
from reidctl.embedding import embed_blank, embed_gallery, embed_queries, token_keys
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.paraphrase import STYLES, TRUTH_STYLES
from reidctl.evaluation.robustness import SpoiltImages
from reidctl.evaluation.settings import SETTINGS
from reidctl.methods.base import build_method, save_method
from reidctl.metrics import chance
from reidctl.runs import Run, digest, fingerprint
from reidctl.stages import data_synth, robustness, spoiling

CPU = torch.device("cpu")
OWN_TEXT = {"depth": 1, "heads": 2, "text_pool": "end", "protocol": "own_text"}


def trained(folder, data, *, name="clip", config=None, seed=0, described=True, people=(), settings=None):
    """A run with an untrained model that claims to have been trained on `data`, having seen `people`."""
    run = Run(folder)
    torch.manual_seed(seed)
    files = save_method(build_method(name, config or {}, build("clip:micro"), 4), run.stage_dir("finetune"))
    seen = pd.DataFrame({"kind": "person", "digest": [fingerprint({"person": person}, {}) for person in people]})
    tables.write_table(run.table("finetune", "seen"), "seen", seen if people else tables.empty("seen"))
    text = data / "described.parquet"
    run.finish(
        "finetune", settings=settings or {}, inputs={"images": digest(data / "images.parquet")}, outputs=files,
        started=datetime.now(UTC),
        extra={
            "method": name, "data": str(data.resolve()), "selected_on": "val",
            "described": str(text) if described else None,
        },
    )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("robust") / "blocks", people=6, splits=dict.fromkeys(range(6), "test"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, blocks):
    """A model, a control and what all settings give."""
    folder = tmp_path_factory.mktemp("made")
    run, control = trained(folder / "m", blocks), trained(folder / "c", blocks, seed=1)
    return run, control, robustness.run(run, control=control, device="cpu")


def row_of(record, setting, *, model="model", direction="t2i", seed=0):
    found = [
        row
        for row in record["rows"]
        if (row["setting"], row["model"], row["direction"], row["seed"]) == (setting, model, direction, seed)
    ]
    assert len(found) == 1, (setting, model, direction, seed)
    return found[0]


@pytest.mark.covers(153)
def test_all_settings_are_measured_on_both_models_with_their_references(made):
    record = made[2]
    names = {row["setting"] for row in record["rows"]}
    assert names - {"standard-texts"} == (set(SETTINGS) - {"paraphrase"}) | {f"paraphrase:{style}" for style in STYLES}
    for model in ("model", "control"):
        assert row_of(record, "standard-texts", model=model)["queries"] == 18
        assert [row_of(record, "clothes-conflict", model=model, seed=seed)["queries"] for seed in (0, 1, 2, -1)] == [
            18
        ] * 4
        assert {row["setting"] for row in record["rows"] if row["direction"] == "i2i" and row["model"] == model} == {
            "standard", "blur", "low-resolution", "occlusion", "illumination", "blank"
        }  # fmt: skip
    table = tables.read_table(made[0].table("robustness", "robustness"), "robustness")
    assert len(table) == sum(len(row["values"]) for row in record["rows"])
    assert (
        table.loc[table["setting"].isin(["identity-only", "clothes-conflict"]), "reference"].eq("standard-texts").all()
    )
    assert record["metrics"]["t2i"]["typos/rank1"] == row_of(record, "typos")["values"]["rank1"][0]


def test_every_drop_is_reference_minus_setting(made):
    for row in made[2]["rows"]:
        base = row_of(made[2], row["reference"], model=row["model"], direction=row["direction"])
        for metric, (drop, low, high, p) in row["drops"].items():
            assert drop == pytest.approx(base["values"][metric][0] - row["values"][metric][0], abs=1e-12)
            assert low <= drop + 1e-12 and drop <= high + 1e-12 and 0 < p <= 1
        assert bool(row["drops"]) == (row["setting"] != row["reference"])


@pytest.mark.covers(154)
def test_the_ceiling_and_the_clothing_words_of_identity_texts_stand_beside_identity_only(made):
    row = row_of(made[2], "identity-only")
    # "A tall/young person of build N.": two texts per person, each of one person.
    assert row["ceiling"] == 1.0 and row["clothing_share"] == 0.0
    assert "0.0 % of the words" in row["note"] and "rank-1 100.0 %" in row["note"]
    without = {row["setting"] for row in made[2]["rows"] if row["ceiling"] is None and row["direction"] == "t2i"}
    assert without == {"blur", "low-resolution", "occlusion", "illumination", "blank"}


def test_blank_pictures_give_exactly_chance(made):
    queries = tables.read_table(made[0].table("robustness", "queries"), "queries")
    for direction in ("t2i", "i2i"):
        rows = queries[(queries["condition"] == "blank#0") & (queries["direction"] == direction)]
        expected = chance(rows["matches"], rows["gallery"])
        np.testing.assert_allclose(rows["average_precision"], expected.average_precision, rtol=0, atol=1e-9)
        np.testing.assert_allclose(rows["rank1"], expected.hits[1], rtol=0, atol=1e-9)
        assert "Exactly chance" in row_of(made[2], "blank", direction=direction)["note"]


@pytest.mark.covers(156)
def test_the_control_is_asked_the_same_and_its_drops_are_compared_with_intervals(made):
    run, control, record = made
    mine, theirs = (tables.read_table(run.table("robustness", name), "queries") for name in ("queries", "control"))
    keys = ["condition", "direction", "query_id", "matches", "gallery"]
    pd.testing.assert_frame_equal(mine[keys], theirs[keys])
    for row in record["differences"]:
        seed = row["seed"]
        ours, other = (
            row_of(record, row["setting"], model=model, direction=row["direction"], seed=seed)["drops"]["mAP"][0]
            for model in ("model", "control")
        )
        value, low, high, _ = row["values"]["mAP"]
        assert value == pytest.approx(ours - other, abs=1e-12)
        assert low <= value + 1e-12 and value <= high + 1e-12
    said = " ".join(record["notes"])
    assert "identity-only: rank-1 falls" in said and "clothes-conflict: rank-1 falls" in said
    assert record["runs"]["control"] == str(control.path.resolve())


def test_pictures_are_spoilt_in_the_gallery_of_texts_and_in_the_queries_of_images(made, monkeypatch):
    run = made[0]
    subject = spoiling_subject(run)
    asked = spoiling.plan(subject, ("standard", "blur", "blank"), query="caption", seed=0, level=None)
    bench = spoiling.Bench(subject, asked)
    text, image = bench.captions
    blur, blank = asked.cases[1:]
    spoilt_text, spoilt_image = bench._under(blur, bench.captions)
    assert np.array_equal(spoilt_text.query.vectors, text.query.vectors)
    assert not np.array_equal(spoilt_text.gallery.vectors, text.gallery.vectors)
    assert np.array_equal(spoilt_image.gallery.vectors, image.gallery.vectors)
    assert not np.array_equal(spoilt_image.query.vectors, image.query.vectors)
    assert [case.spoils(direction) for case in (blur, blank) for direction in ("t2i", "i2i")] == [
        "gallery", "queries", "gallery", "both"
    ]  # fmt: skip
    _, both = bench._under(blank, bench.captions)
    assert len(np.unique(np.concatenate([both.query.vectors, both.gallery.vectors]), axis=0)) == 1


def spoiling_subject(run, **options):
    from reidctl.stages.measuring import find_subject

    return find_subject(run, device="cpu", **options)


def test_equal_inputs_have_equal_vectors_whatever_the_batch(blocks):
    method = build_method("clip", {}, build("clip:micro"), 4).eval()
    corpus = corpus_of(blocks)
    vectors = embed_blank(method, corpus, device=CPU, batch=5)
    assert vectors.shape == (18, method.embed_images(_one_blank(method)).shape[1])
    assert (vectors == vectors[0]).all()
    # The same as a store of blanked pictures gives, up to what batches do to last bits.
    images = corpus.images
    store = SpoiltImages(
        corpus.paths(), list(images["image_id"]), list(zip(images["height"], images["width"], strict=True)),
        method.backbone.image_size, interpolation="bicubic", setting="blank", level=None, seed=0,
    )  # fmt: skip
    np.testing.assert_allclose(embed_gallery(method, corpus, device=CPU, store=store), vectors, atol=1e-5)
    # CLIP's tokenizer has no capitals, so the model cannot tell "A B C".
    texts = ["a b c", "a much longer text about somebody", "A B C", "d"] * 3
    found = embed_queries(method, texts, device=CPU, batch=2)
    assert all((found[row] == found[row % 4]).all() for row in range(12)) and (found[0] == found[2]).all()
    np.testing.assert_allclose(found[:2], embed_queries(method, texts[:2], device=CPU), atol=1e-5)
    keys = token_keys(method, texts)
    assert [len(set(keys)), keys[0] == keys[2]] == [3, True]
    # Known vectors are taken, not made.
    given = embed_queries(method, texts, device=CPU, known={keys[1]: np.full(found.shape[1], 7, np.float32)})
    assert (given[1] == 7).all() and (given[0] != 7).any()
    done = []
    embed_queries(method, texts, device=CPU, batch=2, advance=done.append)
    assert sum(done) == len(texts)


def _one_blank(method):
    from reidctl.batch import Batch

    return Batch(image=torch.zeros(1, 3, *method.backbone.image_size))


@pytest.mark.covers(157)
def test_queries_without_clothing_give_three_equal_rows_that_say_so(made):
    record = robustness.run(made[0], settings=("identity-only", "clothes-conflict"), query="identity", device="cpu")
    base = row_of(record, "standard-texts")
    for setting, seed in (("identity-only", 0), ("clothes-conflict", 0), ("clothes-conflict", -1)):
        row = row_of(record, setting, seed=seed)
        assert row["values"] == base["values"] and row["changed"] == 0
        assert "contain no clothing text" in row["note"] and "not robustness" in row["note"]
    (said,) = [
        note for note in record["notes"] if note.startswith("blocks t2i, model, identity-only") and "text" in note
    ]
    assert "contain no clothing text" in said


@pytest.mark.covers(157)
def test_a_change_that_the_tokenizer_does_not_keep_is_said_to_be_unread(tmp_path):
    data = write_dataset(tmp_path / "blocks", people=6, splits=dict.fromkeys(range(6), "test"))
    texts = tables.read_table(data / "captions.parquet", "captions")
    texts["text"] = texts["text"].str.replace(".", "")  # nothing but the capital is left for plain-case to change
    tables.write_table(data / "captions.parquet", "captions", texts)
    record = robustness.run(trained(tmp_path / "r", data), settings=("paraphrase",), device="cpu")
    row = row_of(record, "paraphrase:plain-case")
    assert row["changed"] == 1.0 and "does not read what the setting changes" in row["note"]


@pytest.mark.covers(157)
def test_settings_at_level_zero_are_not_called_robustness(made):
    record = robustness.run(made[0], settings=("typos", "blur"), level=0.0, device="cpu")
    for row in (row_of(record, "typos"), row_of(record, "blur"), row_of(record, "blur", direction="i2i")):
        assert {drop[0] for drop in row["drops"].values()} == {0.0}
        assert "left every query as it was" in row["note"]


def test_a_second_call_is_up_to_date_and_finished_measurements_are_reused(made, monkeypatch):
    run, control, _ = made
    robustness.run(run, control=control, device="cpu")
    assert robustness.run(run, control=control, device="cpu")["status"] == "up-to-date"
    measured = []
    original = spoiling.Bench.measure
    monkeypatch.setattr(spoiling.Bench, "measure", lambda self, case: measured.append(case.key) or original(self, case))
    record = robustness.run(run, control=control, settings=("typos", "blur"), device="cpu")
    assert record["status"] == "done" and measured == []
    robustness.run(run, settings=("typos", "blur"), device="cpu")
    assert not run.table("robustness", "control").exists()  # nothing of a control that was not asked for
    record = robustness.run(run, control=control, settings=("typos",), device="cpu", force=True)
    assert measured == ["standard#0", "typos#0"] * 2


def counted(monkeypatch):
    measured = []
    original = spoiling.Bench.measure
    monkeypatch.setattr(spoiling.Bench, "measure", lambda self, case: measured.append(case.key) or original(self, case))
    return measured


def test_equal_weights_of_another_training_are_measured_and_refused_anew(tmp_path, blocks, monkeypatch):
    asked = dict(settings=("typos",), device="cpu")
    run, control = trained(tmp_path / "m", blocks), trained(tmp_path / "c", blocks, seed=1)
    robustness.run(run, control=control, **asked)
    measured = counted(monkeypatch)
    trained(tmp_path / "m", blocks, settings={"select": "last"})
    assert robustness.run(run, control=control, **asked)["status"] == "done"
    assert measured == ["standard#0", "typos#0"]  # the control's parts are still good
    trained(tmp_path / "c", blocks, seed=1, settings={"select": "last"})
    assert robustness.run(run, control=control, **asked)["status"] == "done"
    assert measured == ["standard#0", "typos#0"] * 2
    trained(tmp_path / "c", blocks, seed=1, people=["blocks:3"], settings={"select": "people"})
    with pytest.raises(DataError, match="were used to train"):
        robustness.run(run, control=control, **asked)


@pytest.mark.parametrize("damage", ["truncated table", "truncated facts", "other facts", "bytes", "another table"])
def test_a_damaged_part_is_measured_again(tmp_path, blocks, monkeypatch, caplog, damage):
    run = trained(tmp_path / "m", blocks)
    whole = robustness.run(run, settings=("typos",), device="cpu")
    one, other = sorted((run.stage_dir("robustness") / "parts").glob("*.parquet"))
    {
        "truncated table": lambda: one.write_bytes(one.read_bytes()[:-200]),
        "truncated facts": lambda: one.with_suffix(".json").write_text('{"facts": {"t2i:bl'),
        "other facts": lambda: one.with_suffix(".json").write_text("[]"),
        "bytes": lambda: one.with_suffix(".json").write_bytes(b"\xff\xfe\x00"),
        "another table": lambda: one.write_bytes(other.read_bytes()),
    }[damage]()
    run.unfinish("robustness")
    measured = counted(monkeypatch)
    monkeypatch.setattr(log, "propagate", True)
    again = robustness.run(run, settings=("typos",), device="cpu")
    assert len(measured) == 1 and again["rows"] == whole["rows"]
    assert "damaged, measured again" in caplog.text


@pytest.mark.covers(154)
def test_readers_of_the_printed_table_are_told_the_bound_and_what_the_numbers_do_not_cover(made):
    record = made[2]
    row, said = row_of(record, "identity-only"), record["notes"]
    bound = f"No model can exceed rank-1 {100 * row['ceiling']:.1f} % with these texts."
    (note,) = [note for note in said if bound in note]
    assert note.startswith("blocks t2i, model and control, identity-only: ")
    assert f"{100 * row['clothing_share']:.1f} % of the words of the identity texts are clothing vocabulary" in note
    assert any("clothes-conflict" in note and "Mean over seeds 0 to 2" in note for note in said)
    assert any(note.startswith("blocks t2i and blocks i2i, model and control, blank: Exactly chance") for note in said)
    tests = sum(drop[3] is not None for row in record["rows"] for drop in row["drops"].values())
    gaps = sum(gap[3] is not None for row in record["differences"] for gap in row["values"].values())
    assert any(note.startswith(f"{tests:,} drops and {gaps:,} differences of drops were tested") for note in said)
    assert any("Fewer than 30 people: 6 (blocks t2i), 6 (blocks i2i)" in note for note in said)
    assert sum("Drawn at random once (seed 0): word-dropout, typos, occlusion, illumination." in n for n in said) == 1
    # Nothing that a row says is lost, and nothing is said twice.
    for row in record["rows"]:
        assert row["note"] is None or any(row["note"] in note and row["setting"] in note for note in said)
    assert len(said) == len(set(said))


KILLED = """
import os, signal, sys
from pathlib import Path
from reidctl import tables
from reidctl.runs import Run
from reidctl.stages import robustness
import torch
torch.set_num_threads(1)
left, write = int(sys.argv[2]), tables.write_text
def dying(path, text):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)  # the table of this measurement is written, its facts are not
    write(path, text)
tables.write_text = dying
robustness.run(Run(Path(sys.argv[1])), settings=("identity-only", "typos", "blank"), device="cpu")
"""


@pytest.mark.slow
def test_after_kill_9_finished_measurements_stay_and_the_result_is_the_same(tmp_path, blocks, monkeypatch):
    names = ("identity-only", "typos", "blank")
    whole = robustness.run(trained(tmp_path / "a", blocks), settings=names, device="cpu")
    run = trained(tmp_path / "b", blocks)
    code = subprocess.run([sys.executable, "-c", KILLED, str(run.path), "3"], check=False, timeout=120).returncode
    assert code == -9
    assert run.record("robustness") is None and not run.table("robustness", "robustness").exists()
    (run.stage_dir("robustness") / ".queries.parquet.dead.tmp").write_text("half")
    measured = []
    original = spoiling.Bench.measure
    monkeypatch.setattr(spoiling.Bench, "measure", lambda self, case: measured.append(case.key) or original(self, case))
    again = robustness.run(run, settings=names, device="cpu")
    assert measured == ["identity-only#0", "blank#0"]  # three parts were whole: two references and typos
    assert again["rows"] == whole["rows"]
    assert not [path for path in run.stage_dir("robustness").rglob("*.tmp")]


def test_without_described_texts_their_settings_are_left_out_with_a_note(tmp_path, blocks):
    record = robustness.run(trained(tmp_path / "r", blocks, described=False), device="cpu")
    assert not {"identity-only", "clothes-conflict", "standard-texts"} & {row["setting"] for row in record["rows"]}
    assert any("reidctl caption" in note and "identity-only" in note for note in record["notes"])


def test_images_that_lack_a_text_are_no_queries_and_are_counted(tmp_path):
    data = write_dataset(tmp_path / "blocks", people=6, splits=dict.fromkeys(range(6), "test"))
    texts = tables.read_table(data / "described.parquet", "captions")
    texts.loc[(texts["image_id"] == "p1-1") & (texts["kind"] == "clothing"), "status"] = "rejected"
    tables.write_table(data / "described.parquet", "captions", texts)
    record = robustness.run(trained(tmp_path / "r", data), settings=("identity-only",), device="cpu")
    assert row_of(record, "identity-only")["queries"] == 17
    assert any("1 of 18 images lack" in note for note in record["notes"])


def test_a_gallery_with_texts_is_not_asked_for_them_and_blank_says_so(tmp_path, blocks):
    run = trained(tmp_path / "r", blocks, name="bdam", config=OWN_TEXT)
    record = robustness.run(run, settings=("identity-only", "blank"), device="cpu")
    assert {row["setting"] for row in record["rows"]} == {"standard", "blank"}
    assert any("look for those very texts" in note for note in record["notes"])
    assert "still carry their gallery text (identity)" in row_of(record, "blank")["note"]
    # Equal texts share a vector, different ones do not.
    subject = spoiling_subject(run)
    vectors = embed_blank(subject.method, subject.corpus, device=CPU)
    assert len(np.unique(vectors, axis=0)) == len(set(subject.corpus.identity))


def test_a_control_whose_gallery_holds_such_texts_is_left_out_of_those_rows(tmp_path, blocks, made):
    control = trained(tmp_path / "c", blocks, name="bdam", config=OWN_TEXT)
    run = trained(tmp_path / "m", blocks)
    record = robustness.run(run, control=control, settings=("identity-only", "typos"), device="cpu")
    assert row_of(record, "typos", model="control") and row_of(record, "identity-only")
    assert [row["setting"] for row in record["differences"]] == ["typos"]
    assert any(note.startswith("Control: its gallery holds texts") for note in record["notes"])


def test_clothes_that_nobody_can_exchange_are_left_out_with_a_note(tmp_path):
    data = write_dataset(tmp_path / "blocks", people=6, splits=dict.fromkeys(range(6), "test"))
    texts = tables.read_table(data / "described.parquet", "captions")
    texts.loc[texts["kind"] == "clothing", "text"] = "A red shirt."
    tables.write_table(data / "described.parquet", "captions", texts)
    record = robustness.run(trained(tmp_path / "r", data), settings=("clothes-conflict", "typos"), device="cpu")
    assert any("nobody different" in note for note in record["notes"])
    assert {row["setting"] for row in record["rows"]} == {"standard", "typos"}


def test_a_split_without_captions_is_measured_between_images(tmp_path):
    data = write_dataset(tmp_path / "blocks", people=6, splits=dict.fromkeys(range(6), "test"))
    (data / "captions.parquet").unlink()
    record = robustness.run(trained(tmp_path / "r", data, described=False), device="cpu")
    assert {row["direction"] for row in record["rows"]} == {"i2i"}
    assert any("no captions" in note for note in record["notes"])


def test_synthped_is_asked_in_its_own_styles_too(tmp_path):
    run = trained(tmp_path / "m", synthped(tmp_path / "m"))
    record = robustness.run(run, settings=("paraphrase",), device="cpu")
    names = {row["setting"] for row in record["rows"]}
    assert {f"paraphrase:truth-{style}" for style in TRUTH_STYLES} < names
    captions = tables.read_table(run.table("data", "captions"), "captions")
    captions.loc[captions["kind"] == "full", "text"] += " Edited."
    tables.write_table(run.table("data", "captions"), "captions", captions)
    record = robustness.run(run, settings=("paraphrase",), device="cpu")
    assert not any("truth" in row["setting"] for row in record["rows"])
    assert any("own writing styles are left out" in note for note in record["notes"])


def synthped(folder: Path) -> Path:
    recipe = {"synth": {"people": 10, "images_per_person": 2, "size": [64, 32], "train_fraction": 0.4}}
    data_synth.run(Run(folder), recipe, workers=1)
    return Run(folder).stage_dir("data")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ("blur", "sepia")}, "sepia"),
        ({"settings": ()}, "No setting"),
        ({"level": 1.5}, "between 0 and 1"),
        ({"settings": ("blank",), "level": 0.5}, "has a level"),
        ({"query": "clothing"}, "not known here"),
    ],
)
def test_wrong_flags_are_usage_errors(made, options, message):
    with pytest.raises(UsageError, match=message):
        robustness.run(made[0], device="cpu", **options)


def test_a_control_that_cannot_be_compared_is_refused(tmp_path, blocks, made):
    run = made[0]
    with pytest.raises(UsageError, match="the model itself"):
        robustness.run(run, control=run, device="cpu")
    with pytest.raises(DataError, match="finetune"):
        robustness.run(run, control=Run(tmp_path / "nothing"), device="cpu")
    knows = trained(tmp_path / "k", blocks, seed=2, people=["blocks:3"])
    with pytest.raises(DataError, match="1 people of the test split were used to train"):
        robustness.run(run, control=knows, device="cpu")
    other = write_dataset(tmp_path / "other", people=4, splits=dict.fromkeys(range(4), "test"))
    stranger = trained(tmp_path / "s", other, seed=3)
    with pytest.raises(DataError, match="belongs to other data") as error:
        robustness.run(run, control=stranger, device="cpu")
    assert "--data" in str(error.value.hint)
    record = robustness.run(run, control=stranger, settings=("typos",), data=blocks, device="cpu")
    assert any(note.startswith("Control: Measured on") for note in record["notes"])
