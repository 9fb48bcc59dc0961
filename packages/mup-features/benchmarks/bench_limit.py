"""Cost of the infinite-width trajectory beside wide networks, at equal standard error.

A contender is one independent run: a replica of the limit, one torch network of width 4096 trained the same
way, one network of width 10^6 simulated without its matrices. The standard error of R runs is sd / sqrt(R):
the time to reach a given one is proportional to time x sd^2; the column "time to equal error" is that product
over the limit's, with sd the root mean square over samples and outputs of the spread of f at the last step.
The spread is that of the runs that are timed, each with a seed of its own; as they take seconds, there is one
warm-up and at most 5 rounds.
Finite networks have a bias of order 1/n on top, which no number of runs removes.

Run: `python benchmarks/bench_limit.py --set digits-8 --json limit.json`
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import torch

from mup_features import Parametrization
from mup_features.jax import InfiniteWidthMLP, WidthSimulator
from tenfold_tools.bench import Comparison, Options, Row, main
from tenfold_tools.data import digits

TINY = "tiny"  # for the test of this benchmark
SETS = ("points", "digits-8", "digits-32")
WIDTH = 4096
WIDE = 10**6
REPEATS = 5


@dataclass(frozen=True)
class Problem:
    """What is trained: tanh networks, muP, full-batch gradient descent in float64.

    Attributes:
        depth: hidden layers.
        steps: updates.
        lr: rate.
        per_class: digits of each of the first classes; 0 for the two points of the reference values.
        classes: number of classes.
        samples: points of a population of the limit.
        few: points with which a replica errs no more than a network of width 4096, for the memory that it
            takes; 0 for none.
        tol: tolerance of the limit's bases.
        width: of the torch network.
        wide: of the simulated network; 0 for none.
    """

    depth: int
    steps: int
    lr: float
    per_class: int
    classes: int
    samples: int
    tol: float
    width: int = WIDTH
    wide: int = 0
    few: int = 0

    def data(self) -> tuple[np.ndarray, np.ndarray, str]:
        """Inputs, targets, and how the loss adds up."""
        if not self.per_class:
            return np.array([[1.0, 0.5], [-0.3, 0.8]]), np.array([[1.0], [-0.5]]), "sum"
        found = digits()
        labels = np.asarray(found.targets)
        rows = np.concatenate([np.flatnonzero(labels == c)[: self.per_class] for c in range(self.classes)])
        X = np.asarray(found.inputs)[rows]
        X = X - X.mean(axis=0)
        return X / np.linalg.norm(X, axis=1, keepdims=True), np.eye(10)[labels[rows]] - 0.1, "mean"


PROBLEMS = {
    TINY: Problem(2, 2, 0.3, 0, 0, 64, 1e-10, width=16, wide=64, few=32),
    "points": Problem(3, 4, 0.3, 0, 0, 16384, 1e-10, wide=WIDE, few=256),
    "digits-8": Problem(2, 8, 4.0, 1, 8, 8192, 1e-10, wide=WIDE // 10, few=4096),
    "digits-32": Problem(3, 50, 4.0, 4, 8, 32768, 1e-3),
}


def limit_run(problem: Problem, seed: int, samples: int | None = None) -> np.ndarray:
    """Outputs of one replica of the limit at the last step; of `samples` points instead of the problem's."""
    X, Y, reduction = problem.data()
    model = InfiniteWidthMLP(
        depth=problem.depth,
        input_dim=X.shape[1],
        output_dim=Y.shape[1],
        reduction=reduction,
        lr=problem.lr,
        samples=samples or problem.samples,
        replicas=1,
        tol=problem.tol,
        key=jax.random.key(seed),
    )
    return model.fit(X, Y, problem.steps, record=("f",), every=problem.steps).f[-1]


def network_run(problem: Problem, seed: int) -> np.ndarray:
    """Outputs of one torch network at the last step."""
    X, Y, reduction = problem.data()
    table, width = Parametrization("mup"), problem.width
    inputs, targets = torch.as_tensor(X), torch.as_tensor(Y)
    sizes = [X.shape[1], *[width] * problem.depth, Y.shape[1]]
    generator = torch.Generator().manual_seed(seed)
    weights = [
        (variance**0.5 * torch.randn(b, a, dtype=torch.float64, generator=generator)).requires_grad_()
        for variance, a, b in zip(table.variances(width, problem.depth), sizes[:-1], sizes[1:], strict=True)
    ]
    rates = table.rates(width, problem.depth, problem.lr)
    optimizer = torch.optim.SGD([{"params": [w], "lr": rate} for w, rate in zip(weights, rates, strict=True)])

    def outputs() -> torch.Tensor:
        x = inputs
        for weight in weights[:-1]:
            x = torch.tanh(x @ weight.T)
        return x @ weights[-1].T

    for _ in range(problem.steps):
        optimizer.zero_grad()
        loss = 0.5 * ((outputs() - targets) ** 2).sum() / (len(X) if reduction == "mean" else 1)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return outputs().numpy()


def simulated_run(problem: Problem, seed: int) -> np.ndarray:
    """Outputs of one wide network at the last step, exact in law without its matrices."""
    X, Y, reduction = problem.data()
    simulator = WidthSimulator(
        problem.wide,
        depth=problem.depth,
        input_dim=X.shape[1],
        output_dim=Y.shape[1],
        reduction=reduction,
        lr=problem.lr,
        replicas=1,
        key=jax.random.key(seed),
    )
    return simulator.fit(X, Y, problem.steps, record=("f",), every=problem.steps).f[-1]


def measure(name: str, options: Options) -> Comparison:
    """Times one problem.

    Args:
        name: one of SETS or TINY.
        options: of the harness.
    """
    problem = PROBLEMS[name]
    runs: dict[str, Callable[[Problem, int], np.ndarray]] = {
        f"limit, M {problem.samples}": limit_run,
        f"torch network, width {problem.width}": network_run,
    }
    if problem.few:
        runs[f"limit, M {problem.few}"] = partial(limit_run, samples=problem.few)
    if problem.wide:
        runs[f"WidthSimulator, width {problem.wide}"] = simulated_run
    seeds = iter(range(10**6))
    outputs: dict[str, list[np.ndarray]] = {title: [] for title in runs}

    def timed(title: str) -> Callable[[], None]:
        return lambda: outputs[title].append(runs[title](problem, next(seeds)))

    baseline = next(iter(runs))
    few = replace(options, device="cpu", min_time=0.0, warmup=1, repeats=min(options.repeats, REPEATS))
    comparison = few.compare(
        {title: timed(title) for title in runs},
        baseline=baseline,
        title=f"{name}: {problem}, jax {jax.__version__}, torch {torch.__version__}",
    )
    spread = {title: float(np.sqrt(np.var(made, axis=0, ddof=1).mean())) for title, made in outputs.items()}
    reference = next(row for row in comparison.rows if row.name == baseline)

    def equal_error(row: Row) -> str:
        cost = row.median * spread[row.name] ** 2
        return f"{cost / (reference.median * spread[baseline] ** 2):.3g}"

    return comparison.with_column("sd of f", lambda row: f"{spread[row.name]:.3g}").with_column(
        "time to equal error", equal_error
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    sys.exit(
        main(
            measure,
            workloads=[TINY, *SETS],
            default=list(SETS),
            description="The infinite-width limit beside wide networks, at equal standard error.",
        )
    )
