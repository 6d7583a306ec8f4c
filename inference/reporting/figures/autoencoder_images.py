"""Figures of an autoencoder: what codes remember, what the model makes, what each number does, where the codes lie."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from inference.reporting.figures.image_grids import show_tiles
from inference.reporting.figures.style import BLUE, GREY

__all__ = ["code_map", "reconstructions", "samples", "traversal"]

MOST_POINTS = 5000


def reconstructions(axes: Axes, originals: np.ndarray, remade: np.ndarray, columns: int = 12) -> None:
    """Each image, (N, H, W), over what its code remembers of it."""
    lines = [slice(begin, begin + columns) for begin in range(0, len(originals), columns)]
    tiles = np.concatenate(
        [part for line in lines for part in (_full(originals[line], columns), _full(remade[line], columns))]
    )
    show_tiles(axes, tiles, columns=columns)
    axes.set_title("each line of originals, over what their codes remember", fontsize=9)


def _full(images: np.ndarray, columns: int) -> np.ndarray:
    blank = np.zeros((columns - len(images), *images.shape[1:]), images.dtype)
    return np.concatenate([images, blank])


def samples(axes: Axes, images: np.ndarray, columns: int = 12) -> None:
    """Images that the model makes of codes from the prior."""
    show_tiles(axes, images, columns=columns)
    axes.set_title("made from codes of the prior", fontsize=9)


def traversal(axes: Axes, images: np.ndarray, numbers: list[int], places: np.ndarray) -> None:
    """Images (numbers, places, H, W): one line a number of the code, which goes through ``places``, the others at 0."""
    lines, steps = images.shape[:2]
    show_tiles(axes, images.reshape(-1, *images.shape[2:]), columns=steps)
    height, width = (side / count for side, count in zip(_extent(axes), (lines, steps), strict=True))
    axes.set_axis_on()
    axes.set_yticks([(i + 0.5) * height - 0.5 for i in range(lines)], [f"z[{number}]" for number in numbers])
    axes.set_xticks([(i + 0.5) * width - 0.5 for i in range(steps)], [f"{place:g}" for place in places])
    axes.tick_params(length=0, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("one number of the code at a time, the others at 0", fontsize=9)


def _extent(axes: Axes) -> tuple[int, int]:
    height, width = axes.get_images()[0].get_array().shape[:2]  # type: ignore[union-attr]
    return height, width


def code_map(axes: Axes, codes: np.ndarray, groups: Any = None, method: str = "pca", seed: int = 0) -> None:
    """Where the codes, (N, K), lie, by their two leading principal components or by t-SNE; coloured by group.

    Raises
    ------
    ValueError
        Unless ``method`` is ``"pca"`` or ``"tsne"``.
    """
    if method not in ("pca", "tsne"):
        raise ValueError(f"method is {method!r}: pass 'pca' or 'tsne'")
    shown = np.linspace(0, len(codes) - 1, min(MOST_POINTS, len(codes))).astype(int)
    places, names = _flattened(codes[shown], method, seed)
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
            axes.text(
                float(np.median(own[:, 0])),
                float(np.median(own[:, 1])),
                str(kind),
                fontsize=9,
                ha="center",
                va="center",
                bbox=box,
            )
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.tick_params(labelsize=8, colors=GREY)


def _flattened(codes: np.ndarray, method: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    if codes.shape[1] == 1:
        return np.c_[codes, np.zeros(len(codes))], ("z[0]", "")
    if codes.shape[1] == 2:
        return codes, ("z[0]", "z[1]")
    if method == "tsne":
        perplexity = min(30.0, (len(codes) - 1) / 3)
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(codes), ("t-SNE", "t-SNE")
    return PCA(2).fit_transform(codes), ("first component", "second component")
