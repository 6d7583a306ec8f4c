"""What a posterior says of rows, those of the fit and new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.arguments import row_count, shape_of
from inference.model.bound_model import named_failure
from inference.model.guide_density import as_points
from inference.model.vectorization import affordable
from inference.predictive.autoencoder import Autoencoder, EncodingCalls, HeldOutRows, evidence_scores
from inference.predictive.latent_sampler import Batch, LatentSampler
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.sampling import concatenate, log_likelihood, predictive
from inference.predictive.scoring import HeldOut, class_scores, scores
from inference.predictive.stored_prediction import StoredClassPrediction, StoredPrediction
from inference.predictive.streaming import Output, Streamed, Streaming
from inference.utils.validation import flag, positive_integer, seed_number

__all__ = ["Predicting"]

T = TypeVar("T")
Draws = int | Mapping[str, Any]


class Predicting(Streaming, EncodingCalls):
    """The questions about rows: predict, evaluate, log likelihood, and those of autoencoders."""

    @overload
    def predict(
        self,
        *new_data: Any,
        draws: Draws = 1000,
        seed: int = 0,
        site: str | None = None,
        batch_size: int | None = None,
        per_row: bool = False,
        progress: bool = True,
        out: None = None,
    ) -> Prediction | ClassPrediction: ...

    @overload
    def predict(
        self,
        *new_data: Any,
        draws: Draws = 1000,
        seed: int = 0,
        site: str | None = None,
        batch_size: int | None = None,
        per_row: bool = False,
        progress: bool = True,
        out: str | Path,
        keep: str = "draws",
        quantiles: Sequence[float] | None = None,
        resume: bool = False,
    ) -> StoredPrediction | StoredClassPrediction: ...

    def predict(
        self,
        *new_data: Any,
        draws: Draws = 1000,
        seed: int = 0,
        site: str | None = None,
        batch_size: int | None = None,
        per_row: bool = False,
        progress: bool = True,
        out: str | Path | None = None,
        keep: str = "draws",
        quantiles: Sequence[float] | None = None,
        resume: bool = False,
    ) -> Prediction | ClassPrediction | StoredPrediction | StoredClassPrediction:
        """The posterior predictive at new rows, ``draws`` functions of all of them.

        Each draw of z is used for every row, so a draw is a function. Latents
        of single rows, where the guide does not take the new rows, are drawn
        from the model given the shared ones.

        Parameters
        ----------
        new_data
            The model's arguments without the observed one, as ``predict(x_new)``.
        draws
            How many, or the draws themselves, as :meth:`~inference.Posterior.sample`
            gives them: ``draws=posterior.sample(1000, corrected=True)``.
        site
            The observed site, where the model has more than one.
        batch_size
            The most rows to run the model on at a time, which bounds the
            memory; right where rows do not depend on each other given the
            latents. If left out, that of the fit, or else all rows. The
            functions are the same.
        per_row
            Draw the latents anew for each row, which is noise rather than
            functions; for :func:`~guides.bernoulli_dropout`.
        progress
            Show a bar over the batches once it has taken a second.
        out
            A folder, such as ``"pred.zarr"``, to which the prediction is written
            as it is made, in memory that does not grow with the rows. Arrays,
            ``np.memmap``, those of Zarr and HDF5, and what lies at a path, ``….npy`` or
            ``….zarr``, are read a batch of rows at a time, once before the first to
            check them. How many rows a batch has is found, ``batch_size`` being the
            most. The functions are the same; the noise of each batch has random
            numbers of its own. What comes back reads what it is asked for, and
            :func:`~inference.open_prediction` opens it later. The draws of z stay in
            memory, and so do all latents that rows of the fit have of their own.
        keep
            With ``out``: ``"draws"``, or ``"summary"`` for the moments and quantiles
            of each row alone, from all its draws.
        quantiles
            With ``keep="summary"``: the levels, of observations and of functions;
            0.05, 0.5 and 0.95 if left out.
        resume
            With ``out``: go on where an interrupted call ended, to the same numbers.

        Raises
        ------
        ValueError
            If the new data has other columns than the fit, or does not fit the
            model; if given draws lack a latent or have another shape; if ``out`` is
            there, and is not to be resumed or of something else.
        OSError
            If ``out`` cannot be written.
        """
        if out is not None:
            output = Output.of(out, keep, quantiles, resume)
            size = None if batch_size is None else positive_integer(batch_size, "batch_size")
            wanted = self._wanted(draws, flag(per_row, "per_row"))
            asked = Streamed(wanted, seed_number(seed), self._site(site), size, per_row, output)
            return self._streamed(new_data, asked, flag(progress, "progress"))
        if keep != "draws" or quantiles is not None or resume is not False:
            raise ValueError("keep=, quantiles= and resume= are for predictions on disk: pass out= too")
        args = self._new_arguments(new_data)
        return self._predictive(args, draws, seed, site, batch_size, per_row, progress)

    def predict_data(
        self,
        *,
        draws: Draws = 1000,
        seed: int = 0,
        site: str | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Prediction | ClassPrediction:
        """The posterior predictive at the rows of the fit, for posterior-predictive checks; as :meth:`predict`."""
        return self._predictive(self.data, draws, seed, site, batch_size, False, progress)

    @property
    def is_autoencoder(self) -> bool:
        """Whether the model observes what the guide encodes, so that rows are remade rather than predicted."""
        sites = self._bound_model.observed
        return hasattr(self._bound_model.guide, "encode") and len(sites) == 1 and sites[0].argument == 0

    def evaluate(
        self,
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
        args = self._new_arguments(test)[: len(test)]
        if not test or shape_of(args[-1]) is None:
            given = ", ".join(self.argument_names)
            raise ValueError(f"evaluate takes rows that were held out, evaluate({given}), with what was observed last")
        y = args[-1].cpu()
        if draws is None:
            _, draws = affordable(len(y), self._bound_model.params.size, 1000)
        if self.is_autoencoder:
            code = self.encode(*test, batch_size=batch_size)
            with self._autoencoding(seed, batch_size) as autoencoder:
                bounds = autoencoder.evidence(args, positive_integer(draws, "draws"), progress)
            return HeldOutRows(code, args[0].cpu(), evidence_scores(code, *bounds, draws))
        inputs = test[:-1]
        prediction = self.predict(*inputs, draws=draws, seed=seed, batch_size=batch_size, progress=progress)
        if isinstance(prediction, ClassPrediction):
            return HeldOut(prediction, y, class_scores(prediction, y), inputs)
        likelihood = self.log_likelihood(*test, draws=draws, seed=seed, batch_size=batch_size)[self.observed_site]
        return HeldOut(prediction, y, scores(prediction, y, likelihood), inputs)

    def log_likelihood(
        self, *data: Any, draws: Draws = 1000, seed: int = 0, batch_size: int | None = None
    ) -> dict[str, Tensor]:
        """The log likelihood log p(yₙ | zₛ) in nats, ``{observed site: (S, N, …)}``.

        On ``data``, given in the order of the fit, or else on the data of the
        fit; ``draws`` and ``batch_size`` as in :meth:`predict`.
        """
        args = self._new_arguments(data) if data else self.data
        sites = [site.name for site in self._bound_model.observed]
        parts = list(self._likelihoods(sites, args, draws, seed, batch_size))
        return {
            site: torch.cat([part[site] for part in parts], 1) if len(parts) > 1 else parts[0][site] for site in sites
        }

    def _likelihoods(
        self, sites: list[str], args: tuple[Any, ...], draws: Draws, seed: int, batch_size: int | None
    ) -> Iterator[dict[str, Tensor]]:
        """Log likelihoods of one batch of rows after the other."""

        def run(batch: Batch) -> dict[str, Tensor]:
            return log_likelihood(batch.model, batch.latents, batch.draws, batch.args, sites)

        yield from self._for_batches(run, args, draws, seed, batch_size)

    @contextmanager
    def _autoencoding(self, seed: int, batch_size: int | None) -> Iterator[Autoencoder]:
        with self._running(seed):
            yield Autoencoder(self._bound_model, self._args, self.observed_site, self._batch_size(batch_size))

    def _predictive(
        self,
        args: tuple[Any, ...],
        draws: Draws,
        seed: int,
        site: str | None,
        batch_size: int | None,
        per_row: bool,
        progress: bool,
    ) -> Prediction | ClassPrediction:
        wanted = self._site(site)
        per_row, progress = flag(per_row, "per_row"), flag(progress, "progress")

        def run(batch: Batch) -> Prediction | ClassPrediction:
            return predictive(batch.model, batch.latents, batch.draws, batch.args, wanted)

        return concatenate(list(self._for_batches(run, args, draws, seed, batch_size, per_row, progress)))

    def _for_batches(
        self,
        run: Callable[[Batch], T],
        args: tuple[Any, ...],
        draws: Draws,
        seed: int,
        batch_size: int | None,
        per_row: bool = False,
        progress: bool = False,
    ) -> Iterator[T]:
        """``run`` on one batch of rows after the other; errors say whose code failed, and on which shapes."""
        size = self._batch_size(batch_size)
        latents = LatentSampler(self._bound_model, self._args)
        wanted = self._wanted(draws, per_row)
        # Draws that are given may come from the same seed: the noise must not repeat their random numbers.
        branch = 0 if isinstance(wanted, int) else 1
        with (
            self._running(seed, branch),
            tqdm(desc="predict", total=row_count(args), unit="row", delay=1, leave=False, disable=not progress) as bar,
        ):
            for batch in latents.batches(wanted, args, size, per_row):
                yield named_failure("model", self._bound_model.model, batch.args, partial(run, batch))
                bar.update(row_count(batch.args) or 1)

    def _wanted(self, draws: Draws, per_row: bool) -> int | dict[str, Tensor]:
        """How many draws to take, or those that are given, checked."""
        if not isinstance(draws, Mapping):
            return positive_integer(draws, "draws")
        if per_row:
            raise ValueError("per_row draws the latents anew for each row: give draws= as a number")
        points, leading = as_points(draws, self._bound_model)
        if len(leading) != 1 or not leading[0]:
            raise ValueError(f"the draws have leading dimensions {leading}: give S draws, {{site: (S, *site shape)}}")
        return points
