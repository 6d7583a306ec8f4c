"""Callbacks that watch a fit while it runs.

Uses ``posterior`` and what is below it; does not change how steps are taken. Start with ``base``; every other module
is one callback.
"""
