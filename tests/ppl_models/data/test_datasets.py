import gzip
import hashlib
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from ppl_models.data import download
from ppl_models.data.datasets import concrete, cosine, diabetes, digits, energy, mnist, read_idx, uci, yacht
from ppl_models.data.download import data_folder

REAL = Path(os.environ["KILN_DATA"]).resolve() if os.environ.get("KILN_DATA") else None
IMAGES = np.arange(2 * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(2, 28, 28)
LABELS = np.array([7, 2], dtype=np.uint8)


def needs(name):
    return pytest.mark.skipif(REAL is None or not (REAL / name).is_dir(), reason=f"KILN_DATA has no {name}/")


def idx(array, kind=0x08):
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_gzip(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content))
    return path


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path.parent


def refusal(path):
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        read_idx(path)
    return str(caught.value).replace(str(path), "FILE")


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("KILN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def test_cosine_is_forty_noisy_points_of_one_period():
    table = cosine()
    np.testing.assert_array_equal(table.x, np.linspace(-1, 1, 40)[:, None])
    assert table.y.shape == (40,)
    assert np.abs(table.y - np.cos(np.pi * table.x[:, 0])).max() < 5 * 0.05
    assert (table.columns, table.target, table.test_rows) == (("x",), "y", None)


def test_cosine_without_noise_is_the_cosine():
    table = cosine(rows=5, noise=0.0)
    np.testing.assert_allclose(table.y, [-1, 0, 1, 0, -1], atol=1e-15)


def test_cosine_is_reproducible_and_its_seed_counts():
    np.testing.assert_array_equal(cosine(seed=3).y, cosine(seed=3).y)
    assert (cosine(seed=3).y != cosine(seed=4).y).all()


@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_cosine_has_the_noise_it_was_asked_for(noise):
    table = cosine(rows=100_000, noise=noise)
    residual = table.y - np.cos(np.pi * table.x[:, 0])
    assert abs(residual.std() - noise) < 4 * noise / np.sqrt(2 * 100_000)
    assert abs(residual.mean()) < 4 * noise / np.sqrt(100_000)


def test_diabetes_is_in_raw_units():
    table = diabetes()
    assert table.x.shape == (442, 10)
    assert table.columns == ("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6")
    np.testing.assert_array_equal(table.x[0], [59, 2, 32.1, 101, 157, 93.2, 38, 4, 4.8598, 87])
    np.testing.assert_array_equal(table.y[:4], [151, 75, 141, 206])
    assert (table.y.sum(), table.target) == (67243, "progression")


def test_digits_are_images_of_8_by_8_and_their_labels():
    table = digits()
    assert table.x.shape == (1797, 64)
    assert (table.x.min(), table.x.max()) == (0, 16)
    assert (table.columns[0], table.columns[-1], table.target) == ("pixel_0_0", "pixel_7_7", "digit")
    np.testing.assert_array_equal(np.bincount(table.y), [178, 182, 177, 183, 181, 182, 181, 179, 174, 180])


@pytest.mark.parametrize("array", [IMAGES, LABELS, np.zeros((0, 28, 28), np.uint8)], ids=["3-d", "1-d", "no rows"])
def test_an_idx_file_comes_back(tmp_path, array):
    np.testing.assert_array_equal(read_idx(write_gzip(tmp_path / "a.gz", idx(array))), array, strict=True)


@pytest.mark.parametrize(("cut", "holds"), [(-1, "1567"), (-784, "784")])
def test_a_cut_idx_file_says_what_it_should_hold(tmp_path, cut, holds):
    path = write_gzip(tmp_path / "a.gz", idx(IMAGES)[:cut])
    said = refusal(path)
    assert said == f"FILE says shape (2, 28, 28) but holds {holds} values: it is cut short, fetch it again"


def test_an_idx_file_with_values_to_spare_is_refused(tmp_path):
    path = write_gzip(tmp_path / "a.gz", idx(LABELS) + b"\x00")
    assert refusal(path).startswith("FILE says shape (2,) but holds more")


def test_an_idx_file_that_claims_to_be_huge_is_refused_before_it_is_unpacked(tmp_path):
    path = write_gzip(tmp_path / "a.gz", b"\x00\x00\x08\x04" + b"\xff" * 16 + bytes(2**20))
    assert refusal(path).startswith("FILE says shape (4294967295, 4294967295, 4294967295, 4294967295), more than ")


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\x00\x08", idx(IMAGES)[:15], idx(LABELS, kind=0x0D), b"\x01" + idx(LABELS)[1:], b"hello, world"],
    ids=["empty", "3 bytes", "half a header", "floats", "wrong magic", "text"],
)
def test_what_is_not_an_idx_file_shows_its_first_bytes(tmp_path, content):
    path = write_gzip(tmp_path / "a.gz", content)
    said = refusal(path)
    assert said == f"FILE is not an IDX file of unsigned bytes: its first bytes are {content[:4].hex()}"


