"""A posterior taken away as NumPy agrees with torch, runs without it, and refuses what it cannot be sure of."""

import ast
import importlib.util
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch import nn

import ppl_models
from guides import (
    amortized_encoder,
    bernoulli_dropout,
    full_rank_normal,
    low_rank_normal,
    mean_field_normal,
    planar_flow,
    spline_flow,
)
from inference import fit
from inference import load as reload
from inference.export.npz import module_source
from inference.export.runtime.predictor import load
from ppl_models import Scaling

S = 60
X = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([1.0, -2.0, 0.5]) + 0.3 * torch.randn(30, generator=torch.Generator().manual_seed(1))
IMAGES = (torch.rand(30, 64, generator=torch.Generator().manual_seed(2)) * 255).byte()
UNITS = Scaling.of(X, Y)
NOT_MODELS = {"Energy", "ExactPosterior", "Scaling"}  # a distribution, a result, and a change of units


def fitted(model, guide, *data, dtype=torch.float32, **options):
    return fit(model, guide, *data, **{"steps": 20, "progress": False, "engine": "eager", "dtype": dtype} | options)


def plain(model, build=mean_field_normal):
    return lambda dtype: fitted(model, build(model), X, Y, dtype=dtype)


def energy(model):
    return lambda dtype: fitted(model, mean_field_normal(model, init_loc={"z": torch.zeros(2)}), dtype=dtype)


def dropout(make, *data):
    def made(dtype):
        torch.manual_seed(0)
        model = make().to(dtype)
        return fitted(model, bernoulli_dropout(model), *data, dtype=dtype)

    return made


def network(out):
    return nn.Sequential(
        nn.Linear(3, 20), nn.ELU(), nn.Dropout(0.2), nn.Linear(20, 9), nn.Tanh(), nn.Dropout(0.3), nn.Linear(9, out)
    )


def vae(noise):
    def made(dtype):
        torch.manual_seed(0)
        x = IMAGES[:, :16].to(dtype) / 255 if noise else (IMAGES[:, :16] > 99).to(dtype)
        model = ppl_models.VAE(16, latent=2, hidden=[8], noise=noise).to(dtype)
        return fitted(model, amortized_encoder(model), x, dtype=dtype)

    return made


def exact(dtype):
    found = ppl_models.exact_linear_regression(X, Y, noise=0.3)
    return fitted(partial(ppl_models.linear_regression, noise=0.3), found.guide, X, Y, steps=1, dtype=dtype)


CASES = {
    "linear_regression": [
        plain(ppl_models.linear_regression, full_rank_normal),
        plain(partial(ppl_models.linear_regression, scaling=UNITS, intercept=False, noise=0.2)),
    ],
    "exact_linear_regression": [exact],
    "bnn_regression": [
        plain(ppl_models.bnn_regression),
        plain(partial(ppl_models.bnn_regression, noise="learned", scaling=UNITS), low_rank_normal),
        plain(partial(ppl_models.bnn_regression, noise="heteroscedastic", hidden=(7,))),
    ],
    "mlp_regression": [plain(ppl_models.mlp_regression)],
    "DropoutNetwork": [
        dropout(lambda: ppl_models.DropoutNetwork(network(1), noise="learned"), X, Y),
        dropout(lambda: ppl_models.DropoutNetwork(network(4)), X, (Y > 0).long() + 2 * (X[:, 0] > 0)),
    ],
    "DropoutCNN": [dropout(lambda: ppl_models.DropoutCNN((8, 8), classes=4, hidden=20), IMAGES, torch.arange(30) % 4)],
    "DropoutRegression": [dropout(lambda: ppl_models.DropoutRegression(3, scaling=UNITS), X, Y)],
    "VAE": [vae(None), vae(0.3)],
    **{name: [energy(getattr(ppl_models, name))] for name in ("u1", "u2", "u3", "u4")},
}  # fmt: skip
ALL = [pytest.param(make, id=f"{name}{i}") for name, makes in CASES.items() for i, make in enumerate(makes)]


