"""Write the benchmark to disk: pictures, and the images, captions and parts tables."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from reidctl.errors import UsageError
from reidctl.masks import encode_mask, mask_box
from reidctl.synthped import cast, words
from reidctl.synthped.captions import captions
from reidctl.synthped.config import SynthConfig
from reidctl.synthped.png import png_bytes
from reidctl.synthped.render import Rendered, render_shot
from reidctl.tables import TableWriter

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Table rows of one person's images."""

    images: list[Row]
    captions: list[Row]
    parts: list[Row]

    def add(self, other: "Rows") -> None:
        """Append another person's rows."""
        for mine, theirs in zip(self._tables(), other._tables(), strict=True):
            mine.extend(theirs)

    def flush(self, writers: Sequence[TableWriter]) -> None:
        """Write the rows in the order images, captions, parts, and forget them."""
        for rows, writer in zip(self._tables(), writers, strict=True):
            if rows:
                writer.write(pd.DataFrame(rows))
            rows.clear()

    def _tables(self) -> tuple[list[Row], list[Row], list[Row]]:
        return self.images, self.captions, self.parts


def write_dataset(
    config: SynthConfig, out: Path, *, workers: int = 2, progress: Callable[[int], None] | None = None
) -> None:
    """Write images/..., images.parquet, captions.parquet and parts.parquet below `out`.

    Every file is written to a temporary name and renamed, the tables last; the bytes do not depend on `workers`.

    Args:
        config: what to render.
        out: the dataset's root; made if needed.
        workers: processes that render; 1 renders in this process.
        progress: called with a number of images whenever that many more are done.

    Raises:
        UsageError: `workers` is below 1.
    """
    if workers < 1:
        raise UsageError(f"`workers` is {workers}.", hint="Give 1 or more.")
    out.mkdir(parents=True, exist_ok=True)
    jobs = [(domain, index) for domain in config.domains for index in range(config.people)]
    with ExitStack() as stack:
        names = ("images", "captions", "parts")
        writers = [stack.enter_context(TableWriter(out / f"{name}.parquet", name)) for name in names]
        held = Rows([], [], [])
        for rows in _collect(config, out, jobs, workers):
            held.add(rows)
            # Few large row groups read faster than one per person; 500 images are a few megabytes.
            if len(held.images) >= 500:
                held.flush(writers)
            if progress is not None:
                progress(len(rows.images))
        held.flush(writers)


def _collect(config: SynthConfig, out: Path, jobs: list[tuple[str, int]], workers: int) -> Iterator[Rows]:
    """Yield every person's rows in order, with at most a few people per worker in flight."""
    if workers == 1:
        for domain, index in jobs:
            yield write_person(config, out, domain, index)
        return
    # Forking after torch has started threads can deadlock, so the children start clean.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: list[Future[Rows]] = []
        queue = iter(jobs)
        for domain, index in islice(queue, 4 * workers):
            waiting.append(pool.submit(write_person, config, out, domain, index))
        while waiting:
            rows = waiting.pop(0).result()
            for domain, index in islice(queue, 1):
                waiting.append(pool.submit(write_person, config, out, domain, index))
            yield rows


def write_person(config: SynthConfig, out: Path, domain: str, index: int) -> Rows:
    """Render and save the images of one identity; return its table rows."""
    person = cast.person(config, domain, index)
    rows = Rows([], [], [])
    for number in range(config.images_per_person):
        picture = render_shot(config, person, number)
        data = png_bytes(picture.pixels)
        image_id = f"{person.dataset}-{person.number:04d}-c{picture.shot.camera}-{number:02d}"
        path = f"images/{person.dataset}/{person.number:04d}/{image_id}.png"
        _write(out / path, data)
        rows.images.append(_image_row(picture, image_id, path, hashlib.sha256(data).hexdigest()))
        rows.captions.extend(_caption_rows(config, picture, image_id, full=config.captioned in ("both", domain)))
        rows.parts.extend(_part_rows(picture, image_id))
    return rows


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _image_row(picture: Rendered, image_id: str, path: str, digest: str) -> Row:
    height, width, _ = picture.pixels.shape
    person, shot = picture.person, picture.shot
    return {
        "image_id": image_id,
        "path": path,
        "dataset": person.dataset,
        "split": person.split,
        "role": shot.role or None,
        "person_id": person.person_id,
        "camera_id": f"c{shot.camera}",
        "outfit_id": shot.outfit.outfit_id,
        "width": width,
        "height": height,
        "sha256": digest,
        "attributes": attributes(picture),
    }


