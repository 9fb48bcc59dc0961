"""Scaling with depth and of Adam's epsilon in optax: the factors, and the same training as in torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import Residual, drawn

from mup_features.flax import infer_roles, init_rescale, mup_transform, residual_scale
from mup_features.roles import Role

WIDTH, BASE_WIDTH, LAYERS, BASE_LAYERS = 16, 4, 4, 1
DEPTH = {"layers": LAYERS, "base_layers": BASE_LAYERS}
HIDDEN = {"blocks.0.kernel": Role("hidden", fan_in_mult=4, fan_out_mult=4)}


def one_step(inner, gradient, roles=HIDDEN, optimizer="adam", **options):
    """Update of the one parameter `blocks.0.kernel`."""
    params = {"blocks": [{"kernel": jnp.ones((2, 2))}]}
    transform = mup_transform(inner, roles, optimizer, **options)
    gradients = jax.tree.map(lambda leaf: leaf * gradient, params)
    updates, _ = transform.update(gradients, transform.init(params), params)
    return float(updates["blocks"][0]["kernel"][0, 0])


def test_branches_are_scaled_by_the_square_root_or_the_ratio_of_depths():
    assert residual_scale(16, 4) == 0.5
    assert residual_scale(16, 4, "linear") == 0.25
    with pytest.raises(ValueError, match="base_depth must be >= 1, got 0"):
        residual_scale(4, 0)
    with pytest.raises(ValueError, match="mode must be 'sqrt' or 'linear', got 'log'"):
        residual_scale(4, 4, "log")


@pytest.mark.parametrize(
    ("depth", "optimizer", "factor"),
    [("sqrt", "adam", 1 / 8), ("sqrt", "sgd", 1.0), ("linear", "adamw", 1 / 4), ("linear", "sgd", 4.0)],
)
def test_depth_changes_the_rate_of_the_blocks(depth, optimizer, factor):
    found = one_step(optax.sgd(1.0), -1.0, optimizer=optimizer, depth=depth, layers=8, base_layers=2)
    # linear, Adam: the inner SGD of this test sees gradients over L0/L, which Adam would forget
    assert found == pytest.approx(4 * factor if (depth, optimizer) == ("linear", "adamw") else factor)


@pytest.mark.parametrize("kind", ["input", "output"])
def test_only_blocks_depend_on_depth(kind):
    roles = {"blocks.0.kernel": Role(kind)}
    for options in ({}, {"blocks": "layers.*"}):
        named = roles | {"layers.0.kernel": Role("hidden")}
        found = one_step(optax.sgd(1.0), -1.0, named, depth="sqrt", **DEPTH, **options)
        assert found == 1.0
    assert one_step(optax.sgd(1.0), -1.0, roles, depth="sqrt", blocks=["blocks.*"], **DEPTH) == 0.5


def test_epsilon_gets_the_factors_of_width_and_depth_whoever_sets_it():
    """Adam's first step is -g / (|g| + eps): with g = eps = 0.1 and a factor s of eps, -1 / (1 + s)."""
    injected = optax.inject_hyperparams(optax.adam)(1.0, eps=0.1)
    for inner in (optax.adam(1.0, eps=0.1), injected):
        for options, s in [
            ({}, 1.0),
            ({"eps_scaling": True}, 1 / 4),
            ({"depth": "linear", **DEPTH}, 1 / 4),
            ({"depth": "linear", "eps_scaling": True, **DEPTH}, 1 / 16),
        ]:
            # rate of a hidden weight: 1/4; float32
            assert one_step(inner, 0.1, **options) == pytest.approx(-0.25 / (1 + s), rel=1e-5), options


def test_what_muon_orthogonalises_has_no_epsilon_to_scale():
    vector = {"blocks.0.kernel": Role("hidden", 4, 4, matrix=False)}
    options = {"optimizer": "muon", "eps_scaling": True}
    assert one_step(optax.adam(1.0, eps=0.1), 0.1, **options) == pytest.approx(-0.5, rel=1e-5)
    assert one_step(optax.adam(1.0, eps=0.1), 0.1, vector, **options) == pytest.approx(-0.2, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"depth": "log", **DEPTH}, "depth must be 'sqrt', 'linear' or None, got 'log'"),
        ({"depth": "sqrt"}, "layers and base_layers must be >= 1 with depth, got None and None"),
        ({"depth": "sqrt", "layers": 0, "base_layers": 2}, "with depth, got 0 and 2"),
        ({"layers": 4}, "depth must be 'sqrt' or 'linear' where layers"),
        ({"depth": "sqrt", "blocks": "h.*", **DEPTH}, r"blocks must match some parameter, got 'h\.\*'"),
    ],
)
def test_bad_settings_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        mup_transform(optax.adam(1.0), HIDDEN, **options)


def halving(rate):
    # optax.exponential_decay counts in float32, an error of 1e-8
    return lambda step: rate * jnp.exp2(-step.astype(jnp.float64))


