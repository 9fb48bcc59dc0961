"""MARS in two processes: each sees half of the batch, DistributedDataParallel averages the gradients."""

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


FORMS = [(mars_type, is_approx) for mars_type in LEARNING_RATE for is_approx in (True, False)]


def train_on_one_of_two(rank, world_size):
    share = slice(rank, BATCH, world_size)
    trained = {}
    for form in FORMS:
        model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
        trained[form] = train(model, *form, share, fresh_gradients=False)
    return trained


def test_two_processes_equal_one_on_the_whole_batch_for_every_type_and_form(run_distributed):
    # The limit is for a busy machine; the work takes a second.
    first, second = run_distributed(train_on_one_of_two, 2, timeout=150)
    start = [parameter.detach() for parameter in network().parameters()]
    for form in FORMS:
        whole = train(network(), *form, slice(0, BATCH), fresh_gradients=True)
        for before, expected, one, other in zip(start, whole, first[form], second[form], strict=True):
            assert torch.equal(one, other)
            assert not torch.equal(expected, before)
            # float64: the mean over 8 samples is summed in another order, and 6 steps amplify that little
            torch.testing.assert_close(one, expected, rtol=1e-11, atol=1e-12)
