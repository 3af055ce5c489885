"""What a part phrase is, who may find them, and the `phrases` section of a recipe."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator

from reidctl.config import Section

Part = Literal["head", "upper", "lower", "feet", "carried", "whole"]
PARTS: tuple[Part, ...] = ("head", "upper", "lower", "feet", "carried", "whole")
MOST = 32

PROMPT = """List the phrases of a description that name something that a person wears or carries, or the person's hair.
Copy each phrase from the description word for word: its adjectives and its noun, without "a", "the", "his" or "her".
Leave out the person, pronouns, actions, places and directions. At most {limit} phrases, in their order.
Answer with a JSON array and nothing else:
[{"phrase": "...", "part": "..."}]
where part is one of head, upper, lower, feet, carried, whole.

Description: {caption}"""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A few words of a caption that name something to see.

    Attributes:
        text: the words; `caption[start:end]` where the phrase occurs in the caption.
        start, end: half-open characters of the caption; both 0 where a backend's phrase does not occur in it.
        part: one of `PARTS`; `whole` where it is not known.
    """

    text: str
    start: int
    end: int
    part: str


PhraseSource = Callable[[Sequence[str]], list[list[Phrase]]]
"""Finds the phrases of captions: one list per caption, at most `limit` each, in order, none twice."""


class PhraseConfig(Section):
    """Who finds the phrases of captions.

    Attributes:
        backend: `rules` (offline, the default); `given` (the dataset's own phrases); `spacy` (noun chunks); `file`
            (ready phrases); `command` (any program); `llm` (a language model behind OpenAI's protocol).
        limit: most phrases of a caption.
        file: of the `file` backend: JSON, JSON lines or Parquet.
        command: of the `command` backend; split into words, never given to a shell.
        spacy_model: of the `spacy` backend.
        model: of the `llm` backend, the name at the server.
        base_url: of an OpenAI-compatible server; None for OpenAI's own.
        key_env: the environment variable that holds the key; the key itself is never a setting.
        prompt: what the model is asked; `{caption}` and `{limit}` are filled in.
        timeout_s: seconds for one answer of a program or a server.
        concurrency: captions that a program or a server has at a time.
        max_tokens: longest answer of the model.
    """

    backend: Literal["rules", "given", "spacy", "file", "command", "llm"] = "rules"
    limit: Annotated[int, Field(ge=1, le=MOST)] = 8
    file: Path | None = None
    command: str | None = None
    spacy_model: str = "en_core_web_sm"
    model: str | None = None
    base_url: str | None = None
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = "OPENAI_API_KEY"
    prompt: str = PROMPT
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 60.0
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 8
    max_tokens: Annotated[int, Field(ge=16)] = 600

    @field_validator("file", "command", "model", "base_url")
    @classmethod
    def _fits_the_backend(cls, value: object, info: ValidationInfo) -> object:
        # A setting that nobody reads would let a run look like something that it was not.
        name = str(info.field_name)
        owner = name if name in ("file", "command") else "llm"
        backend = info.data.get("backend", owner)
        if value is not None and backend != owner:
            raise ValueError(f"only backend={owner} reads it, and the backend is {backend}")
        if value in (None, "") and backend == owner and name != "base_url":
            raise ValueError(f"backend={owner} needs it")
        return value

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, value: str | None) -> str | None:
        # A key in the address would end up in every record of the run.
        if value is None:
            return value
        parts = urlsplit(value)
        if not re.match(r"https?://[^/\s]", value) or not parts.hostname:
            raise ValueError("an address starts with http:// or https://, e.g. http://localhost:8000/v1")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("the address holds more than a host and a path; a key belongs into the environment")
        return value

    @field_validator("prompt")
    @classmethod
    def _asks_about_the_caption(cls, value: str) -> str:
        if "{caption}" not in value:
            raise ValueError("the prompt has no place for the caption: write {caption}")
        return value
