"""What VarianceReduced shows its base when it works on whole lists: the plain formulas, tensor by tensor."""

import copy

import pytest
import torch
from wrapped import Recorder, assert_same_state

from mars_optim.torch.correction import clip_by_norm, gradient_correction
from mars_optim.torch.wrapper import VarianceReduced

SHAPES = ((6, 4), (3, 8), (), (7,), (0, 3), (2, 3, 2), (65, 33))
BETA1, GAMMA = 0.9, 0.1
# per element a handful of roundings of numbers of the size of the tensor's largest
ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6, torch.complex64: 1e-6, torch.bfloat16: 8e-3}


def drawn(dtypes, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def one(shape, dtype):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return (scale * torch.randn(shape, generator=generator, dtype=wide)).to(dtype)

    return [one(shape, dtype) for shape, dtype in zip(SHAPES, dtypes, strict=True)]


def formula(g, h, clip, norm=None):
    """The truth in the widest dtype, rounded to that of g at the end."""
    wide = torch.complex128 if g.is_complex() else torch.float64
    c = gradient_correction(g.to(wide), h.to(wide), beta1=BETA1, gamma=GAMMA)
    if clip is None:
        return c
    return clip_by_norm(c, clip) if norm is None else c / max(1.0, norm / clip)


def assert_close(actual, expected, dtype, at_least=0.0):
    size = expected.abs().max().item() if expected.numel() else 1.0
    assert actual.dtype == dtype
    atol = max(ROUNDING[dtype], at_least) * size
    torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("clip_scope", ["tensor", "global"])
@pytest.mark.parametrize("clip", [None, 2.0, 1e6])
@pytest.mark.parametrize(
    "dtypes",
    [
        [torch.float32] * 7,
        [torch.float64] * 7,
        [torch.bfloat16] * 7,
        [torch.complex64] * 7,
        [torch.float32, torch.bfloat16, torch.float64, torch.complex64] + [torch.float32] * 3,
    ],
    ids=["float32", "float64", "bfloat16", "complex64", "mixed"],
)
def test_lists_of_every_dtype_follow_the_plain_formula(dtypes, clip, clip_scope):
    params = [torch.nn.Parameter(torch.zeros(s, dtype=d)) for s, d in zip(SHAPES, dtypes, strict=True)]
    base = Recorder([{"params": params[:3]}, {"params": params[3:]}])
    optimizer = VarianceReduced(base, gamma=GAMMA, clip=clip, clip_scope=clip_scope)
    first, second = drawn(dtypes, seed=1), drawn(dtypes, seed=2)
    for gradients in (first, second):
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient.clone()
        optimizer.step()
    norm = None
    if clip_scope == "global":
        unclipped = [formula(g, h, None) for g, h in zip(second, first, strict=True)]
        norm = sum(c.abs().square().sum().item() for c in unclipped) ** 0.5
    # the common norm is no more accurate than that of its float32 tensors
    common = ROUNDING[torch.float32] if norm and torch.float32 in dtypes else 0.0
    for shown, g, h in zip(base.shown[1], second, first, strict=True):
        assert_close(shown, formula(g, h, clip, norm), g.dtype, common)
    for param, gradient in zip(params, second, strict=True):
        assert torch.equal(param.grad, gradient)
        assert torch.equal(optimizer.state[param]["last_grad"], gradient)
        assert optimizer.state[param]["step"] == 2


def test_groups_that_agree_share_a_list_and_others_do_not():
    params = [torch.nn.Parameter(torch.zeros(3, 3)) for _ in range(40)]
    optimizer = VarianceReduced(Recorder([{"params": [param]} for param in params]))
    for param in params:
        param.grad = torch.ones(3, 3)
    assert len(optimizer._lists()) == 1
    optimizer.param_groups[0]["clip"] = 2.0
    optimizer.param_groups[1]["gamma"] = 0.1
    optimizer.param_groups[2]["prev_grad_dtype"] = torch.bfloat16
    assert len(optimizer._lists()) == 4


@pytest.mark.parametrize("clip_scope", ["tensor", "global"])
@pytest.mark.parametrize("is_approx", [True, False])
def test_a_step_reads_nothing_back_from_the_device(is_approx, clip_scope):
    """Meta tensors hold no values, so reading one raises."""
    params = [torch.nn.Parameter(torch.zeros(s, device="meta")) for s in SHAPES]
    optimizer = VarianceReduced(Recorder(params), is_approx=is_approx, clip_scope=clip_scope)
    for _ in range(3):
        for param in params:
            param.grad = torch.empty_like(param)
        optimizer.step(prev_grads=None if is_approx else [torch.empty_like(p) for p in params])
    assert all(optimizer.state[param]["step"] == 3 for param in params)


class Tagged(torch.Tensor):
    """A subclass that list operations refuse."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if "_foreach" in getattr(func, "__name__", ""):
            raise TypeError("Tagged takes no list operations")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("clip_scope", ["tensor", "global"])
def test_unknown_subclasses_go_one_by_one_beside_plain_lists(clip_scope):
    def run(kind):
        params = [torch.nn.Parameter(torch.zeros(4, 3)) for _ in range(3)]
        base = Recorder(params)
        optimizer = VarianceReduced(base, gamma=GAMMA, clip=0.5, clip_scope=clip_scope)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            for i, param in enumerate(params):
                gradient = torch.randn(4, 3, generator=generator)
                param.grad = gradient.as_subclass(kind) if i == 1 else gradient
            optimizer.step()
        return [each.as_subclass(torch.Tensor) for each in base.shown[-1]]

    for actual, expected in zip(run(Tagged), run(torch.Tensor), strict=True):
        assert_close(actual, expected.double(), torch.float32)


def test_without_strength_an_infinite_last_gradient_does_no_harm():
    param = torch.nn.Parameter(torch.zeros(2))
    base = Recorder([param])
    optimizer = VarianceReduced(base, gamma=0.0, clip=None)
    for value in (torch.inf, 1.0):
        param.grad = torch.full((2,), value)
        optimizer.step()
    assert torch.equal(base.shown[-1][0], torch.ones(2))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o: o.state[o.param_groups[0]["params"][1]].update(last_grad=torch.ones(3)), "same shape"),
        (lambda o: o.param_groups[0].update(gamma=-1.0), "gamma must be"),
        (lambda o: setattr(o, "beta1", 1.0), "beta1 must be"),
    ],
    ids=["shape", "gamma", "beta1"],
)
def test_what_went_wrong_since_the_last_step_raises_before_anything_changes(spoil, message):
    params = [torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    optimizer = VarianceReduced(torch.optim.AdamW(params))
    for param in params:
        param.grad = torch.ones(2, 3)
    optimizer.step()
    spoil(optimizer)
    before, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert_same_state(optimizer.state_dict(), before)
    for param, value in zip(params, values, strict=True):
        assert torch.equal(param.detach(), value)
        assert torch.equal(param.grad, torch.ones(2, 3))
