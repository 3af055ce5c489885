"""One picture of one person: pixels, part masks and the facts that are true of it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reidctl.synthped import cast, scene
from reidctl.synthped.canvas import BACKGROUND, FACE, HAIR, HAT, LABELS, Canvas
from reidctl.synthped.carried import draw_behind, draw_cap, draw_far_hand, draw_on_trunk, draw_over
from reidctl.synthped.cast import Person
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.draws import Draws
from reidctl.synthped.figure import Figure
from reidctl.synthped.garments import draw_arm, draw_legs, draw_upper
from reidctl.synthped.heads import draw_hair_behind, draw_head, draw_neck
from reidctl.synthped.shot import Shot, make_shot

VISIBLE = 0.0009  # share of the picture from which a part counts as visible: 7 pixels of 128x64


@dataclass(frozen=True)
class Rendered:
    """A picture and its truth."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    masks: dict[str, npt.NDArray[np.bool_]]  # part -> (H, W); parts that do not show are left out
    person: Person
    shot: Shot
    hidden: float  # share of the person's pixels that an occluder covers

    @property
    def visible(self) -> frozenset[str]:
        """Parts large enough to be described."""
        least = VISIBLE * self.pixels.shape[0] * self.pixels.shape[1]
        return frozenset(part for part, mask in self.masks.items() if np.count_nonzero(mask) >= least)


def render(config: SynthConfig, person_index: int, image_index: int, *, domain: str | None = None) -> Rendered:
    """Return image `image_index` of identity `person_index`; the same arguments give the same bits everywhere.

    Args:
        config: what to render.
        person_index: raw identity number within its dataset.
        image_index: which of the person's images.
        domain: "a", "b" or "c"; the configuration's first dataset when left out.
    """
    chosen = domain or config.domains[0]
    return render_shot(config, cast.person(config, chosen, person_index), image_index)


def render_shot(config: SynthConfig, person: Person, image_index: int) -> Rendered:
    """Return image `image_index` of a person made by `cast.person`."""
    shot = make_shot(config, person, image_index)
    rng = Draws(config.seed, cast.PIXELS, person.own_number, image_index)
    height, width = config.size
    canvas = Canvas(height, width)
    canvas.light = rng.between(-0.35, 0.35)
    scene.draw_background(canvas, rng, person.domain, shot.camera)
    figure = Figure(person, shot)
    scene.draw_ground_shadow(canvas, figure.x, figure.foot, canvas.light)
    draw_person(canvas, figure)
    whole = int(np.count_nonzero(canvas.label != BACKGROUND))
    if shot.occluder:
        scene.draw_occluder(canvas, rng, shot.occluder, person.domain)
    shown = int(np.count_nonzero(canvas.label != BACKGROUND))
    pixels = scene.expose(canvas.pixels(), rng, person.domain, shot.camera, shot.blur, config.difficulty)
    return Rendered(pixels, part_masks(canvas.labels()), person, shot, 1 - shown / max(1, whole))


def draw_person(canvas: Canvas, figure: Figure) -> None:
    """Paint a person with clothes and objects, from the farthest to the nearest."""
    draw_behind(canvas, figure)
    draw_hair_behind(canvas, figure)
    if figure.side_on:
        near, far = sorted(figure.arms, key=lambda arm: arm.side != figure.near_side())
        draw_arm(canvas, figure, far, 0.74)
        draw_far_hand(canvas, figure, far)
        draw_legs(canvas, figure)
        draw_neck(canvas, figure)
        draw_upper(canvas, figure)
        draw_on_trunk(canvas, figure)
        draw_head(canvas, figure)
        draw_cap(canvas, figure)
        draw_arm(canvas, figure, near)
    else:
        draw_legs(canvas, figure)
        draw_neck(canvas, figure)
        draw_upper(canvas, figure)
        draw_on_trunk(canvas, figure)
        for arm in figure.arms:
            draw_arm(canvas, figure, arm)
        draw_head(canvas, figure)
        draw_cap(canvas, figure)
    draw_over(canvas, figure)


def part_masks(labels: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.bool_]]:
    """Split a label picture into named masks; `head` joins hair, face and hat, `person` joins everything."""
    masks = {part: labels == label for part, label in LABELS.items()}
    masks["head"] = (labels == HAIR) | (labels == FACE) | (labels == HAT)
    masks["person"] = labels != BACKGROUND
    return {part: mask for part, mask in masks.items() if mask.any()}
