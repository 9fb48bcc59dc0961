"""Records the features of any torch model: Grams, and what comparing two times needs.

    with FeatureRecorder(model) as recorder:
        before = recorder.snapshot(loader, "init")
        train(model)
        after = recorder.snapshot(loader, "trained")
    print(compare(before, after).to_markdown())

A pass over the loader runs without gradients, in eval mode, eagerly. The hooks exist during that pass only,
so training in between is neither slowed down nor recompiled. A layer's features are held for the length of
the pass, samples x n in the model's precision, and then enter float64 sums chunk by chunk; `passes=k` goes
over the loader k times and holds 1/k of the columns each time. Without kept features a snapshot is
O(samples^2); to compare it with an earlier time all the same, give `reference`: the earlier snapshot if it
kept its features, or the earlier model itself, which then runs beside this one.

Every recorded layer costs samples^2 x n float64 operations, half of a full product. For 1024 samples and
n = 4096 that is a quarter of what one such layer's float32 forward pass costs on a CPU, where float64 is half
as fast. Products in float32 would be cheaper and useless: their error of 1e-7 ||K|| lies above the
eigenvalues one looks for.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mup_features.snapshots import (
    FeatureSnapshot,
    LayerFeatures,
    check_same_features,
    check_same_width,
    reference_features,
)

from .captures import Capture, Reduce, When, as_matrix, is_compiled, tensors_of
from .gram_sums import GramSums, Group, Shard, require_float64
from .passes import default_forward, recording_mode, sample_keys, to_device, unwrapped
from .tangent_kernels import empirical_ntk, ntk_change

__all__ = ["FeatureRecorder", "empirical_ntk", "ntk_change"]


class FeatureRecorder:
    """Takes snapshots of a model's features; a context manager after whose end it takes none.

    In data parallel training (`shard="samples"`) every rank goes over its own samples and all of them end
    with the snapshot of all samples, ordered by rank. Ranks may have different numbers of batches, unless
    their forward passes communicate (FSDP). With tensor parallel layers whose outputs are plain tensors,
    shards of the features, give `shard="features"`; DTensors are gathered batch by batch without being asked.

    Args:
        model: the model; compiled ones are recorded in an eager pass, with a warning.
        layers: "auto", or names of modules with wildcards ("blocks.*.mlp"); see `torch.captures` for what
            counts as pre and post.
        when: "pre", "post" or "both".
        reduce: what happens to axes beyond samples and features: "flatten" makes them features, "mean"
            averages over tokens or places, "tokens" makes every token or place a sample; or a function from
            the tensor to a matrix (samples, features).
        max_features: wider layers are replaced by a Gaussian sketch of so many columns as soon as they
            appear. Inner products then have errors of 1 / sqrt(max_features) of the norms. None: no sketch.
        seed: of the sketch. The same seed gives the same sketch, whatever the batches.
        keep_features: keep the features (or sketches) in snapshots, on the CPU.
        bounds: range of the activation, to count saturated entries: (-1, 1) for tanh.
        device: where features are held and multiplied; None leaves them where they appear. It needs float64.
        passes: how often a snapshot goes over the loader.
        forward: called with (model, batch) to run the model. By default a batch is a tensor, a mapping of
            keyword arguments, or a sequence whose first entry is the input.
        shard: "samples", "features", None for none; "auto" takes "samples" for DistributedDataParallel and
            fully_shard models.
        process_group: of torch.distributed; None takes that of DistributedDataParallel, or all processes.

    Raises:
        ValueError: if an option is out of range, a pattern matches nothing, or the device has no float64.
        TypeError: if model is no module.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "auto",
        when: When = "post",
        *,
        reduce: Reduce = "flatten",
        max_features: int | None = None,
        seed: int = 0,
        keep_features: bool = True,
        bounds: tuple[float, float] | None = None,
        device: torch.device | str | None = None,
        passes: int = 1,
        forward: Callable[[nn.Module, Any], Any] | None = None,
        shard: Shard | str | None = "auto",
        process_group: Any = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        _validate(when, reduce, max_features, bounds, passes, shard)
        self.group = _group(model, shard, process_group)
        if max_features is not None and self.group is not None and self.group.shard == "features":
            raise ValueError(f"max_features needs whole features, got {max_features} with shard='features'")
        self.device = None if device is None else torch.device(device)
        if self.device is not None:
            require_float64(self.device)
        self.model, self.layers = model, layers
        self.when: When = when
        self.reduce: Reduce = reduce
        self.max_features, self.seed, self.keep_features = max_features, seed, keep_features
        self.bounds, self.passes, self.forward = bounds, passes, forward or default_forward
        self._closed = False
        # Patterns that match nothing are refused here, not after the first hour of training.
        Capture(unwrapped(model), layers, when, _ignore)

    def __enter__(self) -> "FeatureRecorder":
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed = True

    def snapshot(
        self,
        loader: Iterable[Any],
        tag: str,
        reference: FeatureSnapshot | nn.Module | None = None,
    ) -> FeatureSnapshot:
        """Records the features of all samples that the loader yields.

        Args:
            loader: batches, the same samples in the same order for every snapshot to be compared.
            tag: the name of this time.
            reference: an earlier snapshot of the same samples that kept its features, or an earlier copy of
                the model; the result can then be compared with it although it keeps no features.

        Raises:
            ValueError: if the loader is empty, cannot be gone over `passes` times or gives other samples
                then, no layer was called, a feature is not finite, or the reference does not fit.
            RuntimeError: if the recorder's context has ended.
        """
        if self._closed:
            raise RuntimeError("this FeatureRecorder has ended: take snapshots inside its with block")
        batches = [loader] if isinstance(loader, Tensor) else loader
        if self.passes > 1 and iter(batches) is batches:
            raise ValueError(f"loader must be iterable {self.passes} times (passes), got an iterator")
        model = unwrapped(self.model)
        other = unwrapped(reference) if isinstance(reference, nn.Module) else None
        against = None if isinstance(reference, nn.Module) else reference
        total: dict[str, _Layer] = {}
        keys: Tensor | None = None
        with recording_mode(*(m for m in (self.model, reference) if isinstance(m, nn.Module))):
            for index in range(self.passes):
                own, initial, found = self._pass(model, other, batches, index)
                if keys is not None and (keys.shape != found.shape or not torch.allclose(keys, found)):
                    raise ValueError("loader must give the same samples in each pass, got others (shuffled?)")
                keys = found
                for name in list(own.features):
                    A, A0 = own.matrix(name), None if other is None else initial.matrix(name)
                    layer = total.setdefault(name, _Layer(own.widths[name], own.sketched[name]))
                    if other is not None and layer.sketched:
                        check_same_width(name, layer.width, initial.widths[name])
                    self._add(name, layer, A, A0, against, index)
        if keys is None or not total:
            raise ValueError(f"layers must be called by the model, of {self.layers!r} none is")
        return FeatureSnapshot(
            tag,
            {name: self._finished(layer) for name, layer in total.items()},
            self._all_rows(keys).numpy(),
            {
                "framework": f"torch {torch.__version__}",
                "layers": self.layers if isinstance(self.layers, str) else list(self.layers),
                "when": self.when,
                "reduce": self.reduce if isinstance(self.reduce, str) else "function",
                "max_features": self.max_features,
                "seed": self.seed,
            },
        )

    def _pass(
        self, model: nn.Module, other: nn.Module | None, batches: Iterable[Any], index: int
    ) -> tuple["_Held", "_Held", Tensor]:
        """One run over the loader; the columns of pass `index`."""
        held = [_Held(self, index), _Held(self, index)]
        models = [model] if other is None else [model, other]
        captures = [Capture(m, self.layers, self.when, h.keep) for m, h in zip(models, held, strict=False)]
        keys = []
        for batch in batches:
            for m, h, capture in zip(models, held, captures, strict=False):
                moved = to_device(batch, m)
                with capture.recording(tensors_of(moved)):
                    self.forward(m, moved)
                h.drop(capture.readout)
            keys.append(sample_keys(batch))
        if not keys:
            raise ValueError("loader must yield at least one batch, got none")
        return held[0], held[1], torch.cat(keys)

    def _add(
        self,
        name: str,
        layer: "_Layer",
        A: Tensor,
        A0: Tensor | None,
        against: FeatureSnapshot | None,
        index: int,
    ) -> None:
        """Adds the columns of one pass to the sums of a layer."""
        if not torch.isfinite(A).all():
            raise ValueError(f"features of layer {name!r} must be finite, got some that are not")
        if layer.sums is None:
            require_float64(A.device)
            compared = A0 is not None or against is not None
            layer.sums = GramSums(len(A), A.device, reference=compared, bounds=self.bounds, group=self.group)
        if against is not None:
            A0 = self._reference_columns(name, layer, against, A, index)
        if A0 is not None and A0.shape != A.shape:
            raise ValueError(
                f"reference of layer {name!r} must have shape {tuple(A.shape)}, got {tuple(A0.shape)}"
            )
        layer.sums.update(A, A0)
        if self.keep_features:
            layer.kept.append(A.cpu())

    def _reference_columns(
        self, name: str, layer: "_Layer", against: FeatureSnapshot, A: Tensor, index: int
    ) -> Tensor:
        """This rank's and this pass' part of the features that a reference snapshot kept."""
        stored = torch.from_numpy(reference_features(against, name))
        if layer.sketched:
            check_same_features(against, name, layer.width, (stored.shape[1], "torch", self.seed))
        sums = layer.require_sums()
        if sums.split and self.group is not None:
            start = sum(sums.counts[: self.group.rank])
            stored = stored[start : start + len(A)]
        elif self.group is not None:
            widths = self.group.counts(layer.width, A.device)
            start = sum(widths[: self.group.rank])
            stored = stored[:, start : start + layer.width]
        return stored[:, _columns(stored.shape[1], index, self.passes)].to(A.device)

    def _finished(self, layer: "_Layer") -> LayerFeatures:
        found = layer.require_sums().finish()
        columns = found.pop("columns")
        if layer.sketched:
            found["dead"] = found["saturated"] = None
        return LayerFeatures(
            width=layer.width if layer.sketched else columns,
            sketch=columns if layer.sketched else None,
            features=self._kept(layer).numpy() if self.keep_features else None,
            **found,
        )

    def _kept(self, layer: "_Layer") -> Tensor:
        whole = torch.cat(layer.kept, 1)
        if self.group is None:
            return whole
        on = layer.require_sums().own.device
        if self.group.shard == "samples":
            return self.group.gather_rows(whole.to(on), self.group.counts(len(whole), on)).cpu()
        counts = self.group.counts(whole.shape[1], on)
        return self.group.gather_rows(whole.T.contiguous().to(on), counts).T.contiguous().cpu()

    def _all_rows(self, keys: Tensor) -> Tensor:
        if self.group is None or self.group.shard == "features":
            return keys
        on = self.device or next((p.device for p in self.model.parameters()), torch.device("cpu"))
        return self.group.gather_rows(keys.to(on), self.group.counts(len(keys), on)).cpu()


