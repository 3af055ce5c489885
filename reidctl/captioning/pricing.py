"""What a model's tokens cost: a table that ships with reidctl, and the user's over it."""

import ipaddress
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt
import yaml

from reidctl.captioning.config import CaptionConfig
from reidctl.errors import DataError

Ints = npt.NDArray[np.int64]

_MAX_BYTES = 1 << 20
_MAX_DEPTH = 8
_TABLE_KEYS = ("currency", "date", "batch", "models")
_PRICE_KEYS = ("input", "output", "batch", "image")
_RULES: dict[str, tuple[str, ...]] = {
    "tiles": ("base", "tile"),
    "patches": ("cap", "multiplier"),
    "pixels": ("side", "cap"),
    "none": (),
}
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_TILE, _PATCH, _LONG, _SHORT = 512, 32, 2048, 768
# A side that is a whole number of squares but for rounding must not begin another one.
_ROUNDING = 1e-9
_RECORDED, _HERE = ("replay", "file"), ("command", "hf")
_PRIVATE_NAMES = (".localhost", ".local", ".internal", ".lan", ".home.arpa")


@dataclass(frozen=True)
class ImageRule:
    """How the tokens of an image are counted; prices.yaml describes the rules.

    Attributes:
        rule: `tiles`, `patches`, `pixels` or `none`.
        base, tile: tokens of a `tiles` image, and of each of its tiles.
        cap, multiplier: most patches of a `patches` image, and tokens per patch; `pixels` has a cap too.
        side: of a square of a `pixels` image.
    """

    rule: str = "none"
    base: float = 0.0
    tile: float = 0.0
    cap: float = math.inf
    multiplier: float = 1.0
    side: float = 1.0

    def tokens(self, widths: npt.ArrayLike, heights: npt.ArrayLike, detail: str) -> Ints:
        """Return the tokens of images, rounded up.

        Args:
            widths, heights: in pixels, as they are sent; any equal shapes.
            detail: `low`, `high` or `auto`, which is taken as `high`; only `tiles` tells them apart.
        """
        width, height = np.asarray(widths, np.float64), np.asarray(heights, np.float64)
        if self.rule == "none":
            found = np.zeros(width.shape)
        elif self.rule == "tiles":
            found = self.base + (0.0 if detail == "low" else self.tile) * _tiles(width, height)
        elif self.rule == "patches":
            # Above the cap the provider shrinks the image until it fits, to at most so many patches.
            found = np.minimum(_squares(width, height, _PATCH), self.cap) * self.multiplier
        else:
            found = np.minimum(_squares(width, height, self.side), self.cap)
        return np.asarray(np.ceil(found - _ROUNDING), np.int64)


@dataclass(frozen=True)
class Price:
    """The price of one model.

    Attributes:
        name: the row of the table: a model's name, or the start of names and `*`.
        input, output: per 1,000,000 tokens.
        batch: factor of both for the Batch API.
        image: how the tokens of images are counted.
    """

    name: str
    input: float
    output: float
    batch: float = 1.0
    image: ImageRule = ImageRule()

    def cost(self, tokens_in: float, tokens_out: float, *, batch: bool = False) -> float:
        """Return the price of so many tokens, in the table's currency."""
        price = (tokens_in * self.input + tokens_out * self.output) / 1_000_000
        return price * self.batch if batch else price

    def image_tokens(self, width: int, height: int, detail: str) -> int:
        """Return the tokens of one image of this size, as it is sent."""
        return int(self.image.tokens(width, height, detail))


FREE = Price("(no charge)", 0.0, 0.0)


@dataclass(frozen=True)
class Prices:
    """A price table.

    Attributes:
        currency: of all prices.
        date: what the table says of its age; of the user's table if that says it.
        rows: by lower-case name; a name that ends in `*` stands for all that begin so.
        under: the table to look in where this one has no row.
    """

    currency: str
    date: str
    rows: Mapping[str, Price]
    under: "Prices | None" = None

    def find(self, model: str, *, exact: bool = False) -> Price | None:
        """Return the price of a model: its own row, else the longest pattern that fits, else the table below's.

        Args:
            model: name, in any case.
            exact: leave patterns out.
        """
        name = model.lower()
        fitting = [] if exact else [row for row in self.rows if row.endswith("*") and name.startswith(row[:-1])]
        found = self.rows.get(name) or (self.rows[max(fitting, key=len)] if fitting else None)
        if found is None and self.under is not None:
            return self.under.find(model, exact=exact)
        return found


