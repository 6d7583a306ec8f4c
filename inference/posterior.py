"""The posterior: what a fit returns and what every question is asked of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal

from inference.data.arguments import argument_names, as_tensors
from inference.data.batch_loader import BatchLoader
from inference.data.batched_dataset import BatchedDataset
from inference.diagnostics.importance_sampling import khat_threshold, smoothed_weights
from inference.export.inference_data import to_arviz
from inference.export.npz import write_predictor
from inference.export.predictive_function import PredictiveFunction
from inference.model.bound_model import BoundModel, clone, device_for
from inference.model.elbo import Model
from inference.optim.adaptive import StopReason
from inference.predictive.approximation import Approximation
from inference.predictive.fit_record import FitRecord
from inference.predictive.stored_prediction import StoredClassPrediction, StoredPrediction
from inference.reporting.report import write_report
from inference.reporting.section import Labels
from inference.storage import posterior_archive
from inference.storage.checkpoint import has_checkpoint
from inference.utils.random_state import RandomStream
from inference.utils.validation import as_dtype, positive_integer, seed_number

__all__ = ["Posterior", "load"]


class Posterior(Approximation):
    """q(z), fitted: sample it, predict with it, check it, save it.

    Made by :func:`inference.fit` or :func:`inference.load`. Calls that draw take
    a ``seed`` and give the same numbers for the same seed.
    """

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
        about = self._about_draws(draws, seed, corrected)
        return to_arviz(self, drawn, _count(draws), seed, about, {} if prediction is None else prediction.groups())

    def _about_draws(self, draws: int, seed: int, corrected: bool) -> dict[str, str | float]:
        """What a reader of exported draws has to know of them."""
        about: dict[str, str | float] = {"draws_of": "q, picked by importance weights" if corrected else "q"}
        if self.has_data and self._batches is None and self._no_weights() is None:
            weights = smoothed_weights(self.log_weights(draws, seed=seed).double().numpy())
            about |= {"pareto_khat": weights.khat, "pareto_khat_threshold": khat_threshold(draws)}
        return about

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
        bound_model = self._bound_model
        manifest = {
            "model": self.model_name,
            "guide": self.guide_name,
            "dtype": str(bound_model.dtype).removeprefix("torch."),
            "arguments": [
                posterior_archive.describe(n, v) for n, v in zip(self.argument_names, self._args, strict=True)
            ],
            "seconds": self.record.seconds,
            "seed": self.record.seed,
            "options": self.record.options,
            "evaluations": self.record.evaluations,
            "stop": None if self.record.stop is None else self.record.stop.state_dict(),
            "starts": self.record.starts,
        }
        traces = {"losses": torch.from_numpy(self.losses), "kl": torch.from_numpy(self.kl)}
        return posterior_archive.write(Path(path), bound_model.params.named(self._flat_params), traces, manifest)

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
        >>> from inference import fit
        >>> from inference.export.runtime.predictor import load
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from ppl_models import linear_regression
        >>> x = torch.linspace(-1, 1, 20).reshape(-1, 1)
        >>> posterior = fit(linear_regression, AutoNormal(linear_regression), x, 2 * x[:, 0], steps=10, progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     predictor = load(posterior.export(f"{folder}/predictor.npz", draws=50))
        >>> p = predictor.predict(x[:3].numpy())
        >>> p.draws.shape, p.mean.shape, p.interval(0.9).lower.shape
        ((50, 3), (3,), (3,))
        """
        asked = PredictiveFunction.of(
            *(self._bound_model, self._flat_params, self._args, self.argument_names, self._has_data),
            *(site, _count(draws), seed_number(seed)),
        )
        return write_predictor(asked, Path(path), {"model": self.model_name, "guide": self.guide_name})


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


def _count(draws: int, name: str = "draws") -> int:
    return positive_integer(draws, name)
