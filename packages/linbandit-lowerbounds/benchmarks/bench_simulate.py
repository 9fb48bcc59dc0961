"""Rounds x seeds per second of the simulator beside loops over other libraries, interleaved in one process.

Every set is one (d, A) and one kind of decision set: "contexts" draws A unit vectors in every round and run,
"fixed" offers the same A actions. Times are per call; as calls differ in length, read the columns: rounds x
seeds per second, and the time of a round relative to mabwiser and to the NumPy loop, paired by round of the
benchmark. Compilation happens in the warm-up and is timed apart. Everything is float32.

On a GPU the runs are many (65 536): `--device cuda --set gpu-8x16`. The bytes floor of a round is the state
of OFUL, 2 (d^2 + 2 d) numbers of 4 bytes, read and written once.

Run: `python benchmarks/bench_simulate.py --set fixed-8x16 contexts-8x16 --json simulate.json`
"""

import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import numpy as np
from peers import Contender, peers

from linbandit_lowerbounds import (
    Algorithm,
    FixedSet,
    Instance,
    Prefixed,
    RandomContexts,
    lin_ts,
    oful,
    save,
    simulate,
    weighted_oful_plus,
)
from tenfold_tools.bench import Comparison, Options, Row, main
from tenfold_tools.stats import paired_ratio

LEARNERS: dict[str, Callable[[], Algorithm]] = {
    "OFUL": oful,
    "LinTS": lin_ts,
    "Weighted OFUL+": weighted_oful_plus,
    "SAVE practical": lambda: save(preset="practical"),
}
BASELINE = "OFUL, 512 seeds"
GPU_BASELINE = "OFUL, 65536 seeds"
SETS = [f"{kind}-{size}" for kind in ("fixed", "contexts") for size in ("8x16", "32x64")]
GPU_SETS = ["gpu-8x16", "gpu-fixed-8x16"]
TINY = "tiny"  # for the test of this benchmark


def measure(name: str, options: Options) -> Comparison:
    """Times one set.

    Args:
        name: one of SETS, GPU_SETS or TINY.
        options: of the harness; with a CUDA device the host's clock waits for the results.
    """
    on_gpu = options.device.startswith("cuda")
    d, A, kind, seeds, rounds = sizes(name)
    contenders: dict[str, Contender] = {}
    absent: dict[str, str] = {}
    compiled: dict[str, float] = {}
    for label, make in LEARNERS.items():
        for n_seeds in seeds if label == "OFUL" else seeds[-1:]:
            title = f"{label}, {n_seeds} seed{'s' * (n_seeds > 1)}"
            contenders[title], compiled[title] = ours(make(), instance(kind, d, A, rounds), n_seeds, rounds)
    if not on_gpu:
        others, absent = peers(d, A)
        contenders |= others
    baseline = next(title for title in contenders if title.startswith("OFUL") and str(seeds[-1]) in title)
    where = jax.devices()[0].device_kind
    comparison = replace(options, device="cpu", min_time=0.0).compare(
        {title: contender.play for title, contender in contenders.items()},
        baseline=baseline,
        title=f"{name}: d {d}, A {A}, {kind}, jax {jax.__version__} on {where}",
    )

    def rate(row: Row) -> str:
        return f"{contenders[row.name].work / row.median:.3g}"

    def against(other: str) -> Callable[[Row], str]:
        reference = next((row for row in comparison.rows if row.name == other and not row.error), None)

        def column(row: Row) -> str:
            if reference is None or row.error:
                return ""
            own = [contenders[other].work / s for s in reference.seconds]
            ratio = paired_ratio([contenders[row.name].work / s for s in row.seconds], own)
            return f"{ratio.value:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"

        return column

    comparison = comparison.with_column("rounds x seeds / s", rate)
    for other in ("mabwiser LinUCB", "NumPy loop, OFUL"):
        if other in contenders:
            comparison = comparison.with_column(f"times {other}", against(other))
    comparison = comparison.with_column(
        "first call, s", lambda row: f"{compiled[row.name]:.1f}" if row.name in compiled else ""
    )
    comparison = comparison.with_column("plays", lambda row: contenders[row.name].note)
    return comparison.with_absent(absent)


def sizes(name: str) -> tuple[int, int, str, tuple[int, ...], int]:
    """d, A, kind of decision set, numbers of seeds (the last is the headline), rounds of one call."""
    if name == TINY:
        return 2, 3, "contexts", (1, 4), 8
    d, A = (int(number) for number in re.findall(r"(\d+)x(\d+)", name)[0])
    kind = "fixed" if "fixed" in name else "contexts"
    if name.startswith("gpu"):
        return d, A, kind, (512, 65_536), 512
    return d, A, kind, (1, 64, 512), 2048 if d == 8 else 512


def instance(kind: str, d: int, A: int, rounds: int) -> Instance:
    """The environment of a set."""
    if kind == "contexts":
        return RandomContexts(d, A, horizon=rounds)
    actions = np.random.default_rng(0).normal(size=(A, d))
    return FixedSet(actions / np.linalg.norm(actions, axis=1, keepdims=True), horizon=rounds)


def ours(algorithm: Algorithm, where: Instance, n_seeds: int, rounds: int) -> tuple[Contender, float]:
    """The simulator on an instance, and the seconds of its first call, which compiles."""
    adversary, key = Prefixed(np.ones(rounds)), jax.random.key(0)

    def play() -> float:
        result = simulate(algorithm, where, adversary, key=key, n_seeds=n_seeds, progress=False)
        return float(statistics.fmean(result.regret))

    start = time.perf_counter()
    play()
    return Contender(play, rounds * n_seeds, algorithm.name), time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(
        main(
            measure,
            workloads=[TINY, *SETS, *GPU_SETS],
            default=SETS,
            description="Rounds x seeds per second of the simulator and of other libraries.",
        )
    )
