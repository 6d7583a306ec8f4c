"""An encoder for the latents of rows: any support, new rows, batches, and what it refuses."""

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from safetensors.torch import load_file, save_file
from torch import nn

from guides import amortized_encoder
from inference import fit
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.model.bound_model import BoundModel
from inference.model.elbo import loss
from inference.model.subsampling import Subsampling
from inference.utils.random_state import RandomStream
from ppl_models import VAE

X = (torch.rand(60, 12, generator=torch.Generator().manual_seed(0)) < 0.3).float()


def small_vae(**options):
    torch.manual_seed(0)
    model = VAE(12, latent=2, hidden=[8], **options)
    return model, amortized_encoder(model)


def fitted(x=X, **options):
    return fit(*small_vae(), x, progress=False, **{"steps": 100, "engine": "eager", **options})


class Linear(nn.Module):
    """μ = a·x and the log variance of the exact posterior below."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(1))
        self.log_variance = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return torch.cat([self.slope * x, self.log_variance.expand_as(x)], 1)


def line(x):
    """z ~ N(0, 1), x ~ N(2z, 0.5²): z | x ~ N(2x/4.25, 0.25/4.25)."""
    with pyro.plate("data", len(x)):
        rows = pyro.subsample(x, event_dim=1)
        z = pyro.sample("z", dist.Normal(torch.zeros(len(rows), 1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(2 * z, 0.5).to_event(1), obs=rows)


@pytest.mark.parametrize("engine", [pytest.param("eager", marks=pytest.mark.slow), "compiled"])
def test_it_finds_the_exact_posterior_of_every_row_new_ones_too(engine):
    x = 2 * torch.randn(400, 1, generator=torch.Generator().manual_seed(0))
    options = {"steps": 1500, "lr": 0.02, "batch_size": 100, "engine": engine, "progress": False}
    posterior = fit(line, amortized_encoder(line, Linear()), x, **options)
    assert float(posterior.params["encoder$$$slope"]) == pytest.approx(2 / 4.25, rel=0.02)
    assert float(posterior.params["encoder$$$log_variance"]) == pytest.approx(math.log(0.25 / 4.25), abs=0.05)
    again = posterior.predict(torch.tensor([[0.0], [3.0]]), draws=4000)
    error = 5 * 2 * math.sqrt(0.25 / 4.25 / 4000)
    torch.testing.assert_close(again.mean[:, 0], torch.tensor([0.0, 12 / 4.25]), atol=error + 0.06, rtol=0)


def test_new_rows_of_any_count_in_batches_of_any_size():
    posterior = fitted()
    for rows in (1, 7, 60, 200):
        new = (torch.rand(rows, 12) < 0.3).float()
        found = posterior.predict(new, draws=30)
        assert found.mean.shape == (rows, 12)
        parts = posterior.predict(new, draws=30, batch_size=8)
        assert parts.mean.shape == (rows, 12)
    whole = posterior.predict(X, draws=500).mean
    parts = posterior.predict(X + 0, draws=500, batch_size=13).mean
    torch.testing.assert_close(whole, parts, atol=5 * 0.5 / math.sqrt(500), rtol=0)


IN_ANOTHER_PROCESS = """
import sys, torch
from safetensors.torch import load_file, save_file
from guides import amortized_encoder
from inference import load
from ppl_models import VAE
folder = sys.argv[1]
model = VAE(12, latent=2, hidden=[8])
posterior = load(f"{folder}/run", model, amortized_encoder(model))
x = load_file(f"{folder}/x.safetensors")["x"].clone()
code = posterior.encode(x)
draws = posterior.predict(x, draws=5).draws
save_file({"mean": code.mean, "std": code.std, "made": posterior.generate(6, seed=3), "draws": draws}, f"{folder}/y")
"""


def test_saved_and_loaded_in_another_process_it_encodes_and_generates_the_same(tmp_path):
    posterior = fitted()
    posterior.save(tmp_path / "run")
    save_file({"x": X[:9]}, tmp_path / "x.safetensors")
    subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path], check=True)
    found, code = load_file(tmp_path / "y"), posterior.encode(X[:9])
    assert torch.equal(found["mean"], code.mean)
    assert torch.equal(found["std"], code.std)
    assert torch.equal(found["made"], posterior.generate(6, seed=3))
    assert torch.equal(found["draws"], posterior.predict(X[:9], draws=5).draws)
    assert not torch.equal(found["made"], posterior.generate(6, seed=4))


def test_latents_with_a_constraint_and_latents_that_all_rows_share():
    def model(x):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            size = pyro.sample("size", dist.Gamma(2.0, rate))
            parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Normal(size[:, None] * parts, 0.1).to_event(1), obs=rows)

    x = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.1, 0.1]]).repeat(20, 1)
    others = AutoNormal(poutine.block(model, hide=["size", "parts"]))
    guide = amortized_encoder(model, nn.Linear(3, 6), others=others)
    posterior = fit(model, guide, x, steps=600, lr=0.05, engine="eager", progress=False)
    draws = posterior.sample(200)
    assert {n: tuple(v.shape) for n, v in draws.items()} == {"rate": (200,), "size": (200, 40), "parts": (200, 40, 3)}
    assert (draws["size"] > 0).all()
    torch.testing.assert_close(draws["parts"].sum(-1), torch.ones(200, 40))
    assert abs(draws["size"][:, 0].mean() - 6) < 0.6
    batched = fit(model, guide, x, steps=20, batch_size=8, engine="eager", progress=False)
    assert batched.predict(x[:5], draws=10, batch_size=2).mean.shape == (5, 3)


def shared(x):
    pyro.sample("w", dist.Normal(0.0, 1.0))
    line(x)


def flat(x):
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(w, 1.0), obs=x[:, 0])


@pytest.mark.parametrize(
    ("model", "net", "message"),
    [
        (line, nn.Linear(1, 3), r"must give \(60, 2\), the means and the log variances of 1 numbers"),
        (shared, Linear(), r"all rows share the latents \['w'\].*others=AutoNormal.*hide=\['z'\]"),
        (flat, Linear(), r"no row has a latent of its own, found \['w'\]"),
    ],
)
def test_what_does_not_fit_is_refused(model, net, message):
    with pytest.raises(ValueError, match=message):
        fit(model, amortized_encoder(model, net), X[:, :1], steps=2, progress=False)


def test_values_that_are_not_bits_and_rows_of_another_width_are_named():
    grey = X.clone()
    grey[17] = 0.5
    message = r"site 'x' observes numbers from 0.5 to 0.5 at row 17.*Bernoulli, 0 or 1"
    with pytest.raises(ValueError, match=message):
        fitted(grey, batch_size=10)
    posterior = fitted()
    with pytest.raises(ValueError, match=message):
        posterior.predict(grey)
    with pytest.raises(ValueError, match=r"x has shape \(60, 11\) but the fit saw \(60, 12\)"):
        posterior.predict(X[:, 1:])
    with pytest.raises(ValueError, match="noise is -1"):
        small_vae(noise=-1)


def test_encode_decode_and_what_lies_between():
    posterior = fitted(batch_size=20)
    code = posterior.encode(X)
    assert code.mean.shape == code.std.shape == (60, 2)
    torch.testing.assert_close(posterior.encode(X, batch_size=7).mean, code.mean)
    assert posterior.encode(X[:3]).active().shape == (2,)
    image = posterior.decode(code.mean)
    assert image.shape == (60, 12)
    assert ((image > 0) & (image < 1)).all()
    torch.testing.assert_close(posterior.reconstruct(X), image)
    between = posterior.interpolate(X[:4], X[4:8], steps=5)
    assert between.shape == (4, 5, 12)
    torch.testing.assert_close(between[:, 0], image[:4])
    torch.testing.assert_close(between[:, -1], image[4:8])
    made = posterior.generate(23, seed=1)
    assert made.shape == (23, 12)
    assert not torch.equal(made, posterior.generate(23, seed=2))
    torch.testing.assert_close(made, posterior.generate(23, seed=1))
    with pytest.raises(ValueError, match=r"z has shape \(60, 3\): give codes of shape \(M, 2\)"):
        posterior.decode(torch.zeros(60, 3))


def test_guides_without_an_encoder_say_so():
    posterior = fit(line, AutoNormal(line), X[:, :1], steps=5, progress=False)
    with pytest.raises(ValueError, match="'AutoNormal' has no encoder"):
        posterior.encode(X[:, :1])


def exact_line(spread):
    """A guide for ``line`` with the exact mean and ``spread`` times the exact standard deviation."""

    def guide(x):
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            scale = spread * pyro.param("scale", torch.tensor(math.sqrt(0.25 / 4.25)))
            pyro.sample("z", dist.Normal(2 * rows / 4.25, scale).to_event(1))

    return guide


def test_the_importance_bound_rises_to_the_evidence():
    """Of a guide one and a half times too wide: from the ELBO up; with the exact guide it is the evidence at once."""
    x = 2 * torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    truth = dist.Normal(0.0, math.sqrt(4.25)).log_prob(x)[:, 0]
    exact = fit(line, exact_line(1.0), x, steps=1, lr=1e-9, progress=False)
    torch.testing.assert_close(exact.log_evidence(x, samples=1), truth, atol=1e-4, rtol=0)
    wide = fit(line, exact_line(1.5), x, steps=1, lr=1e-9, progress=False)
    bounds = [wide.log_evidence(x, samples=k, batch_size=50) - truth for k in (1, 10, 100, 1000)]
    means = [float(bound.mean()) for bound in bounds]
    # KL(q‖p) of a Normal that is 1.5 times too wide, and its Monte-Carlo error over rows.
    assert means[0] == pytest.approx(-(1.5**2 - 1) / 2 + math.log(1.5), abs=5 * float(bounds[0].std()) / math.sqrt(200))
    assert means == sorted(means)
    assert abs(means[-1]) < 5 * float(bounds[-1].std()) / math.sqrt(200) + 1e-3


def test_log_evidence_is_for_latents_of_rows():
    posterior = fit(shared, AutoNormal(shared), X[:, :1], steps=5, progress=False)
    with pytest.raises(ValueError, match=r"all rows share the latents \['w'\]"):
        posterior.log_evidence(X[:, :1])


def test_pixels_that_are_not_finite_are_named():
    broken = X.clone()
    broken[5, 3] = float("nan")
    for ask in (fitted, fitted().encode, fitted().reconstruct):
        with pytest.raises(ValueError, match=r"x has 1 values that are NaN or infinite.*row 5, column 3"):
            ask(broken)


@pytest.mark.parametrize("scaled", [True, False])
def test_the_mean_elbo_of_an_epochs_batches_is_that_of_all_rows(scaled):
    """With the same noise for each row; without the scale N/B it is not, by far."""
    model, guide = (part.double() for part in small_vae())
    x, noise = X.double(), torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def elbo(rows):
        """−loss of the batch ``rows``, with the noise of these rows."""
        batch = Subsampling(60, len(rows))
        stream = RandomStream.seeded(0)
        bound_model = BoundModel.start(model, guide, (x,), stream, torch.device("cpu"), torch.float64)
        with bound_model.running(bound_model.params.flatten(), stream), torch.no_grad():
            chosen = [] if len(rows) == 60 else [rows]  # nothing is drawn to choose all
            with ReplayRandomOps([*chosen, noise[rows]]), poutine.scale(scale=1.0 if scaled else len(rows) / 60):
                return -float(loss(batch(bound_model.model), batch(bound_model.guide), (x,), 1, True)[0])

    whole = elbo(torch.arange(60))
    parts = [elbo(rows) for rows in torch.randperm(60).split(12)]
    close = pytest.approx(whole, rel=1e-6)
    assert (sum(parts) / 5 == close) == scaled


def linear_vae(pixels=20, latent=3, noise=0.5):
    """A decoder that is a matrix W: x ~ N(0, WWᵀ + σ²I), and an encoder with the exact posterior of each row."""
    weights = torch.randn(pixels, latent, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    decode = nn.Linear(latent, pixels, bias=False).double()
    encode = nn.Linear(pixels, 2 * latent).double()
    precision = torch.eye(latent, dtype=torch.float64) + weights.T @ weights / noise**2
    with torch.no_grad():
        # A rotation of z makes the exact posterior one of independent numbers.
        rotation = torch.linalg.eigh(precision).eigenvectors
        decode.weight.copy_(weights @ rotation)
        variance = 1 / torch.diagonal(rotation.T @ precision @ rotation)
        encode.weight.copy_(
            torch.cat([variance[:, None] * (weights @ rotation).T / noise**2, torch.zeros(latent, pixels)])
        )
        encode.bias.copy_(torch.cat([torch.zeros(latent), variance.log()]))
    model = VAE(pixels, latent=latent, noise=noise, decoder=decode)
    covariance = weights @ weights.T + noise**2 * torch.eye(pixels, dtype=torch.float64)
    return model, encode, dist.MultivariateNormal(torch.zeros(pixels, dtype=torch.float64), covariance)


@pytest.mark.parametrize("off", [0.0, 0.4])
def test_on_a_linear_vae_the_bound_rises_to_the_known_evidence(off):
    """With the exact encoder all are log p(x); with log variances that are too large by ``off`` they rise to it."""
    model, encode, truth = linear_vae()
    with torch.no_grad():
        encode.bias[3:] += off
    x = truth.sample((300,))
    options = {"steps": 1, "lr": 1e-12, "dtype": torch.float64, "progress": False}
    posterior = fit(model, amortized_encoder(model, encode), x, **options)
    known = truth.log_prob(x)
    gaps = [posterior.log_evidence(x, samples=k, progress=False) - known for k in (1, 10, 100, 1000)]
    means, errors = ([float(f(gap)) for gap in gaps] for f in (torch.mean, lambda gap: gap.std() / math.sqrt(300)))
    assert abs(means[-1]) < 0.01
    elbo = -3 * (math.exp(off) - 1 - off) / 2  # −KL of Normals that are too wide
    assert means[0] == pytest.approx(elbo, abs=5 * errors[0] + 1e-6)
    if off:
        assert means == sorted(means)
        assert all(mean > elbo - 5 * error for mean, error in zip(means, errors, strict=True))
        assert means[0] < -0.05
    else:
        assert max(abs(gap).max() for gap in gaps) < 1e-6


def test_codes_of_a_latent_with_a_constraint_decode_in_the_same_space():
    def model(x):
        with pyro.plate("data", len(x)):
            rows = pyro.subsample(x, event_dim=1)
            size = pyro.sample("size", dist.Gamma(2.0, torch.ones(len(rows), 1)).to_event(1))
            shift = pyro.sample("shift", dist.Normal(torch.zeros(len(rows)), 1.0))
            pyro.sample("x", dist.Normal(size + shift[:, None], 0.1).expand([len(rows), 4]).to_event(1), obs=rows)

    x = torch.rand(30, 4) + 1
    posterior = fit(model, amortized_encoder(model, nn.Linear(4, 4)), x, steps=20, progress=False)
    code = posterior.encode(x)
    assert code.mean.shape == (30, 2)
    expected = code.mean[:, :1].exp() + code.mean[:, 1:]
    torch.testing.assert_close(posterior.decode(code.mean), expected.expand(30, 4))


def test_held_out_rows_are_scored_by_how_probable_they_are():
    model, encode, truth = linear_vae()
    x = truth.sample((400,))
    options = {"steps": 1, "lr": 1e-12, "dtype": torch.float64, "progress": False}
    posterior = fit(model, amortized_encoder(model, encode), x[:200], **options)
    assert posterior.is_autoencoder
    found = posterior.evaluate(x[200:], progress=False)
    expected = float(truth.log_prob(x[200:]).mean())
    assert (found.scores.rows, found.scores.size) == (200, 3)
    assert found.scores.elbo == pytest.approx(expected, abs=1e-6)
    assert found.scores.log_evidence == pytest.approx(expected, abs=1e-6)
    assert found.encoding.mean.shape == (200, 3)


ENCODE_ALL = """
import resource, sys, torch
from guides import amortized_encoder
from inference import fit
from ppl_models import VAE
rows = int(sys.argv[1])
x = (torch.rand(rows, 784) < 0.3).float()
model = VAE(hidden=(100,), latent=4)
posterior = fit(model, amortized_encoder(model), x[:500], steps=2, batch_size=100, engine="eager", progress=False)
posterior.encode(x[:200]), posterior.reconstruct(x[:200])
for _ in range(2):  # the first may grow the allocator's pools
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code = posterior.encode(x.numpy())
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    print(grown, code.mean.nbytes + code.std.nbytes)
"""


def test_encoding_takes_the_memory_of_a_batch_and_the_result():
    ran = subprocess.run([sys.executable, "-c", ENCODE_ALL, "30000"], capture_output=True, text=True, check=True)
    (first, result), _ = (map(int, line.split()) for line in ran.stdout.splitlines())
    data = 30_000 * 784 * 4
    assert first < 2 * result + 0.1 * data  # far less than a copy of the rows
