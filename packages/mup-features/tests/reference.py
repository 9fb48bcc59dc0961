"""Float64 NumPy truth of the limits and of the nets that approach them, written for reading.

The parts: finite nets trained by SGD (reference_network), the exact limit of deep linear nets
(reference_identity), the limit of tanh nets on one input (reference_single_input), kernels
(reference_kernels). Nothing here imports jax, torch or the package. Section numbers are those of the
package's specification, which restates Chen, Yang, Zhao, Gu, ICML 2025.
"""

import numpy as np
from reference_identity import identity_limit
from reference_kernels import kernels
from reference_network import PRESETS, effective, train_networks
from reference_single_input import single_input_limit

__all__ = [
    "ETA",
    "PRESETS",
    "R1_F",
    "R1_K",
    "R4",
    "X",
    "Y",
    "effective",
    "identity_limit",
    "kernels",
    "single_input_limit",
    "train_networks",
]

# Data and rate of R1, R3, R4 and R5 (section g).
X = np.array([[1.0, 0.5], [-0.3, 0.8]])
Y = np.array([1.0, -0.5])
ETA = 0.3

# R1: f_t for t = 1, 2, 3, and K_post of the last layer at t = 3 (entries 00, 01, 11), by depth.
R1_F = {
    1: [[0.72, -0.159], [0.941992708239, -0.307643778900], [0.989617508124, -0.405069342141]],
    2: [[1.08, -0.2385], [0.935110931081, -0.457434057375], [1.036549819535, -0.495541340228]],
    3: [[1.44, -0.318], [0.369895315142, -0.487351498675], [1.111005798466, -0.481693226574]],
}
R1_K = {
    1: [1.556566591399, -0.042236140390, 0.789268975694],
    2: [1.794872201509, -0.259541334510, 0.903984349285],
    3: [2.033763011086, -0.677577044342, 1.011214797683],
}

# R4: K^3, Theta, Theta without its first-layer term, entries 00, 01, 11.
R4 = {
    "relu": (
        [0.15625, 0.0748710794063, 0.09125],
        [0.625, 0.1389384981869, 0.365],
        [0.46875, 0.1361349092438, 0.27375],
    ),
    "erf": (
        [0.2631646399791, 0.0226401485135, 0.2421074138667],
        [1.246408442464, 0.0906557871328, 1.0895687532245],
        None,
    ),
    "tanh": (
        [0.1742764438344, 0.0153793400222, 0.1547373945732],
        [0.7827156034428, 0.0615630108675, 0.6687124796836],
        [0.5471617385525, 0.0461530642777, 0.4805594885291],
    ),
}
