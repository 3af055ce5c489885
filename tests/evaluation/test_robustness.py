import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from reidctl.evaluation.robustness import (
    CAPTIONS,
    TEXTS,
    Case,
    SpoiltImages,
    against_control,
    averaged,
    caption_cases,
    chance_note,
    described_cases,
    drop_differences,
    drops,
    equality_note,
    image_cases,
    numbers,
    scores_of,
    summary,
    table_rows,
    weakness_note,
)
from reidctl.evaluation.settings import degrade_image
from reidctl.metrics import chance, mean
from reidctl.pixels import PixelStore, read_pixels
from reidctl.tables import write_table

PEOPLE = ["a", "a", "a", "b", "b", "c", "d"]
RNG = np.random.default_rng(7)


def frame(rank1, *, matches=None, people=PEOPLE, gallery=30):
    """A `queries` table with these hits and made-up other metrics."""
    rank1 = np.asarray(rank1, float)
    return pd.DataFrame(
        {
            "query_id": [f"q{n}" for n in range(len(rank1))],
            "person_id": people,
            "matches": 1 if matches is None else matches,
            "gallery": gallery,
            "average_precision": rank1 / 2,
            "inp": rank1 / 4,
            **{f"rank{k}": rank1 for k in (1, 5, 10, 20)},
        }
    )


def described(count=8):
    return pd.DataFrame(
        {
            "caption_id": [f"i{n}" for n in range(count)],
            "dataset": ["one"] * 4 + ["two"] * (count - 4),
            "person_id": [f"p{n // 2}" for n in range(count)],
            "outfit_id": None,
            "identity": [f"identity {n}" for n in range(count)],
            "clothing": [f"clothing {n}" for n in range(count)],
        }
    )


@pytest.mark.covers(154)
def test_identity_only_queries_hold_no_word_of_the_clothing_text():
    rows = (
        described()
        .head(2)
        .assign(
            identity=["A tall woman of slim build.", "An elderly man."],
            clothing=["She wears red jeans.", "He has on the blue coat."],
        )
    )
    (case,) = described_cases(["identity-only"], rows)
    assert case.reference == TEXTS and len(case.texts) == 2
    for text, identity, clothing in zip(case.texts, rows["identity"], rows["clothing"], strict=True):
        words = re.findall(r"\w+", text.lower())
        assert words == re.findall(r"\w+", identity.lower())
        assert not set(words) & set(re.findall(r"\w+", clothing.lower()))


@pytest.mark.covers(155)
def test_clothes_conflict_keeps_the_identity_and_exchanges_clothes_within_a_dataset():
    cases = described_cases(["clothes-conflict"], described(), seed=5)
    assert [case.seed for case in cases] == [5, 6, 7]
    for case in cases:
        for row, text in enumerate(case.texts):
            own, donor = text.split(" clothing ")
            assert own == f"identity {row}"
            assert int(donor) // 2 != row // 2 and (int(donor) < 4) == (row < 4)
        assert sorted(int(text.split()[-1]) for text in case.texts) == list(range(8))


def test_queries_without_clothing_cannot_be_changed():
    cases = described_cases(["identity-only", "clothes-conflict"], described(), clothing=False)
    assert {case.texts for case in cases} == {tuple(described()["identity"])}


def test_a_paraphrase_is_one_case_per_style_and_pictures_have_none_of_texts():
    cases = caption_cases(["standard", "typos", "paraphrase", "blur"], ["x"], ["A tall man."], level=0.9)
    assert [case.row for case in cases][:3] == ["typos", "paraphrase:keywords", "paraphrase:request"]
    assert [case.level for case in cases][:2] == [0.9, None]
    assert [(case.row, case.texts) for case in image_cases(["typos", "blank"])] == [("blank", None)]


def test_a_drop_is_the_mean_of_differences_with_people_drawn_again():
    before, after = frame([1, 1, 0, 1, 0, 1, 1]), frame([0, 1, 0, 0, 0, 1, 0])
    found = drops(scores_of(before), scores_of(after), seed=3)["rank1"]
    gap = np.array([1, 0, 0, 1, 0, 0, 1.0])
    assert found.difference == pytest.approx(3 / 7)
    # The slow version: draw people, pool their queries.
    groups = [gap[np.array(PEOPLE) == name] for name in "abcd"]
    rng = np.random.default_rng(1)
    drawn = [np.concatenate([groups[i] for i in rng.integers(0, 4, 4)]).mean() for _ in range(20000)]
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx([found.low, found.high], abs=0.05)
    # Sums per person 1, 1, 0, 1: of the eight sign patterns that matter two reach 3.
    assert found.p_value == pytest.approx(0.25)


