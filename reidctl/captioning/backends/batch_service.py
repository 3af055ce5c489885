"""The provider's files and batches, asked until they answer: an hour of outage must not end days of waiting."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar

from reidctl.captioning.backends.batch_state import Batch, BatchState
from reidctl.captioning.backends.server import connection, stop_if_hopeless, waiting_time
from reidctl.captioning.config import CaptionConfig
from reidctl.console import log
from reidctl.errors import DataError, RemoteError, UsageError

if TYPE_CHECKING:
    from openai import APIStatusError
    from openai.types import Batch as RemoteBatch

_T = TypeVar("_T")
_MARK = "reidctl"
# Ids come from the server and go into addresses: nothing in them may climb to another one.
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_MAY_STAY = "a file of requests may still be at the provider, until it expires there"
_REPORT_S = 60.0
_LONGEST_PAUSE_S = 3600.0
_GIVE_UP_S = 24 * 3600.0
# Clocks differ; a batch is looked for from well before we meant to send it.
_CLOCK_SLACK_S = 24 * 3600.0


class QueueFull(Exception):
    """The provider holds as many of our tokens as it takes at a time; it takes more when a batch has ended."""


class Refused(RemoteError):
    """The provider answered, and the answer is no: nothing was made."""


class _Cut(Exception):
    """A download ended before its end."""


class BatchService:
    """Uploads, submissions, looks, downloads, each tried again through 429, 5xx, timeouts and broken connections.

    Before the first answer, and when nobody waits, `remote.attempts` tries are made; later ones go on for a day.

    Args:
        config: see `RemoteConfig` and `BatchConfig`.
    """

    def __init__(self, config: CaptionConfig) -> None:
        self._config = config
        self._server = connection(config)
        self._answered = False
        self._doubtful: dict[str, tuple[str, float]] = {}
        self._told = -_REPORT_S

    def __enter__(self) -> Self:
        self._runner = asyncio.Runner()
        try:
            self._client = self._server.client()
        except BaseException:
            self._runner.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._runner.run(self._client.close())
        finally:
            self._runner.close()

    def upload(self, stream: IO[bytes], name: str) -> str:
        """Send a file of requests and return the provider's id for it."""
        tries = 0

        async def send() -> Any:
            nonlocal tries
            tries += 1
            stream.seek(0)
            # The service reads the whole file before it answers.
            client = self._client.with_options(timeout=10 * self._config.remote.timeout_s)
            return _checked(await client.files.create(file=(name, stream, "application/jsonl"), purpose="batch"))

        file_id = str(self._persist("uploading the requests", send).id)
        if tries > 1:  # an upload whose answer got lost lies there as well
            self.delete_files_named(name, but=file_id)
        return file_id

    def create(self, file_id: str, mark: str, since: float) -> "RemoteBatch":
        """Start a batch, exactly one, and return it.

        After an attempt that ended without an answer, the batch is looked for before it is asked for again.
        """
        tries = 0

        async def send() -> Any:
            nonlocal tries
            tries += 1
            if tries > 1 and (known := await self._marked(mark, since)):
                return await self._only(known)
            window: Any = self._config.batch.window
            return _checked(
                await self._client.batches.create(
                    input_file_id=_safe(file_id),
                    endpoint="/v1/chat/completions",
                    completion_window=window,
                    metadata={_MARK: mark},
                )
            )

        try:
            batch: RemoteBatch = self._persist("starting a batch", send)
        except Refused as refusal:
            if tries > 1:  # an earlier try may have made one
                raise RemoteError(refusal.message, hint=refusal.hint) from None
            raise
        if tries > 1:
            batch = self.find(mark, since) or batch
            self._doubtful[batch.id] = (mark, since)
        return batch

    def find(self, mark: str, since: float, *, keep: str = "") -> "RemoteBatch | None":
        """Return the batch that carries our mark; a second one, if a lost answer made one, is cancelled.

        `keep` names the one that stays; otherwise it is the oldest that was not refused.
        """

        async def look() -> Any:
            known = await self._marked(mark, since)
            return await self._only(known, keep) if known else None

        found: RemoteBatch | None = self._persist("looking for a batch", look)
        return found

    def retrieve(self, batch_id: str) -> "RemoteBatch":
        """Return a batch as it is now."""
        import openai

        if batch_id in self._doubtful:  # a list may have lagged behind when it was made
            mark, since = self._doubtful.pop(batch_id)
            self.find(mark, since, keep=batch_id)

        async def look() -> Any:
            try:
                return _checked(await self._client.batches.retrieve(_safe(batch_id)))
            except openai.NotFoundError:
                raise RemoteError(
                    f"{self._server.host} knows no batch {batch_id}.",
                    hint="Use the key it was submitted with; deleting batches.jsonl gives all open batches up.",
                ) from None

        batch: RemoteBatch = self._persist("looking at a batch", look)
        return batch

    def cancel(self, batch_id: str) -> bool:
        """Ask for a batch to be cancelled; False where the provider does not."""
        return self._forgiving(f"batch {batch_id} goes on", self._client.batches.cancel, _safe(batch_id))

    def download(self, file_id: str, path: Path) -> None:
        """Append a file of the provider's to `path`, piece by piece; a download that is cut is begun again.

        Raises:
            FileNotFoundError: the provider no longer has it.
        """
        import openai

        start = path.stat().st_size if path.exists() else 0

        async def fetch() -> None:
            try:
                async with self._client.files.with_streaming_response.content(_safe(file_id)) as response:
                    await _write(_pieces(response), path, start)
            except openai.NotFoundError:
                raise FileNotFoundError(file_id) from None

        self._persist("fetching replies", fetch)

    def delete_file(self, file_id: str) -> None:
        """Remove a file at the provider; one that is gone or is kept there is no reason to stop."""
        if file_id:
            self._forgiving(_MAY_STAY, self._client.files.delete, _safe(file_id))

    def delete_files_named(self, name: str, *, but: str = "") -> None:
        """Remove the files of requests that were uploaded under this name, except one."""

        async def sweep() -> None:
            # Collected first: deleting moves the pages.
            found: set[str] = set()
            seen: set[str] = set()
            async for file in self._client.files.list(purpose="batch"):
                if file.id in seen:
                    break  # the same page again
                seen.add(file.id)
                found |= {file.id} if file.filename == name else set()
            for file_id in found - {but}:
                await self._client.files.delete(_safe(file_id))

        self._forgiving(_MAY_STAY, sweep)

    def redact(self, text: str) -> str:
        """Return what the service says without keys, on one line, bounded."""
        return self._server.redact(text)

    def _forgiving(self, otherwise: str, call: Callable[..., Awaitable[Any]], *arguments: Any) -> bool:
        import openai

        async def once() -> None:
            await call(*arguments)

        try:
            self._runner.run(once())
        except openai.NotFoundError:
            return True  # gone already
        except (openai.APIError, ValueError) as error:
            log.warning("caption: %s: %s", otherwise, self._server.redact(str(error)))
            return False
        return True

    async def _marked(self, mark: str, since: float) -> "list[RemoteBatch]":
        """The batches with our mark, oldest first.

        Pages that are wholly older than the mark end the search, and one that brings nothing new: some servers give
        the first page for ever.
        """
        found: list[RemoteBatch] = []
        seen: set[str] = set()
        page = await self._client.batches.list(limit=100)
        while True:
            fresh = [batch for batch in page.data if batch.id not in seen]
            seen.update(batch.id for batch in fresh)
            found += [batch for batch in fresh if (batch.metadata or {}).get(_MARK) == mark]
            times = [batch.created_at or 0 for batch in page.data]
            is_newest_first = bool(times) and times[0] > times[-1]
            if (is_newest_first and times[0] < since - _CLOCK_SLACK_S) or not fresh or not page.has_next_page():
                return sorted(map(_checked, found), key=lambda batch: batch.created_at or 0)
            page = await page.get_next_page()

    async def _only(self, batches: "list[RemoteBatch]", keep: str = "") -> "RemoteBatch":
        """The batch to keep of those with one mark; the others are cancelled."""
        alive = [batch for batch in batches if batch.status not in ("failed", "cancelled", "cancelling")] or batches
        chosen = next((batch for batch in batches if batch.id == keep), alive[0])
        for twin in batches:
            if twin is not chosen and twin.status in ("validating", "in_progress"):
                log.warning("caption: batch %s repeats batch %s and is cancelled", twin.id, chosen.id)
                await self._client.batches.cancel(twin.id)
        return chosen

    def _persist(self, what: str, call: Callable[[], Awaitable[_T]]) -> _T:
        """Run a call until it has an answer.

        Raises:
            RemoteError: a refusal that no repetition changes, or no answer for too long.
        """
        import openai

        started, tries = time.monotonic(), 0

        async def once() -> _T:
            return await call()

        while True:
            wait = None
            try:
                answer = self._runner.run(once())
                self._answered = True
                return answer
            except openai.APIStatusError as error:
                problem = f"the service answered {error.status_code}: {self._server.redact(error.message)}"
                self._stop_if_final(error, what, problem)
                wait = waiting_time(error.response.headers, self._config.remote.max_wait_s)
            except (openai.APIError, _Cut, ValueError) as error:
                problem = f"{type(error).__name__}: {self._server.redact(str(error.__cause__ or error))}"
            tries += 1
            self._stop_if_over(what, problem, tries, time.monotonic() - started)
            least = self._config.remote.backoff_s
            time.sleep(self._backoff(tries) if wait is None else min(max(wait, least), _LONGEST_PAUSE_S))

    def _stop_if_final(self, error: "APIStatusError", what: str, problem: str) -> None:
        """Raise for an answer that stays the same however often it is asked for."""
        if is_queue_full(f"{error.code} {error.message}"):
            raise QueueFull(problem) from None
        try:
            stop_if_hopeless(error, self._server)
        except RemoteError as refusal:
            raise Refused(refusal.message, hint=refusal.hint) from None
        if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
            too_large = error.status_code == 413
            hint = "Lower caption.batch.megabytes." if too_large else "Nothing that was paid for is lost."
            raise Refused(f"Refused while {what}: {problem}.", hint=hint) from None

    def _backoff(self, tries: int) -> float:
        return float(min(self._config.remote.max_wait_s, self._config.remote.backoff_s * 2 ** min(tries - 1, 20)))

    def _stop_if_over(self, what: str, problem: str, tries: int, seconds: float) -> None:
        patient = self._answered and self._config.batch.wait
        if seconds > _GIVE_UP_S or (not patient and tries >= self._config.remote.attempts):
            raise RemoteError(
                f"No answer while {what}, after {tries} tries: {problem}.",
                hint="Open batches go on at the provider; the same command continues.",
            )
        if time.monotonic() - self._told >= _REPORT_S:
            self._told = time.monotonic()
            log.warning("caption: %s: %s; trying again", what, problem)


