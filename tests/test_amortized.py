"""An encoder for the latents of rows: any support, new rows, batches, and what it refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

from guides import amortized_encoder
from inference import fit, load
from ppl_models import VAE
from ppl_models.vae import decoder, encoder

X = (torch.rand(60, 12, generator=torch.Generator().manual_seed(0)) < 0.3).float()


def small_vae(**options):
    torch.manual_seed(0)
    model = VAE(decoder(12, latent=2, hidden=[8]), latent=2, **options)
    return model, amortized_encoder(model, encoder(12, latent=2, hidden=[8]))


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


@pytest.mark.parametrize("engine", ["eager", "compiled"])
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


def test_a_posterior_that_was_saved_encodes_the_same_in_a_new_object(tmp_path):
    posterior = fitted()
    posterior.save(tmp_path / "run")
    torch.manual_seed(5)
    model = VAE(decoder(12, latent=2, hidden=[8]), latent=2)
    loaded = load(tmp_path / "run", model, amortized_encoder(model, encoder(12, latent=2, hidden=[8])))
    new = X[:9]
    torch.testing.assert_close(loaded.predict(new, draws=5).draws, posterior.predict(new, draws=5).draws)


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
    posterior = fit(model, guide, x, steps=1500, lr=0.02, engine="eager", progress=False)
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
    with pytest.raises(ValueError, match=r"z has shape \(60, 3\): give values of 'z', shape \(M, 2\)"):
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