def test_nothing_depends_on_the_order_of_the_queries():
    before, after = frame(RNG.random(7)), frame(RNG.random(7))
    shuffled = before.sample(frac=1, random_state=1), after.sample(frac=1, random_state=2)
    one, other = (drops(*(scores_of(part) for part in pair), seed=1) for pair in ((before, after), shuffled))
    assert one == other


def test_seeds_are_averaged_within_a_query_before_people_are_drawn():
    parts = [scores_of(frame(RNG.random(7)), f"v{n}") for n in range(3)]
    found = averaged(parts)
    expected = [mean(np.array([part.values["mAP"][row] for part in parts])) for row in range(7)]
    np.testing.assert_allclose(found.values["mAP"], expected, rtol=1e-15)
    assert found.vectors == "" and averaged(parts[:1] * 3).vectors == "v0"
    low, high = (found.intervals()["mAP"].low, found.intervals()["mAP"].high)
    assert low <= np.mean(expected) <= high


@pytest.mark.covers(156)
def test_the_control_is_compared_drop_against_drop_on_the_same_queries():
    model = scores_of(frame([1, 1, 1, 1, 1, 1, 1])), scores_of(frame([1, 1, 1, 1, 1, 1, 0]))
    control = scores_of(frame([1, 1, 1, 0, 1, 1, 1])), scores_of(frame([0, 0, 1, 0, 0, 1, 1]))
    found = drop_differences(model, control)["rank1"]
    assert found.difference == pytest.approx((1 - 3) / 7)  # the model lost one query, the control three
    assert found.low <= found.difference <= found.high
    worse = drop_differences(control, model)["rank1"]  # whichever way it goes
    assert worse.difference == pytest.approx(2 / 7) and worse.p_value == found.p_value


def test_queries_without_a_match_count_nowhere():
    skipped = [1, 1, 0, 1, 1, 1, 1]
    before = frame(np.where(skipped, 1.0, np.nan), matches=skipped)
    after = frame(np.where(skipped, 0.0, np.nan), matches=skipped)
    scores = scores_of(before)
    assert scores.valid.sum() == 6 and scores.intervals()["rank1"].value == 1.0
    assert drops(scores, scores_of(after))["rank1"].queries == 6
    nobody = scores_of(frame([np.nan] * 7, matches=0))
    assert nobody.intervals() == {} == drops(nobody, nobody)


def test_rank_beyond_the_gallery_is_left_out():
    assert "rank20" not in scores_of(frame([1.0] * 7).assign(rank20=np.nan)).values


def test_blank_pictures_are_checked_against_chance():
    matches, gallery = np.array([2, 1, 0]), np.array([9, 8, 9])
    expected = chance(matches, gallery)
    queries = pd.DataFrame(
        {
            "query_id": ["x", "y", "z"], "person_id": ["a", "b", "c"], "matches": matches, "gallery": gallery,
            "average_precision": expected.average_precision, "inp": expected.inp,
            **{f"rank{k}": expected.hits[k] for k in (1, 5, 10, 20)},
        }
    )  # fmt: skip
    assert "Exactly chance" in chance_note(scores_of(queries))
    queries.loc[0, "rank1"] += 1e-6
    assert "do not (rank1, rSum)" in chance_note(scores_of(queries))


@pytest.mark.covers(157)
def test_equal_rows_are_explained_and_not_called_robust():
    same, other = scores_of(frame([1] * 7), "v"), scores_of(frame([0] * 7), "w")
    clothes = Case("clothes-conflict", "clothes-conflict", TEXTS, 0, None, ("x",))
    typos = Case("typos", "typos", CAPTIONS, 0, 0.0, ("x",))
    assert "contain no clothing text" in equality_note(clothes, same, same, same_texts=True)
    assert "left every query as it was" in equality_note(typos, same, same, same_texts=True)
    assert "does not read what the setting changes" in equality_note(clothes, same, same, same_texts=False)
    assert "level" not in equality_note(typos, same, other, same_texts=False)
    assert equality_note(typos, same, other, same_texts=False) == ""
    # Perfect before and after is an observation, not a matter of construction.
    perfect = scores_of(frame([1] * 7), "u")
    note = equality_note(clothes, same, perfect, same_texts=False)
    assert "the metrics of no query" in note and "construction" not in note


