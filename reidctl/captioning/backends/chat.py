"""Bodies of chat-completions requests, and the replies in their answers."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from reidctl.captioning.backends.base import Reply, Request, rejected
from reidctl.captioning.config import CaptionConfig

if TYPE_CHECKING:
    pass


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
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return rejected(request, "the model refused", **tokens)
    if choice.get("finish_reason") == "length":
        return rejected(request, "the reply breaks off: it ran into max_tokens", **tokens)
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    if not isinstance(content, str) or not _answer(content):
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
    bare = re.sub(r"^```\w*\s*|\s*```$", "", _answer(content))
    try:
        value, end = json.JSONDecoder().raw_decode(bare, max(bare.find("{"), 0))
    except (ValueError, RecursionError):
        value, end = None, 0
    if isinstance(value, dict) and isinstance(value.get("description"), str):
        return str(value["description"])
    if isinstance(value, str) and end == len(bare):
        return value
    return None if bare.startswith("{") or (structured and bare.startswith("[")) else bare


def _answer(content: str) -> str:
    """The content without what the model thought aloud; some templates leave out the opening mark."""
    return re.sub(r"<think>.*\Z", "", re.sub(r"\A.*</think>", "", content, flags=re.S), flags=re.S).strip()


def _tokens(body: Mapping[str, Any], key: str) -> int:
    usage = body.get("usage")
    value = usage.get(key) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and value > 0 else 0
