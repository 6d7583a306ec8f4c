"""Sections on an autoencoder: what its codes remember, what the model makes, what each number of a code does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inference.model.protocols import HasImageShape, supports
from inference.predictive.approximation import Approximation
from inference.predictive.autoencoder import Encoding, EvidenceScores, HeldOutRows, decode, encode, generate
from inference.reporting.figures import image_grids
from inference.reporting.figures.image_grids import as_images
from inference.reporting.figures.style import Axes, drawn
from inference.reporting.section import Section

__all__ = ["TRAVERSED", "EncodedRows", "autoencoder_sections"]

SHOWN, MADE = 24, 48
NUMBERS = 8
TRAVERSED = np.linspace(-3, 3, 13)


class EncodedRows:
    """Rows with their codes, and images of both where rows are images, for the figures of an autoencoder.

    Parameters
    ----------
    posterior
        An autoencoder's.
    rows
        (N, …), such as rows that were held out.
    encoding
        Their codes, if known.
    """

    def __init__(self, posterior: Approximation, rows: Tensor, encoding: Encoding | None = None) -> None:
        self._posterior = posterior
        self.rows = rows
        self.encoding = encode(posterior, rows) if encoding is None else encoding

    @property
    def has_images(self) -> bool:
        """True if rows are images, by their shape or by the model's ``image_shape``."""
        return self._images(self.rows[:1]) is not None

    @property
    def active(self) -> list[int]:
        """The numbers of the code that say most of a row, at most eight, the most telling first."""
        telling = self.encoding.mean.var(0).sort(descending=True).indices.tolist()
        return telling[: min(NUMBERS, max(1, int(self.encoding.active().sum())))]

    def reconstructions(self, axes: Axes) -> None:
        """Of the first rows."""
        remade = decode(self._posterior, self.encoding.mean[:SHOWN])
        both = self._images(torch.cat([self.rows[:SHOWN].to(remade), remade]))
        originals, again = np.split(_required(both), 2)
        image_grids.reconstructions(axes, originals, again)

    def samples(self, axes: Axes) -> None:
        """Of the model."""
        image_grids.samples(axes, _required(self._images(generate(self._posterior, MADE))))

    def traversal(self, axes: Axes) -> None:
        """Through the numbers that say most."""
        z = torch.zeros(len(self.active), len(TRAVERSED), self.encoding.mean.shape[1])
        for i, number in enumerate(self.active):
            z[i, :, number] = torch.from_numpy(TRAVERSED)
        images = _required(self._images(decode(self._posterior, z.flatten(0, 1))))
        image_grids.traversal(axes, images.reshape(*z.shape[:2], *images.shape[1:]), self.active, TRAVERSED)

    def map(self, axes: Axes, groups: Any = None, method: str = "pca") -> None:
        """Of all rows, coloured by ``groups``, (N,)."""
        image_grids.code_map(axes, self.encoding.mean.numpy(), groups, method)

    def _images(self, rows: Tensor) -> np.ndarray | None:
        model = self._posterior.bound_model.model
        return as_images((rows.cpu(),), model.image_shape if supports(model, HasImageShape) else None)


def _required(images: np.ndarray | None) -> np.ndarray:
    if images is None:
        raise ValueError("the rows are not images: give the model an image_shape, (height, width)")
    return images


def autoencoder_sections(
    posterior: Approximation, held_out: HeldOutRows | None, groups: Any = None
) -> Iterator[Section]:
    """The sections of an autoencoder; ``groups`` colour the map of codes, one a row of ``held_out`` or of the fit."""
    if held_out is None:
        kind, encoded = "rows of the fit", EncodedRows(posterior, posterior.data[0])
    else:
        kind, encoded = "rows the fit never saw", EncodedRows(posterior, held_out.observed, held_out.encoding)
        yield _scores(held_out.scores)
    if encoded.has_images:
        reading = f"Some {kind}, and what is left of them in {encoded.encoding.mean.shape[1]} numbers each."
        yield _section("What do its codes remember?", reading, encoded.reconstructions, (7.2, 3.2))
        reading = "Codes drawn from the prior, as the model decodes them: the images should look like the data."
        yield _section("What does the model make?", reading, encoded.samples, (7.2, 3.2))
        reading = (
            f"Of the {int(encoded.encoding.active().sum())} numbers of a code that say anything of a row, those that "
            "say most: each line is what one of them does."
        )
        yield _section("What does each number do?", reading, encoded.traversal, (7.2, 0.55 * len(encoded.active) + 0.7))
    reading = (
        f"The codes of {kind}, seen along the two directions in which they differ most; alike rows should lie together"
        f"{'' if groups is None else ', and each colour in a place of its own'}."
    )
    yield _section("Where do the codes lie?", reading, lambda axes: encoded.map(axes, groups), (7.2, 5.4))


def _section(title: str, reading: str, draw: Callable[[Axes], None], size: tuple[float, float]) -> Section:
    return Section(title, reading, drawn(draw, size), figure_label=title)


def _scores(scores: EvidenceScores) -> Section:
    reading = (
        "On rows the fit never saw: how probable they are under the model. The second bound is the closer one; a wide "
        "gap between the two means that the encoder's Normals do not match the codes' true posteriors."
    )
    error = f"± {2 * scores.standard_error:.2g}"
    rows = [
        ("held-out rows", f"{scores.rows:,}"),
        ("ELBO, nats a row", f"{scores.elbo:.2f}"),
        (f"log p(x), bound from {scores.samples:,} draws a row, nats a row", f"{scores.log_evidence:.2f} {error}"),
        ("numbers of a code that say anything of its row", f"{scores.active} of {scores.size}"),
    ]
    return Section("How well does it describe new rows?", reading, None, rows)
