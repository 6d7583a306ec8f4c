"""The contract with guides, models and distributions: what they may have beside being called, by structural types.

None of it is required, and nobody has to import anything from here: a guide or a model that has the members of a
protocol is used accordingly. Ask with :func:`supports`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Protocol, TypeGuard, TypeVar

from torch import Tensor

__all__ = [
    "HasImageShape",
    "HasLocation",
    "HasScaleTril",
    "HasUsualFit",
    "HasUsualGuide",
    "NoCommonDensity",
    "SupportsDecode",
    "SupportsEncode",
    "SupportsFixed",
    "SupportsRowDraws",
    "supports",
]

T = TypeVar("T")


class SupportsEncode(Protocol):
    """Guide that computes the latents of a row from the row, as :func:`guides.amortized_encoder` builds it."""

    def encode(self, rows: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations of q(z | x), (N, K) each, in the unconstrained space."""


class SupportsDecode(Protocol):
    """Guide whose codes, (M, K), can be turned into values of the model's latents."""

    @property
    def size(self) -> int:
        """K, the numbers of a code."""

    def values(self, codes: Tensor, /) -> dict[str, Tensor]:
        """Return the latents at codes (..., M, K), ``{site: (..., M, *site shape)}``, in the model's own space."""


class SupportsRowDraws(Protocol):
    """Guide that can draw its latents for each row apart, as that of :func:`guides.bernoulli_dropout`."""

    def draw_for_each_row(self, *args: Any) -> Any:
        """Sample every site once for each row of the arguments."""


class NoCommonDensity(Protocol):
    """Guide that has no density with respect to the prior, so that importance weights do not exist."""

    no_common_density: str  # why, as a sentence for the user


class HasScaleTril(Protocol):
    """Guide of a multivariate Normal with a full covariance, given by its Cholesky factor."""

    scale_tril: Tensor  # (D, D), lower triangular


class HasLocation(Protocol):
    """Guide over a vector of latents whose location can be set."""

    loc: Tensor  # (D,)


class HasImageShape(Protocol):
    """Model whose rows are images."""

    image_shape: tuple[int, ...] | None  # (height, width); None for rows that are none


class HasUsualFit(Protocol):
    """Model with options of ``fit`` that suit it, taken where the command line leaves them out."""

    usual_fit: Mapping[str, Any]


class HasUsualGuide(Protocol):
    """Model with a guide that suits it, taken where the command line names none."""

    usual_guide: str  # a name of the entry points ``kiln.guides``


class SupportsFixed(Protocol):
    """Distribution that can cut its parameters off from their gradient, but not the value (sticking the landing)."""

    def fixed(self) -> Any:
        """Return the distribution with its parameters detached."""


def supports(value: object, protocol: Callable[..., T]) -> TypeGuard[T]:
    """Return True if ``value`` has every member of ``protocol``, one of the classes of this module.

    ``isinstance`` of a runtime-checkable protocol overlooks parameters and
    submodules of an ``nn.Module`` from Python 3.12 on; this does not.
    """
    return all(hasattr(value, name) for name in _members(protocol))


@cache
def _members(protocol: type) -> tuple[str, ...]:
    return tuple(name for name in {**vars(protocol), **protocol.__annotations__} if not name.startswith("_"))
