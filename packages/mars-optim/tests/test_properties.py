"""What must hold for all inputs: invariances, equivariances and bounds, explored by hypothesis."""

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trajectories import TYPES

from mars_optim.torch import MARS, clip_by_norm, gradient_correction, quasi_hyperbolic

settings.register_profile(
    "mars", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("mars")

seeds = st.integers(0, 2**31 - 1)
sides = st.integers(1, 6)
scale_free = st.sampled_from([t for t in TYPES if t != "sgd"])
elementwise = st.sampled_from(["adamw", "lion", "sgd"])
STEPS = 5


def numbers(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(seed, shape, steps=STEPS):
    return [numbers(seed + 1 + t, *shape) for t in range(steps)]


def run(start, grads, **options):
    param = torch.nn.Parameter(start.clone())
    optimizer = MARS([param], **{"lr": 0.1, "gamma": 0.1, **options})
    for gradient in grads:
        param.grad = gradient.clone()
        optimizer.step()
    return param.detach()


@given(
    seed=seeds, rows=sides, columns=sides, exponent=st.integers(-20, 20), mars_type=st.sampled_from(TYPES[:4])
)
def test_directions_do_not_depend_on_the_scale_of_the_gradients(seed, rows, columns, exponent, mars_type):
    start, grads = numbers(seed, rows, columns), gradients(seed, (rows, columns))
    options = {"mars_type": mars_type, "clip": None, "eps": 0.0, "orthogonalize": "svd"}
    scaled = run(start, [2.0**exponent * g for g in grads], **options)
    # a power of two rounds nothing, except in the decompositions
    torch.testing.assert_close(scaled, run(start, grads, **options), rtol=0, atol=1e-9)


@given(seed=seeds, rows=sides, columns=sides, mars_type=st.sampled_from(TYPES))
def test_permuted_rows_and_columns_move_alike(seed, rows, columns, mars_type):
    start, grads = numbers(seed, rows, columns), gradients(seed, (rows, columns))
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randperm(rows, generator=generator), torch.randperm(columns, generator=generator)
    moved = run(start[p][:, q], [g[p][:, q] for g in grads], mars_type=mars_type)
    # sums run in another order; Newton-Schulz grows rounding by 3.4445 per step at small singular values
    torch.testing.assert_close(moved, run(start, grads, mars_type=mars_type)[p][:, q], rtol=0, atol=1e-9)


@given(seed=seeds, rows=sides, columns=sides)
def test_shampoo_by_svd_turns_with_its_gradients(seed, rows, columns):
    u, v = (torch.linalg.qr(numbers(seed + 50 + i, n, n))[0] for i, n in enumerate((rows, columns)))
    start, grads = numbers(seed, rows, columns), gradients(seed, (rows, columns), steps=3)
    options = {"mars_type": "shampoo", "orthogonalize": "svd"}
    turned = run(u @ start @ v.T, [u @ g @ v.T for g in grads], **options)
    expected = u @ run(start, grads, **options) @ v.T
    # the polar factor has condition 1 / s_min of the momentum, which is seldom below 1e-4 here
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-8)


@given(seed=seeds, size=st.floats(-6, 6), mars_type=st.sampled_from(TYPES), gamma=st.floats(0, 0.2))
def test_momentum_stays_in_the_unit_ball(seed, size, mars_type, gamma):
    param = torch.nn.Parameter(numbers(seed, 4, 3))
    optimizer = MARS([param], mars_type=mars_type, gamma=gamma)
    for gradient in gradients(seed, (4, 3)):
        param.grad = 10.0**size * gradient
        optimizer.step()
        assert optimizer.state[param]["exp_avg"].norm() <= 1 + 1e-12


@given(seed=seeds, size=st.floats(-8, 8), max_norm=st.floats(1e-3, 1e3))
def test_clipping_bounds_the_norm_and_does_nothing_the_second_time(seed, size, max_norm):
    tensor = 10.0**size * numbers(seed, 3, 5)
    once = clip_by_norm(tensor, max_norm)
    assert once.norm() <= max_norm * (1 + 1e-14)
    torch.testing.assert_close(clip_by_norm(once, max_norm), once, rtol=1e-14, atol=0)
    if tensor.norm() <= max_norm:
        assert torch.equal(once, tensor)


@given(exponent=st.integers(-30, 30))
def test_norm_equal_to_the_bound_is_left_unchanged(exponent):
    tensor = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64) * 2.0**exponent
    assert torch.equal(clip_by_norm(tensor, 5.0 * 2.0**exponent), tensor)
    unit = tensor / (5 * 2.0**exponent)
    moved = run(torch.zeros(2, 2, dtype=torch.float64), [unit], mars_type="sgd", lr=1.0, betas=(0.0, 0.0))
    torch.testing.assert_close(moved, -unit, rtol=1e-15, atol=0)


