"""Many fits at once: ``fit_many``."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from inference.engine.batched.grouping import FitBatch, PreparedRestart, bar_over, grouped
from inference.engine.compiled import NotCompilable, Untraceable
from inference.model.bound_model import from_sendable, to_sendable
from inference.posterior import Posterior
from inference.svi.attempt import Restart
from inference.svi.fitting import fit
from inference.svi.options import checked
from inference.utils.parallel import jobs_at_once, spread
from inference.utils.warnings import warn

__all__ = ["FitsFailed", "fit_many"]

_OWN = ("progress", "callbacks", "checkpoint", "resume")  # of the options of ``fit``, those that many fits do not take


class FitsFailed(ValueError):
    """Some of many fits failed, the others are kept.

    Attributes
    ----------
    posteriors
        Those of the fits that ended well, None in the place of each that failed.
    errors
        Why each of the others failed, by its number from 0.
    """

    def __init__(self, posteriors: list[Posterior | None], errors: dict[int, ValueError]) -> None:
        number, error = next(iter(errors.items()))
        super().__init__(
            f"{len(errors)} of {len(posteriors)} fits failed, the first, number {number}, with: {error}; "
            "this error's posteriors are those of the others"
        )
        self.posteriors = posteriors
        self.errors = errors


def fit_many(
    fits: Iterable[partial[Posterior]], *, n_jobs: int | None = None, progress: bool = True, **options: Any
) -> list[Posterior]:
    """The posteriors of many calls of :func:`fit`, made at once.

    ``fit_many(fits)`` is ``[call() for call in fits]`` with ``engine="compiled"``:
    the same starts, the same random numbers, the same results but for rounding. Fits whose
    steps are the same operators on the same shapes run as one program: those of
    other seeds, other data of the same shape, other numbers in model or guide,
    other step sizes. Each looks at its own losses, and ends at its own time.

    Parameters
    ----------
    fits
        Calls of ``fit`` that are still to be made: ``partial(fit, model, guide, x, y, seed=1)``.
        Fits of the same model and guide objects are recorded once, so make
        these outside of the loop over data or seeds.
    n_jobs
        Processes, by joblib, for fits that are of several forms: each form is a
        job. If left out, those of ``joblib.parallel_config``, or one.
    progress
        Show one bar over all steps of all fits.
    options
        Those of ``fit``, for all calls that do not say otherwise; callbacks and
        checkpoints are for single fits.

    Raises
    ------
    FitsFailed
        Once all others have ended, if a fit failed: with their posteriors, and each error.
    ValueError
        If an argument, a column of the data or a site is unfit; the message
        names the fit by its number.

    Examples
    --------
    >>> from functools import partial
    >>> import torch
    >>> from guides import mean_field_normal
    >>> from inference import fit, fit_many
    >>> from ppl_models import linear_regression
    >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
    >>> models = [partial(linear_regression, noise=noise) for noise in (0.1, 1.0)]
    >>> fits = [partial(fit, m, mean_field_normal(m), x, 2 * x[:, 0], seed=s) for m in models for s in range(3)]
    >>> posteriors = fit_many(fits, steps=20, engine="eager", progress=False)
    >>> [posterior.losses.shape for posterior in posteriors[:2]]
    [(20,), (20,)]
    """
    asked = [_ScheduledFit(number, _bound(call, number, options)) for number, call in enumerate(fits)]
    if not asked:
        raise ValueError("fits is empty: give partial(fit, model, guide, x, y), one for each fit")
    seen: set[Hashable] = set()
    for one in tqdm(asked, desc="start", unit="fit", disable=not progress, leave=False):
        mark = (one.fitting.kin, *map(id, one.given["data"]))
        one.fitting.known = mark in seen
        seen.add(mark)
        one.start()
    _run(asked, n_jobs, progress)
    for one in asked:
        one.finish()
    errors = {one.number: one.error for one in asked if one.error is not None}
    if errors:
        raise FitsFailed([one.posterior for one in asked], errors)
    return [one.posterior for one in asked if one.posterior is not None]


class _ScheduledFit:
    """One call of ``fit`` on its way to its posterior, or to an error."""

    def __init__(self, number: int, given: dict[str, Any]) -> None:
        self.number = number
        self.given = given
        try:
            self.fitting = checked(**given)
        except (TypeError, ValueError) as error:
            raise type(error)(f"fit number {number}: {error}") from error
        self.starts: list[PreparedRestart | ValueError] = []
        self.best: tuple[Restart, tuple[float, ...]] | None = None
        self.posterior: Posterior | None = None
        self.error: ValueError | None = None

    def start(self) -> None:
        """Find the way of each start, where they can run with others."""
        if self.fitting.joins:
            self._try(lambda: self.starts.extend(self.fitting.ready()))

    def finish(self) -> None:
        """Take the steps that were not taken with others, and ask for the posterior."""
        if self.error is None:
            self._try(self._finish)

    def _finish(self) -> None:
        if self.best is None:
            self.best = self.fitting.best(self.starts)
        best, losses = self.best
        self.posterior = best.posterior(best.flat_params, best.curves, self.fitting.seconds, losses)

    def _try(self, run: Callable[[], object]) -> None:
        try:
            run()
        except ValueError as error:
            self.error = error


def _bound(call: Any, number: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of one call."""
    if not isinstance(call, partial) or call.func is not fit:
        raise TypeError(f"fit number {number} is {call!r}: give partial(fit, model, guide, x, y)")
    found = inspect.signature(fit).bind(*call.args, **{**options, **call.keywords, "progress": False})
    for name in _OWN[1:]:
        if name in found.arguments:
            raise ValueError(f"fit number {number} has {name}=, which is for single fits: leave it out")
    found.apply_defaults()
    return {name: value for name, value in found.arguments.items() if name != "resume"}


