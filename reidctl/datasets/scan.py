"""What image files hold, read once each on all cores: size, digests, and a sentence for a file that is no picture.

Worker processes import this module, so it loads Pillow and numpy and nothing larger.
"""

import ctypes
import hashlib
import io
import os
import stat
import threading
import warnings
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from signal import SIG_BLOCK, SIG_SETMASK, SIGINT, pthread_sigmask
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from reidctl.errors import DataError

# Anything larger is a decompression bomb, not a picture of a person.
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 << 20
# Fewer files than this are read by threads: starting processes would take longer than the work.
SPAWN_FROM = 1000
_CHUNK = 32
_HINT = "Replace the file, or import with --skip-bad."
_RGB = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})

Kind = Literal["missing", "unreadable", "truncated", "huge"]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a readable image file holds.

    Attributes:
        sha256: of the file's bytes.
        pixels: digest of size and RGB pixels, equal for one picture in two lossless formats; None if not asked for.
        dhash: 64-bit difference hash; None if not asked for.
    """

    width: int
    height: int
    sha256: str
    pixels: str | None = None
    dhash: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a file is no picture that training could use.

    Attributes:
        kind: missing; unreadable (no permission, no regular file, or not an image); truncated (begins as an image, does
            not decode to its last row); huge (more pixels or bytes than a picture of a person can have).
        message: one sentence that names the file.
    """

    kind: Kind
    message: str


Found = Facts | Problem


def image_facts(path: Path) -> tuple[int, int, str]:
    """Return (width, height, sha256 of the file) of an image that decodes to its last row.

    Raises:
        DataError: missing, a link without end, not a regular file, not an image, truncated, or absurdly large.
    """
    with _quiet():
        found = inspect_image(path)
    if isinstance(found, Problem):
        raise DataError(found.message, hint=_HINT)
    return found.width, found.height, found.sha256


def scan(
    paths: Sequence[Path], *, workers: int = 0, pixels: bool = False, near: bool = False
) -> Generator[Found, None, None]:
    """Yield what each file holds, in the order of `paths`; memory does not grow with their number.

    Args:
        paths: image files; need not exist.
        workers: processes (threads for fewer than `SPAWN_FROM` files); 0: one per core.
        pixels: digest the decoded pixels too.
        near: compute the difference hash too.

    Raises:
        DataError: the system killed a worker process.
    """
    names = [str(path) for path in paths]
    number = workers or cores()
    if len(names) < SPAWN_FROM or number == 1:
        yield from _in_threads(names, number, pixels, near)
    else:
        yield from _in_processes(names, number, pixels, near)


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _in_threads(names: Sequence[str], workers: int, pixels: bool, near: bool) -> Iterator[Found]:
    # Threads suffice for few files: hashing and decoding release the interpreter lock.
    window = 4 * _CHUNK * workers
    with ThreadPoolExecutor(workers) as pool:
        # One thread only would pay for handing the lock to and fro.
        apply = pool.map if workers > 1 else map
        for start in range(0, len(names), window):
            # Warning filters belong to the whole process, so they are changed here, not in the threads, and are put
            # back before the caller goes on.
            with _quiet():
                some = names[start : start + window]
                found = list(apply(lambda name: inspect_image(Path(name), pixels=pixels, near=near), some))
            yield from found


def _in_processes(names: Sequence[str], workers: int, pixels: bool, near: bool) -> Iterator[Found]:
    context = get_context("spawn")
    # A plain byte of shared memory: a lock would stay locked if a worker were killed while it holds it.
    stop = context.RawValue(ctypes.c_bool, False)
    chunks = (names[start : start + _CHUNK] for start in range(0, len(names), _CHUNK))
    waiting: deque[tuple[Sequence[str], Future[list[Found]]]] = deque()

    def submit(pool: Executor, count: int) -> None:
        # Children inherit the mask: Ctrl-C reaches all of a terminal's processes, but only the parent shall answer.
        before = pthread_sigmask(SIG_BLOCK, {SIGINT})
        try:
            for chunk in islice(chunks, count):
                waiting.append((chunk, pool.submit(_inspect_all, chunk, pixels, near)))
        finally:
            pthread_sigmask(SIG_SETMASK, before)

    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(stop,)) as pool:
        chunk: Sequence[str] = names
        try:
            submit(pool, 4 * workers)
            while waiting:
                chunk, future = waiting.popleft()
                found = future.result()
                submit(pool, 1)
                yield from found
        except BrokenProcessPool:
            raise DataError(
                f"A process that reads images ended unexpectedly at or soon after {chunk[0]} (out of memory, or an "
                "image that crashes the decoder).",
                hint="Give it fewer --workers; if it stops at the same place again, look at the images there.",
            ) from None
        finally:
            # Reached by errors, Ctrl-C and callers that stop early, too: what is still queued must not be read.
            stop.value = True
            pool.shutdown(cancel_futures=True)


_stop: ctypes.c_bool | None = None


