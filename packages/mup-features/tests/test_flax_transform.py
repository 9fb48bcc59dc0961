"""muP rates in optax: which factor meets which leaf, and the same training as in torch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import MLP, drawn

from mup_features.flax import infer_roles, init_rescale, mup_transform
from mup_features.roles import Role
from mup_features.width_rules import width_scales

M = 4
ROLES = {
    "enter.kernel": Role("input", fan_out_mult=M),
    "middle.kernel": Role("hidden", fan_in_mult=M, fan_out_mult=M),
    "leave.kernel": Role("output", fan_in_mult=M),
}
# rates of the mult form in the order of ROLES, spec c2
RATES = {
    "sgd": (M, 1.0, M),
    "adam": (1.0, 1.0 / M, 1.0),
    "adafactor": (1.0, M**-0.5, 1.0),
    "sign": (1.0, 1.0 / M, 1.0),
}


def tree(*entries):
    return {
        name.split(".")[0]: {"kernel": jnp.full((2, 2), float(x))}
        for name, x in zip(ROLES, entries, strict=True)
    }


def of_leaves(updates):
    return [float(updates[name.split(".")[0]]["kernel"][0, 0]) for name in ROLES]


def updated(transform, gradients, params=None, steps=1):
    state = transform.init(tree(1, 1, 1) if params is None else params)
    for _ in range(steps):
        updates, state = transform.update(gradients, state, params)
    return updates, state


@pytest.mark.parametrize("optimizer", list(RATES))
def test_updates_are_scaled_as_the_table_says(optimizer):
    transform = mup_transform(optax.sgd(1.0), ROLES, optimizer)
    found = of_leaves(updated(transform, tree(-1, -1, -1))[0])
    np.testing.assert_allclose(found, RATES[optimizer], rtol=1e-6)  # float32


def test_forms_and_alignment_reach_the_factors():
    pure = mup_transform(optax.sgd(1.0), ROLES, "sgd", form="pure", alignment=("none", "full"))
    expected = (M, M / M**0.5, 1.0 / M)
    np.testing.assert_allclose(of_leaves(updated(pure, tree(-1, -1, -1))[0]), expected, rtol=1e-6)


def test_weight_decay_takes_the_same_share_of_every_parameter_or_follows_the_rate():
    params, still = tree(1, 10, 100), tree(0, 0, 0)
    for mode, shares in (("constant_product", (1, 1, 1)), ("raw", RATES["adam"])):
        transform = mup_transform(
            optax.adam(0.5), ROLES, weight_decay=0.1, weight_decay_mode=mode, learning_rate=0.5
        )
        found = of_leaves(updated(transform, still, params)[0])
        np.testing.assert_allclose(
            found, [-0.05 * s * p for s, p in zip(shares, (1, 10, 100), strict=True)], rtol=1e-5
        )


def test_at_base_width_it_is_adamw():
    params, gradients = tree(1, -2, 3), tree(0.1, 0.2, -0.3)
    roles = {name: Role(role.kind) for name, role in ROLES.items()}
    schedule = optax.linear_schedule(1e-2, 1e-3, 10)
    ours = mup_transform(optax.adam(schedule), roles, weight_decay=0.1, learning_rate=schedule)
    expected, _ = updated(optax.adamw(schedule, weight_decay=0.1), gradients, params, steps=5)
    found, state = updated(ours, gradients, params, steps=5)
    np.testing.assert_allclose(
        of_leaves(found), of_leaves(expected), rtol=1e-5
    )  # float32, other order of sums
    assert int(state.step) == 5


def test_injected_hyperparameters_set_rate_and_decay():
    transform = mup_transform(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0), ROLES, "sgd", 0.1)
    params = tree(1, 1, 1)
    state = transform.init(params)
    state.inner.hyperparams["learning_rate"] = jnp.asarray(0.5)
    found, _ = transform.update(tree(-1, -1, -1), state, params)
    np.testing.assert_allclose(of_leaves(found), [0.5 * rate - 0.05 for rate in RATES["sgd"]], rtol=1e-6)


def test_it_can_be_made_by_inject_hyperparams():
    def make(learning_rate):
        return mup_transform(optax.sgd(learning_rate), ROLES, "sgd", 0.1, learning_rate=learning_rate)

    params, transform = tree(1, 1, 1), optax.inject_hyperparams(make)(learning_rate=0.5)
    found, _ = jax.jit(transform.update)(tree(-1, -1, -1), transform.init(params), params)
    np.testing.assert_allclose(of_leaves(found), [0.5 * rate - 0.05 for rate in RATES["sgd"]], rtol=1e-6)


def test_eps_scaling_makes_adam_with_a_large_epsilon_independent_of_width():
    scales = [width_scales(role).eps for role in ROLES.values()]
    gradients = tree(*(0.01 * scale for scale in scales))
    on = mup_transform(optax.adam(1.0, eps=0.1), ROLES, eps_scaling=True)
    off = mup_transform(optax.adam(1.0, eps=0.1), ROLES)
    steps = [
        found / rate for found, rate in zip(of_leaves(updated(on, gradients)[0]), RATES["adam"], strict=True)
    ]
    np.testing.assert_allclose(steps, -0.01 / 0.11, rtol=1e-5)
    assert max(of_leaves(updated(off, gradients)[0])) > -0.03


def test_masked_parameters_are_left_alone():
    mask = {"enter": True, "middle": False, "leave": True}
    transform = optax.masked(mup_transform(optax.sgd(1.0), ROLES, "sgd"), mask)
    found, _ = updated(transform, tree(-1, -1, -1))
    assert of_leaves(found) == [M, -1.0, M]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"weight_decay_mode": "none"}, "weight_decay_mode must be one of"),
        ({"form": "both"}, "form must be one of"),
        ({"optimizer": "sgd", "eps_scaling": True}, "eps_scaling needs an Adam optimizer, got 'sgd'"),
    ],
)
def test_bad_settings_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        mup_transform(optax.sgd(1.0), ROLES, **changed)


def test_what_is_missing_is_named():
    with pytest.raises(TypeError, match=r"inner must be an optax.GradientTransformation, got float"):
        mup_transform(0.1, ROLES)
    with pytest.raises(ValueError, match=r"'head.kernel' has none"):
        mup_transform(optax.sgd(1.0), ROLES).init({"head": {"kernel": jnp.ones(2)}})
    decaying = mup_transform(optax.sgd(1.0), ROLES, weight_decay=0.1)
    with pytest.raises(ValueError, match="params must be given to update for weight decay, got None"):
        updated(decaying, tree(0, 0, 0))
    with pytest.raises(ValueError, match="learning_rate must be given for weight decay"):
        updated(decaying, tree(0, 0, 0), tree(1, 1, 1))


@nnx.jit
def train_step(model, optimizer, x, y):
    optimizer.update(model, nnx.grad(lambda m: jnp.mean((m(x) - y) ** 2))(model))


def nnx_outputs(model, optimizer, x, y, steps):
    outputs = []
    for _ in range(steps):
        train_step(model, optimizer, x, y)
        outputs.append(np.asarray(model(x)))
    return np.array(outputs)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("form", ["mult", "symmetric"])
def test_nnx_and_torch_train_alike_from_equal_weights(optimizer, form, x64):
    torch = pytest.importorskip("torch")
    from mup_features.torch import apply_mup, param_groups
    from mup_features.torch import infer_roles as torch_roles

    def torch_mlp(width):
        sizes = ((8, width), (width, 2 * width), (2 * width, 4))
        layers = [torch.nn.Linear(*size, dtype=torch.float64) for size in sizes]
        return torch.nn.Sequential(layers[0], torch.nn.Tanh(), layers[1], torch.nn.Tanh(), layers[2])

    theirs = torch_mlp(16)
    roles = torch_roles(theirs, torch_mlp(4))
    apply_mup(theirs, roles, form, init="fan_in")
    ours = drawn(lambda: MLP(16, nnx.Rngs(0), jnp.float64))
    our_roles = infer_roles(ours, nnx.eval_shape(lambda: MLP(4, nnx.Rngs(0))))
    init_rescale(ours, our_roles, form, rescale=False)
    for mine, layer in zip((ours.enter, ours.middle, ours.leave), theirs[::2], strict=True):
        mine.kernel = nnx.Param(jnp.array(layer.weight.detach().numpy().T, copy=True))
        mine.bias = nnx.Param(jnp.array(layer.bias.detach().numpy(), copy=True))

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 8)), rng.normal(size=(5, 4))
    groups = param_groups(theirs, roles, 0.05, optimizer=optimizer, form=form)
    if optimizer == "adam":
        groups = param_groups(theirs, roles, 0.05, 0.1, optimizer=optimizer, form=form)
        torch_optimizer = torch.optim.AdamW(groups)
        inner = mup_transform(optax.adam(0.05), our_roles, weight_decay=0.1, learning_rate=0.05, form=form)
    else:
        torch_optimizer = torch.optim.SGD(groups, momentum=0.9)
        inner = mup_transform(optax.sgd(0.05, momentum=0.9), our_roles, "sgd", form=form)
    expected = []
    for _ in range(5):
        torch_optimizer.zero_grad()
        torch.nn.functional.mse_loss(theirs(torch.tensor(x)), torch.tensor(y)).backward()
        torch_optimizer.step()
        expected.append(theirs(torch.tensor(x)).detach().numpy())
    found = nnx_outputs(ours, nnx.Optimizer(ours, inner, wrt=nnx.Param), jnp.asarray(x), jnp.asarray(y), 5)
    np.testing.assert_allclose(
        found, np.array(expected), rtol=1e-10, atol=1e-12
    )  # float64, other order of sums
