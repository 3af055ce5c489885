"""A method with one vector for texts and another for images: every number comes from the right one."""

import json

import numpy as np
import pytest
import torch
from conftest import corpus_of, write_dataset
from safetensors.torch import save_file
from twotask import Swapped, TwoTask, install, made, other_captions, trained

from reidctl import tables
from reidctl.embedding import embed_gallery_tasks, embed_queries
from reidctl.errors import DataError
from reidctl.evaluation import protocols
from reidctl.methods import clip
from reidctl.methods.base import load_method, unique_state
from reidctl.pixels import PixelStore
from reidctl.retrieval.exact import evaluate_ranking
from reidctl.retrieval.store import read_embeddings, write_embeddings
from reidctl.runs import Run
from reidctl.stages import embeddings, epochs, evaluate, index, matrix, measuring, search, spoiling
from reidctl.stages.finetune import _validation

CPU = torch.device("cpu")
PEOPLE = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """People of the test split alone; some look alike, so that not everything is found."""
    folder = tmp_path_factory.mktemp("tasks") / "blocks"
    return write_dataset(folder, people=PEOPLE, splits=dict.fromkeys(range(PEOPLE), "test"))


@pytest.fixture
def run(tmp_path, data, monkeypatch):
    install(monkeypatch)
    return trained(tmp_path / "run", data)


def expected(data, task_of_images="i2i", task_of_texts="t2i"):
    """Average precisions by direction, from vectors and labels alone."""
    method, corpus = made(), corpus_of(data)
    vectors = embed_gallery_tasks(method, corpus, device=CPU)
    images, texts = corpus.images, corpus.captions
    people, cameras = images["person_id"].to_numpy(), images["camera_id"].to_numpy()
    asked = embed_queries(method, [str(text) for text in texts["text"]], device=CPU)
    told = evaluate_ranking(
        asked, vectors[task_of_texts], query_person=people[texts["row"]], gallery_person=people, top=0
    )
    query, gallery = ((images["role"] == role).to_numpy() for role in ("query", "gallery"))
    shown = evaluate_ranking(
        vectors[task_of_images][query], vectors[task_of_images][gallery], query_person=people[query],
        gallery_person=people[gallery], query_camera=cameras[query], gallery_camera=cameras[gallery],
        exclude="same_camera", top=0,
    )  # fmt: skip
    return {"t2i": told.queries.means(), "i2i": shown.queries.means()}


def scores(found):
    return {direction: found[direction]["mAP"] for direction in ("t2i", "i2i")}


def test_each_direction_is_measured_with_its_own_vectors(run, data):
    found = scores(evaluate.run(run, device="cpu")["metrics"])
    mine, wrong = expected(data), expected(data, "t2i", "i2i")
    assert found == {name: pytest.approx(mine[name]["mAP"], abs=1e-9) for name in found}
    assert all(abs(mine[name]["mAP"] - wrong[name]["mAP"]) > 1e-3 for name in found)


def test_exchanged_vectors_give_other_numbers(run, data, monkeypatch):
    first = scores(evaluate.run(run, device="cpu")["metrics"])
    install(monkeypatch, Swapped)
    second = scores(evaluate.run(run, device="cpu", force=True)["metrics"])
    assert all(abs(first[name] - second[name]) > 1e-3 for name in first)
    assert second == {name: pytest.approx(value["mAP"], abs=1e-9) for name, value in expected(data).items()}


@pytest.mark.parametrize("method", [TwoTask, clip.Clip])
def test_everything_measured_from_an_index_is_what_is_measured_without_one(tmp_path, data, monkeypatch, method):
    install(monkeypatch, method)
    run = trained(tmp_path / "run", data)
    asked = {"device": "cpu", "measure": ("t2i", "i2i", "it2i", "single-shot"), "rerank": ("4/2/0.3",)}
    without = evaluate.run(run, **asked)
    index.run(run, device="cpu")
    monkeypatch.setattr(measuring, "embed_gallery_tasks", None)  # nothing is embedded again
    indexed = evaluate.run(run, **asked, force=True)
    assert indexed["tables"] == without["tables"] and indexed["notes"] == without["notes"]
    (said,) = [note for note in indexed["notes"] if "image+text" in note]
    assert ("each of its own vectors" in said) == (method is TwoTask)


