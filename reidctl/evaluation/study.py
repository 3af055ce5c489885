"""What a study file says: conditions, seeds, measures, claims; read with the nearest valid key in every complaint."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from reidctl.config import SECTIONS, Section, merge, parse_section
from reidctl.errors import UsageError
from reidctl.evaluation.claims import Claim
from reidctl.evaluation.protocols import JOINT

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
ANALYSES = (
    *("probes", "dependence", "clones", "compactness", "tsne", "gates", "efficiency", "architecture"),
    *("attention", "cam", "pseudo", "words", "alarms"),
)


# Named here because a study is read before the modules that know them are loaded; a test holds them together.
EXPLAINERS = ("ppim", "patch", "cls", "rollout", "chefer", "gradcam", "slots", "centre", "random")
MAP_TESTS = (
    *("grounding", "concentration", "masking", "curves", "specificity"),
    *("alignment", "sanity", "stability", "binding"),
)
CONTROLS = ("random", "block", "centre", "least", "phrase", "query", "shifted", "pooled")


class Explained(Section):
    """What is explained of every trained model, and how the maps are tested.

    Attributes:
        samples: captions.
        explainers: as `interpret --explainer`; those that a method lacks are left out.
        what: as `interpret --what`.
        fractions: shares of patches that are removed.
        fills, controls, level: as in `interpret`.
        encoder: as `interpret --encoder`; `start` is the model that the training started from, `other-start` one that
            was trained like it on other people from another seed.
    """

    samples: Annotated[int, Field(ge=1)] = 100
    explainers: tuple[str, ...] = ("all",)
    what: tuple[str, ...] = ("grounding", "concentration")
    fractions: tuple[float, ...] = (0.2,)
    fills: tuple[str, ...] = ("mean",)
    controls: tuple[str, ...] = ()
    level: Literal["caption", "phrase"] = "caption"
    encoder: str | None = None

    @field_validator("explainers", "what", "controls")
    @classmethod
    def _known(cls, names: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = {"explainers": ("all", *EXPLAINERS), "what": ("all", *MAP_TESTS), "controls": CONTROLS}[
            str(info.field_name)
        ]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"`{unknown[0]}` is not known; one of: {', '.join(known)}")
        return names

    @field_validator("fractions")
    @classmethod
    def _shares(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or not all(0 < value <= 1 for value in values):
            raise ValueError("shares to remove lie above 0 and at most at 1")
        return values


class Measures(Section):
    """What is measured of every trained model, on test people.

    Attributes:
        query: what a text query is, as in `evaluate --query`.
        settings: robustness settings, as in `evaluate --setting`.
        analyses: as in `analyse --what`.
        features: as in `analyse --features`.
        elsewhere: further datasets by name: a `synth` section over the condition's, as `cross.t2i.mAP` in `measure`.
        rerank: as in `evaluate --rerank`.
        joint: as `evaluate --joint`, as `joint.t2i.mAP`; the conditions need people of two datasets.
        interpret: as the flags of `interpret`, as `maps.ppim.iou`, `maps.ppim.mAP_drop@0.2-random`; None: not measured.
    """

    query: Literal["caption", "identity+clothing", "identity", "clothing"] = "caption"
    settings: tuple[str, ...] = ()
    analyses: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    elsewhere: dict[str, dict[str, Any]] = Field(default_factory=dict)
    rerank: tuple[str, ...] = ()
    joint: bool = False
    interpret: "Explained | None" = None

    @field_validator("analyses")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in ANALYSES]
        if unknown:
            raise ValueError(f"unknown analysis `{unknown[0]}`; one of: {', '.join(ANALYSES)}")
        return names

    @model_validator(mode="after")
    def _distinct(self) -> "Measures":
        if self.joint and JOINT in self.elsewhere:
            raise ValueError(f"a dataset elsewhere cannot be called `{JOINT}` where `joint` is measured")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What was measured before there was `joint` keeps its fingerprint."""
        values: dict[str, Any] = write(self)
        return {name: value for name, value in values.items() if name not in ("joint", "interpret") or value}


class Condition(Section):
    """One way to train.

    Attributes:
        label: what people read; default: the condition's name.
        row: the row that papers print for it: one name for all, or one per paper.
        set: recipe sections, over the study's own.
        method: a method or shipped recipe; default: the study's.
        measure: instead of the study's.
        x: its place on the horizontal axis of a curve.
    """

    label: str = ""
    row: str | dict[str, str] = ""
    set: dict[str, Any] = Field(default_factory=dict)
    method: str | None = None
    measure: Measures | None = None
    x: float | None = None

    def printed_row(self, paper: str) -> str:
        """The name of the row in a paper's table; empty if it has none."""
        return self.row if isinstance(self.row, str) else self.row.get(paper, "")


