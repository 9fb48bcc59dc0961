"""The limits of the NTP and SP schemes as a Trajectory: outputs move by a kernel, features stand still.

    f_{t+1} = f_t - lr_t Theta v_t,   v_t = momentum v_{t-1} + chi_t,   f_0 = 0

At random initial weights f_0 is a Gaussian process; for the squared loss f_0 = 0 is the mean over them.
Source: Jacot, Gabriel, Hongler 2018 (arXiv 1806.07572); for SP spec section c4.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from .kernels import limiting_kernel, nngp
from .run_plan import Data, Settings, batch_at
from .trajectory import Record, Trajectory

__all__ = ["kernel_trajectory"]


def kernel_trajectory(
    settings: Settings,
    scheme: str,
    data: Data,
    steps: Sequence[int],
    record: Sequence[str],
    batch_key: PRNGKeyArray,
) -> Trajectory:
    """Descend with the limiting kernel and record at the given steps.

    Args:
        settings: what is trained.
        scheme: "ntp" or "sp".
        data: what it is trained on.
        steps: steps to record, in order; the last ends the run.
        record: "f" always; "K" gives the Gram matrices of h and x, equal at all steps; "change" is zero. "G"
            is left out: backward signals vanish with the width.
        batch_key: where batches come from.

    Raises:
        ValueError: for weight decay, several activations, or a scheme of another kind.
    """
    if settings.weight_decay:
        raise ValueError(
            f"weight_decay must be 0 in the {scheme!r} limit, where it moves the kernel, got "
            f"{settings.weight_decay!r}"
        )
    names = {activation.name for activation in settings.activations}
    if len(names) > 1:
        raise ValueError(
            f"activation must be one for all layers in the {scheme!r} limit, got {sorted(names)}"
        )
    phi = settings.activations[0].name
    activation = phi if len(names) == 1 and _is_registered(phi) else settings.activations[0].phi
    deviations = np.sqrt(settings.parametrization.variances(1, settings.depth, input_dim=settings.input_dim))
    inputs = np.concatenate([data.X, data.X_test])
    theta = np.asarray(
        limiting_kernel(
            inputs,
            data.X,
            depth=settings.depth,
            activation=activation,
            parametrization="ntp" if scheme == "ntp" else "sp",
            sigma=[float(deviation) for deviation in deviations],
        )
    )
    samples = len(data.X)
    f = np.zeros((len(inputs), settings.output_dim))
    velocity = np.zeros((samples, settings.output_dim))
    y = jnp.asarray(data.y)
    fixed = (
        _standing_features(settings, data, activation, deviations) if set(record) & {"K", "change"} else {}
    )
    fixed = {name: value for name, value in fixed.items() if (name == "change") <= ("change" in record)}
    if "K" not in record:
        fixed = {name: value for name, value in fixed.items() if name == "change"}
    records: list[Record] = []
    for step in range(steps[-1] + 1):
        if step in steps:
            records.append({"f": f[:samples], "f_test": f[samples:], **fixed})
            records[-1]["loss"] = np.asarray(settings.loss.value(jnp.asarray(f[:samples]), y))
        batch = np.asarray(batch_at(batch_key, step, samples, settings.batch))
        chi = np.zeros_like(velocity)
        chi[batch] = np.asarray(settings.loss.chi(jnp.asarray(f[batch]), y[batch]))
        velocity = settings.momentum * velocity + chi
        f = f - settings.rate(step) * theta @ velocity
    merged = {name: np.stack([made[name] for made in records])[None] for name in records[0]}
    if not len(data.X_test):
        del merged["f_test"]
    rates = np.asarray([settings.rate(t) for t in range(steps[-1])])
    return Trajectory(np.asarray(steps), "kernel", merged, rates)


def _is_registered(name: str) -> bool:
    from .activations import ACTIVATIONS

    return name in ACTIVATIONS


def _standing_features(settings: Settings, data: Data, activation, deviations: np.ndarray) -> Record:
    """Gram matrices of h^l and x^l at every step: sigma_l^2 K^{l-1} and K^l."""
    layers = _feature_kernels(settings, data, activation, deviations)
    pre = np.stack([s**2 * K for s, K in zip(deviations[:-1], layers[:-1], strict=True)])
    post = np.stack(layers[1:])
    zeros = np.zeros(settings.depth)
    return {"K_pre": pre, "K_post": post, "K_pre_cross": pre, "K_post_cross": post, "change": zeros}


def _feature_kernels(settings: Settings, data: Data, activation, deviations: np.ndarray) -> list[np.ndarray]:
    if len(set(deviations[1:-1])) > 1:
        raise ValueError(f"sigma must be equal in layers 2..L to record features, got {deviations.tolist()}")
    # The first layer's scale belongs to the inputs; that of the others is w_std, which `nngp` puts after phi.
    w_std = float(deviations[1]) if settings.depth > 1 else 1.0
    made = nngp(
        data.X * deviations[0], depth=settings.depth, activation=activation, w_std=w_std, return_layers=True
    )
    inputs = np.asarray(made[0]) / deviations[0] ** 2
    return [inputs, *(np.asarray(K) / w_std**2 for K in made[1:])]
