"""Rank correlations against scipy, weights without information, exchanged phrases, and two models side by side."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr

from reidctl import tables
from reidctl.backbones.weights import build
from reidctl.data import build_corpus
from reidctl.errors import DataError
from reidctl.explain.concentration import summarise_scores
from reidctl.explain.maps import Phrase, explain_phrases, pick_phrases
from reidctl.explain.sanity import (
    PHRASES,
    STABILITY,
    WEIGHTS,
    compare_maps,
    randomised,
    shuffled_phrases,
    spearman,
    stability,
)
from reidctl.methods.base import build_method


def test_spearman_equals_scipy_with_ties_and_without():
    rng = np.random.default_rng(0)
    a, b = rng.random((40, 12)).astype(np.float32), rng.integers(0, 4, (40, 12))
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    assert spearman(a, b) == pytest.approx(expected, abs=1e-12)


def test_spearman_of_worked_maps():
    line = np.arange(5.0)[None]
    assert spearman(line, line**3).tolist() == [1.0]
    assert spearman(line, -line).tolist() == [-1.0]
    assert spearman(line, np.full((1, 5), 0.1)).tolist() == [0.0]  # scipy says NaN


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return build_method("clip", {}, build("clip:micro"), 4).eval()


@pytest.mark.covers(192)
def test_randomised_weights_are_the_old_ones_in_other_places(method):
    before = {name: value.clone() for name, value in method.state_dict().items()}
    other, again, third = randomised(method, 0), randomised(method, 0), randomised(method, 1)
    moved = 0
    for (name, old), new, same, different in zip(
        method.named_parameters(), other.parameters(), again.parameters(), third.parameters(), strict=True
    ):
        torch.testing.assert_close(new.flatten().sort().values, old.flatten().sort().values, rtol=0, atol=0)
        assert torch.equal(new, same), name
        if old.unique().numel() > 2:
            moved += 1
            assert not torch.equal(new, old), name
            assert not torch.equal(new, different), name
    assert moved > 10
    assert not other.training and not any(p is q for p, q in zip(method.parameters(), other.parameters(), strict=True))
    for (name, buffer), new in zip(method.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, new), name
    assert all(torch.equal(value, method.state_dict()[name]) for name, value in before.items())


class Painter(torch.nn.Module):
    """Explains by one learnt number per patch and, if it is honest, nothing else."""

    def __init__(self, honest):
        super().__init__()
        self.honest, self.weight = honest, torch.nn.Parameter(torch.arange(24.0))

    def maps(self, images):
        learnt = self.weight if self.honest else torch.arange(24.0)
        return (learnt + images).detach().numpy() / 100


def table_of(maps, explainer="ppim", phrase="hat"):
    count = len(maps)
    columns = {
        "query_id": [f"q{n}" for n in range(count)], "image_id": [f"i{n}" for n in range(count)], "phrase": phrase,
        "explainer": explainer, "grid_h": 6, "grid_w": 4, "relevance": [np.asarray(m, np.float32) for m in maps],
    }  # fmt: skip
    return pd.DataFrame(columns)


@pytest.mark.covers(192)
def test_maps_that_ignore_the_weights_survive_randomisation_and_others_do_not():
    images = torch.rand(8, 24, generator=torch.Generator().manual_seed(0))
    people = {f"i{n}": f"p{n}" for n in range(8)}
    found = {}
    for honest in (True, False):
        model = Painter(honest)
        before, after = table_of(model.maps(images)), table_of(randomised(model, 3).maps(images))
        found[honest] = summarise_scores(compare_maps(before, after, WEIGHTS), people, {WEIGHTS: ()}).iloc[0]
    assert found[False]["value"] == 1.0
    assert found[True]["high"] < 0.5
    assert (found[True]["metric"], found[True]["kind"], found[True]["items"]) == ("sanity.weights", "value", 8)


@pytest.mark.covers(192)
@pytest.mark.parametrize("explainer", ["gradcam", "patch"])
def test_maps_of_a_model_change_with_its_weights_and_with_the_phrase(blocks, method, explainer):
    corpus = build_corpus(
        tables.read_table(blocks / "images.parquet", "images"),
        tables.read_table(blocks / "captions.parquet", "captions"),
        None,
        blocks,
    )
    phrases = pick_phrases(corpus, tables.empty("captions"), samples=12, seed=0)
    maps = explain_phrases(method, corpus, phrases, explainer=explainer)
    same = compare_maps(maps, maps, WEIGHTS)[WEIGHTS].dropna()
    assert len(same) >= 4 and same.to_numpy() == pytest.approx(1.0)
    without = explain_phrases(randomised(method, 0), corpus, phrases, explainer=explainer)
    assert compare_maps(maps, without, WEIGHTS)[WEIGHTS].mean() < 0.5
    shuffled = explain_phrases(method, corpus, shuffled_phrases(phrases), explainer=explainer)
    assert compare_maps(maps, shuffled, PHRASES)[PHRASES].mean() < 0.999


def pairs(*texts):
    return [
        Phrase(f"q{q}", f"i{q}", text, n, n + len(text)) for q, mine in enumerate(texts) for n, text in enumerate(mine)
    ]


def check_exchange(before, after):
    captions = {}
    for phrase in before:
        captions.setdefault(phrase.text, set()).add(phrase.query_id)
    for old, new in zip(before, after, strict=True):
        assert (new.query_id, new.image_id) == (old.query_id, old.image_id)
        assert (new.char_start, new.char_end, new.sentence) == (0, 0, "")
        assert new.text.casefold() != old.text.casefold()
        assert captions[new.text] - {old.query_id}


@pytest.mark.covers(192)
def test_every_pair_gets_a_phrase_of_another_caption_and_text_and_each_is_given_once():
    given = pairs(*[(f"hat {n}", f"shirt {n}", "red bag", f"{n} bags", "black shoes", "Black Shoes") for n in range(9)])
    after = shuffled_phrases(given, seed=4)
    check_exchange(given, after)
    assert sorted(p.text for p in after) == sorted(p.text for p in given)
    assert after == shuffled_phrases(given, seed=4) != shuffled_phrases(given, seed=5)


@pytest.mark.covers(192)
@pytest.mark.parametrize("seed", range(20))
def test_two_pairs_can_only_swap(seed):
    given = pairs(["red hat"], ["blue hat"])
    assert [p.text for p in shuffled_phrases(given, seed=seed)] == ["blue hat", "red hat"]


@pytest.mark.parametrize("seed", range(20))
def test_phrases_are_taken_again_where_one_text_is_too_common(seed):
    given = pairs(["hat"], ["hat"], ["hat"], ["bag"])
    after = shuffled_phrases(given, seed=seed)
    check_exchange(given, after)
    assert [p.text for p in after] == ["bag", "bag", "bag", "hat"]


@pytest.mark.parametrize("given", [pairs(["hat", "bag"]), pairs(["hat"], ["Hat"]), pairs(["hat"])])
def test_phrases_that_cannot_be_exchanged_are_an_error(given):
    with pytest.raises(DataError, match="cannot be exchanged"):
        shuffled_phrases(given)


def test_a_phrase_brings_its_part_and_leaves_its_sentence():
    hat, bag = pairs(["red hat"], ["blue bag"])
    given = [replace(hat, sentence="A red hat.", part="head"), replace(bag, sentence="A blue bag.", part="carried")]
    assert [(p.text, p.part, p.sentence) for p in shuffled_phrases(given)] == [
        ("blue bag", "carried", ""),
        ("red hat", "head", ""),
    ]


def test_no_phrases_stay_no_phrases():
    assert shuffled_phrases([]) == []


def test_a_constant_map_has_no_order_to_keep_and_is_left_out():
    line = np.arange(24.0)
    found = compare_maps(table_of([np.zeros(24), line]), table_of([line, np.zeros(24)]), WEIGHTS)
    np.testing.assert_array_equal(found[WEIGHTS], [np.nan, 0.0])


@pytest.mark.covers(195)
def test_stability_joins_the_rows_that_both_models_have():
    line = np.arange(24.0)
    first = pd.concat([table_of([line, -line + 23, line]), table_of([line], "cls"), table_of([line])])
    second = table_of([line, line])[::-1]
    found = stability(first, second)
    assert found["query_id"].tolist() == ["q0", "q1"]
    assert found[STABILITY].tolist() == [1.0, -1.0]
    assert found["explainer"].tolist() == ["ppim", "ppim"]


@pytest.mark.covers(195)
def test_maps_over_different_grids_are_compared_on_the_first():
    line = np.repeat(np.arange(6.0), 4)  # rows rise downwards
    coarse = table_of([np.repeat(np.arange(3.0), 2)]).assign(grid_h=3, grid_w=2)
    # Bilinear from 3 rows to 6: 0, .25, .75, 1.25, 1.75, 2: the order of the rows.
    assert stability(table_of([line]), coarse)[STABILITY].tolist() == [1.0]
    assert stability(coarse, table_of([line]))[STABILITY].tolist() == [1.0]


def test_models_without_a_common_phrase_are_an_error():
    with pytest.raises(DataError, match="in common"):
        stability(table_of([np.arange(24.0)]), table_of([np.arange(24.0)], phrase="bag"))
