"""Numbers and tests that judge a fit.

Uses ``utils``, ``data``, ``model``, ``optim`` and ``engine``; draws no figures and makes no predictions. Start with
``checks`` (what is computed) and ``verdict`` (what follows from it).
"""
