"""The alignment of regions with phrases: planted regions under a judge that reads colours, windows, and ties."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.batch import Batch, Tokens
from reidctl.data import build_corpus
from reidctl.errors import DataError, UsageError
from reidctl.explain.alignment import (
    METRICS,
    PlainEncoder,
    Window,
    best_places,
    random_places,
    score_alignment,
    window_mass,
)
from reidctl.explain.concentration import summarise_scores
from reidctl.methods.base import build_method

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "yellow": (220, 220, 20)}
GRID = (12, 6)
PARTS = {"shirt": (slice(2, 6), slice(1, 5)), "trousers": (slice(7, 11), slice(1, 5))}


class ColourJudge:
    """Reads the mean colour of a picture and the colour word of a text; knows nothing of the maps."""

    def __init__(self, size=(20, 20)):
        self.backbone = SimpleNamespace(
            image_size=size, mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bicubic", tokenize=self.tokenize
        )
        self.seen, self.texts = [], 0

    def tokenize(self, texts):
        ids = torch.tensor([[list(COLOURS).index(text.split()[0].lower())] for text in texts])
        return Tokens(ids, torch.ones_like(ids, dtype=torch.bool))

    def embed_images(self, batch):
        assert batch.image.shape[2:] == self.backbone.image_size
        self.seen.append(len(batch.image))
        return torch.nn.functional.normalize(batch.image.mean(dim=(2, 3)), dim=1)

    def embed_texts(self, batch):
        self.texts += len(batch.texts["full"])
        colours = torch.tensor(list(COLOURS.values()))[batch.texts["full"].ids[:, 0]]
        return torch.nn.functional.normalize(colours / 127.5 - 1, dim=1)


@pytest.fixture
def people(tmp_path):
    """Twelve people before grey, and the explanations of their two garments by the truth and by its opposite."""
    rng = np.random.default_rng(0)
    images, rows = [], []
    for number in range(12):
        picture = np.full((96, 48, 3), 128, np.uint8)
        worn = dict(zip(PARTS, rng.permutation(list(COLOURS))[:2], strict=True))
        for part, (down, across) in PARTS.items():
            cells = slice(down.start * 8, down.stop * 8), slice(across.start * 8, across.stop * 8)
            picture[cells] = COLOURS[worn[part]]
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        images.append(
            {
                "image_id": f"i{number}", "path": f"{number}.png", "dataset": "d", "split": "test", "width": 48,
                "person_id": f"d:{number}", "height": 96, "sha256": str(number), "role": "gallery",
                "camera_id": None, "outfit_id": None, "attributes": None,
            }
        )  # fmt: skip
        for part, other in (("shirt", "trousers"), ("trousers", "shirt")):
            for explainer, shown in (("oracle", part), ("wrong", other)):
                relevance = np.zeros(GRID, np.float32)
                relevance[PARTS[shown]] = 1
                rows.append(
                    {
                        "query_id": f"q{number}", "image_id": f"i{number}", "phrase": f"{worn[part]} {part}",
                        "explainer": explainer, "grid_h": 12, "grid_w": 6, "relevance": relevance.ravel(),
                    }
                )  # fmt: skip
    corpus = build_corpus(pd.DataFrame(images), tables.empty("captions"), None, tmp_path)
    return corpus, pd.DataFrame(rows)


def summary(corpus, scores):
    person = dict(zip(corpus.images["image_id"], corpus.images["person_id"], strict=True))
    found = summarise_scores(scores, person, METRICS, judge="colours")
    return found.set_index(["explainer", "kind", "control"])


@pytest.mark.covers(189)
def test_the_true_phrase_fits_crops_of_true_boxes_better_than_random_windows_and_other_phrases(people):
    corpus, explained = people
    found = summary(corpus, score_alignment(ColourJudge(), corpus, explained))
    # The window, 4 x 4 patches, is exactly the garment.
    assert found.loc[("oracle", "value", ""), "value"] == pytest.approx(1, abs=1e-3)
    for control in ("random", "phrase"):
        assert found.loc[("oracle", "difference", control), "low"] > 0.05
    # A map of the other garment is found out by the phrase of the other garment.
    assert found.loc[("wrong", "difference", "phrase"), "high"] < -0.05
    assert found.loc[("wrong", "value", ""), "value"] < found.loc[("oracle", "value", ""), "low"]
    assert set(found["judge"]) == {"colours"} and set(found["items"]) == {24}


@pytest.mark.covers(189)
def test_scores_equal_a_slow_version(people):
    corpus, explained = people
    judge = ColourJudge()
    found = score_alignment(judge, corpus, explained.iloc[:2], draws=3, seed=5)
    window = Window((12, 6), (4, 4))
    with Image.open(corpus.root / "0.png") as opened:
        picture = opened.convert("RGB")

    def crop(place):
        left, top = place[1] * 8, place[0] * 8
        pixels = np.asarray(picture.crop((left, top, left + 32, top + 32)), np.float64) / 127.5 - 1
        mean = pixels.mean(axis=(0, 1))
        return mean / np.linalg.norm(mean)

    shirt, trousers = (np.asarray(COLOURS[explained["phrase"].iloc[n].split()[0]]) / 127.5 - 1 for n in (0, 2))
    shirt = shirt / np.linalg.norm(shirt)
    trousers = trousers / np.linalg.norm(trousers)
    random = np.mean([crop(place) @ shirt for place in random_places(window, "i0", draws=3, seed=5)])
    # The other phrase is known only where it is explained too.
    assert found["alignment.phrase"].isna().all()
    assert found["alignment"].tolist() == pytest.approx([crop((2, 1)) @ shirt, crop((7, 1)) @ shirt], abs=5e-3)
    assert found["alignment.random"].tolist() == pytest.approx([random, random], abs=5e-3)
    both = score_alignment(judge, corpus, explained.iloc[:4], draws=3, seed=5)
    assert both["alignment.phrase"].iloc[0] == pytest.approx(crop((2, 1)) @ trousers, abs=5e-3)


def test_results_do_not_depend_on_batch_or_order_and_nothing_is_encoded_twice(people):
    corpus, explained = people
    judge = ColourJudge()
    done = []
    found = score_alignment(judge, corpus, explained, batch=7, advance=done.append)
    assert judge.texts == len(set(explained["phrase"]))
    assert sum(judge.seen) <= 12 * (10 + 2) and judge.seen.count(7) >= len(judge.seen) - 1
    assert sum(done) == 48
    back = score_alignment(ColourJudge(), corpus, explained[::-1])[::-1].reset_index(drop=True)
    pd.testing.assert_frame_equal(found, back, rtol=1e-5)


def test_many_images_are_done_in_pieces(people, monkeypatch):
    corpus, explained = people
    monkeypatch.setattr("reidctl.explain.alignment._IMAGES", 5)
    done = []
    found = score_alignment(ColourJudge(), corpus, explained, advance=done.append)
    assert done == [20, 20, 8]
    monkeypatch.undo()
    pd.testing.assert_frame_equal(found, score_alignment(ColourJudge(), corpus, explained), rtol=1e-5)


def test_other_phrases_differ_in_more_than_capitals(people):
    corpus, explained = people
    one = explained.iloc[[0]]
    twice = pd.concat([one, one.assign(phrase=one["phrase"].str.upper())])
    assert score_alignment(ColourJudge(), corpus, twice)["alignment.phrase"].isna().all()


def test_maps_of_other_grids_have_windows_of_their_own(people):
    corpus, explained = people
    coarse = explained.iloc[[0]].assign(grid_h=6, grid_w=3, relevance=[np.eye(18, dtype=np.float32)[4]])
    found = score_alignment(ColourJudge(), corpus, pd.concat([coarse, explained.iloc[[0]]]))
    assert found["alignment"].notna().all()
    assert found["alignment"].iloc[1] == pytest.approx(1, abs=1e-3)


def test_no_maps_give_no_rows(people):
    corpus, explained = people
    found = score_alignment(ColourJudge(), corpus, explained.iloc[:0])
    assert found.empty and {"alignment", "alignment.random", "alignment.phrase"} <= set(found.columns)


def test_window_mass_equals_the_sum_of_its_patches():
    maps = np.random.default_rng(0).random((3, 30)).astype(np.float32)
    window = Window.of_shares((6, 5), (0.35, 0.6))
    assert (window.size, window.places) == ((2, 3), (5, 3))
    found = window_mass(maps, window)
    for m in range(3):
        for y in range(5):
            for x in range(3):
                assert found[m, y, x] == pytest.approx(maps[m].reshape(6, 5)[y : y + 2, x : x + 3].sum())
    best = best_places(maps, window, ["a", "b", "c"])
    assert best == [divmod(int(row.argmax()), 3) for row in found.reshape(3, -1)]


def test_a_constant_map_takes_every_place_equally_often():
    window = Window((4, 4), (3, 2))  # 2 x 3 places
    maps = np.full((3000, 16), 0.1, np.float32)  # 0.1 has no exact sum
    places = best_places(maps, window, [str(n) for n in range(3000)])
    counts = pd.Series(places).value_counts()
    assert len(counts) == 6 and counts.between(410, 590).all()  # 500 each, four standard deviations
    assert places == best_places(maps, window, [str(n) for n in range(3000)])
    assert places != best_places(maps, window, [str(n) for n in range(3000)], seed=1)


def test_places_that_differ_by_rounding_alone_are_ties():
    rng = np.random.default_rng(0)
    tiny, side, top, none = (
        10 ** rng.uniform(-12, -8, 400),
        rng.uniform(0.2, 0.3, 400),
        np.full(400, 0.5),
        np.zeros(400),
    )
    maps = np.stack([tiny, side, top, side, none], axis=1).astype(np.float32)
    window = Window((1, 5), (1, 2))
    mass = window_mass(maps, window)[:, 0]
    right = (mass[:, 1] < mass[:, 2]).sum(), (mass[:, 1] > mass[:, 2]).sum()
    assert min(right) > 10  # sums of a prefix round, now one way and now the other
    ids = [str(n) for n in range(400)]
    differing = np.flatnonzero(mass[:, 1] != mass[:, 2])
    places = best_places(maps, window, ids)
    best = np.asarray([place[1] for place in places])
    assert set(best) == {1, 2}
    assert 0 < (best[differing] != 1 + (mass[differing, 2] > mass[differing, 1])).mean() < 1


def test_random_places_are_uniform_and_depend_on_image_and_seed():
    window = Window((4, 4), (3, 2))
    many = random_places(window, "i", draws=3000)
    assert pd.Series(many).value_counts().between(410, 590).all()
    assert random_places(window, "i") == random_places(window, "i") == many[:10]
    assert len({tuple(random_places(window, name, seed=seed)) for name in "ij" for seed in (0, 1)}) == 4


def test_boxes_are_equally_large_and_inside_the_picture():
    window = Window.of_shares((12, 4), (0.35, 0.6))
    boxes = [window.box((y, x), (101, 33)) for y in range(window.places[0]) for x in range(window.places[1])]
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes} == {(16, 34)}
    assert min(boxes) == (0, 0, 16, 34)
    assert max(b[2] for b in boxes) in (32, 33) and max(b[3] for b in boxes) in (100, 101)
    assert Window.of_shares((12, 4), (0.01, 1)).box((0, 0), (2, 2)) == (0, 0, 2, 1)


@pytest.mark.parametrize("wrong", [{"window": (0, 0.5)}, {"window": (0.5, 1.2)}, {"draws": 0}])
def test_settings_out_of_range_are_refused(people, wrong):
    with pytest.raises(UsageError, match="Give"):
        score_alignment(ColourJudge(), *people, **wrong)


def test_a_judge_that_reads_described_texts_is_refused(people):
    judge = ColourJudge()
    judge.gallery_texts = ("identity",)
    with pytest.raises(UsageError, match="beside the picture"):
        score_alignment(judge, *people)


def test_a_missing_picture_is_a_data_error(people):
    corpus, explained = people
    (corpus.root / "3.png").unlink()
    with pytest.raises(DataError, match=r"3\.png"):
        score_alignment(ColourJudge(), corpus, explained)


def test_a_bare_backbone_judges_as_the_untrained_dual_encoder(people):
    corpus, explained = people
    torch.manual_seed(0)
    backbone = build("clip:micro")
    plain, method = PlainEncoder(backbone), build_method("clip", {}, backbone, 4).eval()
    given = Batch(image=torch.rand(2, 3, *backbone.image_size), texts={"full": backbone.tokenize(["hat", "red bag"])})
    with torch.no_grad():
        torch.testing.assert_close(plain.embed_images(given), method.embed_images(given))
        torch.testing.assert_close(plain.embed_texts(given), method.embed_texts(given))
    assert not backbone.training
    found = [score_alignment(judge, corpus, explained.iloc[:8]) for judge in (plain, method)]
    pd.testing.assert_frame_equal(*found)
    assert found[0]["alignment"].between(-1, 1).all()
