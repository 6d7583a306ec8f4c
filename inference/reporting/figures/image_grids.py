"""Images in a figure: those that a classifier is surest and least sure of, and those of an autoencoder."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from inference.predictive.prediction import ClassPrediction
from inference.reporting.figures.style import BLUE, GREY, ORANGE, STYLE

__all__ = ["as_images", "code_map", "entropy_grids", "reconstructions", "samples", "traversal"]

COLUMNS = 10
MOST_CLASSES = 20
MOST_POINTS = 5000  # of a map of codes


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
                _show_tiles(axes, images[chosen], framed=wrong[chosen])
                low, high = entropy[chosen].min(), entropy[chosen].max()
                axes.set_title(f"{label}, {name}: {low:.2g} to {high:.2g} nats", fontsize=9)
        return figure


def _show_tiles(axes: Axes, images: np.ndarray, *, columns: int = COLUMNS, framed: np.ndarray | None = None) -> None:
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


def reconstructions(axes: Axes, originals: np.ndarray, remade: np.ndarray, columns: int = 12) -> None:
    """Each image, (N, H, W), over what its code remembers of it."""
    lines = [slice(begin, begin + columns) for begin in range(0, len(originals), columns)]
    tiles = np.concatenate(
        [part for line in lines for part in (_full(originals[line], columns), _full(remade[line], columns))]
    )
    _show_tiles(axes, tiles, columns=columns)
    axes.set_title("each line of originals, over what their codes remember", fontsize=9)


def _full(images: np.ndarray, columns: int) -> np.ndarray:
    blank = np.zeros((columns - len(images), *images.shape[1:]), images.dtype)
    return np.concatenate([images, blank])


def samples(axes: Axes, images: np.ndarray, columns: int = 12) -> None:
    """Images that the model makes of codes from the prior."""
    _show_tiles(axes, images, columns=columns)
    axes.set_title("made from codes of the prior", fontsize=9)


def traversal(axes: Axes, images: np.ndarray, numbers: list[int], places: np.ndarray) -> None:
    """Images (numbers, places, H, W): one line a number of the code, which goes through ``places``, the others at 0."""
    lines, steps = images.shape[:2]
    _show_tiles(axes, images.reshape(-1, *images.shape[2:]), columns=steps)
    extent = axes.get_images()[0].get_array().shape[:2]  # type: ignore[union-attr]
    height, width = (side / count for side, count in zip(extent, (lines, steps), strict=True))
    axes.set_axis_on()
    axes.set_yticks([(i + 0.5) * height - 0.5 for i in range(lines)], [f"z[{number}]" for number in numbers])
    axes.set_xticks([(i + 0.5) * width - 0.5 for i in range(steps)], [f"{place:g}" for place in places])
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("one number of the code at a time, the others at 0", fontsize=9)


def code_map(axes: Axes, codes: np.ndarray, groups: Any = None, method: str = "pca", seed: int = 0) -> None:
    """Draw the codes, (N, K), by their two leading principal components or by t-SNE; coloured by group.

    Raises
    ------
    ValueError
        Unless ``method`` is ``"pca"`` or ``"tsne"``.
    """
    if method not in ("pca", "tsne"):
        raise ValueError(f"method is {method!r}: pass 'pca' or 'tsne'")
    shown = np.linspace(0, len(codes) - 1, min(MOST_POINTS, len(codes))).astype(int)
    places, names = _in_two_dimensions(codes[shown], method, seed)
    labels = None if groups is None else np.asarray(groups)[shown]
    kinds = [] if labels is None else np.unique(labels).tolist()
    if not 1 < len(kinds) <= 20:
        axes.scatter(places[:, 0], places[:, 1], s=4, color=BLUE, alpha=0.5, lw=0)
    else:
        colours = colormaps["tab10" if len(kinds) <= 10 else "tab20"]
        for i, kind in enumerate(kinds):
            own = places[labels == kind]
            axes.scatter(own[:, 0], own[:, 1], s=5, color=colours(i), alpha=0.6, lw=0, rasterized=True)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colours(i)}
            middle = (float(np.median(own[:, 0])), float(np.median(own[:, 1])))
            axes.text(*middle, str(kind), fontsize=9, ha="center", va="center", bbox=box)
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.tick_params(labelsize=8, colors=GREY)


def _in_two_dimensions(codes: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    if codes.shape[1] == 1:
        return np.c_[codes, np.zeros(len(codes))], ("z[0]", "")
    if codes.shape[1] == 2:
        return codes, ("z[0]", "z[1]")
    if method == "tsne":
        perplexity = min(30.0, (len(codes) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes), ("t-SNE", "t-SNE")
    return PCA(2).fit_transform(codes), ("first component", "second component")