def inputs_of(posterior, predictor):
    return [posterior.data[i] for i in range(len(predictor.manifest["inputs"]))]


def close(found, expected, bound):
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def test_every_model_of_the_package_is_tried_here():
    assert set(CASES) == set(ppl_models.__all__) - NOT_MODELS


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("make", ALL)
def test_numpy_agrees_with_torch(make, dtype, bound, tmp_path):
    posterior = make(dtype)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S, seed=3))
    assert predictor.manifest["agreement"] <= bound
    latents = posterior.sample(S, seed=3)
    for name, value in predictor.latents.items():
        np.testing.assert_array_equal(value, latents[name])
    x = inputs_of(posterior, predictor)
    found = predictor.predict(*x, seed=5)
    if not x:
        np.testing.assert_array_equal(found.draws, latents["z"])
        np.testing.assert_allclose(found.variance, latents["z"].var(0, correction=0), rtol=1e-5)
        return
    expected = posterior.predict(*x, draws=S, seed=3)
    if "z" in posterior.sample(1):  # latents of rows are drawn anew
        assert found.draws.shape == expected.draws.shape
        close(found.mean, expected.mean, 0.2)
        return
    for rows in (slice(0, 1), slice(0, 2), slice(4, 30)):
        part, whole = predictor.predict(*(v[rows] for v in x)), expected.draws[:, rows]
        close(part.draws, whole, bound)
    names = ["mean", "variance", "std", "epistemic", "noise"]
    if hasattr(found, "probs"):
        names = ["probs", "entropy"]
        gap = np.abs(found.mutual_information - expected.mutual_information.numpy()).max()
        assert gap <= 5 * bound  # nats, a difference of entropies of order one
        np.testing.assert_array_equal(found.labels, expected.labels)
    for name in names:
        close(getattr(found, name), getattr(expected, name), 5 * bound)


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


# Users' models.


def with_plate(x, y=None):
    """Groups by an index, a plate's own index, two inputs in one, a Student-t likelihood."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("groups", 4):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("y", dist.StudentT(5.0, level[x[rows, 0].long() % 4] + x[:, 1], scale), obs=y)


def counts(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((slope * x[:, 0]).exp()), obs=y)


def classes(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=x @ w), obs=y)


def yes_or_no(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def of_rows(x, y=None):
    """Each row has a level of its own, which an autoguide knows for the rows of the fit alone."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    spread = pyro.sample("spread", dist.HalfNormal(0.3))
    with pyro.plate("data", len(x)):
        level = pyro.sample("level", dist.Normal(slope * x[:, 0], spread))
        pyro.sample("y", dist.Normal(level, 0.1), obs=y)


