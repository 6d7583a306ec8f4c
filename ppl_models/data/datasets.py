"""Data sets by name: the tutorial's cosine, scikit-learn's own, UCI from disk, MNIST from disk or its mirror."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from functools import partial
from pathlib import Path

import numpy as np

from ppl_models.data.download import data_folder, fetched
from ppl_models.data.tables import Table, load_npz

__all__ = ["cosine", "diabetes", "digits", "fashion_mnist", "mnist", "mnist_bits", "read_idx", "uci"]

_IDX_BYTES, _IDX_DIMENSIONS = 2**30, 8


def cosine(rows: int = 40, noise: float = 0.05, seed: int = 0) -> Table:
    """Y = cos(x) + N(0, noise²) at ``rows`` even points of [−π, π], with x/π as the input.

    >>> cosine().x.shape, float(cosine().x.min()), float(cosine().x.max())
    ((40, 1), -1.0, 1.0)
    """
    x = np.linspace(-1, 1, rows)
    y = np.cos(np.pi * x) + np.random.default_rng(seed).normal(0, noise, rows)
    return Table(x[:, None], y, ("x",), "y")


def diabetes() -> Table:
    """442 patients, 10 measurements, and the progression of their disease a year on.

    Efron, Hastie, Johnstone, Tibshirani (2004), Least angle regression; raw units, as in scikit-learn's wheel.
    """
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    return Table(found.data, found.target, tuple(found.feature_names), "progression")


def digits() -> Table:
    """1,797 images of 8×8 pixels in 0…16 and the digit each shows; in scikit-learn's wheel.

    Alpaydin, Kaynak (1998), Optical recognition of handwritten digits.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    return Table(found.data, found.target, tuple(found.feature_names), "digit")


def mnist(part: str = "both") -> Table:
    """MNIST's images, (N, 784) uint8, and digits: the 60,000 of ``"train"``, the 10,000 of ``"t10k"``, or both.

    Of both together, the last 10,000 are the published test rows. They are
    downloaded where they are not on this machine (11 MB).

    LeCun, Bottou, Bengio, Haffner (1998), Gradient-based learning applied to document recognition.
    """
    if part != "both":
        return _idx_images("mnist", part, "digit")
    train, test = (_idx_images("mnist", name, "digit") for name in ("train", "t10k"))
    x, y = (np.concatenate([getattr(t, name) for t in (train, test)]) for name in ("x", "y"))
    return Table(x, y, train.columns, train.target, np.arange(len(train.x), len(x)))


def mnist_bits(part: str = "both") -> Table:
    """:func:`mnist` with pixels above half of white as 1 and the others as 0, float32, for Bernoulli likelihoods."""
    table = mnist(part)
    return Table((table.x > 127).astype(np.float32), table.y, table.columns, table.target, table.test_rows)


def fashion_mnist() -> Table:
    """The 10,000 test images of Fashion-MNIST, (N, 784) uint8, and the garment that each shows, 0 to 9.

    Xiao, Rasul, Vollgraf (2017), Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms.
    """
    return _idx_images("fashion-mnist", "t10k", "garment")


def _idx_images(name: str, part: str, target: str) -> Table:
    if part not in ("train", "t10k"):
        raise ValueError(f"part is {part!r}: pass 'train', 't10k' or 'both'")
    files = [f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"]
    images, labels = (read_idx(fetched(name, file)) for file in files)
    if len(images) != len(labels):
        raise ValueError(f"{name} has {len(images)} images of {part} but {len(labels)} labels: fetch both again")
    pixels = images.reshape(len(images), -1)
    return Table(pixels, labels, tuple(f"pixel{i}" for i in range(pixels.shape[1])), target)


def uci(name: str, split: int = 0) -> Table:
    """A UCI regression set with one of its 20 published train and test splits.

    ``name`` is ``"concrete"``, ``"energy"`` or ``"yacht"``. The splits are those of
    Gal, Ghahramani (2016), Dropout as a Bayesian approximation.
    """
    folder = data_folder("uci", f"{name}.npz")
    stored = load_npz(folder / f"{name}.npz")
    missing = {"x", "y", "test_0"} - set(stored)
    if missing:
        raise ValueError(f"{folder / name}.npz lacks {sorted(missing)}: fetch it again")
    splits = len([key for key in stored if key.startswith("test_")])
    if not 0 <= split < splits:
        raise ValueError(f"split is {split!r}: {name} has splits 0 to {splits - 1}")
    x = stored["x"]
    return Table(x, stored["y"], tuple(f"x{i}" for i in range(x.shape[1])), "y", stored[f"test_{split}"])


concrete = partial(uci, "concrete")
energy = partial(uci, "energy")
yacht = partial(uci, "yacht")


def read_idx(path: Path) -> np.ndarray:
    """The array in a gzip-compressed IDX file of unsigned bytes, MNIST's format.

    Raises
    ------
    ValueError
        If the header or the length is not that of such a file.
    """
    try:
        with gzip.open(path, "rb") as stream:
            shape = _idx_shape(path, stream)
            content = stream.read(math.prod(shape) + 1)  # one more, so that the end and its checksum are reached
    except (gzip.BadGzipFile, EOFError, zlib.error, struct.error) as error:
        raise ValueError(f"{path} cannot be read as gzip ({error}): fetch it again") from error
    if len(content) != math.prod(shape):
        holds = f"{len(content)} values: it is cut short" if len(content) < math.prod(shape) else "more"
        raise ValueError(f"{path} says shape {shape} but holds {holds}, fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _idx_shape(path: Path, stream: gzip.GzipFile) -> tuple[int, ...]:
    head = stream.read(4)
    sizes = stream.read(4 * head[3]) if len(head) == 4 and head[3] <= _IDX_DIMENSIONS else b""
    if len(head) < 4 or head[:3] != b"\x00\x00\x08" or len(sizes) != 4 * head[3]:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes: its first bytes are {head.hex()}")
    shape = struct.unpack(f">{head[3]}I", sizes)
    if math.prod(shape) > _IDX_BYTES:
        raise ValueError(f"{path} says shape {shape}, more than {_IDX_BYTES:,} values: fetch it again")
    return shape
