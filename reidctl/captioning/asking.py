"""Ask for every text that is not stored, check each reply, ask again with the reason, and store what came."""

import hashlib
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import cast

from reidctl.captioning.backends.base import Deferred, Describer, Reply, Request
from reidctl.captioning.budget import Ledger
from reidctl.captioning.config import CaptionConfig
from reidctl.captioning.form import parse_instruction
from reidctl.captioning.journal import Entry, Index, Journal
from reidctl.captioning.prompts import RETRY_MARK, retry_text
from reidctl.captioning.validation import CHECKS_VERSION, Verdict, check_neutral, check_reply
from reidctl.errors import RemoteError

# A recorded file that lacks a text says nothing about the next one; a service that fails so often is down.
SERVICES = frozenset({"openai", "command", "hf"})
_REPORT_EVERY = 50
NEUTRAL = "neutral"


@dataclass
class Asker:
    """One describer, one journal, one budget: everything a run asks goes through here.

    Attributes:
        describer, config, journal, ledger: who answers, under which settings, where replies go, what they may cost.
        tick: told how many texts are finished, and a note about the money.
        counts: `asked`, `resumed`, `judged_again` over this process.
    """

    describer: Describer
    config: CaptionConfig
    journal: Journal
    ledger: Ledger
    tick: Callable[[int, str], None]
    counts: Counter[str] = field(default_factory=Counter)

    def ask(self, wanted: Iterable[Request], *, counted: bool = True) -> int:
        """Ask until every wanted text has its outcome, the budget is spent, or all that is left waits in a batch.

        A service that fails `remote.max_failures` times in a row is down; failures that lie with an item (a damaged
        image) do not count, and replies of a batch are all there, so nothing is saved by stopping.

        Args:
            wanted: the texts, each at its first attempt.
            counted: whether they are part of the progress.

        Returns:
            Number of texts that have no outcome yet: open at the provider, or refused and to be sent by the next run.
            0 unless the describer is deferred.

        Raises:
            RemoteError: the service refuses everything; what was stored stays.
        """
        source: Iterator[Request] = self._open(wanted, counted)
        again: deque[Request] = deque()
        streak = 0
        while True:
            affordable = self.ledger.affordable(self._drain(source, again), self._paid())
            with closing(self.describer.describe(affordable)) as replies:
                for reply in replies:
                    entry = self._store(reply, counted)
                    if entry.status == "retry":
                        again.append(reply.request)
                    streak = streak + 1 if entry.status == "failed" and not reply.own_fault else 0
                    if streak >= self.config.remote.max_failures and self._may_be_down:
                        raise RemoteError(
                            f"{streak} requests in a row failed, the last one: {entry.reason}.",
                            hint="Everything stored is kept; run it again when the service is back.",
                        )
            left = self._left_over(counted)
            if self.describer.deferred and not self.config.batch.wait:
                # A batch provider takes only so much at a time: what was not even read is open too.
                return len(left) + len(again) + sum(1 for _ in source)
            if not again or self.ledger.stopped:
                return len(left)
            source = chain(left, source)

    def due(self, wanted: Iterable[Request]) -> Iterator[Request]:
        """Yield the requests without a final reply at the attempt that comes next; nothing is judged or stored."""
        for request in wanted:
            slot = self.journal.find(request.key)
            if slot is None:
                yield request
            elif not slot.final:
                yield replace(request, attempt=slot.attempt + (slot.status == "retry"))

    @property
    def _may_be_down(self) -> bool:
        return self.describer.name in SERVICES and not self.describer.deferred

    def _paid(self) -> Callable[[Request], bool] | None:
        return cast(Deferred, self.describer).paid() if self.describer.deferred else None

    def _drain(self, source: Iterator[Request], again: deque[Request]) -> Iterator[Request]:
        """The requests of the source, then those that were refused meanwhile, with the reason in their prompt."""
        # Not `yield from`: that would close the source with this generator, and the next round goes on with it.
        for request in source:
            yield request
        while again:
            request = again.popleft()
            entry = self.journal.entry(request.key)
            yield request if entry is None else next_attempt(request, entry)

    def _store(self, reply: Reply, counted: bool) -> Entry:
        reply = self.ledger.counted(reply)
        self.ledger.settle(reply)
        entry = judge(reply, self.describer, self.config, batch=self.ledger.batch)
        self.journal.append(entry)
        self.counts["asked"] += 1
        done = int(counted and entry.status != "retry")
        self.tick(done, self._note() if self.counts["asked"] % _REPORT_EVERY == 0 else "")
        return entry

    def _left_over(self, counted: bool) -> list[Request]:
        """Requests that went out and got no reply: open in a batch, or failed."""
        left = self.ledger.flying
        for request in left:
            self.ledger.release(request)
            if not self.describer.deferred:
                self._store(Reply(request, "failed", reason="the describer gave no answer"), counted)
        return left if self.describer.deferred else []

    def _open(self, wanted: Iterable[Request], counted: bool) -> Iterator[Request]:
        """The requests without a final reply, each at the attempt where an earlier run left it."""
        for request in wanted:
            slot = self.journal.find(request.key)
            if slot is None:
                yield request
                continue
            status, attempt = slot.status, slot.attempt
            if slot.stale and status != "failed":
                status = self._judge_again(request, self.journal.read(slot))
            if status in ("ok", "rejected"):
                self.counts["resumed"] += 1
                self.tick(int(counted), "")
            elif status == "retry":
                entry = self.journal.entry(request.key)
                yield request if entry is None else next_attempt(request, entry)
            else:
                yield replace(request, attempt=attempt)

    def _judge_again(self, request: Request, entry: Entry) -> str:
        """The status of a stored text under today's check settings: it was paid for, so nobody is asked."""
        judged = judge_again(request, entry, self.describer, self.config)
        if entry.text is not None:
            self.journal.append(judged)
            self.counts["judged_again"] += 1
        return judged.status

    def _note(self) -> str:
        if not self.journal.tokens_in:
            return ""
        tokens = f"{self.journal.tokens_in:,} + {self.journal.tokens_out:,} tokens"
        return tokens if self.ledger.price is None else f"{tokens}, {self.ledger.spent:.4f} spent"


