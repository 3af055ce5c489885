from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from evaluation.test_reranking import crowd
from methods.test_method_contract import CPU, SETTINGS, model
from PIL import Image

from reidctl.embedding import embed_gallery, embed_queries
from reidctl.errors import UsageError
from reidctl.evaluation.pairwise import (
    Pairwise,
    candidates_of,
    caveat,
    check,
    count_pairs,
    evaluate_pairwise,
    is_pairwise,
    parse,
    score_pairs,
)  # fmt: skip
from reidctl.evaluation.protocols import evaluate, rank
from reidctl.metrics import chance


def texts(protocol):
    return replace(protocol, direction="t2i", exclude="none")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(write_dataset(tmp_path_factory.mktemp("pairwise") / "blocks", people=6))


def pairwise_model(**changes):
    return model("bdam", protocol="pairwise", **changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pairwise", "does not say how many"), ("pairwise/", "does not say"), ("pairwise/x", "does not say"),
        ("pairwise/-3", "does not say"), ("pairwise/1", "changes nothing"), ("pairwise/0", "changes nothing"),
        ("pairwise/1001", r"O\(Q·G\)"), ("pairwise/50/2", "does not say"),
    ],
)  # fmt: skip
def test_a_depth_that_means_nothing_is_refused(text, words):
    assert is_pairwise(text)
    with pytest.raises(UsageError, match=words):
        parse(text)
    assert parse("pairwise/50").name == "pairwise/50" and not is_pairwise("20/6/0.3")


@pytest.mark.covers(143)
def test_the_whole_gallery_and_methods_without_a_head_are_refused():
    with pytest.raises(UsageError, match=r"all 18 images of here.*O\(Q·G\)"):
        check(pairwise_model(), Pairwise(18), 18, "here")
    check(pairwise_model(), Pairwise(17), 18, "here")
    for name in set(SETTINGS) - {"interpart"}:
        with pytest.raises(UsageError, match=r"no match head.*method\.protocol=pairwise"):
            check(model(name), Pairwise(5), 18, "here")
    with pytest.raises(UsageError, match="no match head"):
        score_pairs(model("clip"), [], [], np.zeros((0, 2), np.int64), device=CPU)
    with pytest.raises(UsageError, match="text queries"):
        evaluate_pairwise(crowd(), Pairwise(5), lambda rows: np.zeros(rows.shape))
    with pytest.raises(UsageError, match="text queries"):
        evaluate_pairwise(texts(crowd()), Pairwise(90), lambda rows: np.zeros(rows.shape))


@pytest.mark.covers(143)
def test_the_head_orders_the_first_k_and_the_rest_follows_in_its_old_order():
    protocol = texts(crowd(noise=2.5))
    before = rank(protocol, top=90).index
    # A head that knows the person puts all of theirs among the first 20 at the top.
    knows = lambda rows: (protocol.gallery.person[rows] == protocol.query.person[:, None]).astype(float)  # noqa: E731
    found = evaluate_pairwise(protocol, Pairwise(20), knows, top=90)
    for query in range(len(protocol.query)):
        first, person = before[query, :20], protocol.query.person[query]
        own = sorted(protocol.gallery.item[row] for row in first if protocol.gallery.person[row] == person)
        other = sorted(protocol.gallery.item[row] for row in first if protocol.gallery.person[row] != person)
        shown = protocol.gallery.item[found.ranking.index[query]].tolist()
        assert shown[:20] == own + other, "equal scores by id"
        assert shown[20:] == protocol.gallery.item[before[query, 20:]].tolist()
    score = found.ranking.score
    assert (score[:, :20] > 2).all() and (score[:, 20:] <= 1).all() and (np.diff(score, axis=1) <= 0).all()
    assert found.summary["rank1"].value > evaluate(protocol).summary["rank1"].value
    assert set(found.metrics["condition"]) == {"rerank-pairwise/20"}
    named = evaluate_pairwise(replace(protocol, condition="typos"), Pairwise(20), knows)
    assert set(named.metrics["condition"]) == {"typos+rerank-pairwise/20"}
    assert "first 20 of 90" in caveat(protocol, Pairwise(20))


