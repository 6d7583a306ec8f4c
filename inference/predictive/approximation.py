"""q(z), fitted, and every question about it that can be answered by running it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from inference.diagnostics.checks import Diagnosis, NoWeights, diagnose, weight_checks
from inference.diagnostics.importance_sampling import khat_threshold, smoothed_weights
from inference.diagnostics.loo import LeaveOneOut, leave_one_out
from inference.model.elbo import log_weight, traces
from inference.model.guide_density import as_points, log_density
from inference.model.row_scaling import row_scale
from inference.model.sites import latent_values, observed_nodes, refuse_weighted_rows, scalars
from inference.model.vectorization import affordable, draws_together, map_over_draws
from inference.predictive.batched_log_weights import weighted_by_batches
from inference.predictive.latent_sampler import LatentSampler
from inference.predictive.posterior_predictive import Predicting
from inference.utils.validation import flag, positive_integer

__all__ = ["Approximation"]

PROPOSED = 10_000  # draws from which corrected ones are picked, at least
USUAL_DRAWS, LEAST_DRAWS = 1000, 100  # of one repeat of a diagnosis
MOST_NUMBERS = 2 * 10**7  # latents times draws that are kept to compare moments
MOST_LATENTS = 10_000  # of all rows together, beyond which one row's misfit drowns in the others' noise


class Approximation(Predicting):
    """q(z), fitted: sample it, predict with it, check it."""

    def sample(self, draws: int = 1000, *, seed: int = 0, corrected: bool = False) -> dict[str, Tensor]:
        """Draw from q(z): ``{site: tensor of shape (S, *site shape)}``, in the model's own space.

        With ``corrected`` the draws are those of at least 10,000 that
        Pareto-smoothed importance weights p(x, z)/q(z) pick, so nearer to the
        posterior where q covers it; some of them come several times.

        Raises
        ------
        ValueError
            If corrected draws are asked for and the guide has no weights, or its
            Pareto k-hat is above :func:`~inference.diagnostics.importance_sampling.khat_threshold`,
            where weights correct nothing.
        """
        if flag(corrected, "corrected"):
            return self._corrected(_count(draws), seed)
        with self._running(seed):
            drawn = LatentSampler(self._bound_model, self._args).draw(_count(draws), self._args)
        return {name: value.cpu() for name, value in drawn.items()}

    def _corrected(self, draws: int, seed: int) -> dict[str, Tensor]:
        drawn, log_weights = self._reliable("there are no corrected draws", max(draws, PROPOSED), seed)
        kept = torch.from_numpy(smoothed_weights(log_weights).resampled(draws, np.random.default_rng(seed)))
        return {name: value[kept] for name, value in drawn.items()}

    def _reliable(self, refusal: str, draws: int, seed: int) -> tuple[dict[str, Tensor], np.ndarray]:
        """Draws of q with their log weights, (S,), or a ValueError where those correct nothing."""
        refused, limit = self._no_weights(), khat_threshold(draws)
        if refused is not None:
            raise ValueError(f"{refusal}, as {refused.reason}: {refused.advice}")
        drawn, found = self._weighted(draws, seed)
        log_weights = found.double().numpy()
        khat = smoothed_weights(log_weights).khat
        if not khat < limit:
            raise ValueError(
                f"{refusal}, as Pareto k-hat of {draws:,} draws is {khat:.2f}, and weights correct nothing from "
                f"{limit:.2f} on: try a guide with more shape, or re-parameterise the model"
            )
        return drawn, log_weights

    def _weighted(self, draws: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of q, ``{site: (S, *site shape)}``, and log p(x, z) − log q(z) of each in nats, (S,)."""
        if self._batches is not None:
            scale = row_scale(self._bound_model, self._batches.first, self._batches.num_data)
            with self._running(seed):
                return weighted_by_batches(self._bound_model, self._batches, scale, draws)

        def run(_: object) -> tuple[dict[str, Tensor], Tensor]:
            model_trace, guide_trace = traces(self._bound_model.model, self._bound_model.guide, self.data)
            return latent_values(guide_trace), log_weight(model_trace, guide_trace)

        with self._running(seed):
            found: tuple[dict[str, Tensor], Tensor] = map_over_draws(run, {}, draws, draws_together(self.data))
        return found

    def log_prob(self, values: Mapping[str, Any]) -> Tensor:
        """log q(z) in nats at any values of the latents, ``{site: (..., *site shape)}`` in the model's own space.

        The shape is that of the leading dimensions, which all sites share: a
        single point gives a scalar, the draws of :meth:`sample` (S,).

        Raises
        ------
        ValueError
            If a site is missing or unknown or has another shape, or if q has no
            density: a point guide, or one that draws more than the latents.
        """
        if self._bound_model.is_delta:
            raise ValueError(f"the guide {self.guide_name!r} puts all its mass on one point, it has no density")
        points, leading = as_points(values, self._bound_model)
        with self._running(0):
            found = log_density(self._bound_model.guide, self._args, points)
        return found.reshape(leading).cpu()

    def prior(self, draws: int = 1000, *, seed: int = 0, rows: int | None = None) -> dict[str, Tensor]:
        """Draw latents and observations from the model before the data, ``{site: (S, *site shape)}``.

        At all rows of the fit, or the first ``rows``. Empty where a prior is
        flat, which nothing can be drawn from.
        """
        rows = None if rows is None else positive_integer(rows, "rows")
        data = tuple(value[:rows] if isinstance(value, Tensor) and value.dim() else value for value in self.data)
        names = {site.name for site in (*self._bound_model.latents, *self._bound_model.observed)}
        model = poutine.uncondition(self._bound_model.model)

        def run(_: object) -> dict[str, Tensor]:
            nodes = poutine.trace(model).get_trace(*data).nodes
            return {name: node["value"] for name, node in nodes.items() if name in names}

        with self._running(seed):
            try:
                found: dict[str, Tensor] = map_over_draws(run, {}, _count(draws), draws_together(data))
                return found
            except NotImplementedError:
                return {}

    def observed_values(self) -> dict[str, Tensor]:
        """What the model observed in the fit, ``{site: tensor}``."""
        sites = self._bound_model.observed
        if all(site.argument is not None for site in sites):
            return {site.name: self.data[site.argument or 0] for site in sites}
        with self._running(0):
            model_trace, _ = traces(self._bound_model.model, self._bound_model.guide, self.data)
        return {name: site["value"] for name, site in observed_nodes(model_trace).items()}

    def inputs(self) -> dict[str, Tensor]:
        """The tensors among the arguments of the fit that the model does not observe, by argument name."""
        observed = {site.argument for site in self._bound_model.observed}
        pairs = enumerate(zip(self.argument_names, self.data, strict=True))
        return {name: value for i, (name, value) in pairs if isinstance(value, Tensor) and i not in observed}

    def log_weights(self, draws: int = 1000, *, seed: int = 0) -> Tensor:
        """The log weight log p(x, zₛ) − log q(zₛ) in nats on the full data, shape (S,)."""
        if self._batches is not None:
            return self._weighted(_count(draws), seed)[1]

        def run(_: object) -> Tensor:
            return log_weight(*traces(self._bound_model.model, self._bound_model.guide, self.data))

        with self._running(seed):
            found: Tensor = map_over_draws(run, {}, _count(draws), draws_together(self.data))
        return found

    def diagnose(self, *, draws: int | None = None, repeats: int = 5, seed: int = 0) -> Diagnosis:
        """Whether the fit can be trusted: a verdict with its numbers, limits and reasons.

        From R repeats of S draws and their importance weights p(x, z)/q(z):
        Pareto k-hat, and how far the guide's moments are from those that the
        weights correct; from the losses and the end of the fit whether it had settled.
        S is 1,000 if left out; where rows are read in batches, as many as take about
        a minute, at least 100.
        """
        stop, refused = self.record.stop, self._no_weights()
        if refused is not None:
            return diagnose(refused, self.losses, stop=stop)
        count = _count(repeats, "repeats")
        size = self._usual_draws(count) if draws is None else _count(draws)
        log_weights, values = self._weights_and_values(size * count, seed)
        return diagnose(log_weights.reshape(count, size), self.losses, values, stop)

    def _usual_draws(self, repeats: int) -> int:
        if self._batches is None:
            return USUAL_DRAWS
        _, all_draws = affordable(self._batches.num_data, self._bound_model.params.size, USUAL_DRAWS * repeats)
        return max(LEAST_DRAWS, all_draws // repeats)

    def doubts(self, *, draws: int = 1000, repeats: int = 3, seed: int = 0) -> tuple[str, ...]:
        """What R repeats of S draws and their importance weights say against the guide; nothing where it has none.

        Nor where rows are read in batches, which all would have to be once more.
        """
        if self._no_weights() is not None or self._batches is not None:
            return ()
        size, count = _count(draws), _count(repeats, "repeats")
        log_weights, values = self._weights_and_values(size * count, seed)
        checks = weight_checks(log_weights.reshape(count, size), values)
        return tuple(check.found for check in checks if not check.passed)

    def _weights_and_values(self, draws: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray] | None]:
        """(S,) log weights, and each latent number by name, (S,), where they are few enough to keep."""
        if draws * sum(math.prod(site.shape) for site in self._bound_model.latents) > MOST_NUMBERS:
            return self.log_weights(draws, seed=seed).double().numpy(), None
        drawn, log_weights = self._weighted(draws, seed)
        return log_weights.double().numpy(), scalars({name: value.numpy() for name, value in drawn.items()})

    def _no_weights(self) -> NoWeights | None:
        """Why q has no importance weights, where it has none."""
        if self._bound_model.is_delta:
            return NoWeights(
                "the guide is a point estimate: it has a best value but no uncertainty", "fit a guide with a spread"
            )
        if self.is_autoencoder and sum(math.prod(site.shape) for site in self._bound_model.latents) > MOST_LATENTS:
            return NoWeights(
                f"{len(self.data[0]):,} rows have latents of their own, too many for weights of all together",
                "compare the ELBO of held-out rows with log_evidence: posterior.evaluate(x_test)",
            )
        if self._batches is not None and LatentSampler(self._bound_model, self._args).row_sites():
            return NoWeights(
                f"each of {self._batches.num_data:,} rows that are read in batches has latents of its own",
                "judge it by rows that were held out: posterior.evaluate(x, y)",
            )
        reason = getattr(self._bound_model.guide, "no_common_density", None)
        return NoWeights(reason, "judge it by rows that were held out: posterior.evaluate(x, y)") if reason else None

    def loo(
        self, *, draws: int = 4000, seed: int = 0, site: str | None = None, batch_size: int | None = None
    ) -> LeaveOneOut:
        """Leave-one-out cross-validation of the model without fitting again: Σᵢ log p(yᵢ | y₋ᵢ) in nats.

        From S draws of q, whose weights p(y, z)/(q(z) p(yᵢ | z)) make them the
        posterior's without observation i; see :func:`~inference.diagnostics.loo.leave_one_out`.
        An observation is each number of the log likelihood, (N, …).

        Parameters
        ----------
        site
            The observed site, where the model has more than one.
        batch_size
            The most rows to run the model on at a time, as in :meth:`predict`.

        Raises
        ------
        ValueError
            If the guide has no weights, or its Pareto k-hat is above
            :func:`~inference.diagnostics.importance_sampling.khat_threshold`, where no weights make up for the
            approximation; if the site is scaled or masked, so that what an
            observation weighs is not its likelihood.

        Examples
        --------
        >>> from functools import partial
        >>> from guides import full_rank_normal
        >>> from inference import fit
        >>> from ppl_models import linear_regression
        >>> x = torch.linspace(-1, 1, 30).reshape(-1, 1)
        >>> y = 2 * x[:, 0] + torch.linspace(-3, 3, 30).sin()
        >>> line = partial(linear_regression, noise=0.5)
        >>> loo = fit(line, full_rank_normal(line), x, y, steps=1000, progress=False).loo(draws=1000)
        >>> loo.pointwise.shape, loo.pareto_k.shape, loo.doubtful
        ((30,), (30,), ())
        """
        wanted, count = self._site(site), _count(draws)
        if self._batches is not None:
            raise ValueError(
                f"leave-one-out needs all {self._batches.num_data:,} rows in memory: score held-out rows instead, "
                "posterior.evaluate(x_test, y_test)"
            )
        with self._running(seed):
            refuse_weighted_rows(traces(self._bound_model.model, self._bound_model.guide, self.data)[0], wanted)
        drawn, log_weights = self._reliable("leave-one-out would be of the guide, not of the model", count, seed)
        parts = self._likelihoods([wanted], self.data, drawn, seed, batch_size)
        return leave_one_out(wanted, log_weights, (part[wanted].double().numpy() for part in parts))


def _count(draws: int, name: str = "draws") -> int:
    return positive_integer(draws, name)
