"""User data, in memory, on disk or generated, become tensors of rows.

Uses ``utils``; never runs a model. Start with ``arguments`` (what ``fit`` and ``predict`` accept), then
``batched_dataset`` (rows that are read in batches) and ``batch_loader`` (the batches of one fit).
"""
