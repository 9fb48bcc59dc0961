"""Softmax regression trained in the exact form by each of the ways to supply h_t."""

import torch

from mars_optim.torch import MARS

STEPS = 15
ROUNDING = 1e-12  # 15 steps of float64 arithmetic; the ways differ in the order of a few additions


class Softmax:
    """Softmax regression on fixed batches: the same data for every way."""

    def __init__(self, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.batches = [
            (
                torch.randn(8, 5, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (8,), generator=generator),
            )
            for _ in range(STEPS + 1)
        ]
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.params = [self.weight, self.bias]

    def loss(self, t):
        x, y = self.batches[t]
        return torch.nn.functional.cross_entropy(x @ self.weight.T + self.bias, y)

    def result(self):
        return [p.detach().numpy().copy() for p in self.params]


def optimizer_for(task, **changed):
    options = {
        "lr": 0.05,
        "lr_1d": 0.05,
        "betas": (0.9, 0.99),
        "gamma": 0.7,
        "clip": 0.3,
        "weight_decay": 0.1,
    }
    return MARS(task.params, is_approx=False, **{**options, **changed})


def way_1(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        with optimizer.at_previous_params():
            task.loss(t).backward()
        task.loss(t).backward()
        optimizer.step()


def way_2(task, optimizer):
    for t in range(STEPS):

        def closure(t=t):
            optimizer.zero_grad()
            loss = task.loss(t)
            loss.backward()
            return loss

        optimizer.step(closure)


def way_3_official_order(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        task.loss(t + 1).backward()
        optimizer.update_previous_grad()
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step()
        optimizer.update_last_grad()


def way_3_own_names(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        task.loss(t + 1).backward()
        optimizer.record_next_batch_grad()
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step()


def way_3_folded(task, optimizer):
    for t in range(STEPS):
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.fold()
        optimizer.zero_grad()
        task.loss(t + 1).backward()
        optimizer.step()


def way_4_sequence(task, optimizer):
    previous = None
    for t in range(STEPS):
        current = [p.detach().clone() for p in task.params]
        h = None if previous is None else gradients_at(task, t, previous)
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step(prev_grads=h)
        previous = current


def way_4_dict(task, optimizer):
    previous = None
    for t in range(STEPS):
        current = [p.detach().clone() for p in task.params]
        h = None if previous is None else {task.weight: gradients_at(task, t, previous)[0]}
        optimizer.zero_grad()
        task.loss(t).backward()
        optimizer.step(prev_grads=h)
        previous = current


def gradients_at(task, t, values):
    """Gradients of batch t at other parameters, by torch.func and so independently of the package."""
    x, y = task.batches[t]

    def loss(weight, bias):
        return torch.nn.functional.cross_entropy(x @ weight.T + bias, y)

    return list(torch.func.grad(loss, argnums=(0, 1))(*values))


WAYS = [way_2, way_3_official_order, way_3_own_names, way_3_folded, way_4_sequence, way_4_dict]


def run(way, **options):
    task = Softmax()
    way(task, optimizer_for(task, **options))
    return task.result()


def assert_state_equal(actual, expected):
    assert actual["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert actual["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            torch.testing.assert_close(actual["state"][key][name], value, rtol=0, atol=0)
