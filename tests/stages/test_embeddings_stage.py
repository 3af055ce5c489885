from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from fakerun import finish, make_data

from reidctl import tables
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.given import protocols_of, read_given
from reidctl.retrieval.store import read_embeddings, write_embeddings
from reidctl.runs import Run, digest
from reidctl.stages import embeddings, index, search

CAMERAS, PEOPLE = 3, 6


def unit(values):
    values = np.asarray(values, np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def side(role, *, modality="image", seed=0, each=CAMERAS, people=PEOPLE, noise=0.6, width=8, **changes):
    """Labels and vectors: `each` items of every person, one per camera, around the person's own direction."""
    centre = np.random.default_rng(99).normal(size=(people, width))
    rng = np.random.default_rng(seed)
    person, shot = np.repeat(np.arange(people), each), np.tile(np.arange(each), people)
    rows = pd.DataFrame(
        {
            "item_id": [f"{role}-{modality}-{p}-{s}" for p, s in zip(person, shot, strict=True)],
            "role": role,
            "modality": modality,
            "condition": "standard",
            "dataset": "toy",
            "split": "test",
            "person_id": [f"toy:{p}" for p in person],
            "camera_id": [None if modality == "text" else f"c{s}" for s in shot],
        }
    )
    return rows.assign(**changes), unit(centre[person] + noise * rng.normal(size=(len(person), width)))


def save(path, *sides, facts=None):
    rows = pd.concat([rows for rows, _ in sides], ignore_index=True)
    tables.write_table(
        path, "embeddings", rows, matrices={"embedding": np.concatenate([v for _, v in sides])}, facts=facts
    )
    return path


def foreign(path, rows, vectors):
    """Written as users of pandas do: no footer of ours, lists of doubles, columns of our schema or more."""
    rows.assign(embedding=[list(map(float, row)) for row in vectors]).to_parquet(path)
    return path


@pytest.fixture
def query():
    return side("query", seed=1, each=1)


@pytest.fixture
def gallery():
    return side("gallery", seed=2)


def values(record, key, condition="standard"):
    return {name: found[0] for name, found in record["tables"][key]["rows"][condition].items()}


def slow_metrics(query, gallery, *, same_camera):
    """Rank-1 and mAP by sorting and counting, for scores without ties."""
    (asked, q), (among, g) = query, gallery
    first, ap = [], []
    for i in range(len(asked)):
        mine = (among["person_id"] == asked["person_id"][i]).to_numpy()
        drop = mine & (among["camera_id"] == asked["camera_id"][i]).to_numpy() & same_camera
        order = np.argsort(-(g.astype(np.float64) @ q[i].astype(np.float64)))
        right = mine[order][~drop[order]]
        if right.any():
            first.append(right[0])
            ap.append(np.mean(np.cumsum(right)[right] / (np.flatnonzero(right) + 1)))
    return np.mean(first), np.mean(ap), len(first)


def test_image_queries_are_measured_by_markets_rule_in_one_file_or_two(tmp_path, query, gallery):
    together = save(tmp_path / "all.parquet", query, gallery)
    apart = [save(tmp_path / "q.parquet", query), save(tmp_path / "g.parquet", gallery)]
    first = embeddings.run(Run(tmp_path / "one"), [together], device="cpu")
    second = embeddings.run(Run(tmp_path / "two"), apart, device="cpu")
    rank1, mean_ap, scored = slow_metrics(query, gallery, same_camera=True)
    found = values(first, "i2i:toy")
    assert found["rank1"] == pytest.approx(rank1) and found["mAP"] == pytest.approx(mean_ap)
    assert first["tables"]["i2i:toy"]["queries"] == scored
    assert first["tables"] == second["tables"] and first["metrics"] == second["metrics"]
    for name in ("metrics", "queries", "rankings", "slices"):
        pd.testing.assert_frame_equal(
            *(tables.read_table(Run(tmp_path / run).table("evaluate", name), name) for run in ("one", "two"))
        )


def test_text_queries_are_searched_without_a_camera_filter(tmp_path, gallery):
    texts = side("query", modality="text", seed=3, each=2)
    record = embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "e.parquet", gallery, texts)], device="cpu")
    rank1, mean_ap, scored = slow_metrics(texts, gallery, same_camera=False)
    assert list(record["tables"]) == ["t2i:toy"]
    assert values(record, "t2i:toy")["mAP"] == pytest.approx(mean_ap)
    assert values(record, "t2i:toy")["rank1"] == pytest.approx(rank1) and scored == 2 * PEOPLE


