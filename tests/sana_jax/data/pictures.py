"""Pictures for tests: good ones of every kind, and files that are named as if they were."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image


def scene(width, height):
    """uint8 [H W 3]: smooth, so that compression and resizing change it little."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    return np.stack([red, green, 128 + 60 * np.sin(x / 9) * np.cos(y / 7)], -1).astype(np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def png_chunk(kind, body, crc=None):
    check = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png(width, height, body, crc=None):
    """A grey PNG by hand, which may lie about its size."""
    header = png_chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0), crc)
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(body, 9)) + png_chunk(b"IEND", b"")


@functools.cache
def bomb():
    """About 0.4 MB that would be 400 million pixels."""
    squeeze, row = zlib.compressobj(9), bytes(20_001)
    body = b"".join([*(squeeze.compress(row * 100) for _ in range(200)), squeeze.flush()])
    header = png_chunk(b"IHDR", struct.pack(">2I5B", 20_000, 20_000, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


@functools.cache
def bad_pictures():
    """{name: (bytes, the reason that they are bad, or None)}: two dozen files from the field."""
    image = scene(96, 64)
    jpeg, whole, webp = encoded(image, "JPEG"), encoded(image), encoded(image, "WEBP")
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    noisy = encoded(noise)
    flipped = bytearray(noisy)
    flipped[len(noisy) // 2] ^= 0x10
    lying = bytearray(jpeg)
    at = jpeg.index(b"\xff\xc0")
    lying[at + 5 : at + 9] = struct.pack(">2H", 65_000, 65_000)
    vast = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + (16_382).to_bytes(3, "little") * 2
    gif = encoded(Image.fromarray(image).convert("P"), "GIF")
    return {
        "zero bytes": (b"", "empty"),
        "jpeg cut in its header": (jpeg[:40], "damaged"),
        "jpeg cut in half": (jpeg[: len(jpeg) // 2], "damaged"),
        "png cut in its header": (whole[:20], "damaged"),
        "png cut in half": (noisy[: len(noisy) // 2], "damaged"),
        "webp cut in half": (webp[: len(webp) // 2], "damaged"),
        "webp cut in its header": (webp[:14], "damaged"),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "format"),
        "text": (b"a picture of a cat\n", "format"),
        "json": (b'{"error": "rate limited"}', "format"),
        "zeros": (bytes(4096), "format"),
        "noise": (noise.tobytes(), "format"),
        "gif": (gif, "format"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "format"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "format"),
        "bmp": (encoded(image, "BMP"), "format"),
        "tiff": (encoded(image, "TIFF"), "format"),
        "riff that is sound": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(28), "format"),
        "png with a bad header checksum": (png(96, 64, bytes(97 * 64), crc=1), "damaged"),
        "png with a flipped bit": (bytes(flipped), "damaged"),
        "png bomb": (bomb(), "too_large"),
        "png header of 100k x 100k": (png(100_000, 100_000, bytes(100)), "too_large"),
        "jpeg header of 65k x 65k": (bytes(lying), "too_large"),
        "webp header of 16k x 16k": (vast, "too_large"),
        "png of no width": (png(0, 64, bytes(64)), "too_small"),
        "one pixel": (encoded(scene(1, 1)), "too_small"),
        "jpeg without a frame": (b"\xff\xd8\xff\xd9", "damaged"),
    }
