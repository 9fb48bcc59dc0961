"""Cost of the infinite-width trajectory beside wide networks, at equal standard error.

A contender is one independent run: a replica of the limit, one torch network of width 4096 trained the same
way, one network of width 10^6 simulated without its matrices. The standard error of R runs is sd / sqrt(R):
the time to reach a given one is proportional to time x sd^2; the column "time to equal error" is that product
over the limit's, with sd the root mean square over samples and outputs of the spread of f at the last step.
Finite networks have a bias of order 1/n on top, which no number of runs removes.

Run: `python benchmarks/bench_limit.py --set digits-8 --repeats 5 --json limit.json`
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

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
        tol: tolerance of the limit's bases.
        width: of the torch network.
        wide: of the simulated network; 0 for none.
        spread: runs from which the spread is measured.
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
    spread: int = 8

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
    TINY: Problem(2, 2, 0.3, 0, 0, 64, 1e-10, width=16, wide=64, spread=3),
    "points": Problem(3, 4, 0.3, 0, 0, 16384, 1e-10, wide=WIDE),
    "digits-8": Problem(2, 8, 4.0, 1, 8, 8192, 1e-10, wide=WIDE),
    "digits-32": Problem(3, 50, 4.0, 4, 8, 32768, 1e-3, spread=4),
}


def limit_run(problem: Problem, seed: int) -> np.ndarray:
    """Outputs of one replica of the limit at the last step."""
    X, Y, reduction = problem.data()
    model = InfiniteWidthMLP(
        depth=problem.depth,
        input_dim=X.shape[1],
        output_dim=Y.shape[1],
        reduction=reduction,
        lr=problem.lr,
        samples=problem.samples,
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
    if problem.wide:
        runs[f"WidthSimulator, width {problem.wide}"] = simulated_run
    seeds = iter(range(10**6))
    jax.config.update("jax_enable_x64", True)
    spread = {}
    for title, run in runs.items():
        outputs = np.stack([run(problem, next(seeds)) for _ in range(problem.spread)])
        spread[title] = float(np.sqrt(outputs.var(axis=0, ddof=1).mean()))
    baseline = next(iter(runs))
    comparison = replace(options, device="cpu", min_time=0.0).compare(
        {title: (lambda run=run: run(problem, next(seeds))) for title, run in runs.items()},
        baseline=baseline,
        title=f"{name}: {problem}, jax {jax.__version__}, torch {torch.__version__}",
    )
    reference = next(row for row in comparison.rows if row.name == baseline)

    def equal_error(row: Row) -> str:
        cost = row.median * spread[row.name] ** 2
        return f"{cost / (reference.median * spread[baseline] ** 2):.3g}"

    return comparison.with_column("sd of f", lambda row: f"{spread[row.name]:.3g}").with_column(
        "time to equal error", equal_error
    )


if __name__ == "__main__":
    sys.exit(
        main(
            measure,
            workloads=[TINY, *SETS],
            default=list(SETS),
            description="The infinite-width limit beside wide networks, at equal standard error.",
        )
    )
