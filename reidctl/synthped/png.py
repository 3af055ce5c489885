"""PNG files whose bytes depend on the pixels alone."""

import struct
import zlib

import numpy as np
import numpy.typing as npt

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BLOCK = 65535  # longest stored block that deflate allows


def png_bytes(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return an RGB image as a PNG file, uncompressed.

    Stored (not compressed) deflate blocks: compressed bytes differ between zlib versions and zlib-ng, and the
    digest of a file must not.

    Args:
        pixels: shape (H, W, 3), uint8.
    """
    height, width, _ = pixels.shape
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # leading byte: filter type 0
    rows[:, 1:] = pixels.reshape(height, 3 * width)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _chunk(b"IHDR", header) + _chunk(b"IDAT", _stored(rows.tobytes())) + _chunk(b"IEND", b"")
    return _SIGNATURE + body


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _stored(data: bytes) -> bytes:
    """A zlib stream made of stored blocks (RFC 1950, RFC 1951 section 3.2.4)."""
    parts = [b"\x78\x01"]
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        final = start + _BLOCK >= len(data)
        parts.append(struct.pack("<BHH", int(final), len(block), len(block) ^ 0xFFFF) + block)
    parts.append(struct.pack(">I", zlib.adler32(data)))
    return b"".join(parts)
