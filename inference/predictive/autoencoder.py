"""Questions to a model whose rows have latents of their own: encode, decode, generate, and log p(x) of each row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from tqdm.auto import tqdm

from inference.data.array_conversion import plain_tensor
from inference.model.bound_model import BoundModel, name_of
from inference.model.elbo import traces
from inference.model.vectorization import draws_together, map_over_draws, rows_together
from inference.predictive.approximation import Approximation
from inference.predictive.prediction import ClassPrediction, Prediction
from inference.predictive.sampling import LatentSampler, concatenate, predictive, row_parts
from inference.utils.validation import positive_integer

__all__ = [
    "Autoencoder",
    "Encoding",
    "EvidenceScores",
    "HeldOutRows",
    "decode",
    "encode",
    "evaluate_rows",
    "generate",
    "interpolate",
    "log_evidence",
    "reconstruct",
]

SHARED_DRAWS = 100
ENCODED = 4096  # rows that an encoder takes together, if nothing else was asked for


class Encoding(NamedTuple):
    """q(z | x) of N rows: means and standard deviations of K latent numbers, in the unconstrained space.

    Attributes
    ----------
    mean, std
        (N, K).
    """

    mean: Tensor
    std: Tensor

    def active(self, threshold: float = 0.01) -> Tensor:
        """Which of the K numbers say anything of x: Var over rows of their mean above ``threshold``, shape (K,).

        Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders.
        """
        return self.mean.var(0) > threshold


@dataclass(frozen=True)
class EvidenceScores:
    """How probable held-out rows are under a model with latents of rows.

    ``elbo`` is the mean over rows of E_q log p(x, z)/q(z | x), ``log_evidence``
    that of the importance-weighted bound on log p(x) with ``samples`` draws a
    row, both in nats a row, and ``standard_error`` the latter's over rows.
    ``active`` of the ``size`` numbers of a code say anything of the row.
    """

    rows: int
    elbo: float
    log_evidence: float
    standard_error: float
    samples: int
    active: int
    size: int


@dataclass(frozen=True)
class HeldOutRows:
    """The codes of rows that the fit never saw, the rows, and how probable they are."""

    code: Encoding
    observed: Tensor
    scores: EvidenceScores


def evidence_scores(code: Encoding, elbo: Tensor, bound: Tensor, samples: int) -> EvidenceScores:
    """Means over rows of the two bounds, (N,) each."""
    error = float(bound.std(correction=0)) / math.sqrt(len(bound))
    active = int(code.active().sum())
    return EvidenceScores(
        len(bound), float(elbo.mean()), float(bound.mean()), error, samples, active, code.mean.shape[1]
    )


@dataclass(frozen=True)
class Autoencoder:
    """A fitted ``bound_model`` and the arguments of its fit; all calls belong inside ``bound_model.running``.

    ``site`` is what the model observes; no more than ``batch_size`` rows are run at a time.
    """

    bound_model: BoundModel
    trained: tuple[Any, ...]
    site: str
    batch_size: int | None

    def encode(self, args: tuple[Any, ...]) -> Encoding:
        """q(z | x) at the rows of ``args``."""
        network = self._asked("encode")
        x = next(value for value in args if isinstance(value, Tensor) and value.dim())
        parts = [network(part) for part in x.split(self.batch_size or ENCODED)]
        mean, std = (torch.cat([part[i].cpu() for part in parts]) for i in range(2))
        return Encoding(mean, std)

    def decode(self, z: Any) -> Tensor:
        """E[x | z] for M codes, (M, K), in the space of :meth:`encode`; averaged over latents that all rows share."""
        values_of, size = self._asked("values"), self._asked("size")
        values = plain_tensor(z, "z", self.bound_model.dtype).to(self.bound_model.device, self.bound_model.dtype)
        if values.dim() != 2 or values.shape[1] != size:
            raise ValueError(
                f"z has shape {tuple(values.shape)}: give codes of shape (M, {size}), as encode gives them"
            )
        shared = self._shared(SHARED_DRAWS)
        draws = SHARED_DRAWS if shared else 1
        found = []
        for part in values.split(self.batch_size or max(1, len(values))):
            latents = shared | values_of(part.expand(draws, *part.shape))
            prediction = predictive(self.bound_model.model, latents, draws, self._blank(len(part)), self.site)
            found.append(prediction.mean if isinstance(prediction, Prediction) else prediction.probs)
        return torch.cat(found)

    def generate(self, rows: int) -> Prediction | ClassPrediction:
        """Rows that the model makes: their latents from its prior, shared ones from the posterior; one draw."""
        size = self.batch_size or rows
        counts = [min(size, rows - begin) for begin in range(0, rows, size)]
        shared = self._shared(1)
        return concatenate([predictive(self.bound_model.model, shared, 1, self._blank(n), self.site) for n in counts])

    def evidence(self, args: tuple[Any, ...], samples: int, progress: bool = False) -> tuple[Tensor, Tensor]:
        """The ELBO of each row and log (1/k) Σᵢ p(xₙ, zᵢ)/q(zᵢ | xₙ), both in nats, (N,), from the same k draws."""
        shared = sorted(self._names() - self._own().keys())
        if shared:
            raise ValueError(f"all rows share the latents {shared}, without which a row has no density of its own")

        def bounds(part: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            weights: Tensor = map_over_draws(lambda _: self._row_weights(part), {}, samples, draws_together(part))
            return weights.mean(0), torch.logsumexp(weights, 0) - math.log(samples)

        size = self.batch_size and min(self.batch_size, rows_together(args, min(samples, SHARED_DRAWS)))
        parts = tqdm(row_parts(args, size), desc="log p(x)", unit="batch", delay=1, leave=False, disable=not progress)
        elbo, bound = zip(*(bounds(part) for _, part in parts), strict=True)
        return torch.cat(elbo), torch.cat(bound)

    def _row_weights(self, args: tuple[Any, ...]) -> Tensor:
        """log p(xₙ, zₙ) − log q(zₙ | xₙ) at one draw for each row, without the scale of mini-batches."""
        model_trace, guide_trace = traces(self.bound_model.model, self.bound_model.guide, args)
        return _by_row(model_trace) - _by_row(guide_trace)

    def _own(self) -> dict[str, int]:
        return LatentSampler(self.bound_model, self.trained).row_sites()

    def _names(self) -> set[str]:
        return {site.name for site in self.bound_model.latents}

    def _asked(self, what: str) -> Any:
        found = getattr(self.bound_model.guide, what, None)
        if found is None:
            name = name_of(self.bound_model.guide)
            raise ValueError(f"the guide {name!r} has no encoder: fit with one that amortized_encoder builds")
        return found

    def _shared(self, draws: int) -> dict[str, Tensor]:
        """Draws of the latents that all rows share; none where there are none."""
        shared = self._names() - self._own().keys()
        if not shared:
            return {}
        drawn = LatentSampler(self.bound_model, self.trained).draw(draws, self.trained)
        return {name: drawn[name] for name in shared}

    def _blank(self, rows: int) -> tuple[Any, ...]:
        """Arguments of so many rows whose values no one reads."""
        return tuple(v.new_zeros(rows, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v for v in self.trained)


def encode(approximation: Approximation, *data: Any, batch_size: int | None = None) -> Encoding:
    """Means and standard deviations of q(z | x) at new rows, for a guide of :func:`~guides.amortized_encoder`."""
    args = approximation.check_arguments(data)
    with _running(approximation, 0, batch_size) as autoencoder:
        return autoencoder.encode(args)


def decode(approximation: Approximation, z: Any, *, batch_size: int | None = None, seed: int = 0) -> Tensor:
    """E[x | z], (M, …), for codes (M, K) such as the means that :func:`encode` gives."""
    with _running(approximation, seed, batch_size) as autoencoder:
        return autoencoder.decode(z)


def reconstruct(approximation: Approximation, *data: Any, batch_size: int | None = None) -> Tensor:
    """E[x | z] at the mean of q(z | x): new rows as the few numbers of z remember them."""
    return decode(approximation, encode(approximation, *data, batch_size=batch_size).mean, batch_size=batch_size)


def interpolate(approximation: Approximation, first: Any, last: Any, *, steps: int = 10) -> Tensor:
    """What lies between rows: E[x | z] on straight lines between their codes, (rows, steps, …)."""
    ends = (encode(approximation, first).mean, encode(approximation, last).mean)
    places = torch.linspace(0, 1, positive_integer(steps, "steps"))
    lines = torch.stack([torch.lerp(*ends, float(place)) for place in places], 1)
    found = decode(approximation, lines.flatten(0, 1))
    return found.reshape(*lines.shape[:2], *found.shape[1:])


def generate(approximation: Approximation, rows: int, *, seed: int = 0, batch_size: int | None = None) -> Tensor:
    """Rows that the fitted model makes, E[x | z] at z from its prior, (rows, …)."""
    with _running(approximation, seed, batch_size) as autoencoder:
        found = autoencoder.generate(positive_integer(rows, "rows"))
    return found.draws[0]


def log_evidence(
    approximation: Approximation,
    *data: Any,
    samples: int = 1000,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Tensor:
    """A lower bound of log p(xₙ) in nats for each row, (N,), which rises to it with ``samples``.

    log (1/k) Σᵢ p(xₙ, zᵢ)/q(zᵢ | xₙ) over k draws, for a model whose
    latents are all of single rows; k = 1 is the ELBO of the row.

    References
    ----------
    Burda, Grosse, Salakhutdinov (2016), Importance weighted autoencoders.
    """
    args = approximation.check_arguments(data)
    with _running(approximation, seed, batch_size) as autoencoder:
        return autoencoder.evidence(args, positive_integer(samples, "samples"), progress)[1].cpu()


def evaluate_rows(
    approximation: Approximation,
    args: tuple[Any, ...],
    samples: int,
    *,
    seed: int,
    batch_size: int | None,
    progress: bool,
) -> HeldOutRows:
    """Encode held-out rows, checked ``args``, and say how probable they are from ``samples`` draws a row."""
    code = encode(approximation, *args, batch_size=batch_size)
    with _running(approximation, seed, batch_size) as autoencoder:
        bounds = autoencoder.evidence(args, positive_integer(samples, "draws"), progress)
    return HeldOutRows(code, args[0].cpu(), evidence_scores(code, *bounds, samples))


@contextmanager
def _running(approximation: Approximation, seed: int, batch_size: int | None) -> Iterator[Autoencoder]:
    with approximation.running(seed):
        size = approximation.resolve_batch_size(batch_size)
        yield Autoencoder(approximation.bound_model, approximation.args, approximation.observed_site, size)


def _by_row(trace: poutine.Trace) -> Tensor:
    terms = [site["fn"].log_prob(site["value"]) for site in trace.nodes.values() if site["type"] == "sample"]
    return torch.stack([term.expand(max(terms, key=Tensor.numel).shape) for term in terms]).sum(0)
