"""Two snapshots beside each other: every measure of every layer, as numbers, JSON, table or figure."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import similarity
from ._files import to_json, write_json
from .snapshots import FeatureSnapshot, LayerFeatures, sketch_of
from .spectra import as_gram, spectral_measures, spectrum

# Columns of the table, in this order; JSON has every measure.
_COLUMNS = {
    "change": "change",
    "lambda_min_before": "lambda_min, before",
    "lambda_min_after": "after",
    "joint_lambda_min": "joint lambda_min",
    "numerical_rank_after": "rank",
    "effective_rank_before": "effective rank, before",
    "effective_rank_after": "after",
    "kernel_distance": "kernel distance",
    "cka": "CKA",
    "alignment_after": "alignment",
    "neural_collapse_after": "NC1",
}


@dataclass(frozen=True, eq=False)
class FeatureReport:
    """What happened to the features between two times.

    Attributes:
        before: tag of the earlier snapshot.
        after: tag of the later one.
        measures: layer -> measure -> value; a measure that could not be taken is missing, `notes` say why.
        spectra: layer -> "before", "after", "joint" -> raw eigenvalues, ascending.
        grams: layer -> "before", "after" -> Gram.
        notes: what the reader of the numbers should know.
    """

    before: str
    after: str
    measures: dict[str, dict[str, float]]
    spectra: dict[str, dict[str, np.ndarray]]
    grams: dict[str, dict[str, np.ndarray]] = field(repr=False)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Measures and raw spectra as plain data, without the Grams."""
        return {
            "before": self.before,
            "after": self.after,
            "measures": {layer: dict(found) for layer, found in self.measures.items()},
            "spectra": {
                layer: {name: values.tolist() for name, values in found.items()}
                for layer, found in self.spectra.items()
            },
            "notes": list(self.notes),
        }

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The dictionary as JSON, nan and inf as strings; also written to a path, whole or not at all."""
        if path is not None:
            write_json(path, self.to_dict())
        return to_json(self.to_dict())

    def to_markdown(self) -> str:
        """Table with one row for each layer; negative eigenvalues are shown as 0."""
        columns = [key for key in _COLUMNS if any(key in found for found in self.measures.values())]
        head = ["layer", *(_COLUMNS[key] for key in columns)]
        rows = [head, ["---"] * len(head)]
        for layer, found in self.measures.items():
            rows.append([f"`{layer}`", *(_shown(key, found.get(key)) for key in columns)])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        title = f"Features, {self.before} to {self.after}"
        return "\n\n".join([title, table, *(f"- {note}" for note in self.notes)]) + "\n"

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a figure with spectra, Grams and measures (extra [plot]).

        Raises:
            ImportError: if matplotlib is not installed.
        """
        from .plots_features import save_report

        save_report(self, path)


def compare(
    before: FeatureSnapshot,
    after: FeatureSnapshot,
    *,
    targets: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    between: Sequence[FeatureSnapshot] = (),
) -> FeatureReport:
    """Every measure of c7 for the layers that two snapshots share.

    Change and joint space-time Gram need inner products between the two times. They are there if both
    snapshots kept their features, or if `after` was recorded with `before` (or its model) as reference.

    Args:
        before: the earlier snapshot.
        after: the later one, of the same samples in the same order.
        targets: real (samples,) or (samples, outputs), for the kernel-target alignment.
        labels: class of each sample, for class separation and NC1.
        between: snapshots of times in between, for a joint Gram of all times; all must have kept features.

    Raises:
        ValueError: if the samples differ, no layer is shared, widths or sketches (columns, library, seed)
            differ, or `after` was recorded against another reference than `before`.
    """
    names = [name for name in before.layers if name in after.layers]
    if not names:
        raise ValueError(
            f"after must share a layer with before {list(before.layers)}, got {list(after.layers)}"
        )
    for snapshot in (after, *between):
        _same_samples(before, snapshot)
    notes = [
        f"layer {name!r} is only in one of the snapshots"
        for name in sorted(set(before.layers) ^ set(after.layers))
    ]
    measures, spectra, grams = {}, {}, {}
    for name in names:
        first, last = before.layers[name], after.layers[name]
        holders = [snapshot for snapshot in (before, after, *between) if name in snapshot.layers]
        sizes = [(snapshot.layers[name].width, sketch_of(snapshot, name)) for snapshot in holders]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"layer {name!r} must have one (width, sketch) in all snapshots, "
                f"got {' and '.join(str(size) for size in dict.fromkeys(sizes))}"
            )
        K0, K = as_gram(first.gram), as_gram(last.gram)
        found = _own_measures(first, "before", targets, labels)
        found |= _own_measures(last, "after", targets, labels)
        if not (K0.any() and K.any()):
            notes.append(f"layer {name!r} is zero for every sample at one of the times: not compared")
        found |= _between_kernels(K0, K, name, notes)
        middle = [snapshot.layers[name] for snapshot in between if name in snapshot.layers]
        moved, joint = _between_features(name, first, middle, last, notes)
        measures[name] = found | moved
        spectra[name] = {"before": spectrum(K0), "after": spectrum(K)} | joint
        grams[name] = {"before": K0, "after": K}
    return FeatureReport(before.tag, after.tag, measures, spectra, grams, tuple(dict.fromkeys(notes)))


