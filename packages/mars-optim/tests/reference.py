"""The float64 NumPy truth of MARS: the paper's formulas, one step per line, without any framework.

Source: Yuan et al. 2025 (arXiv 2411.10438), Algorithms 1-4; Liu et al. 2025 (arXiv 2510.21800) for mars-m.
Equation numbers are those of the first paper. Written for reading: nothing here is shared with the package.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MARS_M_NS_EPS = 1e-7


@dataclass(frozen=True)
class Options:
    """Everything that a step reads; one instance per step, so that any value may change over time."""

    mars_type: str = "adamw"
    lr: float = 3e-3
    betas: tuple[float, float] = (0.95, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    gamma: float = 0.025
    is_approx: bool = True
    optimize_1d: bool = False
    lr_1d_ratio: float = 1.0
    betas_1d: tuple[float, float] = (0.9, 0.95)
    weight_decay_1d: float = 0.1
    clip: float | None = 1.0
    clip_scope: str = "tensor"
    prev_grad_init: str = "current"
    matrix_ndim: str = ">=2"
    matrix_view: str = "flatten"
    second_moment: str = "corrected"
    decay_mode: str = "decoupled"
    reference_lr: float = 3e-3
    cautious: bool = False
    orthogonalize: str = "newton_schulz"
    ns_steps: int = 5
    ns_coefficients: tuple[float, float, float] = COEFFICIENTS
    scale: str | float | None = None
    maximize: bool = False


@dataclass
class State:
    """What one parameter remembers between steps."""

    t: int = 0
    m: Array | float = 0.0
    v: Array | float = 0.0
    v_max: Array | float = 0.0
    last_gradient: Array | None = None
    last_parameter: Array | None = None


@dataclass
class Mars:
    """A list of parameters under MARS; `step` is Algorithm 1 for all of them."""

    parameters: list[Array]
    states: list[State] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [np.array(x, dtype=np.float64) for x in self.parameters]
        self.states = [State() for _ in self.parameters]

    def step(self, gradients: list[Array], options: Options, exact: list[Array] | None = None) -> None:
        """One step; `exact` holds grad f(x_{t-1}, xi_t) for the exact form."""
        o = options
        effective, corrected = [], []
        for i, (x, gradient, state) in enumerate(zip(self.parameters, gradients, self.states, strict=True)):
            g = -gradient if o.maximize else gradient
            g = g + weight_decay_of(x, o) * x if o.decay_mode == "l2" else g
            effective.append(g)
            if state.t == 0:
                h = g if o.prev_grad_init == "current" else np.zeros_like(g)
            elif o.is_approx:
                h = state.last_gradient  # Remark 3.3
            else:
                assert exact is not None
                h = -exact[i] if o.maximize else exact[i]
                h = h + weight_decay_of(x, o) * state.last_parameter if o.decay_mode == "l2" else h
            corrected.append(correction(g, h, o) if uses_mars(x, o) else g)
        norm_of_all = np.sqrt(
            sum(np.sum(c**2) for x, c in zip(self.parameters, corrected, strict=True) if uses_mars(x, o))
        )
        for i, (x, state) in enumerate(zip(self.parameters, self.states, strict=True)):
            state.t += 1
            state.last_gradient = effective[i]
            state.last_parameter = x
            if uses_mars(x, o):
                c = clip(corrected[i], o, norm_of_all if o.clip_scope == "global" else None)
                self.parameters[i] = mars_update(x, effective[i], c, state, o)
            else:
                self.parameters[i] = adamw_update(x, effective[i], state, o)


def weight_decay_of(x: Array, o: Options) -> float:
    return o.weight_decay if uses_mars(x, o) else o.weight_decay_1d


def is_matrix(x: Array, o: Options) -> bool:
    return x.ndim == 2 if o.matrix_ndim == "==2" else x.ndim >= 2


def uses_mars(x: Array, o: Options) -> bool:
    return o.optimize_1d or is_matrix(x, o)


def correction(g: Array, h: Array, o: Options) -> Array:
    """Eqs 3.3-3.4."""
    beta1 = o.betas[0]
    return g + o.gamma * beta1 / (1 - beta1) * (g - h)


def clip(c: Array, o: Options, norm: float | None) -> Array:
    """Eq 3.5."""
    if o.clip is None:
        return c
    if norm is None:
        axes = (-2, -1) if o.matrix_view == "batch" and c.ndim >= 3 else None
        norm = np.sqrt(np.sum(c**2, axis=axes, keepdims=axes is not None))
    return c / np.maximum(1.0, norm / o.clip)


def mars_update(x: Array, g: Array, c: Array, state: State, o: Options) -> Array:
    beta1, beta2 = o.betas
    state.m = beta1 * state.m + (1 - beta1) * c  # eq 3.9
    orthogonal = o.mars_type in ("shampoo", "m")
    if o.mars_type == "adamw" or (orthogonal and not is_matrix(x, o)):
        s = g if o.second_moment == "grad" else c
        state.v = beta2 * state.v + (1 - beta2) * s**2  # eq 3.10
        u = adam_direction(state, beta1, beta2, o)
    elif o.mars_type == "lion":
        u = np.sign(state.m)  # eq 3.15
    elif o.mars_type == "sgd":
        u = state.m
    else:
        u = orthogonal_direction(state.m, o)  # eqs 3.20-3.21
    return descend(x, u, g, o, o.lr, o.weight_decay)


def adamw_update(x: Array, g: Array, state: State, o: Options) -> Array:
    beta1, beta2 = o.betas_1d
    state.m = beta1 * state.m + (1 - beta1) * g
    state.v = beta2 * state.v + (1 - beta2) * g**2
    u = adam_direction(state, beta1, beta2, o)
    return descend(x, u, g, o, o.lr * o.lr_1d_ratio, o.weight_decay_1d)


def adam_direction(state: State, beta1: float, beta2: float, o: Options) -> Array:
    state.v_max = np.maximum(state.v_max, state.v)
    m_hat = state.m / (1 - beta1**state.t)  # eq 3.11
    v_hat = (state.v_max if o.amsgrad else state.v) / (1 - beta2**state.t)  # eq 3.11
    return m_hat / (np.sqrt(v_hat) + o.eps)  # eq 3.12


def orthogonal_direction(m: Array, o: Options) -> Array:
    if o.matrix_view == "batch" and m.ndim >= 3:
        slices = m.reshape(-1, *m.shape[-2:])
        return np.stack([orthogonal_direction(piece, o) for piece in slices]).reshape(m.shape)
    matrix = m.reshape(m.shape[0], -1)
    rows, columns = matrix.shape
    if o.orthogonalize == "newton_schulz":
        fed = matrix if o.mars_type == "m" else matrix / (1 - o.betas[0])
        eps = MARS_M_NS_EPS if o.mars_type == "m" else o.eps
        factor = newton_schulz(fed, o.ns_steps, o.ns_coefficients, eps)
    else:
        factor = polar(matrix)
    scale = o.scale or ("rms" if o.mars_type == "m" else "sqrt_ratio")
    named = {
        "none": 1.0,
        "sqrt_ratio": np.sqrt(max(1, rows / columns)),
        "rms": 0.2 * np.sqrt(max(rows, columns)),
    }
    return (factor * (named[scale] if isinstance(scale, str) else scale)).reshape(m.shape)


def newton_schulz(
    m: Array, steps: int = 5, coefficients: tuple[float, float, float] = COEFFICIENTS, eps: float = 0.0
) -> Array:
    p1, p2, p3 = coefficients
    norm = np.sqrt(np.sum(m**2)) + eps
    x = m / norm if norm > 0 else m
    x = x.T if m.shape[0] > m.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = p1 * x + (p2 * a + p3 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def polar(m: Array) -> Array:
    """U V^T over the singular values that are not rounding noise."""
    u, s, vt = np.linalg.svd(m, full_matrices=False)
    kept = s > s.max(initial=0.0) * max(m.shape) * np.finfo(np.float64).eps
    return (u * kept) @ vt


def descend(x: Array, u: Array, g: Array, o: Options, lr: float, weight_decay: float) -> Array:
    """x_{t+1} = x_t - eta (u + lambda x_t), with the options on masks and decay."""
    if o.cautious:  # arXiv 2411.16085
        mask = (u * g > 0).astype(np.float64)
        u = u * mask / max(mask.mean(), 1e-3)
    decay = {
        "decoupled": lr * weight_decay,
        "independent": weight_decay * o.lr / o.reference_lr,
        "cautious": lr * weight_decay * (u * x >= 0),  # arXiv 2510.12402
        "l2": 0.0,
    }[o.decay_mode]
    return x - lr * u - decay * x
