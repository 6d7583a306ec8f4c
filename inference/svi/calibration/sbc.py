"""Simulation-based calibration: a check of inference on data that the model itself makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from inference.diagnostics.uniformity_tests import Shape, ecdf_p_value, holm, symmetry_p_value, thresholds
from inference.model.elbo import Model
from inference.reporting.figures.diagnostic_plots import rank_panels
from inference.reporting.figures.style import Figure
from inference.svi.calibration.simulation import CalibrationFolder, Outcome, Simulation, check_options
from inference.utils.processes import spread
from inference.utils.validation import positive_integer, seed_number

__all__ = ["Calibration", "calibrate"]

SHOWN = 8


@dataclass(frozen=True)
class Calibration:
    """Ranks of the truths among the draws of fits to simulated data, and tests of their uniformity.

    Attributes
    ----------
    names
        The P scalar latents, such as ``"weights[0]"``.
    ranks
        (fits, P), whole numbers from 0 to L, uniform if q is the posterior.
    draws
        L, of each fit.
    failures
        The messages of fits that ended with an error, which have no ranks.
    error_rate
        The probability that an exact inference does not pass, at most.
    uniformity
        (P,), p-values of the ranks' ECDF, see :func:`~inference.diagnostics.uniformity_tests.ecdf_p_value`.
    symmetry
        (P,), p-values of the symmetry of :attr:`p` about ½, which holds where q
        has no bias, whatever its width.
    adjusted
        (2, P): both, by Holm's correction over all 2P tests.
    """

    names: tuple[str, ...]
    ranks: np.ndarray
    draws: int
    failures: tuple[str, ...]
    error_rate: float
    uniformity: np.ndarray
    symmetry: np.ndarray
    adjusted: np.ndarray

    @classmethod
    def of(cls, simulation: Simulation, outcomes: Iterable[Outcome], error_rate: float) -> Calibration:
        """Test the ranks.

        Raises
        ------
        ValueError
            If no fit has any.
        """
        ordered = sorted(outcomes, key=lambda outcome: outcome.number)
        failures = tuple(outcome.error for outcome in ordered if outcome.error is not None)
        found = [outcome.ranks for outcome in ordered if outcome.ranks is not None]
        if not found:
            raise ValueError(f"all {len(failures)} fits failed, the first with: {failures[0]}")
        ranks, points = np.array(found), thresholds(simulation.draws)
        columns = ((ranks + 0.5) / (simulation.draws + 1)).T
        uniformity = np.array([ecdf_p_value(column, points) for column in columns])
        symmetry = np.array([symmetry_p_value(column) for column in columns])
        adjusted = holm(np.r_[uniformity, symmetry]).reshape(2, -1)
        return cls(*(simulation.names, ranks, simulation.draws, failures, error_rate, uniformity, symmetry, adjusted))

    @property
    def p(self) -> np.ndarray:
        """P_q(z < z*), (fits, P), from the draws: (rank + ½)/(L + 1)."""
        return (self.ranks + 0.5) / (self.draws + 1)

    @property
    def failed(self) -> int:
        """Number of fits that ended with an error."""
        return len(self.failures)

    @property
    def passed(self) -> bool:
        """True if no test fails at :attr:`error_rate`, and no fit failed."""
        return not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons why it did not pass, one line a parameter, the clearest first."""
        least = self.adjusted.min(0)
        wrong = [i for i in np.argsort(least, kind="stable") if least[i] <= self.error_rate]
        found = []
        for i in wrong:
            words = Shape.of(self.p[:, i]).words
            shape = f"posterior {' and '.join(words)}" if words else "ranks are uneven, with no simple shape"
            found.append(f"{self.names[i]}: {shape} (p = {least[i]:.1g})")
        if self.failed:
            fits = self.failed + len(self.ranks)
            found.append(f"{self.failed} of {fits} fits failed, the first with: {self.failures[0]}")
        return tuple(found)

    def __str__(self) -> str:
        tests = f"{self.adjusted.size} tests by Holm's correction"
        verdict = "nothing found against it" if self.passed else "not calibrated"
        head = f"{len(self.ranks)} fits, {self.draws} draws each: {verdict} at an error rate of {self.error_rate:.2g}"
        return "\n  ".join([f"{head} ({tests}, least p = {self.adjusted.min():.2g})", *self.reasons])

    def plot(self, most: int = SHOWN) -> Figure:
        """Rank histograms and ECDFs with their simultaneous bands, of the ``most`` doubtful parameters.

        An ECDF that leaves its band anywhere is a test that fails: bands are at
        Bonferroni's share of the error rate, which is the strictest of Holm's.
        """
        chosen = np.argsort(self.adjusted.min(0), kind="stable")[: positive_integer(most, "most")]
        titles = [f"{self.names[i]} (p = {self.adjusted[:, i].min():.2g})" for i in chosen]
        return rank_panels(self.p[:, chosen], self.draws, titles, self.error_rate / self.adjusted.size)


