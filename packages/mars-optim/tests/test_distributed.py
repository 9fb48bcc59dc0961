"""MARS in two processes: each sees half of the batch, DistributedDataParallel averages the gradients."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mars_optim.torch import MARS

STEPS = 6
BATCH = 8  # of both processes together
LEARNING_RATE = {"adamw": 0.02, "lion": 0.003, "shampoo": 0.03, "m": 0.03, "sgd": 0.1}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3))
    return layers.double()


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.randn(BATCH, 2, 4, 4, dtype=torch.float64, generator=generator)
        yield images, torch.randint(3, (BATCH,), generator=generator)


def train(model, mars_type, is_approx, share, *, fresh_gradients):
    """Parameters after a few steps on one process's share of every batch.

    With fresh_gradients False they stay in the same memory, which with DDP's gradient_as_bucket_view is its
    communication buckets: each backward pass overwrites what an optimiser should have copied.
    """
    optimizer = MARS(
        model.parameters(),
        lr=LEARNING_RATE[mars_type],
        lr_1d=LEARNING_RATE[mars_type],
        mars_type=mars_type,
        gamma=0.1,
        is_approx=is_approx,
    )
    for images, labels in batches():

        def backward(images=images[share], labels=labels[share]):
            nn.functional.cross_entropy(model(images), labels).backward()

        optimizer.zero_grad(set_to_none=fresh_gradients)
        if not is_approx:
            with optimizer.at_previous_params():
                backward()
            optimizer.zero_grad(set_to_none=fresh_gradients)
        backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def train_on_one_of_two(rank, world_size, is_approx):
    share = slice(rank, BATCH, world_size)
    trained = {}
    for mars_type in LEARNING_RATE:
        model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
        trained[mars_type] = train(model, mars_type, is_approx, share, fresh_gradients=False)
    return trained


@pytest.mark.parametrize("is_approx", [True, False], ids=["approximate", "exact"])
def test_two_processes_equal_one_on_the_whole_batch_for_every_type(run_distributed, is_approx):
    # The limit is for a busy machine; the work takes a second.
    first, second = run_distributed(train_on_one_of_two, 2, is_approx, timeout=150)
    start = [parameter.detach() for parameter in network().parameters()]
    for mars_type in LEARNING_RATE:
        whole = train(network(), mars_type, is_approx, slice(0, BATCH), fresh_gradients=True)
        for before, expected, one, other in zip(
            start, whole, first[mars_type], second[mars_type], strict=True
        ):
            assert torch.equal(one, other)
            assert not torch.equal(expected, before)
            # float64: the mean over 8 samples is summed in another order, and 6 steps amplify that little
            torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-12)