def injected(rate, eps):
    return optax.inject_hyperparams(optax.adam)(learning_rate=halving(rate), eps=eps)


def momentum(rate, _):
    return optax.sgd(halving(rate), momentum=0.9)


def adam(rate, eps):
    return optax.adam(halving(rate), eps=eps)


# depth; the optimiser of optax; options of both frameworks; whether ours must be told the rate
CASES = {
    "sqrt": ("sqrt", adam, {"blocks": "blocks.*"}, True),
    "linear": ("linear", injected, {"weight_decay_mode": "raw"}, False),
    "linear, epsilon of the gradients": ("linear", injected, {"eps_scaling": True}, False),
    "sqrt, SGD": ("sqrt", momentum, {}, False),
    "linear, SGD": ("linear", momentum, {}, False),
}


@partial(jax.jit, static_argnums=0)
def output_and_gradient(graph, state, branch, x, y):
    """Compiled once for all cases: the factor of the branches is an argument."""

    def loss(state):
        model = nnx.merge(graph, state)
        model.branch = branch
        output = model(x)
        return jnp.mean((output - y) ** 2), output

    gradient, output = jax.grad(loss, has_aux=True)(state)
    return output, gradient


@pytest.mark.parametrize("case", list(CASES))
def test_nnx_and_torch_train_a_residual_net_alike(case, x64):
    torch = pytest.importorskip("torch")
    depth, make_inner, shared, told = CASES[case]
    rate, eps, sgd = 0.02, 1e-2, make_inner is momentum
    decay, optimizer = (0.0, "sgd") if sgd else (0.1, "adam")
    theirs, their_roles, forward = torch_residual(torch, residual_scale(LAYERS, BASE_LAYERS, depth))
    ours = drawn(lambda: Residual(WIDTH, LAYERS, 1.0, nnx.Rngs(0), jnp.float64))
    base = nnx.eval_shape(lambda: Residual(BASE_WIDTH, LAYERS, 1.0, nnx.Rngs(0)))
    roles = infer_roles(ours, base)
    init_rescale(ours, roles, rescale=False)
    for name, linear in theirs.named_modules():
        if isinstance(linear, torch.nn.Linear):
            mine = ours.blocks[int(name[7:])] if name.startswith("blocks") else getattr(ours, name)
            mine.kernel[...] = jnp.array(linear.weight.detach().numpy().T, copy=True)
            mine.bias[...] = jnp.array(linear.bias.detach().numpy(), copy=True)

    from mup_features.torch import param_groups

    shared = {"depth": depth, **DEPTH, **shared}
    groups = param_groups(theirs, their_roles, rate, decay, optimizer, eps=eps, **shared)
    kind, options = (torch.optim.SGD, {"momentum": 0.9}) if sgd else (torch.optim.AdamW, {"eps": eps})
    torch_optimizer = kind(groups, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda step: 0.5**step)
    learning_rate = halving(rate) if told else None
    inner = make_inner(rate, eps)
    transform = mup_transform(inner, roles, optimizer, decay, learning_rate=learning_rate, **shared)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 8)), rng.normal(size=(5, 4))
    graph, state = nnx.split(ours)
    memory, update = transform.init(state), jax.jit(transform.update)
    branch = residual_scale(LAYERS, BASE_LAYERS, depth)
    found, expected = [], []
    for _ in range(5):
        output = forward(torch.tensor(x))
        torch_optimizer.zero_grad()
        torch.nn.functional.mse_loss(output, torch.tensor(y)).backward()
        torch_optimizer.step()
        schedule.step()
        expected.append(output.detach().numpy())
        output, gradient = output_and_gradient(graph, state, branch, x, y)
        updates, memory = update(gradient, memory, state)
        state = optax.apply_updates(state, updates)
        found.append(output)
    assert np.abs(expected[-1] - expected[0]).max() > 0.02  # it trains
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)  # float64, other order of sums


def torch_residual(torch, branch):
    """The net of `nnx_models.Residual`, scaled; its roles; its forward pass."""
    from mup_features.torch import apply_mup
    from mup_features.torch import infer_roles as torch_roles

    def build(width):
        model = torch.nn.Module()
        model.enter = torch.nn.Linear(8, width, dtype=torch.float64)
        blocks = [torch.nn.Linear(width, width, dtype=torch.float64) for _ in range(LAYERS)]
        model.blocks = torch.nn.ModuleList(blocks)
        model.leave = torch.nn.Linear(width, 4, dtype=torch.float64)
        return model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(WIDTH)
    roles = torch_roles(model, build(BASE_WIDTH))
    apply_mup(model, roles, init="fan_in")

    def forward(x):
        h = model.enter(x)
        for block in model.blocks:
            h = h + branch * torch.tanh(block(h))
        return model.leave(h)

    return model, roles, forward
