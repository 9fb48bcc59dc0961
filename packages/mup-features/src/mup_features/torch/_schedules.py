"""Schedulers that set absolute rates, with muP's factors per group.

OneCycleLR, CyclicLR, `eta_min` of a cosine, or a loop of one's own write the same rate into every group and
so erase the factors. The wrapper lets a scheduler see the base rates only, and puts `lr_scale` back after
each step; schedulers that multiply each group's own rate work with and without it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Inner = TypeVar("Inner", bound=LRScheduler | ReduceLROnPlateau)

__all__ = ["ScaledLRScheduler"]


class ScaledLRScheduler(Generic[Inner]):
    """A scheduler of the base rate; each group's rate is that times its `lr_scale`.

    Args:
        optimizer: built from `param_groups`.
        factory: makes the scheduler, as in `lambda opt: OneCycleLR(opt, max_lr=1e-2, total_steps=1000)`.

    Raises:
        ValueError: if a group has no `lr_scale`.
    """

    def __init__(self, optimizer: Optimizer, factory: Callable[[Optimizer], Inner]) -> None:
        if any("lr_scale" not in group for group in optimizer.param_groups):
            raise ValueError("optimizer must be built from param_groups: a group has no 'lr_scale'")
        self.optimizer = optimizer
        self._base: dict[int, float] = {}
        with self._base_rates():
            self.scheduler = factory(optimizer)

    def step(self, *args: Any, **kwargs: Any) -> None:
        """One step of the scheduler; arguments (a metric, an epoch) go to it."""
        with self._base_rates():
            self.scheduler.step(*args, **kwargs)

    def get_last_lr(self) -> list[float]:
        """The groups' rates, factors included."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """That of the scheduler."""
        return self.scheduler.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the scheduler; the groups' rates come back with the optimizer's own state dict."""
        self.scheduler.load_state_dict(state_dict)

    @contextmanager
    def _base_rates(self) -> Iterator[None]:
        """Groups hold base rates inside, rates with factors after.

        A rate that nobody touched since the last step is replaced by the base rate it came from: dividing by
        the factor again would let rounding pile up in schedules that build each rate on the last.
        """
        groups = self.optimizer.param_groups
        for index, group in enumerate(groups):
            lr, scale, base = group["lr"], group["lr_scale"], self._base.get(index)
            if isinstance(lr, Tensor):
                lr.div_(scale)
            else:
                group["lr"] = base if base is not None and base * scale == lr else lr / scale
        try:
            yield
        finally:
            for index, group in enumerate(groups):
                lr, scale = group["lr"], group["lr_scale"]
                if isinstance(lr, Tensor):
                    lr.mul_(scale)
                else:
                    self._base[index] = lr
                    group["lr"] = lr * scale
