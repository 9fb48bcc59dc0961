"""Cost of recording features beside a forward pass, and of the analytic NTK beside neural-tangents.

`recorder`: an MLP of width 4096 on 1024 samples, forward alone and forward with the Gram matrix of the last
hidden layer, exact in float64. `ntk`: 1000 inputs, ten ReLU layers. neural-tangents needs jax < 0.5 and runs
an environment of its own: name its Python in NEURAL_TANGENTS_PYTHON; it times itself and the column "peer"
says so. Without it that row is absent.

Run: `NEURAL_TANGENTS_PYTHON=... python benchmarks/bench_features.py --set ntk --json features.json`
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from mup_features import FeatureRecorder
from mup_features.jax import ntk
from tenfold_tools.bench import Comparison, Options, main

TINY = "tiny"  # for the test of this benchmark
SETS = ("recorder", "ntk")
NT_SCRIPT = """
import sys, time
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
from neural_tangents import stax
samples, depth, repeats = (int(word) for word in sys.argv[1:])
X = jnp.asarray(np.random.default_rng(0).standard_normal((samples, 64)) / 8)
layers = []
for _ in range(depth):
    layers += [stax.Dense(1, W_std=2**0.5, b_std=0.0), stax.Relu()]
_, _, kernel = stax.serial(*layers, stax.Dense(1, W_std=1.0, b_std=0.0))
run = jax.jit(lambda X: kernel(X, None, "ntk"))
run(X).block_until_ready()
for _ in range(repeats):
    start = time.perf_counter()
    run(X).block_until_ready()
    print(time.perf_counter() - start)
"""


def measure(name: str, options: Options) -> Comparison:
    """Times one set.

    Args:
        name: one of SETS or TINY.
        options: of the harness.
    """
    if name == "ntk":
        return measure_ntk(1000, 10, options)
    samples, width = (8, 16) if name == TINY else (1024, 4096)
    return measure_recorder(samples, width, options)


def measure_recorder(samples: int, width: int, options: Options) -> Comparison:
    """A forward pass with and without recording, in one batch of all samples."""
    model = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    ).to(options.device)
    X = torch.randn(samples, width, generator=torch.Generator().manual_seed(0)).to(options.device)
    recorder = FeatureRecorder(model, ["3"], keep_features=False)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(X)

    def recording() -> Any:
        return recorder.snapshot([(X,)], "now")

    comparison = options.compare(
        {"forward pass": forward, "forward pass and Gram": recording},
        baseline="forward pass",
        title=f"recorder: N {samples}, width {width}, float32, torch {torch.__version__}",
    )
    gemm = 2 * samples * width * (2 * width + 10)
    gram = samples * (samples + 1) * width
    return comparison.with_column(
        "Gflop", lambda row: f"{(gemm + (gram if 'Gram' in row.name else 0)) / 1e9:.3g}"
    )


def measure_ntk(samples: int, depth: int, options: Options) -> Comparison:
    """The NTK of ReLU networks, ours here and neural-tangents' in its own process, in float64."""
    X = np.random.default_rng(0).standard_normal((samples, 64)) / 8

    def ours() -> Any:
        return ntk(X, depth=depth, activation="relu", w_std=2**0.5).block_until_ready()

    contenders: dict[str, Callable[[], Any]] = {"mup-features": ours}
    comparison = replace(options, device="cpu", min_time=0.0).compare(
        contenders, baseline="mup-features", title=f"ntk: N {samples}, L {depth}, jax {jax.__version__}"
    )
    python = os.environ.get("NEURAL_TANGENTS_PYTHON")
    if not python:
        return comparison.with_absent({"neural-tangents": "NEURAL_TANGENTS_PYTHON names no Python"})
    command = [python, "-c", NT_SCRIPT, str(samples), str(depth), str(options.repeats)]
    made = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
    seconds = np.array([float(line) for line in made.stdout.split()])
    own = comparison.rows[0].median
    return comparison.with_column(
        "neural-tangents in its own process",
        lambda _: f"{np.median(seconds):.3g} s, {np.median(seconds) / own:.3g} times ours",
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    sys.exit(
        main(
            measure,
            workloads=[TINY, *SETS],
            default=list(SETS),
            description="Recording features beside a forward pass; the NTK beside neural-tangents.",
        )
    )
