"""The binding test under a text encoder that counts words and one that binds colours to garments."""

import numpy as np
import pandas as pd
import pytest
import torch

from reidctl.backbones.weights import build
from reidctl.embedding import embed_queries
from reidctl.explain import binding
from reidctl.explain.binding import score_binding, summarise_binding
from reidctl.methods.base import build_method

COLOURS = ["red", "black", "white", "green", "blue", "grey"]
GARMENTS = ["shirt", "trousers"]


def caption(upper, lower):
    return f"{upper} shirt and {lower} trousers"


def unit(rows):
    rows = np.asarray(rows, np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def bag_of_words(texts):
    words = [*COLOURS, *GARMENTS]
    return unit([[text.split().count(word) for word in words] for text in texts])


def bound(texts):
    """One number for every colour of every garment."""
    rows = []
    for text in texts:
        upper, _, _, lower, _ = text.split()
        rows.append([upper == colour for colour in COLOURS] + [lower == colour for colour in COLOURS])
    return unit(rows)


@pytest.fixture
def people():
    """Thirty people with two colours each, no two alike, one image and two equal captions each."""
    worn = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    rows = [
        {"caption_id": f"c{n}-{k}", "image_id": f"i{n}", "person_id": f"p{n}", "text": caption(*both)}
        for n, both in enumerate(worn)
        for k in range(2)
    ]
    return pd.DataFrame(rows, index=range(100, 100 + len(rows))), [caption(b, a) for a, b in worn for _ in range(2)]


@pytest.mark.covers(198)
def test_a_bag_of_words_wins_half_of_the_swaps_and_most_of_the_others(people):
    captions, swapped = people
    found = score_binding(captions, swapped, bag_of_words(captions["text"]), bag_of_words)
    rows = summarise_binding(found).set_index("metric")
    assert (found["binding.swap"] == 0.5).all()
    assert rows.loc["binding.swap", ["value", "low", "high"]].tolist() == [0.5, 0.5, 0.5]
    # Of the other 29 people one has the same words: half a win; all others have fewer of the words.
    assert rows.loc["binding.random", "value"] == pytest.approx(28.5 / 29)
    assert rows["items"].tolist() == [60, 60]


@pytest.mark.covers(198)
def test_a_model_that_binds_wins_all_swaps(people):
    captions, swapped = people
    found = score_binding(captions, swapped, bound(captions["text"]), bound)
    assert (found["binding.swap"] == 1).all() and (found["binding.random"] == 1).all()
    assert found["query_id"].tolist() == captions["caption_id"].tolist()
    contrary = score_binding(captions, swapped, bound(swapped), bound)
    assert (contrary["binding.swap"] == 0).all()
    assert summarise_binding(contrary, judge="m")[["explainer", "judge", "kind"]].iloc[0].tolist() == ["", "m", "value"]


def test_captions_that_cannot_be_swapped_are_left_out_but_stay_among_the_others(people):
    captions, swapped = people
    some = [None, *swapped[1:4], captions["text"].iloc[4], *[None] * (len(swapped) - 5)]
    found = score_binding(captions, some, bound(captions["text"]), bound)
    assert found["query_id"].tolist() == ["c0-1", "c1-0", "c1-1"]
    assert (found["binding.random"] == 1).all()
    assert summarise_binding(found)["items"].tolist() == [3, 3]


def test_the_mean_over_others_equals_a_loop_in_any_chunk(people, monkeypatch):
    captions, swapped = people
    captions = captions.assign(person_id=[f"p{n // 7}" for n in range(len(captions))])
    rng = np.random.default_rng(0)
    images = unit(rng.normal(size=(len(captions), 12)))
    monkeypatch.setattr(binding, "_CHUNK", 8)
    found = score_binding(captions, swapped, images, bound)
    texts = bound(captions["text"]).astype(np.float64)
    for row in range(len(captions)):
        wins = []
        for other in range(len(captions)):
            if captions["person_id"].iloc[other] != captions["person_id"].iloc[row]:
                margin = texts[row] @ images[row] - texts[other] @ images[row]
                wins.append(0.5 if abs(margin) < 1e-6 else float(margin > 0))
        assert found["binding.random"].iloc[row] == pytest.approx(np.mean(wins))


def test_nobody_else_means_no_random_rate(people):
    captions, swapped = people
    one = captions.assign(person_id="p")
    found = score_binding(one, swapped, bound(one["text"]), bound)
    assert found["binding.random"].isna().all()
    assert set(summarise_binding(found)["metric"]) == {"binding.swap"}


def test_no_usable_caption_gives_no_rows(people):
    captions, _ = people
    found = score_binding(captions, [None] * len(captions), bound(captions["text"]), bound)
    assert found.empty and summarise_binding(found).empty


def test_a_trained_method_can_be_tested(people):
    captions, swapped = people
    torch.manual_seed(0)
    method = build_method("clip", {}, build("clip:micro"), 4).eval()

    def embed(texts):
        return embed_queries(method, list(texts), device=torch.device("cpu"))

    images = embed(captions["text"])  # as if every image were its caption
    found = score_binding(captions, swapped, images, embed)
    assert (found["binding.swap"] == 1).all() and len(found) == 60
