"""`steal_grad`: the gradient itself becomes the previous gradient, without a copy."""

import pytest
import torch
from trajectories import TYPES, draw

from mars_optim.torch import MARS


def run(backend, mars_type, *, steal, **options):
    """Parameters after five steps, and the optimiser."""
    parameters, gradients, _ = draw(seed=12, steps=5)
    params = [torch.nn.Parameter(torch.tensor(x)) for x in parameters]
    optimizer = MARS(params, lr=0.02, mars_type=mars_type, steal_grad=steal, **backend, **options)
    for step in gradients:
        for param, gradient in zip(params, step, strict=True):
            param.grad = torch.tensor(gradient)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{}, {"clip": None}, {"maximize": True}, {"optimize_1d": True}], ids=str)
@pytest.mark.parametrize("backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("mars_type", TYPES)
def test_stealing_changes_no_trajectory(mars_type, backend, options):
    copied, _ = run(backend, mars_type, steal=False, **options)
    stolen, _ = run(backend, mars_type, steal=True, **options)
    for a, e in zip(stolen, copied, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", [{"foreach": True}, {"fused": True}], ids=str)
def test_a_stolen_gradient_is_the_state_and_no_longer_the_gradient(backend):
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = MARS([matrix, vector], steal_grad=True, **backend)
    for _ in range(2):
        matrix.grad, vector.grad = torch.ones(2, 2), torch.ones(2)
        gradient = matrix.grad
        optimizer.step()
        assert optimizer.state[matrix]["last_grad"] is gradient
        assert matrix.grad is None
        assert vector.grad is not None  # plain AdamW keeps no gradient


def test_accumulation_after_a_theft_starts_from_nothing():
    param = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = MARS([param], steal_grad=True)
    for _ in range(2):
        (3 * param).sum().backward()
        optimizer.step()
    assert torch.equal(optimizer.state[param]["last_grad"], torch.full((2, 2), 3.0))


def of_a_bucket():
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.grad = torch.ones(8)[:4].view(2, 2)
    return param


def tracked():
    param = torch.nn.Parameter(torch.ones(2, 2))
    param.square().sum().backward(create_graph=True)
    return param


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    ("make", "message"), [(of_a_bucket, "part of a larger memory"), (tracked, "that autograd tracks")]
)
def test_gradients_that_belong_to_others_are_not_taken(make, message):
    param, own = make(), torch.nn.Parameter(torch.ones(3, 3))
    own.grad = torch.ones(3, 3)
    optimizer = MARS([own, param], steal_grad=True)
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert torch.equal(own, torch.ones(3, 3))
    assert own.grad is not None
    param.grad = None  # the graph of a gradient holds its parameter


def test_buckets_of_ddp_are_recognised(run_distributed):
    assert run_distributed(ddp_refuses, 2) == ["refused", "refused"]


def ddp_refuses(_rank, _size):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4), gradient_as_bucket_view=True)
    optimizer = MARS(model.parameters(), steal_grad=True)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="gradient_as_bucket_view=True"):
        optimizer.step()
    return "refused"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_approx": False}, "needs the approximate form, got is_approx=False"),
        (
            {"prev_grad_dtype": torch.bfloat16},
            "needs prev_grad_dtype=None, got .*=torch.bfloat16",
        ),
    ],
    ids=["exact", "another dtype"],
)
def test_options_that_keep_no_such_gradient_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MARS([torch.nn.Parameter(torch.ones(2, 2))], steal_grad=True, **options)
