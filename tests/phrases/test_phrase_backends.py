"""Phrases from the dataset, from spaCy, from files; and the settings that choose between them."""

import json
import sys
import types

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reidctl.config import parse_section
from reidctl.errors import DataError, UsageError
from reidctl.phrases import backends
from reidctl.phrases.backends import file_source, given_source, spacy_source
from reidctl.phrases.base import Phrase, PhraseConfig
from reidctl.phrases.cache import cached
from reidctl.phrases.reading import Missing, read_phrases
from reidctl.phrases.rules import extract
from reidctl.stages.phrases import phrase_source
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.dataset import write_dataset
from reidctl.tables import read_table


@pytest.mark.covers(172)
def test_the_default_backend_is_offline_and_gives_what_the_rules_find():
    find = phrase_source(PhraseConfig(), cache=None)
    assert find(["A red shirt and blue jeans.", ""]) == [extract("A red shirt and blue jeans."), []]
    assert len(phrase_source(PhraseConfig(limit=1), cache=None)(["red hat, blue shoes"])[0]) == 1


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth")
    write_dataset(SynthConfig(people=5, images_per_person=2, size=(64, 32), carry=1.0), out, workers=1)
    return read_table(out / "captions.parquet", "captions")


def test_given_phrases_keep_their_places_and_get_our_parts(given, caplog):
    full = given[given["kind"] == "full"]
    spans = given[given["kind"] == "phrase"]
    find = phrase_source(PhraseConfig(backend="given", limit=32), cache=None, captions=given)
    ours = {"person": "whole", "shoes": "feet", "hair": "head", "face": "head", "hat": "head"}
    for caption, phrases in zip(full.itertuples(), find(full["text"].tolist()), strict=True):
        rows = spans[spans["parent_id"] == caption.caption_id].sort_values("char_start")
        assert [(p.start, p.end) for p in phrases] == list(zip(rows["char_start"], rows["char_end"], strict=True))
        assert [p.text for p in phrases] == rows["text"].tolist()
        names = [str(name).rsplit("-", 1)[-1] for name in rows["caption_id"]]
        carried = ("bag", "umbrella", "phone")
        assert [p.part for p in phrases] == ["carried" if n in carried else ours.get(n, n) for n in names]
    assert not caplog.records


def test_texts_without_given_phrases_get_those_of_the_rules_and_are_counted(given, caplog):
    find = given_source(given, 8)
    assert find(["a red hat"]) == [extract("a red hat")]
    assert "1 caption(s) so far have no given phrases" in caplog.text


def rows(**changes):
    base = {"caption_id": "a-t0-p0-torso", "text": "RED hat", "parent_id": "a-t0", "char_start": None, "char_end": None}
    full = {"caption_id": "a-t0", "text": "a red hat", "kind": "full", "status": "ok"}
    return pd.DataFrame([full, {**base, "kind": "phrase", "status": "ok", **changes}])


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({}, Phrase("red hat", 2, 9, "head")),
        ({"char_start": 0.0, "char_end": 9.0, "text": "a red hat"}, Phrase("a red hat", 0, 9, "head")),
        ({"char_start": 5, "char_end": 900}, Phrase("red hat", 2, 9, "head")),
        ({"text": "green wug"}, Phrase("green wug", 0, 0, "whole")),
        ({"caption_id": "a-t0-p0-feet"}, Phrase("red hat", 2, 9, "feet")),
    ],
)
def test_a_given_phrase_without_a_right_place_is_looked_for(changes, phrase):
    assert given_source(rows(**changes), 8)(["a red hat"]) == [[phrase]]


def test_given_phrases_that_were_refused_do_not_count():
    assert given_source(rows(status="rejected", caption_id="x-feet"), 8)(["a red hat"]) == [extract("a red hat")]


def test_given_needs_a_table():
    with pytest.raises(UsageError, match="captions table"):
        phrase_source(PhraseConfig(backend="given"), cache=None)


