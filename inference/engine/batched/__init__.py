"""Many fits in one program.

Uses ``engine`` and what is below it; does not decide which fits are requested. Start with ``grouping`` (which fits
share a program), then ``trace_cache`` (each form is traced once), ``stacked_step`` (the program of many fits) and
``runner`` (which runs it on threads).

``torch.func.vmap`` is used where it serves: on the traced graph, for fits that fill the processor's vectors by
themselves, and for every operator without a rule of our own. It does not serve alone. It puts the fits first, so that
the vectors of a small model are as short as its few numbers; the rules of ``engine.tracing.batching_rules`` put the
fits last. (For the particles of a planar flow, which use the same rules, a step took 270 µs by vmap and 101 µs by the
rules, one thread; ``benchmarks/README.md``.) And it knows neither writes to memory, nor numbers that differ between
fits inside an operator, nor data of which constants were computed: removing, replacing and tracing these back is most
of the work here, and would be left.
"""
