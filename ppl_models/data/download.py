"""Data files: found in the user's folders, or fetched once from their public mirror."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from tqdm.auto import tqdm

__all__ = ["data_folder", "fetched"]

MIRRORS = {
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "fashion-mnist": "https://storage.googleapis.com/tensorflow/tf-keras-datasets/",
}
# MD5 of each file, as its authors' data sets are known by.
DIGESTS = {
    ("mnist", "train-images-idx3-ubyte.gz"): "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    ("mnist", "train-labels-idx1-ubyte.gz"): "d53e105ee54ea40749a09fcbcd1e9432",
    ("mnist", "t10k-images-idx3-ubyte.gz"): "9fb629c4189551a2d022fa330f9573f3",
    ("mnist", "t10k-labels-idx1-ubyte.gz"): "ec29112dd5afa0611ce80d1b7f02629c",
    ("fashion-mnist", "t10k-images-idx3-ubyte.gz"): "bef4ecab320f06d8554ea6380940ec79",
    ("fashion-mnist", "t10k-labels-idx1-ubyte.gz"): "bb300cfdad3c16e7a12a480ee83cd310",
}
_SECONDS, _PIECE, _MOST = 30, 2**16, 2**26  # the largest file of them all has 10 MB


def data_folder(name: str, needed: str) -> Path:
    """Return the folder of ``needed``: ``$KILN_DATA/name``, else in ``~/.cache/kiln/name``.

    Raises
    ------
    FileNotFoundError
        If it is in neither, saying where to put it.
    """
    for place in _places():
        if (place / name / needed).is_file():
            return place / name
    looked = ", ".join(str(place / name) for place in _places())
    raise FileNotFoundError(f"{needed} is not in {looked}: put it there, or set KILN_DATA to the folder above {name}/")


def fetched(name: str, file: str) -> Path:
    """The path of ``file`` in data set ``name``: where :func:`data_folder` finds it, else downloaded to the cache.

    Raises
    ------
    FileNotFoundError
        If it is on this machine in no place and cannot be downloaded, saying
        where to put it.
    ValueError
        If what came is not the file that its authors published.
    """
    try:
        return data_folder(name, file) / file
    except FileNotFoundError as missing:
        try:
            content = _download(MIRRORS[name] + file)
        except (urllib.error.URLError, OSError) as error:
            raise FileNotFoundError(f"{missing}; downloading it failed too ({error})") from error
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if digest != DIGESTS[name, file]:
        raise ValueError(f"{MIRRORS[name]}{file} is not the published file (MD5 {digest}): get it from elsewhere")
    return _kept(content, _places()[-1] / name / file)


def _places() -> list[Path]:
    """KILN_DATA, where it is set, and the cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kiln"
    return [*([Path(os.environ["KILN_DATA"])] if os.environ.get("KILN_DATA") else []), cache]


def _download(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=_SECONDS) as reply:  # noqa: S310 - one of MIRRORS
        total = int(reply.headers.get("Content-Length") or 0) or None
        name = address.rsplit("/", 1)[-1]
        with tqdm(desc=name, total=total, unit="B", unit_scale=True, leave=False, file=sys.stderr) as bar:
            content = bytearray()
            while len(content) <= _MOST and (piece := reply.read(_PIECE)):
                content += piece
                bar.update(len(piece))
    return bytes(content)


def _kept(content: bytes, path: Path) -> Path:
    """Write under another name first, so that no half of a file is ever found under its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as partial:
        partial.write(content)
    Path(partial.name).replace(path)
    return path
