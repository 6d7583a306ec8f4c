"""Questions to a model whose rows have latents of their own: encode, decode, generate, and log p(x) of each row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor

from inference.latents import Latents, row_parts
from inference.objective import traces
from inference.predict import ClassPrediction, Prediction, joined, predictive
from inference.program import Program, name_of
from inference.vectorized import draws_together, for_each_draw, rows_together

__all__ = ["Autoencoder", "Encoding"]

SHARED_DRAWS = 100


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
class Autoencoder:
    """A fitted ``program`` and the arguments of its fit; all calls belong inside ``program.running``.

    ``site`` is what the model observes; no more than ``batch_size`` rows are run at a time.
    """

    program: Program
    trained: tuple[Any, ...]
    site: str
    batch_size: int | None

    def encode(self, args: tuple[Any, ...]) -> Encoding:
        """q(z | x) at the rows of ``args``."""
        network = getattr(self.program.guide, "encode", None)
        if network is None:
            name = name_of(self.program.guide)
            raise ValueError(f"the guide {name!r} has no encoder: fit with one that amortized_encoder builds")
        x = next(value for value in args if isinstance(value, Tensor) and value.dim())
        parts = [network(part) for part in x.split(self.batch_size or len(x))]
        mean, std = (torch.cat([part[i].cpu() for part in parts]) for i in range(2))
        return Encoding(mean, std)

    def decode(self, z: Any) -> Tensor:
        """E[x | z] for M values of the one latent of rows, (M, …), averaged over latents that all rows share."""
        name, shape = self._local()
        values = torch.as_tensor(z, device=self.program.device).to(self.program.dtype)
        if values.dim() != len(shape) + 1 or tuple(values.shape[1:]) != shape:
            wanted = ", ".join(["M", *map(str, shape)])
            raise ValueError(f"z has shape {tuple(values.shape)}: give values of {name!r}, shape ({wanted})")
        shared = self._shared(SHARED_DRAWS)
        draws = SHARED_DRAWS if shared else 1
        found = []
        for part in values.split(self.batch_size or max(1, len(values))):
            latents = shared | {name: part.expand(draws, *part.shape)}
            prediction = predictive(self.program.model, latents, draws, self._blank(len(part)), self.site)
            found.append(prediction.mean if isinstance(prediction, Prediction) else prediction.probs)
        return torch.cat(found)

    def generate(self, rows: int) -> Prediction | ClassPrediction:
        """Rows that the model makes: their latents from its prior, shared ones from the posterior; one draw."""
        size = self.batch_size or rows
        counts = [min(size, rows - begin) for begin in range(0, rows, size)]
        shared = self._shared(1)
        return joined([predictive(self.program.model, shared, 1, self._blank(n), self.site) for n in counts])

    def log_evidence(self, args: tuple[Any, ...], samples: int) -> Tensor:
        """log (1/k) Σᵢ p(xₙ, zᵢ)/q(zᵢ | xₙ) of each row in nats, (N,)."""
        shared = sorted(self._names() - self._own().keys())
        if shared:
            raise ValueError(f"all rows share the latents {shared}, without which a row has no density of its own")

        def bound(part: tuple[Any, ...]) -> Tensor:
            weights: Tensor = for_each_draw(lambda _: self._row_weights(part), {}, samples, draws_together(part))
            return torch.logsumexp(weights, 0) - math.log(samples)

        size = self.batch_size and min(self.batch_size, rows_together(args, min(samples, SHARED_DRAWS)))
        return torch.cat([bound(part) for _, part in row_parts(args, size)])

    def _row_weights(self, args: tuple[Any, ...]) -> Tensor:
        """log p(xₙ, zₙ) − log q(zₙ | xₙ) at one draw for each row, without the scale of mini-batches."""
        model_trace, guide_trace = traces(self.program.model, self.program.guide, args)
        return _by_row(model_trace) - _by_row(guide_trace)

    def _own(self) -> dict[str, int]:
        return Latents(self.program, self.trained).row_sites()

    def _names(self) -> set[str]:
        return {site.name for site in self.program.latents}

    def _local(self) -> tuple[str, tuple[int, ...]]:
        """The one latent of rows: its name and its shape without them."""
        own = self._own()
        if len(own) != 1:
            raise ValueError(f"decode and interpolate need a model with one latent of rows, found {sorted(own)}")
        (name,) = own
        return name, next(site.shape[1:] for site in self.program.latents if site.name == name)

    def _shared(self, draws: int) -> dict[str, Tensor]:
        """Draws of the latents that all rows share; none where there are none."""
        shared = self._names() - self._own().keys()
        if not shared:
            return {}
        drawn = Latents(self.program, self.trained).draw(draws, self.trained)
        return {name: drawn[name] for name in shared}

    def _blank(self, rows: int) -> tuple[Any, ...]:
        """Arguments of so many rows whose values no one reads."""
        return tuple(v.new_zeros(rows, *v.shape[1:]) if isinstance(v, Tensor) and v.dim() else v for v in self.trained)


def _by_row(trace: poutine.Trace) -> Tensor:
    terms = [site["fn"].log_prob(site["value"]) for site in trace.nodes.values() if site["type"] == "sample"]
    return torch.stack([term.expand(max(terms, key=Tensor.numel).shape) for term in terms]).sum(0)
