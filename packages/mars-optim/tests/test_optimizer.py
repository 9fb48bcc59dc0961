"""Bad options, odd tensors and the methods of MARS that are neither exact form nor checkpoint."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from reference import Mars, Options
from trajectories import TYPES, assert_same, draw

from mars_optim.torch import MARS

ROUNDING = 1e-12  # a dozen float64 steps


def parameter(value, dtype=torch.float64):
    return torch.nn.Parameter(torch.as_tensor(value, dtype=dtype))


BAD_OPTIONS = [
    ({"lr": -0.1}, ValueError, "lr must be finite and >= 0, got -0.1"),
    ({"lr": math.nan}, ValueError, "lr must be finite and >= 0, got nan"),
    ({"lr": "0.1"}, TypeError, "lr must be a Python number, got .0.1."),
    ({"lr": 0.0}, ValueError, "lr must be > 0 unless lr_1d_ratio is given .*, got 0"),
    ({"lr_1d": -1.0}, ValueError, "lr_1d must be finite and >= 0, got -1.0"),
    ({"lr_1d_ratio": -1.0}, ValueError, "lr_1d_ratio must be finite and >= 0, got -1.0"),
    ({"eps": -1e-8}, ValueError, "eps must be finite and >= 0, got -1e-08"),
    ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ({"betas": (0.9, -0.1)}, ValueError, r"betas\[1\] must be in \[0, 1\), got -0.1"),
    ({"betas": (0.9,)}, ValueError, r"betas must be a pair \(beta1, beta2\), got \(0.9,\)"),
    ({"betas_1d": (0.9, 1.0)}, ValueError, r"betas_1d\[1\] must be in \[0, 1\), got 1.0"),
    ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and >= 0, got -1.0"),
    ({"weight_decay_1d": math.inf}, ValueError, "weight_decay_1d must be finite and >= 0, got inf"),
    ({"gamma": -0.1}, ValueError, "gamma must be finite and >= 0, got -0.1"),
    ({"gamma": math.inf}, ValueError, "gamma must be finite and >= 0, got inf"),
    ({"gamma": "0.1"}, TypeError, "gamma must be a Python number, got '0.1'"),
    ({"clip": 0.0}, ValueError, r"clip must be finite and > 0 \(None turns clipping off\), got 0.0"),
    ({"clip": -1.0}, ValueError, r"clip must be finite and > 0 \(None turns clipping off\), got -1.0"),
    (
        {"mars_type": "mars-adam"},
        ValueError,
        "mars_type must be one of 'mars-adamw', .*'sgd', got 'mars-adam'",
    ),
    ({"clip_scope": "group"}, ValueError, "clip_scope must be one of 'tensor', 'global', got 'group'"),
    ({"prev_grad_init": "one"}, ValueError, "prev_grad_init must be one of 'current', 'zero', got 'one'"),
    ({"matrix_ndim": 2}, ValueError, "matrix_ndim must be one of '>=2', '==2', got 2"),
    ({"matrix_view": "stack"}, ValueError, "matrix_view must be one of 'flatten', 'batch', got 'stack'"),
    ({"second_moment": "c"}, ValueError, "second_moment must be one of 'corrected', 'grad', got 'c'"),
    ({"decay_mode": "l1"}, ValueError, "decay_mode must be one of 'decoupled', .*'l2', got 'l1'"),
    (
        {"orthogonalize": "qr"},
        ValueError,
        "orthogonalize must be one of 'newton_schulz', .*'cubic', got 'qr'",
    ),
    ({"amsgrad": 1}, TypeError, "amsgrad must be True or False, got 1"),
    ({"is_approx": None}, TypeError, "is_approx must be True or False, got None"),
    ({"ns_steps": 0}, ValueError, "ns_steps must be an integer >= 1, got 0"),
    ({"ns_coefficients": (1.0, 2.0)}, ValueError, r"ns_coefficients must be three numbers, got \(1.0, 2.0\)"),
    ({"ns_coefficients": (1.0, 2.0, math.nan)}, ValueError, r"ns_coefficients\[2\] must be finite, got nan"),
    ({"ns_dtype": "bf16"}, TypeError, "ns_dtype must be None or a torch.dtype, got 'bf16'"),
    (
        {"state_dtype": torch.int8},
        ValueError,
        "state_dtype must be a real floating point dtype, got torch.int8",
    ),
    ({"prev_grad_dtype": torch.complex64}, ValueError, "prev_grad_dtype must be a real floating point dtype"),
    ({"scale": "max"}, ValueError, "scale must be None, a number or one of 'none', .*'rms', got 'max'"),
    ({"scale": -1.0}, ValueError, "scale must be finite and >= 0, got -1.0"),
    ({"preset": "paper"}, ValueError, "preset must be None or 'official', got 'paper'"),
    ({"foreach": "yes"}, TypeError, "foreach must be None, True or False, got 'yes'"),
    (
        {"decay_mode": "independent", "lr": 0.0, "lr_1d_ratio": 1.0},
        ValueError,
        'decay_mode="independent" .* needs lr > 0, got lr=0',
    ),
    (
        {"memory_efficient": True, "clip": None},
        ValueError,
        "memory_efficient=True needs a mars_type without second moment .*, got 'mars-adamw'",
    ),
    (
        {"memory_efficient": True, "mars_type": "lion"},
        ValueError,
        "memory_efficient=True needs clip=None, got clip=1.0",
    ),
    (
        {"memory_efficient": True, "mars_type": "lion", "clip": None, "is_approx": False},
        ValueError,
        "memory_efficient=True needs the approximate form, got is_approx=False",
    ),
    (
        {"memory_efficient": True, "mars_type": "lion", "clip": None, "gamma": 1.0},
        ValueError,
        'memory_efficient=True with prev_grad_init="current" needs gamma != 1 .*, got gamma=1.0',
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS, ids=lambda v: str(v)[:50])
def test_bad_option_raises_naming_rule_and_value(options, error, message):
    with pytest.raises(error, match=message):
        MARS([parameter([[1.0]])], **options)


@pytest.mark.parametrize("name", ["gamma", "clip", "mars_type", "betas"])
def test_bad_option_of_a_group_raises_too(name):
    bad = {"gamma": -1.0, "clip": 0.0, "mars_type": "x", "betas": (2.0, 0.0)}[name]
    with pytest.raises(ValueError, match=name):
        MARS([{"params": [parameter([[1.0]])], name: bad}])


def test_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="gama"):
        MARS.official([parameter([[1.0]])], gama=0.1)


def test_lr_zero_is_fine_with_a_ratio():
    optimizer = MARS([parameter([[1.0]]), parameter([1.0])], lr=0.0, lr_1d_ratio=0.5)
    assert optimizer.param_groups[0]["lr_1d_ratio"] == 0.5


@pytest.mark.parametrize("short", TYPES)
def test_type_names_work_with_and_without_prefix(short):
    drawn = draw(seed=41, shapes=((3, 4),), steps=3)
    results = []
    for name in (short, f"mars-{short}"):
        param = parameter(drawn[0][0])
        optimizer = MARS([param], mars_type=name)
        for (gradient,) in drawn[1]:
            param.grad = torch.tensor(gradient)
            optimizer.step()
        results.append(param.detach().numpy())
    assert_same([results[0]], [results[1]], rtol=0, atol=0)


def test_positional_prefix_is_that_of_the_release():
    param = parameter([[1.0]])
    optimizer = MARS(
        [param], 1e-2, (0.9, 0.95), 1e-6, 0.2, True, 0.1, False, "mars-lion", True, 2e-2, (0.8, 0.9), 0.3
    )
    group = optimizer.param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        1e-2,
        (0.9, 0.95),
        1e-6,
        0.2,
    )
    assert (group["amsgrad"], group["gamma"], group["is_approx"]) == (True, 0.1, False)
    assert (group["mars_type"], group["optimize_1d"]) == ("mars-lion", True)
    assert (group["lr_1d_ratio"], group["betas_1d"], group["weight_decay_1d"]) == (2.0, (0.8, 0.9), 0.3)


def test_large_gamma_in_the_approximate_form_warns_once():
    with pytest.warns(UserWarning, match="gamma=0.5 with is_approx=True adds noise") as caught:
        optimizer = MARS([parameter([[1.0]]), parameter([[2.0]])], gamma=0.5)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.ones_like(param)
        optimizer.step()
        MARS([parameter([[1.0]])], gamma=0.5, is_approx=False)
        MARS([parameter([[1.0]])], gamma=0.2)


def test_gamma_raised_later_warns():
    param = parameter([[1.0]])
    optimizer = MARS([param])
    optimizer.param_groups[0]["gamma"] = 0.3
    param.grad = torch.ones_like(param)
    with pytest.warns(UserWarning, match=r"gamma=0\.3"):
        optimizer.step()


@pytest.mark.parametrize(("name", "value"), [("betas", (1.0, 0.9)), ("gamma", -0.1)])
def test_bad_value_set_by_a_scheduler_raises_before_anything_changes(name, value):
    matrix, vector = parameter([[1.0]]), parameter([1.0])
    optimizer = MARS([{"params": [vector]}, {"params": [matrix]}])
    optimizer.param_groups[1][name] = value
    for param in (matrix, vector):
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert not optimizer.state
    assert vector.item() == matrix.item() == 1.0


def test_step_without_gradients_does_nothing():
    param = parameter([[1.0]])
    optimizer = MARS([param])
    assert optimizer.step() is None
    assert not optimizer.state
    assert optimizer.step(lambda: 3.0) == 3.0


@pytest.mark.parametrize("position", [0, 1])
def test_sparse_gradient_raises_before_anything_changes(position):
    params = [parameter(np.eye(3)), parameter(np.eye(3))]
    optimizer = MARS(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before, state = [p.detach().clone() for p in params], copy.deepcopy(optimizer.state_dict())
    params[position].grad = torch.eye(3).double().to_sparse()
    with pytest.raises(RuntimeError, match=r"dense gradients, got one of layout torch\.sparse_coo"):
        optimizer.step()
    for param, value in zip(params, before, strict=True):
        assert torch.equal(param, value)
    for index, entry in state["state"].items():
        for name, value in entry.items():
            assert torch.equal(optimizer.state_dict()["state"][index][name], value)


def test_skipped_parameter_keeps_its_state_and_step():
    params = [parameter([[1.0, 2.0]]), parameter([[3.0, 4.0]])]
    optimizer = MARS(params)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    kept = {name: value.clone() for name, value in optimizer.state[params[1]].items()}
    params[1].grad = None
    optimizer.step()
    assert all(torch.equal(optimizer.state[params[1]][name], value) for name, value in kept.items())
    assert [float(optimizer.state[p]["step"]) for p in params] == [2, 1]


@pytest.mark.parametrize("mars_type", TYPES)
@pytest.mark.parametrize("foreach", [False, True])
def test_odd_tensors_take_their_step(mars_type, foreach):
    """Empty, 0-d, transposed and channels_last tensors, and one that needs no gradient, beside the truth."""
    rng = np.random.default_rng(42)
    arrays = [rng.normal(size=s) for s in ((0, 3), (), (4, 6), (2, 3, 4, 4), (2, 2))]
    params = [parameter(a) for a in arrays]
    params[2] = torch.nn.Parameter(torch.tensor(arrays[2].T.copy()).T)
    params[3] = torch.nn.Parameter(torch.tensor(arrays[3]).to(memory_format=torch.channels_last))
    params[4].requires_grad_(False)
    assert not params[2].is_contiguous()
    optimizer = MARS(params, mars_type=mars_type, lr=0.05, lr_1d=0.05, gamma=0.1, foreach=foreach)
    truth, options = Mars(arrays[1:4]), Options(mars_type=mars_type, lr=0.05, gamma=0.1)
    for _ in range(4):
        gradients = [rng.normal(size=a.shape) for a in arrays]
        for param, gradient in zip(params[:4], gradients[:4], strict=True):
            param.grad = torch.tensor(gradient)
        optimizer.step()
        # mars-m decays by 0.1 unless told otherwise
        decay = 0.1 if mars_type == "m" else 0.0
        truth.step(gradients[1:4], Options(**{**vars(options), "weight_decay": decay}))
    actual = [p.detach().numpy() for p in params]
    assert_same(actual[1:4], truth.parameters, rtol=0, atol=ROUNDING)
    assert_same(actual[4:], arrays[4:], rtol=0, atol=0)
    assert params[3].is_contiguous(memory_format=torch.channels_last)


def test_tied_parameters_move_once():
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    optimizer = MARS(torch.nn.Sequential(embedding, head).parameters())
    head(embedding(torch.arange(5))).square().sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1
    assert float(optimizer.state[head.weight]["step"]) == 1


@pytest.mark.parametrize("is_approx", [True, False])
@pytest.mark.parametrize("mars_type", ["adamw", "lion", "sgd"])
def test_complex_parameters_move_as_pairs_of_reals(mars_type, is_approx):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 4, dtype=torch.complex64, generator=generator)
    pair, single = torch.nn.Parameter(torch.view_as_real(value).clone()), torch.nn.Parameter(value.clone())
    optimizers = [
        MARS([p], mars_type=mars_type, gamma=0.1, weight_decay=0.1, is_approx=is_approx, lr=0.05)
        for p in (pair, single)
    ]
    for _ in range(4):
        g, h = (torch.randn(3, 4, dtype=torch.complex64, generator=generator) for _ in range(2))
        pair.grad, single.grad = torch.view_as_real(g).clone(), g.clone()
        optimizers[0].step(prev_grads=None if is_approx else [torch.view_as_real(h).clone()])
        optimizers[1].step(prev_grads=None if is_approx else [h])
    # the norm of the pair may add in another order: float32
    torch.testing.assert_close(torch.view_as_real(single.detach()), pair.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["newton_schulz", "svd"])
def test_complex_matrices_are_orthogonalised_as_complex_ones(method):
    value = torch.randn(3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    param = torch.nn.Parameter(torch.zeros_like(value))
    optimizer = MARS([param], mars_type="shampoo", orthogonalize=method, lr=1.0)
    param.grad = value.clone()
    optimizer.step()
    step = -param.detach()
    u, _, vh = torch.linalg.svd(value, full_matrices=False)
    kept = u.mH @ step @ vh.mH  # diagonal in the singular basis of the gradient
    off = kept - torch.diag(kept.diagonal())
    torch.testing.assert_close(off, torch.zeros_like(off), rtol=0, atol=1e-12)
    if method == "svd":
        torch.testing.assert_close(kept, torch.eye(3, dtype=kept.dtype), rtol=0, atol=1e-12)


def test_complex_batches_are_clipped_slice_by_slice():
    param = torch.nn.Parameter(torch.zeros(2, 3, 4, dtype=torch.complex128))
    optimizer = MARS([param], mars_type="sgd", lr=1.0, matrix_view="batch", betas=(0.0, 0.0))
    param.grad = torch.randn(2, 3, 4, dtype=torch.complex128, generator=torch.Generator().manual_seed(2))
    param.grad[1] *= 0.01
    gradient = param.grad.clone()
    optimizer.step()
    torch.testing.assert_close(param.detach()[0], -gradient[0] / gradient[0].norm(), rtol=1e-12, atol=0)
    torch.testing.assert_close(param.detach()[1], -gradient[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("clip", [1.0, None])
@pytest.mark.parametrize("mars_type", TYPES)
def test_nan_gradients_propagate(mars_type, clip, foreach):
    param = parameter(np.ones((3, 2)))
    optimizer = MARS([param], mars_type=mars_type, clip=clip, foreach=foreach)
    param.grad = torch.ones_like(param)
    param.grad[0, 0] = torch.nan
    optimizer.step()
    assert torch.isnan(param[0, 0])
    if clip is not None:
        assert torch.isnan(param).all()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("value", [torch.inf, 1e38])
def test_infinite_norm_gives_nan_and_not_a_silent_zero_step(value, foreach):
    param = parameter(np.ones((3, 2)), dtype=torch.float32)
    optimizer = MARS([param], mars_type="sgd", foreach=foreach)
    param.grad = torch.full_like(param, value)  # the norm of 1e38 overflows float32
    optimizer.step()
    assert torch.isnan(param).all()


def test_global_scope_clips_by_the_norm_over_groups_and_dtypes():
    first, second = parameter([[3.0, 0.0]]), parameter([[0.0, 4.0]], dtype=torch.float32)
    vector = parameter([100.0])
    optimizer = MARS(
        [{"params": [first, vector]}, {"params": [second]}],
        mars_type="sgd",
        lr=1.0,
        betas=(0.0, 0.0),
        clip_scope="global",
    )
    for param in (first, second, vector):
        param.grad = param.detach().clone()
    optimizer.step()
    # the vector is under plain AdamW and does not count: the norm is 5
    # and one of its parts is a float32 number
    torch.testing.assert_close(first.detach(), torch.tensor([[3.0 - 0.6, 0.0]]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(second.detach(), torch.tensor([[0.0, 4.0 - 0.8]]), rtol=1e-6, atol=0)


def test_reset_correction_takes_the_plain_gradient_once():
    drawn = draw(seed=43, shapes=((3, 4),), steps=4)
    moved = []
    for reset in (False, True):
        param = parameter(drawn[0][0])
        optimizer = MARS([param], mars_type="sgd", gamma=0.1, betas=(0.9, 0.9), clip=None, lr=0.1)
        for t, (gradient,) in enumerate(drawn[1]):
            if t == 2 and reset:
                optimizer.reset_correction()
            param.grad = torch.tensor(gradient)
            before = optimizer.state[param]["exp_avg"].clone() if t else 0.0
            optimizer.step()
            c = (optimizer.state[param]["exp_avg"] - 0.9 * before) / 0.1
            if t >= 2:
                moved.append((reset, t, c.numpy(), gradient, drawn[1][t - 1][0]))
    for reset, t, c, g, last in moved:
        expected = g if reset and t == 2 else g + 0.1 * 9 * (g - last)
        np.testing.assert_allclose(c, expected, rtol=0, atol=ROUNDING)


def test_reset_correction_needs_a_buffer_to_forget():
    optimizer = MARS([parameter([[1.0]])], mars_type="sgd", clip=None, memory_efficient=True)
    with pytest.raises(RuntimeError, match="memory_efficient=True does not keep"):
        optimizer.reset_correction()


def test_stats_report_the_last_step():
    small, large = parameter(np.zeros((2, 2))), parameter(np.zeros((2, 2)))
    optimizer = MARS([small, large], gamma=0.1, betas=(0.9, 0.99))
    assert optimizer.stats()["clipped"] == 0.0
    assert math.isnan(optimizer.stats()["correction_ratio"])
    for scale in (1.0, 1.5):
        small.grad = torch.full_like(small, 0.1 * scale)
        large.grad = torch.full_like(large, 10.0 * scale)
        optimizer.step()
    stats = optimizer.stats()
    assert stats["clipped"] == 0.5
    # a (g - h) = 0.9 * 0.5 h against g = 1.5 h
    assert stats["correction_ratio"] == pytest.approx(0.9 * 0.5 / 1.5, rel=1e-12)


def test_step_does_not_change_the_gradients():
    for foreach in (False, True):
        for options in (
            {},
            {"maximize": True},
            {"cautious": True},
            {"decay_mode": "l2", "weight_decay": 0.1},
        ):
            params = [parameter(np.ones((3, 2))), parameter(np.ones(4))]
            optimizer = MARS(params, foreach=foreach, **options)
            for _ in range(2):
                for param in params:
                    param.grad = torch.full_like(param, 5.0)
                optimizer.step()
                assert all((param.grad == 5.0).all() for param in params)


def test_float16_gradients_do_not_overflow_in_the_correction():
    param = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.float16))
    optimizer = MARS([param], mars_type="sgd", gamma=0.1, lr=1.0)
    for value in (-50000.0, 50000.0):
        param.grad = torch.full_like(param, value)
        optimizer.step()
    assert torch.isfinite(param).all()


def test_repr_and_defaults_survive():
    optimizer = MARS([parameter([[1.0]])])
    assert "mars-adamw" in repr(optimizer)
    assert optimizer.defaults["betas"] == (0.95, 0.99)
