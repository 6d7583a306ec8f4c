"""The posterior: what a fit returns and what every question is asked of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor

from inference.data.arguments import argument_names, as_tensors
from inference.data.batch_loader import BatchLoader
from inference.data.batched_dataset import BatchedDataset
from inference.export.inference_data import to_arviz
from inference.export.npz import write_predictor
from inference.export.predictive_function import PredictiveFunction
from inference.model.bound_model import BoundModel, clone, device_for
from inference.model.elbo import Model
from inference.optim.adaptive import StopReason
from inference.predictive import autoencoder, importance_weights, posterior_predictive, streaming
from inference.predictive.approximation import Approximation, FitRecord
from inference.predictive.posterior_predictive import PredictionOptions
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.sampling import Draws
from inference.predictive.stored_prediction import StoredClassPrediction, StoredPrediction
from inference.predictive.streaming import Output
from inference.reporting.report import write_report
from inference.reporting.section import Labels
from inference.storage import posterior_archive
from inference.storage.checkpoint import has_checkpoint
from inference.utils.random_state import RandomStream
from inference.utils.validation import as_dtype, flag, positive_integer, seed_number

__all__ = ["Posterior", "load"]


class Posterior(Approximation):
    """q(z), fitted: sample it, predict with it, check it, save it.

    Made by :func:`inference.fit` or :func:`inference.load`. Calls that draw take
    a ``seed`` and give the same numbers for the same seed.
    """

    # Functions of ``inference.predictive`` whose first argument is an approximation are methods as they are.
    evaluate = posterior_predictive.evaluate
    log_likelihood = posterior_predictive.log_likelihood
    log_weights = importance_weights.log_weights
    diagnose = importance_weights.diagnose
    doubts = importance_weights.doubts
    loo = importance_weights.loo
    encode = autoencoder.encode
    decode = autoencoder.decode
    reconstruct = autoencoder.reconstruct
    interpolate = autoencoder.interpolate
    generate = autoencoder.generate
    log_evidence = autoencoder.log_evidence

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
            return importance_weights.corrected_draws(self, positive_integer(draws, "draws"), seed)
        return super().sample(draws, seed=seed)

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

    def predict(  # noqa: PLR0913 - public: every option by its name
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
            A folder to write the prediction to, as :meth:`predict_to` does.
        keep, quantiles, resume
            With ``out``: as in :meth:`predict_to`.

        Raises
        ------
        ValueError
            If the new data has other columns than the fit, or does not fit the
            model; if given draws lack a latent or have another shape.
        """
        options = PredictionOptions(
            draws=draws, seed=seed, site=site, batch_size=batch_size, per_row=per_row, progress=progress
        )
        if out is not None:
            return streaming.predict_to(self, new_data, options, Output.of(out, keep, quantiles, resume))
        if keep != "draws" or quantiles is not None or resume is not False:
            raise ValueError("keep=, quantiles= and resume= are for predictions on disk: pass out= too")
        return posterior_predictive.predict(self, new_data, options)

    def predict_to(  # noqa: PLR0913 - public: every option by its name
        self,
        path: str | Path,
        *new_data: Any,
        draws: Draws = 1000,
        seed: int = 0,
        site: str | None = None,
        batch_size: int | None = None,
        per_row: bool = False,
        progress: bool = True,
        keep: str = "draws",
        quantiles: Sequence[float] | None = None,
        resume: bool = False,
    ) -> StoredPrediction | StoredClassPrediction:
        """Write the posterior predictive at new rows to a folder as it is made; other options as in :meth:`predict`.

        Memory does not grow with the rows: arrays, ``np.memmap``, those of Zarr and
        HDF5, and what lies at a path, ``….npy`` or ``….zarr``, are read a batch of
        rows at a time, once before the first to check them. How many rows a batch
        has is found, ``batch_size`` being the most. The functions are those of
        :meth:`predict`; the noise of each batch has random numbers of its own. The
        draws of z stay in memory, and so do all latents that rows of the fit have
        of their own.

        Parameters
        ----------
        path
            The folder, such as ``"pred.zarr"``. What comes back reads what it is
            asked for, and :func:`~inference.open_prediction` opens it later.
        keep
            ``"draws"``, or ``"summary"`` for the moments and quantiles of each row
            alone, from all its draws.
        quantiles
            With ``keep="summary"``: the levels, of observations and of functions;
            0.05, 0.5 and 0.95 if left out.
        resume
            Go on where an interrupted call ended, to the same numbers.

        Raises
        ------
        ValueError
            As :meth:`predict` does; also if ``path`` exists, and is not to be
            resumed or is of something else.
        OSError
            If ``path`` cannot be written.
        """
        options = PredictionOptions(
            draws=draws, seed=seed, site=site, batch_size=batch_size, per_row=per_row, progress=progress
        )
        return streaming.predict_to(self, new_data, options, Output.of(path, keep, quantiles, resume))

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
        options = PredictionOptions(draws=draws, seed=seed, site=site, batch_size=batch_size, progress=progress)
        return posterior_predictive.predict_data(self, options)

    def to_arviz(
        self,
        *,
        draws: int = 1000,
        seed: int = 0,
        corrected: bool = False,
        prediction: StoredPrediction | StoredClassPrediction | None = None,
    ) -> Any:
        """InferenceData (ArviZ 0.x) or DataTree (1.x) of every group.

        See :func:`inference.export.inference_data.to_arviz`.

        With ``corrected`` all is at draws that importance weights pick, as in
        :meth:`sample`, so that what ArviZ makes of them, ``az.loo`` too, is of the
        posterior rather than of q. A ``prediction`` on disk becomes the group
        ``predictions``, of which nothing is read yet.
        """
        drawn = self.sample(draws, seed=seed, corrected=corrected)
        groups = {} if prediction is None else prediction.groups()
        return to_arviz(self, drawn, positive_integer(draws, "draws"), seed, corrected=corrected, others=groups)

    def report(
        self,
        path: str | Path,
        *,
        test: tuple[Any, ...] | None = None,
        labels: Labels | None = None,
        baselines: Mapping[str, float] | None = None,
        groups: Any = None,
        progress: bool = True,
    ) -> Path:
        """Write one self-contained HTML file, with held-out ``test`` data if given; see :func:`write_report`."""
        held_out = self.evaluate(*test) if test is not None else None
        options = {"labels": labels, "baselines": baselines, "groups": groups, "progress": progress}
        return write_report(self, Path(path), held_out=held_out, **options)

    def save(self, path: str | Path) -> Path:
        """Write parameters and record into the folder ``path``, without data, model code or pickle."""
        bound_model = self.bound_model
        manifest = {
            "model": self.model_name,
            "guide": self.guide_name,
            "dtype": str(bound_model.dtype).removeprefix("torch."),
            "arguments": [
                posterior_archive.describe(n, v) for n, v in zip(self.argument_names, self.args, strict=True)
            ],
            "seconds": self.record.seconds,
            "seed": self.record.seed,
            "options": self.record.options,
            "evaluations": self.record.evaluations,
            "stop": None if self.record.stop is None else self.record.stop.state_dict(),
            "starts": self.record.starts,
        }
        traces = {"losses": torch.from_numpy(self.losses), "kl": torch.from_numpy(self.kl)}
        return posterior_archive.write(Path(path), bound_model.params.named(self.flat_params), traces, manifest)

    def export(self, path: str | Path, *, draws: int = 1000, seed: int = 0, site: str | None = None) -> Path:
        """Write ``predictor.npz``, and beside it ``predictor.py``, which do what :meth:`predict` does with NumPy alone.

        The two files predict on a machine without torch: ``import predictor;
        predictor.load().predict(x)`` has the same ``draws``, to rounding, as
        ``predict(x, draws=draws, seed=seed)``; latents that each row has of its
        own are drawn anew. They hold arrays and no pickle. A model without
        inputs gives draws of its latent. A path that ends in ``.onnx`` takes
        mean and variance, or class probabilities, as torch's exporter can.

        Raises
        ------
        ValueError
            If something that the model does has no NumPy form, or differs from
            torch in what it gives; nothing is written then.

        Examples
        --------
        >>> import tempfile
        >>> import kiln
        >>> from inference.export.runtime.predictor import load
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from kiln.models import linear_regression
        >>> x = torch.linspace(-1, 1, 20).reshape(-1, 1)
        >>> guide = AutoNormal(linear_regression)
        >>> posterior = kiln.fit(linear_regression, guide, x, 2 * x[:, 0], steps=10, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     predictor = load(posterior.export(f"{folder}/predictor.npz", draws=50))
        >>> p = predictor.predict(x[:3].numpy())
        >>> p.draws.shape, p.mean.shape, p.interval(0.9).lower.shape
        ((50, 3), (3,), (3,))
        """
        function = PredictiveFunction.of(self, site, positive_integer(draws, "draws"), seed_number(seed))
        return write_predictor(function, Path(path), {"model": self.model_name, "guide": self.guide_name})


