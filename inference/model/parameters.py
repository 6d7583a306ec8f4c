"""Named, constrained parameters as one flat vector, apart from Pyro's global store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints, transform_to

__all__ = ["Params"]


@dataclass(frozen=True)
class Params:
    """The parameters of a model and its guide, laid out in one flat vector θ of P numbers.

    ``leaves`` are the unconstrained tensors that Pyro's store and the modules
    hold. While :meth:`bound`, each is a view of θ, so a change of θ is a change
    of every parameter; before and after, they hold what the user left in them,
    and Pyro's global store is as it was found.
    """

    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    constraints: tuple[constraints.Constraint, ...]

    @classmethod
    def discover(cls, run: Callable[[], object]) -> Params:
        """The parameters that ``run()`` registers in an empty store.

        Raises
        ------
        ValueError
            If the parameters are of more than one dtype, which one vector cannot hold.
        """
        store = pyro.get_param_store()
        with store.scope():
            run()
            leaves = dict(store.named_parameters())
            kinds = dict(store.get_state()["constraints"])
        dtypes = {leaf.dtype for leaf in leaves.values()}
        if len(dtypes) > 1:
            found = ", ".join(f"{name} is {leaf.dtype}" for name, leaf in leaves.items())
            raise ValueError(f"all parameters must have one dtype, found {found}: pass dtype= or convert them")
        return cls(tuple(leaves), tuple(leaves.values()), tuple(kinds[n] for n in leaves))

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(leaf.numel() for leaf in self.leaves)

    def flatten(self) -> Tensor:
        """θ, shape (P,), as the leaves hold it now."""
        if not self.leaves:
            return torch.zeros(0)
        return torch.cat([leaf.detach().reshape(-1) for leaf in self.leaves])

    def views(self, flat_params: Tensor) -> list[Tensor]:
        """Slices of ``flat_params``, one in each parameter's unconstrained shape, sharing its memory."""
        pieces = flat_params.split([leaf.numel() for leaf in self.leaves]) if self.leaves else []
        return [piece.view(leaf.shape) for piece, leaf in zip(pieces, self.leaves, strict=True)]

    def named(self, flat_params: Tensor) -> dict[str, Tensor]:
        """Name → the view of ``flat_params`` that is this parameter, unconstrained."""
        return dict(zip(self.names, self.views(flat_params), strict=True))

    def constrained(self, flat_params: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Name → value in the user's space, as ``pyro.param`` would return it; of these ``names``, or else all.

        Raises
        ------
        ValueError
            If there is no parameter of a name.
        """
        kinds = dict(zip(self.names, zip(self.constraints, self.views(flat_params), strict=True), strict=True))
        chosen = self.names if names is None else self.known(names)
        parts = ((name, *kinds[name]) for name in chosen)
        return {name: transform_to(kind)(view).detach().clone() for name, kind, view in parts}

    def known(self, names: Sequence[str]) -> Sequence[str]:
        """``names``, or a ValueError that says which there are."""
        unknown = [name for name in names if name not in self.names]
        if unknown:
            raise ValueError(f"there is no parameter {unknown[0]!r}: give names among {list(self.names)}")
        return names

    def only(self, names: Sequence[str]) -> Params:
        """The layout of a θ that holds no other parameters than these."""
        places = [self.names.index(name) for name in self.known(names)]
        return Params(tuple(names), tuple(self.leaves[i] for i in places), tuple(self.constraints[i] for i in places))

    def unconstrained(self, values: dict[str, Tensor]) -> Tensor:
        """The flat vector, shape (P,), of values in the user's space (inverse of :meth:`constrained`)."""
        parts = zip(self.names, self.constraints, strict=True)
        return torch.cat([transform_to(kind).inv(values[name]).detach().reshape(-1) for name, kind in parts])

    def replaced(self, flat_params: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """``flat_params`` with some parameters at other values, given by name in the user's space."""
        other = flat_params.clone()
        for name, kind, view in zip(self.names, self.constraints, self.views(other), strict=True):
            if name in values:
                view.copy_(transform_to(kind).inv(values[name]).reshape(view.shape))
        return other

    def hold(self, flat_params: Tensor) -> None:
        """Let the leaves hold θ from now on, before and after they are bound to a vector."""
        with torch.no_grad():
            for leaf, view in zip(self.leaves, self.views(flat_params), strict=True):
                if not torch.equal(leaf, view):  # a module of the user's is not written to without need
                    leaf.copy_(view)

    @contextmanager
    def bound(self, flat_params: Tensor, grad: Tensor | None = None) -> Iterator[None]:
        """Let model and guide read their parameters from ``flat_params`` and write gradients to ``grad``.

        Raises
        ------
        ValueError
            If a parameter appears that was not there when they were discovered.
        """
        store = pyro.get_param_store()
        outside = [(leaf.data, leaf.grad) for leaf in self.leaves]
        state = {
            "params": dict(zip(self.names, self.leaves, strict=True)),
            "constraints": dict(zip(self.names, self.constraints, strict=True)),
        }
        with store.scope(state):
            try:
                grads = [None] * len(self.leaves) if grad is None else self.views(grad)
                for leaf, data, gradient in zip(self.leaves, self.views(flat_params), grads, strict=True):
                    leaf.grad = None
                    leaf.data = data
                    leaf.grad = gradient
                yield
                self._refuse_newcomers(store.keys())
            finally:
                for leaf, (data, gradient) in zip(self.leaves, outside, strict=True):
                    leaf.grad = None
                    leaf.data = data
                    leaf.grad = gradient

    def _refuse_newcomers(self, found: Any) -> None:
        unknown = sorted(set(found) - set(self.names))
        if unknown:
            raise ValueError(
                f"parameters {unknown} appeared only after the first run: "
                "model and guide must create all their parameters at every call"
            )
