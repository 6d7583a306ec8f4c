"""Where an optimisation begins: mode search, Laplace, Pathfinder, placement of the guide.

Uses ``utils`` and ``model``; takes no SVI step. Start with ``strategies``, which turns the option ``init`` into one
of the others.
"""
