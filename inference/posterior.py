"""The posterior: what a fit returns and what every question is asked of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal
from torch import Tensor
from tqdm.auto import tqdm

from inference import storage
from inference.arguments import (
    argument_names,
    as_dtype,
    as_tensors,
    check_new_shapes,
    positive_integer,
    row_count,
    seed_number,
)
from inference.arviz_export import to_arviz
from inference.asked import Asked
from inference.autoencoder import Autoencoder, EncodingCalls, HeldOutRows, evidence_scores
from inference.density import as_points, log_density
from inference.diagnostics import Diagnosis, NoWeights, diagnose
from inference.export import write_predictor
from inference.isolation import RandomStream
from inference.landing import Stop
from inference.latents import Batch, Latents
from inference.metrics import HeldOut, class_scores, scores
from inference.objective import Model, log_weight, traces
from inference.predict import ClassPrediction, Prediction, joined, log_likelihood, predictive
from inference.program import Program, clone, device_for, name_of, named_failure, set_training
from inference.report import write_report
from inference.sections import Labels
from inference.sites import observed_nodes
from inference.vectorized import affordable, draws_together, for_each_draw

__all__ = ["FitRecord", "Posterior", "load"]

T = TypeVar("T")
MOST_LATENTS = 10_000  # of all rows together, beyond which one row's misfit drowns in the others' noise


@dataclass(frozen=True)
class FitRecord:
    """How a posterior came about: −ELBO and its KL per step, seconds, seed, options, −ELBO where each start ended.

    ``evaluations`` counts gradients of the log joint, those of the search of a
    start and those of steps and particles; ``stop`` says why it ended where
    that was to be found.
    """

    losses: np.ndarray
    kl: np.ndarray
    seconds: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    starts: tuple[float, ...] = ()
    evaluations: int = 0
    stop: Stop | None = None


class Posterior(EncodingCalls):
    """q(z), fitted: sample it, predict with it, check it, save it.

    Made by :func:`inference.fit` or :func:`inference.load`. Calls that draw take
    a ``seed`` and give the same numbers for the same seed.
    """

    def __init__(
        self,
        program: Program,
        flat: Tensor,
        args: tuple[Any, ...],
        names: list[str],
        record: FitRecord,
        has_data: bool = True,
    ) -> None:
        set_training(program.guide, False)
        self._program = program
        self._flat = flat
        self._args = args
        self._has_data = has_data
        self.argument_names = names
        self.record = record

    @property
    def losses(self) -> np.ndarray:
        """−ELBO in nats, one estimate a step, shape (steps,)."""
        return self.record.losses

    @property
    def kl(self) -> np.ndarray:
        """KL(q ‖ p(z)) in nats, one estimate a step, shape (steps,): what the latents cost.

        The other part of −ELBO is what the data cost, −E_q log p(x | z) =
        ``losses − kl``, factors included. NaN where the guide needs
        score-function gradients.
        """
        return self.record.kl

    @property
    def stop_reason(self) -> str:
        """Why the fit ended, with figures where it was to find its end: ``optimizer="auto"``."""
        stop = self.record.stop
        return f"all {len(self.losses):,} steps were taken" if stop is None else stop.reason

    @property
    def params(self) -> dict[str, Tensor]:
        """The fitted parameters by name, in the user's (constrained) space."""
        return self._program.params.constrained(self._flat)

    @property
    def unconstrained_params(self) -> dict[str, Tensor]:
        """The fitted parameters by the same names, as the optimiser moves them: any real numbers.

        Flattened and joined in this order they are θ, shape (P,). A scale σ, for
        one, is kept as the number whose softplus or exponential it is.

        >>> from guides import mean_field_normal
        >>> from inference import fit
        >>> from ppl_models import linear_regression
        >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
        >>> guide = mean_field_normal(linear_regression)
        >>> posterior = fit(linear_regression, guide, x, x[:, 0], steps=10, progress=False)
        >>> name = "AutoNormal.scales.bias"
        >>> bool(posterior.params[name] > 0), bool(posterior.unconstrained_params[name] > 0)
        (True, False)
        """
        return {name: view.clone() for name, view in self._program.params.named(self._flat).items()}

    @property
    def program(self) -> Program:
        """Model, guide and what one run showed of them."""
        return self._program

    @property
    def model_name(self) -> str:
        """The name of the model function or module."""
        return name_of(self._program.model)

    @property
    def guide_name(self) -> str:
        """The name of the guide function or class."""
        return name_of(self._program.guide)

    @property
    def has_data(self) -> bool:
        """Whether the data of the fit is at hand."""
        return self._has_data

    @property
    def data(self) -> tuple[Any, ...]:
        """The arguments of the fit.

        Raises
        ------
        ValueError
            If the posterior was loaded without them.
        """
        if not self._has_data:
            given = ", ".join(self.argument_names)
            raise ValueError(f"this posterior was loaded without its data: pass it, load(path, model, guide, {given})")
        return self._args

    @property
    def observed_site(self) -> str:
        """The name of the one observed site.

        Raises
        ------
        ValueError
            If there is none, or several.
        """
        sites = [site.name for site in self._program.observed]
        if len(sites) == 1:
            return sites[0]
        raise ValueError(f"the model observes {sites or 'no site'}: pass site= with the name of one to predict")

    def sample(self, draws: int = 1000, *, seed: int = 0) -> dict[str, Tensor]:
        """Draw from q(z): ``{site: tensor of shape (S, *site shape)}``, in the model's own space."""
        with self._running(seed):
            drawn = Latents(self._program, self._args).draw(_count(draws), self._args)
        return {name: value.cpu() for name, value in drawn.items()}

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
        if self._program.is_point:
            raise ValueError(f"the guide {self.guide_name!r} puts all its mass on one point, it has no density")
        points, leading = as_points(values, self._program)
        with self._running(0):
            found = log_density(self._program.guide, self._args, points)
        return found.reshape(leading).cpu()

    def predict(
        self,
        *new_data: Any,
        draws: int = 1000,
        seed: int = 0,
        site: str | None = None,
        batch_size: int | None = None,
        per_row: bool = False,
        progress: bool = True,
    ) -> Prediction | ClassPrediction:
        """The posterior predictive at new rows, ``draws`` functions of all of them.

        Each draw of z is used for every row, so a draw is a function. Latents
        of single rows, where the guide does not take the new rows, are drawn
        from the model given the shared ones.

        Parameters
        ----------
        new_data
            The model's arguments without the observed one, as ``predict(x_new)``.
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

        Raises
        ------
        ValueError
            If the new data has other columns than the fit, or does not fit the model.
        """
        args = self._new_arguments(new_data)
        return self._predictive(args, draws, seed, site, batch_size, per_row, progress)

    def predict_data(
        self,
        *,
        draws: int = 1000,
        seed: int = 0,
        site: str | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> Prediction | ClassPrediction:
        """The posterior predictive at the rows of the fit, for posterior-predictive checks."""
        return self._predictive(self.data, draws, seed, site, batch_size, False, progress)

    @property
    def is_autoencoder(self) -> bool:
        """Whether the model observes what the guide encodes, so that rows are remade rather than predicted."""
        sites = self._program.observed
        return hasattr(self._program.guide, "encode") and len(sites) == 1 and sites[0].argument == 0

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
        under the model: :class:`~inference.autoencoder.EvidenceScores`.

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
        *inputs, observed = test
        if draws is None:
            _, draws = affordable(max(1, len(observed)), self._program.params.size, 1000)
        if self.is_autoencoder:
            code = self.encode(*test, batch_size=batch_size)
            with self._autoencoding(seed, batch_size) as autoencoder:
                bounds = autoencoder.evidence(self._new_arguments(test), _count(draws), progress)
            return HeldOutRows(code, torch.as_tensor(np.asarray(test[0])), evidence_scores(code, *bounds, draws))
        prediction = self.predict(*inputs, draws=draws, seed=seed, batch_size=batch_size, progress=progress)
        y = torch.as_tensor(np.asarray(observed))
        if isinstance(prediction, ClassPrediction):
            return HeldOut(prediction, y, class_scores(prediction, y), tuple(inputs))
        likelihood = self.log_likelihood(*test, draws=draws, seed=seed, batch_size=batch_size)[self.observed_site]
        return HeldOut(prediction, y, scores(prediction, y, likelihood), tuple(inputs))

    def prior(self, draws: int = 1000, *, seed: int = 0, rows: int | None = None) -> dict[str, Tensor]:
        """Draw latents and observations from the model before the data, ``{site: (S, *site shape)}``.

        At all rows of the fit, or the first ``rows``. Empty where a prior is
        flat, which nothing can be drawn from.
        """
        data = tuple(value[:rows] if isinstance(value, Tensor) and value.dim() else value for value in self.data)
        names = {site.name for site in (*self._program.latents, *self._program.observed)}
        model = poutine.uncondition(self._program.model)

        def run(_: object) -> dict[str, Tensor]:
            nodes = poutine.trace(model).get_trace(*data).nodes
            return {name: node["value"] for name, node in nodes.items() if name in names}

        with self._running(seed):
            try:
                found: dict[str, Tensor] = for_each_draw(run, {}, _count(draws), draws_together(data))
                return found
            except NotImplementedError:
                return {}

    def observed_values(self) -> dict[str, Tensor]:
        """What the model observed in the fit, ``{site: tensor}``."""
        sites = self._program.observed
        if all(site.argument is not None for site in sites):
            return {site.name: self.data[site.argument or 0] for site in sites}
        with self._running(0):
            model_trace, _ = traces(self._program.model, self._program.guide, self.data)
        return {name: site["value"] for name, site in observed_nodes(model_trace).items()}

    def inputs(self) -> dict[str, Tensor]:
        """The tensors among the arguments of the fit that the model does not observe, by argument name."""
        observed = {site.argument for site in self._program.observed}
        pairs = enumerate(zip(self.argument_names, self.data, strict=True))
        return {name: value for i, (name, value) in pairs if isinstance(value, Tensor) and i not in observed}

    def log_likelihood(
        self, *data: Any, draws: int = 1000, seed: int = 0, batch_size: int | None = None
    ) -> dict[str, Tensor]:
        """The log likelihood log p(yₙ | zₛ) in nats, ``{observed site: (S, N, …)}``.

        On ``data``, given in the order of the fit, or else on the data of the
        fit; ``batch_size`` rows at a time, as in :meth:`predict`.
        """
        args = self._new_arguments(data) if data else self.data
        sites = [site.name for site in self._program.observed]

        def run(batch: Batch) -> dict[str, Tensor]:
            return log_likelihood(batch.model, batch.latents, draws, batch.args, sites)

        parts = list(self._for_batches(run, args, draws, seed, batch_size))
        return {
            site: torch.cat([part[site] for part in parts], 1) if len(parts) > 1 else parts[0][site] for site in sites
        }

    def log_weights(self, draws: int = 1000, *, seed: int = 0) -> Tensor:
        """The log weight log p(x, zₛ) − log q(zₛ) in nats on the full data, shape (S,)."""

        def run(_: object) -> Tensor:
            return log_weight(*traces(self._program.model, self._program.guide, self.data))

        with self._running(seed):
            found: Tensor = for_each_draw(run, {}, _count(draws), draws_together(self.data))
        return found

    def diagnose(self, *, draws: int = 1000, repeats: int = 5, seed: int = 0) -> Diagnosis:
        """Whether the fit can be trusted: a verdict with its numbers, thresholds and reasons."""
        refused = self._no_weights()
        if refused is not None:
            return diagnose(refused, self.losses)
        weights = [self.log_weights(draws, seed=seed + r).numpy() for r in range(_count(repeats, "repeats"))]
        return diagnose(np.stack(weights), self.losses)

    def _no_weights(self) -> NoWeights | None:
        """Why q has no importance weights, where it has none."""
        if self._program.is_point:
            return NoWeights(
                "the guide is a point estimate: it has a best value but no uncertainty", "fit a guide with a spread"
            )
        if self.is_autoencoder and sum(math.prod(site.shape) for site in self._program.latents) > MOST_LATENTS:
            return NoWeights(
                f"{len(self.data[0]):,} rows have latents of their own, too many for weights of all together",
                "compare the ELBO of held-out rows with log_evidence: posterior.evaluate(x_test)",
            )
        reason = getattr(self._program.guide, "no_common_density", None)
        return NoWeights(reason, "judge it by rows that were held out: posterior.evaluate(x, y)") if reason else None

    def to_arviz(self, *, draws: int = 1000, seed: int = 0) -> Any:
        """InferenceData (ArviZ 0.x) or DataTree (1.x) of every group; see :func:`inference.arviz_export.to_arviz`."""
        return to_arviz(self, draws, seed)

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
        program = self._program
        manifest = {
            "model": self.model_name,
            "guide": self.guide_name,
            "dtype": str(program.dtype).removeprefix("torch."),
            "arguments": [storage.describe(n, v) for n, v in zip(self.argument_names, self._args, strict=True)],
            "seconds": self.record.seconds,
            "seed": self.record.seed,
            "options": self.record.options,
            "evaluations": self.record.evaluations,
            "stop": None if self.record.stop is None else asdict(self.record.stop),
            "starts": [loss if math.isfinite(loss) else None for loss in self.record.starts],
        }
        traces = {"losses": torch.from_numpy(self.losses), "kl": torch.from_numpy(self.kl)}
        return storage.write(Path(path), program.params.named(self._flat), traces, manifest)

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
        >>> from inference.numpy_predictor import load
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
        asked = Asked.of(
            *(self._program, self._flat, self._args, self.argument_names, self._has_data),
            *(site, _count(draws), seed_number(seed)),
        )
        return write_predictor(asked, Path(path), {"model": self.model_name, "guide": self.guide_name})

    @contextmanager
    def _running(self, seed: int) -> Iterator[None]:
        set_training(self._program.guide, False)
        with torch.no_grad(), self._program.running(self._flat, RandomStream.seeded(seed_number(seed))):
            yield

    @contextmanager
    def _autoencoding(self, seed: int, batch_size: int | None) -> Iterator[Autoencoder]:
        with self._running(seed):
            yield Autoencoder(self._program, self._args, self.observed_site, self._batch_size(batch_size))

    def _batch_size(self, given: int | None) -> int | None:
        """The most rows to run at a time: what was asked for, else that of the fit, else all."""
        size = self.record.options.get("batch_size") if given is None else given
        return None if size is None else positive_integer(size, "batch_size")

    def _predictive(
        self,
        args: tuple[Any, ...],
        draws: int,
        seed: int,
        site: str | None,
        batch_size: int | None,
        per_row: bool,
        progress: bool,
    ) -> Prediction | ClassPrediction:
        wanted = site or self.observed_site

        def run(batch: Batch) -> Prediction | ClassPrediction:
            return predictive(batch.model, batch.latents, draws, batch.args, wanted)

        return joined(list(self._for_batches(run, args, draws, seed, batch_size, per_row, progress)))

    def _for_batches(
        self,
        run: Callable[[Batch], T],
        args: tuple[Any, ...],
        draws: int,
        seed: int,
        batch_size: int | None,
        per_row: bool = False,
        progress: bool = False,
    ) -> Iterator[T]:
        """``run`` on one batch of rows after the other; errors say whose code failed, and on which shapes."""
        size = self._batch_size(batch_size)
        latents = Latents(self._program, self._args)
        with (
            self._running(seed),
            tqdm(desc="predict", total=row_count(args), unit="row", delay=1, leave=False, disable=not progress) as bar,
        ):
            for batch in latents.batches(_count(draws), args, size, per_row):
                yield named_failure("model", self._program.model, batch.args, partial(run, batch))
                bar.update(row_count(batch.args) or 1)

    def _new_arguments(self, data: tuple[Any, ...]) -> tuple[Any, ...]:
        """``data`` as the model takes it, checked against the fit, what is missing given as None."""
        names = self.argument_names[: len(data)] + [f"argument {i}" for i in range(len(self.argument_names), len(data))]
        args = as_tensors(data, names, self._program.device, self._program.dtype, shared=True)
        check_new_shapes(args, self.argument_names, [_shape(value) for value in self._args])
        for site in self._program.observed:
            if site.argument is not None and site.argument < len(args) and args[site.argument] is not None:
                site.refuse_impossible(args[site.argument])
        return args + (None,) * (len(self._args) - len(args))


def load(path: str | Path, model: Model, guide: Model, *data: Any, device: str | torch.device = "auto") -> Posterior:
    """The posterior that :meth:`Posterior.save` wrote, bound to ``model`` and ``guide``.

    No data and no training step is needed to sample and predict. Give the data
    of the fit, as to ``fit``, for what looks at it: :meth:`Posterior.diagnose`,
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
    pieces, traces, manifest = storage.read(folder)
    where, kind = device_for(device, model, guide), as_dtype(manifest["dtype"])
    names = argument_names(model, len(manifest["arguments"]))
    raw = data or tuple(storage.placeholder(entry, folder) for entry in manifest["arguments"])
    args = as_tensors(raw, argument_names(model, len(raw)), where, kind)
    stream = RandomStream.seeded(manifest["seed"])
    start = clone(guide)
    if isinstance(start, AutoLaplaceApproximation):
        start = AutoMultivariateNormal(start.model)
    program = Program.start(model, start, args, stream, where, kind, check_values=False)
    flat = storage.assemble(folder, program.params, pieces).to(where)
    starts = tuple(math.inf if loss is None else loss for loss in manifest["starts"])
    curves = (traces["losses"].numpy(), traces["kl"].numpy())
    stop = None if manifest["stop"] is None else Stop(**manifest["stop"])
    record = FitRecord(
        *curves, manifest["seconds"], manifest["seed"], manifest["options"], starts, manifest["evaluations"], stop
    )
    return Posterior(program, flat, args, names, record, has_data=bool(data))


def _count(draws: int, name: str = "draws") -> int:
    return positive_integer(draws, name)


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
