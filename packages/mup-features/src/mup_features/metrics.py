"""Measures of features, in one place: on arrays, on Grams, on streams, and between two snapshots of a model.

The first three are the paper's: `change` (do features move?), `lambda_min` (do they stay independent?) and
`joint_lambda_min` (did they move in independent directions?). By subject: `spectra` (one Gram), `similarity`
(two), `streaming` (Grams in O(samples^2) memory), `snapshots` and `reports` (recorded models).

Source: Chen et al. 2025 (arXiv 2503.09565), section 6.
"""

from .reports import FeatureReport, compare
from .similarity import (
    angle_matrix,
    change,
    change_from_squares,
    class_separation,
    dead_fraction,
    hsic1,
    joint_gram,
    joint_gram_from_blocks,
    joint_lambda_min,
    kernel_distance,
    kernel_target_alignment,
    linear_cka,
    neural_collapse,
    relative_frobenius_change,
    saturation_fraction,
)
from .snapshots import FeatureSnapshot, LayerFeatures
from .spectra import (
    centred_gram,
    centred_lambda_min,
    condition_number,
    effective_rank,
    eigenvalue_floor,
    gram,
    jackknife_lambda_min,
    lambda_min,
    numerical_rank,
    participation_ratio,
    spectral_measures,
    spectrum,
    stable_rank,
)
from .streaming import StreamingGram

__all__ = [
    "FeatureReport",
    "FeatureSnapshot",
    "LayerFeatures",
    "StreamingGram",
    "angle_matrix",
    "centred_gram",
    "centred_lambda_min",
    "change",
    "change_from_squares",
    "class_separation",
    "compare",
    "condition_number",
    "dead_fraction",
    "effective_rank",
    "eigenvalue_floor",
    "gram",
    "hsic1",
    "jackknife_lambda_min",
    "joint_gram",
    "joint_gram_from_blocks",
    "joint_lambda_min",
    "kernel_distance",
    "kernel_target_alignment",
    "lambda_min",
    "linear_cka",
    "neural_collapse",
    "numerical_rank",
    "participation_ratio",
    "relative_frobenius_change",
    "saturation_fraction",
    "spectral_measures",
    "spectrum",
    "stable_rank",
]
