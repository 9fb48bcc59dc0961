"""Forward multipliers as hooks: a Python float in front of a layer, outside its parameters.

A hook survives deepcopy, pickle, DistributedDataParallel, fully_shard, torch.compile and torch.export (where
it is one multiplication by a constant); an attribute of a parameter survives none of them. It scales what
enters a linear or convolution layer, so that the bias stays as it is, and what leaves an embedding.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["InputMultiplier", "OutputMultiplier", "multiplier_of", "set_multiplier"]


class InputMultiplier:
    """Forward pre-hook that multiplies a layer's input by a constant."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0] * self.value, *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] * self.value}

    def __repr__(self) -> str:
        return f"InputMultiplier({self.value!r})"


class OutputMultiplier:
    """Forward hook that multiplies a layer's output by a constant."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * self.value

    def __repr__(self) -> str:
        return f"OutputMultiplier({self.value!r})"


def multiplier_of(module: nn.Module) -> float:
    """The constant in front of a module's weight, 1 where there is none."""
    hooks: list[Mapping[int, Any]] = [module._forward_pre_hooks, module._forward_hooks]
    for hook in (hook for kind in hooks for hook in kind.values()):
        if isinstance(hook, (InputMultiplier, OutputMultiplier)):
            return hook.value
    return 1.0


def set_multiplier(module: nn.Module, value: float) -> None:
    """Put a constant in front of a module's weight, unless it is 1 or there already.

    Raises:
        ValueError: if another constant stands there.
    """
    present = multiplier_of(module)
    if present == value:
        return
    if present != 1.0:
        raise ValueError(
            f"roles must be those the model was scaled with: a {type(module).__name__} has the multiplier "
            f"{present!r}, these ask for {value!r}"
        )
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.register_forward_hook(OutputMultiplier(value))
    else:
        module.register_forward_pre_hook(InputMultiplier(value), with_kwargs=True)
