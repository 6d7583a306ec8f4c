"""Eight posteriors of posteriordb: their models in Pyro, on raw data, and the reference draws.

Magnusson et al. (2024), posteriordb: a database of Bayesian posterior inference. Flat priors are written as such.
The files come from the folder named by KILN_DATA.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppl_models.data.download import data_folder

__all__ = ["NAMES", "Errors", "Posterior", "read"]


@dataclass(frozen=True)
class Errors:
    """The largest error of a mean, in reference sds, and the smallest and largest ratio of sds to the reference's."""

    mean: float
    least: float
    most: float

    @property
    def landed(self) -> bool:
        """True if every mean is within 0.1 sd and every sd within a tenth."""
        return self.mean <= 0.1 and self.least >= 0.9 and self.most <= 1.1


@dataclass(frozen=True)
class Posterior:
    """A model with its data, and the reference's draws of its natural parameters, ``{name: (10,000, …)}``."""

    name: str
    model: Callable[..., Any]
    data: tuple[Tensor, ...]
    reference: dict[str, np.ndarray]

    def natural(self, draws: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        """The reference's parameters from draws of the model's sites, ``{name: (S, …)}``."""
        found = {name: value.double() for name, value in draws.items()}
        if "theta_trans" in found:
            found["theta"] = found["mu"][:, None] + found["tau"][:, None] * found["theta_trans"]
        return {name: found[name].numpy() for name in self.reference}

    def errors(self, draws: Mapping[str, Tensor]) -> Errors:
        """Compare ``draws`` of the model's sites, ``{site: (S, …)}``, with the reference."""
        shifts, ratios = [], []
        for name, found in self.natural(draws).items():
            wanted = self.reference[name]
            sd = wanted.std(0)
            shifts.append(np.ravel(np.abs(found.mean(0) - wanted.mean(0)) / sd))
            ratios.append(np.ravel(found.std(0) / sd))
        every = np.concatenate(ratios)
        return Errors(float(np.concatenate(shifts).max()), float(every.min()), float(every.max()))


def read(name: str) -> Posterior:
    """One of :data:`NAMES` with its data, in double precision, and its reference draws.

    Raises
    ------
    KeyError
        If there is none of that name.
    FileNotFoundError
        If its files are not there, saying where to put them.
    """
    model, columns = _POSTERIORS[name]
    folder = data_folder("posteriordb", f"{name}/data.json") / name
    raw = json.loads((folder / "data.json").read_text())
    values = {key: torch.as_tensor(np.asarray(value, dtype=float)) for key, value in raw.items()}
    with np.load(folder / "reference_draws.npz") as saved:
        reference = {key: saved[key] for key in saved.files}
    return Posterior(name, model, columns(values), reference)


def flat_params(*shape: int) -> dist.ImproperUniform:
    """Density 1 everywhere."""
    return dist.ImproperUniform(constraints.real, (), shape)


def flat_positive() -> dist.ImproperUniform:
    """Density 1 above 0."""
    return dist.ImproperUniform(constraints.positive, (), ())


def eight_schools_centered(sigma: Tensor, y: Tensor | None = None) -> None:
    """Rubin (1981)."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(sigma)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(sigma: Tensor, y: Tensor | None = None) -> None:
    """Eight schools with θ = μ + τ·θ′."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("data", len(sigma)):
        theta = mu + tau * pyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def kidscore_momiq(mom_iq: Tensor, kid_score: Tensor | None = None) -> None:
    """A line with a flat prior."""
    beta = pyro.sample("beta", flat_params(2))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(mom_iq)):
        pyro.sample("kid_score", dist.Normal(beta[0] + beta[1] * mom_iq, sigma), obs=kid_score)


def logearn_height(height: Tensor, log_earn: Tensor | None = None) -> None:
    """A line, all flat."""
    beta = pyro.sample("beta", flat_params(2))
    sigma = pyro.sample("sigma", flat_positive())
    with pyro.plate("data", len(height)):
        pyro.sample("log_earn", dist.Normal(beta[0] + beta[1] * height, sigma), obs=log_earn)


def nes(x: Tensor, partyid7: Tensor | None = None) -> None:
    """Nine coefficients, all flat."""
    beta = pyro.sample("beta", flat_params(9))
    sigma = pyro.sample("sigma", flat_positive())
    with pyro.plate("data", len(x)):
        pyro.sample("partyid7", dist.Normal(x @ beta, sigma), obs=partyid7)


def blr(x: Tensor, y: Tensor | None = None) -> None:
    """Five coefficients with wide priors."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def gauss_mix(y: Tensor) -> None:
    """Two components, ordered by their means; log p(mu) lacks log 2, the ordering's constant, as in the reference."""
    normal = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    pyro.factor("mu_prior", normal.log_prob(mu))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0 * torch.ones(2)).to_event(1))
    theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
    with pyro.plate("data", len(y)):
        weights = torch.stack([theta, 1 - theta], -1)
        pyro.sample("y", dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(mu, sigma)), obs=y)


def ar(past: Tensor, y: Tensor | None = None) -> None:
    """Autoregression on the five last values."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(past.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("data", len(past)):
        pyro.sample("y", dist.Normal(alpha + past @ beta, sigma), obs=y)


def _nes_columns(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    age = values["age_discrete"]
    ages = [(age == group).double() for group in (2, 3, 4)]
    rest = [values[key] for key in ("educ1", "gender", "income")]
    columns = [torch.ones_like(age), values["real_ideo"], values["race_adj"], *ages, *rest]
    return torch.stack(columns, -1), values["partyid7"]


def _lags(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
    y, order = values["y"], int(values["K"])
    return torch.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1), y[order:]


_POSTERIORS: dict[str, tuple[Callable[..., Any], Callable[[dict[str, Tensor]], tuple[Tensor, ...]]]] = {
    "eight_schools-eight_schools_centered": (eight_schools_centered, lambda d: (d["sigma"], d["y"])),
    "eight_schools-eight_schools_noncentered": (eight_schools_noncentered, lambda d: (d["sigma"], d["y"])),
    "kidiq-kidscore_momiq": (kidscore_momiq, lambda d: (d["mom_iq"], d["kid_score"])),
    "earnings-logearn_height": (logearn_height, lambda d: (d["height"], d["earn"].log())),
    "nes1980-nes": (nes, _nes_columns),
    "sblri-blr": (blr, lambda d: (d["X"], d["y"])),
    "low_dim_gauss_mix-low_dim_gauss_mix": (gauss_mix, lambda d: (d["y"],)),
    "arK-arK": (ar, _lags),
}
NAMES = tuple(_POSTERIORS)
