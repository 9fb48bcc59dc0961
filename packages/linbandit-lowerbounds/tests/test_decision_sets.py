"""Listed and implicit decision sets answer like brute force over the written-out actions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from linbandit_lowerbounds.decision_sets import DecisionSet, SignSet, check_enumerable

WIDTH = 9


def listed(rng):
    mask = jnp.array([True, False, True, True, False, True])
    return DecisionSet(jnp.asarray(rng.normal(size=(6, WIDTH))), mask, jnp.asarray(1), 3)


def signs(n, *, width, start=0, active=None, bias=0.0, bias_column=0, one_hot=None, fills=False, scale=0.6):
    number = lambda value: jnp.asarray(value, jnp.int32)  # noqa: E731
    return SignSet(
        jnp.asarray(scale, float),
        jnp.ones(n, bool) if active is None else jnp.asarray(active),
        jnp.asarray(bias, float),
        number(1),
        number(width - n if fills else start),
        number(bias_column),
        None if one_hot is None else jnp.asarray(one_hot),
        3,
        width,
        fills,
    )


SETS = {
    "listed": listed,
    "filling": lambda _: signs(5, width=5, fills=True),
    "biased": lambda _: signs(5, width=6, bias=0.4, fills=True),
    "padded": lambda _: signs(5, width=6, bias=0.4, fills=True, active=[True, False, True, True, False]),
    "sliced": lambda _: signs(
        4, width=WIDTH, start=5, bias=0.3, bias_column=2, active=[True, True, False, True]
    ),
    "one hot": lambda _: signs(4, width=WIDTH, start=3, one_hot=True, active=[True, True, True, False]),
    "not one hot": lambda _: signs(4, width=WIDTH, start=3, one_hot=False, active=[True, True, True, False]),
    "nothing": lambda _: signs(3, width=4, scale=0.0, active=[False] * 3, one_hot=False),
}


def brute_force(shown):
    """The distinct playable actions, written out from the definition."""
    if isinstance(shown, DecisionSet):
        return np.asarray(shown.actions)[np.asarray(shown.mask)]
    rows = []
    offset = shown.width - shown.n_signs if shown.fills else int(shown.start)
    column = 0 if shown.fills else int(shown.bias_column)
    places = [offset + j for j in range(shown.n_signs) if bool(shown.active[j])]
    if shown.one_hot is not None and bool(shown.one_hot):
        vectors = np.eye(len(places))
    else:
        vectors = float(shown.scale) * np.array(list(itertools.product((-1, 1), repeat=len(places))))
    for vector in vectors if len(places) else [()]:
        row = np.zeros(shown.width)
        row[places] = vector
        row[column] += float(shown.bias)
        rows.append(row)
    return np.array(rows)


@jax.jit
def answers(shown, theta, root, beta):
    """Everything a set can be asked, at once."""
    inverse = root @ root.T
    rows = shown.enumerate()
    best, ucb = shown.argmax(theta), shown.argmax_ucb(theta, inverse, beta)
    dense = shown.in_one_block()
    return {
        "rows": rows.actions,
        "mask": rows.mask,
        "best_value": shown.best_value(theta),
        "argmax": shown.features(best),
        "ucb": shown.features(ucb),
        "ascent": shown.features(shown.argmax_ucb(theta, inverse, beta, "coordinate_ascent")),
        "round trip": jax.vmap(lambda i: shown.features(shown.choice_of(i)))(jnp.arange(rows.mask.size)),
        "dense": dense.features(best),
        "dense rows": rows.dense(),
        "dense ucb": dense.features(
            dense.argmax_ucb(jnp.tile(theta, 3), jnp.kron(jnp.eye(3), inverse), beta)
        ),
        "squared norms": rows.squared_norms(inverse),
    }


@pytest.mark.parametrize("name", SETS)
def test_a_set_answers_like_brute_force(name, x64):
    rng = np.random.default_rng(0)
    shown = SETS[name](rng)
    actions = brute_force(shown)
    width = actions.shape[1]
    for trial in range(20):
        theta, root = rng.normal(size=width), rng.normal(size=(width, width)) / 3
        beta = (0.0, 0.3, 3.0)[trial % 3]
        got = jax.tree.map(np.asarray, answers(shown, jnp.asarray(theta), jnp.asarray(root), beta))
        inverse = root @ root.T
        means = actions @ theta
        widths = np.sqrt(np.einsum("ai,ij,aj->a", actions, inverse, actions))
        playable = got["rows"][got["mask"]]
        np.testing.assert_array_equal(np.unique(playable, axis=0), np.unique(actions, axis=0))
        np.testing.assert_array_equal(got["round trip"][got["mask"]], playable)
        np.testing.assert_allclose(got["best_value"], means.max(), atol=1e-14)
        np.testing.assert_allclose(got["argmax"] @ theta, means.max(), atol=1e-14)
        np.testing.assert_array_equal(got["argmax"], actions[np.argmax(means)])
        np.testing.assert_array_equal(got["ucb"], actions[np.argmax(means + beta * widths)])
        np.testing.assert_array_equal(got["dense"], np.r_[np.zeros(width), got["argmax"], np.zeros(width)])
        np.testing.assert_array_equal(got["dense rows"][:, width : 2 * width], got["rows"])
        np.testing.assert_array_equal(got["dense ucb"][width : 2 * width], got["ucb"])
        np.testing.assert_allclose(
            got["squared norms"], np.einsum("ai,ij,aj->a", got["rows"], inverse, got["rows"]), atol=1e-13
        )
        # Coordinate ascent starts at the largest mean, and only climbs.
        score = {
            key: got[key] @ theta + beta * np.sqrt(got[key] @ inverse @ got[key])
            for key in ("ascent", "argmax")
        }
        assert score["ascent"] >= score["argmax"] - 1e-13


def test_coordinate_ascent_ends_where_no_single_flip_helps(x64):
    n, rng = 20, np.random.default_rng(1)
    shown = signs(n, width=n, fills=True)
    ascend = jax.jit(lambda theta, inverse: shown.argmax_ucb(theta, inverse, 2.0, "coordinate_ascent"))
    climbed = 0
    for _ in range(10):
        theta, root = rng.normal(size=n), rng.normal(size=(n, n))
        inverse = root @ root.T
        end = np.asarray(ascend(jnp.asarray(theta), jnp.asarray(inverse)))

        def score(a, theta=theta, inverse=inverse):
            return 0.6 * (a @ theta + 2.0 * np.sqrt(a @ inverse @ a))

        flips = end * (1 - 2 * np.eye(n))
        assert score(end) >= max(score(a) for a in flips) - 1e-10
        climbed += score(end) > score(np.sign(theta)) + 1e-6
    assert climbed > 5


@pytest.mark.parametrize("name", ["listed", "padded", "one hot", "not one hot"])
def test_pick_is_uniform_over_the_actions(name):
    shown = SETS[name](np.random.default_rng(0))
    actions = brute_force(shown)
    uniforms = jax.random.uniform(jax.random.key(8), (4000, 5 if name == "padded" else 4))
    picked = np.asarray(jax.jit(jax.vmap(lambda u: shown.features(shown.pick(u))))(uniforms))
    distances = np.abs(picked[:, None] - actions[None]).max(2)
    counts = np.bincount(distances.argmin(1), minlength=len(actions))
    assert distances.min(1).max() < 1e-6  # float32
    assert stats.chisquare(counts).pvalue > 1e-3  # fixed key


def test_pick_reaches_both_ends_of_a_listed_set():
    shown = listed(np.random.default_rng(0))
    assert int(shown.pick(jnp.zeros(1))) == 0
    assert int(shown.pick(jnp.full(1, 1 - 2**-24))) == 5


def test_ties_go_to_the_lowest_index():
    equal = DecisionSet(jnp.ones((4, 2)), jnp.array([False, True, True, True]), jnp.asarray(0), 1)
    assert int(equal.argmax(jnp.ones(2))) == 1
    ucb = jax.jit(lambda shown, theta: shown.argmax_ucb(theta, jnp.eye(theta.size), 1.0))
    assert int(ucb(equal, jnp.ones(2))) == 1
    cube = signs(3, width=3, fills=True)
    assert cube.argmax(jnp.zeros(3)).tolist() == [-1.0, -1.0, -1.0]
    # With theta = 0 and the identity all eight corners tie.
    assert ucb(cube, jnp.zeros(3)).tolist() == [-1.0, -1.0, -1.0]


def test_listing_more_than_twelve_signs_is_refused():
    check_enumerable(12)
    cube = signs(13, width=13, fills=True)
    for ask in (cube.enumerate, lambda: cube.argmax_ucb(jnp.zeros(13), jnp.eye(13), 1.0)):
        with pytest.raises(ValueError, match="coordinate_ascent"):
            ask()
    ascend = jax.jit(lambda theta: cube.argmax_ucb(theta, jnp.eye(13), 1.0, "coordinate_ascent"))
    assert ascend(jnp.ones(13)).tolist() == [1.0] * 13


def test_best_value_of_a_fully_masked_coordinate_counts_the_bias_only(x64):
    shown = signs(3, width=4, bias=0.5, fills=True, active=[False] * 3)
    assert float(shown.best_value(jnp.array([2.0, 9.0, 9.0, 9.0]))) == 1.0