def test_an_index_holds_both_vectors_from_one_forward_pass(run, data):
    TwoTask.passes = 0
    record = index.run(run, device="cpu", batch=10)
    assert TwoTask.passes == 3 and record["tasks"] == ["t2i", "i2i"]
    assert list(record["outputs"]) == ["index/embeddings.parquet", "index/embeddings_i2i.parquet"]
    vectors = embed_gallery_tasks(made(), corpus_of(data), device=CPU, batch=10)
    for task, name in index.TABLES.items():
        path = run.table("index", name)
        assert read_embeddings(path).vectors.tobytes() == vectors[task].tobytes()
        assert tables.footer(path)["task"] == task and tables.footer(path)["model"] == record["model_sha256"]
    assert index.run(run, device="cpu")["status"] == "up-to-date"
    run.table("index", "embeddings_i2i").unlink()
    assert index.run(run, device="cpu")["status"] == "done" and run.table("index", "embeddings_i2i").is_file()


def test_an_index_of_one_vector_says_nothing_new_and_leaves_no_second_table_of_before(run, monkeypatch):
    index.run(run, device="cpu")
    install(monkeypatch, clip.Clip)
    record = index.run(run, device="cpu", force=True)
    assert "tasks" not in record and list(record["outputs"]) == ["index/embeddings.parquet"]
    assert not run.table("index", "embeddings_i2i").exists()
    assert "task" not in tables.footer(run.table("index", "embeddings"))


@pytest.mark.parametrize("name", index.TABLES.values())
def test_query_texts_leave_every_bit_of_both_tables_as_it_was(tmp_path, run, name):
    folder = write_dataset(tmp_path / "own", people=4, splits=dict.fromkeys(range(4), "test"))
    index.run(run, device="cpu", data=folder)
    before = run.table("index", name).read_bytes()
    other_captions(folder)
    assert index.run(run, device="cpu", data=folder)["status"] == "done"
    assert run.table("index", name).read_bytes() == before


def best(vectors, query):
    return list(np.sort(vectors @ query)[::-1][:5])


def test_a_sentence_is_searched_among_one_kind_of_vectors_and_an_image_among_the_other(run, data):
    index.run(run, device="cpu")
    method, corpus = made(), corpus_of(data)
    vectors, names = embed_gallery_tasks(method, corpus, device=CPU), list(corpus.images["image_id"])
    text = embed_queries(method, ["a green shirt"], device=CPU)[0]
    TwoTask.passes = 0
    queries = {"t2i": ({"text": "a green shirt"}, text), "i2i": ({"image": corpus.paths()[4]}, vectors["i2i"][4])}
    for task, (asked, query) in queries.items():
        found = search.run(run, **asked, top=5, device="cpu")["results"]
        assert [hit["score"] for hit in found] == pytest.approx(best(vectors[task], query), abs=1e-5)
    assert TwoTask.passes == 1  # of the one picture
    assert found[0]["image_id"] == names[4]
    assert [hit["score"] for hit in found] != pytest.approx(best(vectors["t2i"], vectors["t2i"][4]), abs=1e-3)


@pytest.mark.parametrize("way", ["made for one vector", "deleted", "of another model"])
def test_an_index_without_vectors_between_images_answers_sentences_and_says_what_an_image_needs(
    run, data, monkeypatch, way
):
    if way == "made for one vector":
        install(monkeypatch, clip.Clip)
    index.run(run, device="cpu")
    install(monkeypatch)
    path = run.table("index", "embeddings_i2i")
    if way == "deleted":
        path.unlink()
    elif way == "of another model":
        write_embeddings(path, read_embeddings(path), facts={"model": "b" * 64})
    picture = corpus_of(data).paths()[0]
    sentence = "another model" if way == "of another model" else r"images with images.*index --force"
    with pytest.raises(DataError, match=sentence):
        search.run(run, image=picture, device="cpu")
    assert search.run(run, text="a red shirt", device="cpu")["results"]
    if way == "made for one vector":
        # It is not measured either, but passed over.
        found = scores(evaluate.run(run, device="cpu")["metrics"])
        assert found == {name: pytest.approx(value["mAP"], abs=1e-9) for name, value in expected(data).items()}


