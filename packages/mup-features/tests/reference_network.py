"""A finite multilayer perceptron trained by SGD in the effective parametrization (section c1).

h^1 = W^1 xi, x^l = phi(h^l), h^l = W^l x^{l-1}, f = W^{L+1} x^L; entries of W^l_0 are N(0, var_l) and
W^l_{t+1} = W^l_t - rate_l dloss/dW^l. Loss: 1/2 squared error, added over the batch or averaged.
All weights may carry a leading axis of independent networks.
"""

import numpy as np

# name -> (v_l, e_l) for l = 1 | 2..L | L+1: Var(W^l) = n^-v_l, rate of layer l = eta n^-e_l.
PRESETS = {
    "mup": ((0, 1, 2), (-1, 0, 1)),
    "ip": ((0, 2, 2), (-1, 0, 1)),
    "ntp": ((0, 1, 1), (0, 1, 1)),
    "sp": ((0, 1, 1), (1, 1, 1)),
    "sp_const": ((0, 1, 1), (0, 0, 0)),
}


def effective(preset, width, depth, eta, sigma=1.0):
    """Variances and rates of layers 1..L+1."""
    (v1, vh, vo), (e1, eh, eo) = PRESETS[preset]
    v = np.array([v1] + [vh] * (depth - 1) + [vo], dtype=float)
    e = np.array([e1] + [eh] * (depth - 1) + [eo], dtype=float)
    return sigma**2 * width**-v, eta * width**-e


def draw_weights(rng, variances, width, input_dim, output_dim, networks):
    """Weights of independent nets: [S, n, d], then [S, n, n] for each hidden layer, then [S, C, n]."""
    depth = len(variances) - 1
    shapes = [(width, input_dim)] + [(width, width)] * (depth - 1) + [(output_dim, width)]
    return [np.sqrt(v) * rng.standard_normal((networks, *s)) for v, s in zip(variances, shapes, strict=True)]


def forward(weights, X, phi, biases=None):
    """Pre-activations and features of layers 1..L ([S, N, n] each) and outputs [S, N, C]."""
    x = np.broadcast_to(X, (len(weights[0]), *X.shape))
    pre, post = [], []
    for layer, W in enumerate(weights[:-1]):
        h = x @ W.swapaxes(-1, -2)
        if biases is not None:
            h = h + biases[:, layer, None]
        x = phi(h)
        pre.append(h)
        post.append(x)
    return pre, post, x @ weights[-1].swapaxes(-1, -2)


def train_networks(
    weights,
    rates,
    X,
    y,
    steps,
    *,
    phi,
    dphi,
    batches=None,
    reduction="sum",
    rates_0=None,
    momentum=0.0,
    shrink=1.0,
    biases=None,
):
    """Records of t = 0..steps: f [t, S, N, C], pre, post [t][layer] [S, N, n], b [t][layer] [S, B, n].

    Args:
        weights: from `draw_weights`; not changed.
        rates: effective rate of each layer.
        X: inputs [N, d].
        y: targets [N, C].
        steps: number of updates.
        phi: activation.
        dphi: its derivative.
        batches: indices of the samples of each step [steps + 1, B]; None is the full batch.
        reduction: "sum" or "mean" over the batch.
        rates_0: rates of step 0 where they differ.
        momentum: decay of the sum of gradients.
        shrink: factor of the weights at each step.
        biases: of the hidden layers [S, L, n], trained like weights of layer 1; None is none.

    Backward signals are scaled as in section c3: b^l = n dloss/dh^l.
    """
    weights = [W.copy() for W in weights]
    velocities = [np.zeros_like(W) for W in weights]
    bias_velocity = 0.0
    width = weights[0].shape[-2]
    record = {"f": [], "pre": [], "post": [], "b": []}
    for t in range(steps + 1):
        pre, post, f = forward(weights, X, phi, biases)
        index = np.arange(len(X)) if batches is None else batches[t]
        chi = f[:, index] - y[index]
        if reduction == "mean":
            chi = chi / len(index)
        signals = []
        dx = chi @ weights[-1]
        for layer in reversed(range(len(pre))):
            dh = dx * dphi(pre[layer][:, index])
            signals.insert(0, dh)
            dx = dh @ weights[layer]
        for name, value in (("f", f), ("pre", pre), ("post", post), ("b", [width * s for s in signals])):
            record[name].append(value)
        if t == steps:
            break
        below = [np.broadcast_to(X, (len(f), *X.shape)), *post]
        step_rates = rates if t or rates_0 is None else rates_0
        for layer, error in enumerate([*signals, chi]):
            gradient = error.swapaxes(-1, -2) @ below[layer][:, index]
            velocities[layer] = momentum * velocities[layer] + gradient
            weights[layer] = shrink * weights[layer] - step_rates[layer] * velocities[layer]
        if biases is not None:
            bias_velocity = momentum * bias_velocity + np.stack([s.sum(axis=1) for s in signals], axis=1)
            biases = shrink * biases - step_rates[0] * bias_velocity
    record["f"] = np.stack(record["f"])
    return record
