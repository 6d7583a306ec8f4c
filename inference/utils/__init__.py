"""Helpers that would make sense in any Python project.

Checks of options, errors, text, random state, worker processes, signals and the two ArviZ generations. This package
knows nothing of models, guides or fits, and imports no other package of ``inference``. Start with ``validation``.
"""
