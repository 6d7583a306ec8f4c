"""Everything that is answered by running the fitted approximation.

Uses ``diagnostics`` and what is below it; renders nothing, exports nothing and fits nothing. Start with
``approximation``, then ``posterior_predictive`` (predictions in memory) and ``streaming`` (predictions on disk).
"""