TEXT = "A man in a Red shirt and black shoes."
FOUND = [Phrase("Red shirt", 11, 20, "upper"), Phrase("black shoes", 25, 36, "feet")]


def write(folder, name, value):
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(value), path)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


ROW = {"caption": TEXT, "phrases": ["black shoes", "red shirt", "Black shoes"]}


@pytest.mark.covers(172)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("p.json", {TEXT: ["black shoes", "red shirt"]}),
        ("p.json", [ROW]),
        ("p.json", {TEXT: [{"text": "black shoes", "start": 25, "end": 36}, {"phrase": "red shirt", "part": "upper"}]}),
        ("p.jsonl", json.dumps(ROW) + "\n\n"),
        ("p.ndjson", "\ufeff" + json.dumps(ROW)),
        ("p.parquet", [ROW]),
        ("p.parquet", [{"caption": TEXT, "phrases": [{"text": "red shirt", "part": None}, {"text": "black shoes"}]}]),
    ],
)
def test_a_file_of_phrases_is_read_in_every_form(tmp_path, name, value):
    config = PhraseConfig(backend="file", file=write(tmp_path, name, value))
    assert phrase_source(config, cache=tmp_path / "unused")([TEXT]) == [FOUND]
    assert not (tmp_path / "unused").exists()


@pytest.mark.covers(172)
def test_the_cache_of_any_backend_is_a_file_of_phrases(tmp_path):
    cached(lambda texts: [FOUND for _ in texts], tmp_path / "cache.jsonl", "llm x")([TEXT])
    assert file_source(tmp_path / "cache.jsonl", 8)([TEXT]) == [FOUND]


def test_captions_that_a_file_lacks_get_the_rules_and_are_counted(tmp_path, caplog):
    find = file_source(write(tmp_path, "p.json", {TEXT: []}), 8)
    assert find([TEXT, "a green hat", "a red hat"]) == [[], extract("a green hat"), extract("a red hat")]
    assert "2 caption(s) so far are not in p.json" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("p.json", "{", "not valid JSON"),
        ("p.json", "[" * 100_000, "not valid JSON"),
        ("p.json", "3", "neither an object nor a list"),
        ("p.json", {TEXT: "red shirt"}, "no list"),
        ("p.json", {TEXT: [3]}, "no text"),
        ("p.json", [{"caption": TEXT}], "lacks"),
        ("p.json", [{"caption": 3, "phrases": []}], "no text"),
        ("p.jsonl", json.dumps(ROW) + "\n{\n", "line 2 is not valid JSON"),
        ("p.parquet", [{"caption": TEXT}], "lacks"),
    ],
)
def test_a_wrong_file_is_a_data_error_that_names_it(tmp_path, name, value, problem):
    path = write(tmp_path, name, value)
    with pytest.raises(DataError, match=problem) as caught:
        file_source(path, 8)
    assert str(path) in str(caught.value)


