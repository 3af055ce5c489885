"""Stops a training whose losses or gradients are not finite, and says in which batch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reidctl import parallel, tables
from reidctl.batch import Batch
from reidctl.errors import DataError


@dataclass(frozen=True)
class _Seen:
    """Values of one step that nobody has looked at yet."""

    names: Sequence[str]
    finite: Tensor
    values: Sequence[Tensor]
    epoch: int
    step: int
    image_id: Sequence[str]
    text_id: Sequence[str]


class Watch:
    """Looks whether numbers are finite: at once on a CPU, and every few steps on a GPU, which nobody waits for.

    Between two looks steps with a gradient that is not finite may change the weights of a GPU; they are never saved or
    validated, because `settle` comes first.

    Args:
        folder: where `not_finite.json` names the batch.
        device: where the numbers are.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._unseen: list[_Seen] = []

    def look(self, values: Mapping[str, Tensor], batch: Batch, epoch: int, step: int) -> None:
        """Note numbers of a step; on a CPU look at them.

        Raises:
            DataError: one is not finite.
        """
        if not values:
            return
        finite = torch.stack([torch.isfinite(value.detach()).all() for value in values.values()])
        kept = [value.detach() for value in values.values()]
        self._unseen.append(_Seen(list(values), finite, kept, epoch, step, batch.image_id, batch.text_id))
        if self.device.type == "cpu":
            self.settle()

    def settle(self) -> None:
        """Look at everything noted since the last time.

        Raises:
            DataError: something was not finite; the first such step is told.
        """
        unseen, self._unseen = self._unseen, []
        if not unseen or bool(torch.stack([seen.finite.all() for seen in unseen]).all()):
            return
        first = next(seen for seen in unseen if not bool(seen.finite.all()))
        bad = next(name for name, fine in zip(first.names, first.finite.tolist(), strict=True) if not fine)
        self._stop(first, bad)

    def _stop(self, seen: _Seen, bad: str) -> None:
        # All processes see the same numbers and stop together: the batch is that of all of them.
        pairs = parallel.everyone([list(seen.image_id), list(seen.text_id)])
        image_id, text_id = ([name for own in pairs for name in own[kind]] for kind in (0, 1))
        path = self.folder / "not_finite.json"
        facts: dict[str, Any] = {
            "epoch": seen.epoch,
            "step": seen.step,
            "losses": {name: str(float(value)) for name, value in zip(seen.names, seen.values, strict=True)},
            "image_id": image_id,
            "text_id": text_id,
        }
        if parallel.is_first():
            tables.write_text(path, json.dumps(facts, indent=2) + "\n")
        raise DataError(
            f"`{bad}` is not finite at step {seen.step} (epoch {seen.epoch + 1}), in the batch that starts with "
            f"image `{image_id[0] if image_id else '?'}`; the whole batch is listed in {path}.",
            hint="Lower train.lr or set train.clip_grad_norm; with other settings the training starts over.",
        )
