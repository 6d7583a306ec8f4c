"""The two engines side by side."""

from dataclasses import replace

import torch

from inference.engine.compiled import CompiledEngine
from inference.engine.eager import EagerEngine
from inference.engine.svi_problem import InMemory, SVIProblem
from inference.engine.tracing.random_ops import ReplayRandomOps
from inference.engine.tracing.traced_graph import GraphInput, InputKind
from inference.model.bound_model import BoundModel
from inference.utils.random_state import RandomStream

CPU = torch.device("cpu")


def losses_of_both(model, guide, args, steps=60, dtype=torch.float64, batch_size=None, device=CPU, **options):
    """Losses (and KL) of the compiled and of the eager engine, fed the same random numbers."""
    args = tuple(a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args)
    stream = RandomStream.seeded(0)
    bound_model = BoundModel.start(model, guide, args, stream, device, dtype)
    data = options.pop("data", None) or InMemory(args, batch_size)
    searched = {name: options.pop(name) for name in ("adaptive", "sticking_the_landing") if name in options}
    problem = replace(SVIProblem.on(bound_model, data, **options), **searched)
    compiled = CompiledEngine(problem, stream)
    state = compiled.init(stream)
    eager = EagerEngine(problem)
    start = eager.init(stream)
    ours, theirs = [], []
    with bound_model.running(start.flat_params.detach(), stream, start.grad):
        rows = compiled._rows(0, compiled.step.noise(steps), steps)
        random_state = torch.get_rng_state()
        ours = compiled.machine.run(rows)
        torch.set_rng_state(random_state)
        named = dict(zip(compiled.row_inputs, rows, strict=True))
        noise = [named[GraphInput(InputKind.NOISE, i)] for i in range(len(compiled.step.groups))]
        for i in range(steps):
            values = [value for run in compiled.step.replayed(noise, i) for value in run]
            with ReplayRandomOps(values):
                theirs.append(eager._step(start, i))
    return ours, torch.stack(theirs), state.flat_params, start.flat_params.detach()
