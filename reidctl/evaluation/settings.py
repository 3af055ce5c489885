"""Robustness settings: how a query text or image is degraded, as pure seeded functions, and which settings there are.

Text settings (BDAM, ICME version, Table V, and general noise): `standard`, `identity-only`, `clothes-conflict`,
`word-dropout`, `typos`, `truncation`, and `paraphrase` (`evaluation/paraphrase.py`). Image settings: `blur`,
`low-resolution`, `occlusion`, `illumination`, `blank`. Every item has its own random stream, so its result does not
depend on the other items or their order; clothes-conflict alone looks at all of them, by definition.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from reidctl.datasets.degrade import degrade
from reidctl.errors import DataError, UsageError
from reidctl.evaluation.exchange import conflicting_donors

Pixels = npt.NDArray[np.uint8]
Kind = Literal["reference", "caption", "described", "image"]


@dataclass(frozen=True)
class Setting:
    """One setting of the registry.

    Attributes:
        name: what the command line calls it.
        kind: `caption`: changes caption queries; `described`: changes queries made of identity and clothing texts;
            `image`: changes pictures; `reference`: what the others are compared with.
        summary: one line for the help text.
        level: how strong it is unless told otherwise, in [0, 1]; None where there is no strength.
    """

    name: str
    kind: Kind
    summary: str
    level: float | None = None


SETTINGS: dict[str, Setting] = {
    setting.name: setting
    for setting in (
        Setting("standard", "reference", "nothing changed; always measured, for the others to be compared with"),
        Setting("identity-only", "described", "identity + clothing texts without the clothing part"),
        Setting(
            "clothes-conflict",
            "described",
            "identity texts with the clothing text of another person in other clothes; three seeds and their mean",
        ),
        Setting("word-dropout", "caption", "every word left out with probability LEVEL", 0.3),
        Setting("typos", "caption", "every word mistyped once with probability LEVEL", 0.3),
        Setting("truncation", "caption", "the last LEVEL of the words cut off", 0.5),
        Setting("paraphrase", "caption", "the same content in other words or another order, one row per style"),
        Setting("blur", "image", "Gaussian blur, standard deviation LEVEL x 5 % of the image height", 0.3),
        Setting("low-resolution", "image", "1 + 7 LEVEL times fewer pixels along each side", 0.4),
        Setting("occlusion", "image", "a grey rectangle over LEVEL of the picture's area, anywhere in it", 0.3),
        Setting("illumination", "image", "pixel values times 4^LEVEL or 4^-LEVEL, either with probability 1/2", 0.5),
        Setting("blank", "image", "every picture the same grey: must give chance"),
    )
}
TEXT_SETTINGS = ("standard", "identity-only", "clothes-conflict", "word-dropout", "typos", "truncation")
# Those that `data degrade` makes too: one implementation, `datasets/degrade.py`.
_KINDS = {"word-dropout": "drop", "typos": "typo", "truncation": "shorten"}
IMAGE_SETTINGS = tuple(setting.name for setting in SETTINGS.values() if setting.kind == "image")


def resolve(names: Sequence[str]) -> tuple[str, ...]:
    """Return the settings asked for in the order of the registry, `standard` first; `all` stands for every one.

    Raises:
        UsageError: an unknown name, or none at all.
    """
    known = ", ".join(("all", *SETTINGS))
    unknown = [name for name in names if name not in (*SETTINGS, "all")]
    if unknown:
        raise UsageError(f"Unknown setting `{unknown[0]}`.", hint=f"Known: {known}.")
    if not names:
        raise UsageError("No setting was asked for.", hint=f"Known: {known}.")
    asked = set(SETTINGS) if "all" in names else {*names, "standard"}
    return tuple(name for name in SETTINGS if name in asked)


def level_of(name: str, level: float | None = None) -> float | None:
    """Return the strength of a setting: `level` if given, else its own; None for a setting without a strength.

    Raises:
        UsageError: a level outside [0, 1].
    """
    if level is not None and not 0 <= level <= 1:  # NaN is refused too
        raise UsageError(f"The level {level:g} is not between 0 and 1.", hint="0 changes nothing, 1 is the strongest.")
    own = SETTINGS[name].level
    return own if own is None or level is None else level


def stream(seed: int, *keys: str) -> np.random.Generator:
    """Return the random stream of one item: the same for the same seed and keys on every machine."""
    digest = hashlib.sha256("\x1f".join((str(seed), *keys)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def degrade_texts(
    setting: str,
    ids: Sequence[str],
    texts: Sequence[str],
    *,
    identity: Sequence[str] | None = None,
    clothing: Sequence[str] | None = None,
    people: Sequence[str] | None = None,
    outfits: Sequence[str | None] | None = None,
    seed: int = 0,
    share: float | None = None,
) -> list[str]:
    """Return the query texts under a setting.

    `identity-only` and `clothes-conflict` replace the caption by the identity text alone, and by the identity text
    followed by somebody else's clothing text: what a caption says of both cannot be exchanged word by word.

    Args:
        setting: one of `TEXT_SETTINGS`.
        ids: query ids; each seeds its own random stream.
        texts: captions.
        identity: identity texts, for the two settings above.
        clothing: clothing texts, for `clothes-conflict`.
        people: person ids, for `clothes-conflict`.
        outfits: outfit ids, None where unknown, for `clothes-conflict`.
        seed: of all random choices.
        share: how much `word-dropout`, `typos` and `truncation` take away, in [0, 1]; None: the setting's own level.

    Raises:
        UsageError: an unknown setting, or a share outside [0, 1].
        DataError: texts that the setting needs are absent, or see `conflicting_donors`.
    """
    if setting == "standard":
        return list(texts)
    if setting in _KINDS:
        kind, level = _KINDS[setting], level_of(setting, share)
        assert level is not None
        return [degrade(text, kind, level, seed=seed, key=item) for item, text in zip(ids, texts, strict=True)]
    if setting not in TEXT_SETTINGS:
        raise UsageError(f"Unknown text setting {setting}.", hint=f"Known: {', '.join(TEXT_SETTINGS)}.")
    if identity is None:
        raise DataError(f"Setting {setting} needs identity texts.", hint="Write them with `reidctl caption`.")
    if setting == "identity-only":
        return list(identity)
    if clothing is None or people is None:
        raise DataError(
            f"Setting {setting} needs clothing texts and people.", hint="Write them with `reidctl caption`."
        )
    donors = conflicting_donors(clothing, people, outfits=outfits, ids=ids, seed=seed)
    return [f"{own} {clothing[donor]}".strip() for own, donor in zip(identity, donors, strict=True)]


def degrade_image(setting: str, item: str, pixels: Pixels, *, seed: int = 0, strength: float | None = None) -> Pixels:
    """Return an image under a setting.

    All strengths are relative to the picture, so that one level means the same for pictures of any size: of a person
    of 1.7 m who fills the height, 1 % of it is 1.7 cm.

    Args:
        setting: one of `IMAGE_SETTINGS`.
        item: image id; seeds its own random stream.
        pixels: shape (H, W, 3), uint8.
        seed: of all random choices.
        strength: in [0, 1]; 0 leaves the image alone, except for `blank`; None: the setting's own level.

    Raises:
        UsageError: an unknown setting, or a strength outside [0, 1].
    """
    if setting not in IMAGE_SETTINGS:
        raise UsageError(f"Unknown image setting {setting}.", hint=f"Known: {', '.join(IMAGE_SETTINGS)}.")
    level = level_of(setting, strength) or 0.0
    changes: dict[str, Callable[[], Pixels]] = {
        "blur": lambda: _blur(pixels, level),
        "low-resolution": lambda: _low_resolution(pixels, level),
        "occlusion": lambda: _occlude(pixels, level, stream(seed, setting, item)),
        "illumination": lambda: _relight(pixels, level, stream(seed, setting, item)),
        "blank": lambda: np.full_like(pixels, 128),
    }
    return changes[setting]()


def _blur(pixels: Pixels, strength: float) -> Pixels:
    """Blur with a Gaussian whose standard deviation is `strength` x 5 % of the height (at most 8.5 cm of 1.7 m).

    Pillow approximates the Gaussian by three box blurs of fractional width.
    """
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.05 * strength * len(pixels))))


def _low_resolution(pixels: Pixels, strength: float) -> Pixels:
    """Shrink each side by 1 + 7 `strength` (at most 8) with antialiasing, and enlarge it again, both bilinear.

    What is left is as sharp as a picture from 1 + 7 `strength` times as far away, or from such a camera.
    """
    height, width = pixels.shape[:2]
    factor = 1 + 7 * strength
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    resample = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize(small, resample).resize((width, height), resample))


def _occlude(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Cover `strength` of the area with a grey rectangle of the picture's own shape, at a uniformly random place."""
    height, width = pixels.shape[:2]
    tall, wide = round(height * np.sqrt(strength)), round(width * np.sqrt(strength))
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    covered = pixels.copy()
    covered[top : top + tall, left : left + wide] = 128
    return covered


def _relight(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Multiply the bytes by 4^strength or 4^-strength and clip, so bright parts burn out.

    The bytes are gamma-encoded: with display gamma 2.2 a factor of 2 on them is a factor of 4.6 (2.2 stops) of light.
    """
    gain = 4.0 ** (strength * (1 if rng.random() < 0.5 else -1))
    return np.asarray(np.clip(np.rint(pixels * gain), 0, 255), np.uint8)