def recover(state: BatchState, service: BatchService, host: str) -> None:
    """Find out what became of submissions that a kill cut short.

    Raises:
        UsageError: they, or open batches, are at another service.
    """
    unfinished = state.in_phase("intended", "uploaded")
    for batch in (*unfinished, *state.in_phase("submitted")):
        if batch.host != host:
            raise UsageError(
                f"Batches of this run are open at {batch.host}, and the address is now {host}.",
                hint="Use the old address until they are fetched, or another run folder.",
            )
    for batch in unfinished:
        remote = service.find(batch.id, batch.started)
        if remote is None:
            if batch.file_id:
                service.delete_file(batch.file_id)
            else:
                service.delete_files_named(request_file_name(batch))
            # Once more: the submission may have been on its way while we were killed.
            remote = service.find(batch.id, batch.started)
        if remote is None:
            state.note(batch, "dropped")
        else:
            state.note(batch, "submitted", batch_id=remote.id, status=remote.status)
            log.info("caption: batch %s of an earlier run is taken up again", remote.id)


def request_file_name(batch: Batch) -> str:
    """Return the name that a file of requests has at the provider: it is found by it after a kill."""
    return f"reidctl-{batch.id}.jsonl"


def is_queue_full(problem: str) -> bool:
    """Return whether a refusal means too many waiting tokens (`token_limit_exceeded`)."""
    return re.search(r"token_limit_exceeded|enqueued token", problem, re.I) is not None


def _safe(name: str) -> str:
    """An id that can stand in an address."""
    if not isinstance(name, str) or not _SAFE_ID.fullmatch(name):
        raise RemoteError(f"The service named something {name!r:.60}, which is no id.", hint="Is the base URL right?")
    return name


def _checked(answer: Any) -> Any:
    """An answer that is an object with an id; a gateway's page of text is not."""
    if not isinstance(getattr(answer, "id", None), str):
        raise ValueError("the answer is no object with an id")
    _safe(answer.id)
    return answer


async def _pieces(response: Any) -> AsyncIterator[bytes]:
    try:
        async for piece in response.iter_bytes(65536):
            yield piece
    # The transport's own errors reach us here; they are httpx's or httpx2's, by the version of the library.
    except Exception as error:
        raise _Cut(type(error).__name__) from error


async def _write(pieces: AsyncIterator[bytes], path: Path, start: int) -> None:
    try:
        with path.open("ab") as stream:
            path.chmod(0o600)
            stream.truncate(start)
            stream.seek(start)
            async for piece in pieces:
                stream.write(piece)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror}.", hint="Free disk space; nothing is lost.") from None
