"""What was recorded of a model's features at one time: a Gram for each layer, and what comparisons need.

A snapshot that keeps the features can be compared with any other of the same samples. One that does not is
O(samples^2) for each layer; to be compared with an earlier time it must have seen that time's features while
they were there, and then carries the cross product A A0'/n and the displacements ||A_i - A0_i||^2/n.
"""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from .similarity import saturation_fraction
from .spectra import as_features
from .streaming import StreamingGram

_FORMAT = "mup-features snapshot 1"


@dataclass(frozen=True, eq=False)
class LayerFeatures:
    """One layer of a snapshot.

    Attributes:
        gram: K = A A' / n in float64.
        width: n, the number of features of a sample before any sketch.
        features: the features or their sketch, in the precision of the model; None if they were not kept.
        sketch: number of columns if features and Grams come from a Gaussian sketch, else None.
        cross: A A0' / n against the reference, None without one.
        displacement: ||A_i - A0_i||^2 / n.
        reference_squares: ||A0_i||^2 / n, by which a comparison knows the reference again.
        dead: fraction of features that are exactly zero for every sample; None for a sketch.
        saturated: fraction of entries near the ends of the activation's range, if a range was given.
    """

    gram: Float[np.ndarray, "samples samples"]
    width: int
    features: Float[np.ndarray, "samples kept"] | None = None
    sketch: int | None = None
    cross: Float[np.ndarray, "samples samples"] | None = None
    displacement: Float[np.ndarray, " samples"] | None = None
    reference_squares: Float[np.ndarray, " samples"] | None = None
    dead: float | None = None
    saturated: float | None = None

    @property
    def dimension(self) -> int:
        """Number of columns that the Gram was computed from."""
        return self.sketch or self.width

    @classmethod
    def from_features(
        cls,
        features: ArrayLike,
        reference: ArrayLike | None = None,
        *,
        keep: bool = True,
        sketched_from: int | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> "LayerFeatures":
        """Measures one layer.

        Args:
            features: real (samples, n).
            reference: real (samples, n), the features to compare with.
            keep: keep the features.
            sketched_from: the true width if the features are a sketch.
            bounds: range of the activation; None if it has none.

        Raises:
            ValueError: if a shape is wrong or an entry is not finite.
        """
        A = np.asarray(features)
        if A.ndim != 2 or 0 in A.shape:
            raise ValueError(f"features must be (samples >= 1, n >= 1), got shape {A.shape}")
        sums = StreamingGram(len(A), reference=reference is not None).update(A, reference)
        against = {}
        if reference is not None:
            against = {
                "cross": sums.cross(),
                "displacement": sums.displacement(),
                "reference_squares": np.diag(sums.reference_gram()).copy(),
            }
        return cls(
            gram=sums.gram(),
            width=sketched_from or A.shape[1],
            features=A if keep else None,
            sketch=None if sketched_from is None else A.shape[1],
            dead=None if sketched_from is not None else float(np.mean(~A.any(0))),
            saturated=None if bounds is None or sketched_from else saturation_fraction(A, *bounds),
            **against,
        )


@dataclass(frozen=True, eq=False)
class FeatureSnapshot:
    """The features of all recorded layers at one time.

    Attributes:
        tag: the name of that time ("init", "step 1000").
        layers: name -> what was recorded.
        sample_keys: one number computed from each input, by which a comparison sees whether the samples and
            their order are the same; None if unknown.
        metadata: whatever describes the recording; JSON values.
    """

    tag: str
    layers: Mapping[str, LayerFeatures]
    sample_keys: Float[np.ndarray, " samples"] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("layers must hold at least one layer, got none")
        counts = {name: len(layer.gram) for name, layer in self.layers.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"layers must have one number of samples, got {counts}")

    @classmethod
    def from_arrays(
        cls,
        features: Mapping[str, ArrayLike],
        tag: str,
        *,
        reference: "FeatureSnapshot | Mapping[str, ArrayLike] | None" = None,
        keep_features: bool = True,
        bounds: tuple[float, float] | None = None,
        sample_keys: np.ndarray | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> "FeatureSnapshot":
        """Snapshot of features that are arrays already.

        Args:
            features: layer -> real (samples, n).
            tag: the name of this time.
            reference: features to compare with later, or a snapshot that kept them.
            keep_features: keep the features.
            bounds: range of the activation, for the fraction of saturated entries.
            sample_keys: see the class.
            metadata: see the class.

        Raises:
            ValueError: if a shape is wrong, an entry is not finite, or the reference lacks a layer.
        """
        layers = {}
        for name, values in features.items():
            against = None if reference is None else reference_features(reference, name)
            layers[name] = LayerFeatures.from_features(values, against, keep=keep_features, bounds=bounds)
        return cls(tag, layers, sample_keys, metadata or {})

    @property
    def samples(self) -> int:
        """Number of samples."""
        return len(next(iter(self.layers.values())).gram)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one npz file, whole or not at all."""
        arrays: dict[str, np.ndarray] = {}
        layers: list[dict[str, Any]] = []
        if self.sample_keys is not None:
            arrays["sample_keys"] = self.sample_keys
        for index, (name, layer) in enumerate(self.layers.items()):
            numbers: dict[str, Any] = {"name": name}
            for item in fields(layer):
                value = getattr(layer, item.name)
                if isinstance(value, np.ndarray):
                    arrays[f"{index}.{item.name}"] = value
                elif value is not None:
                    numbers[item.name] = value
            layers.append(numbers)
        header = {"format": _FORMAT, "tag": self.tag, "metadata": dict(self.metadata), "layers": layers}
        arrays["header"] = np.array(json.dumps(header))
        with _replacing(path) as stream:
            np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "FeatureSnapshot":
        """Reads what `save` wrote; nothing is unpickled.

        Raises:
            ValueError: if the file is no snapshot of this format, or its parts do not belong together.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                arrays = dict(stored)
            header = json.loads(str(arrays.pop("header")))
            if header["format"] != _FORMAT:
                raise ValueError(f"format must be {_FORMAT!r}, got {header['format']!r}")
            layers = {}
            for index, numbers in enumerate(header["layers"]):
                name = numbers.pop("name")
                prefix = f"{index}."
                own = {key.removeprefix(prefix): a for key, a in arrays.items() if key.startswith(prefix)}
                layers[name] = LayerFeatures(**own, **numbers)
                _consistent(name, layers[name])
            return cls(header["tag"], layers, arrays.get("sample_keys"), header["metadata"])
        except FileNotFoundError:
            raise
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            raise ValueError(
                f"path must be a snapshot of this package, got {str(path)!r}: {error}"
            ) from error


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A stream to a file beside `path`, which takes its place when the block ends."""
    target = Path(path)
    descriptor, beside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
        Path(beside).replace(target)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def reference_features(reference: FeatureSnapshot | Mapping[str, ArrayLike], name: str) -> np.ndarray:
    """The features of a layer of a reference.

    Raises:
        ValueError: if the reference lacks the layer or did not keep its features.
    """
    layers = reference.layers if isinstance(reference, FeatureSnapshot) else reference
    if name not in layers:
        raise ValueError(f"reference must hold layer {name!r}, got {', '.join(map(repr, layers))}")
    found = layers[name]
    if not isinstance(found, LayerFeatures):
        return as_features(found, f"reference[{name!r}]")
    if found.features is None:
        raise ValueError(
            f"reference must have kept the features of layer {name!r}; record it with keep_features=True, "
            "or give the reference model itself"
        )
    return found.features


def sketch_of(snapshot: FeatureSnapshot, name: str) -> tuple[int, str, Any] | None:
    """What makes the sketch of a layer: columns, library that drew it, and seed; None if it is whole."""
    columns = snapshot.layers[name].sketch
    if columns is None:
        return None
    library = str(snapshot.metadata.get("framework", "")).partition(" ")[0]
    return columns, library, snapshot.metadata.get("seed")


def check_same_features(
    reference: FeatureSnapshot, name: str, width: int, sketch: tuple[int, str, int] | None
) -> None:
    """Refuses a reference whose columns of a layer mean something else.

    Args:
        reference: the earlier snapshot.
        name: the layer.
        width: its features now.
        sketch: its sketch now, as `sketch_of` gives.

    Raises:
        ValueError: if the reference's layer has another width or sketch.
    """
    then = reference.layers[name].width, sketch_of(reference, name)
    if then != (width, sketch):
        raise ValueError(
            f"reference of layer {name!r} must have (width, sketch) = {(width, sketch)}, got {then}"
        )


def check_same_width(name: str, width: int, reference: int) -> None:
    """Refuses a reference model whose sketched layer has more or fewer features: sketches are of one size.

    Raises:
        ValueError: if the widths differ.
    """
    if width != reference:
        raise ValueError(
            f"reference of layer {name!r} must have {width} features as the model, got {reference}"
        )


def _consistent(name: str, layer: LayerFeatures) -> None:
    N = len(layer.gram)
    expected = {"gram": (N, N), "cross": (N, N), "displacement": (N,), "reference_squares": (N,)}
    for part, shape in expected.items():
        value = getattr(layer, part)
        if value is not None and value.shape != shape:
            raise ValueError(f"{part} of layer {name!r} must have shape {shape}, got {value.shape}")
        if value is not None and not np.isfinite(value).all():
            raise ValueError(f"{part} of layer {name!r} must be finite")
    if layer.features is not None and layer.features.shape[0] != N:
        raise ValueError(f"features of layer {name!r} must have {N} rows, got {layer.features.shape[0]}")
