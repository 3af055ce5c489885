"""Pairwise re-ranking through the command line: evaluate and search."""

import shutil

import numpy as np
import pytest
from commandline import ONE_EPOCH, cli, refused

from reidctl import tables

pytest_plugins = ["finished"]


@pytest.fixture(scope="module")
def paired(chain, tmp_path_factory):
    """A run with a match head, indexed, on the data of the shared chain."""
    run = tmp_path_factory.mktemp("pairwise") / "run"
    run.mkdir()
    for stage in ("data", "caption"):
        shutil.copytree(chain.run / stage, run / stage)
    assert cli("finetune", *ONE_EPOCH, "--set", "method.protocol=pairwise", "--run", run).code == 0
    assert cli("index", "--run", run).code == 0
    return run


def gallery_of(run):
    images = tables.read_table(run / "data" / "images.parquet", "images")
    return int((images["split"] == "test").sum())


@pytest.mark.covers(143)
def test_evaluate_has_a_row_of_pairwise_re_ranking_for_text_queries_alone(paired):
    found = cli("evaluate", "--run", paired, "--rerank", "pairwise/4", "--rerank", "3/2/0.3", "--json").json
    rows = {name.split(":")[0]: set(part["rows"]) for name, part in found["tables"].items()}
    assert {"standard", "rerank-pairwise/4", "rerank-3/2/0.3"} <= rows["t2i"]
    assert "rerank-pairwise/4" not in rows["i2i"] and "rerank-3/2/0.3" in rows["i2i"]
    assert any("first 4 of" in note for note in found["notes"])
    rankings = tables.read_table(paired / "evaluate" / "rankings.parquet", "rankings")
    mine = rankings[rankings["condition"] == "rerank-pairwise/4"]
    assert (mine.loc[mine["rank"] <= 4, "score"] > 2).all() and (mine.loc[mine["rank"] > 4, "score"] <= 1).all()
    plain = rankings[(rankings["condition"] == "standard") & (rankings["direction"] == "t2i")]
    for query, part in mine.groupby("query_id", observed=True):
        before = plain[plain["query_id"] == query].sort_values("rank")["gallery_id"].tolist()
        after = part.sort_values("rank")["gallery_id"].tolist()
        assert set(after[:4]) == set(before[:4]) and after[4:] == before[4:]
    again = cli("evaluate", "--run", paired, "--rerank", "pairwise/4", "--rerank", "3/2/0.3", "--json").json
    assert again["status"] == "up-to-date"
    assert "re-ranked pairwise/4" in cli("evaluate", "--run", paired, "--rerank", "pairwise/4").out


@pytest.mark.covers(143)
def test_evaluate_refuses_what_pairwise_re_ranking_cannot_do(paired, chain):
    before = (paired / "finetune" / "model.json").read_bytes()
    whole = gallery_of(paired)
    for args, words in (
        (("--rerank", "pairwise"), "pairwise/50"),
        (("--rerank", "pairwise/1"), "changes nothing"),
        (("--rerank", f"pairwise/{whole}"), "O(Q·G)"),
        (("--rerank", "pairwise/5000"), "at most 1000"),
        (("--rerank", "pairwise/4", "--protocol", "i2i"), "--protocol t2i"),
        (("--embeddings", "x.npz", "--rerank", "pairwise/4"), "cannot be combined"),
    ):
        refused(2, words, args=("evaluate", "--run", paired, *args))
    refused(
        2, "no match head", "method.protocol=pairwise", args=("evaluate", "--run", chain.run, "--rerank", "pairwise/4")
    )
    assert (chain.run / "evaluate" / "stage.json").is_file(), "a refusal leaves the old result"
    assert (paired / "finetune" / "model.json").read_bytes() == before


@pytest.mark.covers(143)
def test_search_re_ranks_its_first_items_and_reads_only_their_images(paired, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(paired, run)
    sentence = "a man in a red jacket and blue jeans"
    plain = cli("search", sentence, "--run", run, "--top", "6", "--json").json["results"]
    first = {hit["image_id"] for hit in plain[:3]}
    images = tables.read_table(run / "data" / "images.parquet", "images")
    for name, path in zip(images["image_id"], images["path"], strict=True):
        if name not in first:
            (run / "data" / path).unlink()
    found = cli("search", sentence, "--run", run, "--top", "6", "--rerank", "3", "--json").json
    hits = found["results"]
    assert found["rerank"] == "pairwise/3" and [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5, 6]
    assert {hit["image_id"] for hit in hits[:3]} == first
    assert [hit["image_id"] for hit in hits[3:]] == [hit["image_id"] for hit in plain[3:]]
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True) and scores[2] > 2 and scores[3] == pytest.approx(plain[3]["score"])
    short = cli("search", sentence, "--run", run, "--top", "2", "--rerank", "3", "--json").json["results"]
    assert [hit["image_id"] for hit in short] == [hit["image_id"] for hit in hits[:2]]


@pytest.mark.covers(143)
def test_search_and_evaluate_score_a_pair_alike(paired):
    cli("evaluate", "--run", paired, "--rerank", "pairwise/4")
    rankings = tables.read_table(paired / "evaluate" / "rankings.parquet", "rankings")
    mine = rankings[rankings["condition"] == "rerank-pairwise/4"]
    captions = tables.read_table(paired / "data" / "captions.parquet", "captions").set_index("caption_id")["text"]
    query = mine["query_id"].iloc[0]
    hits = cli("search", captions[query], "--run", paired, "--top", "4", "--rerank", "4", "--json").json["results"]
    expected = mine[mine["query_id"] == query].sort_values("rank")["score"].to_numpy()[:4]
    assert np.allclose([hit["score"] for hit in hits], expected, atol=5e-4)


def test_search_refuses_re_ranking_without_a_sentence_or_a_head(paired, chain):
    refused(2, "an image query has none", args=("search", "--image", "x.png", "--rerank", "3", "--run", paired))
    refused(2, "no match head", args=("search", "red", "--rerank", "3", "--run", chain.run))
    refused(2, "O(Q·G)", args=("search", "red", "--rerank", str(gallery_of(paired)), "--run", paired))
    refused(2, "--rerank", args=("search", "red", "--rerank", "1", "--run", paired))