def _own_measures(
    layer: LayerFeatures, when: str, targets: ArrayLike | None, labels: ArrayLike | None
) -> dict[str, float]:
    found = spectral_measures(layer.gram)
    if targets is not None and layer.gram.any():
        found["alignment"] = similarity.kernel_target_alignment(layer.gram, targets)
    if labels is not None and layer.gram.any():
        found["class_separation"] = similarity.class_separation(layer.gram, labels)
        found["neural_collapse"] = similarity.neural_collapse(layer.gram, labels)
    if layer.dead is not None:
        found["dead"] = layer.dead
    if layer.saturated is not None:
        found["saturated"] = layer.saturated
    return {f"{measure}_{when}": value for measure, value in found.items()}


def _between_kernels(K0: np.ndarray, K: np.ndarray, name: str, notes: list[str]) -> dict[str, float]:
    angles = np.abs(similarity.angle_matrix(K) - similarity.angle_matrix(K0))
    found = {"mean_angle_change": float(angles.mean())} if np.isfinite(angles).all() else {}
    if not (K0.any() and K.any()):
        return found
    found["kernel_distance"] = similarity.kernel_distance(K0, K)
    found["relative_frobenius_change"] = similarity.relative_frobenius_change(K0, K)
    try:
        found["cka"] = similarity.linear_cka(K0, K)
        found["cka_unbiased"] = similarity.linear_cka(K0, K, unbiased=True)
    except ValueError as error:
        notes.append(f"layer {name!r}, CKA: {error}")
    return found


def _between_features(
    name: str, first: LayerFeatures, middle: list[LayerFeatures], last: LayerFeatures, notes: list[str]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Change and joint Gram, where the inner products between the times are known."""
    all_kept = all(layer.features is not None for layer in (first, *middle, last))
    if middle and not all_kept:
        raise ValueError(f"between needs snapshots that kept their features, layer {name!r} lacks some")
    if all_kept:
        arrays = [np.asarray(layer.features, dtype=np.float64) for layer in (first, *middle, last)]
        k = first.dimension
        displacement, size = ((arrays[-1] - arrays[0]) ** 2).sum(1) / k, (arrays[0] ** 2).sum(1) / k
        stacked = np.concatenate(arrays)
        joint = stacked @ stacked.T / k
    elif last.cross is not None and last.displacement is not None and last.reference_squares is not None:
        k, displacement, size = first.dimension, last.displacement, np.diag(first.gram)
        if not np.allclose(size, last.reference_squares, rtol=1e-5, atol=1e-12 * float(size.max())):
            raise ValueError(f"after was recorded against another reference than before in layer {name!r}")
        joint = similarity.joint_gram_from_blocks(first.gram, last.cross, last.gram)
    else:
        notes.append(
            f"layer {name!r}: no change and no joint Gram, since the features were not kept and the later "
            "snapshot has no reference"
        )
        return {}, {}
    note = similarity.joint_width_note(k, len(joint))
    if note is not None:
        notes.append(f"layer {name!r}, {note}")
    if first.sketch:
        notes.append(
            f"layer {name!r} is a Gaussian sketch of {first.width} features to {k}: inner products have "
            f"errors of {1 / math.sqrt(k):.1g} times the norms, and a rank above {k} cannot be seen"
        )
    values = spectrum(joint)
    return {
        "change": similarity.change_from_squares(displacement, size),
        "absolute_change": similarity.change_from_squares(displacement, size, relative=False),
        "joint_lambda_min": float(values[0]),
    }, {"joint": values}


def _same_samples(before: FeatureSnapshot, other: FeatureSnapshot) -> None:
    if before.samples != other.samples:
        raise ValueError(
            f"snapshot {other.tag!r} must have the {before.samples} samples of {before.tag!r}, "
            f"got {other.samples}"
        )
    first, second = before.sample_keys, other.sample_keys
    # Keys are float64 sums over float32 inputs; another device may sum in another order.
    if first is None or second is None:
        return
    if first.shape != second.shape or not np.allclose(first, second, rtol=1e-6, atol=1e-9):
        raise ValueError(
            f"snapshot {other.tag!r} must have the samples of {before.tag!r} in their order: the inputs "
            "differ (a loader that shuffles?)"
        )


def _shown(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    if "lambda_min" in key:
        value = max(value, 0.0)
    return f"{value:.0f}" if key.startswith("numerical_rank") else f"{value:.3g}"
