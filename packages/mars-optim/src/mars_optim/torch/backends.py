"""Which backend does the step of a tensor, and why."""

import functools
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from . import _cpu
from ._foreach import mars_foreach
from ._loop import mars_loop
from .rule import UpdateRule


@dataclass(frozen=True)
class Backend:
    """One way to do a step.

    Args:
        name: "loop" (`_loop.py`), "foreach" (`_foreach.py`), "cpu" (`_cpu.py`) or "triton" (`_triton.py`).
        reason: why this one, in a line.
    """

    name: Literal["loop", "foreach", "cpu", "triton"]
    reason: str

    @property
    def fused(self) -> bool:
        """Whether the backend copies the gradients in the pass that reads them."""
        return self.name in ("cpu", "triton")


_PLAIN = (Tensor, torch.nn.Parameter)
_SUBCLASS = Backend("loop", "lists of tensor subclasses cannot be stepped together")
_COMPLEX = Backend("loop", "complex numbers are stepped as pairs of reals")
_NO_LISTS = Backend("loop", "foreach=False")
_LISTS = Backend("foreach", "plain dense tensors and no fused kernels asked for")
_NO_KERNELS = Backend("foreach", "fused=True, but kernels are not available here")
_CPU = Backend("cpu", "fused=True on the CPU, and the kernels compile here")
_TRITON = Backend("triton", "fused=True on CUDA, and triton is installed")


def choose_backend(param: Tensor, *, foreach: bool | None, fused: bool | None) -> Backend:
    """The backend for a tensor; where fused kernels were asked for and are missing, warns once and says why.

    Kernels are used on request only: on the CPU they cost seconds of compilation on a machine that has not
    compiled them before, and on CUDA they have not been measured yet.

    Args:
        param: the parameter; its type, dtype and device decide.
        foreach: False forbids lists.
        fused: True asks for kernels.
    """
    if type(param) not in _PLAIN:
        return _SUBCLASS
    if param.is_complex():
        return _COMPLEX
    if fused:
        if param.device.type == "cpu":
            return _CPU if _cpu.available_or_warn() else _NO_KERNELS
        return _TRITON if _triton_or_warn(param.device.type) else _NO_KERNELS
    return _NO_LISTS if foreach is False else _LISTS


def take_step(
    backend: Backend,
    params: list[Tensor],
    grads: list[Tensor],
    references: list[Tensor] | None,
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    rule: UpdateRule,
    *,
    norm: Tensor | None,
    stores: list[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    """One step of `functional.mars` by the backend.

    Args:
        backend: from `choose_backend`.
        params: as in `functional.mars`, and so the other lists.
        grads: gradients g_t.
        references: h_t; may be the tensors of `stores`.
        exp_avgs: momenta.
        exp_avg_sqs: second moments.
        max_exp_avg_sqs: their running maxima.
        steps: number of steps done so far.
        rule: what to do.
        norm: the norm to clip by; None: each tensor's own.
        stores: where a fused backend copies the gradients to; the others copy nothing and need None.
        generator: for stochastic rounding.
    """
    lists = (params, grads, references, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
    if backend.name == "cpu":
        return _cpu.mars_cpu(*lists, rule, norm, stores, generator)
    if backend.name == "triton":
        from ._triton import mars_triton

        return mars_triton(*lists, rule, norm, stores, generator)
    step = mars_foreach if backend.name == "foreach" else mars_loop
    return step(*lists, rule, norm, generator)


@functools.cache
def _triton_or_warn(device: str) -> bool:
    reason = None
    if device != "cuda":
        reason = f"there are none for the device {device!r}"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    if reason is not None:
        warnings.warn(f"fused kernels are not available, using foreach: {reason}", UserWarning, stacklevel=4)
    return reason is None
