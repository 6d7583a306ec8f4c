"""Normal guides with correlations: full rank, and low rank plus diagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal

from guides.initialization import InitLoc, count, init_loc_fn, positive

__all__ = ["full_rank_normal", "low_rank_normal"]


def full_rank_normal(
    model: Callable[..., Any], *, init_loc: InitLoc = None, init_scale: float = 0.1
) -> AutoMultivariateNormal:
    """q(z) = N(z; μ, Σ) over the unconstrained latents, Σ = LLᵀ, by Pyro's AutoMultivariateNormal.

    L has D(D+1)/2 numbers for D latents: exact where the posterior is Normal,
    costly above some thousand latents, where :func:`low_rank_normal` serves.

    Parameters
    ----------
    model
        Any Pyro model; its sites are found when the guide first runs.
    init_loc, init_scale
        Where μ and every standard deviation start, the second above 0: see :mod:`guides.initialization`.

    References
    ----------
    Kucukelbir et al. (2017), Automatic differentiation variational inference.

    Examples
    --------
    >>> import torch
    >>> import kiln
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(0, 1, 40).reshape(-1, 1)   # not centred: slope and intercept are correlated
    >>> posterior = kiln.fit(linear_regression, full_rank_normal(linear_regression), x, 2 * x[:, 0],
    ...                 steps=900, progress=False)
    >>> draws = posterior.sample(500)
    >>> bool(torch.corrcoef(torch.stack([draws["weights"][:, 0], draws["bias"]]))[0, 1] < -0.5)
    True
    """
    scale = positive(init_scale, "init_scale")
    return AutoMultivariateNormal(model, init_loc_fn=init_loc_fn(init_loc), init_scale=scale)


def low_rank_normal(
    model: Callable[..., Any], *, rank: int | None = None, init_loc: InitLoc = None, init_scale: float = 0.1
) -> AutoLowRankMultivariateNormal:
    """q(z) = N(z; μ, diag(s)(I + FFᵀ)diag(s)), F of shape (D, rank), by Pyro's AutoLowRankMultivariateNormal.

    Parameters
    ----------
    model
        Any Pyro model; its sites are found when the guide first runs.
    rank
        Columns of F; √D, rounded, if left out.
    init_loc, init_scale
        Where μ and, roughly, every standard deviation start, see :mod:`guides.initialization`.

    Raises
    ------
    ValueError
        If ``rank`` is not a whole number above 0, or ``init_scale`` not a number above 0.

    References
    ----------
    Ong, Nott, Smith (2018), Gaussian variational approximation with a factor covariance structure.

    Examples
    --------
    >>> from kiln.models import linear_regression
    >>> low_rank_normal(linear_regression, rank=2).rank
    2
    """
    return AutoLowRankMultivariateNormal(
        model,
        init_loc_fn=init_loc_fn(init_loc),
        init_scale=positive(init_scale, "init_scale"),
        rank=None if rank is None else count(rank, "rank"),
    )
