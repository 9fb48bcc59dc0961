"""Optimisers that every machine with torch can time: torch's own and MARS with each of its backends.

A contender names the counterpart that does the nearest thing without the correction on the same backend, so
that a table answers what the correction costs: fused MARS against fused AdamW, mars-m against Muon.

All take their defaults (those of MARS are the paper's: betas 0.95 and 0.99, eps 1e-8, gamma 0.025); values
of learning rates and decays do not change the time of a step.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mars_optim.torch import MARS

Shapes = Sequence[tuple[int, ...]]
Step = Callable[[], Any]

BASELINE = "AdamW foreach"
MUON = "Muon, AdamW foreach on the rest"
# Muon orthogonalises in bfloat16. A CPU without instructions for it took 0.2 s for the 2e8 operations of the
# tiny set; many-4k has 44 times as many.
CPU_FLOPS = 1e9


@dataclass(frozen=True)
class Contender:
    """An optimiser on a list of parameters with gradients.

    Attributes:
        build: from parameters to the function that makes one step.
        streams: floats read or written per parameter by an ideal kernel of this update (spec section e); None
            where arithmetic is the limit.
        against: name of its counterpart.
    """

    build: Callable[[list[Tensor]], Step]
    streams: int | None
    against: str = BASELINE


def torch_contenders(shapes: Shapes, device: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """Optimisers of torch and ours, the baseline first, and what is missing here with the reason."""
    lineup = {
        BASELINE: Contender(lambda params: torch.optim.AdamW(params, foreach=True).step, 7),
        "AdamW for-loop": Contender(lambda params: torch.optim.AdamW(params, foreach=False).step, 7),
        "AdamW fused": Contender(lambda params: torch.optim.AdamW(params, fused=True).step, 7),
    }
    absent = {}
    for backend in ("foreach", "for-loop", "fused"):
        problem = fused_problem(device) if backend == "fused" else None
        if problem is not None:
            absent["MARS fused"] = f"not available: {problem}"
        else:
            lineup |= elementwise(backend)
    orthogonal, missing = orthogonalised(shapes, device)
    return lineup | orthogonal, absent | missing


def elementwise(backend: str) -> dict[str, Contender]:
    """MARS-AdamW and MARS-Lion on one backend, with the variants that move fewer bytes."""
    against = f"AdamW {backend}"
    lineup = {}
    for mars_type, clip, streams in (("mars-adamw", 1.0, 9), ("mars-adamw", None, 9), ("mars-lion", 1.0, 7)):
        if backend != "for-loop" or clip is not None:
            build = mars(backend, mars_type=mars_type, clip=clip)
            lineup[f"{mars_type} {backend}, clip={clip}"] = Contender(build, streams, against)
    if backend != "for-loop":
        build = mars(backend, mars_type="mars-lion", clip=None, memory_efficient=True)
        lineup[f"mars-lion {backend}, clip=None, memory_efficient"] = Contender(build, 5, against)
    if backend == "fused":
        for clip in (1.0, None):
            lineup[f"mars-adamw fused, clip={clip}, steal_grad"] = Contender(stealing(clip), 8, against)
    return lineup


def mars(backend: str, **options: Any) -> Callable[[list[Tensor]], Step]:
    """MARS on all parameters with the named backend."""
    chosen = {"foreach": backend == "foreach", "fused": backend == "fused"}
    return lambda params: MARS(params, **chosen, **options).step


def stealing(clip: float | None) -> Callable[[list[Tensor]], Step]:
    """Fused MARS that keeps .grad for itself instead of copying it.

    Each step takes .grad away, so each must be given a new one, as a backward pass gives one. Two sets of
    gradients made beforehand take turns: while one is the kept h_t, the other is the new .grad. The step
    therefore reads g and h from different memory, as in training, and nothing is allocated or filled within
    the time taken. What remains in it is one assignment of .grad per tensor, which counts against MARS. The
    parameters are views of the common ones with .grad fields of their own, so that the other contenders keep
    theirs.
    """

    def build(params: list[Tensor]) -> Step:
        own = [torch.nn.Parameter(param.detach()) for param in params]
        sets = itertools.cycle([[gradient_of(param).clone() for param in params] for _ in range(2)])
        optimizer = MARS(own, clip=clip, fused=True, steal_grad=True)

        def step() -> None:
            for param, grad in zip(own, next(sets), strict=True):
                param.grad = grad
            optimizer.step()

        return step

    return build


def gradient_of(param: Tensor) -> Tensor:
    """The gradient, which the benchmark has set."""
    if param.grad is None:
        raise ValueError("params must have gradients, got one without")
    return param.grad


def fused_problem(device: str) -> str | None:
    """Why fused MARS would fall back to lists here; None when it does not."""
    param = torch.nn.Parameter(torch.ones(2, 2, device=device))
    param.grad = torch.ones_like(param)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning says that it falls back
            MARS([param], fused=True).step()
    except (RuntimeError, Warning) as problem:
        return str(problem).splitlines()[0]
    return None


def orthogonalised(shapes: Shapes, device: str) -> tuple[dict[str, Contender], dict[str, str]]:
    """MARS-Shampoo and MARS-M beside Muon: all orthogonalise the hidden matrices and AdamW moves the rest."""
    names = ["mars-shampoo foreach", "mars-shampoo for-loop", "mars-m foreach", MUON]
    reason = too_much_arithmetic(shapes, device)
    if reason is not None:
        return {}, dict.fromkeys(names, reason)
    against = MUON if hasattr(torch.optim, "Muon") else BASELINE
    lineup = {
        "mars-shampoo foreach": Contender(hidden_mars("mars-shampoo", foreach=True), None, against),
        "mars-shampoo for-loop": Contender(hidden_mars("mars-shampoo", foreach=False), None, against),
        "mars-m foreach": Contender(hidden_mars("mars-m", foreach=True), None, against),
    }
    if device == "cpu":  # elsewhere bfloat16 is the default of both
        build = hidden_mars("mars-m", foreach=True, ns_dtype=torch.bfloat16)
        lineup["mars-m foreach, bfloat16 as Muon"] = Contender(build, None, against)
    if not hasattr(torch.optim, "Muon"):
        return lineup, {MUON: f"not available: needs torch >= 2.9, got {torch.__version__}"}
    lineup[MUON] = Contender(muon, None)
    return lineup, {}


def too_much_arithmetic(shapes: Shapes, device: str) -> str | None:
    """Why orthogonalised types are left out of a set; None when they are not."""
    flops = orthogonalisation_flops(shapes)
    if flops == 0:
        return "left out: this set has no hidden matrix"
    if flops > (CPU_FLOPS if device == "cpu" else math.inf):
        return f"left out on CPU: {flops:.1e} operations per step"
    return None


def hidden_mars(mars_type: str, **options: Any) -> Callable[[list[Tensor]], Step]:
    """An orthogonalised MARS on the hidden matrices, AdamW on embeddings and vectors."""

    def build(params: list[Tensor]) -> Step:
        hidden, rest = split(params)
        groups: list[dict[str, Any]] = [{"params": hidden}]
        if rest:
            groups.append({"params": rest, "algorithm": "adamw"})
        return MARS(groups, mars_type=mars_type, **options).step

    return build


def muon(params: list[Tensor]) -> Step:
    """torch.optim.Muon with the update scale of mars-m on the hidden matrices, AdamW on the rest."""
    hidden, rest = split(params)
    parts: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, adjust_lr_fn="match_rms_adamw")]
    if rest:
        parts.append(torch.optim.AdamW(rest, foreach=True))

    def step() -> None:
        for part in parts:
            part.step()

    return step


def split(params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden matrices, and the rest."""
    hidden = [param for param in params if is_hidden(tuple(param.shape))]
    return hidden, [param for param in params if not is_hidden(tuple(param.shape))]


def is_hidden(shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix that is usually orthogonalised: no embedding, none of 10^8 entries."""
    return len(shape) == 2 and max(shape) <= 4096


def orthogonalisation_flops(shapes: Shapes) -> int:
    """Operations of five Newton-Schulz steps on all hidden matrices (spec section e)."""
    sizes = [(min(shape), max(shape)) for shape in shapes if is_hidden(shape)]
    return sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sizes)
