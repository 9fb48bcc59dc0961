"""One nnx model as jitted functions from a batch to matrices of features, sketched and cut into columns.

The model is merged anew inside them, set to evaluation there, and watched by `capture`: the user's objects,
statistics and random states stay as they are. What does not change in training, a `Plan`, is a static
argument of functions that live as long as this module, so a second snapshot compiles nothing.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from .capture import capture, named_modules

When = Literal["pre", "post", "both"]
Reduce = Literal["flatten", "mean", "tokens"] | Callable[[Array], Array]
# Unlike a dictionary, which jit sorts, it comes back with the layers in the order of their calls.
Matrices = OrderedDict[str, Array]

__all__ = ["Reduce", "Run", "When", "on_host"]


@dataclass(frozen=True)
class Plan:
    """What of a model is recorded.

    Attributes:
        graph: the model's graph definition.
        names: paths of the modules that are watched.
        weighted: paths of all weight layers.
        auto: whether the layers were chosen by "auto".
        when: "pre", "post" or "both".
        reduce: see `record_features`.
        forward: called with (model, batch).
    """

    graph: Any
    names: tuple[str, ...]
    weighted: frozenset[str]
    auto: bool
    when: When
    reduce: Reduce
    forward: Callable[[Any, Any], Any]


class _Unhashable(Plan):
    """A plan equal to itself only, for a model with a list or an array among its plain attributes."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class Run:
    """A model that is called with (batch, index) and returns columns `index::passes` of its layers' features.

    Every passes-th column and not a block of them: features that are sharded over devices are then cut on
    the device where they are.

    Args:
        model: the model.
        layers: "auto" or patterns.
        when: "pre", "post" or "both".
        reduce: see `record_features`.
        forward: called with (model, batch).
        max_features: columns of the Gaussian sketch of wider layers; None for no sketch.
        seed: of the sketch.
        passes: >= 1.

    Attributes:
        widths: name -> number of features before any sketch, in the order of the calls; filled by the first
            call.

    Raises:
        ValueError: if a pattern matches nothing; at a call, if a batch has other layers or features than the
            first.
    """

    def __init__(
        self,
        model: nnx.Module,
        layers: str | Sequence[str],
        when: When,
        reduce: Reduce,
        forward: Callable[[Any, Any], Any] | None,
        *,
        max_features: int | None,
        seed: int,
        passes: int,
    ) -> None:
        modules = named_modules(model)
        graph, self.state = nnx.split(model)
        weighted = frozenset(name for name in modules if _is_weight_layer(modules[name]))
        parts = (graph, _chosen(modules, layers), weighted, layers == "auto", when, reduce)
        self.plan = _plan(*parts, forward or _default_forward)
        self.max_features, self.seed, self.passes = max_features, seed, passes
        self.widths: dict[str, int] = {}
        self._sketches: dict[str, Array] = {}

    def __call__(self, batch: Any, index: int) -> dict[str, Float[np.ndarray, "samples columns"]]:
        self._see(
            {name: m.shape[1] for name, m in _matrices.eval_shape(self.plan, self.state, batch).items()}
        )
        found = _columns(self.plan, self.passes, self.state, batch, self._sketches, index)
        return {
            # beyond them is the filling
            name: on_host(found[name])[:, : len(range(index, self.dimension(name), self.passes))]
            for name in self.widths
        }

    def dimension(self, name: str) -> int:
        """Number of columns of a layer in all passes together."""
        return min(self.widths[name], self.max_features or self.widths[name])

    def sketched(self, name: str) -> bool:
        """Whether a layer is replaced by a sketch."""
        return self.dimension(name) < self.widths[name]

    def _see(self, widths: dict[str, int]) -> None:
        """Takes over the layers of the first batch, and compares those of later ones."""
        if not self.widths:
            self.widths = widths
            wide = [name for name in widths if self.sketched(name)]
            self._sketches = {name: jnp.asarray(self._sketch(name)) for name in wide}
        if list(widths) != list(self.widths):
            raise ValueError(
                f"model must call the same layers for every batch, got {list(self.widths)} and {list(widths)}"
            )
        for name, n in widths.items():
            if n != self.widths[name]:
                raise ValueError(
                    f"layer {name!r} must have one number of features in all batches, got "
                    f"{self.widths[name]} and {n}; for inputs of varying length give reduce='mean' or "
                    "'tokens'"
                )

    def _sketch(self, name: str) -> Float[np.ndarray, "n columns"]:
        """Gaussian matrix that depends on seed, layer and sizes only, not on devices or versions of jax."""
        n = self.widths[name]
        generator = np.random.default_rng([self.seed, crc32(name.encode())])
        normal = generator.standard_normal((n, self.dimension(name)), dtype=np.float32)
        # Means over k columns then estimate means over n: (1/k) |sketch|^2 = (1/n) |a|^2 on average.
        return normal / np.float32(n) ** 0.5