def test_chance_and_the_label_shuffle_stand_beside_and_missing_references_are_said(tmp_path, query, gallery):
    record = embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "e.parquet", query, gallery)], device="cpu")
    rows = record["tables"]["i2i:toy"]["rows"]
    assert set(rows) == {"standard", "chance", "shuffled"}
    assert rows["chance"]["rank1"][0] == pytest.approx(2 / 17)  # of 18 items one is dropped, two are right
    assert any("no colour histogram" in note for note in record["notes"])
    assert any("rank20 left out" in note for note in record["notes"])


def test_the_record_is_up_to_date_until_a_file_or_a_setting_changes(tmp_path, query, gallery):
    run, path = Run(tmp_path / "run"), save(tmp_path / "e.parquet", query, gallery)
    assert embeddings.run(run, [path], device="cpu")["status"] == "done"
    assert embeddings.run(run, [path], device="cpu")["status"] == "up-to-date"
    assert embeddings.run(run, [path], device="cpu", split="test")["status"] == "done"
    assert embeddings.run(run, [path], device="cpu", split="test", seed=1)["status"] == "done"
    save(path, query, (gallery[0], gallery[1][::-1]))
    assert embeddings.run(run, [path], device="cpu", split="test", seed=1)["status"] == "done"


def test_another_condition_gets_its_own_row_against_the_standard_gallery(tmp_path, query, gallery):
    blurred = side("query", seed=7, each=1, noise=3.0, condition="blur")
    run = Run(tmp_path / "run")
    record = embeddings.run(run, [save(tmp_path / "e.parquet", query, gallery, blurred)], device="cpu")
    alone = embeddings.run(
        Run(tmp_path / "alone"),
        [save(tmp_path / "b.parquet", (blurred[0].assign(condition="standard"), blurred[1]), gallery)],
        device="cpu",
    )
    assert values(record, "i2i:toy", "blur") == values(alone, "i2i:toy")
    assert record["metrics"]["i2i"]["mAP"] == values(record, "i2i:toy")["mAP"]
    assert set(tables.read_table(run.table("evaluate", "queries"), "queries")["condition"]) == {"standard", "blur"}


def test_outfits_in_the_table_give_the_cloth_changing_settings(tmp_path):
    shots = np.arange(PEOPLE * CAMERAS) % CAMERAS
    asked, q = side("query", seed=1, each=1)
    among, g = side("gallery", seed=2)
    rows = pd.concat([asked.assign(outfit_id="a", camera_id="c9"), among.assign(outfit_id=np.where(shots, "b", "a"))])
    path = foreign(tmp_path / "e.parquet", rows.reset_index(drop=True), np.concatenate([q, g]))
    record = embeddings.run(Run(tmp_path / "run"), [path], device="cpu")
    assert {"cloth-changing", "same-clothes"} <= set(record["tables"]["i2i:toy"]["rows"])
    queries = tables.read_table(Run(tmp_path / "run").table("evaluate", "queries"), "queries")
    assert queries.groupby("condition")["matches"].first().to_dict() == {
        "cloth-changing": 2,
        "same-clothes": 1,
        "standard": 3,
    }


def test_unknown_cameras_are_said_and_only_the_image_itself_is_dropped(tmp_path, query, gallery):
    nowhere = [(rows.assign(camera_id=None), vectors) for rows, vectors in (query, gallery)]
    record = embeddings.run(Run(tmp_path / "a"), [save(tmp_path / "a.parquet", *nowhere)], device="cpu")
    assert any("cameras unknown" in note for note in record["notes"])
    some = (gallery[0].assign(camera_id=[None] * 9 + list(gallery[0]["camera_id"][9:])), gallery[1])
    record = embeddings.run(Run(tmp_path / "b"), [save(tmp_path / "b.parquet", query, some)], device="cpu")
    assert any("0 of 6 queries and 9 of 18 gallery images have no camera_id" in note for note in record["notes"])


def test_one_item_on_both_sides_is_noted_and_not_searched_for_itself(tmp_path, gallery):
    asked = (gallery[0].assign(role="query"), gallery[1])
    record = embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "e.parquet", asked, gallery)], device="cpu")
    assert any("18 items are query and gallery item at once" in note for note in record["notes"])
    assert values(record, "i2i:toy")["mAP"] < 1
    rankings = tables.read_table(Run(tmp_path / "run").table("evaluate", "rankings"), "rankings")
    assert (rankings["query_id"] != rankings["gallery_id"]).all()


