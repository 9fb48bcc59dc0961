"""The networks of the experiments: every step is that of autograd, and one network a core changes nothing."""

import threading
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tenfold_tools.claims", reason="the experiments run in the monorepo's workshop")
torch = pytest.importorskip("torch", reason="the experiments train networks in torch")

from mup_features import Parametrization  # noqa: E402
from tenfold_tools.claims_runner import load_experiments  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
N, DIM, OUTPUTS, WIDTH, DEPTH, LR, STEPS = 6, 5, 3, 40, 3, 0.5, 10


@pytest.fixture(scope="module")
def networks():
    """networks.py, loaded as the runner would."""
    return load_experiments(EXPERIMENTS / "networks.py", "mup_features_networks")


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N, DIM))
    return X / np.linalg.norm(X, axis=1, keepdims=True), rng.standard_normal((N, OUTPUTS))


@pytest.fixture
def two_threads():
    """Torch with two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def by_autograd(scheme, X, Y, seed, reduction):
    """What each step holds: h and x of the last layer, outputs, loss, ||readout gradient||^2 / n."""
    table, sizes = Parametrization(scheme), [DIM, *[WIDTH] * DEPTH, OUTPUTS]
    weights = []
    for layer, variance in enumerate(table.variances(WIDTH, DEPTH)):
        generator = torch.Generator().manual_seed(1000 * seed + layer)
        draws = torch.randn(sizes[layer + 1], sizes[layer], dtype=torch.float64, generator=generator)
        weights.append((variance**0.5 * draws).requires_grad_())
    for step in range(STEPS + 1):
        x = torch.as_tensor(X)
        for weight in weights[:-1]:
            h = x @ weight.T
            x = torch.tanh(h)
        f = x @ weights[-1].T
        loss = 0.5 * ((f - torch.as_tensor(Y)) ** 2).sum() / (N if reduction == "mean" else 1)
        gradients = torch.autograd.grad(loss, weights)
        yield [part.detach().numpy() for part in (h, x, f, loss, (gradients[-1] ** 2).sum() / WIDTH)]
        with torch.no_grad():
            rates = table.rates(WIDTH, DEPTH, LR, step=step)
            for weight, gradient, rate in zip(weights, gradients, rates, strict=True):
                weight -= rate * gradient


# The first step of ip_llr has rates of its own.
@pytest.mark.parametrize("scheme", ["mup", "sp", "ip_llr"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_every_step_is_that_of_autograd(networks, data, scheme, reduction):
    made = networks.train(scheme, WIDTH, *data, depth=DEPTH, lr=LR, steps=STEPS, seed=7, reduction=reduction)
    for moment, expected in zip(made, by_autograd(scheme, *data, 7, reduction), strict=True):
        found = moment.h[-1], moment.x[-1], moment.f, moment.loss, moment.readout_grad_sq
        for ours, theirs in zip(found, expected, strict=True):
            # ten steps of sums in another order
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12 * np.abs(theirs).max())


def test_networks_side_by_side_are_those_one_after_another(networks, data, two_threads):
    arguments = {"depth": DEPTH, "lr": LR, "steps": STEPS, "reduction": "mean", "device": "cpu"}
    together = networks.paths("mup", WIDTH, *data, seeds=(3, 4, 5), **arguments)
    torch.set_num_threads(1)
    apart = [networks.paths("mup", WIDTH, *data, seeds=(seed,), **arguments) for seed in (3, 4, 5)]
    for name in ("f", "K"):
        single = np.concatenate([getattr(one, name) for one in apart])
        np.testing.assert_allclose(getattr(together, name), single, rtol=1e-12)
    features = list(networks.train("mup", WIDTH, *data, depth=DEPTH, lr=LR, steps=STEPS, seed=4))[-1].x[-1]
    np.testing.assert_allclose(together.K[1, -1], (features @ features.T / WIDTH).numpy(), rtol=1e-12)


def test_jobs_run_at_once_in_order_each_with_one_thread_of_torch(networks, two_threads):
    both = threading.Barrier(2, timeout=30)

    def job(number):
        both.wait()  # returns only if another job runs at the same time
        return number, torch.get_num_threads()

    assert list(networks.side_by_side(job, [3, 1, 2, 0], "cpu")) == [(3, 1), (1, 1), (2, 1), (0, 1)]
    assert torch.get_num_threads() == 2


def test_torch_gets_its_threads_back_when_a_job_fails(networks, two_threads):
    with pytest.raises(ZeroDivisionError):
        list(networks.side_by_side(lambda number: 1 / number, [1, 0], "cpu"))
    assert torch.get_num_threads() == 2


def test_on_an_accelerator_jobs_run_one_by_one(networks, two_threads):
    running = threading.Semaphore(1)

    def alone(number):
        assert running.acquire(blocking=False)
        threading.Event().wait(0.01)  # time for another job to run into this one
        running.release()
        return number

    assert list(networks.side_by_side(alone, range(4), "cuda")) == [0, 1, 2, 3]