def calibrate(  # noqa: PLR0913 - public: every option by its name
    model: Model,
    guide_builder: Callable[[Model], Model],
    *data: Any,
    fits: int = 200,
    draws: int = 999,
    seed: int = 0,
    error_rate: float = 0.01,
    n_jobs: int | None = None,
    path: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Calibration:
    """Fit many data sets simulated from the model, and test the ranks of the truths among the draws.

    z* ~ p(z), y* ~ p(y | z*), q fitted to y*, z₁ … z_L ~ q. If q is the
    posterior, the rank of each scalar of z* among its L draws is uniform on
    0 … L; if q is too narrow, truths fall at both ends, if too wide in the
    middle, and if it is shifted, on one side. A q with the right mean and the
    wrong width has P_q(z < z*) symmetric about ½.

    Parameters
    ----------
    model
        As for :func:`fit`, with proper priors; it must run without its observations.
    guide_builder
        Called as ``guide_builder(model)`` for each fit: one of ``guides``, or yours.
    data
        As for :func:`fit`. Of what the model observes only place and shape are
        used; the rest is where data is simulated.
    fits, draws
        How many fits, and L.
    seed
        Each fit's numbers depend on the seed and the fit's number alone.
    error_rate
        The probability that an exact inference does not pass, at most, over all
        parameters and both tests.
    n_jobs
        Processes, by joblib; -1 is one a core. If left out, those of
        ``joblib.parallel_config``, whose backend is used in either case, or one.
    path
        A folder that keeps each fit's ranks: called again, it goes on there.
    progress
        Show a bar over the fits.
    options
        Those of :func:`fit`, such as ``steps``, ``lr``, ``engine``. A compiled
        step is kept for all fits, so ``engine="compiled"`` is soon worth it.

    Raises
    ------
    ValueError
        If a prior is flat, an option unknown, ``path`` holds another
        calibration, every fit failed, or joblib is set to run threads, which
        would share torch's random numbers.

    References
    ----------
    Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with
    simulation-based calibration.
    Säilynoja, Bürkner, Vehtari (2022), Graphical test for discrete uniformity and its applications in
    goodness-of-fit evaluation and multiple sample comparison.
    Yao, Vehtari, Simpson, Gelman (2018), Yes, but did it work? Evaluating variational inference.

    Examples
    --------
    >>> import torch
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x, y = torch.linspace(-1, 1, 10).reshape(-1, 1), torch.zeros(10)
    >>> found = calibrate(linear_regression, mean_field_normal, x, y, fits=4, draws=19, steps=20, progress=False)
    >>> found.names, found.ranks.shape, found.failed
    (('bias', 'noise', 'weights[0]'), (4, 3), 0)
    """
    check_options(options)
    if not 0 < error_rate < 1:
        raise ValueError(f"error_rate is {error_rate!r}: pass a share between 0 and 1, such as 0.01")
    count = positive_integer(fits, "fits")
    simulation = Simulation.of(model, guide_builder, data, positive_integer(draws, "draws"), seed_number(seed), options)
    folder = None if path is None else CalibrationFolder(Path(path), simulation)
    outcomes = [] if folder is None else folder.read(count)
    missing = sorted(set(range(count)) - {outcome.number for outcome in outcomes})
    with tqdm(total=count, initial=len(outcomes), desc="calibrate", unit="fit", disable=not progress) as bar:
        for outcome in spread(simulation.run, missing, n_jobs):
            if folder is not None:
                folder.keep(outcome)
            outcomes.append(outcome)
            bar.update()
    return Calibration.of(simulation, outcomes, error_rate)
