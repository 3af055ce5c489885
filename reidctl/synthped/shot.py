"""What happens in one image: camera, view, pose, carried objects, and whether it is a query."""

from dataclasses import dataclass

from reidctl.synthped import palette
from reidctl.synthped.cast import ROUTE, SHOT, Outfit, Person
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.draws import Draws


@dataclass(frozen=True, slots=True)
class Item:
    """One carried object. `side` is the person's own left or right, "" for what is worn in the middle."""

    kind: str
    colour: str
    side: str
    place: str  # "hand", "shoulder", "back" or "head"


@dataclass(frozen=True, slots=True)
class Shot:
    """Everything about one image that is decided before drawing."""

    image: int
    camera: int  # 1, 2, ...
    role: str  # "query", "gallery" or "" in the training split
    outfit: Outfit
    view: str
    walking: bool
    stride: float  # [-1, 1]: how far the legs are apart and which one is in front
    items: tuple[Item, ...]
    occluder: str  # "", "pole", "car" or "passer-by"
    blur: int  # passes of a small blur, at 128x64
    scale: float
    shift_x: float  # units of 1/56 of the width
    shift_y: float  # units of 1/128 of the height


def make_shot(config: SynthConfig, person: Person, image: int) -> Shot:
    """Return shot `image` of a person, decided by (seed, person, image) and nothing else."""
    rng = Draws(config.seed, SHOT, person.own_number, image)
    role, camera, view, outfit = _route(config, person, image)
    strength = config.difficulty
    walking = rng.chance(0.7)
    return Shot(
        image=image,
        camera=camera,
        role=role,
        outfit=outfit,
        view=view,
        walking=walking,
        stride=rng.between(0.5, 1.0) * (1 if rng.chance(0.5) else -1) if walking else rng.between(-0.15, 0.15),
        items=_items(config, person, image),
        occluder=rng.pick(("pole", "car", "passer-by")) if rng.chance(config.occlusion) else "",
        blur=min(2, int(rng.between(0, 2.2) * strength)),
        scale=1 + strength * rng.between(-0.04, 0.04),
        shift_x=strength * rng.between(-3.5, 3.5),
        shift_y=strength * rng.between(-2.5, 2.5),
    )


def query_count(config: SynthConfig) -> int:
    """Queries per test identity: a third of its images, at least one, never two from one camera."""
    return max(1, min(config.images_per_person // 3, config.cameras))


def _route(config: SynthConfig, person: Person, image: int) -> tuple[str, int, str, Outfit]:
    """Role, camera, view and outfit; consecutive images go through all cameras, so queries have matches elsewhere."""
    rng = Draws(config.seed, ROUTE, person.own_number)
    cameras = rng.shuffled(range(1, config.cameras + 1))
    views = rng.shuffled((*palette.VIEWS, "front", "back"))
    role = ""
    if person.split != "train":
        role = "query" if image < query_count(config) else "gallery"
    worn = 0
    if config.variant == "cloth-changing":
        worn = image % 2 if person.split == "train" else int(role == "query")
    return role, cameras[image % config.cameras], views[image % len(views)], person.outfits[worn]


def _items(config: SynthConfig, person: Person, image: int) -> tuple[Item, ...]:
    """The objects carried in this image; each kind appears in at most one image of a person."""
    rng = Draws(config.seed, ROUTE, person.own_number, 7)
    items: list[Item] = []
    taken: set[tuple[int, str]] = set()
    for kind in palette.CARRIED:
        wanted, where = rng.chance(config.carry), rng.below(config.images_per_person)
        colour, side = rng.pick(palette.CARRIED_COLOURS), rng.pick(("left", "right"))
        place = {"backpack": "back", "cap": "head", "shoulder bag": "shoulder"}.get(kind, "hand")
        if place == "hand" and (where, side) in taken:
            side = "left" if side == "right" else "right"
        if not wanted or where != image or (place == "hand" and (where, side) in taken):
            continue
        if place == "hand":
            taken.add((where, side))
        items.append(Item(kind, colour, "" if place in ("back", "head") else side, place))
    return tuple(items)