def test_a_reference_at_chance_is_said_to_have_nothing_to_lose():
    matches = np.ones(7, int)
    expected = chance(matches, np.full(7, 30)).average_precision
    low = frame([0] * 7).assign(average_precision=expected + np.array([1, -1, 1, -1, 1, -1, 1]) / 100)
    note = weakness_note(scores_of(low))
    assert "Not above chance (mAP 13.5 % against 13.3 %)" in note and "no robustness" in note
    assert weakness_note(scores_of(low.assign(average_precision=expected + 0.01))) == ""
    assert weakness_note(scores_of(frame([np.nan] * 7, matches=0))) == ""


def test_spoilt_images_are_changed_at_their_own_size_before_the_model_s(tmp_path):
    paths = []
    for number, size in enumerate(((40, 90), (33, 64))):
        pixels = RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    sizes = [(90, 40), (64, 33)]

    def store(setting, level):
        return SpoiltImages(
            paths, ["x", "y"], sizes, (48, 24), interpolation="bicubic", setting=setting, level=level, seed=2
        )

    for row, size in enumerate(sizes):
        # Level 0 gives what the model otherwise sees, byte for byte.
        assert (store("blur", 0.0)[row] == PixelStore(paths, (48, 24))[row]).all()
        whole = degrade_image("occlusion", "xy"[row], read_pixels(paths[row], size), seed=2, strength=0.4)
        slow = Image.fromarray(whole).resize((24, 48), Image.Resampling.BICUBIC)
        assert (store("occlusion", 0.4)[row] == np.asarray(slow)).all()
    assert len(store("blur", 0.5)) == 2


ROW = {
    "model": "model", "direction": "t2i", "dataset": "d", "split": "test", "setting": "typos", "reference": "standard",
    "seed": 0, "queries": 4, "skipped": 0, "gallery": 9, "level": 0.3, "note": None, "ceiling": 0.5,
    "values": {"rank1": [0.4, 0.3, 0.5], "mAP": [0.2, 0.1, 0.3]}, "drops": {"rank1": [0.1, 0.0, 0.2, 0.04]},
}  # fmt: skip


def test_printed_rows_become_one_table_row_per_metric(tmp_path):
    found = pd.DataFrame(table_rows([ROW]))
    write_table(tmp_path / "t.parquet", "robustness", found)
    assert found.set_index("metric").loc["rank1", ["drop", "p_value", "ceiling"]].tolist() == [0.1, 0.04, 0.5]
    assert found.set_index("metric").loc["mAP", ["drop", "ceiling"]].isna().all()


def test_a_floor_guards_the_worst_dataset_and_the_model_alone():
    low = {**ROW, "dataset": "e", "values": {"rank1": [0.3, 0.2, 0.4]}}
    control = {**ROW, "model": "control", "values": {"rank1": [0.0, 0.0, 0.0]}}
    plain = {**ROW, "setting": "standard"}
    assert summary([plain, ROW, low, control]) == {
        "t2i": {"rank1": 0.4, "mAP": 0.2, "typos/rank1": 0.3, "typos/mAP": 0.2}
    }


def test_the_sentence_about_the_control_says_which_way_it_went():
    def said(*values):
        return against_control({"dataset": "d", "setting": "identity-only", "values": {"rank1": list(values)}})[0]

    assert "2.0 points less than the control's" in said(-0.02, -0.03, -0.01, 0.01) and "chance" not in said(
        -0.02, -0.03, -0.01, 0.01
    )
    assert "2.0 points more than" in said(0.02, -0.01, 0.04, 0.3) and "may be chance" in said(0.02, -0.01, 0.04, 0.3)
    assert "as far as the control's" in said(0.0, 0.0, 0.0, 1.0)
    assert numbers(1.0, float("nan")) == [1.0, None]
