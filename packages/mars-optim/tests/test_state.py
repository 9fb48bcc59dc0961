"""Checkpoints, ownership of the previous gradient, dtypes of the state, and what a step leaves alone."""

import copy
import io
import pickle

import pytest
import reference
import torch
from trajectories import TYPES, draw

from mars_optim.torch import MARS

SHAPES = ((6, 4), (3, 8), (5,))


def build(mars_type="adamw", dtype=torch.float32, **changed):
    drawn = draw(seed=21, shapes=SHAPES, steps=1)
    params = [torch.nn.Parameter(torch.tensor(x, dtype=dtype)) for x in drawn[0]]
    return params, MARS(params, mars_type=mars_type, lr=0.05, gamma=0.1, **changed)


def advance(params, optimizer, first, last):
    """Steps first..last-1 with gradients that depend on the parameters and the step."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        noise = [torch.randn(p.shape, generator=generator).to(p.dtype) for p in params]
        if optimizer.param_groups[0]["is_approx"]:
            optimizer.zero_grad()
        else:
            optimizer.zero_grad()
            with optimizer.at_previous_params():
                sum((p * n).sum() + (p**4).sum() for p, n in zip(params, noise, strict=True)).backward()
        sum((p * n).sum() + (p**4).sum() for p, n in zip(params, noise, strict=True)).backward()
        optimizer.step()


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


TRANSPORTS = {
    "torch.save": through_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda state: pickle.loads(pickle.dumps(state)),  # noqa: S301
    "as it is": lambda state: state,
}
VARIANTS = {
    "approx": {},
    "exact": {"is_approx": False},
    "exact l2": {"is_approx": False, "decay_mode": "l2", "weight_decay": 0.1},
    "bf16 buffers": {"prev_grad_dtype": torch.bfloat16, "state_dtype": torch.bfloat16},
    "official": {"preset": "official"},
}


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(variant, transport):
    whole, optimizer = build(**VARIANTS[variant])
    advance(whole, optimizer, 0, 9)
    params, optimizer = build(**VARIANTS[variant])
    advance(params, optimizer, 0, 5)
    saved = TRANSPORTS[transport](optimizer.state_dict())
    resumed, other = build(**VARIANTS[variant])
    for target, source in zip(resumed, params, strict=True):
        target.data.copy_(source.data)
    other.load_state_dict(saved)
    advance(resumed, other, 5, 9)
    for actual, expected in zip(resumed, whole, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("mars_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_type_resumes_bit_for_bit(mars_type, dtype):
    whole, optimizer = build(mars_type, dtype)
    advance(whole, optimizer, 0, 6)
    params, optimizer = build(mars_type, dtype)
    advance(params, optimizer, 0, 3)
    resumed, other = build(mars_type, dtype)
    for target, source in zip(resumed, params, strict=True):
        target.data.copy_(source.data)
    other.load_state_dict(through_file(optimizer.state_dict()))
    advance(resumed, other, 3, 6)
    for actual, expected in zip(resumed, whole, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
def test_copied_model_and_optimizer_continue_alike(copier):
    params, optimizer = build(preset="official")
    advance(params, optimizer, 0, 3)
    other_params, other = copier((params, optimizer))
    advance(params, optimizer, 3, 6)
    advance(other_params, other, 3, 6)
    for actual, expected in zip(other_params, params, strict=True):
        assert torch.equal(actual, expected)
    added = torch.nn.Parameter(torch.zeros(3))
    other.add_param_group({"params": [added], "weight_decay": 0.0})
    assert other.param_groups[-1]["weight_decay_1d"] == 0.1  # the preset has come along


def test_loaded_state_shares_no_memory_with_the_checkpoint():
    params, optimizer = build()
    advance(params, optimizer, 0, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    fresh, other = build()
    other.load_state_dict(saved)
    advance(fresh, other, 2, 4)
    for index, entry in before["state"].items():
        for name, value in entry.items():
            assert torch.equal(saved["state"][index][name], value), name


def official_checkpoint(exact):
    """A checkpoint in the release's layout: integer steps, nine group keys, both moments for every tensor."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for index, shape in enumerate(SHAPES):
        state[index] = {
            "step": 7,
            "exp_avg": 0.1 * torch.randn(shape, generator=generator),
            "exp_avg_sq": torch.rand(shape, generator=generator),
            "last_grad": torch.randn(shape, generator=generator),
        }
        if exact:
            state[index]["previous_grad"] = state[index]["last_grad"].clone()
    group = {
        "lr": 0.02,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "amsgrad": False,
        "mars_type": "mars-adamw",
        "gamma": 0.05,
        "optimize_1d": False,
        "weight_decay_1d": 0.1,
        "params": [0, 1, 2],
    }
    return {"state": state, "param_groups": [group]}


