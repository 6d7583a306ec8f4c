"""Many fits at once: ``fit_many``."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from enum import Enum, auto
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from inference.engine.batched.grouping import FitBatch, PreparedRestart, bar_over, grouped
from inference.engine.compiler.inductor import NotCompilable
from inference.engine.tracing.tracer import Untraceable
from inference.model.bound_model import from_sendable, to_sendable
from inference.model.elbo import Model
from inference.posterior import Posterior
from inference.svi.fitting import fit
from inference.svi.options import FitOptions, FitProblem
from inference.svi.restarts import Restarts
from inference.svi.state import Restart, RestartResult
from inference.utils.processes import jobs_at_once, spread
from inference.utils.warnings import warn

__all__ = ["FitsFailed", "fit_many"]

_OF_SINGLE_FITS = ("callbacks", "checkpoint", "resume")  # options of ``fit`` that many fits do not take


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
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression
    >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
    >>> models = [partial(linear_regression, noise=noise) for noise in (0.1, 1.0)]
    >>> fits = [partial(kiln.fit, m, mean_field_normal(m), x, 2 * x[:, 0], seed=s) for m in models for s in range(3)]
    >>> posteriors = kiln.fit_many(fits, steps=20, engine="eager", progress=False)
    >>> [posterior.losses.shape for posterior in posteriors[:2]]
    [(20,), (20,)]
    """
    scheduled = [_ScheduledFit(number, _Call.of(call, number, options)) for number, call in enumerate(fits)]
    if not scheduled:
        raise ValueError("fits is empty: give partial(fit, model, guide, x, y), one for each fit")
    seen: set[Hashable] = set()
    for one in tqdm(scheduled, desc="start", unit="fit", disable=not progress, leave=False):
        mark = (one.restarts.trace_key, *map(id, one.call.data))
        one.restarts.skip_validation = mark in seen
        seen.add(mark)
        one.start()
    _run(scheduled, n_jobs, progress)
    for one in scheduled:
        one.finish()
    errors = {one.number: one.error for one in scheduled if one.error is not None}
    if errors:
        raise FitsFailed([one.posterior for one in scheduled], errors)
    return [one.posterior for one in scheduled if one.posterior is not None]


@dataclass(frozen=True)
class _Call:
    """Arguments of one call of ``fit``."""

    model: Model
    guide: Any
    data: tuple[Any, ...]
    options: FitOptions

    @classmethod
    def of(cls, call: Any, number: int, shared: Mapping[str, Any]) -> _Call:
        """Return the arguments of a ``partial`` of ``fit``, with the options that all calls share."""
        if not isinstance(call, partial) or call.func is not fit:
            raise TypeError(f"fit number {number} is {call!r}: give partial(fit, model, guide, x, y)")
        given = {**shared, **call.keywords}
        for name in _OF_SINGLE_FITS:
            if name in given:
                raise ValueError(f"fit number {number} has {name}=, which is for single fits: leave it out")
        known = {option.name for option in fields(FitOptions)}
        functions = {name: given.pop(name) for name in ("model", "guide") if name in given}
        for name in given:
            if name not in known:
                raise TypeError(f"got an unexpected keyword argument {name!r}")
        try:
            return _call_of(FitOptions(**{**given, "progress": False}), *call.args, **functions)
        except (TypeError, ValueError) as error:
            raise type(error)(f"fit number {number}: {error}") from error

    def to_sendable(self) -> _Call:
        """Return the call in a form that another process can read."""
        return replace(self, guide=to_sendable(self.guide))

    def from_sendable(self) -> _Call:
        """Return the call that :meth:`to_sendable` was made of."""
        return replace(self, guide=from_sendable(*self.guide))


def _call_of(options: FitOptions, model: Model, guide: Model, *data: Any) -> _Call:
    return _Call(model, guide, data, options)


class _Status(Enum):
    """Where a scheduled fit is on its way."""

    PREPARED = auto()  # its arguments are checked
    RUNNING = auto()  # its restarts are planned, and may take their steps with others
    DONE = auto()
    FAILED = auto()


