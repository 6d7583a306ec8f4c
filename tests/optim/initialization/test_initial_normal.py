"""Normals to start a guide at: from the curvature of the log joint, and along the paths to a mode."""

import functools
import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import autoguide

from guides import full_rank_normal, funnel_flow, low_rank_normal, mean_field_normal, planar_flow, spline_flow
from inference import fit
from inference.model.bound_model import BoundModel
from inference.model.log_joint import LatentLayout, LogJoint
from inference.optim.initialization.initial_normal import InitialNormal, NoInitialNormal, laplace_at, place_guide
from inference.optim.initialization.strategies import find_initial_normal
from inference.utils.random_state import RandomStream
from ppl_models import exact_linear_regression, linear_regression
from tests.helpers.schools import SCHOOLS, eight_schools


def at(u):
    """The Normal that Laplace's approximation of N(3, 2²) makes at ``u``."""

    def model():
        pyro.sample("z", dist.Normal(3.0, 2.0))

    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(
        model, mean_field_normal(model), (), stream, torch.device("cpu"), torch.float64, check_values=False
    )
    return laplace_at(LogJoint(bound_model, (), stream), torch.tensor([u], dtype=torch.float64))


def test_laplace_is_exact_at_the_mode_of_a_normal():
    found = at(3.0)
    assert found.is_mode
    assert found.sd.item() == pytest.approx(2.0)
    assert found.log_evidence == pytest.approx(0.0, abs=1e-9)


def test_a_point_that_is_no_mode_is_not_called_one():
    assert not at(5.0).is_mode


def test_a_density_that_is_not_finite_gives_no_normal():
    assert isinstance(at(math.inf), NoInitialNormal)


def test_a_normal_is_read_back_from_its_fields():
    found = at(3.0)
    again = InitialNormal.from_state_dict(vars(found), torch.device("cpu"))
    assert torch.equal(again.scale_tril, found.scale_tril)
    assert again.elbo == found.elbo


CPU = torch.device("cpu")


def started(model, guide, *args, seed=0, dtype=torch.float64):
    stream = RandomStream.seeded(seed)
    args = tuple(value.to(dtype) for value in args)
    bound_model = BoundModel.start(model, guide(model), args, stream, CPU, dtype)
    return bound_model, find_initial_normal(bound_model, args, stream)


def placed(model, guide, *args, dtype=torch.float64):
    """The guide at its start, and the start."""
    bound_model, start = started(model, guide, *args, dtype=dtype)
    stream = RandomStream.seeded(1)
    return bound_model, start, bound_model.running(place_guide(bound_model, start), stream)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 2, dtype=torch.float64, generator=generator) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]]).double()
    y = x @ torch.tensor([1.0, -2.0]).double() + 0.5 * torch.randn(30, dtype=torch.float64, generator=generator)
    return x, y


known_noise = functools.partial(linear_regression, noise=0.5)


