"""A describer behind the provider's Batch API: cheaper, replies within a day, safe to leave and to come back."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from reidctl.captioning.backends.base import Reply, Request, failed
from reidctl.captioning.backends.batch_replies import Shelf, download, known_requests
from reidctl.captioning.backends.batch_service import (
    BatchService,
    QueueFull,
    Refused,
    is_queue_full,
    recover,
    request_file_name,
)
from reidctl.captioning.backends.batch_state import (
    Batch,
    BatchState,
    RequestFile,
    custom_id,
    open_requests,
)
from reidctl.captioning.backends.chat import first_dialect, request_body, resolve_model
from reidctl.captioning.backends.picture import data_url
from reidctl.captioning.backends.server import connection
from reidctl.captioning.config import CaptionConfig
from reidctl.console import log
from reidctl.errors import DataError, RemoteError

if TYPE_CHECKING:
    from openai.types import Batch as RemoteBatch
    from openai.types.batch_error import BatchError

__all__ = ["BatchDescriber", "cancel_all", "open_requests"]

_ENDED = ("completed", "failed", "expired", "cancelled")
_CANCELLABLE = ("validating", "in_progress")
_REPORT_S = 60.0
# A full queue may be another project's doing: what is remembered of it must not cripple every later run.
_SMALLEST_REMEMBERED = 100
_DEAD = ("insufficient_quota", "billing_hard_limit", "billing_not_active", "invalid_api_key", "authentication")


class BatchDescriber:
    """Gives the requests to the provider in files, waits, and fetches the replies; a later process goes on.

    Every step is in `batches.jsonl` before or right after it is taken, so that a kill at any moment neither loses a
    reply that was paid for nor asks twice. The model and the bodies are those of `OpenAIDescriber`.

    What an expired batch left undone is sent once more. The unfinished requests of a cancelled batch are not: the run
    that fetches the batch gives them as failed rows, and a later run of the same command asks for them again. No
    request goes out that the caller let through only because it was `paid`: where an earlier process sent it and its
    batch then brings nothing, it fails, and the next run asks the budget.

    When this run has stored all replies of a batch, or an earlier run had (its journal in `parts/` tells), their file
    is deleted; replies that no request wants stay, as paid for, in `batch-*.jsonl`.

    Args:
        model: as for `OpenAIDescriber`.
        config: see `BatchConfig` and `RemoteConfig`.
        folder: of the state file and of replies that were fetched and not yet stored by the run.

    Raises:
        UsageError: OPENAI_BASE_URL is not a plain address.
    """

    name = "openai"
    source = "mllm"
    deferred = True
    repeats = False

    def __init__(self, model: str, config: CaptionConfig, folder: Path) -> None:
        server = connection(config)
        self.model = model if server.is_azure else resolve_model(model)
        self._config = config
        self._folder = Path(folder)
        self._round: _Round | None = None

    def paid(self) -> Callable[[Request], bool]:
        """Return a test for requests that are with the provider or whose replies are here: they cost no more.

        While `describe` reads its requests the test follows what the batches come to: a request whose batch ended
        without a reply to it costs again.
        """
        known = known_requests(self._folder)

        def costs_no_more(request: Request) -> bool:
            name = custom_id(request)
            return name in known if self._round is None else self._round.knows(name)

        return costs_no_more

    def describe(self, requests: Iterable[Request]) -> Generator[Reply, None, None]:
        """Yield the replies of batches that ended; with `batch.wait` until no request is open.

        Raises:
            RemoteError: no key, a refused key, a spent quota, an unknown batch, no answer for a day.
            UsageError: batches are open at another service.
            DataError: another process uses the folder, or the disk is full.
        """
        source = iter(requests)
        with BatchState(self._folder) as state:
            # Where a batch is open, requests are read only after it was looked at: `paid` must know how it ended.
            if not open_requests(self._folder):
                first = next(source, None)
                if first is None:
                    return
                source = chain([first], source)
            with BatchService(self._config) as service:
                self._round = _Round(self.model, self._config, state, service, source)
                try:
                    yield from self._round.replies()
                finally:
                    self._round = None


def cancel_all(config: CaptionConfig, folder: Path) -> int:
    """Cancel the open batches of a folder and return how many.

    What they finished before is fetched by the next run, which gives the rest as failed rows; the run after that one
    asks for them again.

    Raises:
        RemoteError: the service refuses or does not answer.
        DataError: another process uses the folder.
    """
    with BatchState(Path(folder)) as state:
        if not state.in_phase("intended", "uploaded", "submitted"):
            return 0
        with BatchService(config) as service:
            recover(state, service, connection(config).host)
            open_ones = [service.retrieve(batch.batch_id) for batch in state.in_phase("submitted")]
            return sum(service.cancel(batch.id) for batch in open_ones if batch.status in _CANCELLABLE)


class _Round:
    """One call of `describe`.

    Args:
        model: recorded name.
        config: the settings.
        state, service: what is known and who is asked.
        source: the wanted requests, read as room permits.
    """

    def __init__(
        self, model: str, config: CaptionConfig, state: BatchState, service: BatchService, source: Iterator[Request]
    ) -> None:
        self._model, self._config = model, config
        self._state, self._service = state, service
        self._source = source
        self._exhausted = False
        self._host = connection(config).host
        self._dialect = first_dialect(model, structured=config.remote.structured)
        self._again: deque[Request] = deque()  # before the source: held back, or to be sent once more
        self._held: dict[str, Request] = {}  # in a batch, or in the file being written
        self._resent: set[str] = set()
        self._open: set[str] = set()  # custom ids in open batches, wanted or not
        self._promised: set[str] = set()  # those of earlier processes: let through as paid, perhaps beyond the budget
        self._shelf = Shelf(state, service.redact)
        self._fresh: set[str] = set()  # submissions fetched in this round
        self._file: RequestFile | None = None
        self._room = config.batch.open
        self._most = min(config.batch.requests, state.limit or config.batch.requests)
        self._image: tuple[str, str] = ("", "")
        self._counts: dict[str, tuple[int, int, int]] = {}
        self._told = time.monotonic()

    def knows(self, name: str) -> bool:
        """Return whether the request with this custom id is with the provider, or what became of it is known here."""
        return name in self._open or name in self._shelf

    def replies(self) -> Iterator[Reply]:
        """Yield replies until nothing that is wanted is open, or, without waiting, once around."""
        try:
            recover(self._state, self._service, self._host)
            self._open.update(*(batch.custom_ids for batch in self._state.in_phase("submitted")))
            self._promised.update(self._open)
            self._shelf.load()
            yield from self._collect()  # first: what has ended makes room
            yield from self._send()
            while self._config.batch.wait and not (self._exhausted and not self._held and not self._again):
                self._report()
                time.sleep(self._config.batch.poll_s)
                yield from self._collect()
                yield from self._send()
            self._settle()
        finally:
            if self._file is not None:
                self._file.close()

    # Sending

    def _next(self) -> Request | None:
        if self._again:
            return self._again.popleft()
        request = None if self._exhausted else next(self._source, None)
        self._exhausted = request is None
        return request

    def _send(self) -> Iterator[Reply]:
        """Answer what is on disk, remember what is open, and put the rest into batches while there is room."""
        while (request := self._next()) is not None:
            name = custom_id(request)
            if name in self._shelf:
                yield self._shelf.reply(name, request)
                self._shelf.done(name)
            elif name in self._open:
                self._held[name] = request
            elif self._has_room():
                yield from self._add(name, request)
            elif self._config.batch.wait or not self._shelf:
                self._again.appendleft(request)
                return
            # else: no room and no waiting, but a later request may have its reply on disk
        self._submit()

    def _has_room(self) -> bool:
        return self._file is not None or len(self._state.in_phase("submitted")) < self._room

    def _add(self, name: str, request: Request) -> Iterator[Reply]:
        """Write a request into the file of the next batch; a file that is full goes out first."""
        if name in self._held:
            return  # the same request twice in one run: one answer
        try:
            body = request_body(request, self._model, self._config, self._picture(request), dialect=self._dialect)
        except DataError as error:
            yield failed(request, str(error), own_fault=True)
            return
        if self._file is None:
            self._file = RequestFile(self._state.folder, self._most, self._config.batch.megabytes * 1_000_000)
        try:
            is_in = self._file.add(name, body)
        except ValueError as error:
            yield failed(request, str(error), own_fault=True)
            return
        if is_in:
            self._held[name] = request
        else:
            self._again.appendleft(request)
            self._submit()

    def _picture(self, request: Request) -> str | None:
        if not request.image_path:
            return None
        if self._image[0] != request.image_path:  # both texts of an image follow each other
            remote = self._config.remote
            url = data_url(request.image_path, remote.image_side, remote.image_quality)
            self._image = (request.image_path, url)
        return self._image[1]

    def _submit(self) -> None:
        """Hand the written file over: exactly one batch, whatever is cut in between."""
        file, self._file = self._file, None
        if file is None:
            return
        try:
            if not file.custom_ids:
                return
            log.info("caption: images go to %s in a batch, model %s", self._host, self._model)
            batch = self._state.intend(file.custom_ids, self._host, structured=self._dialect.structured)
            try:
                batch.file_id = self._service.upload(file.stream, request_file_name(batch))
            except Refused:
                self._state.note(batch, "dropped")  # or a service without batches would lock the folder
                raise
        finally:
            file.close()
        self._state.note(batch, "uploaded", file_id=batch.file_id)
        try:
            remote = self._service.create(batch.file_id, batch.id, batch.started)
        except QueueFull as problem:
            self._shrink(batch, str(problem))
            return
        except Refused:
            self._service.delete_file(batch.file_id)
            self._state.note(batch, "dropped")
            raise
        self._state.note(batch, "submitted", batch_id=remote.id, status=remote.status)
        self._open.update(batch.custom_ids)
        log.info("caption: batch %s: %d requests submitted", batch.batch_id, len(batch.custom_ids))

    def _shrink(self, batch: Batch, problem: str) -> None:
        """Send the requests of a batch that found the provider's queue full again: later, or in smaller batches."""
        names = batch.custom_ids
        self._service.delete_file(batch.file_id)
        others = len([one for one in self._state.in_phase("submitted") if one is not batch])
        if others:
            self._room = others
            self._state.note(batch, "dropped", status="failed")
        else:
            self._most = max(1, len(names) // 2)
            self._state.note(batch, "dropped", status="failed", limit=max(self._most, _SMALLEST_REMEMBERED))
        self._open.difference_update(names)
        again = [self._held.pop(name) for name in names if name in self._held]
        for request in again:
            if len(names) == 1 or custom_id(request) in self._promised:
                self._shelf.explain(custom_id(request), f"the batch was refused: {problem}")
        self._again.extendleft(reversed(again))
        plan = f"at most {self._room} at a time" if others else f"at most {self._most} requests in one"
        log.warning("caption: the provider takes no more for now, so batches go out again, %s: %s", plan, problem)

    # Fetching

    def _collect(self) -> Iterator[Reply]:
        """Look at every open batch once and yield what the ended ones brought."""
        for batch in self._state.in_phase("submitted"):
            remote = self._service.retrieve(batch.batch_id)
            if (counts := remote.request_counts) is not None:
                self._counts[batch.id] = (counts.completed or 0, counts.failed or 0, counts.total or 0)
            if remote.status != batch.status:
                self._state.note(batch, "submitted", status=remote.status)
                log.info("caption: batch %s: %s, %s", batch.batch_id, remote.status, self._progress([batch]))
            if remote.status == "failed":
                yield from self._refused(batch, remote)
            elif remote.status in _ENDED:
                yield from self._fetch(batch, remote)

    def _fetch(self, batch: Batch, remote: "RemoteBatch") -> Iterator[Reply]:
        """Bring the replies to the disk, then hand them over; the state says so after the last one was stored."""
        names = batch.custom_ids
        found = download(batch, remote, self._state, self._service, self._config.remote.backoff_s)
        self._service.delete_file(batch.file_id)  # before the state says so: a kill must not leave the images there
        self._state.note(batch, "downloaded", status=remote.status, replies=len(found))
        self._fresh.add(batch.id)
        self._open.difference_update(names)
        self._shelf.add(batch, found)
        for name in names:
            request = self._held.pop(name, None)
            if name not in found:
                if self._is_over(name, remote.status, held=request is not None):
                    why = f"the batch ({remote.status}) brought no reply to this request; the next run asks again"
                    self._shelf.explain(name, why, own_fault=remote.status != "completed")
                else:
                    self._resent.add(name)
                    self._again.extend([] if request is None else [request])
            yield from self._hand_over(name, request)

    def _hand_over(self, name: str, request: Request | None) -> Iterator[Reply]:
        """The reply to a request that waits for it; others wait on disk for theirs."""
        if request is not None and name in self._shelf:
            yield self._shelf.reply(name, request)
            self._shelf.done(name)

    def _is_over(self, name: str, status: str, *, held: bool) -> bool:
        """Whether this run asks no more for what an ended batch brought no reply to."""
        # Someone who cancelled does not want it sent again; a batch that expires twice will expire again; and nobody
        # asked the budget about what was taken for paid.
        return status != "expired" or name in self._resent or (held and name in self._promised)

    def _refused(self, batch: Batch, remote: "RemoteBatch") -> Iterator[Reply]:
        """A batch that the provider did not begin: nothing was paid."""
        told = [_one_line(error) for error in ((remote.errors and remote.errors.data) or [])[:3]]
        problem = self._service.redact("; ".join(told)) or "no reason was given"
        if is_queue_full(problem):
            self._shrink(batch, problem)
            return
        names = batch.custom_ids
        self._service.delete_file(batch.file_id)
        self._state.note(batch, "dropped", status="failed")
        self._open.difference_update(names)
        if any(word in problem for word in _DEAD):
            raise RemoteError(f"The batch was refused: {problem}.", hint="Stored replies are kept; run it again later.")
        log.warning("caption: batch %s with %d requests was refused: %s", batch.batch_id, len(names), problem)
        for name in names:
            self._shelf.explain(name, f"the batch was refused: {problem}")
            yield from self._hand_over(name, self._held.pop(name, None))

    def _settle(self) -> None:
        """Put aside what no request of this run asked for: paid replies are kept for a run that does."""
        if not self._exhausted:
            return
        self._shelf.forget_stored(self._state.in_phase("downloaded"))
        left = self._state.in_phase("downloaded")
        for batch in left:
            self._state.note(batch, "aside")
        if count := sum(self._shelf.left(batch) for batch in left if batch.id in self._fresh):
            told = "caption: %d fetched replies belong to no request of this run (other prompt or settings); kept in %s"
            log.warning(told, count, self._state.folder)
        if unwanted := self._state.in_phase("submitted"):
            log.info("caption: %d batches are open; the same command fetches them", len(unwanted))

    def _report(self) -> None:
        batches = self._state.in_phase("submitted")
        if not batches or time.monotonic() - self._told < _REPORT_S:
            return
        self._told = time.monotonic()
        minutes = int(time.time() - min(batch.started for batch in batches)) // 60
        log.info(
            "caption: waiting for %s%s: %s, %d:%02d h. Ctrl-C is safe: the same command goes on from here",
            ", ".join(batch.batch_id for batch in batches[:3]),
            f" and {len(batches) - 3} more" if len(batches) > 3 else "",
            self._progress(batches),
            *divmod(minutes, 60),
        )

    def _progress(self, batches: list[Batch]) -> str:
        known = [self._counts.get(batch.id, (0, 0, 0)) for batch in batches]
        done, bad, total = (sum(column) for column in zip(*known, strict=True))
        return f"{done} of {total} done, {bad} failed"


def _one_line(error: "BatchError") -> str:
    place = f" (line {error.line})" if error.line is not None else ""
    return f"{error.code or 'error'}: {error.message or 'no message'}{place}"
