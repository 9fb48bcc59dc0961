"""What a lower bound returns, and the numeric audit that accompanies it.

A bound is a number with its conditions. When one of them fails the value is 0, which is always true, and
`steps["raw"]` keeps what the formula gives. `steps` also holds both sides of every inequality that the
proof uses, evaluated for the arguments at hand, so that a reader can see where the constant is lost.
"""

from __future__ import annotations

from typing import NamedTuple

# A step of a proof compares two rounded numbers, which may meet with equality. 1e-9 covers the rounding of
# sums over 10^6 rounds (10^6 * 2^-53 is 1e-10) and nothing else.
ROUNDING = 1e-9


class LowerBound(NamedTuple):
    """A lower bound on regret with its conditions and the audit of its proof.

    Attributes:
        value: the bound, >= 0; exactly 0 when a condition fails.
        conditions: what the statement requires, by name.
        source: theorem and paper, or the section of docs/proofs.md.
        steps: "raw" is the formula without regard to conditions. For a step s, "s.small" and "s.large" are
            the two sides of its inequality and "s.holds" is 1.0 if small <= large up to rounding. Other
            names are intermediate numbers.
    """

    value: float
    conditions: dict[str, bool]
    source: str
    steps: dict[str, float]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the conditions that fail: the reason for a value of 0."""
        return tuple(name for name, holds in self.conditions.items() if not holds)


class Audit:
    """Collects the numbers of a proof in the order in which it needs them.

    Attributes:
        steps: what has been collected.
    """

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}

    def number(self, name: str, value: float) -> float:
        """Store an intermediate number and pass it on.

        Args:
            name: key in steps.
            value: the number.
        """
        self.steps[name] = float(value)
        return float(value)

    def inequality(self, name: str, small: float, large: float) -> None:
        """Store both sides of small <= large and whether it holds.

        Args:
            name: the step's name.
            small: left side.
            large: right side.
        """
        slack = ROUNDING * max(abs(small), abs(large))
        self.steps[f"{name}.small"] = float(small)
        self.steps[f"{name}.large"] = float(large)
        self.steps[f"{name}.holds"] = float(small <= large + slack)

    def conclude(self, raw: float, conditions: dict[str, bool], source: str) -> LowerBound:
        """The bound: raw, or 0 where a condition fails or raw is not positive.

        Args:
            raw: what the formula gives.
            conditions: what the statement requires; "positive" is added.
            source: where it comes from.
        """
        raw = self.number("raw", raw)
        checked = {name: bool(holds) for name, holds in conditions.items()} | {"positive": raw > 0.0}
        return LowerBound(raw if all(checked.values()) else 0.0, checked, source, self.steps)