def test_equal_vectors_under_two_names_are_noted(tmp_path, query, gallery):
    copied = (query[0], np.concatenate([gallery[1][:1], query[1][1:]]))
    record = embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "e.parquet", copied, gallery)], device="cpu")
    assert any("1 queries have exactly the vector of a gallery image" in note for note in record["notes"])


def test_re_ranked_rows_are_named_by_their_parameters(tmp_path, query, gallery):
    path = save(tmp_path / "e.parquet", query, gallery)
    record = embeddings.run(Run(tmp_path / "run"), [path], device="cpu", rerank=["4/2/0.3"])
    assert "rerank-4/2/0.3" in record["tables"]["i2i:toy"]["rows"]
    assert any("transductive" in note for note in record["notes"])


def test_one_parameter_set_under_two_names_is_one_row_and_two_that_nearly_agree_are_two(tmp_path, query, gallery):
    path = save(tmp_path / "e.parquet", query, gallery)
    asked = ["4/2/0.3", "04/2/.3", "4/2/0.3000001"]
    record = embeddings.run(Run(tmp_path / "run"), [path], device="cpu", rerank=asked)
    rows = record["tables"]["i2i:toy"]["rows"]
    assert [name for name in rows if name.startswith("rerank-")] == ["rerank-4/2/0.3", "rerank-4/2/0.3000001"]
    metrics = tables.read_table(Run(tmp_path / "run").table("evaluate", "metrics"), "metrics")
    assert not metrics.duplicated([*metrics.columns[: metrics.columns.get_loc("value")]]).any()


def test_the_record_says_which_files_were_measured_and_what_they_say_of_their_model(tmp_path, query, gallery):
    save(tmp_path / "q.parquet", query, facts={"model": "a" * 64})
    save(tmp_path / "g.parquet", gallery)
    files = [tmp_path / "q.parquet", tmp_path / "g.parquet"]
    record = embeddings.run(Run(tmp_path / "run"), files, device="cpu")
    assert record["given"] == [
        {"path": str(path.resolve()), "sha256": digest(path), "model": model}
        for path, model in zip(files[::-1], (None, "a" * 64), strict=True)
    ]


def test_what_is_said_of_the_label_shuffle_stands_in_the_notes(tmp_path, query, gallery, monkeypatch):
    control = embeddings.control_of
    monkeypatch.setattr(embeddings, "control_of", lambda *given, **more: (control(*given, **more)[0], ["on 5 of 6"]))
    record = embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "e.parquet", query, gallery)], device="cpu")
    assert "on 5 of 6" in record["notes"] and "shuffled" in record["tables"]["i2i:toy"]["rows"]


def test_float16_features_normalised_on_request_are_said(tmp_path, query, gallery):
    path = tmp_path / "features.npz"
    long = {"query_features": 3 * query[1], "gallery_features": (7 * gallery[1]).astype(np.float16)}
    np.savez(path, query_pids=range(6), gallery_pids=np.repeat(np.arange(6), 3), **long)
    with pytest.raises(DataError, match=r"row 0 \(query0\) does not have length 1; 24 such.*--normalise"):
        embeddings.run(Run(tmp_path / "run"), [path], device="cpu")
    record = embeddings.run(Run(tmp_path / "run"), [path], device="cpu", normalise=True)
    assert any("divided by their lengths, which were 3 to 7" in note for note in record["notes"])


@pytest.mark.parametrize("saver", [np.savez, np.savez_compressed])
def test_an_archive_gives_what_the_table_gives(tmp_path, query, gallery, saver):
    texts = side("query", modality="text", seed=3, each=2)
    table = embeddings.run(Run(tmp_path / "one"), [save(tmp_path / "e.parquet", query, gallery, texts)], device="cpu")
    arrays = {
        f"{name}_{kind}": array
        for name, (rows, vectors) in {"query": query, "gallery": gallery, "text": texts}.items()
        for kind, array in {
            "features": vectors,
            "pids": rows["person_id"].str.removeprefix("toy:").astype(float).to_numpy(),
            "ids": rows["item_id"].to_numpy(str),
        }.items()
    }
    for name, (rows, _) in {"query": query, "gallery": gallery}.items():
        arrays[f"{name}_camids"] = rows["camera_id"].str[1:].astype(int).to_numpy()
    saver(tmp_path / "e.npz", dataset="toy", **arrays)
    archive = embeddings.run(Run(tmp_path / "two"), [tmp_path / "e.npz"], device="cpu")
    assert archive["tables"] == table["tables"]