@pytest.mark.parametrize("exact", [False, True])
def test_official_checkpoint_loads_with_one_warning_and_steps_on(exact):
    params, optimizer = build(is_approx=not exact, preset="official")
    checkpoint = official_checkpoint(exact)
    with pytest.warns(UserWarning, match="lacks the options algorithm, betas_1d.*lr_1d_ratio") as caught:
        optimizer.load_state_dict(checkpoint)
    assert len(caught) == 1
    start = [p.detach().double().clone() for p in params]
    grads = [torch.full_like(p, 0.01) for p in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    optimizer.step()
    saved = checkpoint["state"][0]
    a = 0.05 * 0.9 / (1 - 0.9)
    c = 0.01 + a * (0.01 - saved["last_grad"].double())
    c = c / max(1.0, c.norm())
    m = 0.9 * saved["exp_avg"].double() + 0.1 * c
    v = 0.95 * saved["exp_avg_sq"].double() + 0.05 * c**2
    u = m / (1 - 0.9**8) / ((v / (1 - 0.95**8)).sqrt() + 1e-8)
    expected = start[0] - 0.02 * (u + 0.01 * start[0])
    torch.testing.assert_close(params[0].detach().double(), expected, rtol=0, atol=1e-6)  # float32
    assert optimizer.state[params[0]]["step"].dtype == torch.float32
    if exact:
        with pytest.raises(RuntimeError, match="the exact form"):
            optimizer.step()  # previous_grad had become last_grad already, and that is used up


@pytest.mark.parametrize("mars_type", ["lion", "shampoo"])
def test_official_checkpoints_of_types_without_second_moment_step_on(mars_type):
    """The release allocates both moments whatever the type."""
    checkpoint = official_checkpoint(exact=False)
    checkpoint["param_groups"][0]["mars_type"] = f"mars-{mars_type}"
    params, optimizer = build(mars_type, preset="official", ns_dtype=torch.float32)
    with pytest.warns(UserWarning, match="lacks the options"):
        optimizer.load_state_dict(checkpoint)
    start, saved = params[0].detach().double().clone(), checkpoint["state"][0]
    for param in params:
        param.grad = torch.full_like(param, 0.01)
    optimizer.step()
    c = 0.01 + 0.05 * 0.9 / (1 - 0.9) * (0.01 - saved["last_grad"].double())
    m = 0.9 * saved["exp_avg"].double() + 0.1 * c / max(1.0, c.norm())
    factor = reference.newton_schulz(m.numpy() / (1 - 0.9), eps=1e-8) * (6 / 4) ** 0.5
    u = m.sign() if mars_type == "lion" else torch.tensor(factor)
    # float32, and Newton-Schulz amplifies its rounding by up to 3.4 a step
    torch.testing.assert_close(
        params[0].detach().double(), start - 0.02 * (u + 0.01 * start), rtol=0, atol=1e-5
    )
    assert float(optimizer.state[params[0]]["step"]) == 8


def test_exact_checkpoint_between_record_and_step_keeps_the_recorded_gradient():
    def until_recorded(params, optimizer):
        for value in (1.0, 2.0):
            for p in params:
                p.grad = torch.full_like(p, value)
            optimizer.record_next_batch_grad()
            for p in params:
                p.grad = torch.full_like(p, value / 2)
            optimizer.step()
        for p in params:
            p.grad = torch.full_like(p, 3.0)
        optimizer.record_next_batch_grad()

    def finish(params, optimizer):
        for _ in range(2):
            for p in params:
                p.grad = torch.full_like(p, 0.25)
            optimizer.step()

    whole, optimizer = build(is_approx=False)
    until_recorded(whole, optimizer)
    saved = through_file(optimizer.state_dict())
    resumed, other = build(is_approx=False)
    for target, source in zip(resumed, whole, strict=True):
        target.data.copy_(source.data)
    other.load_state_dict(saved)
    finish(whole, optimizer)
    finish(resumed, other)
    for actual, expected in zip(resumed, whole, strict=True):
        assert torch.equal(actual, expected)


def test_state_holds_only_what_the_type_needs():
    needed = {
        "adamw": {"step", "exp_avg", "exp_avg_sq", "last_grad"},
        "lion": {"step", "exp_avg", "last_grad"},
        "shampoo": {"step", "exp_avg", "last_grad"},
        "m": {"step", "exp_avg", "last_grad"},
        "sgd": {"step", "exp_avg", "last_grad"},
    }
    for mars_type, names in needed.items():
        params, optimizer = build(mars_type)
        advance(params, optimizer, 0, 2)
        assert optimizer.state[params[0]].keys() == names
        assert optimizer.state[params[2]].keys() == {"step", "exp_avg", "exp_avg_sq"}  # plain AdamW
    params, optimizer = build("adamw", amsgrad=True)
    advance(params, optimizer, 0, 2)
    assert "max_exp_avg_sq" in optimizer.state[params[0]]


def test_exact_form_with_a_given_reference_keeps_no_gradient():
    params, optimizer = build("lion", is_approx=False)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step(prev_grads=[p.grad.clone() for p in params])
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg"}


def test_exact_form_at_the_previous_parameters_keeps_them_and_no_gradient():
    params, optimizer = build("adamw", is_approx=False)
    advance(params, optimizer, 0, 3)
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq", "prev_param"}
    assert "last_grad" not in optimizer.state[params[2]]


def test_steps_are_counted_by_scalars_on_the_cpu():
    params, optimizer = build("adamw", dtype=torch.float64)
    advance(params, optimizer, 0, 3)
    for param in params:
        step = optimizer.state[param]["step"]
        assert (step.shape, step.dtype, step.device.type, float(step)) == ((), torch.float32, "cpu", 3.0)


@pytest.mark.parametrize("mars_type", TYPES)
def test_a_step_that_the_scaler_skips_leaves_parameters_and_state_untouched(mars_type):
    params, optimizer = build(mars_type)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for t in range(4):
        optimizer.zero_grad()
        before = [p.detach().clone() for p in params]
        state = copy.deepcopy(optimizer.state_dict()["state"])
        scaler.scale(sum((p**4).sum() for p in params)).backward()
        if t == 2:
            params[1].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        stood_still = [torch.equal(p, x) for p, x in zip(params, before, strict=True)]
        assert stood_still == [t == 2] * len(params)
        if t == 2:
            torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "dtypes"),
    [
        ({}, {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "last_grad": torch.bfloat16}),
        ({"state_dtype": torch.bfloat16}, {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.bfloat16}),
        ({"prev_grad_dtype": torch.float32}, {"last_grad": torch.float32}),
    ],
)
def test_half_precision_parameters_keep_the_asked_state_dtypes(options, dtypes):
    params, optimizer = build(dtype=torch.bfloat16, **options)
    advance(params, optimizer, 0, 2)
    state = optimizer.state[params[0]]
    assert {name: state[name].dtype for name in dtypes} == dtypes
    assert state["step"].dtype == torch.float32
    assert params[0].dtype == torch.bfloat16


