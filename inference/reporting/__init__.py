"""Sections and pages made of results.

Uses ``reporting.figures``, ``predictive`` and ``diagnostics``; fits nothing, and ``export`` does not use it. Start
with ``report``, which lists the sections of the page, and ``section``, what a section is.
"""
