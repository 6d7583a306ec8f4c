"""Initial values of a guide: the options that its builders share.

``init_loc`` is where its location μ starts: ``{site: value}`` in the model's own space, or one of Pyro's
``init_to_*`` functions. Sites left out start at their prior's median, those of a flat prior at the middle of
their support. ``init_scale`` is where every scale σ starts, in unconstrained units; a builder raises a ValueError
if it is not a number above 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.autoguide import init_to_median
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["InitLoc", "count", "init_loc_fn", "positive"]

InitLoc = Mapping[str, Any] | Callable[..., Tensor] | None


def init_loc_fn(init_loc: InitLoc) -> Callable[..., Tensor]:
    """Pyro's per-site start for what a user passes as ``init_loc``."""
    if init_loc is not None and not isinstance(init_loc, Mapping):
        return init_loc
    given = {name: torch.as_tensor(value) for name, value in (init_loc or {}).items()}

    def start(site: dict[str, Any]) -> Tensor:
        value = given.get(site["name"])
        return _median_or_middle(site) if value is None else value.to(torch.get_default_dtype())

    return start


def positive(value: Any, name: str) -> float:
    """``value`` as a float.

    Raises
    ------
    ValueError
        If it is not a number above 0.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ValueError(f"{name} is {value!r}: pass a number above 0")
    return float(value)


def count(value: Any, name: str) -> int:
    """``value``, if it is a whole number above 0.

    Raises
    ------
    ValueError
        If it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: pass a whole number above 0")
    return value


def _median_or_middle(site: dict[str, Any]) -> Tensor:
    try:
        return init_to_median(site)
    except NotImplementedError:  # a flat prior cannot be drawn from
        fn = site["fn"]
        to_support = biject_to(fn.support)
        return to_support(torch.zeros(to_support.inverse_shape(fn.batch_shape + fn.event_shape)))
