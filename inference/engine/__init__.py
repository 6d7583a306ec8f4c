"""Engines that take SVI steps, eager or compiled, in one process or several.

Uses every package below it; calls no callbacks, writes no files and makes no reports. Start with ``svi_problem``
(what is optimised, and how), ``engine`` (what all engines share), ``selection`` (which of them) and ``svi_step`` (one
step as a graph), then ``eager`` and ``compiled``.
"""
