"""Part masks that the user supplies: label maps of a parsing network, or a ready table, as rows of `parts`.

The benchmarks have no human part annotation, so what is measured against such masks is only as true as the network
that drew them; whoever reports it says so.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from reidctl import tables
from reidctl.errors import DataError
from reidctl.masks import encode_mask, mask_box

LABELS_FILE = "labels.json"
"""What the numbers of label maps mean: `{"5": "upper clothes", "9": "pants", "255": null}`."""

_MAX_PIXELS = 64_000_000  # as for pictures: anything larger is a decompression bomb
_MAX_LABEL = 65_535
_MODES = ("L", "P", "I;16", "I")
_EXAMPLE = 'Write for instance {"5": "upper clothes", "9": "pants", "255": null}; null is ignored, 0 is background.'

Labels = dict[int, str | None]


@dataclass(frozen=True)
class Parsing:
    """What a table or a folder of label maps holds.

    Attributes:
        parts: rows of the `parts` table, those of the given images alone.
        missing: how many of the images have no label map, or no row.
        unused: how many label maps, or images of the table, belong to none of the images.
    """

    parts: pd.DataFrame
    missing: int
    unused: int


def read_parsing(path: Path, images: pd.DataFrame) -> Parsing:
    """Return user-supplied part masks of some images.

    Args:
        path: a Parquet file with the columns of the `parts` table, or a folder of label maps with `labels.json`: PNG
            files of one channel whose values are label numbers. A label map belongs to the image whose id, or the
            end of whose path, is the map's own path below the folder (both without suffix): `0001_c1.png` or
            `cam_a/0001_c1.png` fits `images/cam_a/0001_c1.jpg`. Maps of another size than the image are resized
            (nearest) to it; they must have its proportions. Labels with one name are united.
        images: rows of the `images` table: image_id, path, width, height.

    Raises:
        DataError: a file that is missing, damaged, absurdly large or no label map; a label without a name; a map that
            fits two images, or an image that two maps fit; masks that do not fill their image; nothing that fits.
    """
    found = _read_folder(path, images) if path.is_dir() else _read_table(path, images)
    if found.parts.empty and len(images):
        raise DataError(
            f"{path} holds no part of the {len(images):,} images.",
            hint="Name label maps after the images' ids or files; a table names them in image_id.",
        )
    return found


def _read_table(path: Path, images: pd.DataFrame) -> Parsing:
    texts = tables.read_labels(path, "parts")  # a table of other tools may lack the optional phrase
    parts = tables.read_table(path, "parts", ["box", "mask"])
    for column in ("image_id", "part", "phrase"):
        given = texts[column].astype(object)
        parts[column] = given.where(given.notna(), None)
    area = dict(zip(images["image_id"], images["width"] * images["height"], strict=True))
    kept = parts[parts["image_id"].isin(area)].reset_index(drop=True)
    for image, part, mask in zip(kept["image_id"], kept["part"], kept["mask"], strict=True):
        if np.sum(mask, dtype=np.int64) != area[image] or np.min(mask, initial=0) < 0:
            raise DataError(
                f"{path}: the mask of `{part}` in image `{image}` does not fill its {area[image]:,} pixels.",
                hint="Masks are row-major run lengths at the image's own size, starting with a run of zeros.",
            )
    known = set(parts["image_id"])
    return Parsing(kept[_columns()], len(set(area) - known), len(known - set(area)))


def _columns() -> list[str]:
    return list(tables.empty("parts").columns)


def _read_folder(folder: Path, images: pd.DataFrame) -> Parsing:
    labels = read_labels(folder / LABELS_FILE)
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".png" and path.is_file())
    chosen = _match(folder, files, images)
    rows: list[dict[str, Any]] = []
    for name, width, height in zip(images["image_id"], images["width"], images["height"], strict=True):
        if name in chosen:
            rows += _rows(str(name), read_label_map(chosen[name]), (int(height), int(width)), labels, chosen[name])
    frame = pd.DataFrame(rows, columns=_columns()) if rows else tables.empty("parts")
    return Parsing(frame, len(images) - len(chosen), len(files) - len(chosen))


def read_labels(path: Path) -> Labels:
    """Return the part that each label number means, None for labels to ignore; 0 is background.

    Names are taken in lower case, with spaces for `-` and `_`.

    Raises:
        DataError: the file is missing or is not an object of label numbers and names.
    """
    try:
        pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: label numbers need names.", hint=_EXAMPLE) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({_first_line(error)}).", hint=_EXAMPLE) from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise DataError(f"{path} is not an object of label numbers and names.", hint=_EXAMPLE)
    labels: Labels = {}
    for key, value in pairs:
        number = _number(key)
        if number is None or number in labels:
            raise DataError(f"{path}: {key[:40]!r} is no label number, or is given twice.", hint=_EXAMPLE)
        name = _tidy(value) if isinstance(value, str) else ""
        if not name and value is not None:
            raise DataError(f"{path}: label {number} has no name but {str(value)[:40]!r}.", hint=_EXAMPLE)
        if number == 0 and name not in ("", "background"):
            raise DataError(f"{path}: label 0 is called `{name[:40]}`, but 0 is background.", hint=_EXAMPLE)
        labels[number] = name or None
    return {**labels, 0: None}


def _number(key: str) -> int | None:
    return int(key) if re.fullmatch(r"[0-9]{1,5}", key) and int(key) <= _MAX_LABEL else None


def _tidy(name: str) -> str:
    return " ".join(re.sub(r"[-_]", " ", name.lower()).split())


def _match(folder: Path, files: Sequence[Path], images: pd.DataFrame) -> dict[str, Path]:
    """The label map of each image that has one. Only files found in the folder are ever opened."""
    owners: dict[str, list[str]] = {}
    for name, path in zip(images["image_id"].astype(str), images["path"].astype(str), strict=True):
        whole = PurePosixPath(path.replace("\\", "/"))
        steps = (*whole.parent.parts, whole.stem)
        ends = {name, *("/".join(steps[start:]) for start in range(len(steps)))}
        for end in ends:
            owners.setdefault(end, []).append(name)
    found: dict[str, Path] = {}
    for file in files:
        who = owners.get(file.relative_to(folder).with_suffix("").as_posix(), [])
        if len(who) > 1:
            raise DataError(
                f"Label map {file} fits the images `{who[0]}` and `{who[1]}`.",
                hint="Put label maps into the images' folders, or name them after the ids.",
            )
        if who and who[0] in found:
            raise DataError(f"Image `{who[0]}` has two label maps: {found[who[0]]} and {file}.", hint="Remove one.")
        if who:
            found[who[0]] = file
    return found


def read_label_map(path: Path) -> npt.NDArray[np.int64]:
    """Return the label numbers of a PNG file of one channel, shape (H, W); of a palette picture, its indices.

    Raises:
        DataError: the file is missing, damaged, absurdly large, or has colours instead of label numbers.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise DataError(f"{path} has {image.width}x{image.height} pixels; the limit is {_MAX_PIXELS:,}.")
            if image.mode not in _MODES:
                raise DataError(
                    f"Label map {path} has the mode {image.mode}, not one channel of label numbers.",
                    hint="Save it as a grey or palette PNG whose values are the numbers in labels.json.",
                )
            return np.asarray(image).astype(np.int64)
    except DataError:
        raise
    except Exception as error:  # whatever a decoder meets in a damaged file: Pillow has no common kind for it
        raise DataError(f"Label map {path} cannot be read ({_first_line(error)}).", hint="Replace it.") from None


