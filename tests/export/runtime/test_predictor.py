"""The exported predictor: alone with NumPy, on wrong input, and on hostile files."""

import json
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import ppl_models
from inference.export.runtime.predictor import load
from tests.helpers.exporting import CASES, IMAGES, S, X, Y, close, fitted, plain, vae


def test_intervals_hold_what_they_say(tmp_path):
    posterior = plain(ppl_models.linear_regression)(torch.float64)
    found = load(posterior.export(tmp_path / "p.npz", draws=4000)).predict(X[:5].double())
    for functions in (
        found.interval(0.8, of="functions"),
        posterior.predict(X[:5].double(), draws=4000).interval(0.8, of="functions"),
    ):
        np.testing.assert_allclose(functions, np.quantile(found.draws, [0.1, 0.9], axis=0), rtol=1e-9)
    lower, upper = found.interval(0.9)
    fresh = posterior.predict(X[:5].double(), draws=4000, seed=7).samples.numpy()
    share = ((fresh > lower) & (fresh < upper)).mean(0)
    width = 4 * np.sqrt(2 * 0.9 * 0.1 / 4000)  # both sides are of 4,000 draws; five rows, four standard errors
    assert (np.abs(share - 0.9) < width).all()
    np.testing.assert_allclose(found.samples.var(0), found.variance, rtol=4 * np.sqrt(2 / 4000) * 1.5)
    for bad in ({"prob": 1.5}, {"of": "rows"}):
        with pytest.raises(ValueError, match="pass"):
            found.interval(**bad)


def test_a_vae_has_the_moments_of_torch(tmp_path):
    posterior = vae(0.3)(torch.float32)
    predictor = load(posterior.export(tmp_path / "p.npz", draws=2000))
    x = posterior.data[0][:3]
    found, expected = predictor.predict(x), posterior.predict(x, draws=2000)
    error = expected.draws.std(0).numpy() * np.sqrt(2 / 2000)
    assert (np.abs(found.mean - expected.mean.numpy()) < 5 * error).all()
    np.testing.assert_allclose(found.epistemic, expected.epistemic, rtol=0.3, atol=1e-7)
    np.testing.assert_array_equal(found.draws, predictor.predict(x).draws)
    assert not np.array_equal(found.draws, predictor.predict(x, seed=1).draws)


def test_draws_one_by_one_with_random_numbers_of_rows(tmp_path):
    def both(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        mean = torch.zeros(len(x))
        mean[:] = slope * x[:, 0]
        with pyro.plate("data", len(x)):
            level = pyro.sample("level", dist.Normal(mean, 0.3))
            pyro.sample("y", dist.Normal(level, 0.1), obs=y)

    posterior = fitted(both, AutoNormal(both), X, Y)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=200))
    assert predictor._graph.each
    found, expected = predictor.predict(X[:4]), posterior.predict(X[:4], draws=200)
    assert (np.abs(found.mean - expected.mean.numpy()) < 5 * expected.draws.std(0).numpy() * np.sqrt(2 / 200)).all()


def test_rows_that_look_at_each_other_stay_together(tmp_path):
    def centred(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * (x[:, 0] - x[:, 0].mean()), 0.5), obs=y)

    posterior = fitted(centred, AutoNormal(centred), X, Y)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S))
    assert not predictor.manifest["rows_apart"]
    close(predictor.predict(X).draws, posterior.predict(X, draws=S).draws, 1e-6)


def test_a_draw_of_masks_is_the_same_function_at_one_row_and_at_many(tmp_path):
    posterior = CASES["DropoutNetwork"][0](torch.float32)
    predictor = load(posterior.export(tmp_path / "predictor.npz"))
    for x in (X[:1], X, X.repeat(20, 1)):  # 600 rows at 1,000 draws are more than are run together
        close(predictor.predict(x).draws, posterior.predict(x).draws, 1e-6)


def test_batches_change_nothing(tmp_path):
    posterior = plain(ppl_models.bnn_regression)(torch.float32)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S))
    assert predictor.manifest["rows_apart"]
    close(predictor.predict(X, batch_size=7).draws, predictor.predict(X).draws, 1e-6)
    predictor._at_once = 4
    close(predictor.predict(X).draws, posterior.predict(X, draws=S).draws, 1e-6)