def branching(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = slope * x[:, 0] if slope.item() > -100 else x[:, 1]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def gaussian_process(x, y=None):
    """A weight at each of five places, and a kernel from there to the rows."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.3))
    places = torch.linspace(-2, 2, 5)
    weights = pyro.sample("weights", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    mean = (-(((x[:, :1] - places) / length) ** 2)).exp() @ weights
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Gamma(mean.exp(), 1.0), obs=y)


def heavy(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Cauchy(slope * x[:, 0], 0.1), obs=y)


def weighted(x, w, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x[:, 0] + w, 0.5), obs=y)


class Module(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = pyro.nn.PyroModule[nn.Linear](3, 1)
        self.linear.weight = pyro.nn.PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))

    def forward(self, x, y=None):
        mean = self.linear(x)[:, 0]
        with pyro.plate("data", len(x)):
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


def filling(x, y=None):
    """What torch.vmap cannot run, so that draws are run one by one."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    mean = torch.zeros(len(x))
    mean[:] = slope * x[:, 0]
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


THEIRS = {
    "plate": (with_plate, AutoNormal, (X.abs() * 3, Y)),
    "counts": (counts, AutoNormal, (X, Y.abs().round())),
    "classes": (classes, AutoNormal, (X, torch.arange(30) % 4)),
    "yes or no": (yes_or_no, AutoNormal, (X, (Y > 0).float())),
    "a point": (yes_or_no, AutoDelta, (X, (Y > 0).float())),
    "filling": (filling, AutoNormal, (X, Y)),
    "process": (gaussian_process, AutoNormal, (X, Y.abs() + 0.1)),
    "planar": (counts, partial(planar_flow, layers=2), (X, Y.abs().round())),
    "spline": (classes, spline_flow, (X, torch.arange(30) % 4)),
    "two inputs": (weighted, AutoNormal, (X, X[:, 1], Y)),
    "module": (Module(), AutoNormal, (X, Y)),
}


@pytest.mark.parametrize("name", THEIRS)
def test_users_models_agree(name, tmp_path):
    model, build, data = THEIRS[name]
    posterior = fitted(model, build(model), *data)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S))
    assert predictor._graph.each == (name in ("filling", "plate"))
    for rows in (1, 2, 30):
        x = [v[:rows] for v in data[:-1]]
        found, expected = predictor.predict(*x), posterior.predict(*x, draws=S)
        close(found.draws, expected.draws, 2e-6)
        assert found.samples.shape == tuple(expected.samples.shape)


def test_a_branch_on_a_latent_is_named(tmp_path):
    posterior = fitted(branching, AutoNormal(branching), X, Y)
    with pytest.raises(ValueError, match=r"test_npz\.py:\d+ \(branching\) needs the value"):
        posterior.export(tmp_path / "predictor.npz", draws=3)


def test_latents_of_rows_are_drawn_from_the_model(tmp_path):
    posterior = fitted(of_rows, AutoNormal(of_rows), X, Y)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=2000))
    assert set(predictor.latents) == {"slope", "spread"}
    x = X[:4] * 1.5
    found, expected = predictor.predict(x), posterior.predict(x, draws=2000)
    assert (np.abs(found.mean - expected.mean.numpy()) < 5 * expected.draws.std(0).numpy() * np.sqrt(2 / 2000)).all()
    np.testing.assert_allclose(found.epistemic, expected.epistemic, rtol=0.25)


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


def test_of_several_observed_sites_one_is_named(tmp_path):
    def two(x, y=None, z=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(slope * x[:, 0], 0.5), obs=y)
            pyro.sample("z", dist.Poisson((slope * x[:, 1]).exp()), obs=z)

    posterior = fitted(two, AutoNormal(two), X, Y, Y.abs().round())
    with pytest.raises(ValueError, match="pass site="):
        posterior.export(tmp_path / "predictor.npz", draws=S)
    predictor = load(posterior.export(tmp_path / "predictor.npz", draws=S, site="z"))
    close(predictor.predict(X).draws, posterior.predict(X, draws=S, site="z").draws, 1e-6)
    assert (predictor.predict(X).samples == predictor.predict(X).samples.round()).all()


def test_a_likelihood_without_a_mean_gives_its_draws(tmp_path):
    posterior = fitted(heavy, AutoNormal(heavy), X, Y)
    found = load(posterior.export(tmp_path / "predictor.npz", draws=2000)).predict(X[:4])
    expected = posterior.predict(X[:4], draws=2000)
    np.testing.assert_allclose(np.median(found.draws, 0), expected.draws.median(0).values, atol=0.1)


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


def test_a_loaded_posterior_can_be_exported(tmp_path):
    model = ppl_models.bnn_regression
    posterior = plain(model)(torch.float32)
    posterior.save(tmp_path / "run")
    again = reload(tmp_path / "run", model, mean_field_normal(model))
    found = load(again.export(tmp_path / "predictor.npz", draws=S)).predict(X)
    close(found.draws, posterior.predict(X, draws=S).draws, 1e-6)


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


