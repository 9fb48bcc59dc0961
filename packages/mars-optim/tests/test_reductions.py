"""Where MARS becomes a known optimiser: the connections of the paper, with torch.optim as the peer."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import Options
from trajectories import assert_same, draw, run_mars

from mars_optim.theory import storm_schedule
from mars_optim.torch import MARS

STEPS = 50
ROUNDING = 1e-12  # 50 float64 steps on numbers of order one
MATRICES = ((6, 4), (3, 8))
SHAPES = ((6, 4), (3, 8), (5,), (2, 3, 3, 2))


def train(optimizer, params, gradients, references=None):
    """All steps; with references the exact form."""
    for t, step in enumerate(gradients):
        for param, gradient in zip(params, step, strict=True):
            param.grad = torch.tensor(gradient)
        given = {} if references is None else {"prev_grads": [torch.tensor(h) for h in references[t]]}
        optimizer.step(**given)
    return [p.detach().numpy() for p in params]


def parameters_of(drawn):
    return [torch.nn.Parameter(torch.tensor(x)) for x in drawn[0]]


def unclipped(drawn, **changed):
    """MARS without clip, started from h_1 = 0, as the connections are stated."""
    params = parameters_of(drawn)
    optimizer = MARS(params, clip=None, **{"prev_grad_init": "zero", **changed})
    return train(optimizer, params, drawn[1]), optimizer


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_gamma_zero_is_torch_adamw(foreach, amsgrad):
    drawn = draw(seed=4, shapes=SHAPES, steps=STEPS)
    common = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": amsgrad}
    params = parameters_of(drawn)
    expected = train(torch.optim.AdamW(params, foreach=foreach, **common), params, drawn[1])
    actual, _ = unclipped(drawn, gamma=0.0, lr_1d=0.01, weight_decay_1d=0.1, foreach=foreach, **common)
    # the list backend does torch's operations in torch's order; the loop divides in another one
    assert_same(actual, expected, rtol=0, atol=0 if foreach else ROUNDING)


@pytest.mark.parametrize("foreach", [False, True])
def test_without_averaging_there_is_nothing_to_correct(foreach):
    """a = gamma beta1 / (1 - beta1) vanishes with beta1: mars-sgd is then plain descent along g."""
    drawn = draw(seed=17, shapes=MATRICES, steps=STEPS)
    params = parameters_of(drawn)
    expected = train(torch.optim.SGD(params, lr=0.01), params, drawn[1])
    actual, _ = unclipped(drawn, mars_type="sgd", gamma=0.2, betas=(0.0, 0.99), lr=0.01, foreach=foreach)
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("foreach", [False, True])
def test_lion_leaves_entries_without_momentum_where_they_are(foreach):
    param = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    optimizer = MARS([param], mars_type="lion", lr=0.5, foreach=foreach)
    param.grad = torch.tensor([[0.0, 1.0], [-0.0, -1.0]])
    optimizer.step()
    assert torch.equal(param.detach(), torch.tensor([[1.0, 1.5], [3.0, 4.5]]))


def test_gamma_zero_with_l2_decay_is_torch_adam():
    drawn = draw(seed=5, shapes=SHAPES, steps=STEPS)
    params = parameters_of(drawn)
    expected = train(torch.optim.Adam(params, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1), params, drawn[1])
    actual, _ = unclipped(
        drawn,
        gamma=0.0,
        lr=0.01,
        lr_1d=0.01,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        weight_decay_1d=0.1,
        decay_mode="l2",
    )
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("foreach", [False, True])
def test_lion_is_mars_lion_with_equal_betas_bit_for_bit(foreach):
    """Eqs 3.18-3.19 of the paper."""
    b1, b2, lr, decay = 0.9, 0.99, 0.01, 0.1
    drawn = draw(seed=6, shapes=MATRICES, steps=STEPS)
    x = [torch.tensor(value) for value in drawn[0]]
    u = [torch.zeros_like(value) for value in x]
    for step in drawn[1]:
        for i, gradient in enumerate(step):
            g = torch.tensor(gradient)
            m = b1 * u[i] + (1 - b1) * g  # eq 3.18
            u[i] = b2 * u[i] + (1 - b2) * g  # eq 3.19
            x[i] = x[i] * (1 - lr * decay) - lr * m.sign()
    actual, _ = unclipped(
        drawn,
        mars_type="lion",
        betas=(b2, 0.0),
        gamma=(b2 - b1) / b2,
        lr=lr,
        weight_decay=decay,
        foreach=foreach,
    )
    assert_same(actual, [value.numpy() for value in x], rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon needs torch >= 2.9")
def test_nesterov_muon_is_mars_shampoo(monkeypatch):
    """Eqs 3.22-3.25: momenta are proportional by 1 / (1 - mu), updates equal."""
    from torch.optim import _muon

    from mars_optim.torch import newton_schulz

    def in_float64(grad, ns_coefficients, ns_steps, eps):
        return newton_schulz(grad, steps=ns_steps, coefficients=tuple(ns_coefficients), eps=eps)

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", in_float64)
    mu, eps = 0.9, 1e-7
    drawn = draw(seed=7, shapes=MATRICES, steps=STEPS)
    params = parameters_of(drawn)
    muon = torch.optim.Muon(params, lr=0.02, weight_decay=0.1, momentum=mu, nesterov=True, eps=eps)
    expected = train(muon, params, drawn[1])
    actual, _ = unclipped(
        drawn,
        mars_type="shampoo",
        betas=(mu, 0.99),
        gamma=1 - mu,
        lr=0.02,
        weight_decay=0.1,
        eps=eps / (1 - mu),
    )
    # torch keeps (1 - mu) in its momentum, the paper feeds m / (1 - mu): only the scale of eps differs
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


def test_gamma_one_in_the_exact_form_is_storm():
    """Eqs 2.4-2.5."""
    beta, lr = 0.9, 0.05
    options = Options(
        mars_type="sgd",
        lr=lr,
        betas=(beta, 0.99),
        gamma=1.0,
        clip=None,
        is_approx=False,
        prev_grad_init="current",
    )
    drawn = draw(seed=8, shapes=MATRICES, steps=STEPS)
    x, m = [value.copy() for value in drawn[0]], [0.0, 0.0]
    for t, (gradients, references) in enumerate(zip(drawn[1], drawn[2], strict=True)):
        for i, (g, h) in enumerate(zip(gradients, references, strict=True)):
            difference = 0.0 if t == 0 else g - h
            m[i] = beta * m[i] + (1 - beta) * g + beta * difference
            x[i] = x[i] - lr * m[i]
    assert_same(run_mars(drawn, options), x, rtol=0, atol=ROUNDING)


def test_the_schedule_of_the_theorem_drives_the_optimizer_to_a_momentum_near_the_gradient():
    """Theorem B.5 on least squares with L = 1: betas that approach 1 are read anew at each step."""
    rng = np.random.default_rng(19)
    rows, targets = rng.normal(size=(64, 12)), rng.normal(size=64)
    rows /= np.linalg.norm(rows, axis=1).max()
    # H_t = 1, so rho = 1: c >= 32 L^2 + 1, and s > c^1.5 makes the first beta1 positive (8 L^3 is less)
    schedule = storm_schedule(200.0, 33.0)
    x, m, previous = np.zeros(12), np.zeros(12), np.zeros(12)
    param = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = MARS([param], mars_type="sgd", gamma=1.0, clip=None, is_approx=False)
    ratios = []
    for (eta, beta1, beta2), i in zip(schedule, rng.integers(0, 64, 1500), strict=False):
        optimizer.param_groups[0].update(lr=eta, betas=(beta1, beta2))
        every = rows * (rows @ x - targets)[:, None]
        g, h = every[i], rows[i] * (rows[i] @ previous - targets[i])
        param.grad = torch.tensor(g.reshape(3, 4))
        optimizer.step(prev_grads=[torch.tensor(h.reshape(3, 4))])
        m = beta1 * m + (1 - beta1) * g + beta1 * (g - h)
        mean = every.mean(axis=0)
        ratios.append(np.sum((m - mean) ** 2) / np.mean(np.sum((every - mean) ** 2, axis=1)))
        previous, x = x, x - eta * m
    assert_same([param.detach().numpy().ravel()], [x], rtol=0, atol=ROUNDING)
    # beta1 goes from 0.04 to 0.77: the squared error falls from one sample's to a small part of it
    assert np.mean(ratios[-500:]) < 0.3 * np.mean(ratios[:50])


def momentum_of(drawn, **changed):
    _, optimizer = unclipped(drawn, lr=0.01, **changed)
    return [state["exp_avg"].numpy() for state in optimizer.state.values()]


def test_nesterov_momentum_is_gamma_one_minus_beta():
    """Eq B.1: m_t / (1 - beta) is torch.optim.SGD's Nesterov direction."""
    beta, lr = 0.9, 0.01
    drawn = draw(seed=9, shapes=MATRICES, steps=STEPS)
    params = parameters_of(drawn)
    nesterov = torch.optim.SGD(params, lr=lr, momentum=beta, nesterov=True)
    expected = train(nesterov, params, drawn[1])
    actual, _ = unclipped(drawn, mars_type="sgd", betas=(beta, 0.99), gamma=1 - beta, lr=lr / (1 - beta))
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


