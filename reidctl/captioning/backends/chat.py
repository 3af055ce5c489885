"""Bodies of chat-completions requests, and the replies in their answers."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from reidctl.captioning.backends.base import Reply, Request, rejected
from reidctl.captioning.config import CaptionConfig

if TYPE_CHECKING:
    from openai import APIStatusError

# "GPT-4" in 001/002 is a model that sees images; the API's `gpt-4` does not.
_ALIASES = {"gpt-4": "gpt-4o", "gpt4": "gpt-4o", "chatgpt-4": "gpt-4o", "gpt-4-vision": "gpt-4o", "gpt-4v": "gpt-4o"}
_SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "description",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"description": {"type": "string"}},
            "required": ["description"],
            "additionalProperties": False,
        },
    },
}
# OpenAI refuses a JSON object that the messages do not ask for by name.
_ASK_FOR_JSON = ' Answer as a JSON object with one key: {"description": "..."}.'
_UNSUPPORTED = (
    r"not support|unsupported|unrecogni[sz]ed|unknown|unexpected|extra|not permitted|not allowed|deprecated|only the"
)
_FORM = re.compile(r"response_format|json_schema|json_object|guided_json|structured[ _]outputs?", re.I)
# OpenAI says `stop`; what other servers and gateways say when the model ended by itself.
_ENDED = ("", "stop", "eos", "eos_token", "end", "end_turn", "stop_sequence", "complete", "completed", "finished")
_TOO_LONG = ("length", "max_tokens", "model_length")
_MOST_TOKENS = 10**9
_REASONING = re.compile(r"<think>.*?</think>", re.S)
# A JSON value that does not end, or Python's way of writing one.
_BROKEN_JSON = re.compile(r"""\{\s*(?:["'{\[]|description\b)|\[\s*["'{\[]""")


@dataclass(frozen=True)
class Dialect:
    """What a server is known to accept.

    Attributes:
        answer: how the form of the reply is asked for: by JSON schema, as any JSON object, or not at all.
        limit: the name of the field that bounds the reply.
        temperature, seed, detail: whether these fields are sent.
    """

    answer: Literal["schema", "json_object", "plain"] = "schema"
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    temperature: bool = True
    seed: bool = True
    detail: bool = True

    @property
    def structured(self) -> bool:
        """Whether JSON is asked for."""
        return self.answer != "plain"


def first_dialect(model: str, *, structured: bool) -> Dialect:
    """Return what to send before the server has refused anything.

    OpenAI's reasoning models take neither `max_tokens` nor a temperature, and a batch cannot learn that on the way:
    every one of its lines would fail.
    """
    answer: Literal["schema", "plain"] = "schema" if structured else "plain"
    if re.match(r"o\d|gpt-5", model, re.I):
        return Dialect(answer, limit="max_completion_tokens", temperature=False)
    return Dialect(answer)


def told(error: "APIStatusError") -> str:
    """Return what a refusal says; the library leaves out bodies that are not laid out as OpenAI's (FastAPI's)."""
    if isinstance(error.body, dict) and "detail" in error.body and "detail" not in error.message:
        return f"{error.message}: {error.body['detail']}"
    return str(error.message)


def lesson(error: "APIStatusError", dialect: Dialect) -> Dialect | None:
    """Return the dialect without what a server has just refused; None when the refusal is about something else."""
    if error.status_code not in (400, 422, 501):
        return None
    # FastAPI puts its whole message under a key that is called like one of our fields.
    named = re.sub(r"""['"]detail['"]:""", "", str(error.param or told(error))[:1000])
    if dialect.structured and _FORM.search(named):
        return replace(dialect, answer="json_object" if dialect.answer == "schema" else "plain")
    if not re.search(_UNSUPPORTED, told(error)[:1000], re.I):
        return None
    if re.search(r"\bmax_tokens\b", named) and dialect.limit == "max_tokens":
        return replace(dialect, limit="max_completion_tokens")
    for option in ("temperature", "seed", "detail"):
        if getattr(dialect, option) and re.search(rf"\b{option}\b", named):
            off: dict[str, Any] = {option: False}
            return replace(dialect, **off)
    return None


def too_large(error: "APIStatusError") -> bool:
    """Return whether a server finds the image too large."""
    words = re.search(
        r"(?:image|payload|request).{0,40}too (?:large|big)|exceed.{0,40}(?:size|pixels)", error.message, re.I
    )
    return error.status_code == 413 or (error.status_code == 400 and words is not None)


def resolve_model(name: str) -> str:
    """Return the model to ask for: `gpt-4` and its spellings mean a GPT-4-class model that sees images."""
    return _ALIASES.get(name.lower(), name)


def request_body(
    request: Request, model: str, config: CaptionConfig, image_url: str | None, *, dialect: Dialect
) -> dict[str, Any]:
    """Return the body of a chat-completions request.

    Args:
        request: what to ask.
        model: name at the server.
        config: sampling, image detail and further fields; these cannot replace model or messages.
        image_url: see `picture.data_url`; None for a request without an image.
        dialect: what the server accepts.
    """
    remote = config.remote
    content: Any = request.prompt
    if image_url is not None:
        image = {"url": image_url, **({"detail": remote.image_detail} if dialect.detail else {})}
        content = [{"type": "text", "text": request.prompt}, {"type": "image_url", "image_url": image}]
    system = request.system + (_ASK_FOR_JSON if dialect.answer == "json_object" else "")
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}],
        dialect.limit: remote.max_tokens,
    }
    if dialect.temperature:
        body["temperature"] = remote.temperature
    if dialect.seed:
        body["seed"] = config.seed + request.attempt - 1
    if dialect.structured:
        body["response_format"] = _SCHEMA if dialect.answer == "schema" else {"type": "json_object"}
    # A stream, or several choices, would be paid for and could not be read.
    return body | {k: v for k, v in remote.extra.items() if k not in ("model", "messages", "stream", "n")}


