"""Numbers that no host reads: capturable steps, tensors as lr and beta1, and torch.compile of the step."""

import copy
from dataclasses import replace

import pytest
import torch
from fused_cases import KINDS, VARIANTS, Case, assert_agree, by_loop
from test_functional import BASE
from trajectories import TYPES, draw, run_mars, run_reference

from mars_optim.torch import MARS, mars

# counters and bias corrections are float64 tensors instead of Python numbers: a few roundings
ROUNDING = 1e-12


def model(seed=0, dtype=torch.float32):
    """Two matrices and a vector, with gradients that change at each call of the returned function."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 4), (4, 4), (5,))
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)

    def draw_gradients():
        for param in params:
            param.grad.copy_(torch.randn(param.shape, generator=generator))

    return params, draw_gradients


def trajectory(options, stepper, steps=4, schedule=None):
    """Parameters after some steps by `stepper(optimizer)`, which returns what is called at each step."""
    params, draw_gradients = model()
    optimizer = MARS(params, **options)
    step = stepper(optimizer)
    for t in range(steps):
        draw_gradients()
        if schedule is not None:
            schedule(optimizer, t)
        step()
    return [param.detach().clone() for param in params], optimizer


def eagerly(optimizer):
    return lambda: optimizer.step()


def compiled(optimizer):
    torch.compiler.reset()
    return torch.compile(lambda: optimizer.step(), fullgraph=True, backend="eager")


def assert_close(actual, expected, tolerance=2e-6):
    """Float32 results that differ in the order of a few operations on entries of order one."""
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("mars_type", TYPES)
def test_a_capturable_step_follows_the_reference(mars_type, foreach):
    options = replace(BASE, mars_type=mars_type)
    drawn = draw(seed=8, steps=5)
    actual = run_mars(drawn, options, capturable=True, foreach=foreach)
    for a, e in zip(actual, run_reference(drawn, options), strict=True):
        assert abs(a - e).max() < ROUNDING


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("foreach", [False, True])
def test_tensors_as_lr_beta1_and_decay_do_what_numbers_do(kind, variant, foreach):
    case = Case(kind=kind, options=VARIANTS[variant])
    numbers = {name: getattr(case.rule, name) for name in ("lr", "beta1", "decay")}
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    lists = replace(case, options={**case.options, **tensors, "capturable": True}).lists()
    divisors = mars(**lists, foreach=foreach)
    names = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")
    changed = {name: lists[name] for name in names} | {"divisors": divisors}
    expected = {name: value for name, value in by_loop(case).items() if name in changed}
    assert expected.keys() == changed.keys()
    assert_agree(changed, expected)


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}, {"capturable": True}], ids=str)
def test_a_scheduler_moves_a_tensor_lr_in_place(options):
    def schedule(optimizer, t):
        if t == 0:
            scheduler.append(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))
        else:
            scheduler[-1].step()

    results, scheduler = [], []
    for lr in (0.02, torch.tensor(0.02)):
        values, optimizer = trajectory({**options, "lr": lr}, eagerly, schedule=schedule)
        results.append(values)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.02 * 0.5**3)
    # the schedule rounds to float32
    assert_close(results[1], results[0])


def test_a_tensor_lr_sets_the_ratio_of_vectors_and_the_independent_decay():
    params, _ = model()
    optimizer = MARS(params, lr=torch.tensor(0.5), lr_1d=0.25, decay_mode="independent", weight_decay=0.1)
    group = optimizer.param_groups[0]
    assert group["lr_1d_ratio"] == 0.5
    assert group["construction_lr"] == 0.5
    assert isinstance(group["construction_lr"], float)


def test_capturable_counters_stay_where_the_parameters_are_after_loading():
    _, optimizer = trajectory({"capturable": True}, eagerly)
    params, _ = model()
    resumed = MARS(params, capturable=True)
    resumed.load_state_dict(optimizer.state_dict())
    for param in params:
        step = resumed.state[param]["step"]
        assert (step.device, step.dtype, step.item()) == (param.device, torch.float32, 4.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": torch.tensor([0.1, 0.2])}, r"lr must be a number or a floating .*, got shape \(2,\)"),
        ({"lr": torch.tensor(1)}, r"lr must be a number or a floating point tensor .* dtype torch.int64"),
        ({"lr": torch.tensor(-0.1)}, r"lr must be finite and >= 0, got -0.1"),
        ({"betas": (torch.tensor(1.0), 0.9)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "a tensor lr with foreach=True needs capturable=True"),
        (
            {"capturable": True, "mars_type": "shampoo", "orthogonalize": "svd"},
            "capturable=True needs orthogonalize=\"newton_schulz\", .* got 'svd'",
        ),
        ({"capturable": True, "steal_grad": True}, "must not be combined with steal_grad=True"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_numbers_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MARS([torch.nn.Parameter(torch.ones(2, 2))], **options)


def test_a_captured_stream_needs_capturable(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(2, 2)
    before = param.detach().clone()
    optimizer = MARS([param])
    with pytest.raises(RuntimeError, match="can only capture step\\(\\) with capturable=True"):
        optimizer.step()
    assert torch.equal(param, before)
    assert not optimizer.state[param]


COMPILED = {
    **{mars_type: {"mars_type": mars_type} for mars_type in TYPES},
    "no clip": {"clip": None},
    "global clip": {"clip_scope": "global"},
    "memory efficient": {"mars_type": "lion", "clip": None, "memory_efficient": True},
    "amsgrad": {"amsgrad": True},
    "cautious": {"cautious": True, "decay_mode": "cautious", "weight_decay": 0.1},
    "l2, maximize": {"decay_mode": "l2", "weight_decay": 0.1, "maximize": True},
    "from zero": {"prev_grad_init": "zero"},
    "one path": {"optimize_1d": True},
    "low precision h": {"prev_grad_dtype": torch.bfloat16},
    "loop": {"foreach": False},
}


def compare_compiled(_rank, _size, cases):
    """The cases whose compiled and eager steps differ; fullgraph=True raises at a graph break."""
    different = []
    for case in cases:
        options = {"lr": 0.02, **COMPILED[case]}
        (actual, optimizer), (expected, eager) = trajectory(options, compiled), trajectory(options, eagerly)
        alike = all(torch.allclose(a, e, rtol=2e-6, atol=2e-6) for a, e in zip(actual, expected, strict=True))
        if not alike or optimizer.stats()["clipped"] != eager.stats()["clipped"]:
            different.append(case)
    return different


def count_compilations():
    """Graphs compiled before each step while a tensor lr is scheduled, and both kinds of results."""

    def schedule(optimizer, t):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        optimizer.param_groups[0]["lr"].fill_(0.02 / (1 + t))

    results = []
    for stepper in (eagerly, compiled):
        torch._dynamo.utils.counters.clear()
        graphs = []
        values, _ = trajectory({"lr": torch.tensor(0.02)}, stepper, steps=6, schedule=schedule)
        results.append(values)
    return graphs, *results


def compare_and_count(rank, size, cases):
    """Both in one process, which imports the compiler once."""
    return compare_compiled(rank, size, cases), count_compilations()


def alternate(_rank, _size):
    """Parameters after compiled and eager steps in turn, and after eager ones."""

    def in_turn(optimizer):
        by_compiler, count = compiled(optimizer), []

        def step():
            count.append(None)
            (by_compiler if len(count) % 2 else optimizer.step)()

        return step

    return trajectory({}, in_turn)[0], trajectory({}, eagerly)[0]


def copy_compiled(_rank, _size):
    """A copy of an optimiser that was compiled takes a step."""
    _, optimizer = trajectory({}, compiled)
    twin = copy.deepcopy(optimizer)
    param = twin.param_groups[0]["params"][0]
    before = param.detach().clone()
    param.grad = torch.ones(6, 4)
    twin.step()
    return bool((param != before).all())


def step_by_inductor(_rank, _size):
    """Parameters after steps that Inductor compiled, and after eager ones."""
    torch.compiler.reset()
    by_inductor = trajectory({}, lambda opt: torch.compile(lambda: opt.step(), fullgraph=True))
    return by_inductor[0], trajectory({}, eagerly)[0]


# in processes of their own, where no runtime check of shapes stands between the compiler and the code


def test_a_compiled_step_is_one_graph_equals_the_eager_one_and_takes_scheduled_rates_as_it_is(
    run_distributed,
):
    ((different, counted),) = run_distributed(compare_and_count, 1, ["one path"], timeout=200)
    assert different == []
    graphs, actual, expected = counted
    # older torch compiles the second step anew, since the first one brought the state
    assert 0 == graphs[0] < graphs[2] == graphs[-1]
    assert_close(actual, expected)


@pytest.mark.slow  # a second or two of tracing per case
def test_every_option_compiles_without_graph_break(run_distributed):
    assert run_distributed(compare_compiled, 1, list(COMPILED), timeout=600) == [[]]


@pytest.mark.slow  # a process of its own, and seconds of tracing
def test_compiled_and_eager_steps_can_follow_each_other(run_distributed):
    assert_close(*run_distributed(alternate, 1, timeout=150)[0])


@pytest.mark.slow  # a process of its own, and seconds of tracing
def test_an_optimizer_that_was_compiled_can_be_copied(run_distributed):
    assert run_distributed(copy_compiled, 1, timeout=150) == [True]


@pytest.mark.slow  # Inductor compiles C++
def test_inductor_compiles_the_step(run_distributed):
    assert_close(*run_distributed(step_by_inductor, 1, timeout=300)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("mars_type", TYPES)
def test_a_cuda_graph_replays_the_step_of_the_optimizer(mars_type, backend):
    def run(captured):
        params, _ = model()
        params = [torch.nn.Parameter(param.detach().cuda()) for param in params]
        lr = torch.tensor(0.02, device="cuda")
        optimizer = MARS(params, lr=lr, mars_type=mars_type, capturable=True, **backend)
        for param in params:
            param.grad = torch.full_like(param, 0.1)
        optimizer.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        for t in range(3):
            for param in params:
                param.grad.mul_(-0.5)
            lr.fill_(0.01 * (t + 1))
            if captured:
                graph.replay()
            else:
                optimizer.step()
        return [param.detach().cpu() for param in params]

    # bfloat16 Newton-Schulz on both sides: the same kernels in the same order
    assert_close(run(True), run(False))
