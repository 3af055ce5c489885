"""What has been spent, what is in flight, and whether one more request may be sent."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from reidctl.captioning.backends.base import Key, Reply, Request
from reidctl.captioning.journal import Index


class Priced(Protocol):
    """A price per token; `pricing.Price` is one."""

    def cost(self, tokens_in: int, tokens_out: int, *, batch: bool = False) -> float:
        """Return the price of so many tokens."""
        ...


class Ledger:
    """Requests in flight and the money they may cost.

    A request is let through only while spent + reserved for those in flight + its own upper bound stays within
    `max_cost`. A reply frees its reservation and adds what it really cost.

    Args:
        price: of the model; None where it is not known or costs nothing.
        bound: upper bound of one request's price.
        max_cost: in the price table's currency; None for no bound.
        batch: whether the batch price applies.
    """

    def __init__(
        self, price: Priced | None = None, *, bound: float = 0.0, max_cost: float | None = None, batch: bool = False
    ) -> None:
        self.price = price
        self.batch = batch
        self.spent = 0.0
        self.stopped = False
        self._bound = bound
        self._max_cost = max_cost
        self._flying: dict[Key, Request] = {}

    @property
    def flying(self) -> list[Request]:
        """Requests let through and not answered yet."""
        return list(self._flying.values())

    def pay_for(self, stored: Index) -> None:
        """Count what every reply in the folder cost, at today's price."""
        if self.price is None:
            return
        for (usage, way), count in stored.tokens.items():
            sent, received = (count, 0) if way == "in" else (0, count)
            self.spent += self.price.cost(sent, received, batch=usage.batch)

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
            self.spent += self.price.cost(reply.tokens_in, reply.tokens_out, batch=self.batch)

    def release(self, request: Request) -> None:
        """Take a request out of flight without a reply."""
        self._flying.pop(request.key, None)
