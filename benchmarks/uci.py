"""Dropout on UCI by the published protocol: every split and every setting of the grid fitted at once.

    python -m benchmarks.uci --threads 2
    python -m benchmarks.uci --sets yacht --epochs 400

Gal, Ghahramani (2016), Dropout as a Bayesian approximation: one hidden layer of 50 ReLU with dropout on inputs and
hidden units, Adam at 0.001, batches of 128, 4,000 epochs. On each of 20 splits, 12 settings of dropout p and
precision τ are fitted to the first 80 % of the training rows, and the log-likelihood of the rest picks one, which is
fitted again to all of them. The 240 networks are one Pyro model, and so one fit. The data come from the folder named
by KILN_DATA; test rows are looked at once, at the end.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from guides import bernoulli_dropout
from inference import Progress, fit
from ppl_models.data.download import data_folder
from ppl_models.data.tables import load_npz

PUBLISHED = {
    "concrete": ((4.83, 0.16), (-2.937, 0.025)),
    "energy": ((0.54, 0.01), (-1.212, 0.005)),
    "yacht": ((0.67, 0.05), (-1.250, 0.015)),
}
SPLITS, BATCH, HIDDEN, LENGTH_SCALE = 20, 128, 50, 0.01
EPOCHS, PASSES = 4000, 10_000
_CHUNK_NUMBERS = 2**22


@dataclass(frozen=True)
class Rows:
    """Training and test rows of S splits, x (N, S, D) and y (N, S), standardised by each split's training rows.

    ``mean`` and ``sd``, (S,), take y back to its own units, in which ``test_y`` stays.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    sd: Tensor

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> Rows:
        """``train`` and ``test`` hold row numbers, (N, S) and (R, S)."""
        centre, spread = x[train].mean(0), x[train].std(0)
        spread[spread == 0] = 1
        mean, sd = y[train].mean(0), y[train].std(0)
        parts = ((x[train] - centre) / spread, (y[train] - mean) / sd, (x[test] - centre) / spread, y[test], mean, sd)
        return cls(*(torch.as_tensor(part, dtype=torch.float32) for part in parts))