@pytest.mark.covers(143)
def test_a_head_that_repeats_the_first_search_changes_nothing():
    protocol = texts(crowd())
    cosine = protocol.query.vectors.astype(float) @ protocol.gallery.vectors.T.astype(float)
    again = evaluate_pairwise(protocol, Pairwise(30), lambda rows: np.take_along_axis(cosine, rows, 1))
    assert again.ranking.queries.means() == evaluate(protocol).ranking.queries.means()


@pytest.mark.covers(29, 143)
def test_equal_scores_of_the_head_are_worth_their_expected_value_and_ties_at_the_border_stay_out():
    protocol = texts(crowd())
    blind = evaluate_pairwise(protocol, Pairwise(89), lambda rows: np.zeros(rows.shape))
    matches = blind.ranking.queries.matches
    expected = chance(matches, np.full(len(matches), 89)).means()["rank1"]
    assert blind.summary["rank1"].value == pytest.approx(expected, abs=0.01)
    same = np.repeat(protocol.gallery.vectors[:1], 90, axis=0)
    collapsed = replace(protocol, gallery=replace(protocol.gallery, vectors=same))
    assert (candidates_of(collapsed, 20) == -1).all(), "which 20 of equal ones would depend on their ids"
    knows = lambda rows: rows.astype(float)  # noqa: E731
    found = evaluate_pairwise(collapsed, Pairwise(20), knows).ranking.queries
    assert found.means() == pytest.approx(chance(found.matches, np.full(len(matches), 90)).means())


@pytest.mark.covers(143)
@pytest.mark.parametrize("sequence", ["tokens", "vector"])
def test_scores_are_those_of_each_pair_alone_and_everything_is_encoded_once(corpus, sequence, monkeypatch):
    method = pairwise_model(fusion={"sequence": sequence, "width": 16, "out_dim": 16})
    sentences = [f"A {colour} shirt." for colour in ("red", "blue", "green", "black", "white", "yellow", "brown")]
    sentences.append("A much longer sentence about a tall person who wears nothing that was seen before.")
    sentences += sentences[:2]
    rng = np.random.default_rng(0)
    candidates = np.stack([rng.permutation(12)[:5] for _ in sentences])  # images 12 to 17 are nobody's candidate
    candidates[8:] = candidates[:2]
    candidates[3, 2:] = -1
    seen = {"image": 0, "text": 0, "pairs": 0}
    images, words, scored = method.encode_pair_images, method.encode_pair_texts, method.pair_scores

    def count(kind, call):
        def counted(*given):
            seen[kind] += len(given[0])
            return call(*given)

        return counted

    monkeypatch.setattr(method, "encode_pair_images", count("image", images))
    monkeypatch.setattr(method, "encode_pair_texts", count("text", words))
    monkeypatch.setattr(method, "pair_scores", count("pairs", scored))
    paths = [*corpus.paths()[:12], *[corpus.root / "gone.png"] * 6]  # what is no candidate is not read
    told = []
    found = score_pairs(method, paths, sentences, candidates, device=CPU, advance=told.append)
    distinct = count_pairs(sentences, candidates)
    assert seen == {"image": len(np.unique(candidates[candidates >= 0])), "text": 8, "pairs": distinct}
    assert sum(told) == distinct == 8 * 5 - 3
    assert np.array_equal(np.isnan(found), candidates < 0)
    for query, place in [(0, 0), (3, 1), (7, 4), (8, 2)]:
        only = np.array([[candidates[query, place]]])
        alone = score_pairs(method, paths, [sentences[query]], only, device=CPU)[0, 0]
        assert found[query, place] == pytest.approx(alone, abs=5e-4)
    assert np.array_equal(found[8:], found[:2]), "equal queries have equal scores"
    assert np.unique(found[:8][candidates[:8] >= 0]).size > 10, "or nothing was tested"


@pytest.mark.covers(142, 143)
def test_the_gallery_of_a_pairwise_model_is_that_of_image_only_whatever_was_asked(corpus):
    """The index of a pairwise model reads no text: bit-identical before and after queries, and with other queries."""
    method = pairwise_model()
    assert method.gallery_texts == ()
    before = embed_gallery(method, corpus, device=CPU)
    sentences = [str(text) for text in corpus.captions["text"]]
    candidates = np.tile(np.arange(5), (len(sentences), 1))
    score_pairs(method, corpus.paths(), sentences, candidates, device=CPU)
    embed_queries(method, ["another text entirely"], device=CPU)
    assert np.array_equal(before, embed_gallery(method, corpus, device=CPU))
    plain = model("bdam", protocol="image_only")
    plain.load_state_dict(method.state_dict(), strict=False)
    assert np.array_equal(before, embed_gallery(plain, corpus, device=CPU))