def load_prices(path: Path | None = None) -> Prices:
    """Return the shipped price table, or the user's over it.

    A row of the user's table takes precedence over every shipped row that fits the model. A table in another currency
    stands alone: prices in two currencies cannot be added.

    No environment variable names a table: what a run may spend is a setting, and settings are recorded with the run.

    Raises:
        DataError: the file cannot be read, is no such table, has an unknown key, or a price that is no number from 0.
    """
    text = (resources.files("reidctl.captioning") / "prices.yaml").read_text(encoding="utf-8")
    shipped = _Reader("prices.yaml", text, None).table()
    if path is None:
        return shipped
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES >> 20} MiB, so it is no price table.")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot read the price table {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"The price table {path} is not UTF-8 text.") from None
    return _Reader(str(path), text, shipped).table()


def price_of(prices: Prices, config: CaptionConfig, model: str) -> Price | None:
    """Return the price of the describer that `config` names: None if it is not known, `FREE` if nobody is paid.

    Nobody is paid for texts that are there already (`template`, `replay:`, `file:`); nor for those of a program or a
    model on this machine (`command:`, `hf:`), unless the table has a row with its full name; nor for those of a server
    on this machine or in a private network, unless the table has a row for the model.

    Args:
        prices: see `load_prices`.
        config: the `caption` section.
        model: `Describer.model`.
    """
    name, _, argument = config.mllm.partition(":")
    if config.mllm == "template" or (name in _RECORDED and argument):
        return FREE  # a replay bears the name of the model that was paid once
    here = name in _HERE and argument != ""
    found = prices.find(model, exact=here)
    if found is not None:
        return found
    base_url = config.remote.base_url or os.environ.get("OPENAI_BASE_URL")
    return FREE if here or (base_url is not None and is_private(base_url)) else None


def is_private(base_url: str) -> bool:
    """Return whether an address is on this machine or in a private network, judged by its text: nothing is resolved."""
    host = (urlsplit(base_url).hostname or "").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # A name without a dot is known to a private network only: `ollama`, `gpu-7`.
        return bool(host) and ("." not in host or host.endswith(_PRIVATE_NAMES))
    return address.is_private or address.is_loopback or address.is_link_local


def _squares(width: npt.NDArray[np.float64], height: npt.NDArray[np.float64], side: float) -> npt.NDArray[np.float64]:
    return np.asarray(np.ceil(width / side - _ROUNDING) * np.ceil(height / side - _ROUNDING))