def test_spoilt_pictures_are_compared_by_the_vectors_of_the_direction(run, data):
    subject = measuring.find_subject(run, device="cpu")
    bench = spoiling.Bench(subject, spoiling.plan(subject, ("blur", "blank"), query="caption", seed=0, level=None))
    text, image = bench.captions
    blur, blank = (case for case in bench.asked.cases if case.row != case.reference)
    made_of = {case.row: bench._image_vectors(case) for case in (blur, blank)}
    row_of = {name: row for row, name in enumerate(subject.corpus.images["image_id"])}
    TwoTask.passes = 0
    told, shown = bench._under(blur, bench.captions)
    assert TwoTask.passes == 1
    vectors = made_of["blur"]
    assert not np.allclose(vectors["t2i"], vectors["i2i"], atol=0.1)
    assert told.gallery.vectors.tobytes() == vectors["t2i"][[row_of[n] for n in told.gallery.item]].tobytes()
    assert shown.query.vectors.tobytes() == vectors["i2i"][[row_of[n] for n in shown.query.item]].tobytes()
    assert shown.gallery.vectors.tobytes() == image.gallery.vectors.tobytes()
    assert told.query.vectors.tobytes() == text.query.vectors.tobytes()
    told, shown = bench._under(blank, bench.captions)
    assert (told.gallery.vectors == made_of["blank"]["t2i"][0]).all()
    assert (shown.query.vectors == made_of["blank"]["i2i"][0]).all()
    assert (shown.gallery.vectors == made_of["blank"]["i2i"][0]).all()
    # Described texts are texts too.
    asked = spoiling.plan(subject, ("identity-only",), query="caption", seed=0, level=None)
    (described,) = spoiling.Bench(subject, asked).described
    assert described.gallery.vectors.tobytes() == text.gallery.vectors.tobytes()


def test_reranking_measures_neighbours_in_the_space_of_its_direction(run, monkeypatch):
    seen = {}
    rerank = evaluate.evaluate_reranked

    def spy(protocol, *args, **options):
        seen[protocol.direction] = protocol.gallery
        return rerank(protocol, *args, **options)

    monkeypatch.setattr(evaluate, "evaluate_reranked", spy)
    evaluate.run(run, device="cpu", rerank=("4/2/0.3",))
    corpus = measuring.find_subject(run, device="cpu").corpus
    vectors = embed_gallery_tasks(made(), corpus, device=CPU)
    row_of = {name: row for row, name in enumerate(corpus.images["image_id"])}
    for task in ("t2i", "i2i"):
        assert seen[task].vectors.tobytes() == vectors[task][[row_of[name] for name in seen[task].item]].tobytes()


def test_an_image_and_a_text_are_each_compared_by_their_own_vectors(run):
    kept = {}
    for weight in (1.0, 0.0):
        evaluate.run(run, device="cpu", measure=("i2i", "it2i"), weight=weight)
        rows = tables.read_table(run.table("evaluate", "queries"), "queries")
        rows = rows[rows["condition"] == "standard"].assign(image=rows["query_id"].str.removesuffix("-full"))
        kept[weight] = {name: part.set_index("image")["average_precision"] for name, part in rows.groupby("direction")}
    np.testing.assert_allclose(kept[1.0]["it2i"], kept[1.0]["i2i"][kept[1.0]["it2i"].index], atol=1e-12)
    # A text alone ranks the gallery as in text-to-image retrieval, under the other rules.
    subject = measuring.find_subject(run, device="cpu")
    told = measuring.protocols_of(subject, measuring.embed(subject), "blocks")[0][0]
    gallery = told.gallery.select(np.flatnonzero(~np.char.endswith(told.gallery.image.astype(str), "-0")))
    query = told.query.select(np.flatnonzero(np.char.endswith(told.query.image.astype(str), "-0")))
    found = evaluate_ranking(
        query.vectors, gallery.vectors, query_person=query.person, gallery_person=gallery.person, top=0
    )
    by_image = dict(zip(query.image, found.queries.average_precision, strict=True))
    expects = [by_image[name] for name in kept[0.0]["it2i"].index]
    np.testing.assert_allclose(kept[0.0]["it2i"], expects, atol=1e-12)


