"""Rules that turn a gradient into a step: optimisers, schedules, automatic step sizes, stopping.

Uses ``utils``, ``model`` and ``optim.initialization``; does not know which engine runs a rule. Start with
``optimizers`` (by name or by call, and their steps as tensor operations) and ``adaptive`` (the base of the automatic
rules).
"""