def _rows(
    image: str, numbers: npt.NDArray[np.int64], size: tuple[int, int], labels: Labels, path: Path
) -> list[dict[str, Any]]:
    present = np.unique(numbers).tolist()
    unknown = [number for number in present if number not in labels]
    if unknown:
        raise DataError(
            f"Label map {path} holds the number {unknown[0]}, which {LABELS_FILE} does not name.",
            hint=f'Add "{unknown[0]}": a name, or null to ignore it.',
        )
    fitted = _fitted(numbers, size, path)
    rows = []
    for name in dict.fromkeys(label for number in present if (label := labels[number])):
        mask = np.isin(fitted, [number for number in present if labels[number] == name])
        if mask.any():
            row = {"image_id": image, "part": name, "box": mask_box(mask), "mask": encode_mask(mask), "phrase": None}
            rows.append(row)
    return rows


def _fitted(numbers: npt.NDArray[np.int64], size: tuple[int, int], path: Path) -> npt.NDArray[np.int64]:
    """The label map at the size of the picture, nearest neighbour; of other proportions it is of another picture."""
    (height, width), (tall, wide) = numbers.shape, size
    # Right up to a pixel, in either direction: small maps round much.
    if abs(height * wide / tall - width) > 1 and abs(width * tall / wide - height) > 1:
        raise DataError(
            f"Label map {path} has {width}x{height} pixels for a picture of {wide}x{tall}: other proportions.",
            hint="Resize it (nearest) to the picture if it was stretched; else it is of another picture.",
        )
    rows = ((np.arange(tall) + 0.5) * height / tall).astype(np.int64)
    columns = ((np.arange(wide) + 0.5) * width / wide).astype(np.int64)
    return np.asarray(numbers[rows[:, None], columns[None, :]])


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")


