"""Leave-one-out cross-validation from one fit, by importance weights that know of the approximation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from inference.diagnostics.importance_sampling import khat_threshold, smoothed_weights
from inference.utils.arviz_compat import psis

__all__ = ["LeaveOneOut", "leave_one_out"]

_NUMBERS = 2**22  # log weights that are smoothed together
_NAMED = 10  # observations that a summary names


@dataclass(frozen=True)
class LeaveOneOut:
    """How probable each observation is under the posterior of all others, in nats, and how well that is known.

    Attributes
    ----------
    elpd, se
        Σᵢ log p(yᵢ | y₋ᵢ), and its standard error over observations, √(N Var elpdᵢ); NaN where there is one.
    mcse
        The Monte-Carlo standard error of ``elpd``, of S draws that all observations share.
    p_loo
        Σᵢ log p(yᵢ | y) − elpd: how many parameters the observations pay for.
    pointwise, pareto_k
        (N, …) as the log likelihood: elpdᵢ, and the k̂ of the weights that leave i out.
    khat
        The k̂ of the weights p(x, z)/q(z) of the guide itself.
    """

    site: str
    elpd: float
    se: float
    mcse: float
    p_loo: float
    pointwise: np.ndarray
    pareto_k: np.ndarray
    khat: float
    draws: int

    @property
    def threshold(self) -> float:
        """The k̂ from which on an ``elpdᵢ`` is not to be relied upon.

        See :func:`~inference.diagnostics.importance_sampling.khat_threshold`.
        """
        return khat_threshold(self.draws)

    @property
    def doubtful(self) -> tuple[tuple[int, ...], ...]:
        """The indices of the observations whose Pareto k is at the threshold or above, the worst first."""
        k = self.pareto_k.reshape(-1)
        worst = [i for i in np.argsort(-k, kind="stable") if k[i] >= self.threshold]
        return tuple(tuple(map(int, np.unravel_index(i, self.pareto_k.shape))) for i in worst)

    def __str__(self) -> str:
        count, doubtful = self.pareto_k.size, self.doubtful
        said = (
            f"{self.site}: elpd {self.elpd:.2f} ± {self.se:.2f} nats over {count:,} observations, "
            f"of which Monte-Carlo error {self.mcse:.2f}; p_loo {self.p_loo:.2f}; k-hat of the guide {self.khat:.2f}"
        )
        if not doubtful:
            return f"{said}\nevery Pareto k is below {self.threshold:.2f}"
        named = ", ".join("[{}]".format(", ".join(map(str, index))) for index in doubtful[:_NAMED])
        more = f" and {len(doubtful) - _NAMED:,} more" if len(doubtful) > _NAMED else ""
        return (
            f"{said}\n{len(doubtful):,} of {count:,} have a Pareto k of {self.threshold:.2f} or more, "
            f"{named}{more}: their elpd is not known, take more draws or fit without them"
        )


def leave_one_out(site: str, log_weights: np.ndarray, log_likelihoods: Iterable[np.ndarray]) -> LeaveOneOut:
    """Leave-one-out by S draws zₛ of q with log weights log p(y, zₛ) − log q(zₛ), (S,) in nats.

    The draws stand for the posterior without observation i by the weights
    rᵢₛ = p(y, zₛ) / (q(zₛ) p(yᵢ | zₛ)), Pareto-smoothed and normalised to wᵢₛ:
    elpdᵢ = log Σₛ wᵢₛ p(yᵢ | zₛ). With q in place of the posterior, as if p(y, z)/q(z)
    were constant, rᵢₛ = 1/p(yᵢ | zₛ) would take q's error for the model's.

    Parameters
    ----------
    log_likelihoods
        log p(yᵢ | zₛ), (S, n, …), one batch of observations after the other, or
        (S,) of a single one.

    References
    ----------
    Magnusson, Andersen, Jonasson, Vehtari (2019), Bayesian leave-one-out cross-validation for large data.
    Vehtari, Gelman, Gabry (2017), Practical Bayesian model evaluation using leave-one-out cross-validation and WAIC.
    """
    whole = smoothed_weights(log_weights)
    found, k, gain, shapes = [], [], 0.0, []
    influence = np.zeros(len(log_weights))
    for batch in log_likelihoods:
        shapes.append(batch.shape[1:])
        for part in _parts(batch):
            elpd, khat, change = _without_each(log_weights, part)
            found.append(elpd)
            k.append(khat)
            influence += change
            gain += float(logsumexp(whole.log + part, axis=1).sum() - elpd.sum())
    shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
    pointwise = np.concatenate(found)
    return LeaveOneOut(
        site,
        float(pointwise.sum()),
        math.sqrt(len(pointwise) * pointwise.var(ddof=1)) if len(pointwise) > 1 else math.nan,
        float(np.sqrt(np.square(influence).sum())),
        gain,
        pointwise.reshape(shape),
        np.concatenate(k).reshape(shape),
        whole.khat,
        len(log_weights),
    )


def _parts(batch: np.ndarray) -> Iterator[np.ndarray]:
    """(n, S) in double precision, few enough observations at a time to be smoothed together."""
    columns = batch.reshape(len(batch), -1)
    size = max(1, _NUMBERS // len(batch))
    for begin in range(0, columns.shape[1], size):
        yield columns[:, begin : begin + size].T.astype(float)


def _without_each(log_weights: np.ndarray, log_likelihood: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Elpdᵢ and k̂ᵢ, (n,), of (n, S) log likelihoods, and what each draw adds to the error of their sum, (S,).

    By the delta method that is Σᵢ wᵢₛ (p(yᵢ | zₛ)/exp(elpdᵢ) − 1).
    """
    impossible = np.isneginf(log_likelihood)  # such a draw has no weight in log_weights, but may have one without i
    ratios = np.where(impossible, -np.inf, log_weights - np.where(impossible, 0.0, log_likelihood))
    log, khat = psis(ratios)
    terms = log + log_likelihood
    elpd = logsumexp(terms, axis=1)
    change = np.exp(terms - elpd[:, None]) - np.exp(log)
    return elpd, np.where(impossible.any(1), np.inf, khat), change.sum(0)
