"""Where the arrays of flax modules come from and where they live: torch state dicts, and devices by heads.

A torch matrix (out, in) becomes a kernel (in, *axes of out) or (*axes of in, out); rows r * h + head of A and
r * D + feature of B are the axes (R, h) and (R, D) of that kernel; its metadata `input_axes` says how many of
its axes are inputs. Names are the same but for the last one.
"""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ._flax_versions import assign, held

Module = TypeVar("Module", bound=nnx.Module)
TIED = ("lm_head.weight", "model.embed_tokens.weight")


def from_torch(state_dict: Mapping[str, Any], module: Module) -> Module:
    """Copy the weights of a torch `TPAttention`, `T6` or `T6ForCausalLM` into the flax module; return it.

    Args:
        state_dict: tensors or NumPy arrays by name, as `state_dict()` or safetensors give them.
        module: `TPAttention` or `T6` of the same sizes and options; one made by `nnx.eval_shape`, without
            initial values, does as well. Types and placement of its parameters stay.

    Raises:
        ValueError: if a name is missing or left over, a shape does not fit, or an output matrix that should
            be tied differs from the embedding. Nothing has been copied then.
    """
    given = {name: _as_numpy(value) for name, value in state_dict.items()}
    parameters = {_torch_name(path): variable for path, variable in _variables(module, nnx.Param)}
    if TIED[0] in given and TIED[0] not in parameters:
        if TIED[1] in given and not np.array_equal(given[TIED[0]], given[TIED[1]]):
            raise ValueError(f"state_dict must have {TIED[0]} equal to {TIED[1]}: the module ties them")
        del given[TIED[0]]
    missing, unknown = sorted(parameters.keys() - given.keys()), sorted(given.keys() - parameters.keys())
    if missing or unknown:
        raise ValueError(
            f"state_dict must have the names of the module: missing {missing}, unknown {unknown}"
        )
    values = {name: _laid_out(name, given[name], variable) for name, variable in parameters.items()}
    for name, variable in parameters.items():
        like = held(variable)
        assign(variable, jax.device_put(values[name].astype(like.dtype), like.sharding))
    return module


def shard_heads(module: Module, mesh: Mesh, axis: str) -> Module:
    """Place a layer, a model or a cache on a mesh, cut along the heads, in place; return it.

    Every A, W^O and the gate are cut by heads, the matrices of SwiGLU by hidden features where that goes
    evenly; every B, norm and the embedding lie whole on each device. Under `jit` XLA adds the sums over
    devices. A device then caches R_K (h/p + D) + R_V (h/p + E) numbers per token.

    Args:
        module: `TPAttention`, `T6`, or the cache of one.
        mesh: devices.
        axis: name of its axis that heads are spread over.

    Raises:
        ValueError: if the mesh has no such axis or its size does not divide the number of heads. Nothing has
            been moved then.
    """
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names}, got {axis!r}")
    parts = mesh.shape[axis]
    placed = []
    for path, variable in _variables(module, nnx.Variable):
        cut, value = _cut_axis(variable), held(variable)
        if cut is not None and value.shape[cut] % parts:
            if "head_axis" in variable.get_metadata():
                raise ValueError(
                    f"num_heads must be a multiple of the {parts} devices of axis {axis!r}, got "
                    f"{value.shape[cut]} heads in {'.'.join(map(str, path))}"
                )
            cut = None
        spec = P() if cut is None else P(*(axis if i == cut else None for i in range(value.ndim)))
        placed.append((variable, NamedSharding(mesh, spec)))
    for variable, sharding in placed:
        assign(variable, jax.device_put(held(variable), sharding))
    return module


# ---------------------------------------------------------------------------------------------- the pieces


def _variables(module: nnx.Module, kind: type[nnx.Variable]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    return ((path, node) for path, node in nnx.iter_graph(module) if isinstance(node, kind))


def _torch_name(path: tuple[Any, ...]) -> str:
    *modules, last = map(str, path)
    return ".".join([*modules, "weight" if last in ("kernel", "embedding") else last])


def _laid_out(name: str, array: np.ndarray, variable: nnx.Param) -> np.ndarray:
    """The torch array with the axes of the variable."""
    shape = held(variable).shape
    inputs = variable.get_metadata().get("input_axes")
    if inputs is not None:
        expected = (prod(shape[inputs:]), prod(shape[:inputs]))
    else:
        expected = (prod(shape),) if name.endswith("bias") else shape
    if array.shape != expected:
        raise ValueError(f"state_dict[{name!r}] must have shape {expected}, got {array.shape}")
    return (array if inputs is None else array.T).reshape(shape)


def _cut_axis(variable: nnx.Variable) -> int | None:
    metadata = variable.get_metadata()
    return metadata.get("head_axis", metadata.get("split_axis"))


def _as_numpy(value: Any) -> np.ndarray:
    """A torch tensor or array as NumPy; bfloat16 tensors, which NumPy has no name for, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return value.numpy()
    return np.asarray(value)