def _start_worker(stop: ctypes.c_bool) -> None:
    global _stop
    _stop = stop
    warnings.simplefilter("ignore")
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End this process when its parent was killed: a pool's workers would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _inspect_all(names: Sequence[str], pixels: bool, near: bool) -> list[Found]:
    found = []
    for name in names:
        if _stop is not None and _stop.value:
            break
        found.append(inspect_image(Path(name), pixels=pixels, near=near))
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Pillow's warnings: what matters of them is an answer here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def inspect_image(path: Path, *, pixels: bool = False, near: bool = False) -> Found:
    """Return what one file holds; see `scan`. Opens no pipe or device and decodes nothing absurdly large."""
    try:
        facts = path.stat()
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(facts.st_mode):
            return Problem("unreadable", f"Image {path} is not a regular file.")
        if facts.st_size > MAX_BYTES:
            return Problem("huge", f"Image {path} is larger than {MAX_BYTES >> 20} MiB.")
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return Problem("missing", f"Image {path} does not exist.")
    except (OSError, ValueError) as error:  # a link loop, no permission, a NUL byte
        return Problem("unreadable", f"Image {path} cannot be opened ({_reason(error)}).")
    return _decode(path, content, pixels, near)


def _decode(path: Path, content: bytes, pixels: bool, near: bool) -> Found:
    kind: Kind = "unreadable"
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return Problem("huge", f"Image {path} has {width}x{height} pixels; the limit is {MAX_PIXELS:,}.")
            kind = "truncated"
            image.load()
            digest = pixel_digest(image) if pixels else None
            return Facts(
                width, height, hashlib.sha256(content).hexdigest(), digest, difference_hash(image) if near else None
            )
    except Image.DecompressionBombError:
        return Problem("huge", f"Image {path} has absurdly many pixels; the limit is {MAX_PIXELS:,}.")
    except Exception as error:
        # Decoders of damaged files raise whatever their arithmetic runs into; to us it is one file that is no picture.
        return Problem(kind, f"Image {path} cannot be read ({_reason(error)}).")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.replace("<_io.BytesIO object", "").split(" at 0x")[0].strip()


def pixel_digest(image: Image.Image) -> str:
    """Return 128 bits over the size and the RGB pixels of a picture (over the raw values where RGB would clip them)."""
    shown = image if image.mode == "RGB" or image.mode not in _RGB else image.convert("RGB")
    state = hashlib.sha256(f"{shown.mode} {shown.width}x{shown.height}\n".encode())
    state.update(shown.tobytes())
    return state.hexdigest()[:32]


def difference_hash(image: Image.Image) -> int:
    """Return 64 bits: whether each cell of an 8 x 8 grid is brighter than its right neighbour.

    Resizing and re-encoding change few of them (tests/benchmarks/bench_data_check.py --near). The margin keeps noise in
    flat areas from deciding.
    """
    shown = image if image.mode in ("RGB", "L") else image.convert("RGB")
    grey = shown.convert("L").resize((9, 8), Image.Resampling.BILINEAR)
    cells = np.asarray(grey, dtype=np.int16)
    bits = cells[:, :-1] > cells[:, 1:] + 2
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def nearest_hashes(
    first: npt.NDArray[np.uint64], second: npt.NDArray[np.uint64], *, distance: int = 4, block: int = 1 << 20
) -> npt.NDArray[np.int64]:
    """Return for each hash of `first` the index of the nearest in `second`; -1 if none is within `distance` bits.

    Exact: split into `distance` + 1 pieces, two such hashes agree in one piece, so only hashes that share a piece are
    compared, `block` pairs at a time. Of equally near ones the first counts.
    """
    # Distance and index in one number, so that its minimum is the answer.
    far = np.int64(distance + 1) << 32
    best = np.full(len(first), far)
    edges = np.linspace(0, 64, distance + 2, dtype=np.int64)
    for low, high in pairwise(edges.tolist()):
        mask = np.uint64((1 << (high - low)) - 1)
        mine, theirs = ((side >> np.uint64(low)) & mask for side in (first, second))
        order = np.argsort(theirs, kind="stable")
        begins = np.searchsorted(theirs[order], mine, "left")
        counts = np.searchsorted(theirs[order], mine, "right") - begins
        for i, place in _expand(begins, counts, block):
            j = order[place]
            np.minimum.at(best, i, (_bits(first[i] ^ second[j]) << 32) + j)
    return np.where(best < far, best & 0xFFFFFFFF, -1)


def _expand(
    begins: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], block: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield (row, place) for every place in [begin, begin + count) of every row, about `block` pairs at a time."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, block):
        pair = np.arange(start, min(start + block, total))
        row = np.searchsorted(ends, pair, "right")
        yield row, begins[row] + pair - (ends[row] - counts[row])


def _bits(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The number of set bits; numpy has a function for it only since 2.0."""
    octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)
    table: npt.NDArray[np.int64] = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)
    return np.asarray(table[octets].sum(1), dtype=np.int64)