def test_a_normal_posterior_is_found_exactly(rows):
    """Laplace's Normal is the posterior itself, so that its ELBO is log p(y) at every draw."""
    exact = exact_linear_regression(*rows, noise=0.5)
    _, start = started(known_noise, full_rank_normal, *rows)
    assert start.is_mode
    torch.testing.assert_close(start.loc, exact.mean, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(start.scale_tril @ start.scale_tril.T, exact.covariance, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(start.sd, torch.linalg.inv(exact.covariance).diagonal().rsqrt(), rtol=1e-7, atol=0)
    assert start.elbo == pytest.approx(exact.log_evidence, abs=1e-7)
    assert start.log_joint > exact.log_evidence
    assert start.evaluations <= 100


def test_the_families_are_put_where_the_posterior_is(rows):
    exact = exact_linear_regression(*rows, noise=0.5)
    alone = torch.linalg.inv(exact.covariance).diagonal().rsqrt()
    whole = {
        autoguide.AutoMultivariateNormal: exact.covariance,
        full_rank_normal: exact.covariance,
        functools.partial(low_rank_normal, rank=3): exact.covariance,
        functools.partial(autoguide.AutoLowRankMultivariateNormal, rank=3): exact.covariance,
        autoguide.AutoDiagonalNormal: alone.square().diag(),
    }
    for guide, covariance in whole.items():
        bound_model, _, running = placed(known_noise, guide, *rows)
        with running:
            normal = bound_model.guide.get_posterior(*rows)
            mean, found = normal.mean.detach(), getattr(normal, "covariance_matrix", None)
            found = normal.variance.diag().detach() if found is None else found.detach()
        torch.testing.assert_close(mean, exact.mean, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found, covariance, rtol=1e-6, atol=1e-12)


def test_independent_normals_flows_and_points_start_at_the_mode(rows):
    exact = exact_linear_regression(*rows, noise=0.5)
    alone = torch.linalg.inv(exact.covariance).diagonal().rsqrt()
    bound_model, _, running = placed(known_noise, mean_field_normal, *rows)
    with running:
        torch.testing.assert_close(bound_model.guide.locs.weights.detach(), exact.mean[:2])
        torch.testing.assert_close(bound_model.guide.scales.weights.detach(), alone[:2], rtol=1e-6, atol=0)
        torch.testing.assert_close(bound_model.guide.scales.bias.detach(), alone[2], rtol=1e-6, atol=0)
    for guide in (planar_flow, funnel_flow, spline_flow):
        bound_model, _, running = placed(known_noise, guide, *rows, dtype=torch.float32)
        with running:
            torch.testing.assert_close(bound_model.guide.loc.detach(), exact.mean.float())
            factor = bound_model.guide.scale.detach()[:, None] * bound_model.guide.scale_tril.detach()
            torch.testing.assert_close(factor, torch.linalg.cholesky(exact.covariance).float(), rtol=1e-4, atol=1e-6)
    for guide in (autoguide.AutoDelta, autoguide.AutoLaplaceApproximation):
        bound_model, _, running = placed(known_noise, guide, *rows)
        with running:
            weights = bound_model.guide.weights if guide is autoguide.AutoDelta else bound_model.guide.loc[:2]
            torch.testing.assert_close(weights.detach(), exact.mean[:2])


def flat_line(x, y=None):
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real, (), (x.shape[1],)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def test_the_units_of_the_columns_do_not_matter(rows):
    x, y = rows
    units = torch.tensor([1e-4, 1e4], dtype=torch.float64)
    _, plain = started(flat_line, full_rank_normal, x, y)
    _, scaled = started(flat_line, full_rank_normal, x * units, y)
    back = torch.cat([units, torch.ones(1)])
    assert plain.is_mode
    assert scaled.is_mode
    # Newton's steps end 1e-7 nats below the top, which is √(2e-7) sd.
    assert ((scaled.loc * back - plain.loc) / plain.sd).abs().max() < 1e-3
    torch.testing.assert_close(scaled.scale_tril * back[:, None], plain.scale_tril, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(plain.loc[:2], torch.linalg.lstsq(x, y).solution, rtol=1e-4, atol=1e-5)
    assert scaled.evaluations <= 300


@pytest.mark.parametrize(
    ("prior", "mode", "curvature"),
    [
        (dist.Gamma(3.0, 2.0), math.log(3 / 2), 3.0),
        (dist.LogNormal(0.3, 0.5), 0.3, 4.0),
        (dist.Beta(2.0, 3.0), math.log(2 / 3), 2 * 3 / 5),
        (dist.Uniform(-1.0, 3.0), 0.0, 0.5),
    ],
    ids=lambda p: type(p).__name__,
)
def test_the_mode_is_that_of_the_unconstrained_density(prior, mode, curvature):
    """U = log z of Gamma(a, b) has a·u − b·eᵘ: mode log(a/b), curvature a; logit z of Beta(a, b) has ab/(a + b)."""

    def model():
        pyro.sample("z", prior)

    _, start = started(model, full_rank_normal)
    assert start.is_mode
    assert start.loc.item() == pytest.approx(mode, abs=1e-3)
    assert start.sd.item() == pytest.approx(curvature**-0.5, rel=1e-3)


def test_a_point_estimate_starts_at_the_mode_of_the_density_itself():
    def model():
        pyro.sample("z", dist.Gamma(3.0, 2.0))

    bound_model, _, running = placed(model, autoguide.AutoDelta)
    with running:
        assert bound_model.guide.median()["z"].item() == pytest.approx((3 - 1) / 2, abs=1e-3)


def test_scales_masks_and_factors_count_as_in_the_elbo():
    x = torch.tensor([1.0, 2.0, 9.0], dtype=torch.float64)

    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=3.0), poutine.mask(mask=torch.tensor([True, True, False])), pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)
        pyro.factor("more", -0.5 * (z - 4).square())

    _, start = started(model, full_rank_normal, x)
    assert start.loc.item() == pytest.approx((3 * 3 + 4) / 8)
    assert start.sd.item() == pytest.approx(8**-0.5)


@pytest.mark.parametrize(
    "guide",
    [
        autoguide.AutoNormal,
        autoguide.AutoDiagonalNormal,
        autoguide.AutoMultivariateNormal,
        autoguide.AutoLowRankMultivariateNormal,
        autoguide.AutoDelta,
        autoguide.AutoIAFNormal,
        mean_field_normal,
        full_rank_normal,
        low_rank_normal,
        planar_flow,
        funnel_flow,
        spline_flow,
    ],
)
def test_every_autoguide_starts_from_flat_priors(guide, rows):
    def flats(x, y=None):
        flat_line(x, y)
        pyro.sample("order", dist.ImproperUniform(constraints.ordered_vector, (), (3,)))
        pyro.sample("several", dist.ImproperUniform(constraints.unit_interval, (2,), ()).to_event(1))
        with pyro.plate("groups", 2):
            pyro.sample("share", dist.ImproperUniform(constraints.simplex, (), (3,)).mask(True))

    posterior = fit(flats, guide(flats), *rows, steps=3, progress=False)
    shapes = {name: tuple(value.shape[1:]) for name, value in posterior.sample(2).items()}
    assert shapes == {"beta": (2,), "sigma": (), "order": (3,), "several": (2,), "share": (2, 3)}
    assert posterior.prior(3) == {}


def test_every_start_of_pyros_works_from_flat_priors_and_a_list_of_guides_too(rows):
    for start in (autoguide.init_to_sample, autoguide.init_to_uniform, autoguide.init_to_feasible):
        fit(flat_line, autoguide.AutoNormal(flat_line, init_loc_fn=start), *rows, steps=2, progress=False)
    guide = autoguide.AutoGuideList(flat_line)
    guide.append(autoguide.AutoNormal(poutine.block(flat_line, hide=["sigma"])))
    guide.append(autoguide.AutoDelta(poutine.block(flat_line, expose=["sigma"])))
    fit(flat_line, guide, *rows, steps=2, progress=False)
    with pytest.raises(NotImplementedError):  # outside of a fit nothing has changed
        autoguide.AutoNormal(flat_line)(*rows)


def test_a_funnel_has_no_mode_and_a_reasonable_start():
    """The log joint has no upper bound as tau → 0; log p(y) is about −31.2, and reference sds are 3 to 6."""
    _, start = started(eight_schools, full_rank_normal, *(value.double() for value in SCHOOLS))
    assert isinstance(start, InitialNormal)
    assert not start.is_mode
    assert -45 < start.elbo < -31
    assert start.evaluations <= 1000
    assert start.loc.abs().max() < 30


def test_what_has_no_mode_to_search_is_refused_with_a_reason(rows):
    def coin(x):
        pyro.sample("z", dist.Bernoulli(0.5))

    def coin_guide(x):
        pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.4, dtype=torch.float64))))

    def hand_written(x, y=None):
        for name, shape in (("weights", (2,)), ("bias", ())):
            loc = pyro.param(name + "_loc", torch.zeros(shape, dtype=torch.float64))
            pyro.sample(name, dist.Normal(loc, 1.0).to_event(len(shape)))

    def noisy(x, y=None):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("noise", z * torch.rand(()))

    for model, guide, words in (
        (coin, lambda _: coin_guide, "discrete"),
        (known_noise, lambda _: hand_written, "hand_written"),
        (noisy, full_rank_normal, "another number each time"),
    ):
        args = rows[:1] if model is coin else rows
        _, found = started(model, guide, *args)
        assert isinstance(found, NoInitialNormal)
        assert words in found.reason


