"""Known methods written down in a few lines, and MARS in the setting that reproduces each of them.

Every pair runs 50 steps on the same float64 problem, softmax regression on the digits in batches of 16, from
the same random start; what is compared is the parameter at the end (or the momentum, where a table row of the
paper is about the momentum only).
"""

from collections.abc import Callable, Iterator

import torch
from estimators import digits_regression
from torch import Tensor

from mars_optim import theory
from mars_optim.torch import MARS, newton_schulz

STEPS = 50
Gradient = Callable[[Tensor], Tensor]  # of one batch, at any point


def batches(seed: int) -> Iterator[Gradient]:
    """The gradient functions of 50 random batches."""
    problem, generator = digits_regression(), torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        rows = torch.randint(len(problem.inputs), (16,), generator=generator)
        yield lambda w, rows=rows: problem.gradient(w, rows)


def start(seed: int) -> Tensor:
    return torch.randn(65, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 10


def run_optimizer(make: Callable[[list[Tensor]], torch.optim.Optimizer], seed: int) -> Tensor:
    """Parameter after all batches, under a torch optimiser; the exact form gets h_t by way 4."""
    w = torch.nn.Parameter(start(seed))
    optimizer = make([w])
    exact = not optimizer.param_groups[0].get("is_approx", True)
    previous = w.detach().clone()
    for gradient in batches(seed):
        w.grad = gradient(w.detach())
        h = gradient(previous)
        previous = w.detach().clone()
        if exact:
            optimizer.step(prev_grads=[h])
        else:
            optimizer.step()
    return w.detach()


def mars(setting: theory.Equivalent, lr: float, **options: object) -> Callable[[list[Tensor]], MARS]:
    """MARS in the setting of `theory`, without clipping, from h_1 = 0 in the approximate form."""
    if setting.is_approx:
        options = {"prev_grad_init": "zero"} | options
    return lambda params: MARS(
        params,
        lr=lr,
        betas=(setting.beta1, 0.99),
        gamma=setting.gamma,
        is_approx=setting.is_approx,
        mars_type=setting.mars_type,
        clip=None,
        **options,
    )


def adamw(seed: int) -> tuple[Tensor, Tensor]:
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    known = run_optimizer(lambda params: torch.optim.AdamW(params, **options), seed)
    ours = run_optimizer(lambda params: MARS(params, gamma=0.0, clip=None, **options), seed)
    return known, ours


def lion(seed: int) -> tuple[Tensor, Tensor]:
    beta1, beta2, lr = 0.9, 0.99, 0.003
    w, u = start(seed), torch.zeros(65, 10, dtype=torch.float64)
    for gradient in batches(seed):
        g = gradient(w)
        w = w - lr * (beta1 * u + (1 - beta1) * g).sign()
        u = beta2 * u + (1 - beta2) * g
    return w, run_optimizer(mars(theory.lion_equivalent(beta1, beta2), lr), seed)


def nesterov(seed: int) -> tuple[Tensor, Tensor]:
    momentum, lr = 0.9, 0.1
    known = run_optimizer(
        lambda params: torch.optim.SGD(params, lr=lr, momentum=momentum, nesterov=True), seed
    )
    setting = theory.nesterov_equivalent(momentum)
    return known, run_optimizer(mars(setting, lr * setting.scale), seed)


def muon(seed: int) -> tuple[Tensor, Tensor]:
    momentum, lr = 0.95, 0.02
    w, buffer = start(seed), torch.zeros(65, 10, dtype=torch.float64)
    for gradient in batches(seed):
        g = gradient(w)
        buffer = momentum * buffer + g
        w = w - lr * (65 / 10) ** 0.5 * newton_schulz(g + momentum * buffer, eps=1e-8)
    return w, run_optimizer(mars(theory.muon_equivalent(momentum), lr), seed)


def storm(seed: int) -> tuple[Tensor, Tensor]:
    beta, lr = 0.9, 0.1
    w, m = start(seed), torch.zeros(65, 10, dtype=torch.float64)
    previous = w
    for gradient in batches(seed):
        g, h = gradient(w), gradient(previous)
        m = beta * m + (1 - beta) * g + beta * (g - h)
        previous, w = w, w - lr * m
    return w, run_optimizer(mars(theory.storm_equivalent(beta), lr), seed)


def super_adam(seed: int) -> tuple[Tensor, Tensor]:
    beta1, beta2, lr, eps = 0.9, 0.99, 0.01, 1e-8
    w = previous = start(seed)
    m = v = torch.zeros(65, 10, dtype=torch.float64)
    for t, gradient in enumerate(batches(seed), start=1):
        g, h = gradient(w), gradient(previous)
        m = beta1 * (m + g - h) + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2  # of the plain gradient: its difference from MARS
        previous, w = w, w - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    setting = theory.storm_equivalent(beta1)._replace(mars_type="mars-adamw")
    return w, run_optimizer(mars(setting, lr, second_moment="grad"), seed)


def adan_first_moment(seed: int) -> tuple[Tensor, Tensor]:
    beta, lr = 0.95, 0.1
    w, zero = start(seed), torch.zeros(65, 10, dtype=torch.float64)
    m, difference, previous_g = zero, zero, zero
    for gradient in batches(seed):
        g = gradient(w)
        m = beta * m + (1 - beta) * g
        difference = beta * difference + (1 - beta) * (g - previous_g)
        previous_g, w = g, w - lr * (m + beta * difference)
    setting = theory.Equivalent("mars-sgd", beta, 1 - beta, is_approx=True, scale=1.0)
    return w, run_optimizer(mars(setting, lr), seed)


def quasi_hyperbolic_momentum(seed: int) -> tuple[Tensor, Tensor]:
    beta, gamma, lr = 0.95, 0.1, 0.1
    w, e = start(seed), torch.zeros(65, 10, dtype=torch.float64)
    for gradient in batches(seed):
        g = gradient(w)
        e = beta * e + (1 - beta) * g
        w = w - lr * (gamma * g + (1 - gamma) * e)
    setting = theory.Equivalent("mars-sgd", beta, gamma, is_approx=True, scale=1.0)
    return w, run_optimizer(mars(setting, lr), seed)


def memory_efficient(seed: int) -> tuple[Tensor, Tensor]:
    setting = theory.Equivalent("mars-lion", 0.95, 0.025, is_approx=True, scale=1.0)
    buffered = run_optimizer(mars(setting, 0.003), seed)
    return buffered, run_optimizer(mars(setting, 0.003, memory_efficient=True), seed)


PAIRS: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "AdamW (torch.optim)": adamw,
    "Nesterov SGD (torch.optim)": nesterov,
    "Lion": lion,
    "Muon (Nesterov)": muon,
    "STORM": storm,
    "SuperAdam": super_adam,
    "Adan's first moment": adan_first_moment,
    "Quasi-hyperbolic momentum": quasi_hyperbolic_momentum,
    "Lion without gradient buffer": memory_efficient,
}
