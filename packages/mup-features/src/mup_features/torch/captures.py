"""What of a torch model is recorded: which tensors count as pre- and post-activations, and as one matrix.

A weight layer (linear, convolution, embedding) takes post-activations in and puts pre-activations out: its
input is x^{l-1}, its output h^l. For any other module (activation, norm, block) it is the other way round:
pre is what goes in, post what comes out. Names say which: "fc2.input", "fc2.output", "blocks.0.output".

With `layers="auto"` all weight layers are looked at. Pre then leaves out the layer called last, whose output
is the model's; post leaves out the data (inputs that share memory with the batch, or that come before any
weight layer has put something out) and what another layer already got (keys and values beside queries).
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

When = Literal["pre", "post", "both"]
Reduce = Literal["flatten", "mean", "tokens"] | Callable[[Tensor], Tensor]

_CHANNELS_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)


def plain_name(name: str) -> str:
    """The name of a module without the wrappers of torch.compile."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod").removesuffix("_orig_mod")


def chosen_modules(model: nn.Module, layers: str | Sequence[str]) -> dict[str, nn.Module]:
    """Modules by name: the weight layers for "auto", else those whose name matches a pattern (fnmatch).

    Raises:
        ValueError: if there are none, or a pattern matches none.
    """
    named = {}
    for name, module in model.named_modules():
        if not is_compiled(module):
            named.setdefault(plain_name(name), module)
    if layers == "auto":
        found = {name: module for name, module in named.items() if is_weight_layer(module)}
        if not found:
            raise ValueError("layers='auto' needs a module with a weight of two or more dimensions, got none")
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in named):
            raise ValueError(f"layers must match modules of the model, {pattern!r} matches none")
    return {n: m for n, m in named.items() if any(fnmatchcase(n, pattern) for pattern in patterns)}


def is_compiled(module: nn.Module) -> bool:
    """Whether it is a wrapper of torch.compile; importing that to ask would take seconds."""
    dynamo = sys.modules.get("torch._dynamo")
    return dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def is_weight_layer(module: nn.Module) -> bool:
    """Whether the module itself owns a weight of two or more dimensions."""
    return any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False))


class Capture:
    """The tensors of one forward pass, through hooks that are registered only while it runs.

    Args:
        model: the model.
        layers: "auto" or patterns.
        when: "pre", "post" or "both".
        keep: called with (key, module, tensor) for what is recorded; it must copy.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str],
        when: When,
        keep: Callable[[str, nn.Module, Tensor], None],
    ) -> None:
        self.modules, self.when, self.keep = chosen_modules(model, layers), when, keep
        self.auto = layers == "auto"
        # With "auto", the key of the output that came last in the pass: the model's own.
        self.readout: str | None = None
        self._calls: dict[str, int] = {}
        self._data: set[int] = set()
        self._inputs: dict[int, Tensor] = {}
        self._computed = False

    @contextmanager
    def recording(self, inputs: Sequence[Tensor]) -> Iterator[None]:
        """Hooks while one batch passes; `inputs` are the tensors it consists of."""
        # Inputs are held until the pass ends: an identity is only one as long as its object lives.
        self._calls, self._inputs, self._computed = {}, {}, False
        self._data = {tensor.untyped_storage().data_ptr() for tensor in inputs if _plain(tensor)}
        with ExitStack() as stack:
            for name, module in self.modules.items():
                for register, hook in (
                    (module.register_forward_pre_hook, self._before(name)),
                    (module.register_forward_hook, self._after(name)),
                ):
                    stack.callback(register(hook, with_kwargs=True).remove)
            yield
        self._inputs = {}

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[name] = self._calls.get(name, 0) + 1
            tensor = main_tensor((*args, *kwargs.values()))
            kind = "post" if is_weight_layer(module) else "pre"
            if tensor is None or self.when not in (kind, "both"):
                return
            if self.auto and (id(tensor) in self._inputs or self._is_data(tensor)):
                return
            self._inputs[id(tensor)] = tensor
            self.keep(self._key(name, "input"), module, tensor)

        return hook

    def _after(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:  # noqa: ARG001
            tensor = main_tensor(output)
            kind = "pre" if is_weight_layer(module) else "post"
            self._computed = self._computed or is_weight_layer(module)
            if tensor is None or self.when not in (kind, "both"):
                return
            key = self._key(name, "output")
            if self.auto:
                self.readout = key
            self.keep(key, module, tensor)

        return hook

    def _is_data(self, tensor: Tensor) -> bool:
        return not self._computed or (_plain(tensor) and tensor.untyped_storage().data_ptr() in self._data)

    def _key(self, name: str, side: str) -> str:
        again = self._calls[name]
        return f"{name}.{side}" if again == 1 else f"{name}.{side}#{again}"


def main_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor with a sample axis in what a module takes or returns."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() and value.ndim else None
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((found for entry in value if (found := main_tensor(entry)) is not None), None)
    return None


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in a batch."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [tensor for entry in value for tensor in tensors_of(entry)]
    return []


def as_matrix(tensor: Tensor, module: nn.Module, reduce: Reduce) -> Float[Tensor, "samples features"]:
    """One row for each sample, samples on axis 0; half precision becomes float32, which is exact.

    Args:
        tensor: (samples, ...), tokens (samples, ..., features) or maps (samples, channels, ...).
        module: the layer; convolutions, pools and batch norms have their channels on axis 1.
        reduce: "flatten": all other axes are features; "mean": over tokens or places; "tokens": every token
            or place is a sample; or a function that returns the matrix.

    Raises:
        ValueError: if a function returns no matrix.
    """
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()  # type: ignore[operator]
    tensor = tensor.detach()
    if callable(reduce):
        matrix = reduce(tensor)
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
            raise ValueError(f"reduce must return a tensor (samples, features), got {shape}")
    elif tensor.ndim <= 2 or reduce == "flatten":
        matrix = tensor.reshape(len(tensor), -1)
    else:
        channels = 1 if isinstance(module, _CHANNELS_SECOND) else -1
        places = tensor.movedim(channels, -1).reshape(len(tensor), -1, tensor.shape[channels])
        # In float32 at least: a sum of many bfloat16 numbers stops growing.
        wide = torch.promote_types(places.dtype, torch.float32)
        matrix = places.mean(1, dtype=wide) if reduce == "mean" else places.flatten(0, 1)
    return matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix


def _plain(tensor: Tensor) -> bool:
    """Whether it has a storage of its own (a DTensor has not)."""
    return not hasattr(tensor, "full_tensor")