def test_bf16_parameters_move_as_float32_ones_up_to_rounding_of_the_parameter():
    half, optimizer = build(dtype=torch.bfloat16)
    single, other = build(dtype=torch.bfloat16)
    for p in single:
        p.data = p.data.float()
    for p, q in zip(half, single, strict=True):
        p.grad = torch.linspace(-1, 1, p.numel()).reshape(p.shape).to(torch.bfloat16)
        q.grad = p.grad.float()
    optimizer.step()
    other.step()
    for p, q in zip(half, single, strict=True):
        assert torch.equal(p, q.to(torch.bfloat16))


def test_bf16_previous_gradient_changes_the_trajectory_by_its_rounding_only():
    exact, optimizer = build(dtype=torch.float64)
    rounded, other = build(dtype=torch.float64, prev_grad_dtype=torch.bfloat16)
    advance(exact, optimizer, 0, 4)
    advance(rounded, other, 0, 4)
    differences = [(p - q).abs().max() for p, q in zip(exact[:2], rounded[:2], strict=True)]
    assert all(0 < d < 0.02 for d in differences)  # 2^-8 of gradients, through 4 steps of lr 0.05


def fill(kind, params, values):
    """Put gradients where a training loop of this kind puts them."""
    for param, value in zip(params, values, strict=True):
        if kind == "fresh":
            param.grad = value.clone()
        elif kind == "in place":
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad.zero_().add_(value)
        else:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            else:
                param.grad.zero_()
            param.grad.add_(value / 2).add_(value / 2)


@pytest.mark.parametrize("kind", ["in place", "accumulated"])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("mars_type", ["adamw", "sgd"])
def test_gradient_memory_that_is_used_again_changes_nothing(mars_type, foreach, kind):
    results = []
    for way in ("fresh", kind):
        params, optimizer = build(mars_type, dtype=torch.float64, foreach=foreach)
        for t in range(6):
            generator = torch.Generator().manual_seed(t)
            fill(way, params, [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params])
            optimizer.step()
            optimizer.zero_grad(set_to_none=way == "fresh")
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_ddp_bucket_views_change_nothing(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        results = []
        for wrapped in (True, False):
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
            net = (
                torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
                if wrapped
                else model
            )
            for is_approx in (True, False):
                optimizer = MARS(model.parameters(), gamma=0.1, lr=0.05, is_approx=is_approx)
                for t in range(6):
                    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(t))
                    optimizer.zero_grad(set_to_none=not wrapped)
                    if not is_approx:
                        with optimizer.at_previous_params():
                            net(x).square().mean().backward()
                    net(x).square().mean().backward()
                    optimizer.step()
            results.append([p.detach().clone() for p in model.parameters()])
        for p, q in zip(*results, strict=True):
            assert torch.equal(p, q)
    finally:
        torch.distributed.destroy_process_group()


def test_last_grad_is_a_copy():
    params, optimizer = build()
    advance(params, optimizer, 0, 1)
    for p in params:
        last = optimizer.state[p].get("last_grad")
        assert last is None or last.data_ptr() != p.grad.data_ptr()
