"""Is an activation GOOD in the sense of assumption 4.3? Known answers, and a numeric test for the rest.

phi is GOOD if
    (a) phi is C^2 with phi' and phi'' bounded,
    (b) sum_i a_i phi(b_i x + c_i) is constant for no nonzero a_i and b_i with distinct |b_i|,
    (c) (r1 + phi)(r2 + phi') is almost everywhere constant for no r1, r2.
(c) says that phi phi' lies outside the span of {1, phi, phi'}: multiply it out.

A numeric test can refute, or fail to refute; it never proves: "supported" says that every test passed.

Source: Chen et al. 2025 (arXiv 2503.09565), assumption 4.3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

Verdict = Literal["good", "not good", "supported", "refuted", "undecided"]
Activation = Callable[[np.ndarray], np.ndarray]

_LINEAR = "phi(2x) - 2 phi(x) = 0: a combination with distinct scales is constant"
_KINK = "phi' jumps, so phi is not C^2"
_SECOND_JUMP = "phi'' jumps, so phi is not C^2"
KNOWN: dict[str, tuple[Verdict, str]] = {
    **dict.fromkeys(
        ("tanh", "sigmoid", "silu", "erf", "gelu", "softplus", "sin", "mish"),
        ("good", "C^2 with bounded derivatives, and no combination or product of the assumption is constant"),
    ),
    "identity": ("not good", _LINEAR),
    **dict.fromkeys(("relu", "leaky_relu", "abs", "hardtanh", "selu"), ("not good", _KINK)),
    **dict.fromkeys(("elu", "celu"), ("not good", _SECOND_JUMP)),
    **dict.fromkeys(("square", "cube", "polynomial"), ("not good", "phi' is unbounded")),
}
_ALIASES = {"swish": "silu", "linear": "identity", "cos": "sin", "logistic": "sigmoid"}

# Distinct |b| and offsets of the combinations that are tried; eight functions catch polynomials to degree 6.
_SCALES = np.array([0.35, 0.6, 0.9, 1.25, 1.7, -2.2, 2.8, -3.5])
_OFFSETS = np.array([0.3, -0.7, 1.1, -0.2, 0.8, 0.5, -1.2, 0.1])
_STEP = 1e-3


@dataclass(frozen=True)
class ActivationReport:
    """The verdict on one activation.

    Attributes:
        name: what was asked about.
        verdict: "good" or "not good" if known; "supported", "refuted" or "undecided" by the numeric test.
        reasons: what speaks for the verdict, one sentence each.
    """

    name: str
    verdict: Verdict
    reasons: tuple[str, ...]


def check_activation(activation: str | Activation) -> ActivationReport:
    """Whether an activation satisfies assumption 4.3.

    Args:
        activation: a name, or a function from a float64 array to an array of its shape, entry by entry.

    Raises:
        ValueError: if the name is unknown, or the function returns another shape.
        TypeError: if it is neither a name nor a function of NumPy arrays.
    """
    if isinstance(activation, str):
        key = activation.lower().replace("-", "_")
        key = _ALIASES.get(key, key)
        if key not in KNOWN:
            raise ValueError(
                f"activation must be one of {', '.join(sorted(KNOWN))}, or a function, got {activation!r}"
            )
        verdict, reason = KNOWN[key]
        return ActivationReport(activation, verdict, (reason,))
    if not callable(activation):
        raise TypeError(f"activation must be a name or a function, got {type(activation).__name__}")
    name = getattr(activation, "__name__", type(activation).__name__)
    grid = np.linspace(-30.0, 30.0, 60_001)
    values = _evaluate(activation, grid)
    if not np.isfinite(values).all():
        place = grid[~np.isfinite(values)][0]
        return ActivationReport(name, "refuted", (f"phi({place:.4g}) is not finite",))
    findings = [test(activation) for test in (_smoothness, _boundedness, _combinations, _product)]
    verdicts = {verdict for verdict, _ in findings}
    verdict: Verdict = "supported"
    if verdicts != {"supported"}:
        verdict = "refuted" if "refuted" in verdicts else "undecided"
    reasons = tuple(reason for found, reason in findings if found == verdict)
    return ActivationReport(name, verdict, reasons)


def _smoothness(phi: Activation) -> tuple[Verdict, str]:
    """Second differences at a step h see a kink as 1/h, their own differences see a jump of phi'' as h^0."""
    sizes, jumps = [], []
    for h in (_STEP, _STEP / 4):
        # A grid as fine as the step has no gaps through which a kink could slip.
        x = np.arange(-8.0, 8.0, h) + 0.318 * h
        y = _evaluate(phi, x)
        second = (y[2:] - 2 * y[1:-1] + y[:-2]) / h**2
        sizes.append(np.abs(second).max())
        jumps.append(np.abs(second[2:] - second[:-2]).max())
    # What rounding of phi leaves in a second difference at the finer step.
    noise = 16 * np.finfo(float).eps * max(1.0, float(np.abs(y).max())) / (_STEP / 4) ** 2
    growth, decay = sizes[1] / max(sizes[0], noise), jumps[1] / max(jumps[0], noise)
    if growth > 2.5:
        return "refuted", f"second differences grow {growth:.2g}-fold when the step is quartered: phi' jumps"
    if jumps[1] < 4 * noise or (decay < 0.4 and growth < 1.3):
        return "supported", "second differences converge, and so do their differences"
    if decay > 0.6:
        return "refuted", f"phi'' jumps by about {jumps[1]:.2g} however small the step"
    return "undecided", f"differences of phi'' shrink only {1 / decay:.2g}-fold when the step is quartered"


def _boundedness(phi: Activation) -> tuple[Verdict, str]:
    """Largest |phi'| and |phi''| on [-30, 30] against those on [-15, 15]."""
    h, worst = 1e-3, 1.0
    for order in (1, 2):
        largest = []
        for end in (15.0, 30.0):
            x = np.linspace(-end, end, 60_001)
            above, here, below = (_evaluate(phi, x + shift) for shift in (h, 0.0, -h))
            found = (above - below) / (2 * h) if order == 1 else (above - 2 * here + below) / h**2
            largest.append(np.abs(found).max())
        noise = 1e-4 * (1 + float(np.abs(here).max()))
        worst = max(worst, (largest[1] + noise) / (largest[0] + noise))
    if worst > 1.3:
        return "refuted", f"the largest derivative grows {worst:.2g}-fold from [-15, 15] to [-30, 30]"
    if worst > 1.02:
        return "undecided", f"the largest derivative still grows by {100 * (worst - 1):.1f} % beyond |x| = 15"
    return "supported", "phi' and phi'' do not grow beyond |x| = 15"