class Column(Section):
    """A column of the table.

    Attributes:
        measure: a dotted name.
        title: its heading; default: the name.
        unit: `percent` shows fractions in per cent, `number` as they are.
        scale: factor before a `number` is shown, as 1e-6 for millions.
        digits: after the point.
    """

    measure: str
    title: str = ""
    unit: Literal["percent", "number"] = "percent"
    scale: float = 1.0
    digits: int = Field(default=1, ge=0, le=6)


class Drawing(Section):
    """The study's figure.

    Attributes:
        kind: `bars` of the conditions, a `curve` over their `x`, or a `radar` (every measure min-max scaled).
        measures: what is drawn; default: the table's.
        names: short names of the measures, where their titles are too long for the figure.
        without: conditions that are not drawn.
        costs: of a radar, the measures that are better when smaller.
        axis: the name of `x`.
    """

    kind: Literal["bars", "curve", "radar", "none"] = "bars"
    measures: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    costs: tuple[str, ...] = ()
    axis: str = ""


class Study(Section):
    """A study: the same data and seeds for every condition, one table, claims.

    Attributes:
        about: one sentence.
        base: another study file whose keys lie underneath, relative to this one.
        method: a method or shipped recipe.
        recipe: recipe sections of every condition (`synth`, `caption`, `method`, `backbone`, `train`, `data`).
        start: a whole recipe (with `seed`, `synth`, `method`, ...) of a training whose towers all conditions start
            from; trained once.
        seeds: each renders people of its own and trains with itself as seed.
        conditions: by name.
        measure: see `Measures`.
        table: its columns.
        published: which table each paper prints, by paper.
        claims: what is tested.
        draw: the figure.
        notes: sentences that readers of the result need.
    """

    about: str
    base: Path | None = None
    method: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    start: dict[str, Any] | None = None
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    conditions: dict[str, Condition]
    measure: Measures = Measures()
    table: tuple[Column, ...] = (Column(measure="t2i.rank1", title="rank-1"), Column(measure="t2i.mAP", title="mAP"))
    published: dict[str, str] = Field(default_factory=dict)
    claims: tuple[Claim, ...] = ()
    draw: Drawing = Drawing()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if not self.conditions:
            raise ValueError("a study needs conditions")
        for name, condition in self.conditions.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"condition `{name}`: names are lower-case letters, digits, - and _")
            _check_sections(condition.set, f"condition `{name}`")
        _check_sections(self.recipe, "recipe")
        for name, condition in self.conditions.items():
            people = merge(self.recipe, condition.set).get("synth", {})
            if (condition.measure or self.measure).joint and people.get("domain") != "both":
                raise ValueError(f"condition `{name}`: `measure.joint` needs `synth.domain: both`")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be different numbers from 0, got {list(self.seeds)}")
        for claim in self.claims:
            unknown = [name for name, _ in claim.needs if name not in self.conditions]
            if unknown:
                raise ValueError(f"the claim `{claim.say}` names `{unknown[0]}`, which is no condition")
        drawn = [condition for name, condition in self.conditions.items() if name not in self.draw.without]
        if self.draw.kind == "curve" and any(condition.x is None for condition in drawn):
            raise ValueError("a curve needs `x` in every condition")
        if self.draw.names and len(self.draw.names) != len(self.draw.measures):
            raise ValueError("draw.names needs one name per measure of draw.measures")
        return self


def _check_sections(sections: Mapping[str, Any], where: str) -> None:
    allowed = [name for name in SECTIONS if name not in ("about", "seed")]
    for name, values in sections.items():
        if name not in allowed:
            raise ValueError(f"{where}: unknown recipe section `{name}`; one of: {', '.join(allowed)}")
        if not isinstance(values, dict):
            raise ValueError(f"{where}: section `{name}` must hold settings as `key: value`")


def load_study(path: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """Return the study that a YAML file describes, with its `base` files underneath and `changes` above.

    Raises:
        UsageError: no such file, invalid YAML, an unknown key, a claim about nothing, or bases that form a circle.
    """
    return parse_section(Study, merge(_read(path, ()), changes or {}), "study")


def study_name(path: Path) -> str:
    """Return what a study's results are called: the file's name without ending.

    Raises:
        UsageError: the name cannot be a folder of its own.
    """
    name = path.stem.lower().replace(" ", "-")
    if not _NAME.fullmatch(name):
        raise UsageError(f"`{path.name}` is no name for results.", hint="Use letters, digits, - and _.")
    return name


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in above:
        raise UsageError(f"Study {path} lies on top of itself (`base`).")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"No study file {path}.", hint="Studies are YAML files, as in pipelines/studies/.") from None
    except UnicodeDecodeError:
        raise UsageError(f"Study {path} is not a text file.") from None
    except yaml.YAMLError as error:
        raise UsageError(f"Study {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise UsageError(f"Study {path} must be a mapping of keys.")
    base = content.get("base")
    if not isinstance(base, str):
        return content
    return merge(_read(path.parent / base, (*above, path.resolve())), content)