@partial(jax.jit, static_argnums=(0, 1))
def _columns(
    plan: Plan, passes: int, state: Any, batch: Any, sketches: Mapping[str, Array], index: Any
) -> Matrices:
    """What leaves the devices of the matrices of all layers."""
    found = _matrices(plan, state, batch)
    for name, sketch in sketches.items():
        # Accelerators multiply float32 with fewer bits unless told otherwise.
        highest = jax.lax.Precision.HIGHEST
        found[name] = jnp.matmul(found[name], sketch.astype(found[name].dtype), precision=highest)
    if passes == 1:
        return found
    return OrderedDict((name, _every(matrix, index, passes)) for name, matrix in found.items())


@partial(jax.jit, static_argnums=0)
def _matrices(plan: Plan, state: Any, batch: Any) -> Matrices:
    """Features (samples, n) of all layers."""
    model = nnx.merge(plan.graph, state)
    model.eval()
    found: Matrices = OrderedDict()
    calls: dict[str, int] = {}
    # Inputs that were seen; holding them keeps their identities unique.
    seen: dict[int, Any] = {}
    progress = {"computed": False, "last": ""}

    def report(name: str, module: nnx.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
        calls[name] = calls.get(name, 0) + 1
        again = "" if calls[name] == 1 else f"#{calls[name]}"
        weighted = name in plan.weighted
        value, before = _main_array(args), progress["computed"]
        if value is not None and plan.when in ("post" if weighted else "pre", "both"):
            skipped = plan.auto and (id(value) in seen or not before)
            seen[id(value)] = value
            if not skipped:
                found[f"{name}.input{again}"] = _as_matrix(value, plan.reduce)
        progress["computed"] = before or weighted
        value = _main_array(output)
        if value is not None and plan.when in ("pre" if weighted else "post", "both"):
            progress["last"] = f"{name}.output{again}"
            found[progress["last"]] = _as_matrix(value, plan.reduce)

    with capture(model, report, plan.names):
        plan.forward(model, batch)
    if plan.auto:
        found.pop(progress["last"], None)
    return found


def on_host(array: Any) -> np.ndarray:
    """The whole of an array, also of one whose shards lie on several devices or in several processes."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def _every(matrix: Float[Array, "samples features"], index: Any, passes: int) -> Array:
    """Columns index, index + passes, ..; filled with zeros to one number of columns for every index."""
    n = matrix.shape[1]
    whole = jnp.pad(matrix, ((0, 0), (0, -n % passes)))
    return whole.reshape(len(whole), -1, passes)[:, :, index]


def _plan(*parts: Any) -> Plan:
    plan = Plan(*parts)
    try:
        hash(plan)
    except TypeError:
        return _Unhashable(*parts)
    return plan


def _chosen(modules: Mapping[str, nnx.Module], layers: str | Sequence[str]) -> tuple[str, ...]:
    if layers == "auto":
        found = [name for name, module in modules.items() if _is_weight_layer(module)]
        if not found:
            raise ValueError("layers='auto' needs a module with a parameter of 2 or more axes, got none")
        return tuple(found)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"layers must match modules of the model, {pattern!r} matches none")
    return tuple(name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns))


def _is_weight_layer(module: nnx.Module) -> bool:
    own = [value for value in vars(module).values() if isinstance(value, nnx.Param)]
    return callable(module) and any(np.ndim(value[...]) >= 2 for value in own)


def _default_forward(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _main_array(value: Any) -> Array | None:
    """The first floating-point array with a sample axis in what a module takes or returns."""
    leaves = jax.tree.leaves(value)
    usable = (leaf for leaf in leaves if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating))
    return next((leaf for leaf in usable if leaf.ndim), None)


def _as_matrix(value: Array, reduce: Reduce) -> Float[Array, "samples features"]:
    """One row for each sample; half precision becomes float32, which is exact."""
    if callable(reduce):
        matrix = reduce(value)
        if jnp.ndim(matrix) != 2:
            raise ValueError(f"reduce must return an array (samples, features), got {jnp.shape(matrix)}")
    elif value.ndim <= 2 or reduce == "flatten":
        matrix = value.reshape(len(value), -1)
    elif reduce == "mean":
        # In float32 at least: a sum of many bfloat16 numbers stops growing.
        wide = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        matrix = wide.mean(tuple(range(1, value.ndim - 1)))
    else:
        matrix = value.reshape(-1, value.shape[-1])
    return matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
