import asyncio
import base64
import io
import os
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from reidctl.captioning.backends import picture
from reidctl.captioning.backends.picture import PictureCache, data_url
from reidctl.errors import DataError


def opened(url: str) -> Image.Image:
    kind, _, content = url.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def colour(image: Image.Image, x: int = 8, y: int = 8) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def saved(folder: Path, image: Image.Image, name: str = "a.png", **options: Any) -> str:
    image.save(folder / name, **options)
    return str(folder / name)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [
        ((128, 384), None, (128, 384)),
        ((128, 384), 512, (128, 384)),  # never enlarged
        ((128, 384), 192, (64, 192)),
        ((384, 128), 192, (192, 64)),
        ((1, 4000), 100, (1, 100)),
        ((1, 1), None, (1, 1)),
    ],
)
def test_the_longest_side_is_bounded_and_the_shape_kept(
    tmp_path: Path, size: tuple[int, int], side: int | None, expected: tuple[int, int]
) -> None:
    assert opened(data_url(saved(tmp_path, Image.new("RGB", size)), side)).size == expected


def test_a_smaller_picture_can_be_had_of_any_size(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (128, 384)))
    assert opened(data_url(path, None, shrink=2)).size == (64, 192)
    assert opened(data_url(path, 512, shrink=2)).size == (64, 192)
    assert opened(data_url(path, 96, shrink=2)).size == (16, 48)
    assert opened(data_url(saved(tmp_path, Image.new("RGB", (1, 1))), None, shrink=2)).size == (1, 1)


def test_a_lower_quality_gives_fewer_bytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 48, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise))
    assert len(data_url(path, None, 30)) < 0.6 * len(data_url(path, None, 95))


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_photo_is_turned_upright_and_loses_its_metadata(tmp_path: Path, name: str) -> None:
    image = Image.new("RGB", (40, 20), "blue")
    image.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: left becomes top
    exif[0x010E] = "home address"
    path = saved(tmp_path, image, name, exif=exif, icc_profile=b"profile of a camera")
    url = data_url(path, None)
    sent = opened(url)
    assert sent.size == (20, 40)
    assert colour(sent, 10, 5)[0] > 200 and colour(sent, 10, 35)[2] > 200
    content = base64.b64decode(url.partition(",")[2])
    assert b"home address" not in content and b"profile of a camera" not in content
    assert not sent.getexif() and "icc_profile" not in sent.info


def test_transparent_parts_are_white_and_not_black(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert min(colour(opened(data_url(saved(tmp_path, clear), None)))) > 250
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert colour(opened(data_url(saved(tmp_path, palette), None))) == pytest.approx((10, 200, 30), abs=6)
    hole = saved(tmp_path, palette, transparency=1)
    assert min(colour(opened(data_url(hole, None)))) > 250
    half = Image.new("LA", (16, 16), (0, 128))
    assert colour(opened(data_url(saved(tmp_path, half), None))) == pytest.approx((127, 127, 127), abs=3)


@pytest.mark.parametrize(
    ("image", "name", "grey"),
    [
        (Image.fromarray(np.full((16, 16), 32768, np.uint16)), "a.png", 127.5),
        (Image.fromarray(np.full((16, 16), 200, np.uint16)), "a.png", 0.8),
        (Image.fromarray(np.full((16, 16), 32768, np.int32)), "a.tif", 127.5),
        (Image.fromarray(np.full((16, 16), 120, np.int32)), "a.tif", 120),
        (Image.fromarray(np.full((16, 16), 0.5, np.float32)), "a.tif", 127.5),
        (Image.fromarray(np.full((16, 16), 120.0, np.float32)), "a.tif", 120),
        (Image.fromarray(np.full((16, 16), np.nan, np.float32)), "a.tif", 0),
        (Image.new("1", (16, 16), 1), "a.png", 255),
        (Image.new("L", (16, 16), 77), "a.png", 77),
    ],
)
def test_grey_pictures_of_every_depth_keep_their_brightness(
    tmp_path: Path, image: Image.Image, name: str, grey: float
) -> None:
    sent = opened(data_url(saved(tmp_path, image, name), None))
    assert sent.mode == "RGB"
    assert colour(sent) == pytest.approx((grey,) * 3, abs=2)


def test_a_cmyk_picture_becomes_rgb(tmp_path: Path) -> None:
    sent = opened(data_url(saved(tmp_path, Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "a.jpg"), None))
    assert sent.mode == "RGB"
    assert colour(sent) == pytest.approx((255, 0, 0), abs=8)


def test_of_an_animation_the_first_picture_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), name) for name in ("red", "blue")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert colour(opened(data_url(path, None)))[0] > 200


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(9000)))


