"""What benchmarks/data.py reads, and the peer's side of it; worker processes import this, and not the script."""

import io
import tarfile
import warnings

import numpy as np
from PIL import Image

from sana_jax.data import images
from sana_jax.data.array_record import ArrayRecord, Writer
from sana_jax.data.captions import Captions
from sana_jax.data.folder import Folder
from sana_jax.data.records import Record
from sana_jax.data.tar import Tar

SIZE, TOKENS, WIDTH = 512, 300, 2304
# Torch says so of a picture straight from the decoder; its collation copies it in the next moment.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def jpeg(rng, width=768, height=576):
    """Bytes of a picture with detail at every scale."""
    pixels = np.zeros((height, width, 3), np.float32)
    for cell in (8, 24, 96):
        noise = rng.integers(0, 255, (height // cell, width // cell, 3), np.uint8)
        pixels += np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)) / 3
    pixels += rng.normal(0, 8, pixels.shape)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
    return file.getvalue()


def make(folder, records):
    """Writes the three data sets; returns {name: source}."""
    rng, pictures, cached = np.random.default_rng(0), folder / "pictures", folder / "cached"
    pictures.mkdir(), cached.mkdir()
    for i in range(records):
        (pictures / f"{i:06d}.jpg").write_bytes(jpeg(rng))
        (pictures / f"{i:06d}.txt").write_text(f"picture number {i}")
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    with Writer(cached / "00000.array_record") as writer:
        for i in range(records):
            states = rng.standard_normal((int(rng.integers(20, 221)), WIDTH), np.float32).astype(np.float16)
            latent = rng.standard_normal((SIZE // 32, SIZE // 32, 32), np.float32).astype(np.float16)
            writer.write(Record(f"{i}", arrays={"latent": latent, "states": states}), (SIZE, SIZE))
    return {"folder": Folder(str(pictures)), "tar": Tar(str(folder / "pictures.tar")), "cached": ArrayRecord(str(cached))}


class Texts:
    """Stands for a tokenizer, whose cost is the same on both sides: captions become nothing much."""

    def __call__(self, texts):
        return {"length": np.array([len(text) for text in texts], np.int32)}


class Rows:
    """A map-style dataset over a reader, as one writes it for PyTorch."""

    def __init__(self, reader):
        self.reader, self.captions = reader, Captions()

    def __len__(self):
        return len(self.reader)

    def __getitem__(self, i):
        record = self.reader[i]
        if record.image is not None:
            text = self.captions.choose(record, np.random.default_rng(i))[1]
            return {"image": images.decode(record.image, SIZE, SIZE), "length": len(text)}
        states, mask = np.zeros((TOKENS, WIDTH), np.float16), np.zeros(TOKENS, bool)
        n = len(record.arrays["states"])
        states[:n], mask[:n] = record.arrays["states"], True
        return {"latent": np.array(record.arrays["latent"]), "states": states, "mask": mask}
