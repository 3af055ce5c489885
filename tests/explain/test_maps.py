"""Choosing phrases and computing their maps."""

import numpy as np
import pandas as pd
import pytest
import torch

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.data import build_corpus
from reidctl.errors import DataError
from reidctl.explain.maps import USER_QUERY, explain_phrases, grid_map, pair_batch, pick_phrases, upsample
from reidctl.methods.base import build_method
from reidctl.pixels import PixelStore

SENTENCE = "A person with a red shirt walks in blue trousers."


@pytest.fixture
def corpus(blocks):
    images = tables.read_table(blocks / "images.parquet", "images")
    captions = tables.read_table(blocks / "captions.parquet", "captions")
    return build_corpus(images, captions, None, blocks)


@pytest.fixture
def captions(corpus):
    parent = corpus.captions.iloc[0]
    rows = [
        {
            "caption_id": f"ph{n}", "image_id": parent["image_id"], "kind": "phrase", "text": text, "status": "ok",
            "parent_id": parent["caption_id"], "char_start": start, "char_end": start + len(text),
        }
        for n, (text, start) in enumerate((("red shirt", 17), ("trousers", 31)))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return build_method("clip", {}, build("clip:micro"), 4).eval()


def test_phrases_of_a_caption_keep_their_place_and_others_are_explained_whole(corpus, captions):
    found = pick_phrases(corpus, captions, samples=1000, seed=0)
    first = [p for p in found if p.query_id == corpus.captions["caption_id"].iloc[0]]
    assert [(p.text, p.char_start, p.char_end) for p in first] == [("red shirt", 17, 26), ("trousers", 31, 39)]
    other = next(p for p in found if p.query_id == corpus.captions["caption_id"].iloc[5])
    assert other.text == corpus.captions["text"].iloc[5]
    assert (other.char_start, other.char_end) == (0, len(other.text))


def test_a_pair_knows_its_cameras_where_the_method_tells_them_apart(corpus, method, monkeypatch):
    store = PixelStore(corpus.paths(), method.backbone.image_size)
    assert pair_batch(method, corpus, [4, 0], None, store).camera is None
    monkeypatch.setattr(type(method), "cameras", ("blocks/c1", "blocks/c2"))
    given = pair_batch(method, corpus, [4, 0, 2], ["a", "b", "c"], store)
    assert given.camera.tolist() == [0, -1, 1] and given.image_id == ("p1-1", "p0-0", "p0-2")


def test_the_choice_depends_on_the_seed_alone(corpus, captions):
    def ids(seed):
        return [p.query_id for p in pick_phrases(corpus, captions, samples=5, seed=seed)]

    assert ids(1) == ids(1)
    assert len(set(ids(1))) == 5
    assert ids(1) != ids(2)


def test_a_user_phrase_goes_to_random_images(corpus, captions):
    found = pick_phrases(corpus, captions, samples=4, seed=0, phrase="green hat")
    assert {(p.query_id, p.text, p.char_start, p.char_end) for p in found} == {(USER_QUERY, "green hat", 0, 9)}
    assert len({p.image_id for p in found}) == 4


def test_no_captions_is_a_data_error_that_names_the_flag(corpus, captions):
    bare = build_corpus(corpus.images, tables.empty("captions"), None, corpus.root)
    with pytest.raises(DataError, match="--phrase"):
        pick_phrases(bare, tables.empty("captions"), samples=3, seed=0)


@pytest.mark.covers(180)
@pytest.mark.parametrize("explainer", ["gradcam", "patch"])
def test_explanations_have_the_grid_and_range_and_do_not_depend_on_the_batch(
    corpus, captions, method, explainer, tmp_path
):
    phrases = pick_phrases(corpus, captions, samples=6, seed=0)
    table = explain_phrases(method, corpus, phrases, explainer=explainer, batch=4)
    again = explain_phrases(method, corpus, phrases, explainer=explainer, batch=1)
    assert list(table["phrase"]) == [p.text for p in phrases]
    values = tables.matrix(table["relevance"])
    assert values.shape[1] == table["grid_h"].iloc[0] * table["grid_w"].iloc[0]
    assert tuple(table[["grid_h", "grid_w"]].iloc[0]) == tuple(method.backbone.grid)
    assert values.min() >= 0 and values.max() <= 1 + 1e-6
    np.testing.assert_allclose(values, tables.matrix(again["relevance"]), atol=1e-3)
    assert table["similarity"].between(-1, 1).all()
    tables.write_table(tmp_path / "e.parquet", "explanations", table)
    back = tables.read_table(tmp_path / "e.parquet", "explanations")
    np.testing.assert_array_equal(tables.matrix(back["relevance"]), values)


@pytest.mark.covers(180)
def test_explanations_are_deterministic(corpus, captions, method):
    phrases = pick_phrases(corpus, captions, samples=3, seed=0)
    first, second = (tables.matrix(explain_phrases(method, corpus, phrases)["relevance"]) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_no_phrases_give_an_empty_table(corpus, method):
    assert len(explain_phrases(method, corpus, [])) == 0


def test_upsample_keeps_patch_centres_and_means_between_them():
    fine = upsample(np.asarray([[0.0, 1.0]]), (1, 6))[0]
    # Patch centres lie at pixels 1 and 4; half way between them is 0.5.
    assert fine[[1, 4]] == pytest.approx([0.0, 1.0], abs=1e-6)
    assert (fine[2] + fine[3]) / 2 == pytest.approx(0.5)


def test_grid_map_is_row_major():
    row = pd.DataFrame([{"grid_h": 2, "grid_w": 3, "relevance": np.arange(6)}]).iloc[0]
    np.testing.assert_array_equal(grid_map(row), [[0, 1, 2], [3, 4, 5]])


def test_the_similarity_is_that_of_each_phrase_with_its_image_and_is_taken_where_it_is_known(corpus, captions, method):
    phrases = pick_phrases(corpus, captions, samples=6, seed=0, whole=True)
    table = explain_phrases(method, corpus, phrases, explainer="patch", batch=4)
    store = PixelStore(corpus.paths(), method.backbone.image_size)
    row_of = {name: row for row, name in enumerate(corpus.images["image_id"])}
    for phrase, found in zip(phrases, table["similarity"], strict=True):
        alone = pair_batch(method, corpus, [row_of[phrase.image_id]], [phrase.text], store)
        with torch.no_grad():
            assert found == pytest.approx(
                float((method.embed_images(alone) @ method.embed_texts(alone).T)[0, 0]), abs=1e-5
            )
    known = np.arange(len(phrases), dtype=np.float32)
    again = explain_phrases(method, corpus, phrases, explainer="centre", batch=4, similarity=known)
    assert again["similarity"].tolist() == known.tolist()