def attributes(picture: Rendered) -> dict[str, str]:
    """Every true factor of a picture, as text.

    `carried` lists what can be seen ("" for nothing), `carried_at` the same objects with the person's own side.
    """
    person, shot = picture.person, picture.shot
    body, outfit = person.body, shot.outfit
    items = words.visible_items(picture)
    return {
        "gender": body.gender,
        "age": body.age,
        "build": body.build,
        "stature": body.stature,
        "skin": body.skin,
        "hair_length": body.hair_length,
        "hair_colour": body.hair_colour,
        "beard": _yes(body.beard),
        "upper_type": outfit.upper_type,
        "upper_colour": outfit.upper_colour,
        "upper_pattern": outfit.upper_pattern,
        "upper_second_colour": outfit.upper_second,
        "lower_type": outfit.lower_type,
        "lower_colour": outfit.lower_colour,
        "shoe_type": outfit.shoe_type,
        "shoe_colour": outfit.shoe_colour,
        "carried": ", ".join(words.item(item) for item in items),
        "carried_at": ", ".join(f"{item.kind}: {item.side} {item.place}".replace(":  ", ": ") for item in items),
        "view": shot.view,
        "pose": "walking" if shot.walking else "standing",
        "occluded": _yes(picture.hidden > 0.02),
        "occluder": shot.occluder if picture.hidden > 0.02 else "",
        "occluded_share": f"{int(picture.hidden * 100 + 0.5) / 100:.2f}",
        "blur": str(shot.blur),
        "outfit": outfit.outfit_id,
        "domain": person.domain,
        "true_person": f"{person.true_person:05d}",
        "clone_of": person.clone_of,
        "clone_kind": person.clone_kind,
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _caption_rows(config: SynthConfig, picture: Rendered, image_id: str, *, full: bool) -> list[Row]:
    """Full captions with their phrases if wanted, then the true identity and clothing texts.

    A phrase's `caption_id` ends in `-<part>`, the part of the parts table that it names.
    """
    rows: list[Row] = []
    for number, caption in enumerate(captions(config, picture) if full else []):
        caption_id = f"{image_id}-t{number}"
        style = f"style-{caption.style}"
        rows.append(_caption_row(caption_id, image_id, "full", "human", caption.text, style_id=style))
        for place, span in enumerate(caption.spans):
            phrase = caption.text[span.start : span.end]
            extra = {"parent_id": caption_id, "char_start": span.start, "char_end": span.end, "style_id": style}
            rows.append(
                _caption_row(f"{caption_id}-p{place}-{span.part}", image_id, "phrase", "human", phrase, **extra)
            )
    rows.append(_caption_row(f"{image_id}-identity", image_id, "identity", "template", words.identity_text(picture)))
    rows.append(_caption_row(f"{image_id}-clothing", image_id, "clothing", "template", words.clothing_text(picture)))
    return rows


def _caption_row(caption_id: str, image_id: str, kind: str, source: str, text: str, **extra: Any) -> Row:
    row = {"parent_id": None, "char_start": None, "char_end": None, "style_id": None} | extra
    fixed = {"conditioned_on": "image", "model": None, "prompt_sha256": None, "status": "ok", "reason": None}
    return {
        "caption_id": caption_id,
        "image_id": image_id,
        "kind": kind,
        "source": source,
        "text": text,
        **row,
        **fixed,
    }


def _part_rows(picture: Rendered, image_id: str) -> list[Row]:
    phrases = words.part_phrases(picture)
    return [
        {
            "image_id": image_id,
            "part": part,
            "phrase": phrases.get(part),
            "box": mask_box(mask),
            "mask": encode_mask(mask),
        }
        for part, mask in picture.masks.items()
    ]


def contact_sheet(pictures: Sequence[Path | npt.NDArray[np.uint8]], *, columns: int = 12, zoom: int = 1) -> Image.Image:
    """Return pictures side by side, row by row, for looking at.

    Args:
        pictures: image files or uint8 arrays of shape (H, W, 3), all of one size.
        columns: pictures per row.
        zoom: every pixel becomes zoom x zoom pixels.

    Raises:
        UsageError: there are no pictures, or their sizes differ.
    """
    arrays = [np.asarray(Image.open(item).convert("RGB")) if isinstance(item, Path) else item for item in pictures]
    if not arrays or len({array.shape for array in arrays}) > 1:
        raise UsageError("A contact sheet needs at least one picture, all of one size.")
    height, width, _ = arrays[0].shape
    columns = min(columns, len(arrays))
    sheet = np.zeros((-(-len(arrays) // columns) * height, columns * width, 3), dtype=np.uint8)
    for number, array in enumerate(arrays):
        y, x = number // columns * height, number % columns * width
        sheet[y : y + height, x : x + width] = array
    return Image.fromarray(sheet.repeat(zoom, axis=0).repeat(zoom, axis=1))
