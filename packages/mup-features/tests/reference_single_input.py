"""The limit on one input under muP by the recursion of single-site variables, integrated by trapezoids (R2).

One layer: two Gaussian fields, h_0 = W^1 xi and V_0, any number of steps. More layers: one update, with at
most three fields per layer: u_0, u_1 (Zhat of W x_0, W x_1) and v_0 (Zhat of W^T b_0, or V_0 at the top).
Section c3 with N = 1, xi . xi = 1, sigma = 1, loss 1/2 (f - y)^2.
"""

import numpy as np

REACH = 9.2  # the Gaussian weight there is exp(-42): below rounding


def gaussian_grid(dimensions, points=161):
    """Nodes, one array per dimension ready to broadcast, and product weights of the trapezoidal rule."""
    z = np.linspace(-REACH, REACH, points)
    w = np.exp(-0.5 * z**2) * (z[1] - z[0]) / np.sqrt(2 * np.pi)
    nodes = [z.reshape([-1 if k == axis else 1 for k in range(dimensions)]) for axis in range(dimensions)]
    weights = w
    for _ in range(dimensions - 1):
        weights = np.multiply.outer(weights, w)
    return nodes, weights


def one_layer(y, eta, steps, phi, dphi):
    """f_t for t = 0..steps, and the Gram matrix E[x_s x_t] over steps."""
    (h, V), w = gaussian_grid(2)
    f, x = [], []
    for _ in range(steps + 1):
        x.append(phi(h) + 0 * V)
        f.append(np.sum(w * V * x[-1]))
        chi = f[-1] - y
        b = V * chi * dphi(h)
        V = V - eta * x[-1] * chi
        h = h - eta * b
    return np.array(f), np.array([[np.sum(w * a * c) for a in x] for c in x])


def single_input_limit(y, eta, depth, phi, dphi):
    """f_1 and, of the last layer, E[x_1^2] and E[x_1 x_0]."""
    chi = -y  # f_0 = 0
    # t = 0. q[layer] = E[(x^l_0)^2]; p[layer] = E[(b^l_0)^2], backwards from b^L = V_0 chi phi'(h^L).
    (z,), w = gaussian_grid(1)
    q = [1.0]
    for _ in range(depth):
        q.append(np.sum(w * phi(np.sqrt(q[-1]) * z) ** 2))
    p = [None] * depth + [chi**2 * np.sum(w * dphi(np.sqrt(q[depth - 1]) * z) ** 2)]
    for layer in range(depth - 1, 0, -1):
        p[layer] = p[layer + 1] * np.sum(w * dphi(np.sqrt(q[layer - 1]) * z) ** 2)
    # t = 1, layer by layer. q01, q11: E[x_0 x_1], E[x_1^2] of the layer below; response: E[dx_1/dv_0] there.
    (z0, z1, zv), w = gaussian_grid(3)
    q01, q11, response = 1.0, 1.0, 0.0
    for layer in range(1, depth + 1):
        u0 = np.sqrt(q[layer - 1]) * z0
        u1 = q01 / np.sqrt(q[layer - 1]) * z0 + np.sqrt(max(q11 - q01**2 / q[layer - 1], 0.0)) * z1
        v0 = zv * chi if layer == depth else np.sqrt(p[layer + 1]) * zv
        b0 = v0 * dphi(u0)
        x0 = phi(u0)
        x1 = phi(u1 + b0 * (response - eta * q01))
        response = np.sum(w * dphi(u1 + b0 * (response - eta * q01)) * dphi(u0)) * (response - eta * q01)
        q01, q11 = np.sum(w * x0 * x1), np.sum(w * x1**2)
    return np.sum(w * (zv - eta * x0 * chi) * x1), q11, q01