def noise_gallery(corpus, folder, *, equal):
    rng = np.random.default_rng(0)
    paths = []
    for number in range(len(corpus.images)):
        pixels = np.random.default_rng(7).integers(0, 256, (64, 32, 3)) if equal else rng.integers(0, 256, (64, 32, 3))
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels.astype(np.uint8)).save(paths[-1])
    return paths


@pytest.mark.covers(142, 143)
def test_a_head_cannot_score_the_text_alone(corpus, tmp_path):
    """With one noise picture under every name, all items of a query tie, whatever the text says."""
    method = pairwise_model()
    sentences = [str(text) for text in corpus.captions["text"]]
    paths = noise_gallery(corpus, tmp_path, equal=True)
    candidates = np.tile(np.arange(len(paths)), (len(sentences), 1))
    found = score_pairs(method, paths, sentences, candidates, device=CPU)
    assert (found == found[:, :1]).all()
    assert np.unique(found[:, 0]).size > 3, "the text itself does move the score"


@pytest.mark.covers(142, 143)
def test_noise_images_give_chance_after_pairwise_re_ranking(corpus, tmp_path):
    """If the query could be read from the gallery side, noise would still be found."""
    method = pairwise_model()
    sentences = [str(text) for text in corpus.captions["text"]]
    paths = noise_gallery(corpus, tmp_path, equal=False)
    people = corpus.images["person_id"].to_numpy()
    candidates = np.tile(np.arange(len(paths)), (len(sentences), 1))
    found = score_pairs(method, paths, sentences, candidates, device=CPU)
    order = np.argsort(-found, axis=1, kind="stable")
    own = (people[order] == people[corpus.captions["row"]][:, None]).argmax(axis=1)
    # 18 images, 3 per person: the first hit of a random order is expected near place 3.75 (0-based).
    assert 2 < own.mean() < 7


def trained(corpus, method, steps):
    from reidctl.data import TrainingSet
    from reidctl.training.config import TrainConfig
    from reidctl.training.optimizer import build_optimizer

    backbone = method.backbone
    samples = TrainingSet(
        corpus, size=backbone.image_size, mean=backbone.mean, std=backbone.std, tokenize=backbone.tokenize,
        texts=method.train_texts, target=method.target_text,
    )  # fmt: skip
    batch = samples.collate([samples[(0, row, row)] for row in range(12)])
    optimizer = build_optimizer(method.train(), "finetune", TrainConfig(lr=5e-3, lr_new=5e-3))
    torch.manual_seed(0)
    history = []
    for _ in range(steps):
        found = method.losses(batch, "finetune")
        history.append(float(found["match"].detach()))
        optimizer.zero_grad(set_to_none=True)
        method.objective(found).backward()
        optimizer.step()
    return history


@pytest.mark.covers(143)
@pytest.mark.parametrize("sequence", ["tokens", "vector"])
def test_training_lowers_the_match_loss_and_orders_right_pairs_above_wrong_ones(corpus, sequence):
    settings = {"sequence": sequence, "width": 16, "out_dim": 16, "dropout": 0.0}
    method = pairwise_model(fusion=settings, decouple=False, gradnorm=None, weights={"triplet": 0.0}, target="caption")
    history = trained(corpus, method, 60)
    # Odds of 1:2 for every pair, the share of right ones, would give 0.637.
    assert np.mean(history[-5:]) < 0.56 < 0.637 < np.mean(history[:3]), history
    method.eval()
    sentences = [str(text) for text in corpus.captions["text"]][:12]
    people = corpus.images["person_id"].to_numpy()[:12]
    found = score_pairs(method, corpus.paths()[:12], sentences, np.tile(np.arange(12), (12, 1)), device=CPU)
    same = people[:, None] == people
    assert found[same].mean() > found[~same].mean() + 1
