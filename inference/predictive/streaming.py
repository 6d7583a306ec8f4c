"""Predictions of many rows, run one batch of rows after the other and written down, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.row_arrays import RowSource
from inference.model.bound_model import named_failure
from inference.model.vectorization import BlockSize, MemoryProbe
from inference.predictive.approximation import Approximation
from inference.predictive.posterior_predictive import PredictionOptions
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.sampling import Batch, at_latents, check_draws, count_of, predictive
from inference.predictive.stored_prediction import StoredClassPrediction, StoredPrediction, fields_of, open_prediction
from inference.predictive.zarr_store import Field, PredictionStore
from inference.storage.atomic_files import make_folder
from inference.storage.fit_fingerprint import Fingerprint, fingerprint_of, fingerprint_of_data
from inference.storage.json_document import versions
from inference.utils.validation import flag, one_of, share

__all__ = ["Output", "predict_to"]

QUANTILES = (0.05, 0.5, 0.95)
_READ = 2**14  # rows looked at together when the data is checked
_TRIED = 256  # rows on which the model shows how much memory it takes
_BRANCH = 2  # of the seed: the first batch's noise; before are those of predictions in one piece
At = Callable[[slice], Batch]


@dataclass(frozen=True)
class Output:
    """The folder to which a prediction is written, and what is kept; see :meth:`inference.Posterior.predict_to`."""

    path: Path
    keep: str
    quantiles: tuple[float, ...]
    resume: bool

    @classmethod
    def of(cls, path: str | Path, keep: str = "draws", quantiles: Any = None, resume: bool = False) -> Output:
        """Check the options.

        Raises
        ------
        ValueError
            If one of them has a wrong value, or if quantiles are asked for where draws are kept.
        """
        one_of(keep, "keep", ("draws", "summary"))
        if keep == "draws":
            if quantiles is not None:
                raise ValueError("quantiles= goes with keep='summary'; from draws there is interval(prob)")
            return cls(Path(path), keep, (), flag(resume, "resume"))
        levels = QUANTILES if quantiles is None else quantiles
        if not isinstance(levels, list | tuple) or not levels:
            raise ValueError(f"quantiles is {quantiles!r}: pass one or more shares, such as (0.05, 0.5, 0.95)")
        kept = tuple(sorted({share(level, "each of quantiles") for level in levels}))
        return cls(Path(path), keep, kept, flag(resume, "resume"))


def predict_to(
    approximation: Approximation, new_data: tuple[Any, ...], options: PredictionOptions, output: Output
) -> StoredPrediction | StoredClassPrediction:
    """Write the posterior predictive at new rows to a folder as it is made; see :meth:`inference.Posterior.predict_to`.

    Raises
    ------
    ValueError
        If the new data does not fit the model, or if the folder exists and is not to be resumed.
    OSError
        If the folder cannot be written.
    """
    bound_model = approximation.bound_model
    draws = check_draws(options.draws, bound_model)
    site = approximation.resolve_site(options.site)
    store = PredictionStore.found(output.path, output.resume)
    if store is None:
        make_folder(output.path.parent)
    source = RowSource.of(new_data, approximation.names_of(new_data), bound_model.dtype)
    run = _Streaming(approximation, options, output, draws, site, source)
    identity = run.fingerprint()
    if store is not None:
        store.refuse_other(identity, versions())
        if store.is_finished:
            return open_prediction(output.path)
    at = run.batches()
    if store is None:
        store = run.create(at, identity)
    bar_options: dict[str, Any] = {"unit": "row", "delay": 1, "leave": False, "disable": not options.progress}
    bar = tqdm(desc="predict", total=store.rows, initial=store.whole, **bar_options)
    with store.writing() as missing, bar:
        for number, rows in missing:
            found = run.predict(at, rows, store.about["batch_draws"], number)
            store.write(number, run.fields(found))
            bar.update(rows.stop - rows.start)
    return open_prediction(output.path)


@dataclass(frozen=True)
class _Streaming:
    """A prediction that is streamed to disk: how to make a batch of it, and by which marks it is known again."""

    approximation: Approximation
    options: PredictionOptions
    output: Output
    draws: int | dict[str, Tensor]
    site: str
    source: RowSource

    def fingerprint(self) -> Fingerprint:
        """Return what a call must share with the one that it resumes.

        The data is read and checked once for it, before anything is written.
        """
        bound_model, draws = self.approximation.bound_model, self.draws
        found = {**fingerprint_of(bound_model.model, "model"), **fingerprint_of(bound_model.guide, "guide")}
        found |= fingerprint_of_data(["the fitted parameters"], (self.approximation.flat_params.detach(),))
        if isinstance(draws, int):
            found |= {"draws": draws}
        else:
            found |= fingerprint_of_data([f"draws of {name}" for name in draws], tuple(draws.values()))
        found |= {"seed": self.options.seed, "site": self.site}
        found |= {"batch_size": self.options.batch_size, "per_row": self.options.per_row}
        found |= {"keep": self.output.keep, "quantiles": str(self.output.quantiles)}
        found |= {"dtype": str(bound_model.dtype), "device": bound_model.device.type}
        return found | self.source.fingerprint(_READ, self.approximation.check_arguments)

    def read(self, rows: slice) -> tuple[Any, ...]:
        """Return the arguments at some rows."""
        return self.approximation.check_arguments(self.source.part(rows), rows)

    def batches(self) -> At:
        """Return what makes a batch of the rows at any slice, with the functions that all rows share."""
        latents, first = self.approximation.latent_sampler, slice(0, min(_TRIED, self.source.count))
        branch = 0 if isinstance(self.draws, int) else 1
        trained = bool(latents.row_sites()) and self._are_rows_of_the_fit()
        with self.approximation.running(self.options.seed, branch):
            functions = latents.functions(self.draws, self.read(first), self.options.per_row, trained)
        return lambda rows: functions(rows, self.read(rows))

    def _are_rows_of_the_fit(self) -> bool:
        """Return True if the rows are those of the fit, whose own latents the guide has."""
        fitted, count = self.approximation.args[0], self.source.count
        if not isinstance(fitted, Tensor) or fitted.shape[0] != count:
            return False
        cuts = (slice(begin, min(begin + _READ, count)) for begin in range(0, count, _READ))
        return all(torch.equal(self.read(cut)[0], fitted[cut]) for cut in cuts)

    def create(self, at: At, identity: Fingerprint) -> PredictionStore:
        """Create the store, with arrays of the form that the first rows show."""
        rows, block = self.source.count, self._block(at)
        found = self.predict(at, slice(0, min(2, rows)), block.draws, 0)
        about = {
            "kind": "values" if isinstance(found, Prediction) else "classes",
            "keep": self.output.keep,
            "site": self.site,
            "draws": count_of(self.draws),
            "rows": rows,
            "batch_rows": block.rows,
            "batch_draws": block.draws,
            "quantiles": list(self.output.quantiles),
            "identity": identity,
            "versions": versions(),
        }
        return PredictionStore.create(self.output.path, about, self.fields(found))

    def _block(self, at: At) -> BlockSize:
        """Return how many rows to write together and how many draws to run on them, from one run at one draw."""
        total = self.source.count
        count = min(_TRIED, total)
        with self.approximation.running(self.options.seed, _BRANCH):
            batch = at(slice(0, count))
            z = {name: value[0] for name, value in batch.latents.items()}
            tried = partial(at_latents, batch.model, z, batch.args, self.site)
            with MemoryProbe(count) as seen:
                described, sample = named_failure("model", self.approximation.bound_model.model, batch.args, tried)
        if not sample.dim() or len(sample) != count:
            raise ValueError(
                f"site {self.site!r} has shape {tuple(sample.shape)} at {count} rows: out= is for sites with values "
                "of each row; leave it out"
            )
        kept = max(value.numel() for value in (*described, sample)) / count
        return BlockSize.bounded(seen, kept, count_of(self.draws), total, self.options.batch_size)

    def predict(self, at: At, rows: slice, together: int, number: int) -> Prediction | ClassPrediction:
        """Predict batch ``number``, whose noise depends on the seed and that number alone."""
        with self.approximation.running(self.options.seed, _BRANCH + number):
            batch = at(rows)
            known = (batch.model, batch.latents, batch.draws, batch.args, self.site, together)
            return named_failure("model", self.approximation.bound_model.model, batch.args, partial(predictive, *known))

    def fields(self, found: Prediction | ClassPrediction) -> dict[str, Field]:
        """Return the arrays to keep of a prediction at some rows."""
        dims = next(site.dims for site in self.approximation.bound_model.observed if site.name == self.site)
        return fields_of(found, dims, self.output.keep, self.output.quantiles)
