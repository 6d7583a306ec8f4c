"""optimizer="auto": a start, steps and an end that are found; what lands, what says that it did not."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from guides import full_rank_normal, funnel_flow, mean_field_normal, planar_flow, spline_flow
from inference import every, fit, load
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.model.elbo import loss
from inference.optim.averaged_adam import AveragedAdam, split_rhat
from inference.optim.initialization.initial_normal import place_guide
from inference.optim.initialization.strategies import find_initial_normal
from inference.optim.whitening import PathMoments, Whitening, whitening
from inference.utils.random_state import RandomStream
from ppl_models import exact_linear_regression, linear_regression
from tests.helpers.engines import losses_of_both
from tests.helpers.schools import SCHOOLS, eight_schools

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(60, 2, generator=GENERATOR, dtype=torch.float64) + torch.tensor([3.0, 0.0])  # not centred
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.5 * torch.randn(60, generator=GENERATOR, dtype=torch.float64)
MODEL = partial(linear_regression, noise=0.5)


def landed(model=MODEL, guide=full_rank_normal, x=X, y=Y, **options):
    options = {"optimizer": "auto", "dtype": torch.float64, "progress": False, **options}
    return fit(model, guide(model), x, y, **options)


@pytest.fixture(scope="module")
def full_rank():
    return landed(steps=4000, engine="compiled")


def flat_line(x, y=None):
    """A line with flat priors, on raw columns."""
    slopes = pyro.sample("slopes", dist.ImproperUniform(dist.constraints.real, (), (x.shape[1],)))
    sigma = pyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slopes, sigma), obs=y)


@pytest.mark.parametrize(
    ("guide", "engine"),
    [
        pytest.param(full_rank_normal, "eager", marks=pytest.mark.slow),
        (full_rank_normal, "compiled"),
        pytest.param(planar_flow, "eager", marks=pytest.mark.slow),
        pytest.param(planar_flow, "compiled", marks=pytest.mark.slow),
        pytest.param(funnel_flow, "compiled", marks=pytest.mark.slow),
        pytest.param(spline_flow, "compiled", marks=pytest.mark.slow),
    ],
)
def test_guides_with_correlations_land_on_the_exact_posterior(guide, engine):
    """Every mean within 0.1 posterior sd and every sd within a tenth, of 20,000 draws."""
    posterior = landed(guide=guide, engine=engine, steps=4000)
    exact = exact_linear_regression(X, Y, noise=0.5)
    draws = posterior.sample(20_000)
    found = torch.cat([draws["weights"], draws["bias"][:, None]], 1).double()
    sd = exact.covariance.diagonal().sqrt()
    assert ((found.mean(0) - exact.mean).abs() < 0.1 * sd).all()
    assert ((found.std(0) / sd - 1).abs() < 0.1).all()
    assert posterior.record.stop.converged
    assert posterior.stop_reason.startswith("converged after")
    assert len(posterior.losses) < 4000
    assert posterior.record.evaluations > len(posterior.losses)


def test_mean_field_has_the_means_though_latents_are_correlated():
    posterior = landed(guide=mean_field_normal, steps=7000, engine="compiled")
    exact = exact_linear_regression(X, Y, noise=0.5)
    draws = posterior.sample(20_000)
    found = torch.cat([draws["weights"], draws["bias"][:, None]], 1).double()
    assert ((found.mean(0) - exact.mean).abs() < 0.1 * exact.covariance.diagonal().sqrt()).all()


@pytest.mark.parametrize("guide", [pytest.param(AutoNormal, marks=pytest.mark.slow), AutoMultivariateNormal])
def test_flat_priors_and_columns_of_any_scale(guide):
    """The slopes of columns at 1e-4 and 1e+4 are those of the columns in units, in other units."""
    scale = torch.tensor([1e-4, 1e4], dtype=torch.float64)
    plain, wild = (landed(flat_line, guide, x, engine="compiled", steps=6000).sample(20_000) for x in (X, X * scale))
    sd = torch.linalg.inv(X.T @ X / 0.25).diagonal().sqrt()
    truth = torch.linalg.lstsq(X, Y[:, None]).solution[:, 0]
    for draws, factor in ((plain, 1.0), (wild, scale)):
        assert (((draws["slopes"].double() * factor).mean(0) - truth).abs() < 0.1 * sd).all()
    ratio = (wild["slopes"].double() * scale).std(0) / plain["slopes"].double().std(0)
    assert ((ratio - 1).abs() < 0.1).all()


@pytest.mark.slow
def test_where_it_does_not_land_it_does_not_say_so():
    """The funnel of eight schools, and a fit that is too short to tell."""
    sigma, effects = (value.double() for value in SCHOOLS)
    funnel = landed(eight_schools, full_rank_normal, sigma, effects, steps=3000, engine="compiled")
    assert not funnel.record.stop.converged
    assert "ceiling of steps" in funnel.stop_reason
    assert "R-hat" in funnel.stop_reason
    short = landed(steps=300, engine="eager")
    assert not short.record.stop.converged
    assert "300 steps are too few" in short.stop_reason
    assert len(short.losses) == 300


def test_what_it_found_is_saved_and_loaded(full_rank, tmp_path):
    full_rank.save(tmp_path / "run")
    loaded = load(tmp_path / "run", MODEL, full_rank_normal(MODEL))
    assert loaded.record.stop == full_rank.record.stop
    assert loaded.stop_reason == full_rank.stop_reason
    assert loaded.record.evaluations == full_rank.record.evaluations
    assert torch.equal(loaded.sample(3)["weights"], full_rank.sample(3)["weights"])
    plain = fit(MODEL, full_rank_normal(MODEL), X, Y, steps=20, progress=False)
    assert plain.stop_reason == "all 20 steps were taken"


@pytest.mark.parametrize("often", [300, 7])
def test_callbacks_see_the_end_that_was_found(full_rank, often):
    steps = []
    posterior = landed(steps=4000, engine="compiled", callbacks=[every(often, lambda now: steps.append(now.step))])
    assert steps[-1] == len(posterior.losses)
    np.testing.assert_array_equal(posterior.losses, full_rank.losses)


def same_losses(guide, particles=1):
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(MODEL, guide(MODEL), (X, Y), stream, CPU, torch.float64)
    start = find_initial_normal(bound_model, (X, Y), stream)
    theta = place_guide(bound_model, start)
    off = theta + 0.05 * torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    adaptive = AveragedAdam(
        whitening(bound_model, start, theta), off, 2000
    )  # at the mode the gradient is rounding alone
    options = {"adaptive": adaptive, "sticking_the_landing": guide is not mean_field_normal, "particles": particles}
    ours, theirs, mine, other = losses_of_both(MODEL, guide(MODEL), (X, Y), **options)
    torch.testing.assert_close(ours[:, 0], theirs[:, 0], rtol=1e-10, atol=0)
    torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-10)


FLOWS = [(planar_flow, 1), (planar_flow, 3), (funnel_flow, 1)]


@pytest.mark.parametrize(
    ("guide", "particles"),
    [(full_rank_normal, 1), (mean_field_normal, 1), *(pytest.param(*flow, marks=pytest.mark.slow) for flow in FLOWS)],
)
def test_same_noise_same_losses_on_both_engines(guide, particles):
    same_losses(guide, particles)


@pytest.mark.parametrize(("guide", "particles"), [FLOWS[0], pytest.param(*FLOWS[1], marks=pytest.mark.slow), FLOWS[2]])
def test_the_recorded_step_of_a_flow_has_the_same_losses(interpreted, guide, particles):
    same_losses(guide, particles)


def test_sticking_the_landing_has_the_same_mean_gradient_and_no_variance_at_the_posterior():
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(MODEL, full_rank_normal(MODEL), (X, Y), stream, CPU, torch.float64)
    theta = place_guide(bound_model, find_initial_normal(bound_model, (X, Y), stream))
    problem = SVIProblem.on(bound_model, InMemory((X, Y)))

    def gradients(at, sticking_the_landing, draws=400):
        found = []
        for seed in range(draws):
            grad = torch.zeros_like(at)
            with bound_model.running(at, RandomStream.seeded(seed), grad):
                loss(problem.model, problem.guide, problem.args, 1, True, None, sticking_the_landing)[0].backward()
            found.append(grad)
        return torch.stack(found)

    at_mode = gradients(theta, True, 20)
    assert float(at_mode.abs().max()) < 1e-3 * float(gradients(theta, False, 20).abs().max())
    off = theta + 0.02 * torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    plain, sticking_the_landing = gradients(off, False), gradients(off, True)
    error = torch.sqrt((plain.var(0) + sticking_the_landing.var(0)) / 400)
    assert ((plain.mean(0) - sticking_the_landing.mean(0)).abs() <= 5 * error + 1e-9).all()


@pytest.mark.parametrize("guide", [planar_flow, funnel_flow, spline_flow])
def test_the_density_of_a_flow_that_sticks_has_the_gradient_by_the_draw_alone(guide):
    """That of the density at a point that comes from elsewhere; the place without its layers has another."""
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(MODEL, guide(MODEL), (X, Y), stream, CPU, torch.float64)
    theta = bound_model.params.flatten()
    theta += 0.3 * torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with bound_model.running(theta, stream):
        flow = bound_model.guide.get_posterior(X, Y)
        z = flow.rsample()
        (found,) = torch.autograd.grad(flow.fixed().log_prob(z), z, retain_graph=True)
        value = flow.fixed().log_prob(z)
        apart = z.detach().clone().requires_grad_(True)
        wanted = flow.log_prob(apart)
        (slope,) = torch.autograd.grad(wanted, apart)
        centred = flow.transforms[1].inv(z.detach().clone().requires_grad_(True))
    assert value.item() == pytest.approx(wanted.item(), abs=1e-4)  # the inverse of a spline is known to so much
    torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(-centred, slope, rtol=0.1)


def test_a_flow_is_judged_by_its_moments_which_are_identified():
    """The same draws by other parameters have the same moments; draws moved by one sd have others."""
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(MODEL, planar_flow(MODEL), (X, Y), stream, CPU, torch.float64)
    start = find_initial_normal(bound_model, (X, Y), stream)
    theta = place_guide(bound_model, start)
    params = bound_model.params.constrained(theta)
    prefix = bound_model.guide._pyro_name
    bends = params[f"{prefix}.transform$$$w"]
    still = bound_model.params.replaced(theta, {f"{prefix}.transform$$$u": torch.zeros_like(bends)})
    other = bound_model.params.replaced(still, {f"{prefix}.transform$$$b": 5 + params[f"{prefix}.transform$$$b"]})
    moved = bound_model.params.replaced(still, {f"{prefix}.loc": start.loc + start.scale_tril[:, 0]})
    found = PathMoments(bound_model, start)(torch.stack([still, other, moved]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[2] - found[0], torch.eye(9, dtype=torch.float64)[0], atol=1e-6, rtol=0)
    assert (found[0, :6].abs() < 5 / math.sqrt(500)).all()


def test_one_wild_gradient_moves_nothing_far(monkeypatch):
    """0.05 · √(1 − 0.999³⁰⁰)/√0.001 = 0.8 posterior sds where it is not cut; with the cut less than half of that."""

    def thrown():
        theta = torch.zeros(3, dtype=torch.float64)
        white = Whitening(torch.ones_like(theta), torch.arange(3), torch.eye(3, dtype=torch.float64), 3.0)
        adaptive = AveragedAdam(white, theta, 4000)
        moments = [torch.zeros_like(theta) for _ in adaptive.moments]
        grads = torch.randn(400, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        grads[300] = 1e6
        path = []
        for step, grad in enumerate(grads):
            adaptive.update(theta, grad, moments, torch.tensor(adaptive.hyperparameters(step), dtype=torch.float64))
            path.append(theta.clone())
        return float((path[-1] - path[299]).abs().max())

    near = thrown()
    monkeypatch.setattr("inference.optim.averaged_adam._CLIP", math.inf)
    assert near < 0.4
    assert thrown() > 0.7


def test_in_whitened_coordinates_the_hessian_is_the_identity():
    """Of −ELBO at a Normal posterior, by a full-rank guide, estimated from the mean gradient at both sides."""
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(MODEL, full_rank_normal(MODEL), (X, Y), stream, CPU, torch.float64)
    start = find_initial_normal(bound_model, (X, Y), stream)
    theta = place_guide(bound_model, start)
    white = whitening(bound_model, start, theta)

    def gradient(phi, draws):
        total = torch.zeros_like(theta)
        for seed in range(draws):
            with bound_model.running(theta + white.move(phi), RandomStream.seeded(seed), total):
                loss(bound_model.model, bound_model.guide, (X, Y), 1, True, None, True)[0].backward()
        return white.pull(total) / draws

    # Two locations, whose slope is that of every draw; a spread, and one below the diagonal: 1 ± 1.2/√200.
    for place, draws, error in ((0, 1, 1e-9), (1, 1, 1e-9), (4, 200, 0.3), (6 + 3, 200, 0.3)):
        phi = torch.zeros_like(theta)
        phi[place] = 0.02
        slope = (gradient(phi, draws) - gradient(-phi, draws)) / 0.04
        assert float(slope[place]) == pytest.approx(1, abs=error)
    change = white.move(torch.randn(len(theta), dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(white.move(white.coordinates(change[None])[0]), change)


def test_split_rhat_tells_wandering_in_place_from_wandering_off():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    assert (split_rhat(points) < 1.03).all()
    assert (split_rhat(points + torch.linspace(0, 4, 200)[:, None]) > 1.3).all()
    assert (split_rhat(torch.ones(50, 2)) == 1).all()


def test_what_it_cannot_do_is_said():
    for options in ({"lr": 0.1}, {"anneal": 100}):
        with pytest.raises(ValueError, match="finds its own steps: leave lr and anneal out"):
            landed(**options)


@pytest.mark.slow
def test_a_flow_goes_that_way_where_nothing_else_is_asked():
    posterior = fit(MODEL, planar_flow(MODEL), X, Y, steps=1000, engine="eager", progress=False)
    assert posterior.record.options["optimizer"] == "auto"
    plain = fit(MODEL, planar_flow(MODEL), X, Y, steps=10, lr=0.01, engine="eager", progress=False)
    assert plain.record.options["optimizer"] == "adam"


def test_a_default_fit_whose_found_steps_fail_is_adams_with_a_warning(monkeypatch):
    """The default must not lose a fit that Adam makes."""
    monkeypatch.setattr("inference.optim.averaged_adam._SIZE", 1e30)
    with pytest.warns(UserWarning, match="the steps that were found failed, so this is Adam: .*at step"):
        posterior = fit(
            MODEL, full_rank_normal(MODEL), X.float(), Y.float(), steps=1000, engine="eager", progress=False
        )
    assert posterior.record.options["optimizer"] == "adam"
    assert len(posterior.losses) == 1000
    with pytest.raises(ValueError, match="at step"):
        landed(steps=1000, engine="eager")


def test_a_model_that_the_search_cannot_run_is_fitted_all_the_same():
    """Here one that insists on single precision."""

    def picky(x, y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        if w.dtype != torch.float32:
            raise TypeError("single precision only")
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(w * x[:, 0], 1.0), obs=y)

    posterior = fit(picky, mean_field_normal(picky), X.float(), Y.float(), steps=1000, engine="eager", progress=False)
    assert posterior.record.stop.rhat is None  # by steps that need no start
    slope, count = posterior.sample(1000)["w"].mean(), float(X[:, 0].square().sum())
    assert float(slope) == pytest.approx(float(X[:, 0] @ Y) / count, abs=0.1)
