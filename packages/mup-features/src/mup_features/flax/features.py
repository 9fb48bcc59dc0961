"""Records the features of any flax nnx model, and its empirical tangent kernel.

    before = record_features(model, batches, tag="init")
    train(model)
    after = record_features(model, batches, tag="trained")
    print(compare(before, after).to_markdown())

The model is copied inside a jitted function, set to evaluation there, and watched by `capture`: the user's
objects, statistics and random states stay as they are. Later snapshots of the same model, layers, `reduce`
and `forward` use what the first one compiled.

A layer's features leave the devices batch by batch and are held on the host until the loader has been gone
over, samples x n in the model's precision; then they enter float64 sums by NumPy, 16 MB at a time, whatever
`jax_enable_x64` says. `passes=k` goes over the loader k times and holds every k-th column each time: without
kept features that is O(samples^2 + samples n / k) on the host for each layer, and on the devices what a
forward pass needs. `max_features` puts a Gaussian sketch in the place of wider layers, on the devices.
Parameters and batches may be sharded over devices in any way; if over several processes, all of them call
this function with the same arguments.

A weight layer (an nnx module that owns a parameter of two or more dimensions) takes post-activations in and
puts pre-activations out; for any other module it is the other way round. Names say which: "fc2.input",
"fc2.output".
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from mup_features.similarity import saturation_fraction
from mup_features.snapshots import (
    FeatureSnapshot,
    LayerFeatures,
    check_same_features,
    check_same_width,
    reference_features,
)
from mup_features.streaming import StreamingGram

from ._runs import Reduce, Run, When, on_host
from .tangent_kernels import empirical_ntk, ntk_change

__all__ = ["empirical_ntk", "ntk_change", "record_features"]

Held = dict[str, list[np.ndarray]]


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
    max_features: int | None = None,
    seed: int = 0,
    passes: int = 1,
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
        keep_features: keep the features (or sketches) in the snapshot.
        bounds: range of the activation, to count saturated entries: (-1, 1) for tanh.
        forward: called with (model, batch). By default a batch is an array, a mapping of keyword arguments,
            or a sequence whose first entry is the input. As under jax.jit, what it, `reduce` and the model
            read beside arrays must not change in place between snapshots.
        max_features: wider layers are replaced by a Gaussian sketch of so many columns as soon as they
            appear. Inner products then have errors of 1 / sqrt(max_features) of the norms. None: no sketch.
        seed: of the sketch, >= 0. The same seed gives the same sketch, whatever the batches and devices.
        passes: how often the loader is gone over, >= 1; more take less memory.

    Raises:
        ValueError: if an option is out of range; the loader is empty, cannot be gone over `passes` times or
            gives other samples then; a pattern matches nothing or no layer was seen; batches differ in
            layers or features; a feature is not finite; or the reference does not fit.
        TypeError: if model is no nnx.Module.
    """
    _validate(when, reduce, bounds, max_features, seed, passes)
    batches = [loader] if hasattr(loader, "ndim") else loader
    if passes > 1 and iter(batches) is batches:
        raise ValueError(f"loader must be iterable {passes} times (passes), got an iterator")
    sketch = {"max_features": max_features, "seed": seed}
    models = [model] if reference is None or isinstance(reference, FeatureSnapshot) else [model, reference]
    runs = [Run(m, layers, when, reduce, forward, passes=passes, **sketch) for m in models]
    total: dict[str, _Layer] = {}
    keys: np.ndarray | None = None
    for index in range(passes):
        held, found = _pass(runs, batches, index)
        if keys is not None and not (keys.shape == found.shape and np.allclose(keys, found, equal_nan=True)):
            raise ValueError("loader must give the same samples in each pass, got others (shuffled?)")
        keys = found
        for name in list(held[0]):
            A = _whole(held[0], name)
            if isinstance(reference, FeatureSnapshot):
                A0 = _of_snapshot(reference, name, runs[0], len(A))[:, index::passes]
            else:
                A0 = None if reference is None else _whole(held[1], name)
                if reference is not None and runs[0].sketched(name):
                    check_same_width(name, runs[0].widths[name], runs[1].widths[name])
            if name not in total:
                total[name] = _Layer(name, bounds, len(A), compared=A0 is not None)
            total[name].add(A, A0, keep=keep_features)
    if keys is None or not total:
        raise ValueError(f"layers must be called outside of nnx transforms, of {layers!r} none is")
    metadata = {
        "framework": f"jax {jax.__version__}",
        "layers": layers if isinstance(layers, str) else list(layers),
        "when": when,
        "reduce": reduce if isinstance(reduce, str) else "function",
        **sketch,
    }
    finished = {name: layer.finished(runs[0]) for name, layer in total.items()}
    return FeatureSnapshot(tag, finished, keys, metadata)