def test_an_idx_file_whose_compression_is_cut_short_is_refused(tmp_path):
    path = write_gzip(tmp_path / "a.gz", idx(IMAGES))
    path.write_bytes(path.read_bytes()[:-20])
    assert "fetch it again" in refusal(path)


def test_an_idx_file_whose_compression_is_damaged_is_refused(tmp_path):
    path = write_gzip(tmp_path / "a.gz", idx(np.random.default_rng(0).integers(0, 16, (9, 28, 28))))
    content = bytearray(path.read_bytes())
    content[200:240] = bytes(40)
    path.write_bytes(content)
    assert "fetch it again" in refusal(path)


def test_an_idx_file_that_is_not_compressed_is_refused(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(idx(IMAGES))
    assert "gzip" in refusal(path)


def test_kiln_data_comes_before_the_cache(places):
    touch(places / "cache" / "kiln" / "uci" / "f")
    first = touch(places / "data" / "uci" / "f")
    assert data_folder("uci", "f") == first


def test_the_cache_is_taken_where_kiln_data_lacks_the_file(places):
    touch(places / "data" / "uci" / "other")
    cached = touch(places / "cache" / "kiln" / "uci" / "f")
    assert data_folder("uci", "f") == cached


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_taken_where_kiln_data_is_not_set(places, monkeypatch, value):
    monkeypatch.delenv("KILN_DATA") if value is None else monkeypatch.setenv("KILN_DATA", value)
    cached = touch(places / "cache" / "kiln" / "uci" / "f")
    assert data_folder("uci", "f") == cached


@pytest.mark.parametrize("value", [None, ""])
def test_the_cache_is_in_the_home_folder_by_default(places, monkeypatch, value):
    monkeypatch.delenv("XDG_CACHE_HOME") if value is None else monkeypatch.setenv("XDG_CACHE_HOME", value)
    cached = touch(places / "home" / ".cache" / "kiln" / "uci" / "f")
    assert data_folder("uci", "f") == cached


def test_a_missing_file_says_where_to_put_it(places):
    with pytest.raises(FileNotFoundError) as caught:
        data_folder("uci", "f")
    assert str(caught.value).replace(str(places), "") == (
        "f is not in /data/uci, /cache/kiln/uci: put it there, or set KILN_DATA to the folder above uci/"
    )


@pytest.mark.parametrize(("name", "read"), [("concrete", concrete), ("energy", energy), ("yacht", yacht)])
def test_a_uci_set_comes_with_its_published_split(places, name, read):
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6.0)
    (places / "data" / "uci").mkdir(parents=True)
    np.savez(places / "data" / "uci" / f"{name}.npz", x=x, y=y, train_0=[0, 1], test_0=[4, 5], test_1=[2])
    table = read()
    np.testing.assert_array_equal(table.x, x)
    np.testing.assert_array_equal(table.y, y)
    np.testing.assert_array_equal(table.test_rows, [4, 5])
    np.testing.assert_array_equal(read(split=1).test_rows, [2])
    assert (table.columns, table.target) == (("x0", "x1"), "y")


@pytest.mark.parametrize("split", [-1, 2])
def test_a_split_that_was_not_published_is_refused(places, split):
    (places / "data" / "uci").mkdir(parents=True)
    np.savez(places / "data" / "uci" / "yacht.npz", x=np.zeros((3, 1)), y=np.zeros(3), test_0=[0], test_1=[1])
    with pytest.raises(ValueError, match=rf"^split is {split}: yacht has splits 0 to 1$"):
        uci("yacht", split)