def test_junk_of_an_archive_is_dropped_and_counted_and_distractors_stay(tmp_path, query, gallery):
    pids = np.repeat(np.arange(1, 7), 3)
    pids[:3], pids[3:5] = 0, -1
    np.savez(
        tmp_path / "e.npz", query_features=query[1], query_pids=np.arange(1, 7), gallery_features=gallery[1],
        gallery_pids=pids,
    )  # fmt: skip
    record = embeddings.run(Run(tmp_path / "run"), [tmp_path / "e.npz"], device="cpu")
    assert any("2 item(s) with person -1 are junk" in note for note in record["notes"])
    facts = record["tables"]["i2i:given"]
    assert facts["gallery"] == 16 and facts["skipped"] == 1


def test_junk_of_a_table_is_dropped_and_counted_whether_or_not_its_dataset_is_named(tmp_path, query, gallery):
    rows, vectors = gallery
    person = ["toy:-1", "-1", *rows["person_id"][2:-1], "other:-1"]
    path = save(tmp_path / "e.parquet", query, (rows.assign(person_id=person), vectors))
    record = embeddings.run(Run(tmp_path / "run"), [path], device="cpu")
    assert any("2 item(s) with person -1 are junk and were dropped" in note for note in record["notes"])
    assert record["tables"]["i2i:toy"]["gallery"] == 16
    kept = save(tmp_path / "k.parquet", query, (rows.assign(person_id=person)[2:], vectors[2:]))
    without = embeddings.run(Run(tmp_path / "without"), [kept], device="cpu")
    assert record["tables"] == without["tables"]


def test_people_cameras_and_outfits_may_be_numbers_as_pandas_writes_them(tmp_path, query, gallery):
    rows = pd.concat([query[0], gallery[0]], ignore_index=True)
    vectors = np.concatenate([query[1], gallery[1]])
    texts = embeddings.run(Run(tmp_path / "a"), [foreign(tmp_path / "a.parquet", rows, vectors)], device="cpu")
    numbers = rows.assign(
        person_id=rows["person_id"].str[4:].astype(float), camera_id=rows["camera_id"].str[1:].astype(int)
    )
    found = embeddings.run(Run(tmp_path / "b"), [foreign(tmp_path / "b.parquet", numbers, vectors)], device="cpu")
    assert found["tables"] == texts["tables"]


def broken(vectors, row, value):
    vectors = vectors.copy()
    vectors[row] = value
    return vectors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, v: (r, broken(v, 4, np.nan)), r"g\.parquet: row 4 \(gallery-image-1-1\) holds NaN.*; 1 such"),
        (lambda r, v: (r, broken(v, [4, 5], 0)), r"g\.parquet: row 4 \(.*\) is all zeros; 2 such"),
        (lambda r, v: (r, 2 * v), r"g\.parquet: row 0 .* does not have length 1; 18 such.*Divide every vector"),
        (lambda r, v: (r, [*v[:3], v[3][:5], *v[4:]]), r"g\.parquet: row 3 .* has another width than .*\(8\); 1 such"),
        (lambda r, v: (r, v[:, :5] / np.linalg.norm(v[:, :5], axis=1)[:, None]), r"g\.parquet holds .* width 5, .*q"),
        (lambda r, v: (r.assign(item_id=["x", "x", *r["item_id"][2:]]), v), r"row 1 \(x\) occurs twice .*; 1 such"),
        (lambda r, v: (r.assign(person_id=[None, *r["person_id"][1:]]), v), "person_id has empty.*: 1, .* row 0"),
        (lambda r, v: (r.assign(person_id=["", *r["person_id"][1:]]), v), r"row 0 .* has the person_id ``; 1 such"),
        (lambda r, v: (r.assign(role="probe"), v), "row 0 .* has the role `probe`; 18 such.*Known: query, gallery"),
        (lambda r, v: (r.assign(modality="video"), v), "has the modality `video`"),
        (lambda r, v: (r.assign(role="query"), v), "No rows with role gallery and modality image in split test"),
        (lambda r, v: (r.assign(person_id="toy:99"), v), r"nobody of the 6 people .* \(e\.g\. toy:0\).*toy:99"),
        (lambda r, v: (r.assign(camera_id="c0"), v), "every match shares the camera"),
        (lambda r, v: (r.assign(dataset="other"), v), "toy, split test: no rows with role gallery"),
        (lambda r, v: (r.assign(condition="dark"), v), r"toy, gallery: no vectors of condition standard \(found: dark"),
        (lambda r, v: (r.drop(columns="person_id"), v), r"lacks the column\(s\) person_id"),
        (lambda r, v: (r.assign(item_id=[*r["item_id"][:-1], "query-image-0-0"]), v),
         "item query-image-0-0 has person toy:0 as query and toy:5 in the gallery; 1 such"),
        (lambda r, v: (r, [["a"]] * len(r)), "not a list of float numbers"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_name(tmp_path, query, gallery, change, message):
    save(tmp_path / "q.parquet", query)
    rows, vectors = change(*gallery)
    rows.assign(embedding=[list(row) for row in vectors]).to_parquet(tmp_path / "g.parquet")
    with pytest.raises(DataError, match=message):
        embeddings.run(Run(tmp_path / "run"), [tmp_path / "q.parquet", tmp_path / "g.parquet"], device="cpu")
    assert not (tmp_path / "run").exists()


def test_files_without_queries_are_refused(tmp_path, gallery):
    with pytest.raises(DataError, match="No rows with role query in split test"):
        embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "g.parquet", gallery)], device="cpu")


