"""The contours are those of the loss, and the path ends where they are lowest."""

import matplotlib as mpl
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

from guides import bernoulli_dropout, mean_field_normal
from inference import fit, load, plot_loss_contour
from inference.diagnostics.loss_surface import principal_plane, random_plane
from inference.engine.eager import EagerEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.model.bound_model import BoundModel
from inference.reporting.figures.loss_contour import surface_of
from inference.utils.random_state import RandomStream
from ppl_models import DropoutRegression, linear_regression

X = torch.linspace(-0.5, 1.5, 30, dtype=torch.float64)
Y = 2 * X - 1 + 0.2 * torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OPTIONS = {"dtype": torch.float64, "engine": "eager", "progress": False}


def squares(x, y=None):
    """−log p is Σ(y − Wx − b)² up to a constant."""
    weight, bias = pyro.param("W", torch.tensor(-1.0)), pyro.param("b", torch.tensor(2.5))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(weight * x + bias, 0.5**0.5), obs=y)


def nothing(x, y=None):
    pass


def path_of(model, guide, args, steps, **options):
    """θ before the first step and after each, as ``fit`` at seed 0 goes."""
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(model, guide, args, stream, torch.device("cpu"), torch.float64)
    engine = EagerEngine(SVIProblem.on(bound_model, InMemory(args), **options))
    state = engine.init(stream)
    rows = [state.flat_params.detach().clone()]
    for _ in range(steps):
        engine.advance(state, 1)
        rows.append(state.flat_params.detach().clone())
    return torch.stack(rows)


@pytest.fixture(scope="module")
def descent():
    path = path_of(squares, nothing, (X, Y), 150, lr=0.01, optimizer="sgd")
    return fit(squares, nothing, X, Y, steps=150, lr=0.01, optimizer="sgd", **OPTIONS), path


@pytest.fixture(scope="module")
def bayesian():
    def model(x, y=None):
        return linear_regression(x, y, noise=0.2)

    return fit(model, mean_field_normal(model), X[:, None], Y, steps=300, **OPTIONS)


def test_the_path_ends_at_the_lowest_point_of_the_grid(descent):
    posterior, path = descent
    surface = surface_of(posterior, path=path, grid=15)
    assert surface.labels == ("W", "b")
    np.testing.assert_allclose(surface.path, path.numpy(), atol=1e-12)
    assert (np.abs(surface.path[-1] - surface.minimum) <= surface.cell).all()
    early = fit(squares, nothing, X, Y, steps=5, lr=0.01, optimizer="sgd", **OPTIONS)
    surface = surface_of(early, path=path, grid=15)
    assert not (np.abs(surface.path[-1] - surface.minimum) <= surface.cell).all()


def test_the_numbers_are_those_of_the_loss(descent):
    posterior, path = descent
    surface = surface_of(posterior, path=path, grid=7)
    weight, bias = (torch.from_numpy(axis) for axis in np.meshgrid(surface.x, surface.y))
    expected = (Y - weight[..., None] * X - bias[..., None]).square().sum(-1) + 15 * np.log(np.pi)
    np.testing.assert_allclose(surface.loss, expected.numpy(), rtol=1e-12)


def test_random_numbers_are_the_same_at_every_point(bayesian):
    """−ELBO of a Normal location is a quadratic, so second differences are all the same under the same noise."""
    over = (("AutoNormal.locs.weights", 0), "AutoNormal.locs.bias")
    surface = surface_of(bayesian, over, span=0.5, grid=7, draws=3)
    for axis in (0, 1):
        second = np.diff(surface.loss, 2, axis)
        np.testing.assert_allclose(second, second.mean(), rtol=1e-8)
    other = surface_of(bayesian, over, span=0.5, grid=7, draws=3, seed=1)
    mixed = np.where(np.arange(7) % 2, surface.loss, other.loss)
    assert np.ptp(np.diff(mixed, 2, 1)) > 0.01 * abs(np.diff(surface.loss, 2, 1).mean())


