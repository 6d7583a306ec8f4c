"""The posterior predictive distribution at the rows of the fit and at new ones, and its log likelihood."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.arguments import row_count, shape_of
from inference.model.bound_model import named_failure
from inference.model.vectorization import affordable
from inference.predictive.approximation import Approximation
from inference.predictive.autoencoder import HeldOutRows, evaluate_rows
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.sampling import Batch, Draws, check_draws, concatenate, likelihood_of, predictive
from inference.predictive.scoring import HeldOut, class_scores, scores
from inference.utils.validation import flag, positive_integer, seed_number

__all__ = ["PredictionOptions", "evaluate", "log_likelihood", "log_likelihoods", "predict", "predict_data"]

T = TypeVar("T")
MOST_DRAWS = 1000  # of an evaluation whose number of draws is left out


@dataclass(frozen=True, kw_only=True)
class PredictionOptions:
    """Options of a prediction, checked when they are made.

    Attributes
    ----------
    draws
        The number of draws, or the draws themselves, ``{site: (S, *site shape)}``.
    seed
        Of the draws and of the noise.
    site
        The observed site to predict; None if the model has only one.
    batch_size
        The most rows to run the model on at a time; None for that of the fit.
    per_row
        Draw the latents anew for each row.
    progress
        Show a bar over the batches.

    Raises
    ------
    ValueError
        If an option has a wrong type or value, or if draws are given with ``per_row``.
    """

    draws: Draws = 1000
    seed: int = 0
    site: str | None = None
    batch_size: int | None = None
    per_row: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Check each option, and keep it as a plain Python value."""
        checked: dict[str, Any] = {
            "seed": seed_number(self.seed),
            "batch_size": None if self.batch_size is None else positive_integer(self.batch_size, "batch_size"),
            "per_row": flag(self.per_row, "per_row"),
            "progress": flag(self.progress, "progress"),
        }
        if not isinstance(self.draws, Mapping):
            checked["draws"] = positive_integer(self.draws, "draws")
        elif self.per_row:
            raise ValueError("per_row draws the latents anew for each row: give draws= as a number")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


def predict(
    approximation: Approximation, new_data: tuple[Any, ...], options: PredictionOptions
) -> Prediction | ClassPrediction:
    """Return the posterior predictive at new rows; see :meth:`inference.Posterior.predict`.

    Examples
    --------
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression as model
    >>> x = torch.linspace(-1, 1, 30).reshape(-1, 1)
    >>> posterior = kiln.fit(model, mean_field_normal(model), x, x[:, 0], steps=50, progress=False)
    >>> predict(posterior, (x[:3],), PredictionOptions(draws=20)).draws.shape
    torch.Size([20, 3])
    """
    return _predict(approximation, approximation.check_arguments(new_data), options)


def predict_data(approximation: Approximation, options: PredictionOptions) -> Prediction | ClassPrediction:
    """Return the posterior predictive at the rows of the fit."""
    return _predict(approximation, approximation.data, options)


def _predict(
    approximation: Approximation, args: tuple[Any, ...], options: PredictionOptions
) -> Prediction | ClassPrediction:
    site = approximation.resolve_site(options.site)

    def run(batch: Batch) -> Prediction | ClassPrediction:
        return predictive(batch.model, batch.latents, batch.draws, batch.args, site)

    return concatenate(list(_for_batches(approximation, run, args, options)))


def log_likelihood(
    approximation: Approximation,
    *data: Any,
    draws: Draws = 1000,
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[str, Tensor]:
    """Return the log likelihood log p(yₙ | zₛ) in nats, ``{observed site: (S, N, …)}``.

    On ``data``, given in the order of the fit, or else on the data of the
    fit; ``draws`` and ``batch_size`` as in :meth:`predict`.
    """
    args = approximation.check_arguments(data) if data else approximation.data
    sites = [site.name for site in approximation.bound_model.observed]
    options = PredictionOptions(draws=draws, seed=seed, batch_size=batch_size, progress=False)
    parts = list(log_likelihoods(approximation, sites, args, options))
    if len(parts) == 1:
        return {site: parts[0][site] for site in sites}
    return {site: torch.cat([part[site] for part in parts], 1) for site in sites}


def log_likelihoods(
    approximation: Approximation, sites: list[str], args: tuple[Any, ...], options: PredictionOptions
) -> Iterator[dict[str, Tensor]]:
    """Yield the log likelihoods at ``sites``, ``{site: (S, rows, …)}``, of one batch of rows after the other."""

    def run(batch: Batch) -> dict[str, Tensor]:
        return likelihood_of(batch.model, batch.latents, batch.draws, batch.args, sites)

    yield from _for_batches(approximation, run, args, options)


def evaluate(
    approximation: Approximation,
    *test: Any,
    draws: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> HeldOut | HeldOutRows:
    """Predict held-out rows, given in the order of the fit as ``evaluate(x_test, y_test)``, and score it.

    Of an autoencoder, ``evaluate(x_test)`` is how probable the rows are
    under the model: :class:`~inference.predictive.autoencoder.EvidenceScores`.

    Parameters
    ----------
    draws
        If left out, as many as take some ten seconds, at most 1,000 and at least 50.
    batch_size
        The most rows at a time, as in :meth:`predict`.

    Raises
    ------
    ValueError
        As :meth:`predict` does; also if a class was observed that the model does not know.
    """
    args = approximation.check_arguments(test)[: len(test)]
    if not test or shape_of(args[-1]) is None:
        given = ", ".join(approximation.argument_names)
        raise ValueError(f"evaluate takes rows that were held out, evaluate({given}), with what was observed last")
    y, inputs = args[-1].cpu(), test[:-1]
    if draws is None:
        _, draws = affordable(len(y), approximation.bound_model.params.size, MOST_DRAWS)
    options = PredictionOptions(draws=draws, seed=seed, batch_size=batch_size, progress=progress)
    if approximation.is_autoencoder:
        return evaluate_rows(approximation, args, draws, seed=seed, batch_size=batch_size, progress=progress)
    prediction = predict(approximation, inputs, options)
    if isinstance(prediction, ClassPrediction):
        return HeldOut(prediction, y, class_scores(prediction, y), inputs)
    likelihood = log_likelihood(approximation, *test, draws=draws, seed=seed, batch_size=batch_size)
    return HeldOut(prediction, y, scores(prediction, y, likelihood[approximation.observed_site]), inputs)


def _for_batches(
    approximation: Approximation, run: Callable[[Batch], T], args: tuple[Any, ...], options: PredictionOptions
) -> Iterator[T]:
    """``run`` on one batch of rows after the other; errors say whose code failed, and on which shapes."""
    size, model = approximation.resolve_batch_size(options.batch_size), approximation.bound_model.model
    draws = check_draws(options.draws, approximation.bound_model)
    # Draws that are given may come from the same seed: the noise must not repeat their random numbers.
    branch = 0 if isinstance(draws, int) else 1
    hidden = not options.progress
    with (
        approximation.running(options.seed, branch),
        tqdm(desc="predict", total=row_count(args), unit="row", delay=1, leave=False, disable=hidden) as bar,
    ):
        for batch in approximation.latent_sampler.batches(draws, args, size, options.per_row):
            yield named_failure("model", model, batch.args, partial(run, batch))
            bar.update(row_count(batch.args) or 1)
