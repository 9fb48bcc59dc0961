"""What a coordinate check of an nnx model sees, and that muP passes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from nnx_models import MLP, Transformer

from mup_features.flax import attention_fn, coordinate_check, infer_roles, init_rescale, mup_transform


class Twisted(nnx.Module):
    """A dictionary out, a tuple inside, a module called twice, dropout, free parameters, an unused module."""

    def __init__(self, width, rngs):
        self.embed = nnx.Embed(5, width, rngs=rngs)
        self.pair = Pair(width, rngs)
        self.twice = nnx.Linear(width, width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(width))
        self.unused = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x):
        h, _ = self.pair(self.embed(x))
        h = self.drop(self.twice(self.twice(h)))
        return {"loss": h.mean(), "logits": self.embed.attend(h * self.gain[...])}


class Pair(nnx.Module):
    def __init__(self, width, rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (width, width)))

    def __call__(self, x):
        return x @ self.weight[...], "state"


def tokens(seed, step):
    return jnp.arange(5)[None]


def token_loss(model, batch):
    return jnp.mean(model(batch)["logits"] ** 2)


def sgd(model):
    return nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)


def twisted(**changed):
    settings = {"optimizer_fn": sgd, "loss_fn": token_loss, "progress": False}
    return coordinate_check(Twisted, tokens, (4, 8), [0, 1], 2, **(settings | changed))


@pytest.fixture(scope="module")
def report():
    return twisted()


def test_tuples_dictionaries_repeated_calls_and_unused_modules_are_handled(report):
    assert report.modules == ("embed", "pair", "twice", "(model)")
    assert report.outputs == ("(model)",)
    assert (report.changes[:, :, 0] == 0.0).all()  # dropout is off while measuring
    assert (report.changes[:, :, 1:] > 0.0).all()


@pytest.mark.parametrize(("record", "expected"), [("rms", 2.5**0.5), ("l1", 1.5)])
def test_sizes_and_changes_are_those_of_the_activations(record, expected):
    def model_fn(width, rngs):
        model = nnx.Linear(1, 2 * width, use_bias=False, rngs=rngs)
        model.kernel[...] = jnp.tile(jnp.array([1.0, -2.0]), width)[None]
        return model

    report = coordinate_check(
        model_fn,
        lambda *_: jnp.ones((1, 1)),
        (1, 2),
        [0],
        1,
        # the gradient is 1 everywhere: every weight and every activation moves by -0.5
        optimizer_fn=lambda model: nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param),
        loss_fn=lambda model, batch: model(batch).sum(),
        record=record,
    )
    assert report.modules == ("(model)",)
    assert report.sizes[0, 0, 0, 0] == pytest.approx(expected, rel=1e-6)  # float32 activations
    np.testing.assert_allclose(report.changes[:, 0, :, 0], [[0.0, 0.5], [0.0, 0.5]], rtol=1e-6)


def test_the_model_and_its_modes_are_left_as_they_were():
    models = []

    def model_fn(width, rngs):
        models.append(Twisted(width, rngs))
        return models[-1]

    call = Twisted.__call__
    coordinate_check(model_fn, tokens, (4, 8), [0], 1, optimizer_fn=sgd, loss_fn=token_loss)
    assert [model.drop.deterministic for model in models] == [False, False]
    assert Twisted.__call__ is call


def test_the_same_seeds_give_the_same_report(report):
    assert twisted().to_json() == report.to_json()


def test_patterns_choose_modules():
    only = coordinate_check(
        Twisted, tokens, (4, 8), [0], 1, optimizer_fn=sgd, loss_fn=token_loss, modules=["tw*", "drop"]
    )
    assert only.modules == ("twice", "drop", "(model)")
    with pytest.raises(ValueError, match="pattern 'layers' matches none of"):
        twisted(modules=["layers"])


def test_bad_input_is_refused():
    with pytest.raises(
        TypeError, match=r"model_fn must return a flax.nnx.Module or \(module, roles\), got str"
    ):
        coordinate_check(lambda *_: "model", tokens, (4, 8), [0], optimizer_fn=sgd)
    with pytest.raises(
        ValueError, match=r"batch must be a pair \(inputs, targets\) or loss_fn given, got int"
    ):
        coordinate_check(Twisted, lambda *_: 3, (4, 8), [0], optimizer_fn=sgd)


WIDTHS = (16, 128)


def mup(width, rngs):
    model = MLP(width, rngs)
    roles = infer_roles(model, nnx.eval_shape(lambda: MLP(8, nnx.Rngs(0))))
    return init_rescale(model, roles, init="fan_in"), roles


def batch(seed, step):
    inputs, targets = jax.random.split(jax.random.key(seed))
    return jax.random.normal(inputs, (16, 8)), jax.random.randint(targets, (16,), 0, 4)


def adam(model, roles=None):
    inner = optax.adam(0.01)
    return nnx.Optimizer(model, inner if roles is None else mup_transform(inner, roles), wrt=nnx.Param)


def test_the_standard_parametrization_fails():
    bad = coordinate_check(MLP, batch, WIDTHS, range(3), 2, optimizer_fn=adam).verdict()
    assert bad.outcome == "FAIL"
    assert {"middle", "leave"} <= {judged.module for judged in bad.judged if judged.outcome == "FAIL"}


@pytest.mark.slow
def test_mup_passes():
    good = coordinate_check(mup, batch, WIDTHS, range(8), 2, optimizer_fn=adam).verdict()
    assert good.passed, str(good)


def texts(seed, step):
    tokens = jax.random.randint(jax.random.key(seed), (8, 7), 0, 11)
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
def test_a_transformer_passes_under_mup_and_fails_under_the_standard_parametrization(tied):
    def build(width, rngs):
        return Transformer(width, rngs, tied=tied, attention_fn=attention_fn(4))

    def with_mup(width, rngs):
        model = build(width, rngs)
        base, other = (nnx.eval_shape(lambda n=n: build(n, nnx.Rngs(0))) for n in (16, 32))
        roles = infer_roles(model, base, other)
        return init_rescale(model, roles, init={"positions": "constant", "*": "fan_in"}), roles

    def standard(width, rngs):
        return Transformer(width, rngs, tied=tied)

    def check(model_fn):
        return coordinate_check(model_fn, texts, (64, 512), range(5), 2, optimizer_fn=adam).verdict()

    good, bad = check(with_mup), check(standard)
    assert good.passed, str(good)
    assert bad.outcome == "FAIL"