def load(path: str | Path, model: Model, guide: Model, *data: Any, device: str | torch.device = "auto") -> Posterior:
    """The posterior that :meth:`Posterior.save` wrote, bound to ``model`` and ``guide``.

    No data and no training step is needed to sample and predict. Give the data
    of the fit, as to ``fit``, :func:`~inference.batches` too, for what looks at it: :meth:`Posterior.diagnose`,
    :meth:`Posterior.to_arviz`, :meth:`Posterior.report`.

    Raises
    ------
    ValueError
        If the folder is not a saved posterior, or if its parameters are not
        those of ``model`` and ``guide``.
    FileNotFoundError
        If there is no such folder.
    """
    folder = Path(path)
    if has_checkpoint(folder) and not (folder / posterior_archive.MANIFEST).exists():
        raise FileNotFoundError(
            f"{folder} has no posterior yet, but the checkpoint of a fit: go on by fit(…, resume=True) or --resume"
        )
    pieces, traces, manifest = posterior_archive.read(folder)
    where, kind = device_for(device, model, guide), as_dtype(manifest["dtype"])
    names = argument_names(model, len(manifest["arguments"]))
    read = None
    if data and isinstance(data[0], BatchedDataset):
        size = manifest["options"]["batch_size"]
        read = BatchLoader(data[0], argument_names(model, 100), where, kind, size, manifest["seed"])
        read.close()  # no step is taken
    raw = data or posterior_archive.placeholders(manifest["arguments"], folder)
    args = as_tensors(raw, argument_names(model, len(raw)), where, kind) if read is None else read.first
    stream = RandomStream.seeded(manifest["seed"])
    start = clone(guide)
    if isinstance(start, AutoLaplaceApproximation):
        start = AutoMultivariateNormal(start.model)
    bound_model = BoundModel.start(model, start, args, stream, where, kind, check_values=False)
    flat_params = posterior_archive.assemble(folder, bound_model.params, pieces).to(where)
    curves = (traces["losses"].numpy(), traces["kl"].numpy())
    stop = None if manifest["stop"] is None else StopReason.from_state_dict(manifest["stop"])
    record = FitRecord(
        *curves,
        manifest["seconds"],
        manifest["seed"],
        manifest["options"],
        tuple(manifest["starts"]),
        manifest["evaluations"],
        stop,
    )
    return Posterior(bound_model, flat_params, args, names, record, has_data=bool(data), batches=read)
