"""What flax names differently before 0.12: the value of a variable, and a list of modules."""

from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array


def held(variable: nnx.Variable) -> Any:
    """The array of a variable, or its shape and type in a module made by `nnx.eval_shape`.

    flax 0.12 warns about the attribute that earlier versions have.
    """
    return variable.get_value() if hasattr(nnx.Variable, "get_value") else variable.value


def assign(variable: nnx.Variable, value: Array) -> None:
    """Replace the value of a variable, of another type or placement too; see `held`."""
    if hasattr(nnx.Variable, "set_value"):
        variable.set_value(value)
    else:
        variable.value = value


def module_list(modules: Sequence[nnx.Module]) -> Any:
    """Modules as an attribute: flax 0.12 asks for its own list, earlier versions take a plain one."""
    return nnx.List(modules) if hasattr(nnx, "List") else list(modules)