class _ScheduledFit:
    """One call of ``fit`` on its way to its posterior, or to an error."""

    def __init__(self, number: int, call: _Call) -> None:
        self.number = number
        self.call = call
        self.status = _Status.PREPARED
        try:
            problem = FitProblem.of(call.model, call.guide, call.data, call.options)
        except (TypeError, ValueError) as error:
            raise type(error)(f"fit number {number}: {error}") from error
        self.restarts = Restarts(problem, call.options)
        self.prepared: list[PreparedRestart | ValueError] = []
        self.best: tuple[Restart, tuple[float, ...]] | None = None
        self.posterior: Posterior | None = None
        self.error: ValueError | None = None

    def start(self) -> None:
        """Plan the restarts, if they can run with those of other fits."""
        self.status = _Status.RUNNING
        if self.restarts.can_join:
            with self._catching():
                self.prepared = self.restarts.prepare()
        for restart in self.planned:
            restart.fit_number = self.number

    @property
    def planned(self) -> list[PreparedRestart]:
        """The restarts that can run with those of other fits."""
        return [restart for restart in self.prepared if isinstance(restart, PreparedRestart)]

    def take(self, saved: Mapping[str, Any], losses: tuple[float, ...]) -> None:
        """Take over the best restart that another process has found, and the losses of all."""
        result = RestartResult.from_state_dict(saved, self.restarts.problem.device)
        self.best = self.restarts.restored(result), losses

    def finish(self) -> None:
        """Take the steps that were not taken with other fits, and make the posterior."""
        if self.status is not _Status.RUNNING:
            return
        with self._catching():
            self.best = self.best or self.restarts.best(self.prepared)
            best, losses = self.best
            self.posterior = best.posterior(self.restarts.seconds, losses)
            self.status = _Status.DONE

    @contextmanager
    def _catching(self) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self.status, self.error = _Status.FAILED, error


def _run(scheduled: Sequence[_ScheduledFit], n_jobs: int | None, progress: bool) -> None:
    """Run fits of one form together, and those of several forms in several processes, if ``n_jobs`` says so."""
    by_number = {one.number: one for one in scheduled}
    groups, reasons = grouped([restart for one in scheduled for restart in one.planned], progress)
    if len(groups) > 1 or reasons:
        warn(_apart(groups, reasons))
    fits_of = [[by_number[restart.fit_number] for restart in group.ready] for group in groups]
    jobs = _jobs(scheduled, fits_of)
    if len(jobs) > 1 and jobs_at_once(n_jobs) > 1:
        _send(jobs, n_jobs, progress)
        return
    chosen = [
        group
        for group, fits in zip(groups, fits_of, strict=True)
        if len(group.lanes) > 1 and group.worth(fits[0].call.options.engine)
    ]
    with bar_over(chosen, progress) as bar:
        for group in chosen:
            try:
                group.run(bar)
            except (Untraceable, NotCompilable) as error:
                warn(f"{len(group.lanes)} fits run one by one: {error}")


def _jobs(scheduled: Sequence[_ScheduledFit], groups: Sequence[Sequence[_ScheduledFit]]) -> list[list[_ScheduledFit]]:
    """Return the fits that are sent to one process: those of one form, and each that has none."""
    seen: set[int] = set()
    jobs = []
    for group in [*groups, *([one] for one in scheduled if one.status is _Status.RUNNING)]:
        jobs.append([one for one in dict.fromkeys(group) if one.number not in seen])
        seen |= {one.number for one in group}
    return [job for job in jobs if job]


def _send(jobs: Sequence[Sequence[_ScheduledFit]], n_jobs: int | None, progress: bool) -> None:
    """Run each job in a process of joblib's; a fit that fails there is run again here, where its error is raised."""
    calls = [[(one.number, one.call.to_sendable()) for one in job] for job in jobs]
    by_number = {one.number: one for job in jobs for one in job}
    with tqdm(total=len(by_number), desc=f"{len(by_number)} fits", unit="fit", disable=not progress) as bar:
        for found in spread(_run_elsewhere, calls, n_jobs):
            for number, best in found:
                if best is not None:
                    by_number[number].take(*best)
            bar.update(len(found))


def _run_elsewhere(calls: Sequence[tuple[int, _Call]]) -> list[tuple[int, Any]]:
    """Return the best restart of each fit as numbers and tensors, with the loss of each; None for a fit that failed."""
    scheduled = [_ScheduledFit(number, call.from_sendable()) for number, call in calls]
    for one in scheduled:
        one.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again where the fits were scheduled
        _run(scheduled, 1, False)
        for one in scheduled:
            one.finish()
    return [
        (one.number, None if one.best is None else (one.best[0].result.state_dict(), one.best[1])) for one in scheduled
    ]


def _apart(groups: Sequence[FitBatch], reasons: Mapping[str, int]) -> str:
    """Which fits do not run together, and why."""
    words = [f"{count} fits run one by one: {reason}" for reason, count in reasons.items()]
    if len(groups) > 1:
        sizes = ", ".join(str(len(group.lanes)) for group in groups)
        words.insert(0, f"the fits are of {len(groups)} forms, {sizes} of each, as {groups[1].unlike(groups[0])}")
    return "; ".join(words)
