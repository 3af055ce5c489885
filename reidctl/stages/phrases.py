"""Builds the source of part phrases that a recipe asks for."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reidctl.errors import RemoteError, UsageError
from reidctl.phrases.backends import file_source, given_source, rules_source, spacy_source
from reidctl.phrases.base import PhraseConfig, PhraseSource
from reidctl.phrases.cache import cached
from reidctl.phrases.command import CommandSource
from reidctl.phrases.llm import SYSTEM, Ask, LlmSource

if TYPE_CHECKING:
    import pandas as pd

    from reidctl.captioning.backends.base import Request
    from reidctl.captioning.backends.openai import OpenAIDescriber


def phrase_source(config: PhraseConfig, *, cache: Path | None, captions: "pd.DataFrame | None" = None) -> PhraseSource:
    """Return who finds the phrases of captions. No program is started and no service is contacted before the first
    caption.

    What spaCy, a program and a model find is stored in `cache`; what the rules, the dataset or a file say is there at
    once and is not.

    Args:
        config: the `phrases` section.
        cache: a file of JSON lines; None to store nothing.
        captions: the dataset's `captions` table, for `given`.

    Raises:
        UsageError: a library or model that is not installed, `given` without a table, a command that is none.
        DataError: the file of the `file` backend is missing or damaged.
    """
    limit = config.limit
    if config.backend == "rules":
        return rules_source(limit)
    if config.backend == "given":
        if captions is None:
            raise UsageError("phrases.backend=given needs a captions table.", hint="Use phrases.backend=rules.")
        return given_source(captions, limit)
    if config.backend == "file":
        assert config.file is not None
        return file_source(config.file, limit)
    source, identity, keep = _slow(config)
    return source if cache is None else cached(source, cache, f"{identity} limit {limit}", keep=keep)


def _slow(config: PhraseConfig) -> tuple[PhraseSource, str, Callable[[str], bool] | None]:
    """A source that is worth storing, what identifies it, and which of its answers may be stored."""
    if config.backend == "spacy":
        return *spacy_source(config.spacy_model, config.limit), None
    if config.backend == "command":
        assert config.command is not None
        program = CommandSource(
            config.command,
            config.limit,
            timeout_s=config.timeout_s,
            concurrency=config.concurrency,
            key_env=config.key_env,
        )
        return program, program.identity, lambda text: text not in program.unanswered
    model = LlmSource(ask_model(config), config.prompt, config.limit)
    asked = hashlib.sha256(f"{config.base_url}\0{config.prompt}\0{config.max_tokens}".encode()).hexdigest()[:16]
    return model, f"llm {config.model} {asked}", lambda text: text not in model.unanswered


def ask_model(config: PhraseConfig) -> Ask:
    """Return the way to the model that `config` names: the transport that `caption` uses, with texts alone.

    Several prompts are under way at a time; the key comes from the environment variable `key_env`, and neither it nor
    a prompt is logged.

    Raises:
        UsageError: (now) an address that is none. RemoteError: (when asking) no key, a refused key, an unknown model or
            address, or no answer to any prompt of a call.
    """
    describer = _describer(config)

    def ask(prompts: Sequence[str]) -> list[str | None]:
        answers: list[str | None] = [None] * len(prompts)
        problem = ""
        try:
            for reply in describer.describe(_request(number, prompt) for number, prompt in enumerate(prompts)):
                # A refused reply is an answer that the reader refuses again, with a reason for the model.
                answers[int(reply.request.image_id)] = reply.text if reply.status == "ok" else None
                if reply.status == "rejected":
                    answers[int(reply.request.image_id)] = ""
                problem = reply.reason or problem
        except RemoteError as error:
            raise RemoteError(error.message, hint=_HINT) from None
        if prompts and all(answer is None for answer in answers):
            raise RemoteError(f"The model that finds phrases answered nothing: {problem}.", hint=_HINT)
        return answers

    return ask


_HINT = "See phrases.model, phrases.base_url and phrases.key_env; phrases.backend=rules needs no service."


def _request(number: int, prompt: str) -> "Request":
    from reidctl.captioning.backends.base import Request

    return Request(str(number), "", "phrases", SYSTEM, prompt, "")


def _describer(config: PhraseConfig) -> "OpenAIDescriber":
    from reidctl.captioning.backends.openai import OpenAIDescriber
    from reidctl.captioning.config import CaptionConfig, RemoteConfig
    from reidctl.config import parse_section

    settings = {
        "base_url": config.base_url,
        "key_env": config.key_env,
        "concurrency": config.concurrency,
        "timeout_s": config.timeout_s,
        "max_tokens": config.max_tokens,
        "temperature": 0.0,
        "structured": False,  # the transport's schema is that of a description
    }
    assert config.model is not None
    return OpenAIDescriber(config.model, CaptionConfig(remote=parse_section(RemoteConfig, settings, "phrases")))