def _combinations(phi: Activation) -> tuple[Verdict, str]:
    """How independent {1, phi(b_i x + c_i)} are under N(0, 1): their smallest relative singular value."""
    x, weights = _gaussian_grid()
    shifted = [_evaluate(phi, b * x + c) for b, c in zip(_SCALES, _OFFSETS, strict=True)]
    smallest = _smallest_singular(np.stack([np.ones_like(x), *shifted]), weights)
    what = f"phi at {len(_SCALES)} scales and a constant"
    if smallest < 1e-12:
        return "refuted", f"{what} are dependent to {smallest:.1g}"
    if smallest < 1e-8:
        return (
            "undecided",
            f"{what} are independent by only {smallest:.1g}",
        )
    return "supported", f"{what} are independent by {smallest:.1g}"


def _product(phi: Activation) -> tuple[Verdict, str]:
    """Distance of phi phi' from the span of {1, phi, phi'}."""
    x, weights = _gaussian_grid()
    h = 1e-5
    value = _evaluate(phi, x)
    slope = (_evaluate(phi, x + h) - _evaluate(phi, x - h)) / (2 * h)
    root = np.sqrt(weights)
    basis, target = np.stack([np.ones_like(x), value, slope]) * root, value * slope * root
    solution = np.linalg.lstsq(basis.T, target, rcond=1e-9)[0]
    size = float(np.linalg.norm(target))
    distance = float(np.linalg.norm(target - basis.T @ solution)) / size if size > 0 else 0.0
    # Central differences are good to 1e-10.
    if distance < 1e-8:
        return "refuted", f"(r1 + phi)(r2 + phi') is constant to {distance:.1g} for some r1, r2"
    if distance < 1e-5:
        return "undecided", f"(r1 + phi)(r2 + phi') is constant to {distance:.1g} for some r1, r2"
    return "supported", f"(r1 + phi)(r2 + phi') is {distance:.1g} from constant"


def _gaussian_grid() -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    x = np.linspace(-8.0, 8.0, 4001)
    weights = np.exp(-(x**2) / 2)
    return x, weights / weights.sum()


def _smallest_singular(columns: np.ndarray, weights: np.ndarray) -> float:
    scaled = columns * np.sqrt(weights)
    norms = np.linalg.norm(scaled, axis=1)
    if not norms.all():
        return 0.0
    values = np.linalg.svd(scaled / norms[:, None], compute_uv=False)
    return float(values[-1] / values[0])


def _evaluate(phi: Activation, x: np.ndarray) -> Float[np.ndarray, " points"]:
    try:
        with np.errstate(all="ignore"):
            y = np.asarray(phi(x), dtype=np.float64)
    except (TypeError, AttributeError) as error:
        raise TypeError(f"activation must take a NumPy float64 array, got {error}") from error
    if y.shape != x.shape:
        raise ValueError(f"activation must return the shape of its argument {x.shape}, got {y.shape}")
    return y
