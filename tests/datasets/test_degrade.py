"""Degraded captions: what each kind does, and what the levels of one kind have to do with each other."""

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reidctl.datasets.degrade import KINDS, degrade, word_order, word_overlap, words_of
from reidctl.errors import UsageError

CAPTION = "A young man walks to the left. He wears a red, knitted jumper and black trousers, and he carries a bag."
LEVELS = [0, 0.1, 0.25, 0.4, 0.6, 0.8, 1]
WORDS = ["a", "man", "Man,", "bag.", "red", "the", "then", "act", "cat", "is", "(tall)", "–", "I"]
CAPTIONS = st.lists(st.sampled_from(WORDS), max_size=25).map(" ".join)
TEXTS = st.one_of(CAPTIONS, st.text(max_size=60))


def curve(kind, measure, text=CAPTION, seed=0, key="k"):
    return [measure(text, degrade(text, kind, level, seed=seed, key=key)) for level in LEVELS]


@pytest.mark.covers(22)
@given(text=TEXTS, seed=st.integers(0, 5))
@pytest.mark.parametrize("kind", ["drop", "shorten", "typo"])
def test_overlap_with_the_original_never_rises_with_the_level(kind, text, seed):
    found = curve(kind, word_overlap, text, seed)
    assert found[0] == 1 and found == sorted(found, reverse=True)


@pytest.mark.covers(22)
@given(text=CAPTIONS, seed=st.integers(0, 5))
def test_a_shuffle_keeps_all_words_and_loses_order_with_the_level(text, seed):
    found = curve("shuffle", word_order, text, seed)
    assert found[0] == 1 and all(low <= high + 1e-12 for high, low in pairwise(found))
    assert set(curve("shuffle", word_overlap, text, seed)) == {1}


@pytest.mark.covers(22)
def test_the_shares_follow_the_level_over_many_captions():
    def mean(kind, level, measure, caption=CAPTION):
        texts = (degrade(caption, kind, level, seed=1, key=str(i)) for i in range(400))
        return sum(measure(caption, text) for text in texts) / 400

    # 21 words; `a` (three times) is the only word of one letter, so 18 of 21 can be mistyped.
    assert mean("drop", 0.3, word_overlap) == pytest.approx(0.7, abs=0.02)
    assert mean("typo", 0.3, word_overlap) == pytest.approx(1 - 0.3 * 18 / 21, abs=0.02)
    # 21 - floor(0.3 * 21) = 15
    assert mean("shorten", 0.3, word_overlap) == pytest.approx(15 / 21)
    assert mean("shuffle", 1, word_order, " ".join(f"w{i}" for i in range(20))) == pytest.approx(0.5, abs=0.02)


@given(text=TEXTS, kind=st.sampled_from(KINDS), level=st.floats(0, 1), seed=st.integers(0, 3))
def test_a_word_always_stays_and_a_repeat_gives_the_same_text(text, kind, level, seed):
    made = degrade(text, kind, level, seed=seed, key="x")
    assert bool(words_of(made)) == bool(words_of(text))
    assert made == degrade(text, kind, level, seed=seed, key="x")


def test_what_a_low_level_changes_a_high_level_changes_too():
    for key in map(str, range(50)):
        low, high = (degrade(CAPTION, "typo", level, seed=0, key=key).split() for level in (0.2, 0.4))
        assert all(b == a for a, b, word in zip(low, high, CAPTION.split(), strict=True) if a != word)
        low, high = (words_of(degrade(CAPTION, "drop", level, seed=0, key=key)) for level in (0.2, 0.4))
        rest = iter(low)
        assert all(word in rest for word in high), "the words kept at 0.4 are among those kept at 0.2"


@pytest.mark.parametrize("kind", KINDS)
def test_level_zero_returns_the_very_text(kind):
    assert degrade("  Two   spaces. ", kind, 0, seed=0, key="k") == "  Two   spaces. "


@pytest.mark.parametrize("kind", ["drop", "typo", "shuffle"])
def test_captions_seeds_and_kinds_are_independent_of_each_other(kind):
    assert len({degrade(CAPTION, kind, 0.5, seed=seed, key=key) for seed in (0, 1) for key in "ab"}) == 4