def test_what_is_no_picture_is_told_apart_without_its_content(tmp_path: Path) -> None:
    whole = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole, "PNG")
    cases = {
        "bomb.png": bomb(),
        "truncated.png": whole.getvalue()[: len(whole.getvalue()) // 2],
        "flipped.png": whole.getvalue()[:60] + b"\xff\xff\xff" + whole.getvalue()[63:],
        "text.jpg": b"no picture at all",
        "empty.jpg": b"",
        "page.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="the image cannot be read"):
            data_url(str(tmp_path / name), 512)
    for path in (tmp_path, tmp_path / "absent.png"):
        with pytest.raises(DataError, match="no such file"):
            data_url(str(path), 512)


def test_between_pillows_warning_and_its_error_a_picture_is_refused_too(tmp_path: Path) -> None:
    # 100 megapixels of one colour: a small file, but 300 MB when opened.
    content = bomb().replace(struct.pack(">II", 30_000, 30_000), struct.pack(">II", 10_000, 10_000))
    header = content[12:29]
    (tmp_path / "a.png").write_bytes(content[:29] + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with pytest.raises(DataError, match="10000 x 10000"):
        data_url(str(tmp_path / "a.png"), 512)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError):
        data_url(str(tmp_path / "a.png"), 512)


def fetched(cache: PictureCache, *paths: str) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(cache.get(path) for path in paths), return_exceptions=True)

    return asyncio.run(all_of_them())


def test_each_picture_is_encoded_once_in_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple[str, str]] = []

    def slow(path: str, side: int | None, quality: int, *, shrink: int = 1) -> str:
        encoded.append((path, threading.current_thread().name))
        time.sleep(0.05)
        return f"{path} {side} {quality} {shrink}"

    monkeypatch.setattr(picture, "data_url", slow)
    cache = PictureCache(64, 80)
    assert fetched(cache, "a", "a", "b") == ["a 64 80 1", "a 64 80 1", "b 64 80 1"]
    assert fetched(cache, "a") == ["a 64 80 1"]
    assert sorted(path for path, _ in encoded) == ["a", "b"]
    assert all(name.startswith("picture") for _, name in encoded)
    cache.close()


def test_the_cache_keeps_what_was_used_last_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []

    def sized(path: str, *_: Any, **__: Any) -> str:
        encoded.append(path)
        return "x" * 40

    monkeypatch.setattr(picture, "data_url", sized)
    cache = PictureCache(None, 90, most_bytes=100)
    for path in ("a", "b", "a", "c", "a", "b"):
        fetched(cache, path)
    assert encoded == ["a", "b", "c", "b"]  # c pushed b out, which was unused for longer than a
    cache.close()


def test_a_damaged_picture_fails_for_both_texts_and_is_looked_at_again_later(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"damaged")
    cache = PictureCache(None, 90)
    assert [type(found) for found in fetched(cache, str(path), str(path))] == [DataError, DataError]
    Image.new("RGB", (4, 4)).save(path)
    assert opened(fetched(cache, str(path))[0]).size == (4, 4)
    cache.close()


def test_one_request_that_is_given_up_does_not_take_the_picture_from_the_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(picture, "data_url", lambda *_, **__: time.sleep(0.1) or "url")
    cache = PictureCache(None, 90)

    async def one_gives_up() -> str:
        first, second = asyncio.ensure_future(cache.get("a")), asyncio.ensure_future(cache.get("a"))
        await asyncio.sleep(0.02)
        first.cancel()
        return await second

    assert asyncio.run(one_gives_up()) == "url"
    cache.close()
