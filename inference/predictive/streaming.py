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
from inference.predictive.fitted import Fitted
from inference.predictive.latent_sampler import Batch, LatentSampler, how_many
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.sampling import at_latents, predictive
from inference.predictive.stored_prediction import StoredClassPrediction, StoredPrediction, fields_of, open_prediction
from inference.predictive.zarr_store import Field, PredictionStore
from inference.storage.atomic_files import make_folder
from inference.storage.fit_fingerprint import Fingerprint, fingerprint_of, fingerprint_of_data
from inference.utils.validation import flag, one_of, share
from inference.utils.versions import versions

__all__ = ["Output", "Streamed", "Streaming"]

QUANTILES = (0.05, 0.5, 0.95)
_READ = 2**14  # rows looked at together when the data is checked
_TRIED = 256  # rows on which the model shows how much memory it takes
_BRANCH = 2  # of the seed: the first batch's noise; before are those of predictions in one piece
At = Callable[[slice], Batch]


@dataclass(frozen=True)
class Output:
    """Where a prediction is written, and what of it: :meth:`Predicting.predict` says what each is."""

    path: Path
    keep: str
    quantiles: tuple[float, ...]
    resume: bool

    @classmethod
    def of(cls, path: str | Path, keep: str, quantiles: Any, resume: bool) -> Output:
        """Those that were given, checked."""
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


@dataclass(frozen=True)
class Streamed:
    """What is asked of a prediction that is written down."""

    draws: int | dict[str, Tensor]
    seed: int
    site: str
    batch_size: int | None
    per_row: bool
    output: Output

    def fingerprint(self) -> Fingerprint:
        """What a run has to share with one that it goes on with."""
        given = self.draws
        found = {name: getattr(self, name) for name in ("seed", "site", "batch_size", "per_row")}
        found |= {"keep": self.output.keep, "quantiles": str(self.output.quantiles)}
        if isinstance(given, int):
            return {"draws": given, **found}
        return fingerprint_of_data([f"draws of {name}" for name in given], tuple(given.values())) | found


class Streaming(Fitted):
    """Predictions that go to disk as they are made."""

    def _streamed(
        self, data: tuple[Any, ...], asked: Streamed, progress: bool
    ) -> StoredPrediction | StoredClassPrediction:
        store = PredictionStore.found(asked.output.path, asked.output.resume)
        if store is None:
            make_folder(asked.output.path.parent)
        source = RowSource.of(data, self._new_names(data), self._bound_model.dtype)
        identity = self._fingerprint(asked, source)
        if store is not None:
            store.refuse_other(identity, versions())
            if store.is_finished:
                return open_prediction(asked.output.path)
        at = self._at(asked, source)
        if store is None:
            store = self._create(at, asked, source.count, identity)
        self._fill(store, at, asked, progress)
        return open_prediction(asked.output.path)

    def _fingerprint(self, asked: Streamed, source: RowSource) -> Fingerprint:
        """What the prediction is of; the data is read and checked once for it, before anything is written."""
        bound_model = self._bound_model
        found = {**fingerprint_of(bound_model.model, "model"), **fingerprint_of(bound_model.guide, "guide")}
        found |= fingerprint_of_data(["the fitted parameters"], (self._flat_params.detach(),)) | asked.fingerprint()
        found |= {"dtype": str(bound_model.dtype), "device": bound_model.device.type}
        return found | source.fingerprint(_READ, self._new_arguments)

    def _at(self, asked: Streamed, source: RowSource) -> At:
        """What makes a batch of the rows at any slice, with the functions that all rows share."""

        def read(rows: slice) -> tuple[Any, ...]:
            return self._new_arguments(source.part(rows), rows)

        latents, first = LatentSampler(self._bound_model, self._args), slice(0, min(_TRIED, source.count))
        branch = 0 if isinstance(asked.draws, int) else 1
        trained = bool(latents.row_sites()) and self._is_of_the_fit(source, read)
        with self._running(asked.seed, branch):
            functions = latents.functions(asked.draws, read(first), asked.per_row, trained)
        return lambda rows: functions(rows, read(rows))

    def _is_of_the_fit(self, source: RowSource, read: Callable[[slice], tuple[Any, ...]]) -> bool:
        """Whether the rows are those of the fit, whose own latents the guide has."""
        fitted = self._args[0]
        if not isinstance(fitted, Tensor) or fitted.shape[0] != source.count:
            return False
        cuts = (slice(begin, begin + _READ) for begin in range(0, source.count, _READ))
        return all(torch.equal(read(slice(cut.start, min(cut.stop, source.count)))[0], fitted[cut]) for cut in cuts)

    def _block(self, at: At, asked: Streamed, total: int) -> BlockSize:
        """How many rows to write together and how many draws to run on them, from one run at one draw."""
        count = min(_TRIED, total)
        with self._running(asked.seed, _BRANCH):
            batch = at(slice(0, count))
            z = {name: value[0] for name, value in batch.latents.items()}
            tried = partial(at_latents, batch.model, z, batch.args, asked.site)
            with MemoryProbe(count) as seen:
                described, sample = named_failure("model", self._bound_model.model, batch.args, tried)
        if not sample.dim() or len(sample) != count:
            raise ValueError(
                f"site {asked.site!r} has shape {tuple(sample.shape)} at {count} rows: out= is for sites with values "
                "of each row; leave it out"
            )
        kept = max(value.numel() for value in (*described, sample)) / count
        return BlockSize.bounded(seen, kept, how_many(asked.draws), total, asked.batch_size)

    def _run(self, at: At, rows: slice, asked: Streamed, together: int, number: int) -> Prediction | ClassPrediction:
        """Batch ``number``, whose noise depends on the seed and that number alone."""
        with self._running(asked.seed, _BRANCH + number):
            batch = at(rows)
            known = (batch.model, batch.latents, batch.draws, batch.args, asked.site, together)
            return named_failure("model", self._bound_model.model, batch.args, partial(predictive, *known))

    def _create(self, at: At, asked: Streamed, rows: int, identity: Fingerprint) -> PredictionStore:
        """A store for what the first rows show."""
        block = self._block(at, asked, rows)
        found = self._run(at, slice(0, min(2, rows)), asked, block.draws, 0)
        about = {
            "kind": "values" if isinstance(found, Prediction) else "classes",
            "keep": asked.output.keep,
            "site": asked.site,
            "draws": how_many(asked.draws),
            "rows": rows,
            "batch_rows": block.rows,
            "batch_draws": block.draws,
            "quantiles": list(asked.output.quantiles),
            "identity": identity,
            "versions": versions(),
        }
        return PredictionStore.create(asked.output.path, about, self._fields(found, asked))

    def _fields(self, found: Prediction | ClassPrediction, asked: Streamed) -> dict[str, Field]:
        dims = next(site.dims for site in self._bound_model.observed if site.name == asked.site)
        return fields_of(found, dims, asked.output.keep, asked.output.quantiles)

    def _fill(self, store: PredictionStore, at: At, asked: Streamed, progress: bool) -> None:
        options: dict[str, Any] = {"unit": "row", "delay": 1, "leave": False, "disable": not progress}
        bar = tqdm(desc="predict", total=store.rows, initial=store.whole, **options)
        with store.writing() as missing, bar:
            for number, rows in missing:
                found = self._run(at, rows, asked, store.about["batch_draws"], number)
                store.write(number, self._fields(found, asked))
                bar.update(rows.stop - rows.start)
