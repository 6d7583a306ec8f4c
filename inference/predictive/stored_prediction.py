"""Predictions on disk, asked as those in memory are, of which no more is read than an answer needs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from inference.predictive.prediction import OF, ClassPrediction, Interval, Labelled, Prediction, Spread, tails
from inference.predictive.zarr_store import SAMPLES, SUMMARY, Field, PredictionStore
from inference.storage.json_document import versions
from inference.utils.arviz_compat import group_container
from inference.utils.validation import one_of

__all__ = ["StoredClassPrediction", "StoredPrediction", "fields_of", "open_prediction"]

FUNCTIONS = "functions"


class _Stored:
    """Base of predictions on disk: their folder, their size and their draws."""

    def __init__(self, store: PredictionStore) -> None:
        self._store = store
        self.path = store.path
        self.site: str = store.about["site"]
        self.keep: str = store.about["keep"]

    def __len__(self) -> int:
        return self._store.rows

    def __repr__(self) -> str:
        size = f"{len(self):,} rows, {self._store.about['draws']:,} draws, keep={self.keep!r}"
        return f"{type(self).__name__}(site={self.site!r}, {size}, in {str(self.path)!r})"

    @property
    def draws(self) -> xr.DataArray:
        """(S, N, …) on disk: one function of all rows a draw, of which what is indexed is read by ``.values``."""
        return self._lazy[f"{self.site}_{FUNCTIONS}"].isel(chain=0)

    @property
    def samples(self) -> xr.DataArray:
        """(S, N, …) on disk: the functions with their noise, or a class drawn from each."""
        return self._lazy[self.site].isel(chain=0)

    def groups(self) -> dict[str, xr.Dataset]:
        """The group ``predictions`` of ArviZ, with nothing read but what numbers its dimensions."""
        dataset = self._lazy
        dataset.attrs |= {"inference_library": "kiln-ppl", "inference_library_version": versions()["kiln-ppl"]}
        return {SAMPLES: dataset.assign_coords({dim: np.arange(size) for dim, size in dataset.sizes.items()})}

    def to_arviz(self) -> Any:
        """InferenceData (ArviZ 0.x) or DataTree (1.x) with the group ``predictions``, whose arrays stay on disk.

        The observations have the name of their site, the functions behind them
        ``{site}_functions``; dimensions are named as in :meth:`Posterior.to_arviz`.

        Raises
        ------
        ValueError
            Where only a summary was kept.
        """
        return group_container(self.groups())

    @property
    def _lazy(self) -> xr.Dataset:
        self._needs_draws("draws")
        options: dict[str, Any] = {"consolidated": False, "chunks": None, "cache": False}
        return xr.open_dataset(self.path, engine="zarr", group=SAMPLES, **options)

    def _needs_draws(self, wanted: str) -> None:
        if self.keep != "draws":
            kept = ", ".join(self._store.names(SUMMARY))
            raise ValueError(f"{self.path} has no {wanted}, only {kept}: predict with keep='draws' for them")

    def _summary(self, name: str) -> Tensor:
        return self._store.read(f"{SUMMARY}/{name}")

    def _drawn(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Functions and samples at some rows."""
        self._needs_draws("draws")
        names = (f"{SAMPLES}/{self.site}_{FUNCTIONS}", f"{SAMPLES}/{self.site}")
        functions, samples = (self._store.read(name, 0, slice(None), rows) for name in names)
        return functions, samples


class StoredPrediction(_Stored, Spread):
    """The posterior predictive at N rows on disk: :class:`Prediction` of ``predict(..., out=)``.

    Mean, epistemic part and noise are kept for each row; draws are where
    ``keep="draws"``, and quantiles where ``keep="summary"``.
    """

    @property
    def mean(self) -> Tensor:
        """E[y | x], shape (N, …)."""
        return self._summary("mean")

    @property
    def epistemic(self) -> Tensor:
        """Var_z E[y | x, z], shape (N, …): what more data would reduce."""
        return self._summary("epistemic")

    @property
    def noise(self) -> Tensor:
        """E_z Var[y | x, z], shape (N, …): the variance that stays when z is known."""
        return self._summary("noise")

    def at(self, rows: slice) -> Prediction:
        """The prediction at some of the rows, in memory."""
        noise = self._store.read(f"{SUMMARY}/noise", rows)
        return Prediction(self.site, *self._drawn(rows), noise)

    def interval(self, prob: float = 0.9, of: str = "observations") -> Interval:
        """As :meth:`Prediction.interval`, read one batch of rows after the other.

        Raises
        ------
        ValueError
            As there; also where quantiles were kept, and not those of ``prob``.
        """
        wanted = tails(prob)
        one_of(of, "of", OF)
        if self.keep == "draws":
            parts = [self.at(rows).interval(prob, of) for rows in self._store.parts]
            return Interval(torch.cat([part.lower for part in parts]), torch.cat([part.upper for part in parts]))
        kept = self._store.about["quantiles"]
        places = [i for tail in wanted for i, level in enumerate(kept) if abs(level - tail) < 1e-9]
        if len(places) < len(wanted):
            raise ValueError(
                f"{self.path} has the quantiles {kept}, and the interval of {prob:g} goes from {wanted[0]:.6g} to "
                f"{wanted[1]:.6g}: predict with these among quantiles=, or with keep='draws'"
            )
        return Interval(*(self._store.read(f"{SUMMARY}/{of}", place) for place in places))


