"""Annealed targets and several starts."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from guides import mean_field_normal, planar_flow
from inference import cosine_decay, fit
from inference.model.bound_model import BoundModel
from inference.model.elbo import loss
from inference.optim.schedules import as_tempering_schedule
from inference.utils.random_state import RandomStream
from ppl_models import Energy, u1

CPU = torch.device("cpu")


def positive(y=None):
    """One latent above 0, with tails so heavy that p(z)^0.01 has no mass unless dz/du is flattened with it."""
    pyro.sample("z", dist.HalfCauchy(3.0))


def test_with_beta_the_number_is_the_loss_and_the_gradient_is_the_annealed_one():
    """By hand: z = eᵘ, u = m + sε; the target in u is log p(eᵘ) + u, and β multiplies all of it."""
    beta = 0.3
    bound_model = BoundModel.start(
        positive, mean_field_normal(positive), (), RandomStream.seeded(0), CPU, torch.float64
    )
    flat_params, grad = bound_model.params.flatten(), torch.zeros(2, dtype=torch.float64)
    found = []
    for power in (beta, None):
        with bound_model.running(flat_params, RandomStream.seeded(5), grad):
            found.append(loss(bound_model.model, bound_model.guide, (), 1, True, power)[0])
            if power is not None:
                found[0].backward()
    assert found[0].item() == pytest.approx(found[1].item(), rel=1e-12)
    with RandomStream.seeded(5).active():
        noise = torch.randn((), dtype=torch.float64)
    theta = flat_params.clone().requires_grad_()
    named = dict(zip(bound_model.params.names, bound_model.params.views(theta), strict=True))
    m, s = named["AutoNormal.locs.z"], torch.nn.functional.softplus(named["AutoNormal.scales.z"])
    u = m + s * noise
    target = dist.HalfCauchy(torch.tensor(3.0, dtype=torch.float64)).log_prob(u.exp()) + u
    by_hand = -(beta * target - dist.Normal(m, s).log_prob(u))
    torch.testing.assert_close(grad, torch.autograd.grad(by_hand, theta)[0], rtol=1e-9, atol=1e-12)


def test_under_a_constant_power_the_guide_fits_the_flattened_target():
    """N(0, 1) to the power 1/4 is N(0, 4): the fit before the end must have sd 2, and 1 without annealing."""

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def power(step):
        return 1.0 if step >= 999 else 0.25

    for anneal, expected in ((power, 2.0), (None, 1.0)):
        posterior = fit(
            model, mean_field_normal(model), steps=1000, lr=cosine_decay(0.1, 1000), anneal=anneal, engine="eager",
            progress=False,
        )  # fmt: skip
        assert posterior.params["AutoNormal.scales.z"] == pytest.approx(expected, rel=0.1)
    assert as_tempering_schedule(power, 1000) is power


@pytest.mark.parametrize(
    ("anneal", "message"),
    [
        (0, "anneal is 0"),
        (200, r"anneal ends at 0\.5.* at the last of 100 steps"),
        (lambda step: 2.0, "anneal gives 2.0 at step 0"),
        (lambda step: math.nan, "anneal gives nan at step 0"),
    ],
)
def test_an_annealing_that_makes_no_sense_is_refused(anneal, message):
    with pytest.raises(ValueError, match=message):
        fit(positive, mean_field_normal(positive), steps=100, anneal=anneal, progress=False)


def test_annealing_needs_reparameterised_draws():
    def model():
        pyro.sample("n", dist.Poisson(4.0))

    def guide():
        pyro.sample("n", dist.Poisson(pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)))

    with pytest.raises(ValueError, match=r"anneal needs a guide whose draws are reparameterised.*\['n'\]"):
        fit(model, guide, steps=100, anneal=50, progress=False)


def two_modes():
    """Two Normals far apart, the lower one first on the way."""
    z = pyro.sample("z", dist.Normal(0.0, 100.0))
    each = torch.tensor([0.1, 0.9]).log() + dist.Normal(torch.tensor([-6.0, 6.0]), 1.0).log_prob(z)
    pyro.factor("modes", each.logsumexp(-1))


@pytest.mark.slow
def test_the_best_of_several_starts_is_kept():
    guide = mean_field_normal(two_modes, init_loc=pyro.infer.autoguide.init_to_uniform(radius=8.0))
    options = {"steps": 900, "lr": 0.05, "progress": False, "engine": "eager"}
    alone = [fit(two_modes, guide, seed=3, restarts=r, **options) for r in (1, 5)]
    assert len(alone[0].record.starts) == 1
    starts = alone[1].record.starts
    assert starts[0] == alone[0].record.starts[0]
    assert alone[1].losses[-90:].mean() == pytest.approx(min(starts), abs=1e-6)
    # The modes differ by the logarithm of their weights' ratio, 2.2 nats.
    assert max(starts) - min(starts) > 1.5
    assert alone[1].sample(100)["z"].mean() > 5


def test_a_start_that_fails_is_a_warning_while_another_stands():
    calls = []

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        calls.append(z)
        if torch.initial_seed() == 0:
            pyro.factor("bad", torch.log(-z.abs()))

    def run(restarts):
        return fit(model, mean_field_normal(model), steps=20, restarts=restarts, engine="eager", progress=False)

    with pytest.warns(UserWarning, match="start 1 of 3 failed: the model 'model'"):
        posterior = run(3)
    assert math.isinf(posterior.record.starts[0])
    assert all(math.isfinite(loss) for loss in posterior.record.starts[1:])
    with pytest.raises(ValueError, match="the model 'model' could not run"):
        run(1)


def test_the_losses_of_all_starts_are_saved(tmp_path):
    from inference import load

    posterior = fit(u1, mean_field_normal(u1), steps=20, restarts=2, progress=False)
    posterior.save(tmp_path / "run")
    assert load(tmp_path / "run", u1, mean_field_normal(u1)).record.starts == pytest.approx(posterior.record.starts)


def kl_and_share(posterior, draws=4000):
    """KL(q‖p) in nats with its standard error, and the share of draws right of 0, on U1."""
    z = posterior.sample(draws)
    gap = posterior.log_prob(z) - Energy("u1").log_prob(z["z"])
    return float(gap.mean()), float(gap.std()) / draws**0.5, float((z["z"][:, 0] > 0).float().mean())


@pytest.mark.slow
def test_annealing_finds_both_modes_of_u1_from_beside_one_of_them():
    """Without it the flow stays in the mode that it starts in, at KL of about ln 2."""

    def run(anneal):
        guide = planar_flow(u1, layers=8, init_loc={"z": torch.tensor([2.0, 0.0])}, init_scale=0.3)
        return fit(
            u1, guide, steps=8000, particles=200, lr=cosine_decay(3e-3, 8000), anneal=anneal, engine="compiled",
            progress=False,
        )  # fmt: skip

    kl, error, share = kl_and_share(run(4000))
    assert kl < 0.1 + 5 * error
    assert 0.4 < share < 0.6
    kl, error, share = kl_and_share(run(None))
    assert kl > 0.4 - 5 * error
    assert not 0.2 < share < 0.8
