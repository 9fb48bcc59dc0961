"""Trains under VarianceReduced on drawn gradients or on softmax regression, for the tests of the wrapper."""

import torch

from mars_optim.torch.wrapper import VarianceReduced

STEPS = 12
MATRICES = ((6, 4), (3, 8), (1, 4))
ROUNDING = 1e-12  # 12 steps of float64 arithmetic that differ in the order of a few operations


def parameters_of(drawn):
    return [torch.nn.Parameter(torch.tensor(x)) for x in drawn[0]]


def train(optimizer, params, drawn, *, references=False, after_step=lambda: None):
    """All steps of the drawn gradients; with references the exact form by way 4."""
    for g, h in zip(drawn[1], drawn[2], strict=True):
        for param, gradient in zip(params, g, strict=True):
            param.grad = torch.tensor(gradient, dtype=param.dtype)
        if references:
            optimizer.step(
                prev_grads=[torch.tensor(x, dtype=p.dtype) for x, p in zip(h, params, strict=True)]
            )
        else:
            optimizer.step()
        after_step()
    return [p.detach().double().numpy() for p in params]


def run_wrapped(drawn, make_base, *, is_approx=True, **options):
    params = parameters_of(drawn)
    optimizer = VarianceReduced(make_base(params), is_approx=is_approx, **options)
    return train(optimizer, params, drawn, references=not is_approx)


class Recorder(torch.optim.SGD):
    """A base that only keeps what it is shown."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9)
        self.shown = []

    def step(self, closure=None):  # noqa: ARG002 - the signature of torch's
        params = [param for group in self.param_groups for param in group["params"]]
        self.shown.append([None if p.grad is None else p.grad.detach().clone() for p in params])


class Softmax:
    """Softmax regression on fixed batches, so that every way sees the same data."""

    def __init__(self, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        self.batches = [
            (
                torch.randn(8, 5, generator=generator, dtype=dtype),
                torch.randint(0, 3, (8,), generator=generator),
            )
            for _ in range(STEPS + 1)
        ]
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator, dtype=dtype))
        self.bias = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
        self.params = [self.weight, self.bias]

    def loss(self, t):
        x, y = self.batches[t]
        return torch.nn.functional.cross_entropy(x @ self.weight.T + self.bias, y)

    def result(self):
        return [p.detach().double().numpy().copy() for p in self.params]


def assert_same_state(actual, expected):
    assert actual["state"].keys() == expected["state"].keys()
    for key, entry in expected["state"].items():
        assert actual["state"][key].keys() == entry.keys()
        for name, value in entry.items():
            torch.testing.assert_close(actual["state"][key][name], value, rtol=0, atol=0)