class Networks:
    """S × G separate networks as a Pyro model of x (N, S, D) and y (N, S), with dropout p and precision τ of each.

    log p = −τ/2 Σₙ (yₙ − f(xₙ; masks))² − ¼ l² (1 − p) ‖W‖² + constant, which is −Nτ/2 times the published loss,
    the mean squared error plus λ‖W‖² with λ = l² (1 − p) / 2Nτ. Networks share no parameter, and Adam moves each
    parameter by itself, so each is fitted as if alone.
    """

    def __init__(self, p: Tensor, tau: Tensor) -> None:
        self.splits, self.grid = p.shape
        self.keep, self.tau = 1 - p.flatten(), tau.flatten()

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The observations, (N, S × G)."""
        w1, b1, w2, b2 = self._parameters(x.shape[-1])
        keep = self.keep[:, None, None]
        plate = pyro.plate("data", len(x))
        with plate:
            rows = pyro.subsample(x, event_dim=2)[:, :, None]
            seen = pyro.subsample(y, event_dim=1) if y is not None else None
        mask = self._mask("inputs", x.shape[-1]).unflatten(1, (self.splits, self.grid))
        inputs = (rows * mask).flatten(1, 2).transpose(0, 1)
        hidden = (inputs @ (w1 / keep) + b1).relu() * self._mask("hidden", HIDDEN).transpose(0, 1)
        outputs = ((hidden * (w2 / keep)).sum(-1) + b2).T
        squares = w1.square().sum((1, 2)) + w2.square().sum((1, 2))
        pyro.factor("decay", -0.25 * LENGTH_SCALE**2 * (self.keep * squares).sum())
        observed = seen.repeat_interleave(self.grid, 1) if seen is not None else None
        with plate:
            return pyro.sample("y", dist.Normal(outputs, self.tau.rsqrt()).to_event(1), obs=observed)

    def _parameters(self, features: int) -> list[Tensor]:
        """W₁ (F, D, H), b₁ (F, 1, H), W₂ (F, 1, H) and b₂ (F, 1), started as ``nn.Linear`` does."""
        fits = len(self.keep)
        shapes = {"w1": (fits, features, HIDDEN), "b1": (fits, 1, HIDDEN), "w2": (fits, 1, HIDDEN), "b2": (fits, 1)}
        bounds = {"w1": features**-0.5, "b1": features**-0.5, "w2": HIDDEN**-0.5, "b2": HIDDEN**-0.5}
        starts = {name: dist.Uniform(-bounds[name], bounds[name]).expand(shape) for name, shape in shapes.items()}
        return [pyro.param(name, start.sample) for name, start in starts.items()]

    def _mask(self, name: str, units: int) -> Tensor:
        kept = self.keep[None, :, None].expand(1, -1, units)
        return pyro.sample(f"mask.{name}", dist.Bernoulli(kept).to_event(3))

    def passes(self, params: dict[str, Tensor], x: Tensor, count: int, seed: int) -> Iterator[Tensor]:
        """f of ``count`` draws of the masks, in chunks (F, T, R), for rows x (R, S, D)."""
        generator = torch.Generator().manual_seed(seed)
        keep = self.keep[:, None, None, None]
        first, second = params["w1"][:, None] / keep, params["w2"][:, None].mT / keep
        rows = x.transpose(0, 1).repeat_interleave(self.grid, 0)[:, None]
        chunk = max(1, _CHUNK_NUMBERS // (len(self.keep) * len(x) * HIDDEN))
        for start in range(0, count, chunk):
            draws = keep.expand(-1, min(chunk, count - start), -1, -1)
            masks = [draws.expand(-1, -1, m.shape[2], -1).bernoulli(generator=generator) for m in (first, second)]
            hidden = (rows @ (first * masks[0]) + params["b1"][:, None]).relu()
            yield (hidden @ (second * masks[1])).squeeze(-1) + params["b2"][:, None]


def fitted(networks: Networks, rows: Rows, epochs: int, seed: int, engine: str) -> tuple[dict[str, Tensor], float]:
    """The parameters after Adam, and the µs a step, compiling left out."""
    told: list[Progress] = []
    steps = epochs * math.ceil(len(rows.x) / BATCH)
    options: dict[str, Any] = {"steps": steps, "batch_size": BATCH, "lr": 1e-3, "seed": seed, "engine": engine}
    posterior = fit(networks, bernoulli_dropout(networks), rows.x, rows.y, callbacks=[told.append], **options)
    return posterior.params, told[-1].seconds / steps * 1e6


def scores(networks: Networks, params: dict[str, Tensor], rows: Rows, passes: int, seed: int) -> tuple[Tensor, Tensor]:
    """RMSE of the mean, and mean log-likelihood, of the test rows, (S, G) each, in the units of y.

    log-likelihood = log 1/T Σₜ N(y; fₜ, 1/τ). A mask serves all rows of a pass, which leaves each row's own sum what
    it is with a mask a row.
    """
    parts = (rows.mean[:, None], rows.sd[:, None], rows.test_y.T)
    mean, sd, y = (part.repeat_interleave(networks.grid, 0)[:, None] for part in parts)
    noise = dist.Normal(0.0, networks.tau.rsqrt()[:, None, None], validate_args=False)
    total, log_sum = torch.zeros_like(y[:, 0]), torch.full_like(y[:, 0], -math.inf)
    for chunk in networks.passes(params, rows.test_x, passes, seed):
        f = chunk * sd + mean
        total += f.sum(1)
        log_sum = torch.logaddexp(log_sum, noise.log_prob(y - f).logsumexp(1))
    rmse = (total / passes - y[:, 0]).square().mean(1).sqrt()
    log_likelihood = (log_sum - math.log(passes)).mean(1)
    return rmse.unflatten(0, (-1, networks.grid)), log_likelihood.unflatten(0, (-1, networks.grid))


def run(name: str, epochs: int, passes: int, seed: int, engine: str) -> None:
    """Search the grid, fit the picks, and print their scores beside the published ones."""
    started = time.perf_counter()
    stored = load_npz(data_folder("uci", f"{name}.npz") / f"{name}.npz")
    train, test = (np.stack([stored[f"{part}_{i}"] for i in range(SPLITS)], 1) for part in ("train", "test"))
    cut = int(0.8 * len(train))
    grid = torch.cartesian_prod(*(torch.as_tensor(stored[f"{part}_grid"]).float() for part in ("dropout", "tau")))
    rows = Rows.of(stored["x"], stored["y"], train[:cut], train[cut:])
    networks = Networks(*grid.T[:, None].expand(-1, SPLITS, -1))
    params, search_speed = fitted(networks, rows, epochs, seed, engine)
    picks = grid[scores(networks, params, rows, passes, seed)[1].argmax(1)]
    rows, networks = Rows.of(stored["x"], stored["y"], train, test), Networks(*picks.T[..., None])
    params, speed = fitted(networks, rows, epochs, seed + 1, engine)
    found = scores(networks, params, rows, passes, seed + 1)
    print(
        f"{name}: {SPLITS * (len(grid) + 1)} fits in {time.perf_counter() - started:.0f} s, {search_speed:.0f} µs a "
        f"step of {SPLITS * len(grid)} networks, {speed:.0f} of {SPLITS}{shorter(epochs, passes)}"
    )
    report(found, picks, PUBLISHED[name])


def report(found: tuple[Tensor, Tensor], picks: Tensor, published: tuple[tuple[float, float], ...]) -> None:
    """Mean ± standard error over splits, and whether it is within one published standard error, or better."""
    for label, values, (centre, error), sign in zip(("RMSE", "log-lik."), found, published, (1, -1), strict=True):
        mean, own = float(values.mean()), float(values.std()) / math.sqrt(len(values))
        verdict = "yes" if sign * (mean - centre) <= error else "NO"
        print(f"  {label:<8} {mean:7.3f} ± {own:.3f}   published {centre:7.3f} ± {error:.3f}   reached: {verdict}")
    counts = Counter((round(p, 6), round(tau, 6)) for p, tau in picks.tolist())
    print("  picked   " + ", ".join(f"p={p:g} τ={tau:g} {n}×" for (p, tau), n in counts.most_common()), flush=True)


def shorter(epochs: int, passes: int) -> str:
    """A note where a run is not the whole protocol."""
    note = f"; NOT the whole protocol: {epochs} epochs of {EPOCHS}, {passes} passes of {PASSES}"
    return "" if (epochs, passes) == (EPOCHS, PASSES) else note


def main() -> None:
    """Run the sets asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", choices=PUBLISHED, nargs="+", default=list(PUBLISHED))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--passes", type=int, default=PASSES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("compiled", "eager"), default="compiled")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.sets:
        run(name, options.epochs, options.passes, options.seed, options.engine)


if __name__ == "__main__":
    main()
