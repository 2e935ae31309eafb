"""From the bytes of a picture to pixels of one size; nothing is believed that the bytes say.

The header is parsed here, before a decoder sees a byte, so a picture of absurd size costs nothing.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image

from sana_jax.data.records import BadRecord
from sana_jax.images import PICTURE_FORMATS, opaque

ENDINGS = (".jpeg", ".jpg", ".png", ".webp")
LARGEST_PIXELS = 89_478_485  # where Pillow begins to suspect a bomb: a quarter of a GB of RGB
LARGEST_BYTES = 256 << 20
SMALLEST_SIDE = 8  # pixels
PREFIXES = (4 << 10, 64 << 10, 1 << 20, LARGEST_BYTES)  # what is read, in turn, for a header
TURNS = {  # how a picture with this EXIF orientation is put upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# Start-of-frame markers of JPEG; 0xC4, 0xC8 and 0xCC are something else.
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class _More(Exception):
    """The header goes on behind the bytes that are there."""


class Header(NamedTuple):
    """Width and height as stored, in pixels, and the EXIF orientation."""

    width: int
    height: int
    orientation: int = 1

    @property
    def shown(self):
        """(width, height) as the picture is shown."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def header(data):
    """The Header of a picture, from its bytes.

    Raises BadRecord: not JPEG, PNG or WebP, cut short, or of a size that is not allowed.
    """
    return read_header(lambda most: data[:most])


def read_header(read):
    """The Header of a picture of which read(n) gives the first n bytes, or all if there are fewer."""
    for most in PREFIXES:
        data = read(most)
        try:
            return _check_size(_parse(data))
        except _More:
            if len(data) < most:
                break
    raise BadRecord("damaged", "ends within its header")


def _check_size(found):
    size = f"{found.width} x {found.height} pixels"
    if found.width * found.height > LARGEST_PIXELS:
        raise BadRecord("too_large", size)
    if min(found.width, found.height) < SMALLEST_SIDE:
        raise BadRecord("too_small", size)
    return found


def _parse(data):
    if not data:
        raise BadRecord("empty")
    for magic, parse in ((b"\x89PNG\r\n\x1a\n", _png), (b"\xff\xd8\xff", _jpeg), (b"RIFF", _webp)):
        if data.startswith(magic):
            return parse(data)
    raise BadRecord("format", f"begins with {data[:8]!r}")


def _png(data):
    kind, width, height = struct.unpack(">4s2I", _piece(data, 12, 12))
    if kind != b"IHDR":
        raise BadRecord("damaged", "a PNG without a header")
    if width * height > LARGEST_PIXELS:
        return Header(width, height)
    at = 33
    while True:
        length, kind = struct.unpack(">I4s", _piece(data, at, 8))
        if kind in (b"IDAT", b"IEND"):
            return Header(width, height)
        if kind == b"eXIf":
            return Header(width, height, _orientation(_piece(data, at + 8, length)))
        at += 12 + length


def _webp(data):
    if _piece(data, 8, 4) != b"WEBP":
        raise BadRecord("format", "a RIFF file that is not WebP")
    kind, body = _piece(data, 12, 4), _piece(data, 20, 10)
    if kind == b"VP8X":
        found = Header(*(1 + int.from_bytes(body[i : i + 3], "little") for i in (4, 7)))
        has_exif = body[0] & 8 and found.width * found.height <= LARGEST_PIXELS
        return found._replace(orientation=_webp_orientation(data)) if has_exif else found
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return Header(1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 ":
        return Header(*(side & 0x3FFF for side in struct.unpack("<2H", body[6:])))
    raise BadRecord("damaged", f"a WebP that begins with {kind!r}")


def _webp_orientation(data):
    at = 12
    while True:  # EXIF comes behind the pixels
        kind, length = struct.unpack("<4sI", _piece(data, at, 8))
        if kind == b"EXIF":
            return _orientation(_piece(data, at + 8, length))
        at += 8 + length + length % 2


def _jpeg(data):
    at, orientation = 2, 1
    while True:
        if _piece(data, at, 1) != b"\xff":
            raise BadRecord("damaged", f"a JPEG without a marker at byte {at}")
        marker = _piece(data, at + 1, 1)[0]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD7:  # padding, or a marker without a body
            at += 1 if marker == 0xFF else 2
            continue
        if marker in (0xD9, 0xDA):
            raise BadRecord("damaged", "a JPEG without a frame")
        (length,) = struct.unpack(">H", _piece(data, at + 2, 2))
        if length < 2:
            raise BadRecord("damaged", "a JPEG with a segment of no length")
        if marker in FRAMES:
            height, width = struct.unpack(">2H", _piece(data, at + 5, 4))
            return Header(width, height, orientation)
        if marker == 0xE1 and _piece(data, at + 4, min(length, 6)) == b"Exif\0\0":
            orientation = _orientation(_piece(data, at + 10, max(length - 8, 0)))
        at += 2 + length


def _orientation(exif):
    """The EXIF tag of this name, 1 where it is absent or broken: it is decoration."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for i in range(count):
            tag, kind, _, value = struct.unpack_from(f"{order}2HIH", exif, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and value in TURNS else 1
    except struct.error:
        pass
    return 1


def _piece(data, at, size):
    if at + size > len(data):
        raise _More
    return data[at : at + size]


def decode(data, height, width):
    """Pixels uint8 [height width 3]: the middle of the picture, which is shrunk or grown to cover the size.

    Bicubic, or Lanczos from 2048 px on, as SANA's stages were trained.  What is transparent is shown
    before white, 16 bits become 8, EXIF turns are made.  A JPEG of more than twice the size is
    decoded at half, a quarter or an eighth of its own, which saves most of the time.
    Raises BadRecord.
    """
    found = header(data)
    if len(data) > LARGEST_BYTES:
        raise BadRecord("too_large", f"{len(data) >> 20} MB")
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as image:
            turned = found.orientation >= 5
            image.draft(None, (2 * height, 2 * width) if turned else (2 * width, 2 * height))
            image.load()
            if image.mode != "RGB" or image.has_transparency_data:
                image = Image.fromarray(opaque(image))
            if found.orientation != 1:
                image = image.transpose(TURNS[found.orientation])
        return _cover(image, height, width)
    except Exception as error:  # whatever a hostile file makes the library raise
        raise BadRecord("damaged", f"{type(error).__name__}: {error}") from error


def _cover(image, height, width):
    wide, tall = image.size
    scale = min(wide / width, tall / height)
    left, top = (wide - width * scale) / 2, (tall - height * scale) / 2
    box = (max(left, 0), max(top, 0), min(left + width * scale, wide), min(top + height * scale, tall))
    if (wide, tall) != (width, height):
        lanczos = height * width > 1792**2  # the published sizes of 2K have the area of 2048 x 2048
        filter = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC
        image = image.resize((width, height), filter, box)
    return np.asarray(image)
