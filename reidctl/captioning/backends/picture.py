"""An image file as the data URL that a chat-completions request carries."""

import asyncio
import base64
import io
import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from reidctl.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# Above it a small file can ask for gigabytes. Pillow itself only warns from 89 and refuses from 179 megapixels.
_MOST_PIXELS = 89_000_000


def data_url(path: str, side: int | None, quality: int = 90, *, shrink: int = 1) -> str:
    """Return an image as a JPEG data URL, upright, in RGB, without its metadata.

    Args:
        path: the file; of several frames the first is taken.
        side: longest side in pixels; larger images are reduced. None: the image's own size.
        quality: of the JPEG, 1 to 100.
        shrink: divides the longest side that is left, for a server that finds the image too large.

    Raises:
        DataError: the file is missing, damaged, too large to open or not an image.
    """
    picture = open_picture(path, side, shrink=shrink)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def open_picture(path: str, side: int | None, *, shrink: int = 1) -> "Image.Image":
    """Return an image as every model gets it: upright, in RGB, no larger than asked for, without its metadata.

    Args:
        path, side, shrink: see `data_url`.

    Raises:
        DataError: see `data_url`.
    """
    # A pipe or a device would be waited for without end.
    if not Path(path).is_file():
        raise DataError("the image cannot be read: there is no such file")
    try:
        picture = _opened(path, side)
    except DataError:
        raise
    # Pillow's readers raise nearly anything for a damaged file, and one file must fail alone.
    except Exception as error:
        kinds = {"UnidentifiedImageError": "it is no image", "DecompressionBombError": "it has too many pixels"}
        raise DataError(f"the image cannot be read: {kinds.get(type(error).__name__, 'it is damaged')}") from None
    longest = max(1, min(max(picture.size), side or max(picture.size)) // shrink)
    picture.thumbnail((longest, longest))
    # EXIF (place, device, time) and colour profile of the original are not copied.
    picture.info.clear()
    return picture


def _opened(path: str, side: int | None) -> "Image.Image":
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        if image.width * image.height > _MOST_PIXELS:
            raise DataError(f"the image cannot be read: {image.width} x {image.height} pixels are too many")
        if side is not None:
            image.draft(None, (side, side))  # a large JPEG is decoded at a fraction of its size
        return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: "Image.Image") -> "Image.Image":
    """The picture as a person would see it: transparent parts on white, 16 bits reduced to 8."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        return _eight_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: "Image.Image") -> "Image.Image":
    """Grey values of 16 bits, 32 bits or floats on 0 to 255; `convert` alone would cut them off."""
    import numpy as np
    from PIL import Image

    values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0.0, neginf=0.0)
    top = float(values.max(initial=0.0))
    if image.mode.startswith("F") and top <= 1:
        full = 1.0
    else:
        full = 255.0 if top <= 255 and not image.mode.startswith("I;16") else max(65535.0, top)
    return Image.fromarray(np.clip(values * (255.0 / full), 0, 255).astype(np.uint8))


class PictureCache:
    """Encodes each picture once for the requests that follow each other, in worker threads, for one event loop.

    Args:
        side, quality: see `data_url`.
        most_bytes: of the encoded pictures that are kept; the ones longest unused go first.
    """

    def __init__(self, side: int | None, quality: int, *, most_bytes: int = 8 * 2**20) -> None:
        self._side, self._quality, self._most = side, quality, most_bytes
        self._ready: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._coming: dict[tuple[str, int], asyncio.Future[str]] = {}
        self._held = 0
        self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="picture")

    async def get(self, path: str, *, shrink: int = 1) -> str:
        """Return `data_url` of the picture.

        Raises:
            DataError: see `data_url`.
        """
        key = (path, shrink)
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        if key not in self._coming:
            work = self._pool.submit(data_url, path, self._side, self._quality, shrink=shrink)
            self._coming[key] = asyncio.wrap_future(work)
            self._coming[key].add_done_callback(lambda future: self._arrived(key, future))
        # Shielded: one cancelled request must not take the picture from the other.
        return await asyncio.shield(self._coming[key])

    def _arrived(self, key: tuple[str, int], future: "asyncio.Future[str]") -> None:
        del self._coming[key]
        if future.cancelled() or future.exception() is not None:
            return
        self._ready[key] = future.result()
        self._held += len(future.result())
        while self._held > self._most:
            self._held -= len(self._ready.popitem(last=False)[1])

    def close(self) -> None:
        """Drop what is waited for; a picture that is being encoded ends by itself. Called in the event loop."""
        for future in list(self._coming.values()):
            future.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
