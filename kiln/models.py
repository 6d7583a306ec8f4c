"""Pyro models, ready to be fitted.

``vae`` and ``dropout_networks`` are the modules of the models :class:`VAE`, :class:`DropoutCNN` and
:class:`DropoutRegression`; the other models are functions.
"""

import ppl_models
from ppl_models import *  # noqa: F403
from ppl_models import dropout_networks, vae

__all__ = ["dropout_networks", "vae"]
__all__ += ppl_models.__all__
