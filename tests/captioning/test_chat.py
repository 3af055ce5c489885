import time
from typing import Any

import pytest
from fakeserver import asked, completion

from reidctl.captioning.backends.chat import parse_completion, unwrap_description, without_reasoning


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"description": "A man."}', "A man."),
        ('```json\n{"description": "A man."}\n```', "A man."),
        ('Here it is: {"description": "A man."} I hope it helps.', "A man."),
        ("<think>Is it a man? {...}</think>\nA man.", "A man."),
        ("It may be a man.</think>A man.", "A man."),
        ('<think>a</think><think>b</think>{"description": "A man."}', "A man."),
        ("A man.", "A man."),
        ('"A man."', "A man."),
        ('"Red" is the coat of the man.', '"Red" is the coat of the man.'),
        ("A man with a {logo} shirt.", "A man with a {logo} shirt."),
        ('{"description": 5}', None),
        ('{"text": "A man."}', None),
        ('{"description": "A ma', None),
        ("[1]", None),
        ("{" * 50_000, None),
        ("{}", None),
        ('["A man', None),
        ("{'description': 'A man", None),
        ("{ description: A man", None),
        ("[The person] wears a red coat.", "[The person] wears a red coat."),
        ("{red} coat, black shoes.", "{red} coat, black shoes."),
        ("A tall <think>or not?</think>man.", "A tall man."),
    ],
)
def test_the_description_is_found_in_what_models_wrap_it_in(content: str, text: str | None) -> None:
    assert unwrap_description(content, structured=True) == text


@pytest.mark.parametrize("body", [None, [], "text", {}, {"choices": None}, {"choices": [None]}, {"choices": [{}]}])
def test_what_is_no_completion_is_an_error_and_not_a_reply(body: Any) -> None:
    with pytest.raises(ValueError):
        parse_completion(body, asked("")[0], structured=True)


def test_a_reply_in_parts_and_without_usage_is_read() -> None:
    parts = [{"type": "text", "text": "A tall "}, {"type": "text", "text": "man."}]
    body = {"choices": [{"message": {"content": parts}}], "usage": {"prompt_tokens": None}}
    reply = parse_completion(body, asked("")[0], structured=False)
    assert (reply.text, reply.tokens_in, reply.tokens_out) == ("A tall man.", 0, 0)


def test_thinking_that_never_ends_is_an_empty_reply() -> None:
    reply = parse_completion(completion("<think>hm, well").body, asked("")[0], structured=False)
    assert (reply.status, reply.reason) == ("rejected", "the reply is empty")


def test_json_that_nobody_asked_for_may_be_a_list_but_not_an_object() -> None:
    assert unwrap_description('["A man"] it says.', structured=False) == '["A man"] it says.'
    assert unwrap_description('{"description": "A ma', structured=False) is None


@pytest.mark.parametrize(
    ("finish", "status", "reason"),
    [
        (None, "ok", None),
        ("stop", "ok", None),
        ("STOP", "ok", None),
        ("eos_token", "ok", None),
        ("end_turn", "ok", None),
        ("length", "rejected", "the reply breaks off: it ran into max_tokens"),
        ("model_length", "rejected", "the reply breaks off: it ran into max_tokens"),
        ("content_filter", "rejected", "the model refused"),
        ("error", "rejected", "the reply breaks off: it ended with `error`"),
        ("abort", "rejected", "the reply breaks off: it ended with `abort`"),
        ({"why": 1}, "rejected", "the reply breaks off: it ended with `{'why': 1}`"),
    ],
)
def test_half_a_text_is_no_reply(finish: Any, status: str, reason: str | None) -> None:
    reply = parse_completion(completion("The person wears a", finish=finish).body, asked("")[0], structured=False)
    assert (reply.status, reply.reason) == (status, reason)
    assert (reply.tokens_in, reply.tokens_out) == (100, 20)


@pytest.mark.parametrize(
    ("told", "counted"), [(20, 20), (10**9, 10**9), (10**9 + 1, 0), (True, 0), (-1, 0), ("7", 0), (1.5, 0), (None, 0)]
)
def test_a_count_of_tokens_is_a_whole_number_within_reason(told: Any, counted: int) -> None:
    body = completion("A man.").body | {"usage": {"prompt_tokens": told, "completion_tokens": told}}
    reply = parse_completion(body, asked("")[0], structured=False)
    assert (reply.tokens_in, reply.tokens_out) == (counted, counted)


def test_a_long_row_of_opening_marks_takes_no_time() -> None:
    started = time.monotonic()
    assert without_reasoning("<think>" * 50_000 + "</think>A man.") == "A man."
    assert without_reasoning("</think>" + "<think>" * 50_000) is None
    assert time.monotonic() - started < 2  # a search from each mark to the end takes minutes
