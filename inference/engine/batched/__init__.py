"""Many fits in one program.

Uses ``engine`` and what is below it; does not decide which fits are requested. Start with ``grouping`` (which fits
share a program), then ``stacked_step`` (the program of many fits) and ``runner`` (which runs it on threads).
"""
