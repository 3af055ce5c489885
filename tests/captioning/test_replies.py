"""The checks against a labelled corpus: which replies are accepted, refused, repaired, and with which code.

Every test compares lists of sentences, so that a regression names the sentence.
"""

import pytest
import replies

from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.form import Form
from reidctl.captioning.prompts import build_prompt
from reidctl.captioning.validation import CODES, Verdict, check_reply

CONFIGS = {
    "hair": CaptionConfig(hair="identity"),
    "sensitive": CaptionConfig(sensitive=True),
    "drop": CaptionConfig(hair="drop"),
}
FORMS = {"notes": Form(fragments=True), "lower": Form(lower=True), "label": Form(opening="label")}


def check(kind: str, text: str, option: str = "", form: Form | None = None) -> Verdict:
    config = CONFIGS.get(option, CaptionConfig())
    prompt = build_prompt(kind, "", config, model="m").text
    return check_reply(text, kind, config, prompt=prompt, form=form or FORMS.get(option))


def refused(rows: list[tuple[str, str]], **options: object) -> list[tuple[str, tuple[str, ...]]]:
    verdicts = ((text, check(kind, text, **options)) for kind, text in rows)  # type: ignore[arg-type]
    return [(text, verdict.reasons) for text, verdict in verdicts if not verdict.ok]


def test_the_corpus_is_large_and_says_nothing_twice() -> None:
    good = [text for texts in replies.GOOD.values() for text in texts] + [text for _, _, text in replies.GOOD_WITH]
    bad = [row for rows in replies.BAD.values() for row in rows] + replies.BAD_AS_SENTENCES
    assert len(good) >= 180 and len(bad) >= 300 and len(replies.REPAIRED) >= 25
    assert len(set(good)) == len(good) and len(set(bad)) == len(bad)
    assert set(replies.BAD) <= set(CODES)


@pytest.mark.covers(134)
@pytest.mark.parametrize("kind", ["identity", "clothing"])
def test_good_replies_are_accepted(kind: str) -> None:
    assert refused([(kind, text) for text in replies.GOOD[kind]]) == []


def test_what_an_option_or_a_style_asks_for_is_accepted() -> None:
    verdicts = ((option, text, check(kind, text, option)) for kind, option, text in replies.GOOD_WITH)
    assert [(option, text, verdict.reasons) for option, text, verdict in verdicts if not verdict.ok] == []


@pytest.mark.parametrize("option", ["hair", "sensitive"])
def test_it_is_refused_where_the_option_is_off(option: str) -> None:
    rows = [(kind, text) for kind, asked, text in replies.GOOD_WITH if asked == option]
    assert len(refused(rows)) == len(rows) > 1


@pytest.mark.covers(134)
def test_wrapping_is_repaired_and_named() -> None:
    found = [(reply, check(kind, reply)) for kind, reply, _ in replies.REPAIRED]
    assert [(reply, verdict.text) for reply, verdict in found] == [(reply, text) for _, reply, text in replies.REPAIRED]
    assert [(reply, verdict.reasons) for reply, verdict in found if not verdict.ok] == []
    unnamed = [reply for reply, verdict in found if not verdict.repairs and " ".join(reply.split()) != verdict.text]
    assert unnamed == []


@pytest.mark.covers(134)
@pytest.mark.parametrize("code", replies.BAD)
def test_bad_replies_are_refused_with_the_code_of_their_fault(code: str) -> None:
    found = [(text, check(kind, text).codes) for kind, text in replies.BAD[code]]
    assert [(text[:200], codes) for text, codes in found if code not in codes] == []


def test_notes_are_refused_where_sentences_were_asked_for() -> None:
    found = [(text, check(kind, text, form=Form()).codes) for kind, text in replies.BAD_AS_SENTENCES]
    assert [(text, codes) for text, codes in found if codes != ("grammar",)] == []
    assert refused(replies.BAD_AS_SENTENCES) == []


def test_small_mistakes_are_tolerated_and_counted() -> None:
    found = [(text, len(check(kind, text).mistakes)) for kind, text, _ in replies.MISTAKES]
    assert found == [(text, count) for _, text, count in replies.MISTAKES]
    assert refused([(kind, text) for kind, text, count in replies.MISTAKES if count]) == []


def test_body_words_in_a_clothing_text_are_reported_not_refused() -> None:
    found = [(text, check("clothing", text)) for text, _ in replies.BODY_WORDS]
    assert [(text, verdict.body_words) for text, verdict in found] == replies.BODY_WORDS
    assert all(verdict.ok for _, verdict in found)


def test_an_accepted_text_is_accepted_again_unchanged() -> None:
    # A stored text is judged again when the checks change: it must neither be repaired further nor refused.
    rows = [(kind, text) for kind, texts in replies.GOOD.items() for text in texts]
    for kind, text in rows + [(kind, reply) for kind, reply, _ in replies.REPAIRED]:
        again = check(kind, check(kind, text).text)
        assert (again.text, again.reasons, again.repairs) == (check(kind, text).text, (), ())


def test_every_reason_has_a_code_and_is_short_and_stable() -> None:
    for rows in replies.BAD.values():
        for kind, text in rows:
            first, again = check(kind, text), check(kind, text)
            assert first == again
            assert len(first.codes) == len(first.reasons) > 0 and set(first.codes) <= set(CODES)
            assert all(len(reason) < 160 and reason.isprintable() for reason in first.reasons)
