"""The mean-field Normal guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import AutoNormal, init_to_median, init_to_value
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["mean_field_normal"]


def mean_field_normal(
    model: Callable[..., Any],
    *,
    init_loc: Mapping[str, Any] | Callable[..., Tensor] | None = None,
    init_scale: float = 0.1,
) -> AutoNormal:
    """q(z) = Πᵢ N(zᵢ; μᵢ, σᵢ²) over the unconstrained latents, by Pyro's AutoNormal.

    Parameters
    ----------
    model
        Any Pyro model; its sites are found when the guide first runs.
    init_loc
        Where μ starts: ``{site: value}`` in the model's own space, or one of
        Pyro's ``init_to_*`` functions. Sites left out start at their prior's
        median, those of a flat prior at the middle of their support.
    init_scale
        Where every σ starts, in unconstrained units.

    Raises
    ------
    ValueError
        If ``init_scale`` is not a number above 0.

    References
    ----------
    Kucukelbir et al. (2017), Automatic differentiation variational inference.

    Examples
    --------
    >>> from ppl_models import linear_regression
    >>> guide = mean_field_normal(linear_regression, init_loc={"bias": 2.0}, init_scale=0.05)
    >>> type(guide).__name__
    'AutoNormal'
    """
    if isinstance(init_scale, bool) or not isinstance(init_scale, int | float) or not init_scale > 0:
        raise ValueError(f"init_scale is {init_scale!r}: pass a number above 0")
    start = _start_at(init_loc or {}) if init_loc is None or isinstance(init_loc, Mapping) else init_loc
    return AutoNormal(model, init_loc_fn=start, init_scale=float(init_scale))


def _start_at(values: Mapping[str, Any]) -> Callable[..., Tensor]:
    given = {name: torch.as_tensor(value, dtype=torch.get_default_dtype()) for name, value in values.items()}
    return init_to_value(values=given, fallback=_median_or_middle)


def _median_or_middle(site: dict[str, Any]) -> Tensor:
    try:
        return init_to_median(site)
    except NotImplementedError:  # a flat prior cannot be drawn from
        fn = site["fn"]
        to_support = biject_to(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.batch_shape + fn.event_shape)))
