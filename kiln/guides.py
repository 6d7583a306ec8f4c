"""Guides: the families of distributions that approximate a posterior."""

from guides import *  # noqa: F403
from guides import __all__  # noqa: F401