def _pass(runs: Sequence[Run], batches: Iterable[Any], index: int) -> tuple[list[Held], np.ndarray]:
    """Columns of pass `index` of every model, batch by batch, and a key for each sample."""
    held: list[Held] = [{} for _ in runs]
    keys = []
    for batch in batches:
        for run, features in zip(runs, held, strict=True):
            for name, columns in run(batch, index).items():
                features.setdefault(name, []).append(columns)
        keys.append(_sample_keys(batch))
    if not keys:
        raise ValueError("loader must yield at least one batch, got none")
    return held, np.concatenate(keys)


@dataclass
class _Layer:
    """Sums over the columns of one layer, pass by pass."""

    name: str
    bounds: tuple[float, float] | None
    samples: int
    compared: bool
    sums: StreamingGram = field(init=False)
    dead: int = 0
    saturated: float = 0.0
    kept: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = StreamingGram(self.samples, reference=self.compared)

    def add(self, A: Float[np.ndarray, "samples columns"], A0: np.ndarray | None, *, keep: bool) -> None:
        """Adds the columns of one pass."""
        if not np.isfinite(A).all():
            raise ValueError(f"features of layer {self.name!r} must be finite, got some that are not")
        if A0 is not None and A0.shape != A.shape:
            raise ValueError(f"reference of layer {self.name!r} must have shape {A.shape}, got {A0.shape}")
        self.sums.update(A, A0)
        self.dead += int((~A.any(0)).sum())
        if self.bounds is not None and A.size:
            self.saturated += saturation_fraction(A, *self.bounds) * A.shape[1]
        if keep:
            self.kept.append(A)

    def finished(self, run: Run) -> LayerFeatures:
        """The layer after the last pass."""
        sums, sketched = self.sums, run.sketched(self.name)
        against = {}
        if self.compared:
            against = {
                "cross": sums.cross(),
                "displacement": sums.displacement(),
                "reference_squares": np.diag(sums.reference_gram()).copy(),
            }
        return LayerFeatures(
            gram=sums.gram(),
            width=run.widths[self.name],
            features=self._in_order() if self.kept else None,
            sketch=sums.features if sketched else None,
            dead=None if sketched else self.dead / sums.features,
            saturated=None if sketched or self.bounds is None else self.saturated / sums.features,
            **against,
        )

    def _in_order(self) -> Float[np.ndarray, "samples features"]:
        passes = len(self.kept)
        if passes == 1:
            return self.kept[0]
        whole = np.empty((self.samples, self.sums.features), self.kept[0].dtype)
        for index, columns in enumerate(self.kept):
            whole[:, index::passes] = columns
        return whole


def _of_snapshot(reference: FeatureSnapshot, name: str, run: Run, samples: int) -> np.ndarray:
    """All features of a layer that the reference kept."""
    stored = reference_features(reference, name)
    if stored.shape != (samples, run.dimension(name)):
        expected = (samples, run.dimension(name))
        raise ValueError(f"reference of layer {name!r} must have shape {expected}, got {stored.shape}")
    sketch = (run.dimension(name), "jax", run.seed) if run.sketched(name) else None
    check_same_features(reference, name, run.widths[name], sketch)
    return stored


def _whole(held: Held, name: str) -> Float[np.ndarray, "samples columns"]:
    """All rows of a layer; the batches are let go."""
    if name not in held:
        raise ValueError(f"reference must call layer {name!r} as the model does")
    return np.concatenate(held.pop(name))


def _sample_keys(batch: Any) -> Float[np.ndarray, " samples"]:
    """One number for each sample: its first input against fixed weights that tell entries apart."""
    first = on_host(jax.tree.leaves(batch)[0])
    flat = first.reshape(len(first), -1).astype(np.float64)
    return flat @ np.cos(np.arange(flat.shape[1]))


def _validate(
    when: str,
    reduce: Reduce,
    bounds: tuple[float, float] | None,
    max_features: int | None,
    seed: int,
    passes: int,
) -> None:
    if when not in get_args(When):
        raise ValueError(f"when must be 'pre', 'post' or 'both', got {when!r}")
    if not callable(reduce) and reduce not in ("flatten", "mean", "tokens"):
        raise ValueError(f"reduce must be 'flatten', 'mean', 'tokens' or a function, got {reduce!r}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds!r}")
    if max_features is not None and max_features < 1:
        raise ValueError(f"max_features must be >= 1 or None, got {max_features!r}")
    for name, value, least in (("seed", seed, 0), ("passes", passes, 1)):
        if value < least:
            raise ValueError(f"{name} must be >= {least}, got {value!r}")