def test_the_principal_plane_holds_a_path_that_lies_in_one():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 2, generator=generator, dtype=torch.float64))[0].T
    end = torch.randn(6, generator=generator, dtype=torch.float64)
    path = end + torch.tensor([[3.0, 1.0], [2.0, -1.0], [1.0, 0.5], [0.0, 0.0]], dtype=torch.float64) @ basis
    plane = principal_plane(end, path)
    places = plane.project(path)
    torch.testing.assert_close(torch.stack([plane.point(*row) for row in places]), path)
    assert (places[0] < 0).all()
    np.testing.assert_allclose(places[-1], 0, atol=1e-12)
    assert plane.labels[0] == "first principal direction of the path (87.3 %)"


def test_random_directions_are_as_long_as_the_parameters(bayesian):
    params = bayesian.bound_model.params
    flat_params = torch.cat([v.reshape(-1) for v in bayesian.unconstrained_params.values()])
    plane = random_plane(params, flat_params, 0)
    for direction in plane.directions:
        for part, own in zip(params.views(direction), params.views(flat_params), strict=True):
            torch.testing.assert_close(part.norm(), own.norm())
    assert not torch.equal(random_plane(params, flat_params, 1).directions, plane.directions)


def test_the_picture(descent, tmp_path):
    posterior, path = descent
    before, state = dict(mpl.rcParams), torch.get_rng_state()
    figure = plot_loss_contour(posterior, path=path, steps=range(151), grid=9)
    assert isinstance(figure, Figure)
    axes = figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("W", "b")
    drawn = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_allclose(drawn["step 0"][0], [-1.0, 2.5])
    np.testing.assert_allclose(drawn["fitted, step 150"][0], path[-1])
    assert len(drawn["lowest on the grid"]) == 1
    figure.savefig(tmp_path / "contour.png")
    assert dict(mpl.rcParams) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_axes_are_called(bayesian):
    over = (("AutoNormal.locs.weights", 0), "AutoNormal.scales.bias")
    surface = surface_of(bayesian, over, grid=5, draws=1)
    assert surface.labels == ("AutoNormal.locs.weights[0]", "AutoNormal.scales.bias, unconstrained")
    vectors = torch.eye(4, dtype=torch.float64)[:2]
    assert surface_of(bayesian, vectors, grid=5, draws=1).labels == ("first direction", "second direction")


def test_a_guide_that_trains_otherwise_is_left_as_it_was():
    torch.manual_seed(0)
    model = DropoutRegression(1, hidden=4)
    posterior = fit(
        model, bernoulli_dropout(model, learned=True), X[:, None].float(), Y.float(), steps=5, progress=False
    )
    posterior.sample(1)  # asked, it is in evaluation mode
    first = surface_of(posterior, grid=5, draws=2)
    assert not posterior.bound_model.guide.training
    assert np.array_equal(first.loss, surface_of(posterior, grid=5, draws=2).loss)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": ("W",)}, "over has 1 entries"),
        ({"over": ("W", "c")}, "there is no parameter 'c'"),
        ({"over": ("W", ("b", 3))}, r"b has shape \(\)"),
        ({"over": ("W", "W")}, "W and W are one direction"),
        ({"over": (torch.ones(3), torch.ones(3))}, "a direction has 3 numbers, θ has 2"),
        ({"path": torch.ones(5, 3)}, r"path has shape \(5, 3\): give θ at some steps, \(T, 2\)"),
        ({"grid": 2}, "grid is 2"),
        ({"span": -1.0}, "span is -1.0"),
    ],
)
def test_what_cannot_be_drawn_is_refused(descent, options, message):
    with pytest.raises(ValueError, match=message):
        plot_loss_contour(descent[0], **options)


def test_without_the_data_there_is_no_loss(descent, tmp_path):
    descent[0].save(tmp_path)
    with pytest.raises(ValueError, match="without its data"):
        plot_loss_contour(load(tmp_path, squares, nothing))
