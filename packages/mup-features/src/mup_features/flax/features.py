"""Records the features of any flax nnx model, and its empirical tangent kernel.

    before = record_features(model, batches, tag="init")
    train(model)
    after = record_features(model, batches, tag="trained")
    print(compare(before, after).to_markdown())

The model is copied inside one jitted function, set to evaluation there, and watched by `capture`: the user's
objects, statistics and random states stay as they are. Grams are summed in float64 by NumPy on the host,
whatever `jax_enable_x64` says.

A weight layer (an nnx module that owns a parameter of two or more dimensions) takes post-activations in and
puts pre-activations out; for any other module it is the other way round. Names say which: "fc2.input",
"fc2.output".
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from mup_features.snapshots import FeatureSnapshot, LayerFeatures, reference_features

from .capture import capture, named_modules
from .tangent_kernels import empirical_ntk, ntk_change

When = Literal["pre", "post", "both"]
Reduce = Literal["flatten", "mean", "tokens"] | Callable[[Array], Array]

__all__ = ["empirical_ntk", "ntk_change", "record_features"]


def record_features(
    model: nnx.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] = "auto",
    when: When = "post",
    *,
    tag: str = "",
    reduce: Reduce = "flatten",
    reference: FeatureSnapshot | nnx.Module | None = None,
    keep_features: bool = True,
    bounds: tuple[float, float] | None = None,
    forward: Callable[[Any, Any], Any] | None = None,
) -> FeatureSnapshot:
    """Snapshot of the features of all samples that the loader yields.

    Args:
        model: the model; its calls must go through its modules. Modules inside nnx.jit, nnx.scan, nnx.remat
            or nnx.vmap are not seen.
        loader: batches of numbers of samples on axis 0, the same for every snapshot to be compared. The
            function is compiled once for each shape.
        layers: "auto" for all weight layers, or paths of modules with wildcards ("blocks.*.mlp"). With
            "auto", pre leaves out the layer called last, whose output is the model's; post leaves out inputs
            that come before any weight layer has put something out (the data), and what another layer
            already got.
        when: "pre", "post" or "both".
        tag: the name of this time.
        reduce: what happens to axes beyond samples and features (always the last axis): "flatten" makes them
            features, "mean" averages over them, "tokens" makes every token or place a sample; or a function
            from the array to a matrix (samples, features).
        reference: an earlier snapshot that kept its features, or an earlier copy of the model, which then
            runs beside this one; the result can be compared with it although it keeps no features.
        keep_features: keep the features in the snapshot.
        bounds: range of the activation, to count saturated entries: (-1, 1) for tanh.
        forward: called with (model, batch). By default a batch is an array, a mapping of keyword arguments,
            or a sequence whose first entry is the input.

    Raises:
        ValueError: if the loader is empty, a pattern matches nothing, no layer was seen, a feature is not
            finite, or the reference does not fit.
        TypeError: if model is no nnx.Module.
    """
    if when not in get_args(When):
        raise ValueError(f"when must be 'pre', 'post' or 'both', got {when!r}")
    if not callable(reduce) and reduce not in ("flatten", "mean", "tokens"):
        raise ValueError(f"reduce must be 'flatten', 'mean', 'tokens' or a function, got {reduce!r}")
    runs = [_Run(m, layers, when, reduce, forward or _default_forward) for m in _models(model, reference)]
    batches = [loader] if hasattr(loader, "ndim") else loader
    held: list[dict[str, list[np.ndarray]]] = [{} for _ in runs]
    keys = []
    for batch in batches:
        for run, features in zip(runs, held, strict=True):
            for name, matrix in run(batch).items():
                features.setdefault(name, []).append(matrix)
        keys.append(_sample_keys(batch))
    if not keys:
        raise ValueError("loader must yield at least one batch, got none")
    if not held[0]:
        raise ValueError(f"layers must be called outside of nnx transforms, of {layers!r} none is")
    found = {}
    for name, parts in held[0].items():
        A0 = None
        if isinstance(reference, FeatureSnapshot):
            A0 = reference_features(reference, name)
        elif reference is not None:
            A0 = np.concatenate(_of_reference(held[1], name))
        A = np.concatenate(parts)
        if not np.isfinite(A).all():
            raise ValueError(f"features of layer {name!r} must be finite, got some that are not")
        if A0 is not None and A0.shape != A.shape:
            raise ValueError(f"reference of layer {name!r} must have shape {A.shape}, got {A0.shape}")
        found[name] = LayerFeatures.from_features(A, A0, keep=keep_features, bounds=bounds)
    metadata = {
        "framework": f"jax {jax.__version__}",
        "layers": layers if isinstance(layers, str) else list(layers),
        "when": when,
        "reduce": reduce if isinstance(reduce, str) else "function",
    }
    return FeatureSnapshot(tag, found, np.concatenate(keys), metadata)


class _Run:
    """One model as a jitted function from a batch to the matrices of its layers."""

    def __init__(
        self,
        model: nnx.Module,
        layers: str | Sequence[str],
        when: When,
        reduce: Reduce,
        forward: Callable[[Any, Any], Any],
    ) -> None:
        modules = named_modules(model)
        self.names = _chosen(modules, layers)
        self.weighted = {name for name in modules if _is_weight_layer(modules[name])}
        self.auto, self.when, self.forward = layers == "auto", when, forward
        self.reduce: Reduce = reduce
        self.graph, self.state = nnx.split(model)
        # Keys in the order of the calls, known once the function was traced; jit sorts dictionaries.
        self.order: list[str] = []
        self.jitted = jax.jit(self._traced)

    def __call__(self, batch: Any) -> dict[str, np.ndarray]:
        matrices = self.jitted(self.state, batch)
        return {key: np.asarray(matrices[key]) for key in self.order}

    def _traced(self, state: Any, batch: Any) -> dict[str, Array]:
        model = nnx.merge(self.graph, state)
        model.eval()
        found: dict[str, Array] = {}
        calls: dict[str, int] = {}
        # Inputs that were seen; holding them keeps their identities unique.
        seen: dict[int, Any] = {}
        progress = {"computed": False, "last": ""}

        def report(name: str, module: nnx.Module, args: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
            calls[name] = calls.get(name, 0) + 1
            again = "" if calls[name] == 1 else f"#{calls[name]}"
            weighted = name in self.weighted
            value, before = _main_array(args), progress["computed"]
            if value is not None and self.when in ("post" if weighted else "pre", "both"):
                skipped = self.auto and (id(value) in seen or not before)
                seen[id(value)] = value
                if not skipped:
                    found[f"{name}.input{again}"] = _as_matrix(value, self.reduce)
            progress["computed"] = before or weighted
            value = _main_array(output)
            if value is not None and self.when in ("pre" if weighted else "post", "both"):
                progress["last"] = f"{name}.output{again}"
                found[progress["last"]] = _as_matrix(value, self.reduce)

        with capture(model, report, self.names):
            self.forward(model, batch)
        if self.auto:
            found.pop(progress["last"], None)
        self.order = list(found)
        return found


def _models(model: nnx.Module, reference: FeatureSnapshot | nnx.Module | None) -> list[nnx.Module]:
    return [model, *([] if reference is None or isinstance(reference, FeatureSnapshot) else [reference])]


def _chosen(modules: Mapping[str, nnx.Module], layers: str | Sequence[str]) -> list[str]:
    if layers == "auto":
        found = [name for name, module in modules.items() if _is_weight_layer(module)]
        if not found:
            raise ValueError("layers='auto' needs a module with a parameter of 2 or more axes, got none")
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"layers must match modules of the model, {pattern!r} matches none")
    return [name for name in modules if any(fnmatchcase(name, pattern) for pattern in patterns)]


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


def _of_reference(held: Mapping[str, list[np.ndarray]], name: str) -> list[np.ndarray]:
    if name not in held:
        raise ValueError(f"reference must call layer {name!r} as the model does")
    return held[name]


def _sample_keys(batch: Any) -> Float[np.ndarray, " samples"]:
    """One number for each sample: its first input against fixed weights that tell entries apart."""
    first: ArrayLike = jax.tree.leaves(batch)[0]
    flat = np.asarray(first).reshape(len(np.asarray(first)), -1).astype(np.float64)
    return flat @ np.cos(np.arange(flat.shape[1]))
