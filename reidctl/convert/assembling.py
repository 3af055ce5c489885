"""From a published file to a method of ours."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reidctl.backbones.checkpoints import fill
from reidctl.backbones.weights import from_config
from reidctl.convert.heads import Heads, Told, read_heads
from reidctl.convert.names import Form, Renamed, form_of, rename
from reidctl.convert.reading import read
from reidctl.convert.towers import Asked, configure_towers
from reidctl.convert.words import LAST_NORM, WORDS, word_table
from reidctl.errors import DataError, UsageError
from reidctl.methods.base import Method, build_method

_WITHOUT_WORDS = ("clip-reid", "mta-clip")
"""Methods whose checkpoints lack the table of words."""


@dataclass(frozen=True)
class Converted:
    """A method with published weights.

    Attributes:
        method: in evaluation mode, float32.
        form: the code that the file is of.
        persons: number of training people; None: unknown.
        taken: number of tensors that were taken from the file.
        dropped: reasons by the names of tensors that were not.
        initial: names of tensors of ours that the file lacks; they have the values of an untrained model.
        notes: what had to be assumed, in sentences.
    """

    method: Method
    form: Form
    persons: int | None
    taken: int
    dropped: dict[str, str]
    initial: list[str]
    notes: list[str]


def convert(path: Path, *, form: str = "auto", asked: Asked, told: Told, words: Path | None = None) -> Converted:
    """Return the method that a published checkpoint is of, with its weights.

    Args:
        path: the file.
        form: one of `names.FORMS`, or `auto`.
        asked: of the towers.
        told: of people and cameras.
        words: another CLIP file, whose table of words is used where the checkpoint has none (CLIP-ReID).

    Raises:
        UsageError: an unknown form or model, or other people or cameras than the checkpoint has.
        DataError: a file that cannot be read safely, or whose tensors do not fit, with their numbers.
    """
    if asked.image_size is not None and min(asked.image_size) < 1:
        raise UsageError(f"An image of {asked.image_size[0]}x{asked.image_size[1]} pixels is none.")
    published = read(path)
    where = str(path)
    broken = [name for name, value in published.weights.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise DataError(f"{path} holds numbers that are not finite, in {len(broken)} tensors (first: {broken[0]}).")
    chosen = form_of(published.weights, form, where)
    renamed = rename(published.weights, chosen, where)
    weights, notes = _with_words(renamed, chosen, words, where)
    config, resampled, seen = configure_towers(weights, chosen, published, asked)
    heads = read_heads(chosen, {**weights, **resampled}, told, where)
    # What the file lacks starts the same way every time.
    torch.manual_seed(0)
    backbone = from_config(config.model_dump())
    method = build_method(chosen.method, heads.settings, backbone, heads.persons or 1, heads.roster)
    initial = _fill(method, heads, where)
    return Converted(
        method=method.eval(),
        form=chosen,
        persons=heads.persons,
        taken=len(renamed.weights),
        dropped=renamed.dropped,
        initial=initial,
        notes=[*notes, *seen, *heads.notes, *_headless(chosen, heads)],
    )


def _headless(form: Form, heads: Heads) -> list[str]:
    """A note where a method with heads got none from the file: it retrieves, and trains on from nothing there."""
    if form.method == "clip" or any(not name.startswith("backbone.") for name in heads.weights):
        return []
    return [f"No head of {form.name} is in the file: is it a plain CLIP (--from open-clip or mllm4text)?"]


def _with_words(renamed: Renamed, form: Form, words: Path | None, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with a table of words, which CLIP-ReID's code does not save, and a note about it."""
    if WORDS in renamed.weights or LAST_NORM not in renamed.weights or form.method not in _WITHOUT_WORDS:
        if words is not None:
            raise UsageError(f"--words is for checkpoints without a table of words; {where} is none of them.")
        return renamed.weights, []
    table, note = word_table(renamed.weights, renamed.kept_aside, None if words is None else _words_of(words), where)
    return {**renamed.weights, WORDS: table}, [note]


def _words_of(path: Path) -> Tensor:
    """The table of words of a CLIP file."""
    published = read(path)
    form = form_of(published.weights, "auto", str(path))
    table = rename(published.weights, form, str(path)).weights.get(WORDS)
    if table is None:
        raise DataError(f"{path} has no table of words either.", hint="Give a file of a whole CLIP.")
    return table


def _fill(method: Method, heads: Heads, where: str) -> list[str]:
    """Copy all tensors into the method, and return the names of those that keep their first values."""
    own = method.state_dict()
    initial = [name for name in own if name not in heads.weights and name.startswith(heads.allowed)]
    try:
        fill(method, {**heads.weights, **{name: own[name] for name in initial}}, where)
    except DataError as error:
        raise DataError(error.message, hint="Give --from, --model or --image-size if they were read wrongly.") from None
    return initial
