"""How large each claim is at each scale (spec section f)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from stage import require_gpu

from tenfold_tools.claims import NotRun, Run


@dataclass(frozen=True)
class Schemes:
    """Claims 1-3: four schemes on 32 samples; `limit` adds the limit of muP: (points, replicas, tol)."""

    widths: tuple[int, ...]
    data: str = "digits"
    steps: int = 200
    every: int = 10
    depth: int = 3
    limit: tuple[int, int, float] | None = None
    gpu: bool = False


@dataclass(frozen=True)
class Diversity:
    """Claim 4: the limit itself, its population shared by at least so many accelerators (0: one device)."""

    classes: int
    per_class: int
    steps: int
    samples: int
    replicas: int
    tol: float
    judged: tuple[tuple[str, float], ...]
    reported: tuple[tuple[str, float], ...] = ()
    depth: int = 3
    accelerators: int = 0
    gpu: bool = False


@dataclass(frozen=True)
class Minimum:
    """Claim 5: training to the global minimum, with a certificate at every step."""

    widths: tuple[int, ...]
    data: str = "digits"
    steps: int = 1000
    depth: int = 3
    gpu: bool = False


@dataclass(frozen=True)
class Convergence:
    """Claim 6: finite networks against the limit, on two points."""

    widths: tuple[int, ...]
    seeds: int
    samples: int
    replicas: int
    steps: int = 4
    depth: int = 2
    gpu: bool = False


@dataclass(frozen=True)
class Kernel:
    """Claim 7: wide networks against their kernel, on two points or digits."""

    data: str
    widths: tuple[int, ...]
    seeds: int
    steps: int
    lr: float
    depth: int = 3
    gpu: bool = False


@dataclass(frozen=True)
class Transfer:
    """Claim 8: best learning rate of Adam over width; `task` names what is trained."""

    widths: tuple[int, ...]
    lrs: tuple[float, ...]
    steps: int
    task: str = "digits"
    gpu: bool = False


SCHEMES = {
    "quick": Schemes((64, 256, 512)),
    "laptop": Schemes((64, 256, 1024), limit=(4096, 2, 1e-2)),
    "full": Schemes((64, 256, 1024, 4096, 16384), data="cifar", limit=(16384, 4, 1e-2), gpu=True),
}
SMOOTH = (("tanh", 4.0), ("silu", 1.0))
OTHERS = (("sigmoid", 4.0), ("relu", 1.0))
DIVERSITY = {
    "quick": Diversity(8, 1, 8, 8192, 4, 1e-10, (("tanh", 4.0),)),
    "laptop": Diversity(8, 4, 50, 8192, 4, 3e-2, SMOOTH, OTHERS),
    "full": Diversity(8, 4, 50, 2**20, 4, 1e-2, SMOOTH, OTHERS, accelerators=2, gpu=True),
}
MINIMUM = {
    "quick": Minimum((256,)),
    "laptop": Minimum((256, 1024)),
    "full": Minimum((64, 256, 1024, 4096, 16384), data="cifar", gpu=True),
}
CONVERGENCE = {
    "quick": Convergence((32, 64, 128, 256), 128, 16384, 4),
    "laptop": Convergence((32, 64, 128, 256, 512), 512, 65536, 4),
    "full": Convergence((32, 128, 512, 2048, 8192), 256, 65536, 4, gpu=True),
}
KERNEL = {
    "quick": Kernel("two points", (64, 256, 1024), 24, 5, 0.3),
    "laptop": Kernel("digits", (256, 1024, 4096), 5, 30, 2.0),
    "full": Kernel("digits", (256, 1024, 4096, 16384), 5, 30, 2.0, gpu=True),
}
TRANSFER = {
    "laptop": Transfer((64, 256, 1024), tuple(2.0**k for k in range(-12, -3)), 150),
    "full": Transfer(
        (128, 256, 512, 1024, 2048, 4096), tuple(2.0**k for k in range(-15, -4)), 300, task="text", gpu=True
    ),
}

S = TypeVar("S", Schemes, Diversity, Minimum, Convergence, Kernel, Transfer)


def at_scale(table: Mapping[str, S], run: Run) -> S:
    """The entry of a run's scale.

    Raises:
        NotRun: if there is none, or it needs a GPU and the run has none.
    """
    if run.scale not in table:
        raise NotRun("trains hundreds of networks; runs from --scale laptop")
    size = table[run.scale]
    if size.gpu:
        require_gpu(run, f"the full scale of {type(size).__name__.lower()}")
    return size
