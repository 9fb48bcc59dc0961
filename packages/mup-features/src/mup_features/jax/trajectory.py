"""What a run of the limit or of a simulated network leaves behind: quantities per recorded step, with errors.

All methods return the same object, so that they can be laid side by side. Every number is a mean over
independent replicas, `stderr` is the standard error of that mean, and `replicas` keeps what it was made from.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from mup_features.similarity import joint_gram_from_blocks
from mup_features.spectra import jackknife_lambda_min, lambda_min

__all__ = ["DivergedError", "Record", "Trajectory"]

Record = dict[str, np.ndarray]
"""What one replica records at one step: name -> array. Layers are stacked first, [L, ...]."""

FIELDS = ("f", "f_test", "loss", "K_pre", "K_post", "K_pre_cross", "K_post_cross", "G", "change")


@dataclass(frozen=True)
class Trajectory:
    """Quantities at T recorded steps: N training samples, C outputs, L hidden layers, R replicas.

    Attributes:
        steps: [T], the number of updates made before each record.
        method: "limit", "width", "quadrature" or "kernel".
        replicas: name -> [R, T, ...], of each replica. Names are those below, as far as recorded, and
            `K_pre_cross`, `K_post_cross` [R, T, L, N, N]: <h_t(i), h_0(j)> and the same of x.
        learning_rates: [steps made], the rate of each update.
    """

    steps: np.ndarray
    method: str
    replicas: dict[str, np.ndarray]
    learning_rates: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        for name, values in self.replicas.items():
            if name not in FIELDS:
                raise ValueError(f"replicas may hold {', '.join(FIELDS)}, got {name!r}")
            if values.ndim < 2 or values.shape[1] != len(self.steps):
                raise ValueError(f"{name} must be [replicas, {len(self.steps)}, ...], got {values.shape}")

    def mean(self, name: str) -> np.ndarray:
        """Mean of a recorded quantity over replicas.

        Raises:
            KeyError: if it was not recorded.
        """
        return self._recorded(name).mean(axis=0)

    def stderr(self, name: str) -> np.ndarray:
        """Standard error of `mean(name)`; nan for a single replica, 0 for a method without chance."""
        values = self._recorded(name)
        if self.method in ("quadrature", "kernel"):
            return np.zeros(values.shape[1:])
        if len(values) == 1:
            return np.full(values.shape[1:], np.nan)
        return values.std(axis=0, ddof=1) / np.sqrt(len(values))

    @property
    def f(self) -> Float[np.ndarray, "T N C"]:
        """Outputs on the training set."""
        return self.mean("f")

    @property
    def f_test(self) -> Float[np.ndarray, "T N_test C"]:
        """Outputs on the test set."""
        return self.mean("f_test")

    @property
    def loss(self) -> Float[np.ndarray, " T"]:
        """Training loss."""
        return self.mean("loss")

    @property
    def K_pre(self) -> Float[np.ndarray, "L T N N"]:  # noqa: N802
        """Gram matrices of pre-activations, <h^l_t(i), h^l_t(j)>; `K_pre[l - 1][t]` is that of layer l."""
        return np.swapaxes(self.mean("K_pre"), 0, 1)

    @property
    def K_post(self) -> Float[np.ndarray, "L T N N"]:  # noqa: N802
        """Gram matrices of the features, <x^l_t(i), x^l_t(j)>."""
        return np.swapaxes(self.mean("K_post"), 0, 1)

    @property
    def G(self) -> Float[np.ndarray, "L T N N"]:  # noqa: N802
        """Gram matrices of the backward signals b^l_t(i), the derivative chi absorbed."""
        return np.swapaxes(self.mean("G"), 0, 1)

    @property
    def change(self) -> Float[np.ndarray, "L T"]:
        """Mean over samples of ||h^l_t(i) - h^l_0(i)|| / ||h^l_0(i)||, the paper's measure of change."""
        return np.swapaxes(self.mean("change"), 0, 1)

    def min_eig(self, name: str = "K_post") -> tuple[Float[np.ndarray, "L T"], Float[np.ndarray, "L T"]]:
        """Smallest eigenvalue of the mean Gram matrix of each layer and step, and its jackknife error.

        The mean matrix is used because the smallest eigenvalue is concave: that of a noisy matrix is too low.
        """
        return self._smallest(self._recorded(name))

    def joint_min_eig(self, when: str = "pre") -> tuple[Float[np.ndarray, "L T"], Float[np.ndarray, "L T"]]:
        """Smallest eigenvalue of the Gram matrix of the 2N features at init and at each step, with its error.

        Args:
            when: "pre" or "post" activation.

        Raises:
            ValueError: for another `when`.
            KeyError: if cross products with the first step were not recorded.
        """
        if when not in ("pre", "post"):
            raise ValueError(f"when must be 'pre' or 'post', got {when!r}")
        gram, cross = self._recorded(f"K_{when}"), self._recorded(f"K_{when}_cross")
        joint = np.zeros((*gram.shape[:3], 2 * gram.shape[3], 2 * gram.shape[3]))
        for replica, step, layer in np.ndindex(gram.shape[:3]):
            at = (replica, step, layer)
            joint[at] = joint_gram_from_blocks(gram[replica, 0, layer], cross[at], gram[at])
        return self._smallest(joint)

    def _recorded(self, name: str) -> np.ndarray:
        if name not in self.replicas:
            raise KeyError(f"{name} was not recorded; recorded were {', '.join(sorted(self.replicas))}")
        return self.replicas[name]

    def _smallest(
        self, grams: Float[np.ndarray, "R T L n n"]
    ) -> tuple[Float[np.ndarray, "L T"], Float[np.ndarray, "L T"]]:
        """lambda_min of the mean over replicas for each layer and step, and its standard error."""
        exact, single = self.method in ("quadrature", "kernel"), len(grams) == 1
        values, errors = (np.zeros(grams.shape[2:0:-1]) for _ in range(2))
        for layer, step in np.ndindex(values.shape):
            runs = grams[:, step, layer]
            if exact or single:
                values[layer, step] = lambda_min(runs.mean(axis=0))
                errors[layer, step] = 0.0 if exact else np.nan
            else:
                values[layer, step], errors[layer, step] = jackknife_lambda_min(runs)
        return values, errors


class DivergedError(ArithmeticError):
    """Training left the finite numbers, or needed more directions than allowed.

    Attributes:
        trajectory: what was recorded before; None if nothing was.
    """

    def __init__(self, message: str, trajectory: Trajectory | None = None) -> None:
        super().__init__(message)
        self.trajectory = trajectory
