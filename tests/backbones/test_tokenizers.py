"""Offsets, caches and the shipped vocabulary."""

import string

import pytest

from reidctl.backbones.tokenizers import ClipTokenizer, WordPieceTokenizer, shipped_vocabulary
from reidctl.errors import DataError


@pytest.fixture(params=[ClipTokenizer, WordPieceTokenizer])
def tokenizer(request):
    return request.param(32)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hat",
        "  Two\tRED hats!!  ",
        "don't; 3/4-length (dark-blue)",
        "unquestionably discombobulated",
        "caf\u00e9 na\u00efve",
    ],
)
def test_offsets_are_ordered_inside_the_text_and_one_per_token(tokenizer, text):
    spans = tokenizer.offsets(text)
    assert len(spans) == int(tokenizer([text]).mask.sum())
    assert all(0 <= start <= end <= len(text) for start, end in spans)
    starts = [start for start, _ in spans]
    assert starts == sorted(starts)
    covered = {index for start, end in spans for index in range(start, end)}
    assert covered == {index for index, letter in enumerate(text) if not letter.isspace()}


def test_offsets_survive_letters_that_change_length_in_lower_case(tokenizer):
    text = "\u0130stanbul red coat"  # the dotted capital I becomes two characters
    start, end = tokenizer.offsets(text)[-2]
    assert text[start:end] == "coat"


def test_clip_offsets_survive_entities_and_letters_of_several_bytes():
    text = "Tom &amp; Jerry \u4eba\u4eba coat"
    spans = ClipTokenizer().offsets(text)
    assert text[slice(*spans[-2])] == "coat"
    assert spans[2] == (4, 5)  # the "&" of the entity
    assert text[slice(*spans[3])] == "Jerry"
    quoted = "a &lt;hat&gt; here"
    assert [quoted[slice(*span)] for span in ClipTokenizer().offsets(quoted)] == ["", "a", "", "hat", "", "here", ""]


def test_a_phrase_can_be_found_among_the_tokens(tokenizer):
    text = "a woman with a dark red handbag walks"
    begin = text.index("dark red handbag")
    end = begin + len("dark red handbag")
    inside = [span for span in tokenizer.offsets(text) if span[0] >= begin and span[1] <= end and span[1] > span[0]]
    assert inside[0][0] == begin
    assert inside[-1][1] == end


def test_the_shipped_vocabulary_has_no_doubles_and_knows_every_printable_letter():
    pieces = shipped_vocabulary()
    assert len(pieces) == len(set(pieces))
    assert pieces[:5] == ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    unknown = WordPieceTokenizer(500)
    for letter in string.printable:
        if letter.strip():
            assert pieces.index("[UNK]") not in unknown.encode(letter)
            assert not letter.isalnum() or pieces.index("[UNK]") not in unknown.encode("a" + letter + "q")


def test_common_words_of_captions_are_single_pieces():
    tokenizer = WordPieceTokenizer(64)
    caption = "a man and a woman wearing red striped t shirt blue jeans carrying backpack left shoulder white sneakers"
    assert len(tokenizer.encode(caption)) == len(caption.split())


def test_a_vocabulary_without_special_tokens_is_refused():
    with pytest.raises(DataError, match=r"has no \[CLS\]"):
        WordPieceTokenizer(8, vocabulary=["[PAD]", "[UNK]", "[SEP]", "a"])