SYNONYMS: tuple[tuple[str, str], ...] = (
    ("hat cap beanie helmet beret headscarf turban bonnet", "hat, headwear / head"),
    ("hair ponytail pigtail braid bun bangs haircut hairstyle", "hair / head"),
    ("face beard moustache mustache goatee", "face / head"),
    ("glasses sunglasses spectacles eyeglasses goggles", "sunglasses, glasses, eyewear"),
    ("head", "head / hat, hair, face, sunglasses"),
    ("glove mitten", "glove"),
    ("scarf scarves shawl", "scarf"),
    (
        "shirt tshirt tee blouse polo top tank vest waistcoat sweater jumper pullover hoodie hoody sweatshirt jersey"
        " cardigan fleece camisole tunic turtleneck sleeve",
        "upper clothes, upper cloth, upper, top, shirt / torso clothes, coat / torso",
    ),
    (
        "coat jacket overcoat raincoat windbreaker blazer parka anorak trenchcoat",
        "coat, jacket, outer / upper clothes, upper cloth, upper, top / torso clothes, torso",
    ),
    ("suit tracksuit uniform", "suit / coat, upper clothes, pants / upper, lower"),
    ("dress gown frock sundress", "dress / jumpsuits, jumpsuit / upper clothes, skirt / upper"),
    ("jumpsuit dungarees overalls romper", "jumpsuits, jumpsuit / dress / upper clothes, pants / upper, lower"),
    ("skirt miniskirt kilt", "skirt / dress / lower"),
    (
        "trousers pants jeans slacks chinos shorts leggings joggers sweatpants khakis jeggings culottes",
        "pants, trousers / jumpsuits, jumpsuit / lower, lower clothes, lower cloth / upper legs, lower legs",
    ),
    ("tights stockings pantyhose", "socks, stockings, tights / pants, trousers / lower / leg, legs"),
    ("sock", "socks / shoe"),
    (
        "shoe sneaker trainer boot sandal slipper heel loafer flop footwear bootie clog",
        "shoe, shoes, footwear / foot, feet",
    ),
    ("belt", "belt"),
    ("leg calf", "leg, legs / upper legs, lower legs"),
    ("arm", "arm, arms / upper arms, lower arms"),
    ("backpack rucksack knapsack schoolbag bookbag", "backpack, rucksack / bag, bags"),
    ("handbag purse clutch tote satchel pouch", "handbag, purse / bag, bags"),
    ("suitcase briefcase luggage holdall duffel", "suitcase, luggage / bag, bags"),
    ("bag", "bag, bags / backpack, handbag, purse, suitcase"),
)
"""Words, and the parts that they may mean in LIP, ATR, Pascal-Person-Part and synthped, nearest first."""

_PLURAL = frozenset(word for words, _ in SYNONYMS for word in words.split() if word.endswith("s"))
"""Words that stay as they are: `shorts` are not `short`."""

_AFTER = frozenset(("on", "over", "around", "across", "at", "from", "under", "near", "beside", "behind"))


def part_of_phrase(phrase: str, names: Iterable[str]) -> list[str]:
    """Return which of an image's parts a phrase means, in their order; none if it has no word for any of them.

    A part is meant by its own name (`Left-shoe` by "shoes"; "left shoe" means that side alone) or by a word of
    `SYNONYMS`, of whose meanings the nearest that the image shows is taken: a jacket is a `coat`, or `upper clothes`
    where no coat is told apart. A noun before another one only describes it ("jean jacket"), and what stands behind
    a preposition of place is elsewhere ("a hat on his head").

    Args:
        phrase: the text.
        names: the parts that the image shows, as the `parts` table names them.
    """
    shown: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        shown.setdefault(_base(name), []).append(name)
    words = _words(phrase)
    place = next((number for number, word in enumerate(words) if number and word in _AFTER), len(words))
    hits = [*(_meant(words[: number + 1], shown) for number in range(place)), []]
    kept = [hit for hit, after in pairwise(hits) if hit and not after]
    meant = {name for hit in kept for name in hit}
    return [name for name in dict.fromkeys(names) if name in meant]


def _meant(words: list[str], shown: dict[str, list[str]]) -> list[str]:
    """The parts that the last of some words means."""
    last = _singular(words[-1])
    own = [base for base in shown if _ends_with(words, base)]
    for level in ([*own], *_meanings().get(last, ())):
        names = [name for base in level for name in shown.get(base, [])]
        if names:
            side = next((word for word in words[-3:-1] if word in ("left", "right")), "")
            return [name for name in names if side and _tidy(name).startswith(f"{side} ")] or names
    return []


def _ends_with(words: list[str], base: str) -> bool:
    wanted = base.split()
    return bool(wanted) and [_singular(word) for word in words[-len(wanted) :]] == wanted


@cache
def _meanings() -> dict[str, tuple[tuple[str, ...], ...]]:
    """The parts by the singular of a word, nearest level first."""
    found: dict[str, tuple[tuple[str, ...], ...]] = {}
    for words, levels in SYNONYMS:
        meant = tuple(tuple(dict.fromkeys(_base(name) for name in level.split(","))) for level in levels.split("/"))
        found |= {_singular(word): meant for word in words.split()}
    return found


def _base(name: str) -> str:
    """A part's name without its side, every word in the singular: `Left-shoe` and `shoes` are `shoe`."""
    words = _words(_tidy(name))
    return " ".join(_singular(word) for word in (words[1:] if words[:1] in (["left"], ["right"]) else words))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def _singular(word: str) -> str:
    if word in _PLURAL:
        return word
    if word.endswith("sses"):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
