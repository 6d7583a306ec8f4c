"""Images in a figure: as tiles, and those that a classifier is surest and least sure of."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from inference.predictive.prediction import ClassPrediction
from inference.reporting.figures.style import ORANGE, STYLE

__all__ = ["as_images", "entropy_grids", "show_tiles"]

COLUMNS = 10
MOST_CLASSES = 20


def as_images(inputs: tuple[Any, ...], image_shape: tuple[int, ...] | None = None) -> np.ndarray | None:
    """The images, (N, H, W) or (N, H, W, 3) from 0 to 1, if the one input is images; None if not.

    Images are (N, H, W), (N, 1, H, W) or (N, 3, H, W), or rows of as many
    numbers as ``image_shape``, (H, W), has pixels.
    """
    if len(inputs) != 1:
        return None
    x = np.asarray(inputs[0])
    if x.ndim == 2 and image_shape is not None and x.shape[1] == np.prod(image_shape):
        x = x.reshape(-1, *image_shape)
    if x.ndim == 4 and x.shape[1] in (1, 3):
        x = np.moveaxis(x, 1, -1) if x.shape[1] == 3 else x[:, 0]
    if x.ndim not in (3, 4) or min(x.shape[1:3]) < 4:
        return None
    low, high = float(x.min()), float(x.max())
    return (x - low) / ((high - low) or 1.0)


def entropy_grids(
    images: np.ndarray, observed: np.ndarray, prediction: ClassPrediction, count: int = 30, classes: Any = None
) -> Figure:
    """For each class its images of the lowest and of the highest predictive entropy, framed where predicted wrongly.

    ``images`` are as :func:`as_images` gives them; ``classes`` are the ones to show, all if left out.
    """
    shown = np.unique(observed)[:MOST_CLASSES] if classes is None else np.atleast_1d(classes)
    entropy, wrong = prediction.entropy.numpy(), prediction.labels.numpy() != observed
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 1.35 * len(shown) + 0.3), layout="constrained")
        panels = figure.subplots(len(shown), 2, squeeze=False)
        for row, label in zip(panels, shown, strict=True):
            own = np.flatnonzero(observed == label)
            ordered = own[np.argsort(entropy[own], kind="stable")]
            few = min(count, len(own) // 2) or 1
            for axes, chosen, name in zip(
                row, (ordered[:few], ordered[::-1][:few]), ("surest", "least sure"), strict=True
            ):
                show_tiles(axes, images[chosen], framed=wrong[chosen])
                low, high = entropy[chosen].min(), entropy[chosen].max()
                axes.set_title(f"{label}, {name}: {low:.2g} to {high:.2g} nats", fontsize=9)
        return figure


def show_tiles(axes: Axes, images: np.ndarray, *, columns: int = COLUMNS, framed: np.ndarray | None = None) -> None:
    """Images as :func:`as_images` gives them, dark on light, line by line; some have a frame."""
    gap = max(1, images.shape[1] // 14)
    height, width = (side + 2 * gap for side in images.shape[1:3])
    lines = -(-len(images) // columns)
    sheet = np.ones((lines * height, columns * width, 3))
    for i, image in enumerate(images):
        top, left = (i // columns) * height, (i % columns) * width
        if framed is not None and framed[i]:
            sheet[top : top + height, left : left + width] = to_rgb(ORANGE)
        tile = image if image.ndim == 3 else 1 - image[..., None]
        sheet[top + gap : top + height - gap, left + gap : left + width - gap] = tile
    axes.imshow(sheet, interpolation="none")
    axes.set_axis_off()
