"""Part phrases of a batch as tensors: each phrase once, which text has it, and where it stands among the tokens."""

import pytest
import torch

from reidctl.backbones.tokenizers import ClipTokenizer, WordPieceTokenizer
from reidctl.batch import Batch, Tokens
from reidctl.phrases.base import PARTS, Phrase
from reidctl.phrases.sets import PhraseTable, token_span

COAT = "A man in a red coat and black trousers."
BAG = "Black trousers, a red coat, and a long blue bag."
NOTHING = "Walks by."
FOUND = {
    COAT: [Phrase("red coat", 11, 19, "upper"), Phrase("black trousers", 24, 38, "lower")],
    BAG: [
        Phrase("Black trousers", 0, 14, "lower"), Phrase("red coat", 18, 26, "upper"),
        Phrase("long blue bag", 34, 47, "carried"),
    ],
    NOTHING: [],
}  # fmt: skip
WORDS = ["", "a", "person", "with", "red", "coat", "black", "trousers", "long", "blue", "bag", "walks", "by."]


def source(texts):
    return [FOUND[text] for text in texts]


def tokenize(texts):
    """One number per word, 0 behind the end."""
    rows = [[WORDS.index(word) for word in text.lower().split()] for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    return Tokens(ids, ids > 0)


def sentence(phrase):
    return f"a person with {phrase}"


def offsets(text):
    """Words with their places, behind a start token."""
    places, end = [(0, 0)], 0
    for word in text.split():
        start = text.index(word, end)
        end = start + len(word)
        places.append((start, end))
    return places


def said(sets, row):
    """The phrases of a text, read from its tokens."""
    words = []
    for number in sets.index[row].tolist():
        if number >= 0:
            ids, mask = sets.tokens.ids[number], sets.tokens.mask[number]
            words.append(" ".join(WORDS[place] for place in ids[mask].tolist()))
    return words


def test_the_fixture_is_what_it_says():
    assert all(text[p.start : p.end] == p.text for text, phrases in FOUND.items() for p in phrases)


@pytest.mark.covers(174)
def test_each_different_phrase_is_held_once_whatever_its_capitals_and_every_text_finds_its_own():
    sets = PhraseTable([COAT, BAG, COAT], source, tokenize, sentence).sets([COAT, BAG, COAT])
    assert len(sets) == 3 and len(sets.tokens) == 3
    assert said(sets, 0) == said(sets, 2) == ["a person with red coat", "a person with black trousers"]
    assert said(sets, 1) == ["a person with black trousers", "a person with red coat", "a person with long blue bag"]
    assert sets.index[0].tolist()[:2] == sets.index[1].tolist()[1::-1]
    assert sets.index.shape == (3, 3) and sets.index[0, 2] == -1
    assert sets.mask.tolist() == [[True, True, False], [True] * 3, [True, True, False]]
    parts = [[PARTS[number] if number >= 0 else "" for number in row] for row in sets.part.tolist()]
    assert parts == [["upper", "lower", ""], ["lower", "upper", "carried"], ["upper", "lower", ""]]
    assert sets.index.dtype == sets.part.dtype == sets.span.dtype == torch.int64


def test_a_text_in_which_nothing_is_named_is_its_own_phrase():
    table = PhraseTable([NOTHING, COAT], source, tokenize, str)
    assert table.phrases[NOTHING] == [Phrase(NOTHING, 0, len(NOTHING), "whole")]
    sets = table.sets([NOTHING])
    assert said(sets, 0) == ["walks by."] and PARTS[sets.part[0, 0]] == "whole" and sets.index.tolist() == [[0]]


def test_a_batch_holds_the_phrases_that_it_needs_trimmed_to_the_longest_of_them():
    table = PhraseTable(list(FOUND), source, tokenize, sentence)
    small = table.sets([COAT, NOTHING])
    assert small.tokens.ids.shape == (3, 5), "red coat, black trousers, walks by.: five words each"
    assert small.index[1].tolist()[1:] == [-1]
    large = table.sets([BAG])
    assert large.tokens.ids.shape == (3, 6)
    assert large.tokens.mask.sum(dim=1).max() == 6
    assert said(table.sets([COAT]), 0) == said(table.sets([BAG, COAT]), 1)


def test_a_source_is_asked_once_for_each_different_text():
    asked = []

    def watched(texts):
        asked.append(list(texts))
        return source(texts)

    table = PhraseTable([COAT, BAG, COAT], watched, tokenize, sentence)
    table.sets([COAT])
    table.sets([BAG, COAT])
    assert asked == [[COAT, BAG]]


@pytest.mark.parametrize(
    ("start", "end", "span"),
    [
        (11, 19, (5, 7)),  # red coat
        (24, 38, (8, 10)),  # black trousers; "trousers." ends behind the phrase
        (12, 13, (5, 6)),  # inside a word
        (10, 11, (0, 0)),  # a space
        (0, 0, (0, 0)), (90, 99, (0, 0)),
    ],
)  # fmt: skip
def test_a_span_holds_the_tokens_that_share_a_character_with_the_phrase(start, end, span):
    assert token_span(offsets(COAT), start, end) == span


def test_places_are_given_only_where_somebody_asks_and_zero_where_there_is_no_phrase():
    without = PhraseTable([COAT, BAG], source, tokenize, sentence).sets([COAT, BAG])
    assert without.span.abs().max() == 0
    sets = PhraseTable([COAT, BAG], source, tokenize, sentence, offsets).sets([COAT, BAG])
    assert sets.span[0].tolist() == [[5, 7], [8, 10], [0, 0]]
    assert sets.span[1].tolist() == [[1, 3], [4, 6], [8, 11]]


@pytest.mark.parametrize("made", [ClipTokenizer(32), WordPieceTokenizer(32)], ids=["clip", "wordpiece"])
def test_the_tokens_in_a_span_are_the_words_of_the_phrase(made):
    """Between start and end token the span's ids are those of the phrase alone."""
    sets = PhraseTable([COAT, BAG], source, made, sentence, made.offsets).sets([COAT, BAG])
    ids = made([COAT, BAG]).ids
    for row, text in enumerate((COAT, BAG)):
        for place, phrase in enumerate(FOUND[text]):
            start, end = sets.span[row, place].tolist()
            alone = made([phrase.text])
            assert ids[row, start:end].tolist() == alone.ids[0, alone.mask[0]].tolist()[1:-1]


def test_a_phrase_behind_the_end_of_what_the_encoder_reads_has_no_place():
    short = ClipTokenizer(8)
    sets = PhraseTable([COAT], source, short, sentence, short.offsets).sets([COAT])
    assert sets.span[0, 0].tolist() == [5, 7] and sets.span[0, 1].tolist() == [0, 0]
    assert sets.mask.all()


def test_a_batch_carries_its_phrases_to_a_device_and_its_pairs_keep_them():
    sets = PhraseTable([COAT, BAG], source, tokenize, sentence).sets([COAT, BAG])
    batch = Batch(
        image=torch.zeros(3, 3, 2, 2), texts={"full": tokenize(["red", "blue"])}, phrases=sets,
        has_text=torch.tensor([True, False, True]),
    )  # fmt: skip
    moved = batch.to("meta").phrases
    assert moved.index.device.type == moved.tokens.ids.device.type == moved.span.device.type == "meta"
    assert moved.part.shape == sets.part.shape
    assert batch.pairs().phrases is sets and len(batch.pairs()) == len(sets)


def test_no_texts_have_no_phrases():
    table = PhraseTable([COAT], source, tokenize, sentence)
    sets = table.sets([])
    assert len(sets) == 0 and len(sets.tokens) == 0 and sets.index.shape[0] == 0
    empty = PhraseTable([], source, tokenize, sentence).sets([])
    assert len(empty) == 0