def test_a_uci_set_that_is_not_there_is_named(places):
    with pytest.raises(FileNotFoundError, match=r"^energy\.npz is not in .*set KILN_DATA to the folder above uci/$"):
        energy()


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_mnist_is_one_row_of_pixels_an_image(places, part):
    write_gzip(places / "data" / "mnist" / f"{part}-images-idx3-ubyte.gz", idx(IMAGES))
    write_gzip(places / "data" / "mnist" / f"{part}-labels-idx1-ubyte.gz", idx(LABELS))
    table = mnist(part)
    np.testing.assert_array_equal(table.x, IMAGES.reshape(2, 784), strict=True)
    np.testing.assert_array_equal(table.y, LABELS, strict=True)
    assert table.columns == tuple(f"pixel{i}" for i in range(784))
    assert table.target == "digit"


def test_mnist_has_two_parts_only():
    with pytest.raises(ValueError, match=r"^part is 'test': pass 'train', 't10k' or 'both'$"):
        mnist("test")


def test_mnist_that_is_neither_there_nor_to_be_had_is_named(places, monkeypatch):
    monkeypatch.setitem(download.MIRRORS, "mnist", f"file://{places}/nowhere/")
    with pytest.raises(
        FileNotFoundError, match=r"^train-images-idx3-ubyte\.gz is not in .*mnist/; downloading it failed"
    ):
        mnist()


def test_mnist_as_a_whole_holds_out_its_published_test_images(places):
    for part in ("train", "t10k"):
        write_gzip(places / "data" / "mnist" / f"{part}-images-idx3-ubyte.gz", idx(IMAGES))
        write_gzip(places / "data" / "mnist" / f"{part}-labels-idx1-ubyte.gz", idx(LABELS))
    table = mnist()
    assert (len(table.x), len(table.y)) == (4, 4)
    np.testing.assert_array_equal(table.test_rows, [2, 3])


def published(places, monkeypatch, content, digest=None):
    """A mirror in a folder that holds one file of Fashion-MNIST."""
    name = "t10k-labels-idx1-ubyte.gz"
    (places / "mirror").mkdir()
    (places / "mirror" / name).write_bytes(content)
    monkeypatch.setitem(download.MIRRORS, "fashion-mnist", f"file://{places}/mirror/")
    monkeypatch.setitem(download.DIGESTS, ("fashion-mnist", name), digest or hashlib.md5(content).hexdigest())
    return name


def test_what_is_missing_is_downloaded_once_into_the_cache(places, monkeypatch):
    name = published(places, monkeypatch, b"labels")
    path = download.fetched("fashion-mnist", name)
    assert path == places / "cache" / "kiln" / "fashion-mnist" / name
    (places / "mirror" / name).unlink()
    assert download.fetched("fashion-mnist", name).read_bytes() == b"labels"


def test_a_download_that_is_not_the_published_file_is_not_kept(places, monkeypatch):
    name = published(places, monkeypatch, b"labels", digest="0" * 32)
    with pytest.raises(ValueError, match="is not the published file"):
        download.fetched("fashion-mnist", name)
    assert not list((places / "cache").rglob("*.gz"))


@needs("mnist")
@pytest.mark.parametrize(
    ("part", "counts"),
    [
        ("train", [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]),
        ("t10k", [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]),
    ],
)
def test_the_real_mnist(part, counts):
    table = mnist(part)
    assert (table.x.shape, table.x.dtype, table.x.max()) == ((sum(counts), 784), np.uint8, 255)
    np.testing.assert_array_equal(np.bincount(table.y), counts)
    assert int(table.y.sum(dtype=np.int64)) == sum(digit * count for digit, count in enumerate(counts))


@needs("uci")
@pytest.mark.parametrize(
    ("name", "shape", "held_out"), [("concrete", (1030, 8), 103), ("energy", (768, 8), 77), ("yacht", (308, 6), 31)]
)
def test_the_real_uci_sets_hold_out_a_tenth_in_twenty_ways(name, shape, held_out):
    tables = [uci(name, split) for split in range(20)]
    assert {table.x.shape for table in tables} == {shape}
    assert {len(np.unique(table.test_rows)) for table in tables} == {held_out}
    assert len({tuple(sorted(table.test_rows)) for table in tables}) == 20
    with pytest.raises(ValueError, match="has splits 0 to 19"):
        uci(name, 20)
