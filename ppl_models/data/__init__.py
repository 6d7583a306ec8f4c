"""Data sets that models are shown on, and readers of tables.

Start with ``datasets``; ``tables`` reads CSV, NPZ and Parquet files, ``download`` finds or fetches files.
"""
