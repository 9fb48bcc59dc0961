"""What the axes of an nnx module's parameters mean, and how flax initialises them.

Kernels are (in, out), those of convolutions (kernel.., in / groups, out), embeddings (vocabulary, features).
flax's default for kernels and embeddings is a normal law of variance 1/fan; biases start at zero.
"""

from typing import Any

from flax import nnx

from mup_features.roles import Layout

__all__ = ["layout_of", "node_at", "parameters", "value_of"]

# layers whose "bias" and "scale" are added or multiplied entry by entry, also where they have several axes
_ENTRYWISE = (
    nnx.BatchNorm,
    nnx.GroupNorm,
    nnx.LayerNorm,
    nnx.RMSNorm,
    nnx.Linear,
    nnx.LinearGeneral,
    nnx.Conv,
    nnx.ConvTranspose,
    nnx.Einsum,
    *([nnx.InstanceNorm] if hasattr(nnx, "InstanceNorm") else []),  # flax >= 0.12
)


def parameters(model: Any) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """Name -> path and variable of every parameter; a shared one appears once, under the path flax gives it.

    Args:
        model: a module, also an abstract one from `nnx.eval_shape`.

    Raises:
        TypeError: if it is no module.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    return {".".join(map(str, path)): (path, node_at(model, path)) for path in paths}


def node_at(model: Any, path: tuple[Any, ...]) -> Any:
    """What lies at a path of the graph: attributes by name, entries of lists and dictionaries by key.

    Args:
        model: the module.
        path: parts as flax gives them.
    """
    node = model
    for part in path:
        node = getattr(node, part) if isinstance(part, str) and hasattr(node, part) else node[part]
    return node


def value_of(variable: Any) -> Any:
    """The array of a variable, or the ShapeDtypeStruct of an abstract one.

    Args:
        variable: the variable.
    """
    # newer flax warns of the attribute, older has only that
    return variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable.raw_value


def layout_of(owner: Any, attribute: Any, shape: tuple[int, ...]) -> Layout:
    """Layout of a parameter.

    Args:
        owner: the module that holds it.
        attribute: under which name.
        shape: its shape.
    """
    if attribute == "kernel":
        layout = _kernel(owner, shape)
        if layout is not None:
            return layout
    if attribute == "embedding" and isinstance(owner, nnx.Embed):
        return Layout("embedding", fan_out=(1,), default_fan=((1,),))
    if len(shape) <= 1 or (isinstance(owner, _ENTRYWISE) and attribute in ("bias", "scale")):
        return Layout("vector", fan_out=tuple(range(len(shape))))
    return Layout("free")


def _kernel(owner: Any, shape: tuple[int, ...]) -> Layout | None:
    last = len(shape) - 1
    if isinstance(owner, nnx.Linear):
        return Layout("linear", fan_in=(0,), fan_out=(1,), default_fan=((0,),))
    if isinstance(owner, nnx.LinearGeneral):
        batch, outputs = len(owner.batch_axis), len(shape) - len(owner.out_features)
        inputs = tuple(range(batch, outputs))
        return Layout("linear", inputs, tuple(range(outputs, len(shape))), (tuple(range(outputs)),))
    if isinstance(owner, nnx.ConvTranspose) and owner.transpose_kernel:
        return Layout("conv", fan_in=(last,), fan_out=(last - 1,), default_fan=(tuple(range(last)),))
    if isinstance(owner, (nnx.Conv, nnx.ConvTranspose)):
        return Layout("conv", fan_in=(last - 1,), fan_out=(last,), default_fan=(tuple(range(last)),))
    if isinstance(owner, nnx.Einsum) and owner.einsum_str is not None:
        return _einsum(owner.einsum_str, last)
    return None


def _einsum(equation: str, last: int) -> Layout:
    """Fan-in: axes of the kernel that the result lacks; fan-out: those that the input lacks."""
    left, result = equation.replace(" ", "").replace("...", "").split("->")
    inputs, kernel = left.split(",")
    fan_in = tuple(axis for axis, index in enumerate(kernel) if index not in result)
    fan_out = tuple(axis for axis, index in enumerate(kernel) if index not in inputs)
    return Layout("linear", fan_in, fan_out, (tuple(range(last)),))