def _tiles(width: npt.NDArray[np.float64], height: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Tiles of an image shrunk (never enlarged) to 2048 pixels, then to 768 on its short side."""
    scale = np.minimum(1.0, _LONG / np.maximum(np.maximum(width, height), 1.0))
    scale = scale * np.minimum(1.0, _SHORT / np.maximum(np.minimum(width, height) * scale, 1.0))
    return _squares(width * scale, height * scale, _TILE)


class _Reader:
    """Turns the text of a table into `Prices`; every complaint names the file, the line and the key."""

    def __init__(self, name: str, text: str, under: Prices | None) -> None:
        self._name = name
        self._under = under
        self._lines: dict[tuple[str, ...], int] = {}
        try:
            self._check_shape(text)
            self._note_lines(yaml.compose(text, Loader=yaml.SafeLoader), ())
            self._content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            what = getattr(error, "problem", None) or "damaged"
            raise DataError(f"The price table {name}{where} is not valid YAML ({what}).") from None
        except ValueError:
            raise DataError(f"The price table {name} is not valid YAML.") from None

    def _check_shape(self, text: str) -> None:
        """An alias could make a small file as large as one likes, and nesting takes the parser quadratic time."""
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                hint = "Put a name that begins with * in quotes."
                raise DataError(f"The price table {self._name} has an alias (`*name`).", hint=hint)
            if depth > _MAX_DEPTH:
                mark = event.start_mark
                where = f", line {mark.line + 1}" if mark else ""
                raise DataError(f"The price table {self._name}{where} is not valid: nested too deep.")

    def table(self) -> Prices:
        """Return the table, or raise DataError for the first thing wrong with it."""
        content = self._mapping(self._content, (), _TABLE_KEYS)
        models = self._mapping(content.get("models"), ("models",), None)
        currency = content.get("currency", self._under.currency if self._under else None)
        if not isinstance(currency, str) or not currency.strip():
            raise self._wrong(("currency",), "`currency` must be a text, e.g. USD")
        under = self._under if self._under and self._under.currency == currency else None
        batch = self._number(content, (), "batch") if "batch" in content else None
        rows = {}
        for model, row in models.items():
            price = self._price(model, row, batch, under)
            if price.name in rows:
                raise self._wrong(("models", model), "the model is there twice")
            rows[price.name] = price
        return Prices(currency, str(content.get("date", "undated")), rows, under)

    def _price(self, model: Any, row: Any, batch: float | None, under: Prices | None) -> Price:
        place = ("models", str(model))
        if not isinstance(model, str) or not model.strip() or "*" in model[:-1] or model == "*":
            raise self._wrong(place, "a model is a name, or how names begin and one `*`")
        row = self._mapping(row, place, _PRICE_KEYS)
        known = under.find(model.removesuffix("*")) if under else None
        if batch is None:
            batch = known.batch if known else 1.0
        return Price(
            name=model.strip().lower(),
            input=self._number(row, place, "input"),
            output=self._number(row, place, "output"),
            batch=self._number(row, place, "batch") if "batch" in row else batch,
            image=self._rule(row, place, known),
        )

    def _rule(self, row: Mapping[str, Any], place: tuple[str, ...], known: Price | None) -> ImageRule:
        if "image" not in row:
            if known is not None:
                return known.image
            raise self._wrong(place, "`image` is missing, e.g. {rule: tiles, base: 85, tile: 170} or {rule: none}")
        inner, place = row["image"], (*place, "image")
        name = inner.get("rule") if isinstance(inner, dict) else None
        if not isinstance(name, str) or name not in _RULES:
            raise self._wrong((*place, "rule"), f"`rule` must be one of {', '.join(_RULES)}")
        inner = self._mapping(inner, place, ("rule", *_RULES[name]))
        wanted = [key for key in _RULES[name] if key != "cap" or key in inner]
        numbers = {key: self._number(inner, place, key) for key in wanted}
        if numbers.get("side") == 0:
            raise self._wrong((*place, "side"), "`side` must be above 0")
        return ImageRule(name, **numbers)

    def _number(self, row: Mapping[str, Any], place: tuple[str, ...], key: str) -> float:
        if key not in row:
            raise self._wrong(place, f"`{key}` is missing")
        value = row[key]
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            value = float(value)  # YAML takes 1e-5 for a text
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong((*place, key), f"`{key}` must be a number (it is {value!r:.40})")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not (math.isfinite(number) and number >= 0):
            raise self._wrong((*place, key), f"`{key}` must be a number from 0 (it is {number})")
        if key == "batch" and number > 1:
            raise self._wrong((*place, key), f"`batch` is a share of the price, 1 at most (it is {number})")
        return number

    def _mapping(self, value: Any, place: tuple[str, ...], known: tuple[str, ...] | None) -> dict[Any, Any]:
        if not isinstance(value, dict) or not value:
            what = f"`{place[-1]}`" if place else "the table"
            raise self._wrong(place, f"{what} must hold settings as `key: value`")
        for key in value:
            if known is not None and key not in known:
                raise self._wrong((*place, str(key)), f"unknown key `{key!s:.40}`", f"Known: {', '.join(known)}.")
        return value

    def _wrong(self, place: tuple[str, ...], what: str, hint: str = "") -> DataError:
        while place and place not in self._lines:
            place = place[:-1]
        line = f", line {self._lines[place]}" if place in self._lines else ""
        model = f" (model {place[1]})" if len(place) > 1 else ""
        return DataError(f"The price table {self._name}{line}{model}: {what}.", hint=hint)

    def _note_lines(self, node: yaml.Node | None, place: tuple[str, ...]) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            inner = (*place, str(key.value))
            twice = inner in self._lines
            self._lines[inner] = key.start_mark.line + 1
            if twice:  # YAML would silently take the last one
                raise self._wrong(inner, f"`{key.value}` is there twice")
            self._note_lines(value, inner)
