"""The mean-field Normal guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoNormal

from guides.initialization import InitLoc, init_loc_fn, positive

__all__ = ["mean_field_normal"]


def mean_field_normal(model: Callable[..., Any], *, init_loc: InitLoc = None, init_scale: float = 0.1) -> AutoNormal:
    """q(z) = Πᵢ N(zᵢ; μᵢ, σᵢ²) over the unconstrained latents, by Pyro's AutoNormal.

    Parameters
    ----------
    model
        Any Pyro model; its sites are found when the guide first runs.
    init_loc, init_scale
        Where μ and every σ start, the second above 0: see :mod:`guides.initialization`.

    References
    ----------
    Kucukelbir et al. (2017), Automatic differentiation variational inference.

    Examples
    --------
    >>> from kiln.models import linear_regression
    >>> guide = mean_field_normal(linear_regression, init_loc={"bias": 2.0}, init_scale=0.05)
    >>> type(guide).__name__
    'AutoNormal'
    """
    return AutoNormal(model, init_loc_fn=init_loc_fn(init_loc), init_scale=positive(init_scale, "init_scale"))