@dataclass
class _Layer:
    """One layer while a snapshot is taken."""

    width: int
    sketched: bool
    sums: GramSums | None = None
    kept: list[Tensor] = field(default_factory=list)

    def require_sums(self) -> GramSums:
        """The sums, which exist once a pass has added its columns."""
        if self.sums is None:
            raise RuntimeError("the layer has no sums before its first pass has ended")
        return self.sums


class _Held:
    """The features of one model in one pass, batch by batch."""

    def __init__(self, recorder: FeatureRecorder, index: int) -> None:
        self.recorder, self.index = recorder, index
        self.features: dict[str, list[Tensor]] = {}
        self.widths: dict[str, int] = {}
        self.sketched: dict[str, bool] = {}
        self._sketches: dict[str, Tensor] = {}
        self._dropped: str | None = None

    def keep(self, key: str, module: nn.Module, tensor: Tensor) -> None:
        """Copies this pass' columns of a layer's features, or of their sketch."""
        if key == self._dropped:
            return
        recorder = self.recorder
        with torch.autocast(tensor.device.type, enabled=False):
            matrix = as_matrix(tensor, module, recorder.reduce)
            if self.widths.setdefault(key, matrix.shape[1]) != matrix.shape[1]:
                raise ValueError(
                    f"layer {key!r} must have one number of features in all batches, got {self.widths[key]} "
                    f"and {matrix.shape[1]}; for inputs of varying length give reduce='mean' or 'tokens'"
                )
            self.sketched[key] = recorder.max_features is not None and matrix.shape[1] > recorder.max_features
            if self.sketched[key]:
                matrix = matrix @ self._sketch(key, matrix)
        part = matrix[:, _columns(matrix.shape[1], self.index, recorder.passes)]
        copied = part.to(device=recorder.device or part.device, copy=True)
        self.features.setdefault(key, []).append(copied)

    def drop(self, key: str | None) -> None:
        """Forgets a layer for good."""
        self._dropped = key
        self.features.pop(key or "", None)

    def matrix(self, key: str) -> Tensor:
        """All rows of a layer; the batches are let go."""
        if key not in self.features:
            raise ValueError(f"reference must call layer {key!r} as the model does")
        parts = self.features.pop(key)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _sketch(self, key: str, matrix: Tensor) -> Tensor:
        """Gaussian matrix that depends on seed, layer and sizes only."""
        if key not in self._sketches:
            k = self.recorder.max_features or 0
            generator = torch.Generator().manual_seed(self.recorder.seed * 1_000_003 + crc32(key.encode()))
            normal = torch.randn(matrix.shape[1], k, generator=generator)
            # Means over k columns then estimate means over n: (1/k) |sketch|^2 = (1/n) |a|^2 on average.
            self._sketches[key] = normal.to(matrix) / matrix.shape[1] ** 0.5
        return self._sketches[key]


