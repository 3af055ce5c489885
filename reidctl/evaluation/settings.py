"""Robustness settings: how a query text or image is degraded, as pure seeded functions.

Text settings (BDAM, ICME version, Table V, and general noise): `standard`, `identity-only`, `clothes-conflict`,
`word-dropout`, `typos`, `truncation`. Image settings: `blur`, `low-resolution`, `occlusion`, `illumination`, `blank`.
Every item has its own random stream, so its result does not depend on the other items or their order;
clothes-conflict alone looks at all of them, by definition.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from reidctl.datasets.degrade import degrade
from reidctl.errors import DataError, UsageError

Pixels = npt.NDArray[np.uint8]

TEXT_SETTINGS = ("standard", "identity-only", "clothes-conflict", "word-dropout", "typos", "truncation")
# Those that `data degrade` makes too: one implementation, `datasets/degrade.py`.
_KINDS = {"word-dropout": "drop", "typos": "typo", "truncation": "shorten"}
IMAGE_SETTINGS = ("blur", "low-resolution", "occlusion", "illumination", "blank")


def stream(seed: int, *keys: str) -> np.random.Generator:
    """Return the random stream of one item: the same for the same seed and keys on every machine."""
    digest = hashlib.sha256("\x1f".join((str(seed), *keys)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def conflicting_donors(clothing: Sequence[str], people: Sequence[str], *, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return whose clothing text each query wears: a permutation in which nobody gets their own or an equal text.

    For every i, people[donor[i]] != people[i] and clothing[donor[i]] != clothing[i]. The paper "shuffles" clothing
    descriptions; a plain shuffle can hand back the same outfit, so we take a derangement.

    Raises:
        DataError: no such permutation was found, e.g. because most texts are equal.
    """
    order = np.lexsort(
        (np.arange(len(people)), np.asarray(clothing, object).astype(str), np.asarray(people, object).astype(str))
    )
    rng = np.random.default_rng(seed)
    donor = order[rng.permutation(len(order))]

    def fits(i: int, j: int) -> bool:
        return people[i] != people[j] and clothing[i] != clothing[j]

    for _ in range(20):
        wrong = [i for i in range(len(donor)) if not fits(i, int(donor[i]))]
        if not wrong:
            return np.asarray(donor, np.int64)
        for i in wrong:
            for k in rng.permutation(len(donor)):
                if fits(i, int(donor[k])) and fits(int(k), int(donor[i])):
                    donor[i], donor[k] = donor[k], donor[i]
                    break
    raise DataError(f"{len(wrong)} of {len(donor)} clothing texts have nobody different to swap with.")


def degrade_texts(
    setting: str,
    ids: Sequence[str],
    texts: Sequence[str],
    *,
    identity: Sequence[str] | None = None,
    clothing: Sequence[str] | None = None,
    people: Sequence[str] | None = None,
    seed: int = 0,
    share: float = 0.3,
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
        seed: of all random choices.
        share: how much `word-dropout`, `typos` and `truncation` take away, in [0, 1].

    Raises:
        UsageError: an unknown setting.
        DataError: texts that the setting needs are absent, or see `conflicting_donors`.
    """
    if setting == "standard":
        return list(texts)
    if setting in _KINDS:
        kind = _KINDS[setting]
        return [degrade(text, kind, share, seed=seed, key=item) for item, text in zip(ids, texts, strict=True)]
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
    donors = conflicting_donors(clothing, people, seed=seed)
    return [f"{own} {clothing[donor]}".strip() for own, donor in zip(identity, donors, strict=True)]


def degrade_image(setting: str, item: str, pixels: Pixels, *, seed: int = 0, strength: float = 0.5) -> Pixels:
    """Return an image under a setting.

    Args:
        setting: one of `IMAGE_SETTINGS`.
        item: image id; seeds its own random stream.
        pixels: shape (H, W, 3), uint8.
        seed: of all random choices.
        strength: in [0, 1]; 0 leaves the image alone, except for `blank`.

    Raises:
        UsageError: an unknown setting.
    """
    changes: dict[str, Callable[[], Pixels]] = {
        "blur": lambda: _blur(pixels, strength),
        "low-resolution": lambda: _low_resolution(pixels, strength),
        "occlusion": lambda: _occlude(pixels, strength, stream(seed, setting, item)),
        "illumination": lambda: _relight(pixels, strength, stream(seed, setting, item)),
        "blank": lambda: np.full_like(pixels, 128),
    }
    if setting not in changes:
        raise UsageError(f"Unknown image setting {setting}.", hint=f"Known: {', '.join(IMAGE_SETTINGS)}.")
    return changes[setting]()


def _blur(pixels: Pixels, strength: float) -> Pixels:
    """Gaussian blur with a standard deviation of up to 5 % of the height."""
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.05 * strength * len(pixels))))


def _low_resolution(pixels: Pixels, strength: float) -> Pixels:
    """Shrink to as little as one eighth of each side and enlarge again."""
    height, width = pixels.shape[:2]
    factor = 1 + 7 * strength
    small = (max(1, round(width / factor)), max(1, round(height / factor)))
    resample = Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(pixels).resize(small, resample).resize((width, height), resample))


def _occlude(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Cover a rectangle of `strength` of the area with grey."""
    height, width = pixels.shape[:2]
    tall, wide = round(height * np.sqrt(strength)), round(width * np.sqrt(strength))
    top, left = int(rng.integers(0, height - tall + 1)), int(rng.integers(0, width - wide + 1))
    covered = pixels.copy()
    covered[top : top + tall, left : left + wide] = 128
    return covered


def _relight(pixels: Pixels, strength: float, rng: np.random.Generator) -> Pixels:
    """Darken or brighten, up to a factor of 4 either way."""
    gain = 4.0 ** (strength * (1 if rng.random() < 0.5 else -1))
    return np.asarray(np.clip(np.rint(pixels * gain), 0, 255), np.uint8)