def test_shorten_keeps_the_first_words_and_ends_the_sentence():
    assert degrade("A man, tall, in red.", "shorten", 0.4, seed=0, key="k") == "A man, tall."
    # 3 - floor(0.6 * 3) = 2 and 10 - floor(0.7 * 10) = 3: no word hangs on binary fractions
    assert degrade("one two three", "shorten", 0.6, seed=0, key="k") == "one two"
    assert len(degrade("a b c d e f g h i j", "shorten", 0.7, seed=0, key="k").split()) == 3
    assert degrade("One two.", "shorten", 1, seed=9, key="k") == "One."


def test_dropping_leaves_sentences_with_a_capital_and_one_mark():
    for key in map(str, range(200)):
        made = degrade(CAPTION, "drop", 0.5, seed=0, key=key)
        assert made[0].isupper() and made.endswith(".") and ".." not in made and ",." not in made
        assert all(sentence.strip()[0].isupper() for sentence in made.split(".") if sentence.strip())


def test_a_shuffle_leaves_punctuation_and_capitals_in_place():
    made = degrade(CAPTION, "shuffle", 1, seed=0, key="k")
    assert [i for i, c in enumerate(made.split()) if c[-1] in ".,"] == [
        i for i, c in enumerate(CAPTION.split()) if c[-1] in ".,"
    ]
    assert [i for i, c in enumerate(made.split()) if c[0].isupper()] == [0, 7]
    assert degrade("I am here.", "shuffle", 1, seed=1, key="k").count("I") == 1


def test_a_low_shuffle_is_local_and_a_high_one_global():
    words = [f"w{i}" for i in range(40)]

    def farthest(level):
        made = degrade(" ".join(words), "shuffle", level, seed=0, key="k").split()
        return max(abs(place - words.index(word)) for place, word in enumerate(made))

    # A goal moves a word by at most level / (1 - level) of the text before others give way: 0.1 / 0.9 * 40 < 5.
    assert 0 < farthest(0.1) <= 5 < farthest(1)


def test_a_typo_is_one_error_and_keeps_capitals_digits_and_marks():
    rng = random.Random(0)
    for number in range(300):
        word = rng.choice(["Trousers,", "left", "T-shirt", "No2"])
        made = degrade(f"{word} 17", "typo", 1, seed=number, key="k").split()
        assert made[1] == "17" and made[0][-1:] == (word[-1] if not word[-1].isalpha() else made[0][-1:])
        assert made[0] != word and abs(len(made[0]) - len(word)) <= 1
        assert made[0][0].isupper() == word[0].isupper()


def test_words_in_letters_without_a_neighbouring_key_are_mistyped_too():
    assert degrade("мужчина", "typo", 1, seed=0, key="k") != "мужчина"


def test_what_cannot_be_changed_is_returned_as_it_is():
    for text in ("", "   ", "...", "一个穿红色衣服的男人", "bag"):
        for kind in ("drop", "shorten", "shuffle"):
            assert degrade(text, kind, 1, seed=0, key="k") == text
    assert degrade("a 7 .", "typo", 1, seed=0, key="k") == "a 7 ."


def test_overlap_and_order_by_hand():
    assert word_overlap("a red bag, a hat", "A hat a a") == 3 / 5
    assert word_overlap("", "") == 1 and word_overlap("bag", "") == 0
    # kept: man(1) a(0) bag(3): pairs 1>0 reversed, 1<3, 0<3
    assert word_order("a man with bag", "man a bag") == pytest.approx(2 / 3)
    assert word_order("one two three", "three two one") == 0 and word_order("one", "one") == 1


@pytest.mark.parametrize("kind, level", [("swap", 0.1), ("drop", 1.1), ("drop", -0.1), ("drop", float("nan"))])
def test_an_unknown_kind_or_level_is_refused(kind, level):
    with pytest.raises(UsageError):
        degrade("a man", kind, level, seed=0, key="k")
