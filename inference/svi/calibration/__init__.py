"""Simulation-based calibration: many fits to simulated data.

Uses ``svi``. Start with ``sbc`` (the function ``calibrate``), then ``simulation`` (one fit of it).
"""
