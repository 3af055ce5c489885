"""Reading image files: in order, on processes or threads, with hostile files, interrupts and killed workers."""

import ctypes
import hashlib
import io
import itertools
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reidctl.datasets import scan as scan_module
from reidctl.datasets.base import Draft, Entry, Options, measure
from reidctl.datasets.scan import (
    Facts,
    Problem,
    difference_hash,
    image_facts,
    inspect_image,
    nearest_hashes,
    pixel_digest,
    scan,
)
from reidctl.errors import DataError


def picture(path, seed=0, size=(16, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def png_bomb(width, height):
    """A PNG of a few bytes that claims a size and begins with its first rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10 * (3 * width + 1)))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def smooth(seed=0, size=(64, 128)):
    """A picture with structure at the scale of the difference hash."""
    cells = np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


# --- what a file holds


def test_facts_are_size_and_digest_of_the_bytes(tmp_path):
    path = picture(tmp_path / "a.png")
    (found,) = scan([path], workers=1)
    assert found == Facts(16, 32, hashlib.sha256(path.read_bytes()).hexdigest(), None, None)
    assert image_facts(path) == (16, 32, found.sha256)


def test_equal_pixels_in_two_lossless_formats_have_one_digest(tmp_path):
    image = Image.open(picture(tmp_path / "a.png"))
    image.save(tmp_path / "a.bmp")
    image.save(tmp_path / "small.png", optimize=True, compress_level=9)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    other = image.copy()
    other.putpixel((3, 3), tuple(255 - value for value in image.getpixel((3, 3))))
    other.save(tmp_path / "other.png")
    names = ("a.png", "a.bmp", "small.png", "alpha.png", "other.png")
    found = list(scan([tmp_path / name for name in names], pixels=True))
    assert [item.pixels == found[0].pixels for item in found] == [True, True, True, True, False]
    assert len({item.sha256 for item in found}) == 5


def test_deep_pixels_are_not_clipped_into_equal_ones():
    first, second = (Image.fromarray(np.full((4, 4), value, dtype=np.uint16)) for value in (1000, 2000))
    assert pixel_digest(first) != pixel_digest(second)
    assert pixel_digest(Image.new("RGB", (2, 8))) != pixel_digest(Image.new("RGB", (8, 2)))


def test_the_difference_hash_says_where_a_cell_is_brighter_than_its_right_neighbour():
    falling = Image.fromarray(np.tile(np.arange(240, 60, -20, dtype=np.uint8), (8, 1)))
    assert difference_hash(falling) == 2**64 - 1
    assert difference_hash(falling.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) == 0
    one = np.full((8, 9), 100, dtype=np.uint8)
    one[0, 0] = 200
    assert difference_hash(Image.fromarray(one)) == 1 << 63


def test_reencoding_and_resizing_move_few_bits_and_other_pictures_many():
    for seed in range(20):
        image = smooth(seed)
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=70)
        again = difference_hash(Image.open(buffer))
        small = difference_hash(image.resize((32, 64)))
        mine = difference_hash(image)
        assert (mine ^ again).bit_count() <= 4 and (mine ^ small).bit_count() <= 4
        assert (mine ^ difference_hash(smooth(seed + 100))).bit_count() > 4


def test_hostile_files_are_problems_with_a_kind_and_one_sentence(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    png = picture(tmp_path / "whole.png").read_bytes()
    files = {
        "half.jpg": (content[: len(content) // 2], "truncated"),
        "half.png": (png[: len(png) // 2], "truncated"),
        "bomb.png": (png_bomb(50_000, 50_000), "huge"),
        "large.png": (png_bomb(9_000, 9_000), "huge"),
        "empty.png": (b"", "unreadable"),
        "text.png": (b"hello", "unreadable"),
    }
    for name, (payload, _) in files.items():
        (tmp_path / name).write_bytes(payload)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "away.png").symlink_to(tmp_path / "nowhere.png")
    with (tmp_path / "sparse.png").open("wb") as stream:
        stream.truncate(scan_module.MAX_BYTES + 1)
    expected = {name: kind for name, (_, kind) in files.items()} | {
        "pipe.png": "unreadable",
        "loop.png": "unreadable",
        "away.png": "missing",
        "sparse.png": "huge",
        "none.png": "missing",
        "whole.png/a.png": "missing",
        "a\0b.png": "unreadable",
        ".": "unreadable",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(scan([tmp_path / name for name in expected]))
    assert dict(zip(expected, [item.kind for item in found], strict=True)) == expected
    for name, item in zip(expected, found, strict=True):
        assert str(tmp_path / name) in item.message and item.message.endswith(".") and "\n" not in item.message
        assert " at 0x" not in item.message


@pytest.mark.filterwarnings("ignore")
@given(
    place=st.integers(0, 2000), byte=st.integers(0, 255), kind=st.sampled_from(["PNG", "JPEG", "BMP", "GIF", "TIFF"])
)
@settings(max_examples=200, deadline=None)
def test_a_flipped_byte_never_raises(tmp_path_factory, place, byte, kind):
    path = tmp_path_factory.getbasetemp() / "flipped"
    buffer = io.BytesIO()
    smooth(1, (16, 32)).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    content[place % len(content)] = byte
    path.write_bytes(content)
    assert isinstance(inspect_image(path, pixels=True, near=True), Facts | Problem)


# --- many files


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """1,100 names of 11 files, one of them broken: enough for processes."""
    folder = tmp_path_factory.mktemp("crowd")
    paths = [picture(folder / f"{i}.png", i, (4, 8)) for i in range(10)]
    (folder / "broken.png").write_bytes(b"no")
    return [*paths, folder / "broken.png"] * 100


@pytest.mark.parametrize("workers", [1, 2])
def test_answers_come_in_order_from_threads_and_processes(crowd, workers):
    found = list(scan(crowd, workers=workers, pixels=True, near=True))
    expected = list(scan(crowd[:11], pixels=True, near=True))
    assert len(expected) == 11 and isinstance(expected[10], Problem)
    assert found == expected * 100


def test_a_worker_loads_no_heavy_library():
    code = (
        "import sys, reidctl.datasets.scan;"
        "heavy = {'torch', 'pandas', 'pyarrow', 'reidctl.tables', 'rich', 'typer'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_few_files_start_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "ProcessPoolExecutor", None)
    paths = [picture(tmp_path / "a.png")] * (scan_module.SPAWN_FROM - 1)
    assert len(list(scan(paths, workers=2))) == len(paths)


def test_nothing_to_read_gives_nothing():
    assert list(scan([])) == []


def test_a_caller_that_stops_early_leaves_no_process(crowd):
    before = children()
    reading = scan(crowd * 5, workers=2)
    first = list(itertools.islice(reading, 3))
    reading.close()
    assert len(first) == 3 and children() <= before


def test_warning_filters_are_put_back_between_answers(tmp_path):
    path = picture(tmp_path / "a.png")
    before = list(warnings.filters)
    for _ in scan([path] * 3):
        assert list(warnings.filters) == before


def children():
    """The ids of this process's children, but for multiprocessing's own tracker, which stays."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                text = Path("/proc", name, "stat").read_text()
                command = Path("/proc", name, "cmdline").read_bytes()
            except OSError:
                continue
            if int(text.rpartition(")")[2].split()[1]) == os.getpid() and b"resource_tracker" not in command:
                found.add(int(name))
    return found


SLOW = """
import sys
from pathlib import Path
from reidctl.datasets import scan
if __name__ == "__main__":
    scan._CHUNK = int(sys.argv[2])
    try:
        print("ready", flush=True)
        for number, _ in enumerate(scan.scan([Path(sys.argv[1])] * 1_000_000, workers=2)):
            if number == 100:
                print("reading", flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@pytest.fixture
def slow(tmp_path, request):
    """A program that is about to read a million images on two processes, leader of a session of its own."""
    (tmp_path / "slow.py").write_text(SLOW)
    path = picture(tmp_path / "a.png", size=(64, 128))
    process = subprocess.Popen(
        [sys.executable, tmp_path / "slow.py", path, str(getattr(request, "param", 32))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def group(leader):
    """The living processes of a session."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                fields = Path("/proc", name, "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(name))
    return found


def gone(leader, seconds=5.0):
    until = time.monotonic() + seconds
    while group(leader) and time.monotonic() < until:
        time.sleep(0.05)
    return not group(leader)


def stops(process):
    """Interrupt a whole group, as a terminal does; it must end soon, without a word but its own."""
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert (out, err, process.returncode) == ("interrupted\n", "", 0)
    assert time.monotonic() - started < 10
    assert gone(process.pid)


def crowded(leader):
    """Wait until there are the program, multiprocessing's tracker and two workers."""
    until = time.monotonic() + 30
    while len(group(leader)) < 4 and time.monotonic() < until:
        time.sleep(0.01)


def test_an_interrupt_while_reading_stops_quickly_and_quietly(slow):
    assert slow.stdout.readline() == "reading\n"
    stops(slow)


def test_an_interrupt_while_workers_start_stops_quietly(slow):
    crowded(slow.pid)
    stops(slow)


@pytest.mark.parametrize("slow", [200_000], indirect=True)
def test_an_interrupt_does_not_wait_for_the_work_in_hand(slow):
    crowded(slow.pid)
    time.sleep(2)
    stops(slow)


def test_workers_end_with_a_parent_that_was_killed(slow):
    assert slow.stdout.readline() == "reading\n"
    assert len(group(slow.pid)) >= 3
    os.kill(slow.pid, signal.SIGKILL)
    slow.wait()
    assert gone(slow.pid), "workers outlived their parent"


def test_a_killed_worker_is_one_sentence(crowd):
    before = children()
    reading = scan(crowd * 20, workers=2)
    next(reading)
    os.kill(max(children() - before), signal.SIGKILL)
    with pytest.raises(DataError, match=r"ended unexpectedly at or soon after .*\.png \(out of memory") as caught:
        list(reading)
    assert "--workers" in caught.value.hint
    assert children() <= before


def test_a_worker_that_is_told_to_stop_reads_no_further(crowd, monkeypatch):
    monkeypatch.setattr(scan_module, "_stop", ctypes.c_bool(True))
    assert scan_module._inspect_all([str(path) for path in crowd[:5]], False, False) == []


def test_an_import_reads_images_in_processes_with_the_same_rows(tmp_path):
    path = picture(tmp_path / "a.png")
    entries = [Entry(f"{i}.png", path, "train", str(i)) for i in range(scan_module.SPAWN_FROM)]
    one, two = (measure(Draft("d", entries), Options(workers=workers)).images for workers in (1, 2))
    assert one.equals(two) and len(one) == scan_module.SPAWN_FROM
    entries[-1] = Entry("bad.png", tmp_path / "none.png", "train", "x")
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        measure(Draft("d", entries), Options(workers=2))


# --- near hashes


def slowly_nearest(first, second, distance):
    answers = []
    for a in first.tolist():
        near, j = min(((a ^ b).bit_count(), j) for j, b in enumerate(second.tolist()))
        answers.append(j if near <= distance else -1)
    return answers


@pytest.mark.parametrize("distance", [0, 1, 4])
@pytest.mark.parametrize("block", [7, 1 << 20])
def test_the_nearest_hashes_are_those_of_comparing_all_pairs(distance, block):
    rng = np.random.default_rng(3)
    first = rng.integers(0, 2**63, 60, dtype=np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, size=n % 7, replace=False)) for n in range(50)]
    second = np.concatenate([first[:50] ^ np.asarray(flips, np.uint64), rng.integers(0, 9, 9, np.uint64), first[:3]])
    found = nearest_hashes(first, second, distance=distance, block=block).tolist()
    assert found == slowly_nearest(first, second, distance)
    # n % 7 <= distance holds for 8, 15 and 36 of 0..49; hashes 1 and 2 stand in `second` unchanged, too.
    assert sum(j >= 0 for j in found) == {0: 10, 1: 16, 4: 36}[distance]


def test_nothing_is_near_nothing():
    nothing, three = np.empty(0, np.uint64), np.arange(3, dtype=np.uint64)
    assert len(nearest_hashes(nothing, three)) == 0
    assert nearest_hashes(three, nothing).tolist() == [-1, -1, -1]


@pytest.mark.slow
@pytest.mark.parametrize("spread", [2**63, 2**12])
def test_100000_hashes_take_seconds_and_bounded_memory_even_if_all_are_near(spread):
    rng = np.random.default_rng(0)
    first, second = (np.unique(rng.integers(0, spread, 50_000, dtype=np.uint64)) for _ in range(2))
    started = time.monotonic()
    tracemalloc.start()
    nearest_hashes(first, second)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.monotonic() - started < 60 and peak < 300 << 20
