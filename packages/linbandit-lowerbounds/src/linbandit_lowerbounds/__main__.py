"""`python -m linbandit_lowerbounds`: bounds for a sequence, certificates, simulations, and what there is.

    python -m linbandit_lowerbounds bound --sigma sigma.npy --d 8
    python -m linbandit_lowerbounds certify my_module:MyLearner --family hypercube scaled --json found.json
    python -m linbandit_lowerbounds simulate oful --instance scaled --rounds 2000 --d 4
    python -m linbandit_lowerbounds instances

Wrong words or values, and learners that raise, end the process with status 2 and one line, a missing
dependency with status 1 and what to install. `certify` ends with status 1 when the learner lies below a lower
bound.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jaxtyping import Array, Key

from . import algorithms, checks
from .bounds import PREFIXED_KINDS, prefixed_bound
from .certify import BELOW, certify
from .environment import Algorithm, Instance
from .families import FAMILIES, cases
from .hypercubes import BernoulliHypercube, GaussianHypercube, VarianceScaledHypercube
from .interop import ObjectLearner, from_object
from .intervals import mean_interval
from .simulate import simulate

_NEED_ARGUMENTS = ("History", "oful_guard", "voful2", "voful_contains")
LEARNERS: dict[str, Callable[[], Algorithm]] = {
    name: getattr(algorithms, name) for name in algorithms.__all__ if name not in _NEED_ARGUMENTS
}
INSTANCES: dict[str, Callable[[int, int], Instance]] = {
    "hypercube": BernoulliHypercube,
    "gaussian": GaussianHypercube,
    "scaled": lambda K, d: VarianceScaledHypercube(np.ones(K), d),
}


class Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: words after the program's name; those of the process if None.

    Returns:
        0, or 1 when a certified learner lies below a lower bound. Wrong input, or a learner that raises, ends
        the process with status 2, a missing dependency with status 1.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        lines = options.run(options)
        status = next(lines)
        sys.stdout.writelines(f"{line}\n" for line in lines)
    except ImportError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        parser.error(" ".join(str(error).split()))
    return int(status)


# ------------------------------------------------------------------------------------------- the options


def _parser() -> Parser:
    parser = Parser(prog="python -m linbandit_lowerbounds", description="Lower bounds for linear bandits.")
    commands = parser.add_subparsers(required=True, metavar="{bound,certify,simulate,instances}")

    bound = commands.add_parser("bound", help="lower bounds for a fixed sequence of standard deviations")
    source = bound.add_mutually_exclusive_group(required=True)
    source.add_argument("--sigma", metavar="FILE", help=".npy, or text with one number for each round")
    source.add_argument("--rounds", type=int, metavar="K", help="K rounds of one standard deviation")
    bound.add_argument("--level", type=float, default=1.0, help="that standard deviation (default 1)")
    bound.add_argument("--d", type=int, required=True, help="dimension")
    bound.add_argument("--kind", choices=PREFIXED_KINDS, nargs="+", default=PREFIXED_KINDS, help="formulas")
    bound.add_argument("--json", action="store_true", help="write JSON instead of a table")
    bound.set_defaults(run=_bound)

    judge = commands.add_parser("certify", help="regret of a learner beside the lower bounds")
    judge.add_argument("learner", help=f"module:Class, or one of {', '.join(LEARNERS)}")
    judge.add_argument("--family", nargs="+", default="all", metavar="NAME", help=f"of {', '.join(FAMILIES)}")
    judge.add_argument("--budget", type=float, metavar="SECONDS", help="start no case after that time")
    judge.add_argument("--json", metavar="FILE", help="write the certificate")
    judge.add_argument("--plot", metavar="FILE", help="draw it (extra [plot])")
    judge.set_defaults(run=_certify)

    play = commands.add_parser("simulate", help="regret of a learner of this package on one instance")
    play.add_argument("learner", choices=LEARNERS, metavar="learner", help=f"one of {', '.join(LEARNERS)}")
    play.add_argument("--instance", choices=INSTANCES, default="scaled", help="default: scaled")
    play.add_argument("--rounds", type=int, default=1000, metavar="K", help="default 1000")
    play.add_argument("--d", type=int, default=4, help="dimension (default 4)")
    play.add_argument("--save", metavar="FILE", help="npz with every run; it can be resumed from Python")
    play.set_defaults(run=_simulate)

    for command in (judge, play):
        command.add_argument("--seeds", type=int, default=256, help="runs (default 256)")
        command.add_argument("--key", type=int, default=0, help="seed of the random key (default 0)")

    listing = commands.add_parser("instances", help="the families of hard instances and their bounds")
    listing.add_argument("--json", action="store_true", help="write JSON instead of a table")
    listing.set_defaults(run=_instances)
    return parser


# ------------------------------------------------------------------------------------------- the commands


def _bound(options: argparse.Namespace) -> Iterator[Any]:
    if options.sigma is not None:
        sigma = _read(Path(options.sigma))
    else:
        sigma = np.full(checks.count("rounds", options.rounds, at_least=2), options.level)
    found = {kind: prefixed_bound(sigma, options.d, kind=kind) for kind in options.kind}
    yield 0
    if options.json:
        yield json.dumps(
            {
                "rounds": sigma.size,
                "d": options.d,
                "variance_sum": float((sigma**2).sum()),
                "bounds": {
                    kind: {"value": b.value, "conditions": b.conditions, "source": b.source}
                    for kind, b in found.items()
                },
            },
            indent=2,
        )
        return
    yield f"K = {sigma.size}, d = {options.d}, sum of variances {(sigma**2).sum():.6g}"
    for kind, b in found.items():
        why = f"  fails: {', '.join(b.failed)}" if b.failed else ""
        yield f"{kind:18s}{b.value:14.6g}{why}"


def _certify(options: argparse.Namespace) -> Iterator[Any]:
    for name, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            checks.file_in_folder(name, path)
    if options.plot is not None:  # a missing matplotlib shall not be found after the work
        importlib.import_module("linbandit_lowerbounds.plots")
    learner = _learner(options.learner)
    certificate = certify(
        learner,
        family=options.family,
        n_seeds=options.seeds,
        key=_key(options.key),
        budget_s=options.budget,
    )
    if options.json is not None:
        certificate.to_json(options.json)
    if options.plot is not None:
        certificate.plot(options.plot)
    yield certificate.verdict == BELOW
    yield certificate.table()


def _simulate(options: argparse.Namespace) -> Iterator[Any]:
    rounds, d = checks.count("rounds", options.rounds, at_least=2), checks.count("d", options.d)
    result = simulate(
        LEARNERS[options.learner](),
        INSTANCES[options.instance](rounds, d),
        key=_key(options.key),
        n_seeds=options.seeds,
        save_to=options.save,
    )
    mean = mean_interval(result.regret)
    yield 0
    yield f"{result.algorithm} on {options.instance}, K = {rounds}, d = {d}, {options.seeds} runs"
    yield f"regret {mean.value:.6g} [{mean.low:.6g}, {mean.high:.6g}]"
    scale = d * math.sqrt(result.variance_sum.mean())
    yield f"regret / (d sqrt(sum of variances)) {mean.value / scale:.4g}"


def _instances(options: argparse.Namespace) -> Iterator[Any]:
    yield 0
    found = [(case, {name: b.value for name, b in case.bounds.items()}) for case in cases("all")]
    if options.json:
        rows = [
            {"family": c.family, "d": c.d, "K": c.K, "S": c.S, "x": c.x, "eta": c.eta, "bounds": bounds}
            for c, bounds in found
        ]
        yield json.dumps(rows, indent=2)
        return
    for case, bounds in found:
        gap = "" if case.x is None else f"x {case.x:g}"
        values = ", ".join(f"{name} {value:.4g}" for name, value in bounds.items())
        yield f"{case.family:14s}d {case.d:<5d}K {case.K:<7d}S {case.S:<9.5g}{gap:10s}{values}"


def _read(path: Path) -> np.ndarray:
    try:
        values = np.load(path, allow_pickle=False) if path.suffix == ".npy" else np.loadtxt(path, ndmin=1)
    except (ValueError, EOFError) as error:
        raise ValueError(
            f"--sigma must be a .npy file or text with one number for each round: {error}"
        ) from None
    return checks.sigmas("sigma", values)


def _key(seed: int) -> Key[Array, ""]:
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"--key must be a number of 64 bits, got {seed}")
    return jax.random.key(seed)


def _learner(name: str) -> Algorithm | ObjectLearner:
    if name in LEARNERS:
        return LEARNERS[name]()
    module, separator, attribute = name.partition(":")
    if not separator:
        raise ValueError(f"learner must be module:Class or one of {', '.join(LEARNERS)}, got {name!r}")
    sys.path.insert(0, str(Path.cwd()))
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"learner {name!r} cannot be imported: {error}") from None
    except ImportError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"learner {name!r} cannot be imported: {kind}: {error}") from error
    found = getattr(imported, attribute, None)
    if found is None:
        raise ValueError(f"learner {name!r} cannot be imported: no {attribute!r} in {module!r}")
    return found if isinstance(found, Algorithm | ObjectLearner) else from_object(found)


if __name__ == "__main__":
    sys.exit(main())