def test_the_module_imports_numpy_and_the_standard_library_and_defines_nothing_twice():
    tree = ast.parse(module_source("predictor"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {(node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports}
    assert {name.split(".")[0] for name in names} - sys.stdlib_module_names == {"numpy"}
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert len(defined) == len(set(defined))
    assigned = [ast.unparse(t) for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    assert len(assigned) == len(set(assigned))


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


def test_an_operator_that_numpy_gets_wrong_leaves_no_file(tmp_path, monkeypatch):
    from inference.export.runtime.operators import OPERATORS

    posterior = plain(ppl_models.bnn_regression)(torch.float32)
    monkeypatch.setitem(OPERATORS, "tanh", lambda x: np.tanh(x) * 1.001)
    with pytest.raises(ValueError, match="differs from torch by"):
        posterior.export(tmp_path / "predictor.npz", draws=5)
    assert not list(tmp_path.iterdir())


def test_an_operator_without_numpy_form_leaves_no_file(tmp_path):
    def bessel(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.special.i0(slope * x[:, 0]), 0.5), obs=y)

    posterior = fitted(bessel, AutoNormal(bessel), X, Y)
    (tmp_path / "predictor.npz").write_bytes(b"old")
    with pytest.raises(ValueError, match=r"aten\.i0\.default"):
        posterior.export(tmp_path / "predictor.npz", draws=5)
    assert [path.name for path in tmp_path.iterdir()] == ["predictor.npz"]
    assert (tmp_path / "predictor.npz").read_bytes() == b"old"


def test_names_that_would_hide_a_module_or_a_file_are_refused(tmp_path):
    posterior = plain(ppl_models.linear_regression)(torch.float32)
    for name in ("numpy.npz", "json.npz", "my-model.npz", "1.npz", "class.npz"):
        with pytest.raises(ValueError, match="another name"):
            posterior.export(tmp_path / name, draws=2)
    (tmp_path / "mine.py").write_text("keep = 1\n")
    with pytest.raises(ValueError, match="not written by export"):
        posterior.export(tmp_path / "mine.npz", draws=2)
    with pytest.raises(ValueError, match=r"\.npz"):
        posterior.export(tmp_path / "predictor.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]
    posterior.export(tmp_path / "twice.npz", draws=2)
    posterior.export(tmp_path / "twice.npz", draws=3)
    assert load(tmp_path / "twice.npz").manifest["draws"] == 3


# ONNX, where the packages are there.


@pytest.mark.parametrize("name", ["bnn_regression", "DropoutNetwork", "DropoutCNN"])
@pytest.mark.filterwarnings("ignore")
def test_the_mean_as_onnx(name, tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    posterior = CASES[name][0](torch.float32)
    session = runtime.InferenceSession(str(posterior.export(tmp_path / "mean.onnx", draws=S)))
    assert [path.name for path in tmp_path.iterdir()] == ["mean.onnx"]
    for rows in (1, 3, 30):
        x = posterior.data[0][:rows]
        first, *more = session.run(None, {"x": x.numpy()})
        expected = posterior.predict(x, draws=S)
        close(first, expected.probs if name == "DropoutCNN" else expected.mean, 2e-6)
        for variance in more:
            close(variance, expected.variance, 1e-5)


@pytest.mark.filterwarnings("ignore")
def test_random_numbers_are_no_onnx(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ValueError, match="random numbers"):
        vae(None)(torch.float32).export(tmp_path / "mean.onnx", draws=3)
    assert not list(tmp_path.iterdir())


def test_without_its_packages_onnx_says_what_to_install(tmp_path, monkeypatch):
    posterior = plain(ppl_models.linear_regression)(torch.float32)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install onnx onnxscript"):
        posterior.export(tmp_path / "mean.onnx", draws=3)
    assert not list(tmp_path.iterdir())