def test_epochs_and_the_matrix_measure_both_directions_as_the_evaluation_does(tmp_path, run, data):
    expects = scores(evaluate.run(run, device="cpu")["metrics"])
    whole = Run(tmp_path / "m")
    matrix.run(whole, [run], device="cpu")
    table = tables.read_table(whole.table("matrix", "matrix"), "matrix")
    found = table[table["metric"] == "mAP"].set_index("direction")["value"].to_dict()
    assert found == {name: pytest.approx(value, abs=1e-12) for name, value in expects.items()}
    # Another epoch's weights: the second vector is that epoch's too.
    subject = measuring.find_subject(run, device="cpu")
    index.run(run, device="cpu")
    state = {name: value * 0.5 + 0.01 for name, value in unique_state(load_method(run.stage_dir("finetune"))).items()}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "epoch.safetensors")
    later = epochs._at(subject, 1, tmp_path / "epoch.safetensors")
    vectors = embed_gallery_tasks(later.method, later.corpus, device=CPU)
    stored = measuring.embed(later)
    assert stored.i2i.vectors.tobytes() == vectors["i2i"].tobytes()
    assert stored.t2i.vectors[: len(vectors["t2i"])].tobytes() == vectors["t2i"].tobytes()
    queries = epochs._queries(later, 1)
    (shown,) = [part for part in measuring.protocols_of(later, stored, "blocks")[0] if part.direction == "i2i"]
    average = protocols.evaluate(shown).queries["average_precision"].to_list()
    assert queries.loc[queries["direction"] == "i2i", "average_precision"].to_list() == average


def test_the_epoch_is_validated_with_both_vectors_from_one_forward_pass(data, monkeypatch):
    install(monkeypatch)
    corpus, method = corpus_of(data), made()
    store = PixelStore(corpus.paths(), method.backbone.image_size, cache_bytes=0)
    found = _validation(corpus, store, CPU)(method)
    assert TwoTask.passes == 1  # 24 images are one batch
    mine, wrong = expected(data), expected(data, "t2i", "i2i")
    assert found["mAP"] == pytest.approx(mine["t2i"]["mAP"]) != pytest.approx(wrong["t2i"]["mAP"])
    assert found["i2i.mAP"] == pytest.approx(mine["i2i"]["mAP"]) != pytest.approx(wrong["i2i"]["mAP"])
    bare = type(corpus)(corpus.images, corpus.captions.iloc[:0], corpus.identity, corpus.clothing, corpus.root)
    assert _validation(bare, store, CPU)(method)["mAP"] == found["i2i.mAP"]


def test_an_index_measured_as_given_embeddings_warns_of_the_vectors_that_are_not_for_images(tmp_path, run, data):
    index.run(run, device="cpu")
    for name, warned in (("embeddings", True), ("embeddings_i2i", False)):
        record = embeddings.run(Run(tmp_path / name), [run.table("index", name)], device="cpu")
        assert any("embeddings_i2i.parquet" in note for note in record["notes"]) == warned
    assert record["metrics"]["i2i"]["mAP"] == pytest.approx(expected(data)["i2i"]["mAP"], abs=1e-9)


def test_a_method_with_one_vector_has_one_table_and_one_object(tmp_path, data):
    run = trained(tmp_path / "run", data)
    for stored in (measuring.embed(measuring.find_subject(run, device="cpu")) for _ in range(2)):
        assert stored.i2i is stored.t2i
        index.run(run, device="cpu")
    record = json.loads((run.stage_dir("index") / "stage.json").read_text())
    assert record["settings"] == {"split": "test", "images": None, "model": record["model_sha256"]}