def _run(asked: Sequence[_ScheduledFit], n_jobs: int | None, progress: bool) -> None:
    """Run what is of one form together; several forms in several processes, if there are to be any."""
    whose = {id(start): one for one in asked for start in one.starts if isinstance(start, PreparedRestart)}
    groups, reasons = grouped(
        [start for one in asked for start in one.starts if isinstance(start, PreparedRestart)], progress
    )
    if len(groups) > 1 or reasons:
        warn(_apart(groups, reasons))
    jobs = _jobs(asked, [[whose[id(ready)] for ready in group.ready] for group in groups])
    if len(jobs) > 1 and jobs_at_once(n_jobs) > 1:
        _send(jobs, n_jobs, progress)
        return
    chosen = [group for group in groups if len(group.lanes) > 1 and group.worth(_engine(whose, group))]
    with bar_over(chosen, progress) as bar:
        for group in chosen:
            try:
                group.run(bar)
            except (Untraceable, NotCompilable) as error:
                warn(f"{len(group.lanes)} fits run one by one: {error}")


def _engine(whose: Mapping[int, _ScheduledFit], group: FitBatch) -> str:
    return whose[id(group.ready[0])].fitting.engine


def _jobs(asked: Sequence[_ScheduledFit], groups: Sequence[Sequence[_ScheduledFit]]) -> list[list[_ScheduledFit]]:
    """The fits that are sent to one process: those of one form, and each that has none."""
    seen: set[int] = set()
    jobs = []
    for group in [*groups, *([one] for one in asked if one.error is None)]:
        jobs.append([one for one in dict.fromkeys(group) if one.number not in seen])
        seen |= {one.number for one in group}
    return [job for job in jobs if job]


def _send(jobs: Sequence[Sequence[_ScheduledFit]], n_jobs: int | None, progress: bool) -> None:
    """Run each job in a process of joblib's; what fails there is left to be done, and fail, here."""
    parcels = [[(one.number, _packed(one.given)) for one in job] for job in jobs]
    known = {one.number: one for job in jobs for one in job}
    with tqdm(total=len(known), desc=f"{len(known)} fits", unit="fit", disable=not progress) as bar:
        for found in spread(_elsewhere, parcels, n_jobs):
            for number, best in found:
                if best is not None:
                    one, (saved, losses) = known[number], best
                    one.best = one.fitting.again(saved), losses
            bar.update(len(found))


def _elsewhere(calls: Sequence[tuple[int, dict[str, Any]]]) -> list[tuple[int, Any]]:
    """The best start of each fit as numbers and tensors, with the loss of each; None for a fit that fails."""
    asked = [_ScheduledFit(number, {**given, "guide": from_sendable(*given["guide"])}) for number, given in calls]
    for one in asked:
        one.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again where the fits were asked for
        _run(asked, 1, False)
        for one in asked:
            one.finish()
    return [(one.number, None if one.best is None else (one.best[0].saved(), one.best[1])) for one in asked]


def _packed(given: dict[str, Any]) -> dict[str, Any]:
    return {**given, "guide": to_sendable(given["guide"])}


def _apart(groups: Sequence[FitBatch], reasons: Mapping[str, int]) -> str:
    """Which fits do not run together, and why."""
    words = [f"{count} fits run one by one: {reason}" for reason, count in reasons.items()]
    if len(groups) > 1:
        sizes = ", ".join(str(len(group.lanes)) for group in groups)
        words.insert(0, f"the fits are of {len(groups)} forms, {sizes} of each, as {groups[1].unlike(groups[0])}")
    return "; ".join(words)