# The file and the module by themselves.
ALONE = """
import sys
for name in ("torch", "pyro", "inference", "guides", "ppl_models", "scipy", "pandas"):
    sys.modules[name] = None
sys.path.insert(0, {folder!r})
import numpy as np
import predictor
p = predictor.load()
np.save({folder!r} + "/draws.npy", p.predict(np.load({folder!r} + "/x.npy")).draws)
print(p)
print(p.describe())
print(sorted(set(sys.modules) & {{"torch", "pyro", "scipy"}}))
"""


@pytest.mark.parametrize("name", ["linear_regression", "DropoutCNN", "VAE"])
def test_it_runs_where_there_is_only_numpy(name, tmp_path):
    posterior = CASES[name][0](torch.float32)
    posterior.export(tmp_path / "predictor.npz", draws=S)
    x = posterior.data[0][:4]
    np.save(tmp_path / "x.npy", x.numpy())
    script = tmp_path / "alone.py"
    script.write_text(ALONE.format(folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-I", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert name in done.stdout
    assert '"numpy": "' in done.stdout
    found = np.load(tmp_path / "draws.npy")
    if name == "VAE":
        assert found.shape == (S, 4, 16)
    else:
        close(found, posterior.predict(x, draws=S).draws, 1e-6)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return plain(ppl_models.linear_regression)(torch.float32).export(folder / "predictor.npz", draws=S)


def test_what_is_wrong_with_x_is_said(exported):
    predictor = load(exported)
    for x, said in [
        (np.ones((2, 4)), r"\(2, 4\).*\(rows, 3\)"),
        (np.ones(3), r"\(3,\).*\(rows, 3\)"),
        (np.ones((0, 3)), r"\(0, 3\).*\(rows, 3\)"),
        ([["a", "b", "c"]], r"numbers of shape \(rows, 3\)"),
        ([[1, 2], [3]], r"\(rows, 3\)"),
        (np.array([[None, 1, 2]]), r"type object.*\(rows, 3\)"),
        (np.array([[1j, 1, 2]]), r"type complex128.*\(rows, 3\)"),
        (np.array([[np.nan, 1, 2]]), r"NaN.*\(rows, 3\)"),
        (np.array([[1e300, 1, 2]]), r"too large.*\(rows, 3\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            predictor.predict(x)
    with pytest.raises(ValueError, match=r"takes 1, x \(rows, 3\)"):
        predictor.predict()
    with pytest.raises(ValueError, match="seed is -1"):
        predictor.predict(X, seed=-1)
    with pytest.raises(ValueError, match="batch_size is 0"):
        predictor.predict(X, batch_size=0)
    assert predictor.predict([[1, 2, 3]]).draws.dtype == np.float32


def test_bytes_stay_bytes(tmp_path):
    predictor = load(CASES["DropoutCNN"][0](torch.float32).export(tmp_path / "predictor.npz", draws=3))
    close(predictor.predict(IMAGES.float()).draws, predictor.predict(IMAGES).draws, 1e-6)
    for bad in (IMAGES.float() + 0.5, IMAGES.float() + 300):
        with pytest.raises(ValueError, match="type uint8"):
            predictor.predict(bad)


def stored(path):
    with np.load(path, allow_pickle=False) as found:
        arrays = {name: found[name] for name in found.files}
    return json.loads(str(arrays.pop("manifest"))), arrays


def rewritten(path, manifest, arrays):
    np.savez(path, manifest=np.array(json.dumps(manifest)), **arrays)
    return path


HOSTILE = {
    "schema": lambda m, a: m.update(schema=99),
    "format": lambda m, a: m.update(format="other"),
    "a key": lambda m, a: m.pop("inputs"),
    "null": lambda m, a: m.update(graph=None),
    "a list": lambda m, a: m.update(latents=[1]),
    "an array": lambda m, a: a.pop("latent.bias"),
    "shape": lambda m, a: a.update({"latent.bias": a["latent.bias"][1:]}),
    "constant": lambda m, a: m["graph"]["constants"][0].update(array="nothing"),
    "constant shape": lambda m, a: m["graph"]["constants"][0].update(shape=[7]),
    "sizes": lambda m, a: m["graph"]["constants"][0].update(sizes=["a"]),
    "text": lambda m, a: a.update({"latent.bias": a["latent.bias"].astype("U")}),
    "operator": lambda m, a: m["graph"]["nodes"][0].__setitem__(0, "os.system"),
    "operator of Python": lambda m, a: m["graph"]["nodes"][0].__setitem__(0, "__class__"),
    "reference": lambda m, a: m["graph"]["nodes"][0].__setitem__(1, [{"v": 10**6}]),
    "negative reference": lambda m, a: m["graph"]["nodes"][0].__setitem__(1, [{"v": -1}]),
    "forward reference": lambda m, a: m["graph"]["nodes"][0].__setitem__(1, [{"v": 20}]),
    "arguments": lambda m, a: m["graph"]["nodes"][0].__setitem__(1, ["a", "b", "c"]),
    "object": lambda m, a: m["graph"]["nodes"][0].__setitem__(2, "object"),
    "node": lambda m, a: m["graph"]["nodes"].__setitem__(0, "add"),
    "odd argument": lambda m, a: m["graph"]["nodes"][0].__setitem__(1, [{"x": 1}]),
    "output": lambda m, a: m["graph"]["outputs"].update(draws="a"),
    "no output": lambda m, a: m["graph"]["outputs"].pop("draws"),
    "wrong output": lambda m, a: m["graph"]["outputs"].update(draws=0),
    "draws": lambda m, a: m.update(draws=7),
    "memory": lambda m, a: m["graph"]["nodes"].__setitem__(0, ["full", [[10**15], 1, None], None, False]),
    "a row's numbers": lambda m, a: m.update(numbers_a_row="many"),
    "inputs": lambda m, a: m["inputs"][0].update(shape=[None, -3]),
    "type of inputs": lambda m, a: m["inputs"][0].update(dtype="object"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name, exported, tmp_path):
    manifest, arrays = stored(exported)
    HOSTILE[name](manifest, arrays)
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load(rewritten(tmp_path / "bad.npz", manifest, arrays))


def test_damaged_files_are_refused(exported, tmp_path):
    whole = exported.read_bytes()
    bad = tmp_path / "bad.npz"
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for content in (b"", b"PK\x03\x04", whole[: len(whole) // 2], bytes(flipped), b"\x93NUMPY"):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz"):
            load(bad)
    np.savez(bad, manifest=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"bad\.npz"):
        load(bad)
    np.save(tmp_path / "bad.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"bad\.npy"):
        load(tmp_path / "bad.npy")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.npz")


def test_a_file_that_would_fill_the_memory_is_refused_before_it_is_unpacked(exported, tmp_path, monkeypatch):
    manifest, arrays = stored(exported)
    np.savez_compressed(tmp_path / "bad.npz", manifest=np.array(json.dumps(manifest)), zeros=np.zeros(2**20), **arrays)
    load(tmp_path / "bad.npz")
    monkeypatch.setattr("inference.export.runtime.predictor._BYTES", 2**20)
    with pytest.raises(ValueError, match=r"bad\.npz .* would unpack to 8,"):
        load(tmp_path / "bad.npz")


def test_a_changed_weight_is_seen(exported, tmp_path):
    """The comparison of this file can fail: one weight of one draw, by a thousandth."""
    posterior = plain(ppl_models.linear_regression)(torch.float32)
    manifest, arrays = stored(exported)
    arrays["latent.weights"][3, 1] *= 1.001
    wrong = load(rewritten(tmp_path / "wrong.npz", manifest, arrays)).predict(X)
    expected = posterior.predict(X, draws=S).draws
    close(load(exported).predict(X).draws, expected, 1e-6)
    with pytest.raises(AssertionError):
        close(wrong.draws, expected, 1e-6)
