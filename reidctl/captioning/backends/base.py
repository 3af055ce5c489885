"""The contract between the run and a describer, and the choice of one by name."""

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from reidctl.captioning.config import CaptionConfig
from reidctl.errors import UsageError

_REASON_LIMIT = 240
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Request:
    """One text to write.

    Attributes:
        image_id, image_path: the image; the path comes from the images table, never from a model. The path is empty
            where no image belongs to the request (`neutral`).
        kind: `identity` or `clothing`; `neutral` when a caption of the train split is to lose its content.
        system, prompt: what to ask; equal for all images of one kind and style.
        digest: of the prompt, the model and the settings (`prompts.build_prompt`).
        style_id, instruction: the style, already part of the prompt; for describers that follow it themselves.
        attributes: what is known of this image; only `template` and `command` read it.
        image_version: changes when the image does; a stored reply answers one version only.
        attempt: 1 for the first time, more after a failed check.
        names: what a file of texts may call the image: its id, its id without the dataset, its path in the images
            table; only those that mean no other image of the table.
    """

    image_id: str
    image_path: str
    kind: str
    system: str
    prompt: str
    digest: str
    style_id: str | None = None
    instruction: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    image_version: str = ""
    attempt: int = 1
    names: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        """What a stored reply is found by: image, its version, kind, prompt digest."""
        return self.image_id, self.image_version, self.kind, self.digest


@dataclass(frozen=True)
class Reply:
    """What came back for a request.

    Attributes:
        request: the one it answers.
        status: `ok` (a text to check), `rejected` (an answer that cannot be used, worth asking again), `failed`
            (no answer).
        text, reason: one of them is set.
        tokens_in, tokens_out: as the service counted; 0 where it did not.
        own_fault: a failure that lies with this item (a damaged image, a request that the service refuses) and says
            nothing about the service.
    """

    request: Request
    status: Literal["ok", "rejected", "failed"]
    text: str | None = None
    reason: str | None = None
    tokens_in: int = 0
    tokens_out: int = 0
    own_fault: bool = False


class Describer(Protocol):
    """Writes texts for images.

    Attributes:
        name: of the backend.
        model: recorded with every text and part of the prompt digest.
        source: the captions table's `source`: `mllm` or `template`.
        deferred: whether `describe` may end before every request has its reply (an open batch).
        repeats: whether asking again gives the same text, so that a refused one is refused for good.
    """

    name: str
    model: str
    source: str
    deferred: bool
    repeats: bool

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield one reply per request, in any order; a deferred describer leaves out those that are still open.

        `requests` is read as replies are consumed, never all at once. A problem with one item is a `failed` reply;
        RemoteError is for what will fail every item (a dead key, a missing model).
        """
        ...


class Deferred(Describer, Protocol):
    """A describer whose replies may come to a later process."""

    def paid(self) -> Callable[[Request], bool]:
        """Return a test for requests that cost no more: sent by an earlier process, or answered and not stored yet."""
        ...


def failed(request: Request, reason: str, *, own_fault: bool = False) -> Reply:
    """Return the reply for an item that got no answer; see `Reply.own_fault`."""
    return Reply(request, "failed", reason=plain(reason), own_fault=own_fault)


def rejected(request: Request, reason: str, *, tokens_in: int = 0, tokens_out: int = 0) -> Reply:
    """Return the reply for an answer that cannot be used."""
    return Reply(request, "rejected", reason=plain(reason), tokens_in=tokens_in, tokens_out=tokens_out)


def plain(reason: str) -> str:
    """Return a reason as one bounded line of printable characters: it may hold what a program or server sent."""
    whole = reason[: 4 * _REASON_LIMIT].encode("utf-8", "replace").decode("utf-8")  # no half characters
    shown = "".join(letter if letter.isprintable() else " " for letter in whole)
    return " ".join(shown.split())[:_REASON_LIMIT]


def make_describer(config: CaptionConfig, folder: Path | None = None) -> Describer:
    """Return the describer that `config.mllm` names. No service is contacted and no model is
    loaded before the first request; `file:` and `replay:` read their file here.

    `template`, `replay:FILE`, `file:FILE`, `command:PROGRAM ARGS`, `hf:ID or FOLDER`, `openai:MODEL`, or the bare
    name of an OpenAI model (`gpt-4`). With a base URL any bare name is a model of that server.

    Args:
        config: the `caption` section.
        folder: where a describer keeps what must outlive the process: the open batches.

    Raises:
        UsageError: no such describer.
    """
    name, _, argument = config.mllm.partition(":")
    if config.batch.enabled and name in ("template", "replay", "file", "command", "hf"):
        raise UsageError(f"`{config.mllm}` has no batch service.", hint="--batch is for OpenAI and servers like it.")
    if config.mllm == "template":
        from reidctl.captioning.backends.template import TemplateDescriber

        return TemplateDescriber(config)
    if name == "replay" and argument:
        from reidctl.captioning.backends.replay import ReplayDescriber

        return ReplayDescriber(argument)
    if name == "file" and argument:
        from reidctl.captioning.backends.file import FileDescriber

        return FileDescriber(argument)
    if name == "hf" and argument:
        from reidctl.captioning.backends.local import LocalDescriber

        return LocalDescriber(argument, config)
    if name == "command" and argument:
        from reidctl.captioning.backends.command import CommandDescriber

        return CommandDescriber(argument, config.remote)
    is_openai = bool(re.match(r"(?:chat)?gpt-|o\d", config.mllm, re.I))
    if (name == "openai" and argument) or is_openai or (config.remote.base_url and config.mllm):
        model = argument if name == "openai" else config.mllm
        if config.batch.enabled:
            from reidctl.captioning.backends.batch import BatchDescriber

            if folder is None:
                raise UsageError("Batches need a folder to be remembered in.")
            return BatchDescriber(model, config, folder)
        from reidctl.captioning.backends.openai import OpenAIDescriber

        return OpenAIDescriber(model, config)
    from reidctl.captioning.backends.server import redact

    raise UsageError(
        f"Unknown describer `{redact(config.mllm)}`.",
        hint="Use template, replay:FILE, file:FILE, command:PROGRAM, hf:MODEL, gpt-4, openai:MODEL, or any model name "
        "with a base URL.",
    )
