"""Seconds from the start of a process to a posterior: Edward's network, 10,000 steps, compilation included.

    python -m benchmarks.time_to_posterior --threads 1

Kiln twice from an empty cache, so that the second process is a warm one, and
NumPyro, whose compilation is not kept; each in a process of its own, in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict

from tqdm import trange

STEPS = 10_000

KILN = f"""
import json, time
start = time.perf_counter()
import torch
torch.set_num_threads(THREADS)
from guides import mean_field_normal
from inference import fit
from ppl_models import bnn_regression
from ppl_models.data.datasets import cosine
ready = time.perf_counter()
data = cosine()
posterior = fit(bnn_regression, mean_field_normal(bnn_regression), data.x, data.y, engine=ENGINE, steps={STEPS},
                progress=False)
print(json.dumps({{"import": ready - start, "fit": time.perf_counter() - ready}}))
"""

NUMPYRO = f"""
import json, time
start = time.perf_counter()
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import Adam
from benchmarks.edward import network
from ppl_models.data.datasets import cosine
ready = time.perf_counter()
data = cosine()
svi = SVI(network, AutoNormal(network), Adam(0.01), Trace_ELBO())
result = svi.run(random.PRNGKey(0), {STEPS}, jnp.array(data.x), jnp.array(data.y), progress_bar=False)
np.asarray(result.losses)
print(json.dumps({{"import": ready - start, "fit": time.perf_counter() - ready}}))
"""


def timed(script: str, threads: int, cache: str) -> dict[str, float]:
    """Seconds of the whole process, of its imports and of the fit."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    command = ["taskset", "-c", cores, sys.executable, "-c", script.replace("THREADS", str(threads))]
    environment = {**os.environ, "XDG_CACHE_HOME": cache}
    start = os.times().elapsed
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)  # noqa: S603
    whole = os.times().elapsed - start
    return {"process": whole, **json.loads(done.stdout.strip().splitlines()[-1])}


def main() -> None:
    """Measure and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    figures: dict[str, list[dict[str, float]]] = defaultdict(list)
    compiled = KILN.replace("ENGINE", "'compiled'")
    for _ in trange(options.repeats, unit="repeat", leave=False):
        with tempfile.TemporaryDirectory() as cache:
            figures["Kiln, cold"].append(timed(compiled, options.threads, cache))
            figures["Kiln, warm"].append(timed(compiled, options.threads, cache))
            figures["Kiln, auto, warm"].append(timed(KILN.replace("ENGINE", "'auto'"), options.threads, cache))
            figures["NumPyro"].append(timed(NUMPYRO, options.threads, cache))
    print(f"| {options.threads} thread(s), seconds | process | of which import | fit |\n| --- | --- | --- | --- |")
    for name, runs in figures.items():
        cells = [f"{statistics.median(run[key] for run in runs):.2f}" for key in ("process", "import", "fit")]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
