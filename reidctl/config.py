"""Recipes: sections of settings from YAML and `--set`, with the nearest valid key in every complaint."""

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from reidctl.errors import UsageError

S = TypeVar("S", bound="Section")

SECTIONS = (
    "about",
    "seed",
    "synth",
    "caption",
    "phrases",
    "backbone",
    "method",
    "data",
    "prompt",
    "train",
    "index",
    "search",
    "evaluate",
    "interpret",
    "report",
)


class Section(BaseModel):
    """A group of settings: frozen, typed, and closed to keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, checked again."""
        return type(self).model_validate({**self.model_dump(), **changes})


def parse_section(cls: type[S], values: Mapping[str, Any] | None, where: str) -> S:
    """Return `values` as a `cls`, or say which key is wrong, why, and what was probably meant.

    Args:
        cls: the section to build.
        values: the mapping from a recipe; None means all defaults.
        where: how the section is called in messages, e.g. `train`.

    Raises:
        UsageError: an unknown key, a value of the wrong type or out of its range.
    """
    try:
        return cls.model_validate(dict(values or {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in (where, *first["loc"]))
        if first["type"] == "extra_forbidden":
            owner, known = _known_keys(cls, first["loc"])
            raise UsageError(f"Unknown setting `{key}`.", hint=_nearest(str(first["loc"][-1]), known, owner)) from None
        # Where a key belongs near a setting, people paste it into that setting: it is not repeated.
        got = "" if key.endswith(("base_url", "key_env", "extra")) else f" (got {first['input']!r})"
        raise UsageError(f"Setting `{key}`: {first['msg'].removeprefix('Value error, ')}{got}.") from None


def _known_keys(cls: type[Section], location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """The valid keys beside the unknown one, following nested sections."""
    owner: type[BaseModel] = cls
    for part in location[:-1]:
        field = owner.model_fields.get(str(part))
        if field is None:
            continue  # a key of a mapping or a place in a list: what stands there is known already
        inner = _section_in(field.annotation)
        if inner is None:
            return cls.__name__, []
        owner = inner
    return owner.__name__, list(owner.model_fields)


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section that a field holds, also one by one in a list, a mapping or beside None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _section_in(part))), None)


def _nearest(key: str, known: Iterable[str], owner: str) -> str:
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean `{close[0]}`?"
    return f"Known settings: {', '.join(names)}." if names else ""


def load_recipe(source: str | Path | None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Return a recipe as nested dictionaries: a shipped one by name or a YAML file, with overrides applied.

    Args:
        source: the name of a shipped recipe, a path to a YAML file, or None for an empty recipe.
        overrides: texts `section.key=value`; the value is YAML (`1e-5`, `true`, `[1, 2]`).

    Raises:
        UsageError: no such recipe, invalid YAML, an unknown section, a malformed override.
    """
    recipe = _read_recipe(source) if source is not None else {}
    for override in overrides:
        _apply(recipe, override)
    for section in recipe:
        if section not in SECTIONS:
            raise UsageError(f"Unknown recipe section `{section}`.", hint=_nearest(str(section), SECTIONS, "recipe"))
        _check_section(section, recipe[section])
    return recipe


def _check_section(name: str, value: Any) -> None:
    if name == "seed":
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise UsageError(f"Setting `seed`: a whole number from 0 is needed (got {value!r}).")
    elif name != "about" and value is not None and not isinstance(value, dict):
        raise UsageError(f"Recipe section `{name}` must hold settings as `key: value` (got {value!r}).")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings with those of `above` over those of `below`; anything but a mapping is replaced whole."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def recipe_names() -> list[str]:
    """The recipes shipped with the package."""
    folder = resources.files("reidctl") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def _read_recipe(source: str | Path) -> dict[str, Any]:
    import yaml

    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UsageError(f"Recipe {source} is not a text file.", hint="Give a YAML file in UTF-8.") from None
    elif str(source) in recipe_names():
        text = (resources.files("reidctl") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        raise UsageError(f"No recipe `{source}`.", hint=f"Give a YAML file or one of: {', '.join(recipe_names())}.")
    try:
        recipe = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise UsageError(f"Recipe {source} is not valid YAML: {why}.", hint="Correct the file.") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"Recipe {source} must be a mapping of sections.")
    return recipe


def _apply(recipe: dict[str, Any], override: str) -> None:
    import yaml

    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UsageError(f"`--set {override}` is not of the form section.key=value.")
    *parents, last = key.strip().split(".")
    node = recipe
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UsageError(f"`--set {override}`: `{parent}` is a value, not a section.")
        node = child
    try:
        node[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"`--set {override}`: the value is not valid YAML.") from None
