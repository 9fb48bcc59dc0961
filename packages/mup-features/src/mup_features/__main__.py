"""`python -m mup_features`: tables of parametrizations, regimes, coordinate checks, limits, reports.

    python -m mup_features table mup sp --optimizer adam
    python -m mup_features classify mup ntp --depth 3
    python -m mup_features coord-check --model transformer --widths 64,128,256 --png check.png
    python -m mup_features limit --depth 2 --steps 3 --lr 0.3
    python -m mup_features report before.npz after.npz

Exit status: 0; 1 for a coordinate check that fails or a limit that diverges; 2 for wrong words or values; 3
for a coordinate check that cannot be decided; 4 for a missing dependency. A framework is needed only by
`coord-check` and `limit`.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, get_args

from . import _files
from .coordinates import Record
from .parametrization import NAMES, Abc, Parametrization
from .width_rules import Form, Optimizer

EXIT_OF = {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
PLAIN_NAMES = tuple(name for name in NAMES if not name.startswith("ip_"))


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
        The exit status; wrong input ends the process with status 2, a missing dependency with status 4.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    status = 0
    try:
        for line in options.run(options):
            if isinstance(line, int):
                status = line
            else:
                sys.stdout.write(f"{line}\n")
    except ImportError as error:
        parser.exit(4, f"{parser.prog}: {error}\n")
    except ArithmeticError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    return status


# ------------------------------------------------------------------------------------------- the options


def _parser() -> Parser:
    parser = Parser(prog="python -m mup_features", description="muP, feature learning, infinite width.")
    names = ("table", "classify", "coord-check", "limit", "report")
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(names) + "}")

    table = commands.add_parser("table", help="sizes and learning rates of every layer")
    _add_parametrization(table)
    table.add_argument("--form", choices=get_args(Form), default="mult", help="of mup (default: mult)")
    table.add_argument("--base-width", type=_count, metavar="N0", help="scale relative to this width")
    table.set_defaults(run=_table)

    classify = commands.add_parser("classify", help="stable? feature learning or kernel regime?")
    _add_parametrization(classify)
    classify.add_argument("--depth", type=_count, metavar="L", help="hidden layers (default: 3, mfp 1)")
    for name in "abc":
        meaning = "exponents of input, hidden, output or of every layer, as 0,0.5,0.5; c may be left out"
        classify.add_argument(f"--{name}", type=_numbers, metavar=name.upper(), help=meaning)
    classify.set_defaults(run=_classify)

    check = commands.add_parser("coord-check", help="coordinate check of a small torch model")
    check.add_argument("--model", choices=("mlp", "transformer"), default="mlp")
    check.add_argument("--parametrization", choices=("mup", "sp"), default="mup")
    check.add_argument("--widths", type=_counts, default=[64, 128, 256, 512], metavar="N,N,..")
    check.add_argument("--seeds", type=_count, default=4, metavar="R", help="runs at each width (default 4)")
    check.add_argument("--steps", type=_count, default=4, metavar="T", help="updates (default 4)")
    check.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), default="adam")
    check.add_argument("--lr", type=float, metavar="ETA", help="at base width 16; default: a usual one")
    check.add_argument("--form", choices=get_args(Form), default="mult")
    check.add_argument("--record", choices=get_args(Record), default="rms")
    check.add_argument("--csv", metavar="FILE", help="every number, one per line")
    check.add_argument("--png", metavar="FILE", help="figure; other suffixes give other formats")
    check.add_argument("--json", action="store_true", help="print the report as JSON")
    check.set_defaults(run=_coord_check)

    limit = commands.add_parser("limit", help="training of an infinitely wide MLP, with standard errors")
    limit.add_argument(
        "--data", metavar="FILE", help="npz with X (n, d) and y (n,) or (n, C); default: 2 samples"
    )
    limit.add_argument("--depth", type=_count, default=2, metavar="L", help="hidden layers (default 2)")
    limit.add_argument("--activation", default="tanh")
    limit.add_argument("--parametrization", default="mup", help="mup, ip, ip_llr, ntp or sp (default mup)")
    limit.add_argument("--reduction", choices=("mean", "sum"), default="mean")
    limit.add_argument("--lr", type=float, default=0.3, metavar="ETA")
    limit.add_argument("--steps", type=_count, default=5, metavar="T")
    limit.add_argument("--every", type=_count, default=1, metavar="K", help="record every K steps")
    limit.add_argument("--samples", type=_count, default=16384, metavar="M", help="a power of two")
    limit.add_argument("--replicas", type=_count, default=4, metavar="R")
    limit.add_argument("--method", choices=("limit", "quadrature"), default="limit")
    limit.add_argument("--seed", type=int, default=0)
    limit.add_argument("--output", metavar="FILE", help=".npz or .json with everything recorded")
    limit.set_defaults(run=_limit)

    report = commands.add_parser("report", help="what training did to features, from two snapshots")
    report.add_argument("before", metavar="BEFORE.npz")
    report.add_argument("after", metavar="AFTER.npz")
    report.add_argument("--json", action="store_true", help="every number, for programs")
    report.add_argument("--plot", metavar="FILE", help="figure")
    report.set_defaults(run=_report)
    return parser


def _add_parametrization(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="*", help=f"of {', '.join(NAMES)}; default: all but the ip variants")
    command.add_argument("--optimizer", choices=get_args(Optimizer), default="sgd")
    command.add_argument("--alignment", type=_alignment, default="full", help="full, none, or in [0.5, 1]")
    command.add_argument("--json", action="store_true", help="every number, for programs")


def _count(word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {word!r}")
    return value


def _counts(word: str) -> list[int]:
    return [_count(part) for part in word.split(",")]


def _numbers(word: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in word.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers joined by commas, got {word!r}") from None


def _alignment(word: str) -> str | float:
    if word in ("full", "none"):
        return word
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be full, none or a number, got {word!r}") from None


# ------------------------------------------------------------------------------------------ the commands


def _table(options: argparse.Namespace) -> Iterator[Any]:
    found = [
        Parametrization(
            name,
            options.base_width,
            optimizer=options.optimizer,
            alignment=options.alignment,
            form=options.form if name == "mup" else "mult",
        )
        for name in options.name or PLAIN_NAMES
    ]
    if options.json:
        yield _files.to_json([{**one.to_dict(), "table": one.table().splitlines()} for one in found])
        return
    for one in found:
        yield f"{one.name}, {one.optimizer}"
        yield f"\n{one.table()}\n"


def _classify(options: argparse.Namespace) -> Iterator[Any]:
    names: list[Any] = list(options.name)
    if options.a is not None or options.b is not None or options.c is not None:
        if options.a is None or options.b is None:
            raise ValueError("exponents must be given as --a and --b, with or without --c")
        names.append(Abc(options.a, options.b, options.c))
    found = {}
    for name in names or PLAIN_NAMES:
        one = Parametrization(name, optimizer=options.optimizer, alignment=options.alignment)
        depth = options.depth if names or name != "mfp" else 1  # in the list of all, mfp has its own depth
        found["abc" if isinstance(name, Abc) else name] = one.classify(depth)
    if options.json:
        yield _files.to_json({name: asdict(regime) for name, regime in found.items()})
        return
    for name, regime in found.items():
        words = (
            "feature learning" if regime.feature_learning else "kernel regime" if regime.kernel else "neither"
        )
        yield f"{name}: r = {regime.r:g}, {'stable' if regime.stable else 'unstable'}, {words}"
        yield from (f"  {reason}" for reason in regime.reasons)


def _coord_check(options: argparse.Namespace) -> Iterator[Any]:
    from .torch._demos import check

    report = check(
        options.model,
        options.parametrization,
        widths=options.widths,
        seeds=options.seeds,
        steps=options.steps,
        optimizer=options.optimizer,
        lr=options.lr,
        form=options.form,
        record=options.record,
    )
    if options.csv:
        report.to_csv(options.csv)
    if options.png:
        report.plot(options.png)
    yield EXIT_OF[report.verdict().outcome]
    yield report.to_json() if options.json else str(report)


def _limit(options: argparse.Namespace) -> Iterator[Any]:
    from ._limit_command import limit

    return limit(options)


def _report(options: argparse.Namespace) -> Iterator[Any]:
    from .metrics import FeatureSnapshot, compare

    report = compare(*(FeatureSnapshot.load(Path(path)) for path in (options.before, options.after)))
    if options.plot:
        report.plot(options.plot)
    yield report.to_json() if options.json else report.to_markdown()


if __name__ == "__main__":
    sys.exit(main())
