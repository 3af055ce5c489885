"""What has been spent, what is in flight, and whether one more request may be sent."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Protocol

from reidctl.captioning.backends.base import Key, Reply, Request
from reidctl.captioning.journal import Index
from reidctl.console import log


class Priced(Protocol):
    """A price per token; `pricing.Price` is one."""

    def cost(self, tokens_in: int, tokens_out: int, *, batch: bool = False) -> float:
        """Return the price of so many tokens."""
        ...


class Ledger:
    """Requests in flight and the money they may cost.

    A request is let through only while spent + reserved for those in flight + its own upper bound stays within
    `max_cost`. A reply frees its reservation and adds what it really cost; one that was dearer than the bound raises
    the bound, so that a server which counts otherwise than the table can overdraw by what is in flight, once.

    Args:
        price: of the model that is asked; None where it is not known.
        most: tokens in and out that one request takes at most.
        max_cost: in the price table's currency; None for no bound.
        batch: whether the batch price applies.
        price_of: the price of a model that was asked earlier; default: `price` for all.
    """

    def __init__(
        self,
        price: Priced | None = None,
        *,
        most: tuple[int, int] = (0, 0),
        max_cost: float | None = None,
        batch: bool = False,
        price_of: Callable[[str], Priced | None] | None = None,
    ) -> None:
        self._price_of = price_of or (lambda model: price)
        self.price = price
        self.batch = batch
        self.spent = 0.0
        self.stopped = False
        self.guessed = False
        self._most = most
        self._bound = 0.0 if price is None else price.cost(*most, batch=batch)
        self._max_cost = max_cost
        self._flying: dict[Key, Request] = {}

    @property
    def flying(self) -> list[Request]:
        """Requests let through and not answered yet."""
        return list(self._flying.values())

    def pay_for(self, stored: Index) -> None:
        """Count what every reply in the folder cost: at today's price of the model that wrote it."""
        for (usage, way), count in stored.tokens.items():
            price = self._price_of(usage.model) if usage.model else self.price
            if price is not None:
                sent, received = (count, 0) if way == "in" else (0, count)
                self.spent += price.cost(sent, received, batch=usage.batch)

    def affordable(
        self, requests: Iterable[Request], paid: Callable[[Request], bool] | None = None
    ) -> Iterator[Request]:
        """Yield requests while the budget lasts; `stopped` tells whether it ended early.

        Args:
            requests: in order.
            paid: tells which ones cost no more: they go through even when the budget is spent.
        """
        for request in requests:
            ahead = self._bound * (len(self._flying) + 1)
            over = self._max_cost is not None and self.spent + ahead > self._max_cost
            if over and not (paid and paid(request)):
                self.stopped = True
                if paid is None:
                    return
                continue
            self._flying[request.key] = request
            yield request

    def settle(self, reply: Reply) -> None:
        """Take a reply's request out of flight and add what it cost."""
        self.release(reply.request)
        if self.price is not None:
            cost = self.price.cost(reply.tokens_in, reply.tokens_out, batch=self.batch)
            self.spent += cost
            self._bound = max(self._bound, cost)

    def counted(self, reply: Reply) -> Reply:
        """Return the reply with tokens: where a paid service does not say how many it counted, the most is assumed."""
        silent = reply.status != "failed" and not (reply.tokens_in or reply.tokens_out)
        if not silent or not self._bound:
            return reply
        if not self.guessed:
            log.warning("caption: the server does not count its tokens; the most that a request can take is assumed")
        self.guessed = True
        return replace(reply, tokens_in=self._most[0], tokens_out=self._most[1])

    def release(self, request: Request) -> None:
        """Take a request out of flight without a reply."""
        self._flying.pop(request.key, None)
