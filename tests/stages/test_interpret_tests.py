"""The tests of maps, as `interpret` runs them: planted maps, other judges, complete tables, resuming, every method."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "explain"))
sys.path.insert(0, str(Path(__file__).parents[1] / "methods"))
from planted import CELL, GRID, MEAN, REGIONS, SIZE, STD, N, oracle, pixels_of, world
from test_interpret import make_model, make_trained
from test_method_contract import SETTINGS

from reidctl import tables
from reidctl.batch import Tokens
from reidctl.data import build_corpus
from reidctl.errors import DataError, UsageError
from reidctl.explain import masking
from reidctl.explain.controls import CONTROLS, Plan
from reidctl.explain.grounding import part_names
from reidctl.explain.maps import of_captions
from reidctl.masks import encode_mask
from reidctl.runs import Run
from reidctl.stages import evaluate, index, interpret
from reidctl.stages.interpret_tests import Material, Model, labelled, run_tests

CPU = torch.device("cpu")
PEOPLE = 20
"""Of one picture each: what hurts it hurts rank-1."""
UPPER, LOWER = REGIONS[0], REGIONS[3]
FAST = {"samples": 3, "pictures": 0, "device": "cpu"}
MASK = FAST | {"explainer": "patch,centre", "what": ["masking"], "fractions": (0.25, 0.5)}


# A model that looks at two corners of a picture, and maps that are right or wrong about that


class Planted:
    """A method whose image vector holds the mean colours of two regions; its texts are those of the world."""

    cameras, gallery_texts, tasks, name = (), (), ("t2i",), "planted"

    def __init__(self, vectors):
        self.vectors = torch.stack(list(vectors.values()))
        number = {text: place for place, text in enumerate(vectors)}

        def tokenize(texts):
            ids = torch.tensor([[number[text]] for text in texts])
            return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

        self.backbone = SimpleNamespace(
            image_size=SIZE, mean=MEAN, std=STD, interpolation="bicubic", grid=GRID, tokenize=tokenize
        )

    def embed_images(self, batch):
        seen = [batch.image[:, :, pixels_of(region)].mean(dim=2) for region in (UPPER, LOWER)]
        return functional.normalize(torch.cat([*seen, torch.ones(len(batch.image), 1)], dim=1), dim=1)

    def embed_tasks(self, batch):
        return {"t2i": self.embed_images(batch)}

    def embed_texts(self, batch):
        return functional.normalize(self.vectors[batch.texts["full"].ids[:, 0]], dim=1)


def colour_of(pixels, region):
    """The mean colour of a region as the model reads it."""
    raw = torch.from_numpy(pixels[pixels_of(region).numpy()].mean(axis=0) / 255).float()
    return (raw - torch.tensor(MEAN)) / torch.tensor(STD)


def planted_material(folder, *, level="caption", controls=(), fills=("mean",), maps=None, fractions=(1 / 6, 1 / 3)):
    """People whose captions describe exactly two corners; `oracle` maps show them, `wrong` ones everything else."""
    pixels = world(PEOPLE, 1, seed=3)
    images, captions, parts, vectors = [], [], [], {}
    masks = {"upper": pixels_of(UPPER).numpy(), "lower": pixels_of(LOWER).numpy()}
    for row, picture in enumerate(pixels):
        name = f"i{row}"
        Image.fromarray(picture).save(folder / f"{name}.png")
        images.append(
            {
                "image_id": name, "path": f"{name}.png", "dataset": "d", "split": "test", "person_id": f"p{row}",
                "width": SIZE[1], "height": SIZE[0], "sha256": name,
            }
        )  # fmt: skip
        text = f"shirt of {row} and trousers of {row}"
        upper, lower = (colour_of(pixels[row], region) for region in (UPPER, LOWER))
        nothing, one = torch.zeros(3), torch.ones(1)
        vectors |= {text: torch.cat([upper, lower, one]), f"shirt of {row}": torch.cat([upper, nothing, 0 * one])}
        vectors[f"trousers of {row}"] = torch.cat([nothing, lower, 0 * one])
        common = {"image_id": name, "source": "human", "conditioned_on": "image", "status": "ok"}
        captions.append({**common, "caption_id": f"c{row}", "kind": "full", "text": text})
        for part, phrase in (("upper", f"shirt of {row}"), ("lower", f"trousers of {row}")):
            place = {"char_start": text.index(phrase), "char_end": text.index(phrase) + len(phrase)}
            captions.append(
                {**common, "caption_id": f"c{row}-{part}", "kind": "phrase", "text": phrase, "parent_id": f"c{row}"}
                | place
            )
            parts.append(
                {"image_id": name, "part": part, "phrase": phrase, "box": [0] * 4, "mask": encode_mask(masks[part])}
            )
    for table, rows in (("images", images), ("captions", captions), ("parts", parts)):
        tables.write_table(folder / f"{table}.parquet", table, pd.DataFrame(rows))
    frames = {name: tables.read_table(folder / f"{name}.parquet", name) for name in ("images", "captions", "parts")}
    corpus = build_corpus(frames["images"], frames["captions"], None, folder)
    phrases = of_captions(corpus.captions, frames["captions"], whole=True)
    heat = [np.maximum(oracle(UPPER), oracle(LOWER)) if p.whole else truth_of(p) for p in phrases]
    given = maps or {"oracle": heat, "wrong": [1 - one for one in heat]}
    found = {name: as_table(phrases, rows, name) for name, rows in given.items()}
    plan = Plan(fractions=fractions, fills=fills, controls=tuple(controls))
    return Material(
        Model("", Planted(vectors), "digest"), corpus, phrases, found, frames["parts"],
        part_names(frames["captions"]), plan, level, [], None, CPU, 64, 0, folder / "parts",
    )  # fmt: skip


def truth_of(phrase):
    return oracle(UPPER if phrase.text.startswith("shirt") else LOWER)


def as_table(phrases, heat, name):
    return pd.DataFrame(
        {
            "query_id": [p.query_id for p in phrases], "image_id": [p.image_id for p in phrases],
            "phrase": [p.text for p in phrases], "char_start": [p.char_start for p in phrases],
            "char_end": [p.char_end for p in phrases], "explainer": name, "similarity": 0.0, "grid_h": GRID[0],
            "grid_w": GRID[1], "relevance": tables.vectors(np.stack(heat).astype(np.float32)),
        }
    )  # fmt: skip


def pick(rows, **wanted):
    """The one row of `interpretability` with these values."""
    for name, value in wanted.items():
        near = np.isclose(rows[name].astype(float), value) if name == "removed" else rows[name] == value
        rows = rows[near]
    assert len(rows) == 1, rows
    return rows.iloc[0]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    material = planted_material(
        tmp_path_factory.mktemp("planted"), controls=[name for name in CONTROLS if name != "phrase"]
    )
    rows, notes = run_tests(material, ["grounding", "concentration", "masking", "curves", "specificity"], strict=True)
    assert not notes
    return material, rows


@pytest.mark.covers(183)
@pytest.mark.parametrize("metric", ["similarity_drop", "rank_shift", "rank1_drop", "mAP_drop"])
def test_removing_what_the_model_looks_at_hurts_more_than_any_control_and_the_interval_excludes_0(planted, metric):
    rows = planted[1]
    wanted = {"metric": metric, "kind": "difference", "removed": 1 / 3}
    for control in ("random", "block", "centre", "least", "shifted"):
        found = pick(rows, explainer="oracle", control=control, **wanted)
        assert found["low"] > 0, (control, found)
    assert pick(rows, explainer="wrong", control="random", **wanted)["high"] < 0
    # The map of another query is as right here, and the true mask on the patches is the map: nothing to win.
    for control in ("query", "pooled"):
        found = pick(rows, explainer="oracle", control=control, **wanted)
        assert found["value"] == found["low"] == found["high"] == 0
    own = pick(rows, explainer="wrong", control="", metric=metric, kind="value", removed=1 / 3)
    assert own["value"] == 0, "a model that looks elsewhere loses nothing at all"


@pytest.mark.covers(183)
def test_the_measured_drop_is_that_of_a_slow_version_by_hand(planted):
    material = planted[0]
    frame = material.frames["faithfulness"]
    method, corpus = material.model.method, material.corpus
    mine = frame[(frame["explainer"] == "oracle") & (frame["control"] == "") & np.isclose(frame["removed"], 1 / 3)]
    pictures = np.stack([np.asarray(Image.open(path)) for path in corpus.paths()])
    raw = torch.from_numpy(pictures / 255).permute(0, 3, 1, 2).float()
    image = (raw - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    intact = method.embed_images(SimpleNamespace(image=image)).numpy()
    gone = image.clone()
    gone[:, :, pixels_of(UPPER + LOWER)] = 0
    masked = method.embed_images(SimpleNamespace(image=gone)).numpy()
    for row in mine.itertuples():
        target = int(row.image_id[1:])
        query = method.embed_texts(SimpleNamespace(texts={"full": method.backbone.tokenize([caption(target)])}))[0]
        scores = intact @ query.numpy()
        assert row.drop == pytest.approx(scores[target] - masked[target] @ query.numpy(), abs=1e-5)
        scores[target] = masked[target] @ query.numpy()
        rank = 1 + (scores > scores[target]).sum()
        assert row.rank == rank and row.ap == pytest.approx(1 / rank, abs=1e-6) and row.first == float(rank == 1)


def caption(row):
    return f"shirt of {row} and trousers of {row}"


@pytest.mark.covers(188)
def test_true_masks_as_maps_point_right_and_their_complements_never(planted):
    rows = planted[1]
    for metric in ("pointing", "mass", "iou"):
        right, wrong = (pick(rows, explainer=name, metric=metric, kind="value") for name in ("oracle", "wrong"))
        # `mass` and `iou` lose what bilinear upsampling smears over the border of 4x4 pixels.
        assert right["value"] == pytest.approx(1) if metric == "pointing" else right["value"] > 0.6
        assert wrong["value"] == 0 if metric == "pointing" else wrong["value"] < 0.05
        beside = [
            pick(rows, explainer="oracle", metric=metric, kind="difference", control=c) for c in ("random", "wrong")
        ]
        assert all(row["low"] > 0 for row in beside)
        assert pick(rows, explainer="wrong", metric=metric, kind="difference", control="random")["high"] < 0
    area = len(UPPER) / N
    assert pick(rows, explainer="oracle", metric="pointing", kind="control", control="random")["value"] == area


@pytest.mark.covers(186)
def test_deletion_and_insertion_tell_right_maps_from_wrong_and_from_random_ones(planted):
    rows = planted[1]
    deletion = pick(rows, explainer="oracle", metric="deletion", kind="difference", control="random")
    insertion = pick(rows, explainer="oracle", metric="insertion", kind="difference", control="random")
    assert deletion["high"] < 0 < insertion["low"]
    deletion = pick(rows, explainer="wrong", metric="deletion", kind="difference", control="random")
    insertion = pick(rows, explainer="wrong", metric="insertion", kind="difference", control="random")
    assert insertion["high"] < 0 < deletion["low"]


@pytest.mark.covers(187)
def test_a_phrases_own_region_lowers_its_own_score_more_than_the_others(planted):
    rows = planted[1]
    wanted = {"metric": "specificity", "removed": 1 / 6}
    assert pick(rows, explainer="oracle", kind="value", **wanted)["low"] > 0
    assert pick(rows, explainer="oracle", kind="difference", control="random", **wanted)["low"] > 0
    assert pick(rows, explainer="wrong", kind="value", **wanted)["value"] < 0


@pytest.mark.covers(187)
def test_maps_that_do_not_know_the_phrase_are_not_specific(tmp_path):
    """Both phrases of a caption with the same region: what one loses, the other gains."""
    first = planted_material(tmp_path)
    same = [oracle(UPPER) for _ in first.phrases]
    (tmp_path / "again").mkdir()
    material = planted_material(tmp_path / "again", maps={"same": same}, controls=["phrase"], fractions=(1 / 6,))
    rows, _ = run_tests(material, ["specificity"], strict=True)
    found = pick(rows, explainer="same", kind="value")
    assert found["value"] == pytest.approx(0, abs=1e-6)
    assert pick(rows, explainer="same", kind="difference", control="phrase")["value"] == pytest.approx(0, abs=1e-6)


@pytest.mark.covers(191)
def test_a_map_moved_elsewhere_is_as_concentrated_and_does_less_damage(planted):
    material, rows = planted
    heat = np.zeros(GRID, np.float32)
    heat.ravel()[list(UPPER)] = 1
    moved = np.roll(heat, (2, 1), (0, 1))
    phrases = material.phrases
    other = {"oracle": [heat.ravel()] * len(phrases), "moved": [moved.ravel()] * len(phrases)}
    again = Material(
        **{name: getattr(material, name) for name in Material.__dataclass_fields__ if name not in ("maps", "frames")},
        maps={name: as_table(phrases, one, name) for name, one in other.items()},
    )
    told, _ = run_tests(again, ["concentration"], strict=True)
    entropies = [pick(told, explainer=name, metric="entropy")["value"] for name in other]
    assert entropies[0] == pytest.approx(entropies[1]) and entropies[0] == pytest.approx(np.log(4) / np.log(N))
    for metric in ("similarity_drop", "mAP_drop"):
        found = pick(rows, explainer="oracle", metric=metric, kind="difference", control="shifted", removed=1 / 3)
        assert found["low"] > 0


@pytest.mark.covers(193)
def test_one_table_ranks_the_explainers_on_every_metric_with_intervals(planted):
    rows = planted[1]
    assert set(rows["explainer"]) == {"oracle", "wrong"} and (rows["judge"] == "").all()
    known = rows.dropna(subset=["value"])
    assert (known["low"] <= known["value"] + 1e-12).all() and (known["value"] <= known["high"] + 1e-12).all()
    assert (known["items"] > 0).all() and len(known) == len(rows)
    names = dict(labelled(rows))
    assert len(names) == len(rows), "no two rows have one name"
    assert {"oracle.iou-random", "oracle.iou:random", "oracle.mAP_drop@0.333333", "wrong.deletion-least"} <= set(names)


@pytest.mark.covers(183)
def test_phrases_are_masked_by_their_own_maps_when_asked_for(tmp_path):
    material = planted_material(tmp_path, level="phrase", controls=["random", "phrase"], fractions=(1 / 6,))
    rows, _ = run_tests(material, ["masking"], strict=True)
    wanted = {"metric": "similarity_drop", "kind": "difference"}
    assert pick(rows, explainer="oracle", control="random", **wanted)["low"] > 0
    assert pick(rows, explainer="oracle", control="phrase", **wanted)["low"] > 0
    frame = material.frames["faithfulness"]
    assert frame["query_id"].nunique() == 2 * PEOPLE and frame["query_id"].str.match(r"c\d+:\d+-\d+").all()


# Complete tables on a real, untrained model


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_trained(tmp_path_factory.mktemp("c") / "r", "clip", described=False)[0]


def table_of(run, name):
    return tables.read_table(run.table("interpret", name), name)


@pytest.mark.covers(184)
def test_there_is_a_row_for_every_caption_explainer_control_fill_and_fraction_and_equal_patches_go(clip, monkeypatch):
    counted = []
    plain = masking.masked_scores

    def watch(study, chunk, fill, removed, advance=None):
        counted.append(np.asarray(removed.sum(axis=-1))[~chunk.orders.missing])
        return plain(study, chunk, fill, removed, advance)

    monkeypatch.setattr("reidctl.explain.counterfactual.masked_scores", watch)
    interpret.run(clip, **MASK | {"fills": ("mean", "blur", "drop")}, force=True)
    frame = table_of(clip, "faithfulness")
    keys = ["query_id", "explainer", "control", "fill", "removed"]
    assert not frame.duplicated(keys).any() and (frame["judge"] == "").all()
    used = [name for name in CONTROLS if name != "phrase"]
    assert len(frame) == 3 * 2 * (1 + (1 + len(used)) * 3 * 2)
    assert set(frame["control"]) == {"", *used} and set(frame["removed"].round(2)) == {0, 0.25, 0.5}
    assert len(counted) == 3 and all((np.unique(counts, axis=0) == [[2, 4]]).all() for counts in counted)
    masked = frame[frame["removed"] > 0]
    intact = frame[frame["removed"] == 0].set_index(["query_id", "explainer"])["score"]
    before = intact.loc[list(zip(masked["query_id"], masked["explainer"], strict=True))].to_numpy()
    np.testing.assert_allclose(before - masked["score"], masked["drop"], atol=1e-6)
    assert frame["ap"].between(0, 1).all() and frame["first"].between(0, 1).all() and (frame["rank"] >= 1).all()


@pytest.mark.covers(183)
def test_all_right_images_of_a_query_can_be_masked_at_once_each_by_its_own_map(clip):
    alone = interpret.run(clip, **MASK, controls=["random"])
    one = table_of(clip, "faithfulness")
    both = interpret.run(clip, **MASK, controls=["random"], scope="all_positives")
    frame = table_of(clip, "faithfulness")
    assert both["explained"] == 2 * alone["explained"] and set(one["query_id"]) == set(frame["query_id"])
    shown = frame.groupby("query_id")["image_id"].agg(set)
    assert all(images == {f"{name[:2]}s0", f"{name[:2]}s1"} for name, images in shown.items())
    # Rank and precision are those of the query, so they agree between its images.
    assert (frame.groupby(["query_id", "explainer", "control", "removed"])["ap"].nunique() == 1).all()


def test_a_killed_masking_goes_on_where_it_stopped_and_ends_with_the_same_tables(clip, monkeypatch):
    asked = MASK | {"what": ["masking", "curves"], "samples": 8, "controls": ["random", "least"]}
    monkeypatch.setattr(masking, "_MOST_PAIRS", 2)
    encoded, stop = [], []
    plain = masking.embed_masked

    def count(judge, fill, image, picture, removed, *, advance=None):
        if stop and len(encoded) >= stop[0]:
            raise KeyboardInterrupt
        encoded.append(len(removed))
        return plain(judge, fill, image, picture, removed, advance=advance)

    monkeypatch.setattr(masking, "embed_masked", count)
    interpret.run(clip, **asked, force=True)
    whole, everything = [table_of(clip, name) for name in ("faithfulness", "interpretability")], sum(encoded)
    parts, record = clip.stage_dir("interpret") / "parts", clip.stage_dir("interpret") / "stage.json"
    assert not parts.exists()

    record.unlink()
    encoded.clear()
    stop.append(5)
    with pytest.raises(KeyboardInterrupt):
        interpret.run(clip, **asked)
    # A chunk is two passes: the intact pictures, and the masked ones.
    assert len(list(parts.glob("part-*.parquet"))) == 2 and not record.exists()
    done = sum(encoded[:4])
    encoded.clear()
    stop.clear()
    assert interpret.run(clip, **asked)["status"] == "done"
    assert sum(encoded) == everything - done > 0, "finished chunks are not encoded again"
    for name, before in zip(("faithfulness", "interpretability"), whole, strict=True):
        pd.testing.assert_frame_equal(table_of(clip, name), before)
    assert not parts.exists()


def test_a_forced_run_takes_no_parts_of_an_earlier_one(clip, monkeypatch):
    asked = MASK | {"controls": ["random"], "seed": 9}

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("reidctl.stages.interpret.collect_gates", stop)
    with pytest.raises(KeyboardInterrupt):
        interpret.run(clip, **asked)
    parts = list((clip.stage_dir("interpret") / "parts").glob("part-*.parquet"))
    assert parts
    for path in parts:
        frame = tables.read_table(path, "faithfulness")
        tables.write_table(path, "faithfulness", frame.assign(score=np.float32(-7)))
    monkeypatch.undo()
    interpret.run(clip, **asked, force=True)
    assert (table_of(clip, "faithfulness")["score"] > -2).all()


def test_results_do_not_depend_on_the_batch(clip):
    interpret.run(clip, **MASK, batch=1, force=True)
    one = table_of(clip, "faithfulness")
    interpret.run(clip, **MASK, batch=500, force=True)
    other = table_of(clip, "faithfulness")
    np.testing.assert_allclose(one["score"], other["score"], atol=2e-6)
    pd.testing.assert_series_equal(one["query_id"], other["query_id"])


@pytest.mark.covers(185)
def test_a_fill_of_the_users_own_is_called(clip, tmp_path, monkeypatch):
    (tmp_path / "my_fill_h7.py").write_text(
        "import numpy as np\ndef paint(pixels, mask):\n    return np.full_like(pixels, 200)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    record = interpret.run(clip, **MASK | {"fills": ("mean", "plugin:my_fill_h7:paint")}, controls=["random"])
    assert "patch.mAP_drop@0.25.plugin:my_fill_h7:paint-random" in record["metrics"]
    frame = table_of(clip, "faithfulness").query("removed > 0 and control == ''")
    assert frame.groupby("fill")["score"].mean().nunique() == 2


def test_changed_code_of_a_plug_in_runs_again_and_code_that_fails_is_one_sentence(clip, tmp_path, monkeypatch):
    path = tmp_path / "my_fill_h7b.py"
    path.write_text("def paint(pixels, mask):\n    return pixels\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    asked = MASK | {"fills": ("plugin:my_fill_h7b:paint",), "controls": ["random"]}
    assert interpret.run(clip, **asked)["status"] == "done"
    assert interpret.run(clip, **asked)["status"] == "up-to-date"
    path.write_text("def paint(pixels, mask):\n    return pixels[5]\n")
    monkeypatch.delitem(sys.modules, "my_fill_h7b")
    with pytest.raises(UsageError, match="not uint8 of shape"):
        interpret.run(clip, **asked)
    path.write_text("def paint(pixels, mask):\n    raise RuntimeError('no paint left')\n\n")
    monkeypatch.delitem(sys.modules, "my_fill_h7b")
    with pytest.raises(UsageError, match="no paint left"):
        interpret.run(clip, **asked)


# Other models as judges


@pytest.fixture(scope="module")
def judges(clip, tmp_path_factory):
    """Another seed, another architecture with a finer grid and a larger picture, and a namesake of the first."""
    folder, data = tmp_path_factory.mktemp("j"), clip.stage_dir("data")
    runs = [Run(folder / name) for name in ("a/seed1", "finer", "b/seed1")]
    make_model(runs[0], seed=1, data=data)
    make_model(runs[1], "irra", "vit-bert:micro", settings={"mlm_layers": 1}, data=data, image_size=(96, 48))
    make_model(runs[2], seed=2, data=data)
    return runs


@pytest.mark.covers(190)
@pytest.mark.parametrize("fill", ["mean", "noise", "swap", "drop"])
def test_maps_of_one_model_are_judged_by_others_in_one_matrix(clip, judges, fill):
    record = interpret.run(clip, **MASK | {"fills": (fill,)}, controls=["random"], judges=judges)
    rows = table_of(clip, "interpretability")
    wanted = ["", "clip seed1", "irra finer", "clip seed1 (2)"]
    assert set(rows["judge"]) == set(wanted) and record["settings"]["interpret"]["judges"] == wanted[1:]
    cells = rows[(rows["metric"] == "mAP_drop") & (rows["kind"] == "difference") & np.isclose(rows["removed"], 0.5)]
    assert len(cells) == 2 * 4 and cells["value"].notna().all() and (cells["items"] == 3).all()
    frame = table_of(clip, "faithfulness")
    scores = frame[(frame["removed"] > 0) & (frame["control"] == "")].groupby("judge")["score"].mean()
    assert scores.nunique() == 4, "every judge has its own eyes"
    assert f"patch.mAP_drop@0.5.{wanted[2]}-random" in record["metrics"]


@pytest.mark.covers(190)
def make_twin(run, of):
    """A run with a model of the same weights in a file of its own: a model may not judge itself."""
    make_model(run, data=of.stage_dir("data"))
    path = run.stage_dir("finetune") / "model.safetensors"
    save_file(load_file(path), path, metadata={"made": "again"})
    return run


def test_a_judge_of_the_same_weights_says_what_the_model_itself_says(clip, tmp_path):
    twin = make_twin(Run(tmp_path / "twin"), clip)
    interpret.run(clip, **MASK, controls=["random"], judges=[twin])
    frame = table_of(clip, "faithfulness")
    mine, other = (frame[frame["judge"] == name].drop(columns="judge") for name in ("", "clip twin"))
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), other.reset_index(drop=True))


def test_nobody_judges_themselves_and_nobody_twice(clip, judges):
    for asked in ({"judges": [clip]}, {"encoder": str(clip.path), "what": ["alignment"]}):
        with pytest.raises(UsageError, match="judge itself"):
            interpret.run(clip, **MASK | {"controls": ["random"]} | asked)
    with pytest.raises(UsageError, match="same model"):
        interpret.run(clip, **MASK | {"controls": ["random"]}, judges=[judges[0], judges[0]])


@pytest.mark.parametrize("flag", ["judge", "encoder"])
def test_a_judge_that_was_trained_on_the_people_it_judges_is_none(clip, tmp_path, flag):
    other = Run(tmp_path / "knows them")
    make_model(other, data=clip.stage_dir("data"), seed=5)
    images = tables.read_table(clip.table("data", "images"), "images")
    seen = pd.DataFrame({"kind": ["image"], "digest": [images["sha256"].iloc[0]]})
    tables.write_table(other.table("finetune", "seen"), "seen", seen)
    asked = {"judge": {"judges": [other]}, "encoder": {"encoder": str(other.path), "what": ["alignment"]}}[flag]
    with pytest.raises(DataError, match=rf"--{flag} .*knows them.*no test"):
        interpret.run(clip, **MASK | {"controls": ["random"]} | asked)


@pytest.mark.covers(189)
def test_alignment_takes_another_runs_model_or_a_backbone_as_it_is(clip, judges):
    asked = FAST | {"explainer": "patch,random", "what": ["alignment"]}
    for encoder, name in ((str(judges[1].path), "irra finer"), ("vit-bert:micro", "vit-bert:micro")):
        found = []
        for _ in range(2):
            interpret.run(clip, **asked, encoder=encoder, force=True)
            found.append(table_of(clip, "interpretability"))
        pd.testing.assert_frame_equal(*found)
        assert set(found[0]["judge"]) == {name} and set(found[0]["metric"]) == {"alignment"}
        kinds = {(row.explainer, row.kind, row.control) for row in found[0].itertuples()}
        assert {("patch", "value", ""), ("random", "difference", "random"), ("patch", "difference", "phrase")} < kinds


def test_an_encoder_that_reads_a_text_beside_the_picture_is_no_judge_of_crops(clip, tmp_path):
    told = Run(tmp_path / "told")
    settings = {"depth": 1, "heads": 2, "text_pool": "end", "protocol": "own_text", "target": "caption"}
    method = make_model(told, "bdam", settings=settings, data=clip.stage_dir("data"))
    assert method.gallery_texts
    with pytest.raises(UsageError, match="beside the picture"):
        interpret.run(clip, **FAST, what=["alignment"], encoder=str(told.path))


@pytest.mark.covers(195)
def test_stability_is_1_with_a_twin_and_lower_with_another_seed(clip, judges, tmp_path):
    twin = make_twin(Run(tmp_path / "twin"), clip)
    asked = FAST | {"explainer": "patch", "what": ["stability"], "samples": 8}
    interpret.run(clip, **asked, judges=[twin, judges[0], judges[1]])
    rows = table_of(clip, "interpretability").set_index("judge")
    assert rows.loc["clip twin", "value"] == pytest.approx(1)
    assert rows.loc["clip seed1", "high"] < 1 and rows.loc["irra finer", "high"] < 1
    assert set(rows["metric"]) == {"stability"}


def test_a_judge_without_the_explainer_says_so(clip, judges, tmp_path):
    parts = Run(tmp_path / "parts")
    make_model(parts, "interpart", data=clip.stage_dir("data"))
    record = interpret.run(parts, **FAST | {"explainer": "ppim"}, what=["all"], judges=judges[:1], controls=["random"])
    assert any(note.startswith("stability: not done") and "ppim" in note for note in record["notes"])
    assert "ppim.mAP_drop@0.2.clip seed1-random" in record["metrics"], "but it can judge"


@pytest.mark.covers(192)
def test_sanity_rows_tell_explainers_that_read_the_model_from_those_that_do_not(clip):
    interpret.run(clip, **FAST | {"explainer": "gradcam,centre", "what": ["sanity"], "samples": 8})
    rows = table_of(clip, "interpretability").set_index(["explainer", "metric"])["value"]
    assert rows["centre", "sanity.weights"] == pytest.approx(1) and rows["centre", "sanity.phrases"] == pytest.approx(1)
    assert rows["gradcam", "sanity.weights"] < 0.9 and rows["gradcam", "sanity.phrases"] < 1


@pytest.mark.covers(198)
def test_binding_beats_nothing_where_words_have_no_order(clip):
    record = interpret.run(clip, **FAST | {"explainer": "centre", "what": ["binding"], "samples": 8})
    for name in ("binding.swap", "binding.random"):
        entry = record["metrics"][name]
        assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
    rows = table_of(clip, "interpretability")
    assert set(rows["explainer"]) == {""} and (rows["items"] == 8).all()


# Every method, and nothing else is touched


@pytest.mark.covers(181)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_method_passes_every_test(tmp_path, name):
    spec, settings = SETTINGS[name]
    run, _ = make_trained(tmp_path / "r", name, spec=spec, settings=settings)
    other = Run(tmp_path / "other")
    make_model(other, seed=1, data=run.stage_dir("data"))
    record = interpret.run(
        run, **FAST | {"samples": 4}, explainer="all", what=["all"], fractions=(0.25,), fills=("mean", "drop"),
        controls=["random", "query"], judges=[other], encoder=str(other.path), batch=64,
    )  # fmt: skip
    assert record["notes"] == [] and ("ppim" in record["explainers"]) == (name == "interpart")
    rows = table_of(run, "interpretability")
    assert set(rows["explainer"]) == {*record["explainers"], ""}
    for explainer in record["explainers"]:
        mine = rows[(rows["explainer"] == explainer) & (rows["kind"] == "value")]
        assert {"iou", "entropy", "mAP_drop", "deletion", "specificity", "alignment"} <= set(mine["metric"])
        assert mine["value"].notna().all(), (explainer, mine[mine["value"].isna()])
    assert set(rows.loc[rows["explainer"] == "", "metric"]) == {"binding.swap", "binding.random"}


def test_nothing_that_other_stages_left_is_touched(tmp_path):
    run, _ = make_trained(tmp_path / "r", described=False, name="clip")
    index.run(run, device="cpu")
    evaluate.run(run, device="cpu")
    before = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file()}
    interpret.run(run, **MASK | {"what": ["all"], "controls": ["random"]})
    after = {p: p.read_bytes() for p in run.path.rglob("*") if p.is_file() and "interpret" not in p.parts}
    assert after == before
    assert index.run(run, device="cpu")["status"] == evaluate.run(run, device="cpu")["status"] == "up-to-date"


def test_the_cells_of_the_planted_world_are_those_of_the_pictures():
    assert (GRID[0] * CELL, GRID[1] * CELL) == SIZE


def test_binding_counts_captions_that_describe_their_picture_and_each_once(clip):
    images = tables.read_table(clip.table("data", "images"), "images")
    person = images["person_id"].iloc[0]
    with pytest.raises(DataError, match="on an image of its person"):
        interpret.run(clip, samples=4, explainer="patch", what=["binding"], query="a red shirt and black trousers")
    mine = images[images["person_id"] == person]["image_id"].tolist()
    assert len(mine) > 1
    record = interpret.run(clip, samples=50, explainer="patch", what=["binding"], scope="all_positives")
    again = interpret.run(clip, samples=50, explainer="patch", what=["binding"])
    rows = table_of(clip, "interpretability")
    assert record["metrics"]["binding.swap"] == again["metrics"]["binding.swap"]
    assert rows["items"].max() <= len(
        tables.read_table(clip.table("data", "captions"), "captions").query("kind == 'full'")
    )


def test_what_nothing_was_measured_of_has_no_row_and_the_old_result_stays_until_the_new_is_whole(clip, monkeypatch):
    name = tables.read_table(clip.table("data", "captions"), "captions").query("kind == 'full'")["caption_id"].iloc[0]
    interpret.run(clip, explainer="patch", what=["concentration", "binding"], query=name)
    rows = table_of(clip, "interpretability")
    assert not rows["value"].isna().any() and "binding.random" not in set(rows["metric"])  # nobody else was explained
    before = (clip.stage_dir("interpret") / "stage.json").read_bytes()
    monkeypatch.setattr(interpret, "_draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        interpret.run(clip, explainer="patch", samples=2)
    assert (clip.stage_dir("interpret") / "stage.json").read_bytes() == before
    pd.testing.assert_frame_equal(table_of(clip, "interpretability"), rows)
