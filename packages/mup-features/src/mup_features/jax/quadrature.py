"""The limit without sampling: response functions by differentiation, expectations by the trapezoidal rule.

Order parameters (overlaps and responses) of layer l are integrals over the Gaussian fields of one coordinate
(`single_site`), and the order parameters of layers l - 1 and l + 1 are all that enters there. Going through
time and layers in causal order gives them exactly, but each integral has as many dimensions as the layer has
fields: four at most here. That suffices for a few samples and steps, or many steps of one hidden layer, and
checks the sampler of `limit` by other means.

Source: spec section c4, method "quadrature".
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from .dual_activations import POINTS
from .run_plan import Data, Settings
from .single_site import Grid, Site, backward_means, fields_of, forward_means, grid
from .trajectory import Trajectory

MAX_FIELDS = 4
"""Dimensions of an integral: 150 points on each axis are 5e8."""

__all__ = ["quadrature_trajectory"]


def quadrature_trajectory(
    settings: Settings,
    data: Data,
    recorded: Sequence[int],
    record: Sequence[str],
    *,
    points: int = POINTS,
) -> Trajectory:
    """The trajectory of the muP limit under full-batch SGD, exact to about 1e-12 for smooth activations.

    Args:
        settings: of the run; no minibatches, momentum or weight decay.
        data: training and test data.
        recorded: steps to record, ascending; training ends with the last.
        record: as in `WidthSimulator.fit`. "G" at the last step may need a field more than the rest.
        points: points per axis on [-9.2, 9.2]. 151 leaves rounding in activations like tanh; in R2 with two
            layers 81 leave 3e-11, 61 leave 3e-9, 41 leave 4e-6.

    Raises:
        ValueError: if a layer has more than four independent Gaussian fields, or the settings have
            minibatches, momentum, weight decay or another parametrization than muP.
    """
    if settings.parametrization.name not in ("mup", "mfp"):
        raise ValueError(
            f"parametrization must be 'mup' for quadrature, got {settings.parametrization.name!r}"
        )
    if settings.batch not in (None, len(data.X)):
        raise ValueError(f"batch must be None for quadrature, got {settings.batch!r}")
    for name in ("momentum", "weight_decay"):
        if getattr(settings, name):
            raise ValueError(f"{name} must be 0 for quadrature, got {getattr(settings, name)!r}")
    order = _OrderParameters(settings, data, points)
    records = []
    for t in range(recorded[-1] + 1):
        made = order.forward(t)
        if t < recorded[-1] or "G" in record:
            made["G"] = order.backward(t)
        if t in recorded:
            records.append(made)
    names = ["f", "loss", *(("f_test",) if len(data.X_test) else ())]
    names += [name for name in ("G", "change") if name in record]
    if "K" in record:
        names += ["K_pre", "K_post", "K_pre_cross", "K_post_cross"]
    replicas = {name: np.stack([made[name] for made in records])[None] for name in names}
    rates = np.array([settings.rate(t) for t in range(recorded[-1])])
    return Trajectory(np.asarray(recorded), "quadrature", replicas, rates)


class _OrderParameters:
    """Overlaps, responses and couplings of all layers, 0-based, as far as time has gone.

    Attributes:
        x: per layer (t, s) -> [rows, rows], E[x_t x_s].
        b: per layer (t, s) -> [samples, samples], E[b_t b_s].
        forward: A per layer and time (see `single_site`).
        backward: B per layer and time.
        chi: per time the derivative of the loss.
    """

    def __init__(self, settings: Settings, data: Data, points: int) -> None:
        self.settings, self.points = settings, points
        depth = settings.depth
        self.std = np.sqrt(settings.parametrization.variances(1, depth, input_dim=settings.input_dim))
        self.coordinates, self.y, self.samples = data.coordinates(), jnp.asarray(data.y), len(data.X)
        self.x: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in range(depth)]
        self.b: list[dict[tuple[int, int], np.ndarray]] = [{} for _ in range(depth)]
        self.forward_couplings: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(depth)]
        self.backward_couplings: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(depth)]
        self.chi: list[np.ndarray] = []
        self.start_sizes: list[np.ndarray] = []

    def forward(self, t: int) -> dict[str, np.ndarray]:
        """The forward pass of step t through all layers; what is recorded of it."""
        response, f, N = None, np.zeros(0), self.samples
        records: dict[str, list] = {name: [] for name in ("K_pre", "K_post", "K_pre_cross", "K_post_cross")}
        change = []
        for layer, activation in enumerate(self.settings.activations):
            self.forward_couplings[layer].append(self._forward_couplings(layer, t, response))
            site, where = self._site(layer, t)
            means = forward_means(activation, site, where, self.settings.output_dim)
            made = {name: np.asarray(value) for name, value in means.items()}
            for s in range(t + 1):
                self.x[layer][t, s], self.x[layer][s, t] = made["x"][s], made["x"][s].T
            response, f = made.get("response"), made.get("f", f)
            if t == 0:
                self.start_sizes.append(np.sqrt(np.diag(made["h"])[:N]))
            change.append(np.mean(np.sqrt(made["moved"][:N]) / self.start_sizes[layer]))
            sources = (made["h"], made["x"][t], made["h_start"], made["x"][0])
            for name, gram in zip(records, sources, strict=True):
                records[name].append(gram[:N, :N])
        loss = self.settings.loss
        self.chi.append(np.asarray(loss.chi(jnp.asarray(f[:N]), self.y)))
        return {name: np.stack(grams) for name, grams in records.items()} | {
            "f": f[:N],
            "f_test": f[N:],
            "loss": np.asarray(loss.value(jnp.asarray(f[:N]), self.y)),
            "change": np.asarray(change),
        }

    def backward(self, t: int) -> Float[np.ndarray, "layers n n"]:
        """The backward pass of step t through all layers; Gram matrices of b."""
        response = None
        for layer in reversed(range(self.settings.depth)):
            if response is not None:
                self.backward_couplings[layer].append(self._backward_couplings(layer, t, response))
            site, where = self._site(layer, t, backward=True)
            activation = self.settings.activations[layer]
            made = backward_means(activation, site, where, self.settings.output_dim)
            products, response = np.asarray(made["b"]), np.asarray(made["response"])
            for s in range(t + 1):
                self.b[layer][t, s], self.b[layer][s, t] = products[s], products[s].T
        return np.stack([overlaps[t, t] for overlaps in self.b])

    def _forward_couplings(self, layer: int, t: int, response: np.ndarray | None) -> tuple[np.ndarray, ...]:
        """A[t; s] for s < t: response of the layer below, and what the updates of the matrix have learned."""
        N = self.samples
        if layer == 0:
            overlaps = [self.coordinates @ self.coordinates[:N].T] * t
        else:
            overlaps = [self.x[layer - 1][t, s][:, :N] for s in range(t)]
        learned = tuple(-self.settings.rate(s) * overlap for s, overlap in enumerate(overlaps))
        if response is None:
            return learned
        return tuple(self.std[layer] ** 2 * response[:, s] + learned[s] for s in range(t))

    def _backward_couplings(self, layer: int, t: int, response: np.ndarray) -> tuple[np.ndarray, ...]:
        """B[t; s] for s <= t; at s = t there is the response alone, as the update comes later."""
        variance = self.std[layer + 1] ** 2
        couplings = [variance * response[:, s, : self.samples] for s in range(t + 1)]
        for s in range(t):
            couplings[s] = couplings[s] - self.settings.rate(s) * self.b[layer + 1][t, s]
        return tuple(couplings)

    def _site(self, layer: int, t: int, *, backward: bool = False) -> tuple[Site, Grid]:
        """The single-site recursion of a layer up to time t, and the grid over its fields."""
        rows, last = len(self.coordinates), layer == self.settings.depth - 1
        if layer == 0:
            u_root = np.repeat(self.std[0] * self.coordinates[None], t + 1, axis=0)
        else:
            u_root = self._root(self.x[layer - 1], t + 1, rows, self.std[layer])
        times = t + 1 if backward else t
        forward = tuple(self.forward_couplings[layer])
        if last:
            chi = tuple(self.chi[:times])
            rates = tuple(self.settings.rate(s) for s in range(t))
            site = Site(u_root, None, forward, chi=chi, rates=rates, readout_std=float(self.std[-1]))
            dimensions = u_root.shape[-1] + self.settings.output_dim
        else:
            v_root = self._root(self.b[layer + 1], times, self.samples, self.std[layer + 1])
            site = Site(u_root, v_root, forward, tuple(self.backward_couplings[layer]))
            dimensions = u_root.shape[-1] + v_root.shape[-1]
        if dimensions > MAX_FIELDS:
            raise ValueError(
                f"quadrature must have at most {MAX_FIELDS} Gaussian fields in a layer, got {dimensions} in"
                f" layer {layer + 1} at step {t}: take fewer samples or steps, or method='limit'"
            )
        return site, grid(dimensions, self.points)

    def _root(
        self, overlaps: dict[tuple[int, int], np.ndarray], times: int, size: int, std: float
    ) -> Float[np.ndarray, "times size rank"]:
        """Root of the covariance of the fields that belong to these overlaps."""
        if not times:
            return np.zeros((0, size, 0))
        covariance = np.block([[overlaps[t, s] for s in range(times)] for t in range(times)])
        return std * fields_of(covariance).reshape(times, size, -1)
