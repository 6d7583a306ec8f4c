"""A Pyro model and its guide as functions of one parameter vector: sites, ELBO, densities.

Uses ``utils`` and ``data``; optimises nothing, writes no files and prints nothing. Start with ``bound_model``
(model, guide and parameters after one run), then ``elbo`` (the loss) and ``sites`` (latent and observed sites).
"""
