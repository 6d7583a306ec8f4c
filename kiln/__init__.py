"""Kiln: fit a Pyro model by SVI, then sample, predict, diagnose, report and save.

Every public name is reached from here: ``kiln.fit``, ``kiln.guides.full_rank_normal``, ``kiln.models.VAE``,
``kiln.data.mnist``. Nothing is imported before it is used, so ``import kiln`` takes milliseconds.
"""

# ruff: noqa: F403, F405 - the names of the star import are those of the list below, which a test compares

from __future__ import annotations

import importlib.util
import os.path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from inference import *
    from kiln import data, guides, models

    __version__: str

__all__ = [
    "Calibration",
    "Checkpoint",
    "ClassPrediction",
    "Diagnosis",
    "FitsFailed",
    "GradientCheck",
    "JsonLines",
    "Labels",
    "LivePlot",
    "NonFinite",
    "ParameterTrace",
    "Posterior",
    "Prediction",
    "Progress",
    "Snapshots",
    "StoredClassPrediction",
    "StoredPrediction",
    "TensorBoard",
    "__version__",
    "batches",
    "calibrate",
    "check_gradients",
    "compare_report",
    "cosine_decay",
    "data",
    "every",
    "fit",
    "fit_many",
    "fresh",
    "guides",
    "load",
    "models",
    "open_prediction",
    "plot_loss_contour",
]


def _refuse_hidden_packages() -> None:
    """Raise an ImportError if Python finds a file of the user's under the name of a package of Kiln's.

    All of them are installed in one folder, or lie in one checkout.
    """
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name in ("inference", "guides", "ppl_models"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"Kiln is installed without its package {name!r}. Install kiln-ppl again.")
        found = spec.origin or next(iter(spec.submodule_search_locations or ()))  # a folder of any files has no origin
        own = os.path.join(folder, name)
        if os.path.realpath(found) not in map(os.path.realpath, (own, os.path.join(own, "__init__.py"))):
            raise ImportError(
                f"{found} has the name of Kiln's own package {name!r}, which Python cannot find because of it. "
                "Rename it, and the imports of it."
            )


_refuse_hidden_packages()


if not TYPE_CHECKING:  # a type checker would take any name for granted

    def __getattr__(name: str) -> object:
        """Import a public name when it is first used."""
        if name in ("data", "guides", "models"):
            value = importlib.import_module(f"kiln.{name}")
        elif name == "__version__":
            from importlib.metadata import version

            value = version("kiln-ppl")
        elif name in __all__:
            value = getattr(importlib.import_module("inference"), name)
        else:
            import difflib

            near = difflib.get_close_matches(name, __all__, 1)
            advice = f"Did you mean kiln.{near[0]}?" if near else "dir(kiln) shows the names that it has."
            raise AttributeError(f"module 'kiln' has no attribute {name!r}. {advice}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
