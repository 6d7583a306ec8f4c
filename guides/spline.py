"""Neural spline flows, by zuko."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import zuko
from torch import Tensor

from guides.flow import FlowGuide, FlowLayers
from guides.initialization import InitLoc, count, init_loc_fn, positive

__all__ = ["SplineFlow", "SplineLayers", "spline_flow"]

_START = 0.01  # of the networks' own random start: splines that begin close to a straight line


def spline_flow(
    model: Callable[..., Any],
    layers: int = 3,
    *,
    bins: int = 8,
    hidden: Sequence[int] = (32, 32),
    init_loc: InitLoc = None,
    init_scale: float = 0.1,
) -> SplineFlow:
    """q(z): z = μ + σ ⊙ U f(ε), ε ~ N(0, I), with f an autoregressive rational-quadratic spline flow, by zuko.

    The most flexible guide here and the dearest: every layer holds a network.
    Splines act on [−5, 5] of ε and leave what lies outside as it is.

    Parameters
    ----------
    model
        Any Pyro model; its sites are found when the guide first runs.
    layers
        Autoregressive layers, the order of the latents turned round in between.
    bins
        Pieces of each spline.
    hidden
        Units of each hidden layer of the networks.
    init_loc, init_scale
        Where μ and every σ start, see :mod:`guides.initialization`.

    Raises
    ------
    ValueError
        If a number of layers, bins or units is not a whole number above 0, or
        ``init_scale`` not a number above 0.

    References
    ----------
    Durkan, Bekasov, Murray, Papamakarios (2019), Neural spline flows.
    Kingma et al. (2016), Improved variational inference with inverse autoregressive flow.

    Examples
    --------
    >>> import torch
    >>> import kiln
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 40).reshape(-1, 1)
    >>> guide = spline_flow(linear_regression)
    >>> posterior = kiln.fit(linear_regression, guide, x, 2 * x[:, 0], steps=300, progress=False)
    >>> draws = posterior.sample(100)                      # {"weights": (100, 1), "bias": (100,), "noise": (100,)}
    >>> posterior.log_prob(draws).shape
    torch.Size([100])
    """
    made = partial(
        SplineLayers,
        count=count(layers, "layers"),
        bins=count(bins, "bins"),
        hidden=[count(units, "hidden") for units in hidden],
    )
    return SplineFlow(model, made, init_loc_fn(init_loc), positive(init_scale, "init_scale"))


class SplineFlow(FlowGuide):
    """A neural spline flow."""


class SplineLayers(FlowLayers):
    """zuko's neural spline flow on D numbers as a transform of Pyro: one pass to draw, D passes to invert.

    >>> import torch
    >>> layers = SplineLayers(2, count=2, bins=8, hidden=[16])
    >>> x = torch.randn(5, 2)
    >>> y = layers(x)
    >>> torch.allclose(layers.inv(y.clone()), x, atol=1e-3), layers.log_abs_det_jacobian(x, y).shape
    (True, torch.Size([5]))
    """

    def __init__(self, size: int, count: int, bins: int, hidden: Sequence[int]) -> None:
        super().__init__()
        flow = zuko.flows.NSF(size, transforms=count, bins=bins, hidden_features=hidden)
        self.flow = flow.transform
        with torch.no_grad():
            for layer in self.flow.transforms:
                for last in layer.hyper[-1].parameters() if size > 1 else layer.phi:
                    last.mul_(_START)

    def moved(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and the sum of the splines' log slopes."""
        y, log_det = self.flow().call_and_ladj(x)
        return y, log_det

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow().inv(y)