def test_vectors_of_two_models_are_refused_and_an_unknown_one_is_said(tmp_path, query, gallery):
    run, files = Run(tmp_path / "run"), [tmp_path / "q.parquet", tmp_path / "g.parquet"]
    save(files[0], query, facts={"model": "a" * 64})
    save(files[1], gallery, facts={"model": "b" * 64})
    with pytest.raises(
        DataError, match=r"the queries in .*q\.parquet were embedded by model a{12}, the gallery in .* by model b{12}"
    ):
        embeddings.run(run, files, device="cpu")
    save(files[1], gallery)
    record = embeddings.run(run, files, device="cpu")
    assert any("g.parquet does not say which model" in note for note in record["notes"])
    assert record["settings"]["model"] == "a" * 64


def test_a_cutoff_beyond_the_gallery_is_refused(tmp_path, query, gallery):
    with pytest.raises(DataError, match="rank-30 needs a gallery of at least 30 images; toy test has 18"):
        embeddings.run(
            Run(tmp_path / "run"), [save(tmp_path / "e.parquet", query, gallery)], device="cpu", cutoffs=(1, 30)
        )


def test_a_condition_may_not_be_named_like_a_row_of_ours(tmp_path, query, gallery):
    named = (query[0].assign(condition="chance"), query[1])
    with pytest.raises(DataError, match="condition chance"):
        embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "e.parquet", query, gallery, named)], device="cpu")


def test_the_split_must_be_chosen_where_there_are_several(tmp_path, query, gallery):
    parts = [(rows.assign(split="val"), vectors) for rows, vectors in (query, gallery)]
    for part in parts:
        part[0]["item_id"] = "val-" + part[0]["item_id"]
    path = save(tmp_path / "e.parquet", query, gallery, *parts)
    with pytest.raises(UsageError, match="splits test, val"):
        embeddings.run(Run(tmp_path / "run"), [path], device="cpu")
    assert embeddings.run(Run(tmp_path / "run"), [path], device="cpu", split="val")["split"] == "val"
    with pytest.raises(DataError, match=r"No embeddings of split train.*test, val"):
        embeddings.run(Run(tmp_path / "run"), [path], device="cpu", split="train")


@pytest.mark.parametrize("files", [[], ["e.parquet", "e.parquet"]])
def test_no_file_or_one_twice_is_a_usage_error(tmp_path, query, gallery, files):
    save(tmp_path / "e.parquet", query, gallery)
    with pytest.raises(UsageError):
        embeddings.run(Run(tmp_path / "run"), [tmp_path / name for name in files], device="cpu")


def test_files_that_are_no_archive_or_no_table_are_refused(tmp_path):
    for name in ("e.npz", "e.parquet"):
        (tmp_path / name).write_bytes(b"nonsense")
        with pytest.raises(DataError, match=name):
            embeddings.run(Run(tmp_path / "run"), [tmp_path / name], device="cpu")
        with pytest.raises(DataError, match="gone"):
            embeddings.run(Run(tmp_path / "run"), [tmp_path / f"gone-{name}"], device="cpu")