def test_a_missing_or_unreadable_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="No file"):
        file_source(tmp_path / "none.json", 8)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="not a readable Parquet"):
        file_source(tmp_path / "p.parquet", 8)
    (tmp_path / "p.json").write_bytes(b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        file_source(tmp_path / "p.json", 8)


def test_what_a_stranger_lists_is_cleaned_ordered_and_bounded():
    values = ["black  shoes", "a\x1b[31mghost\n", "", " - ", "red shirt", "RED SHIRT", "y" * 5000]
    phrases = read_phrases(values, TEXT, 8)
    assert phrases[:2] == FOUND and phrases[2] == Phrase("a [31mghost", 0, 0, "whole")
    assert [len(phrase.text) for phrase in phrases[3:]] == [200]
    assert read_phrases(values, TEXT, 1) == FOUND[:1]
    assert read_phrases(["shirt"], "a sweatshirt", 8) == [Phrase("shirt", 0, 0, "upper")]


def test_warnings_about_missing_answers_become_rare(caplog):
    missing = Missing("are gone")
    for _ in range(100):
        missing.add(1)
    assert missing.count == 100 and len(caplog.records) == 7  # at 1, 2, 4, ..., 64


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"file": "p.json"}, "`phrases.file`: only backend=file reads it"),
        ({"backend": "file"}, "`phrases.file`: backend=file needs it"),
        ({"backend": "command"}, "`phrases.command`: backend=command needs it"),
        ({"backend": "command", "command": ""}, "`phrases.command`: backend=command needs it"),
        ({"backend": "spacy", "model": "gpt-4"}, "`phrases.model`: only backend=llm reads it"),
        ({"backend": "llm"}, "`phrases.model`: backend=llm needs it"),
        ({"backend": "llm", "model": "m", "base_url": "ftp://x"}, "`phrases.base_url`: an address starts with"),
        ({"backend": "llm", "model": "m", "base_url": "http://me:s3cret@x/v1"}, "a key belongs into the environment"),
        ({"backend": "llm", "model": "m", "prompt": "list"}, "no place for the caption"),
        ({"limit": 0}, "phrases.limit"),
        ({"limit": 33}, "phrases.limit"),
        ({"backend": "magic"}, "phrases.backend"),
        ({"bakend": "rules"}, "Did you mean `backend`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words):
    with pytest.raises(UsageError) as caught:
        parse_section(PhraseConfig, settings, "phrases")
    assert words in str(caught.value) and "s3cret" not in str(caught.value)


class Word:
    def __init__(self, text, idx, pos):
        self.text, self.idx, self.pos_ = text, idx, pos


class Chunk(list):
    def __init__(self, doc, words):
        super().__init__(words)
        self.doc, self.root = doc, words[-1]


def fake_spacy(monkeypatch, chunks):
    """A library whose documents have these chunks: lists of (word, part of speech)."""

    def document(text):
        doc, place = types.SimpleNamespace(text=text), 0
        doc.noun_chunks = []
        for chunk in chunks:
            words = []
            for word, pos in chunk:
                place = text.index(word, place)
                words.append(Word(word, place, pos))
            doc.noun_chunks.append(Chunk(doc, words))
        return doc

    def load(name, exclude):
        if name != "small":
            raise OSError("Can't find model")
        return types.SimpleNamespace(pipe=lambda texts, batch_size: map(document, texts), meta={"version": "3"})

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load, __version__="3.8"))


@pytest.mark.covers(172)
def test_noun_chunks_lose_determiners_and_pronouns_and_people_are_left_out(monkeypatch, tmp_path):
    chunks = [
        [("He", "PRON")],
        [("The", "DET"), ("man", "NOUN")],
        [("his", "PRON"), ("dark", "ADJ"), ("blue", "ADJ"), ("jeans", "NOUN")],
        [("a", "DET"), ("serape", "NOUN")],
        [("his", "PRON"), ("shoulders", "NOUN")],
    ]
    fake_spacy(monkeypatch, chunks)
    text = "He is The man in his dark blue jeans and a serape on his shoulders."
    config = PhraseConfig(backend="spacy", spacy_model="small")
    path = tmp_path / "cache.jsonl"
    found = [[Phrase("dark blue jeans", 21, 36, "lower"), Phrase("serape", 43, 49, "whole")]]
    assert phrase_source(config, cache=path)([text]) == found
    fake_spacy(monkeypatch, [])
    assert phrase_source(config, cache=path)([text]) == found, "the second run reads what the first one stored"
    assert phrase_source(config.replace(limit=1), cache=path)([text]) == [[]], "another limit is another question"


def test_a_missing_library_or_model_says_how_to_install_it(monkeypatch):
    fake_spacy(monkeypatch, [])
    with pytest.raises(UsageError, match="no spaCy model") as caught:
        spacy_source("en_core_web_xl", 8)
    assert "spacy download en_core_web_xl" in caught.value.hint

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(backends, "import_module", missing)
    with pytest.raises(UsageError, match="not installed") as caught:
        spacy_source("small", 8)
    assert "pip install spacy" in caught.value.hint