def test_adan_first_moment_is_gamma_one_minus_beta():
    """Adan keeps m of g and v of g_t - g_{t-1} apart; with equal decays m + beta v is MARS's momentum."""
    beta = 0.92
    drawn = draw(seed=10, shapes=MATRICES, steps=STEPS)
    m, v, last = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
    for step in drawn[1]:
        for i, g in enumerate(step):
            m[i] = beta * m[i] + (1 - beta) * g
            v[i] = beta * v[i] + (1 - beta) * (g - last[i])
            last[i] = g
    expected = [m[i] + beta * v[i] for i in range(2)]
    actual = momentum_of(drawn, mars_type="sgd", betas=(beta, 0.99), gamma=1 - beta)
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


def test_superadam_is_gamma_one_with_the_second_moment_of_the_gradient():
    beta1, beta2, lr, eps = 0.9, 0.95, 0.01, 1e-8
    options = Options(
        lr=lr, betas=(beta1, beta2), gamma=1.0, clip=None, is_approx=False, second_moment="grad", eps=eps
    )
    drawn = draw(seed=11, shapes=MATRICES, steps=STEPS)
    x, m, v = [value.copy() for value in drawn[0]], [0.0, 0.0], [0.0, 0.0]
    for t, (gradients, references) in enumerate(zip(drawn[1], drawn[2], strict=True), start=1):
        for i, (g, h) in enumerate(zip(gradients, references, strict=True)):
            m[i] = (1 - beta1) * g + beta1 * (m[i] + (0.0 if t == 1 else g - h))
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            x[i] = x[i] - lr * (m[i] / (1 - beta1**t)) / (np.sqrt(v[i] / (1 - beta2**t)) + eps)
    assert_same(run_mars(drawn, options), x, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("start", ["zero", "current"])
def test_approximate_momentum_is_quasi_hyperbolic(start):
    beta, gamma = 0.95, 0.15
    drawn = draw(seed=12, shapes=MATRICES, steps=STEPS)
    e = [0.0, 0.0]
    for step in drawn[1]:
        e = [beta * average + (1 - beta) * g for average, g in zip(e, step, strict=True)]
    rest = 0.0 if start == "zero" else gamma * beta**STEPS
    expected = [
        gamma * g + (1 - gamma) * average - rest * first
        for g, average, first in zip(drawn[1][-1], e, drawn[1][0], strict=True)
    ]
    actual = momentum_of(drawn, mars_type="sgd", betas=(beta, 0.99), gamma=gamma, prev_grad_init=start)
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


def test_quasi_hyperbolic_momentum_may_be_kept_in_the_buffer_of_the_second_release():
    """buf <- beta buf + (1 - gamma)(1 - beta)/beta g, m = gamma g + beta buf, as the other file of MARS-M."""
    beta, gamma = 0.95, 0.15
    drawn = draw(seed=18, shapes=MATRICES, steps=STEPS)
    buffers = [0.0, 0.0]
    for step in drawn[1]:
        buffers = [beta * b + (1 - gamma) * (1 - beta) / beta * g for b, g in zip(buffers, step, strict=True)]
    expected = [gamma * g + beta * b for g, b in zip(drawn[1][-1], buffers, strict=True)]
    actual = momentum_of(drawn, mars_type="sgd", betas=(beta, 0.99), gamma=gamma)
    assert_same(actual, expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("start", ["zero", "current"])
@pytest.mark.parametrize("mars_type", ["lion", "shampoo", "m", "sgd"])
def test_memory_efficient_form_is_the_buffered_one(mars_type, start, foreach):
    drawn = draw(seed=13, shapes=SHAPES, steps=STEPS)
    common = {"mars_type": mars_type, "lr": 0.01, "gamma": 0.1, "prev_grad_init": start, "weight_decay": 0.1}
    buffered, _ = unclipped(drawn, **common)
    lean, optimizer = unclipped(drawn, memory_efficient=True, foreach=foreach, **common)
    assert_same(lean, buffered, rtol=0, atol=ROUNDING)
    for param, state in optimizer.state.items():
        kept = {"step", "exp_avg"} if param.ndim >= 2 else {"step", "exp_avg", "exp_avg_sq"}
        assert state.keys() == kept


def test_memory_efficient_form_follows_changing_betas():
    drawn = draw(seed=14, shapes=MATRICES, steps=STEPS)
    results = []
    for lean in (False, True):
        params = parameters_of(drawn)
        optimizer = MARS(params, mars_type="sgd", clip=None, memory_efficient=lean, gamma=0.1)
        for t, step in enumerate(drawn[1]):
            optimizer.param_groups[0]["betas"] = (0.95 - 0.01 * t, 0.99)
            for param, gradient in zip(params, step, strict=True):
                param.grad = torch.tensor(gradient)
            optimizer.step()
        results.append([p.detach().numpy() for p in params])
    assert_same(results[1], results[0], rtol=0, atol=ROUNDING)


def released_step(x, g, h, state, o, ndim_rule):
    """The release's update in float64, written from its description (spec c.8), for one tensor.

    h is the gradient at the previous parameters in its exact form, None in the approximate one.
    """
    state["t"] = state.get("t", 0) + 1
    t = state["t"]
    one_dimensional = not ndim_rule and not o.optimize_1d
    beta1, beta2 = o.betas_1d if one_dimensional else o.betas
    last = h if h is not None and t > 1 else state.get("last", np.zeros_like(g))
    if one_dimensional:
        c, lr, decay = g, o.lr * o.lr_1d_ratio, o.weight_decay_1d
    else:
        c = (g - last) * (o.gamma * (beta1 / (1 - beta1))) + g
        norm = np.linalg.norm(c.ravel())
        c = c / norm if norm > 1 else c
        lr, decay = o.lr, o.weight_decay
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * c
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * c * c
    state["last"] = g
    if one_dimensional or o.mars_type == "adamw" or (o.mars_type == "shampoo" and not ndim_rule):
        if o.mars_type == "m":  # MARS-M's AdamW adds eps before the bias correction
            u = state["m"] / (np.sqrt(state["v"]) + o.eps) * np.sqrt(1 - beta2**t) / (1 - beta1**t)
        else:
            u = state["m"] / ((np.sqrt(state["v"]) / np.sqrt(1 - beta2**t) + o.eps) * (1 - beta1**t))
    elif o.mars_type == "lion":
        u = np.sign(state["m"])
    else:
        fed, eps = (state["m"], 1e-7) if o.mars_type == "m" else (state["m"] / (1 - beta1), o.eps)
        rows, columns = x.shape
        scale = 0.2 * max(rows, columns) ** 0.5 if o.mars_type == "m" else max(1, rows / columns) ** 0.5
        y = fed / (np.linalg.norm(fed) + eps)
        y = y.T if rows > columns else y
        for _ in range(5):
            a = y @ y.T
            b = a @ y
            y = 3.4445 * y - 4.7750 * b + 2.0315 * a @ b
        u = scale * (y.T if rows > columns else y)
    return x - lr * (decay * x + u)


@pytest.mark.parametrize("is_approx", [True, False])
@pytest.mark.parametrize("optimize_1d", [False, True])
@pytest.mark.parametrize("mars_type", ["adamw", "lion", "shampoo", "m"])
def test_official_preset_reproduces_the_release(mars_type, optimize_1d, is_approx):
    if mars_type == "m" and optimize_1d:
        pytest.skip("the MARS-M release has no optimize_1d")
    o = Options(
        mars_type=mars_type,
        lr=0.02,
        lr_1d_ratio=0.5,
        eps=1e-3,
        weight_decay=0.05,
        gamma=0.1,
        optimize_1d=optimize_1d,
    )
    drawn = draw(seed=15, shapes=SHAPES, steps=STEPS)
    x, states = list(drawn[0]), [{} for _ in SHAPES]
    for g, h in zip(drawn[1], drawn[2], strict=True):
        h = [None] * len(g) if is_approx else h
        x = [released_step(x[i], g[i], h[i], states[i], o, g[i].ndim == 2) for i in range(len(g))]
    params = parameters_of(drawn)
    # the group without decay: the release decays its vectors all the same
    optimizer = MARS.official(
        params,
        lr=0.02,
        lr_1d=0.01,
        eps=1e-3,
        weight_decay=0.05,
        gamma=0.1,
        mars_type=f"mars-{mars_type}",
        optimize_1d=optimize_1d,
        is_approx=is_approx,
        ns_dtype=torch.float64,
    )
    actual = train(optimizer, params, drawn[1], None if is_approx else drawn[2])
    assert_same(actual, x, rtol=0, atol=ROUNDING)


def test_official_preset_sets_every_row_of_the_table():
    params = [torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))]
    optimizer = MARS.official([{"params": params, "weight_decay": 0.0}])
    group = optimizer.param_groups[0]
    wanted = {
        "prev_grad_init": "zero",
        "matrix_ndim": "==2",
        "clip": 1.0,
        "clip_scope": "tensor",
        "second_moment": "corrected",
        "ns_dtype": torch.bfloat16,
        "weight_decay_1d": 0.1,
    }
    assert {name: group[name] for name in wanted} == wanted


def test_official_preset_differs_from_the_default_at_the_first_step():
    drawn = draw(seed=16, shapes=MATRICES, steps=1, size=0.05)
    options = Options(mars_type="sgd", gamma=0.1, lr=0.1)
    default = run_mars(drawn, options)
    zero = run_mars(drawn, replace(options, prev_grad_init="zero"))
    a = 0.1 * 0.95 / (1 - 0.95)
    moved = [x - y for x, y in zip(drawn[0], default, strict=True)]
    assert_same(
        [x - y for x, y in zip(drawn[0], zero, strict=True)], [(1 + a) * d for d in moved], rtol=1e-10, atol=0
    )
