"""How large each claim is at each scale (spec section f)."""

from __future__ import annotations

from dataclasses import dataclass

from tenfold_tools.claims import NotRun


@dataclass(frozen=True)
class Schemes:
    """Claims 1-3: four schemes on 32 digits; `limit` adds the limit of muP: (points, replicas, tol)."""

    widths: tuple[int, ...]
    seeds: int
    steps: int = 200
    depth: int = 3
    limit: tuple[int, int, float] | None = None


@dataclass(frozen=True)
class Diversity:
    """Claim 4: the limit itself."""

    classes: int
    per_class: int
    steps: int
    samples: int
    replicas: int
    tol: float
    judged: tuple[tuple[str, float], ...]
    reported: tuple[tuple[str, float], ...] = ()
    depth: int = 3


@dataclass(frozen=True)
class Minimum:
    """Claim 5: training to the global minimum, with a certificate at every step."""

    widths: tuple[int, ...]
    seeds: int
    steps: int = 1000
    depth: int = 3


@dataclass(frozen=True)
class Convergence:
    """Claim 6: finite networks against the limit, on two points."""

    widths: tuple[int, ...]
    seeds: int
    samples: int
    replicas: int
    steps: int = 4
    depth: int = 2


@dataclass(frozen=True)
class Kernel:
    """Claim 7: wide networks against their kernel, on two points or digits."""

    data: str
    widths: tuple[int, ...]
    seeds: int
    steps: int
    lr: float
    depth: int = 3


@dataclass(frozen=True)
class Transfer:
    """Claim 8: best learning rate of Adam over width."""

    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    seeds: int
    steps: int


SCHEMES = {
    "quick": Schemes((64, 256, 512), 5),
    "laptop": Schemes((64, 256, 1024), 5, limit=(4096, 3, 1e-2)),
}
DIVERSITY = {
    "quick": Diversity(8, 1, 8, 8192, 4, 1e-10, (("tanh", 4.0),)),
    "laptop": Diversity(
        8, 4, 50, 16384, 4, 1e-2, (("tanh", 4.0), ("silu", 1.0)), (("sigmoid", 4.0), ("relu", 1.0))
    ),
}
MINIMUM = {"quick": Minimum((256,), 1), "laptop": Minimum((256, 1024), 5)}
CONVERGENCE = {
    "quick": Convergence((32, 64, 128, 256), 256, 16384, 4),
    "laptop": Convergence((32, 64, 128, 256, 512), 512, 65536, 4),
}
KERNEL = {
    "quick": Kernel("two points", (128, 512, 2048), 8, 5, 0.3),
    "laptop": Kernel("digits", (256, 1024, 4096), 5, 30, 2.0),
}
TRANSFER = {
    "laptop": Transfer((64, 256, 1024), tuple(2.0**k for k in range(-12, -3)), 3, 150),
}


def at_scale(table: dict, scale: str):
    """The entry of a scale.

    Raises:
        NotRun: if there is none.
    """
    if scale not in table:
        raise NotRun(f"no sizes for {scale!r} here")
    return table[scale]
