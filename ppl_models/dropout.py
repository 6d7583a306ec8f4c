"""A network with dropout as a Bayesian model: its masks are latent sites, its weights have a Gaussian prior."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

__all__ = ["DropoutNetwork"]


class DropoutNetwork(nn.Module):
    """A network of yours whose ``nn.Dropout`` layers become named Bernoulli masks, as a Pyro model ``(x, y=None)``.

    Dropout is variational inference: q sets a unit's outgoing weights M to zero
    with the dropout probability 1 − k, and the ELBO is, up to a constant,

    Σₙ log p(yₙ | f(xₙ; masks)) − Σ ½ l² (‖M‖²/k + ‖m‖²),

    with the biases m, N(0, 1/l²) a priori as the weights are, and f as torch
    computes it: kept units are divided by k, so that M is k times the paper's.
    Weights that no mask stands before have k = 1. Fit it with
    :func:`~guides.bernoulli_dropout`.

    Parameters
    ----------
    net
        Any module; it is copied. Each ``nn.Dropout`` in it, at path ``path``,
        becomes the site ``mask.path`` of the shape of its input without rows.
    noise
        σ of the Normal round the network's one output, in the units of y, or
        ``"learned"``, the parameter ``noise``, which starts at the spread of y;
        None if its outputs are the logits of classes.
    length_scale
        l: the larger, the smaller the weights and the smoother f.

    Raises
    ------
    ValueError
        If the network has no ``nn.Dropout``, or another kind of dropout; if
        ``noise`` or ``length_scale`` is not above 0.

    References
    ----------
    Gal, Ghahramani (2016), Dropout as a Bayesian approximation: representing model uncertainty in deep learning.

    Examples
    --------
    >>> import kiln
    >>> from kiln.guides import bernoulli_dropout
    >>> net = nn.Sequential(nn.Linear(1, 20), nn.ReLU(), nn.Dropout(0.1), nn.Linear(20, 1))
    >>> model = DropoutNetwork(net, noise=0.3)
    >>> x = torch.linspace(-1, 1, 50).reshape(-1, 1)
    >>> posterior = kiln.fit(model, bernoulli_dropout(model), x, x[:, 0] ** 2, steps=300, progress=False)
    >>> posterior.sample(10)["mask.2"].shape, posterior.predict(x, draws=10).draws.shape
    (torch.Size([10, 1, 20]), torch.Size([10, 50]))
    """

    usual_guide = "bernoulli_dropout"

    def __init__(self, net: nn.Module, *, noise: float | str | None = None, length_scale: float = 1.0) -> None:
        super().__init__()
        options: dict[str, Any] = {"noise": 1.0 if noise in (None, "learned") else noise, "length_scale": length_scale}
        for name, value in options.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name} is {value!r}: pass a number above 0")
        self.net = copy.deepcopy(net)
        self.noise = noise
        self.length_scale = length_scale
        self._keep: float | Tensor = 1.0
        self._seen: dict[Tensor, float | Tensor] = {}
        self._masks = _mask_dropout(self.net, self)
        if not self._masks:
            raise ValueError(f"{type(net).__name__} has no nn.Dropout layer with 0 < p < 1: put one before a layer")
        for module in self.net.modules():
            if next(module.parameters(recurse=False), None) is not None:
                module.register_forward_pre_hook(self._weigh)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The observations, (N,): numbers, or classes."""
        pyro.module("net", self.net)
        plate = pyro.plate("data", len(x))
        with plate:
            rows = pyro.subsample(x, event_dim=x.dim() - 1)
            observed = pyro.subsample(y, event_dim=0) if y is not None else None
        sigma = self._noise(y)
        self._keep, self._seen = 1.0, {}
        for mask in self._masks:
            mask.calls = 0
        outputs = self.net(rows)
        pyro.factor("weights", -self._decay())
        with plate:
            likelihood = dist.Categorical(logits=outputs) if sigma is None else dist.Normal(outputs.squeeze(-1), sigma)
            return pyro.sample("y", likelihood, obs=observed)

    def _noise(self, y: Tensor | None) -> Any:
        if self.noise != "learned":
            return self.noise
        return pyro.param("noise", lambda: _spread(y), constraint=constraints.positive)

    def _decay(self) -> Tensor:
        squares = [p.square().sum() / self._seen.get(p, 1.0) for p in self.net.parameters()]
        return 0.5 * self.length_scale**2 * torch.stack(squares).sum()

    def _weigh(self, module: nn.Module, _: object) -> None:
        """Note which units a weight matrix stands behind."""
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            self._seen.setdefault(weight, self._keep)
        self._keep = 1.0


def _spread(y: Tensor | None) -> Tensor:
    return torch.ones(()) if y is None or len(y) < 2 else y.std().clamp_min(1e-3)


class _Mask(nn.Module):
    """In the place of ``nn.Dropout``: zeroes units by a sampled mask, one for all rows or one for each."""

    def __init__(self, name: str, keep: float, owner: DropoutNetwork) -> None:
        super().__init__()
        self.name = name
        self.keep = keep
        self.calls = 0
        self._owner = [owner]  # not a submodule

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        name = self.name if self.calls == 1 else f"{self.name}.{self.calls}"  # a layer may be used more than once
        units = dist.Bernoulli(h.new_full((1, *h.shape[1:]), self.keep))
        mask = pyro.sample(name, units.to_event(len(units.batch_shape)))
        # E[k] of a guide that learns it; the paper's weights are W/k₀.
        self._owner[0]._keep = self.keep**2 / mask.mean() if mask.requires_grad else self.keep
        return h * mask / self.keep


def _mask_dropout(net: nn.Module, owner: DropoutNetwork) -> list[_Mask]:
    """Put masks in the place of dropout layers."""
    masks = []
    for path, module in list(net.named_modules()):
        for name, child in module._modules.items():
            where = f"{path}.{name}" if path else name
            if isinstance(child, nn.Dropout):
                if 0 < child.p < 1:
                    masks.append(_Mask(f"mask.{where}", 1 - child.p, owner))
                    setattr(module, name, masks[-1])
            elif child is not None:
                _refuse(child, where)
    return masks


def _refuse(child: nn.Module, where: str) -> None:
    kind = type(child).__name__
    inside = getattr(child, "dropout", None)
    if "dropout" in kind.lower() or (isinstance(inside, float) and inside > 0):
        raise ValueError(f"{where} is {kind}, with dropout of its own: only nn.Dropout can become a mask")
    if isinstance(child, nn.modules.batchnorm._BatchNorm):
        raise ValueError(
            f"{where} is {kind}, whose running statistics are no parameters: use LayerNorm or GroupNorm in its place"
        )