def test_regions_without_a_density_are_gone_round():
    """The first points are outside of where log p is a number; at least one draw of the prior is not."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        pyro.factor("inside", torch.log(z - 0.5).sum() - z.square().sum())

    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(model, full_rank_normal(model), (), stream, CPU, torch.float64, check_values=False)
    start = find_initial_normal(bound_model, (), stream)
    assert isinstance(start, InitialNormal), start
    # d/dz: 1/(z − ½) − 2z − z/4 = 0
    assert start.loc.tolist() == pytest.approx([0.9629] * 2, abs=2e-3)


def test_a_model_written_in_single_precision_is_searched_in_double(rows):
    x, y = rows
    single = x.float()

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0)))
        pyro.sample("y", dist.Normal(single @ w, sigma).to_event(1), obs=y)

    bound_model, start = started(model, mean_field_normal, y.float(), dtype=torch.float32)
    assert isinstance(start, InitialNormal), start
    assert start.loc.dtype == torch.float64
    assert start.is_mode
    assert place_guide(bound_model, start).dtype == torch.float32
    assert {leaf.dtype for leaf in bound_model.params.leaves} == {torch.float32}


def test_many_latents_have_a_spread_each():
    sds = torch.logspace(-3, 1, 400, dtype=torch.float64)

    def model():
        pyro.sample("z", dist.Normal(torch.ones(400), sds).to_event(1))

    bound_model, start = started(model, low_rank_normal)
    assert start.scale_tril is None
    assert ((start.loc - 1) / sds).abs().max() < 0.05
    torch.testing.assert_close(start.sd, sds)
    assert torch.isfinite(place_guide(bound_model, start)).all()


def test_random_numbers_come_from_the_stream_alone_and_the_store_is_left(rows):
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(1.0))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    args = [value.double() for value in SCHOOLS]
    one, again, other = (started(eight_schools, full_rank_normal, *args, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert dict(pyro.get_param_store().items()).keys() == {"mine"}
    pyro.get_param_store().clear()
    assert torch.equal(one.loc, again.loc)
    assert one.elbo == again.elbo
    assert not torch.equal(one.loc, other.loc)


def test_places_take_a_vector_apart_and_put_it_together(rows):
    bound_model, start = started(flat_line, full_rank_normal, *rows)
    places = LatentLayout.of(bound_model.guide)
    values, change = places.values(start.loc)
    assert values["sigma"].item() == pytest.approx(math.exp(start.loc[2].item()))
    assert change.item() == pytest.approx(start.loc[2].item())
    assert torch.equal(torch.cat([part.reshape(-1) for part in places.named(start.loc).values()]), start.loc)
