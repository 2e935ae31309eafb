"""PNG files with text in them: written whole or not at all, read without trust; contact sheets."""

import hashlib
import io
import os
import pathlib
import warnings

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin

from sana_jax.errors import InputError
from sana_jax.files import read_bounded

END = b"\x00\x00\x00\x00IEND\xaeB`\x82"  # how every whole PNG ends
LARGEST = 256 << 20  # bytes of a picture to begin with
LONGEST_TEXT = 1 << 20  # characters of one text chunk; ours have a few thousand
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")


def save_png(path, image, texts, other=None):
    """Writes uint8 [H W 3] with {name: text} beside the pixels; the file is whole or absent.

    Args:
      other: (path that is taken) -> the next to try; None writes over what is there.
    Returns:
      The path that it has.
    Raises:
      InputError: the path cannot be written.
    """
    path = pathlib.Path(path)
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        chunks.add_itxt(name, text)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            Image.fromarray(image).save(partial, format="PNG", pnginfo=chunks)
            if other is None:
                os.replace(partial, path)
            else:
                while not _moved(partial, path):
                    path = other(path)
            return path
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise InputError(f"output={str(path)!r}: cannot be written ({error.strerror or error})") from error


def _moved(partial, path):
    """Moves a file to a path that nobody has; False where somebody has it, be it since a moment ago."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links: for a moment an empty file stands there
        try:
            open(path, "xb").close()
        except FileExistsError:
            return False
        os.replace(partial, path)
    else:
        partial.unlink()
    return True


def is_whole(path):
    """Whether a PNG has its end: false for what a full disk or a broken copy leaves."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - len(END)))
        return file.read() == END


def _open(source, name, formats):
    """A PIL image whose header was read.  Raises InputError; a picture too large to be one too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return Image.open(source, formats=formats)
    except OSError as error:
        reason = error.strerror or f"not one of {', '.join(formats)}"
        raise InputError(f"{name}: cannot be read ({reason})") from error
    except Exception as error:  # whatever a hostile file makes the library raise
        raise InputError(f"{name}: cannot be read ({type(error).__name__}: {error})") from error


def read_texts(path, names):
    """{name: text} of those text chunks of a PNG that are there.

    Raises InputError: not a readable PNG, or a text of more than a million characters.
    """
    with _open(path, path, ("PNG",)) as image:
        found = image.info
        if not any(name in found for name in names):
            try:
                found = image.text  # behind the pixels, where some tools put it
            except Exception as error:
                raise InputError(f"{path}: a broken PNG ({type(error).__name__}: {error})") from error
        texts = {name: str(found[name]) for name in names if isinstance(found.get(name), str)}
    for name, text in texts.items():
        if len(text) > LONGEST_TEXT:
            raise InputError(f"{path}: its text {name!r} has {len(text)} characters, must have at most {LONGEST_TEXT}")
    return texts


def read_picture(path):
    """(uint8 [H W 3], sha256 of the file) of a PNG, JPEG or WebP, turned as its EXIF says.

    What is transparent is shown before white, and 16 bits become 8.
    Raises InputError: absent, too large, or no picture of these formats.
    """
    name = f"image={str(path)!r}"
    data = read_bounded(path, LARGEST, name)
    with _open(io.BytesIO(data), name, PICTURE_FORMATS) as image:
        try:
            pixels = opaque(ImageOps.exif_transpose(image))
        except Exception as error:
            raise InputError(f"{name}: broken ({type(error).__name__}: {error})") from error
    return pixels, hashlib.sha256(data).hexdigest()


def opaque(image):
    """uint8 [H W 3] of a PIL image, before white where it is transparent."""
    if image.mode.startswith("I"):  # grey in 16 bits, which `convert` would cut off at 255
        grey = np.asarray(image).astype(np.int64)
        alpha = np.where(grey == image.info.get("transparency", -1), 0, 255)
        image = Image.fromarray(np.stack([np.rint(grey / 257), alpha], axis=-1).astype(np.uint8), "LA")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def contact_sheet(cells, columns, title, side=512):
    """One picture of many, uint8 [H W 3].

    Args:
      cells: [(uint8 [h w 3], or None for a picture that is absent; its label)], row by row.
      columns: how many stand in a row.
      title: a line above, cut to the width.
      side: pixels that the longer side of a picture is reduced to.
    """
    sizes = [image.shape[:2] for image, _ in cells if image is not None] or [(side, side)]
    shrink = min(1.0, side / max(max(size) for size in sizes))
    height, width = (max(1, round(max(size[axis] for size in sizes) * shrink)) for axis in (0, 1))
    gap, strip, font = 8, 20, ImageFont.load_default(12)
    # A column is as wide as its labels, so that none is cut.
    width = max(width, *(int(font.getlength(label)) + 1 for _, label in cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), strip + rows * (height + strip + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((gap, 3), _fit(" ".join(title.split()), font, sheet.width - 2 * gap), fill="black", font=font)
    for i, (image, label) in enumerate(cells):
        left, top = gap + i % columns * (width + gap), strip + i // columns * (height + strip + gap)
        draw.text((left, top + 3), label, fill="black", font=font)
        if image is None:
            draw.rectangle((left, top + strip, left + width - 1, top + strip + height - 1), outline="red")
            continue
        picture = Image.fromarray(image)
        if shrink < 1:
            h, w = image.shape[:2]
            picture = picture.resize((max(1, round(w * shrink)), max(1, round(h * shrink))), Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, top + strip))
    return np.asarray(sheet)


def _fit(text, font, width):
    """The text, or its beginning and an ellipsis, within `width` pixels."""
    text = text[:1000]
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
