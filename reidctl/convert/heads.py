"""What a checkpoint says about its method beside the towers: depth of heads, people, cameras, prompts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from reidctl.batch import Roster
from reidctl.convert.names import Form
from reidctl.errors import DataError, UsageError


@dataclass(frozen=True)
class Heads:
    """A method's settings and further tensors, from a checkpoint.

    Attributes:
        settings: the section `method`, without its name.
        persons: number of training people; None: the checkpoint does not say.
        roster: datasets and cameras, for methods that hold them.
        weights: all tensors by our names, some of them put into another order.
        allowed: beginnings of names that may be missing: they keep their first values.
        notes: what had to be assumed.
    """

    settings: dict[str, Any]
    persons: int | None
    weights: dict[str, Tensor]
    roster: Roster | None = None
    allowed: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Told:
    """What the user says about people and cameras.

    Attributes:
        persons: number of training people.
        cameras: `dataset/camera` in the order of the checkpoint's camera vectors.
    """

    persons: int | None = None
    cameras: tuple[str, ...] = ()


def read_heads(form: Form, weights: Mapping[str, Tensor], told: Told, where: str) -> Heads:
    """Return what the shapes of a checkpoint's heads say.

    Raises:
        UsageError: the user counts other people or cameras than the checkpoint has.
        DataError: heads that contradict each other.
    """
    heads = _READERS[form.method](dict(weights), where)
    if heads.persons is not None and told.persons not in (None, heads.persons):
        raise UsageError(f"--persons {told.persons}, but {where} classifies among {heads.persons} people.")
    return replace(_with_cameras(heads, told.cameras, where), persons=heads.persons or told.persons)


def _clip(weights: dict[str, Tensor], where: str) -> Heads:
    return Heads({}, None, weights)


def _rde(weights: dict[str, Tensor], where: str) -> Heads:
    return Heads({"width": _rows(weights, "tse_image.linear.weight", where)}, None, weights)


def _irra(weights: dict[str, Tensor], where: str) -> Heads:
    """IRRA may have been trained without some of its losses, and then has no head for them."""
    settings: dict[str, Any] = {}
    allowed: list[str] = []
    missing = {}
    if "classifier.weight" not in weights:
        missing["id"] = 0.0
        allowed.append("classifier.")
    if any(name.startswith("mlm.") for name in weights):
        settings["mlm_layers"] = _count(weights, "mlm.transformer.resblocks.")
    else:
        missing["mlm"] = 0.0
    if missing:
        settings["weights"] = missing
    notes = [f"It has no head for the loss {name}, which is set to 0." for name in missing]
    persons = None if "id" in missing else _rows(weights, "classifier.weight", where)
    return Heads(settings, persons, weights, allowed=tuple(allowed), notes=notes)


def _clip_reid(weights: dict[str, Tensor], where: str) -> Heads:
    persons = _rows(weights, "id_tokens", where)
    settings = {"n_id_tokens": int(weights["id_tokens"].shape[1]), **_camera_settings(weights)}
    tracked = weights.get("necks.0.hidden.norm.num_batches_tracked")
    notes = []
    if tracked is not None and int(tracked) == 0:
        notes.append(
            "It is the result of stage 1: image encoder and identity heads are as they started. Whom the tokens belong "
            "to is not in it, so no stage 2 can be trained on them here."
        )
    return Heads(settings, persons, weights, Roster.single(persons), notes=notes)


def _mta_clip(weights: dict[str, Tensor], where: str) -> Heads:
    """Datasets and their people by the number and width of identity heads; no names of them are in a checkpoint."""
    persons, domains = _rows(weights, "id_tokens", where), _count(weights, "necks.")
    sizes = [_rows(weights, f"necks.{number}.hidden.classifier.weight", where) for number in range(domains)]
    if sum(sizes) != persons:
        raise DataError(f"{where} has tokens of {persons} people and identity heads of {sum(sizes)}.")
    prompts = len(weights.get("context.domain", sizes))
    if prompts != domains:
        raise DataError(f"{where} has prompts of {prompts} datasets and identity heads of {domains}.")
    starts = [sum(sizes[:number]) for number in range(domains)]
    people = tuple(tuple(range(start, start + size)) for start, size in zip(starts, sizes, strict=True))
    roster = Roster(tuple(f"dataset{number}" for number in range(domains)), people)
    settings = {
        "n_id_tokens": int(weights["id_tokens"].shape[1]),
        **_camera_settings(weights),
        "hcp": _hcp(weights, where),
        "sga": _sga(weights),
        # Which blocks were trained makes no difference to what they compute.
        "unfreeze_blocks": "all",
    }
    notes = [
        "No code of MTA-CLIP is public: settings that no shape shows (layout of prompts, kind of gate, read-out) are "
        "our defaults, and people are taken to be numbered dataset after dataset."
    ]
    return Heads(settings, persons, weights, roster, notes=notes)


def _hcp(weights: Mapping[str, Tensor], where: str) -> dict[str, Any]:
    if "context.domain" not in weights:
        return {"enabled": False}
    shared = _rows(weights, "context.shared", where)
    return {"enabled": True, "n_shared": shared, "n_domain": int(weights["context.domain"].shape[1])}


def _sga(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    pointwise, squeeze = weights.get("sga.local.pointwise.weight"), weights.get("sga.context.squeeze.weight")
    if pointwise is None or squeeze is None:
        return {"enabled": False}
    width = pointwise.shape[0]
    return {"enabled": True, "groups": width // pointwise.shape[1], "reduction": width // squeeze.shape[0]}


_READERS: dict[str, Callable[[dict[str, Tensor], str], Heads]] = {
    "clip": _clip,
    "rde": _rde,
    "irra": _irra,
    "clip-reid": _clip_reid,
    "mta-clip": _mta_clip,
}


def _camera_settings(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"sie": {"camera": True}} if "camera_vectors" in weights else {}


def _with_cameras(heads: Heads, names: tuple[str, ...], where: str) -> Heads:
    """The heads with the names of their cameras; a roster's are sorted, so their vectors are put into that order."""
    vectors = heads.weights.get("camera_vectors")
    if vectors is None or heads.roster is None:
        if names:
            raise UsageError(f"--cameras names {len(names)} cameras, but {where} tells no cameras apart.")
        return heads
    if names and (len(names) != len(vectors) or len(set(names)) != len(names)):
        raise UsageError(f"--cameras names {len(set(names))} cameras; {where} has vectors of {len(vectors)}.")
    notes = ["Camera vectors are scaled by 1.0, as in the published runs (SIE_COE); the file does not say."]
    if not names:
        names = tuple(f"unknown/{number:04d}" for number in range(len(vectors)))
        notes.append("Nothing says which cameras these are: every image gets their mean. Name them with --cameras.")
    order = sorted(range(len(names)), key=names.__getitem__)
    sorted_names = tuple(names[row] for row in order)
    weights = {**heads.weights, "camera_vectors": vectors[torch.tensor(order)]}
    roster = replace(heads.roster, cameras=sorted_names)
    return replace(heads, weights=weights, roster=roster, notes=[*heads.notes, *notes])


def _rows(weights: Mapping[str, Tensor], name: str, where: str) -> int:
    if name not in weights:
        raise DataError(f"{where} lacks `{name}`, by our names.", hint="Is it a whole checkpoint of this code?")
    return len(weights[name])


def _count(weights: Mapping[str, Tensor], start: str) -> int:
    """How many numbered parts stand behind a beginning of names."""
    return len({name.removeprefix(start).split(".")[0] for name in weights if name.startswith(start)})