@given(seed=seeds, mars_type=st.sampled_from(TYPES), is_last_first=st.booleans())
def test_order_and_grouping_of_tensors_change_nothing(seed, mars_type, is_last_first):
    shapes = [(3, 4), (3, 4), (4,), (2, 3, 2)]
    starts = [numbers(seed + i, *s) for i, s in enumerate(shapes)]
    results = []
    for split in (False, True):
        params = [torch.nn.Parameter(s.clone()) for s in starts]
        ordered = params[::-1] if is_last_first and split else params
        groups = [{"params": [p]} for p in ordered] if split else [{"params": ordered}]
        optimizer = MARS(groups, mars_type=mars_type)
        for t in range(3):
            for i, param in enumerate(params):
                param.grad = numbers(seed + 100 * t + i, *shapes[i])
            optimizer.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)  # batched products may add in another order


@given(
    seed=seeds,
    mars_type=st.sampled_from(TYPES),
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=4).map(tuple), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    size=st.integers(-12, 12),
    poison=st.sampled_from([None, None, torch.nan, torch.inf]),
    options=st.fixed_dictionaries(
        {
            "clip": st.sampled_from([None, 1.0, 1e-3]),
            "clip_scope": st.sampled_from(["tensor", "global"]),
            "matrix_view": st.sampled_from(["flatten", "batch"]),
            "decay_mode": st.sampled_from(["decoupled", "cautious", "l2"]),
            "optimize_1d": st.booleans(),
            "cautious": st.booleans(),
        }
    ),
)
def test_the_loop_and_the_lists_do_the_same_to_any_tensors(
    seed, mars_type, shapes, dtype, size, poison, options
):
    def trained(foreach):
        params = [torch.nn.Parameter(numbers(seed + i, *s).to(dtype)) for i, s in enumerate(shapes)]
        optimizer = MARS(
            [{"params": params[::2]}, {"params": params[1::2], "lr": 0.05, "weight_decay": 0.3}]
            if params[1:]
            else params,
            mars_type=mars_type,
            foreach=foreach,
            **options,
        )
        for t in range(2):
            for i, param in enumerate(params):
                param.grad = (2.0**size * numbers(seed + 100 * t + i, *shapes[i])).to(dtype)
            if poison is not None and t == 1 and params[-1].numel():
                params[-1].grad.view(-1)[0] = poison
            optimizer.step()
        return [p.detach() for p in params]

    # a few ulp of the working dtype, grown by up to 3.4445^5 = 485 in Newton-Schulz; half precision is
    # rounded once per step from float32, to the same number or its neighbour
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4}.get(dtype) or 4 * torch.finfo(dtype).eps
    for loop, lists in zip(trained(False), trained(True), strict=True):
        torch.testing.assert_close(lists, loop, rtol=tolerance, atol=tolerance, equal_nan=True)


@given(seed=seeds, mars_type=st.sampled_from(TYPES), decay=st.floats(0, 0.5))
def test_maximize_is_descent_on_negated_gradients(seed, mars_type, decay):
    start, grads = numbers(seed, 3, 4), gradients(seed, (3, 4))
    options = {"mars_type": mars_type, "weight_decay": decay}
    up = run(start, grads, maximize=True, **options)
    assert torch.equal(up, run(start, [-g for g in grads], **options))


@given(seed=seeds, size=st.floats(-8, 8), lr=st.floats(1e-4, 1.0), decay=st.floats(0.0, 0.9))
def test_lion_moves_every_entry_by_at_most_its_rate_and_decay(seed, size, lr, decay):
    start = numbers(seed, 3, 4)
    moved = run(start, [10.0**size * numbers(seed + 1, 3, 4)], mars_type="lion", lr=lr, weight_decay=decay)
    assert ((moved - start).abs() <= lr * (1 + decay * start.abs()) + 1e-15).all()


@given(seed=seeds, experts=st.integers(1, 4), mars_type=st.sampled_from(TYPES))
def test_batched_view_moves_an_expert_as_if_it_were_alone(seed, experts, mars_type):
    start, grads = numbers(seed, experts, 3, 4), gradients(seed, (experts, 3, 4))
    together = run(start, grads, mars_type=mars_type, matrix_view="batch")
    for i in range(experts):
        alone = run(start[i], [g[i] for g in grads], mars_type=mars_type)
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-12)


@given(seed=seeds, lr=st.floats(1e-3, 0.1), mars_type=elementwise)
def test_cautious_step_never_goes_against_the_gradient(seed, lr, mars_type):
    start, grads = numbers(seed, 3, 4), gradients(seed, (3, 4))
    before = run(start, grads[:-1], mars_type=mars_type, lr=lr, cautious=True)
    after = run(start, grads, mars_type=mars_type, lr=lr, cautious=True)
    assert ((before - after) * grads[-1] >= 0).all()


@given(seed=seeds, beta1=st.floats(0, 0.99), gamma=st.floats(0, 1))
def test_correction_and_quasi_hyperbolic_momentum_are_their_formulas(seed, beta1, gamma):
    g, h = numbers(seed, 3, 4), numbers(seed + 1, 3, 4)
    expected = g.numpy() + gamma * beta1 / (1 - beta1) * (g.numpy() - h.numpy())
    np.testing.assert_allclose(
        gradient_correction(g, h, beta1=beta1, gamma=gamma), expected, rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(
        quasi_hyperbolic(g, h, gamma), gamma * g.numpy() + (1 - gamma) * h.numpy(), rtol=0, atol=1e-14
    )