class StoredClassPrediction(_Stored, Labelled):
    """Class probabilities at N rows on disk: :class:`ClassPrediction` of ``predict(..., out=)``."""

    @property
    def probs(self) -> Tensor:
        """p(class | x), shape (N, C)."""
        return self._summary("probs")

    @property
    def entropy(self) -> Tensor:
        """H[y | x] in nats, shape (N,): all uncertainty about the class."""
        return self._summary("entropy")

    @property
    def mutual_information(self) -> Tensor:
        """I[y; z | x] in nats, shape (N,): the part that more data would reduce."""
        return self._summary("mutual_information")

    @property
    def variation_ratio(self) -> Tensor:
        """1 − f/S, shape (N,): the share of the S sampled classes that are not the most frequent one."""
        return self._summary("variation_ratio")

    def at(self, rows: slice) -> ClassPrediction:
        """The prediction at some of the rows, in memory."""
        return ClassPrediction(self.site, *self._drawn(rows))


def open_prediction(path: str | Path) -> StoredPrediction | StoredClassPrediction:
    """Open what ``posterior.predict_to(path, ...)`` wrote.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is unfinished, something else, or damaged.

    Examples
    --------
    >>> import tempfile
    >>> import kiln
    >>> from kiln.guides import mean_field_normal
    >>> from kiln.models import linear_regression as model
    >>> x = torch.linspace(-1, 1, 30).reshape(-1, 1)
    >>> posterior = kiln.fit(model, mean_field_normal(model), x, x[:, 0], steps=50, progress=False)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     posterior.predict(x, draws=200, out=f"{folder}/pred.zarr").mean.shape
    ...     p = open_prediction(f"{folder}/pred.zarr")
    ...     p.interval(0.9).lower.shape, p.draws[3].values.shape
    torch.Size([30])
    (torch.Size([30]), (30,))
    """
    store = PredictionStore.open(Path(path))
    if not store.is_finished:
        raise ValueError(
            f"{path} is unfinished, {store.whole:,} of {store.rows:,} rows are there: repeat the call that writes it "
            "with resume=True (or --resume)"
        )
    store.refuse_gaps()
    return StoredClassPrediction(store) if store.about["kind"] == "classes" else StoredPrediction(store)


def fields_of(
    found: Prediction | ClassPrediction, dims: tuple[str, ...], keep: str, quantiles: tuple[float, ...]
) -> dict[str, Field]:
    """Return the arrays to keep of a prediction at some rows; ``dims`` are the names of y's dimensions, rows first."""
    fields: dict[str, Field] = {}
    for name, value in _summaries(found).items():
        fields[f"{SUMMARY}/{name}"] = Field(value, 0, _dims(dims, found.site, value.dim()))
    if keep == "draws":
        drawn = {found.site: found.samples, f"{found.site}_{FUNCTIONS}": found.draws}
        for name, value in drawn.items():
            names = ("chain", "draw", *_dims(dims, found.site, value.dim() - 1))
            fields[f"{SAMPLES}/{name}"] = Field(value[None], 2, names)
    elif isinstance(found, Prediction):
        for of in OF:
            value = found.quantiles(quantiles, of)
            fields[f"{SUMMARY}/{of}"] = Field(value, 1, ("quantile", *_dims(dims, found.site, value.dim() - 1)))
    return fields


def _summaries(found: Prediction | ClassPrediction) -> Mapping[str, Tensor]:
    values = ("mean", "epistemic", "noise")
    classes = ("probs", "entropy", "mutual_information", "variation_ratio")
    return {name: getattr(found, name) for name in (values if isinstance(found, Prediction) else classes)}


def _dims(dims: tuple[str, ...], site: str, count: int) -> tuple[str, ...]:
    """Names of ``count`` dimensions, that of the classes last; none has the name of a variable."""
    taken = {site, f"{site}_{FUNCTIONS}"}
    named = (*dims, f"{site}_class")[:count]
    return tuple(f"{dim}_dim" if dim in taken else dim for dim in named)
