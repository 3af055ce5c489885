"""How many requests are under way to a service, and how fast they follow each other."""

import asyncio
import random
import time
from dataclasses import dataclass

from reidctl.captioning.config import RemoteConfig
from reidctl.console import log


@dataclass
class Spent:
    """What a request has used up: tries, and since when it hears 429."""

    tries: int = 0
    busy_since: float | None = None


class Gate:
    """Lets requests out, in their order, no more and no faster than the service has shown to take.

    A refusal holds everybody back for a while and lowers both bounds: the number in flight to a half (from the full
    one to a quarter), and the pace to that of the answers since the last refusal. Each good answer raises them a
    little: one more in flight per round of answers, one percent more often.
    """

    def __init__(self, remote: RemoteConfig) -> None:
        self._remote, self._most = remote, remote.concurrency
        self._width = float(self._most)
        self._gap = 0.0  # seconds between two requests
        self._out = self._good = self._refusals = 0
        self._since = time.monotonic()
        self._slowed = self._quiet_until = self._next = 0.0
        self._busy_since: float | None = None
        self._closed = False
        self._turn = asyncio.Lock()  # who has it is the next one out
        self._freed = asyncio.Event()

    async def __aenter__(self) -> float:
        """Wait; return the time of going out."""
        async with self._turn:
            while not self._closed:
                now = time.monotonic()
                if (pause := max(self._quiet_until, self._next) - now) > 0:
                    await asyncio.sleep(pause)
                elif self._out < int(self._width):
                    self._out += 1
                    self._next = now + self._gap
                    return now
                else:
                    self._freed.clear()
                    await self._freed.wait()
            raise asyncio.CancelledError

    async def __aexit__(self, kind: object, *_: object) -> None:
        self._out -= 1
        self._freed.set()
        if kind is None:
            self._good += 1
            self._refusals, self._busy_since = 0, None
            self._width = min(self._most, self._width + 1 / self._width)
            self._gap *= 0.99

    def hold(self, asked: float | None, sent: float, *, busy: bool = False) -> None:
        """Let nobody out for a while: as long as the service asked, longer where it keeps refusing everybody.

        Args:
            asked: seconds; None where it named none.
            sent: when the refused request went out. Of those that were out together one tells it all.
            busy: it was a 429.
        """
        now, pause = time.monotonic(), asked or 0.0
        if busy:
            self._busy_since = self._busy_since or now
        if sent >= self._slowed:
            self._refusals += 1
            pause = max(pause, backoff(self._remote, self._refusals), 0.05)
            self._slow_down(now, pause)
            if pause >= 5:
                log.info("caption: the service is busy, we wait %.0f s", pause)
        self._quiet_until = max(self._quiet_until, now + pause)

    def _slow_down(self, now: float, pause: float) -> None:
        self._width = max(1.0, self._width / (4 if self._width >= self._most else 2))
        if self._good:
            # Bounded, for the time may have passed without anything to send.
            self._gap = min((now - self._since) / self._good, pause)
            self._good, self._since = 0, now
        self._slowed = now

    def is_worth_waiting(self, spent: Spent) -> bool:
        """Return whether a request that hears 429 may go on, and note since when it does.

        One that has heard nothing else for as long as all tries and pauses may take gives up; so does every one while
        the service has answered nobody for so long.
        """
        now = time.monotonic()
        spent.busy_since = spent.busy_since or now
        return now - min(spent.busy_since, self._busy_since or now) < self._remote.attempts * self._remote.max_wait_s

    def close(self) -> None:
        """Let nobody out any more."""
        self._closed = True


def backoff(remote: RemoteConfig, tries: int) -> float:
    """Return the pause after so many tries: it doubles, and is never quite the same."""
    longest: float = min(remote.max_wait_s, remote.backoff_s * 2.0 ** min(tries - 1, 30))
    return longest * random.uniform(0.5, 1.0)