def checks_digest(config: CaptionConfig) -> str:
    """Return the digest of everything that decides whether a text passes, beside the text and its prompt."""
    settings = {"check": config.check.model_dump(), "retries": config.retries, "version": CHECKS_VERSION}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def next_attempt(request: Request, entry: Entry) -> Request:
    """Return the request that follows a refused reply, with the reason in its prompt."""
    # The first prompt is kept below the reason of the last attempt only: reasons must not pile up.
    first = request.prompt.split(RETRY_MARK, 1)[0]
    return replace(request, prompt=retry_text(first, entry.reason or "unknown"), attempt=entry.attempt + 1)


def judge(reply: Reply, describer: Describer, config: CaptionConfig, *, batch: bool = False) -> Entry:
    """Return the journal entry for a reply: checked, and either kept, refused for good, or marked for another try."""
    request = reply.request
    entry = Entry(
        image_id=request.image_id,
        image_version=request.image_version,
        kind=request.kind,
        prompt_sha256=request.digest,
        attempt=request.attempt,
        status=reply.status,
        text=reply.text,
        reason=reply.reason,
        tokens_in=reply.tokens_in,
        tokens_out=reply.tokens_out,
        codes=() if reply.status == "ok" else ("unusable" if reply.status == "rejected" else "failed",),
        checks=checks_digest(config),
        # What was recorded or written here costs nothing, whatever model wrote it once.
        model=describer.model if describer.name in SERVICES else f"{describer.name}:{describer.model}",
        batch=batch,
        time=time.time(),
    )
    if reply.status == "ok":
        verdict = _check(reply, describer, config)
        entry = replace(
            entry,
            status="ok" if verdict.ok else "rejected",
            text=verdict.text,
            reason="; ".join(verdict.reasons) or None,
            coverage=verdict.coverage,
            clothing_words=len(verdict.clothing_words),
            codes=verdict.codes,
        )
    # Who gives the same text again is not asked again.
    retry = entry.status == "rejected" and request.attempt <= config.retries and not describer.repeats
    return replace(entry, status="retry") if retry else entry


def judge_again(request: Request, entry: Entry, describer: Describer, config: CaptionConfig) -> Entry:
    """Return the entry of a stored reply under today's check settings; its tokens were counted when it came."""
    if entry.text is None:
        # A refusal or a broken reply holds nothing to judge; there may be more attempts than there were.
        retry = entry.status == "rejected" and entry.attempt <= config.retries and not describer.repeats
        return replace(entry, status="retry") if retry else entry
    reply = Reply(replace(request, attempt=entry.attempt), "ok", text=entry.text)
    judged = judge(reply, describer, config, batch=entry.batch)
    return replace(judged, model=entry.model)


def _check(reply: Reply, describer: Describer, config: CaptionConfig) -> Verdict:
    request = reply.request
    if request.kind == NEUTRAL:
        return check_neutral(reply.text or "", request.attributes["caption"], config.check, prompt=request.prompt)
    return check_reply(
        reply.text or "",
        request.kind,
        config,
        prompt=request.prompt,
        form=parse_instruction(request.instruction) if request.instruction else None,
        # A model must say all we expect; a template can only say what is known.
        attributes=request.attributes if describer.source == "template" else None,
    )


def stored_texts(journal: Index, wanted: Iterable[Request]) -> dict[str, str]:
    """Return the accepted text of each wanted request by image id."""
    found = {}
    for request in wanted:
        entry = journal.entry(request.key)
        if entry is not None and entry.status == "ok" and entry.text is not None:
            found[request.image_id] = entry.text
    return found
