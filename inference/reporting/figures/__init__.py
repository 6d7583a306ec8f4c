"""One function, one figure.

Uses ``utils``, ``diagnostics`` and ``predictive``; computes no statistics and runs no model. Start with ``style``,
which all figures share, then ``posterior_plots``.
"""