def test_a_model_that_gives_everything_one_vector_scores_chance(tmp_path, query, gallery):
    flat = [(rows, np.tile(unit(np.ones((1, 8))), (len(rows), 1))) for rows, _ in (query, gallery)]
    record = embeddings.run(Run(tmp_path / "run"), [save(tmp_path / "e.parquet", *flat)], device="cpu")
    chance = values(record, "i2i:toy", "chance")
    found = values(record, "i2i:toy")
    assert {"rank1", "mAP", "mINP"} < set(found)
    assert found == pytest.approx({name: chance[name] for name in found})


def test_the_order_of_rows_changes_nothing(tmp_path, query, gallery):
    mixed = np.random.default_rng(5).permutation(24)
    rows, vectors = pd.concat([query[0], gallery[0]], ignore_index=True), np.concatenate([query[1], gallery[1]])
    first = embeddings.run(Run(tmp_path / "a"), [save(tmp_path / "a.parquet", (rows, vectors))], device="cpu")
    shuffled = (rows.iloc[mixed].reset_index(drop=True), vectors[mixed])
    second = embeddings.run(Run(tmp_path / "b"), [save(tmp_path / "b.parquet", shuffled)], device="cpu")
    assert first["tables"] == second["tables"] and first["notes"] == second["notes"]


@pytest.fixture
def indexed(tmp_path, monkeypatch):
    """A run whose index was made by a model that gives every image its own direction."""
    run = Run(tmp_path / "indexed")
    make_data(run.stage_dir("data"), people=3)
    finish(run, "data")
    backbone = SimpleNamespace(image_size=(64, 32), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))
    for module in (index, search):
        monkeypatch.setattr(module, "model_digest", lambda run: "a" * 64)
    method = SimpleNamespace(backbone=backbone, tasks=("t2i",))
    monkeypatch.setattr(index, "load_method", lambda folder, device: method)
    monkeypatch.setattr(
        index, "embed_gallery_tasks", lambda method, corpus, **_: {"t2i": np.eye(len(corpus.images), dtype=np.float32)}
    )
    index.run(run, device="cpu")
    return run


def test_an_index_says_in_its_footer_which_model_made_it_and_how(indexed):
    footer = tables.footer(indexed.table("index", "embeddings"))
    assert footer["model"] == "a" * 64 and footer["split"] == "test"
    assert footer["preprocessing"] == {"image_size": [64, 32], "mean": [0.5] * 3, "std": [0.2] * 3}


def test_an_index_can_be_measured_without_its_model(tmp_path, indexed):
    record = embeddings.run(Run(tmp_path / "run"), [indexed.table("index", "embeddings")], device="cpu")
    assert record["settings"]["model"] == "a" * 64
    # Orthogonal vectors are all tied: what is measured is chance.
    chance = values(record, "i2i:synthped", "chance")
    assert values(record, "i2i:synthped") == pytest.approx({name: chance[name] for name in chance})


def test_search_refuses_an_index_whose_footer_names_another_model_and_takes_one_without(indexed):
    path = indexed.table("index", "embeddings")
    table = read_embeddings(path)
    write_embeddings(path, table, facts={"model": "b" * 64})
    with pytest.raises(DataError, match="another model than the run's"):
        search.run(indexed, text="a red shirt", device="cpu")
    write_embeddings(path, table)
    with pytest.raises(DataError, match="holds no trained model"):  # past the check
        search.run(indexed, text="a red shirt", device="cpu")


@pytest.mark.parametrize("archive", [False, True])
def test_sides_that_lie_together_in_their_files_are_not_copied(tmp_path, query, gallery, archive):
    files = [save(tmp_path / "q.parquet", query), save(tmp_path / "g.parquet", gallery)]
    if archive:
        pids = {"query_pids": np.arange(6), "gallery_pids": np.repeat(np.arange(6), 3)}
        np.savez(tmp_path / "e.npz", query_features=query[1], gallery_features=gallery[1], **pids)
        files = [tmp_path / "e.npz"]
    table = read_given(files).table
    (protocol,), _ = protocols_of(table, split="test")
    for part, whole in ((protocol.query, query), (protocol.gallery, gallery)):
        assert np.shares_memory(part.vectors, table.vectors)
        assert part.vectors.tobytes() == whole[1].tobytes()