def parse_completion(body: Any, request: Request, *, structured: bool) -> Reply:
    """Return the reply in a chat completion; one that cannot be used is `rejected`, so that it is asked again.

    Args:
        body: the decoded JSON.
        request: the one it answers.
        structured: whether JSON was asked for.

    Raises:
        ValueError: it is no chat completion.
    """
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        error = body.get("error") if isinstance(body, dict) else None
        raise ValueError(f"an error in place of a text: {error}" if error else "no choices")
    tokens: dict[str, Any] = {
        "tokens_in": _tokens(body, "prompt_tokens"),
        "tokens_out": _tokens(body, "completion_tokens"),
    }
    ended = str(choice.get("finish_reason") or "").lower()
    if message.get("refusal") or ended == "content_filter":
        return rejected(request, "the model refused", **tokens)
    if ended in _TOO_LONG:
        return rejected(request, "the reply breaks off: it ran into max_tokens", **tokens)
    if ended not in _ENDED:  # half a text may be there: the server gave up on the request
        return rejected(request, f"the reply breaks off: it ended with `{ended[:40]}`", **tokens)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str) or not without_reasoning(content):
        return rejected(request, "the reply is empty", **tokens)
    text = unwrap_description(content, structured=structured)
    if text is None:
        return rejected(request, "the reply is not the JSON that was asked for", **tokens)
    return Reply(request, "ok", text, **tokens)


def unwrap_description(content: str, *, structured: bool) -> str | None:
    """Return the description in a reply; None for JSON, whole or broken, that holds none.

    Plain text is fine even where JSON was asked for: some servers take the schema and ignore it, and every text is
    checked later.
    """
    bare = re.sub(r"^```\w*\s*|\s*```$", "", without_reasoning(content) or "")
    try:
        value, end = json.JSONDecoder().raw_decode(bare, max(bare.find("{"), 0))
    except ValueError:
        value, end = None, 0
    except RecursionError:
        return None
    if isinstance(value, dict) and isinstance(value.get("description"), str):
        return str(value["description"])
    if isinstance(value, str) and end == len(bare):
        return value
    is_json = _BROKEN_JSON.match(bare) is not None or (isinstance(value, dict | list) and end == len(bare))
    return None if is_json and bare.startswith(("{", "[") if structured else "{") else bare


def without_reasoning(text: str, *, thinking: bool = False) -> str | None:
    """Return what follows the model's thinking aloud; None where that does not end.

    Args:
        text: what the model wrote; some templates leave out the opening mark.
        thinking: the prompt itself has opened the reasoning.
    """
    before, mark, after = text.rpartition("</think>")
    if "<think>" in after or (thinking and not mark):
        return None
    # Every opening mark that is left has its end, so that the search is linear.
    return (_REASONING.sub("", before + mark).rpartition("</think>")[2] + after).strip()


def _tokens(body: Mapping[str, Any], key: str) -> int:
    usage = body.get("usage")
    value = usage.get(key) if isinstance(usage, dict) else None
    # Far above what any context holds: a nonsensical count must not spend the budget. `True` is an int, too.
    return value if type(value) is int and 0 < value <= _MOST_TOKENS else 0