def _group(model: nn.Module, shard: Shard | str | None, process_group: Any) -> Group | None:
    if is_compiled(model):
        model = getattr(model, "_orig_mod")  # noqa: B009 (typed as a tensor or module)
    if shard == "auto":
        replicated = isinstance(model, nn.parallel.DistributedDataParallel)
        shard = "samples" if replicated or type(model).__name__.startswith("FSDP") else None
        if replicated and process_group is None:
            process_group = model.process_group
    if shard is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"shard={shard!r} needs an initialised torch.distributed process group, got none")
    return Group("samples" if shard == "samples" else "features", process_group)


def _columns(n: int, index: int, passes: int) -> slice:
    return slice(index * n // passes, (index + 1) * n // passes)


def _ignore(key: str, module: nn.Module, tensor: Tensor) -> None:
    """A capture that is only built to have its patterns checked."""


def _validate(
    when: str,
    reduce: Reduce,
    max_features: int | None,
    bounds: tuple[float, float] | None,
    passes: int,
    shard: str | None,
) -> None:
    if when not in get_args(When):
        raise ValueError(f"when must be 'pre', 'post' or 'both', got {when!r}")
    if not callable(reduce) and reduce not in ("flatten", "mean", "tokens"):
        raise ValueError(f"reduce must be 'flatten', 'mean', 'tokens' or a function, got {reduce!r}")
    if max_features is not None and max_features < 1:
        raise ValueError(f"max_features must be >= 1 or None, got {max_features!r}")
    if bounds is not None and not bounds[0] < bounds[1]:
        raise ValueError(f"bounds must be (low, high) with low < high, got {bounds!r}")
    if passes < 1:
        raise ValueError(f"passes must be >= 1, got {passes!r}")
    if shard not in ("auto", "samples", "features", None):
        raise ValueError(f"shard must be 'auto', 'samples', 'features' or None, got {shard!r}")
