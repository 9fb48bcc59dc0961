"""The certificate: random play has ratio two, an informed learner is caught, an honest one is not."""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linbandit_lowerbounds.algorithms import baselines
from linbandit_lowerbounds.certify import BELOW, CONSISTENT, INFORMED, certify, gap_sweep
from linbandit_lowerbounds.environment import Algorithm, no_draw
from linbandit_lowerbounds.families import FAMILIES, cases, hypercube_case, least_loaded_case, scaled_case
from linbandit_lowerbounds.interop import from_object

KEY = jax.random.key(11)


@pytest.fixture
def small(monkeypatch):
    """A few small cases, of one compiled shape in each family, instead of the full families."""
    sigma = np.full(60, 0.5)

    def scaled():
        return [scaled_case(sigma * s, 2, x, ("S",)) for s in (1.0, 2.0) for x in (0.75, 1.25)]

    few = {**FAMILIES, "scaled": scaled, "hypercube": lambda: [hypercube_case(500, 2)]}
    monkeypatch.setattr("linbandit_lowerbounds.families.FAMILIES", few)


@cache
def cheat(key_data: tuple[int, ...]) -> Algorithm:
    """Declares nothing, but knows the key of the simulation and draws theta for itself."""
    key = jax.random.wrap_key_data(jnp.asarray(key_data, jnp.uint32))

    def init(own, spec):
        return jnp.zeros((), jnp.int32), own

    def act(state, decision_set, sigma, draw):
        return decision_set.argmax(draw)

    def update(state, decision_set, choice, reward, sigma):
        return state

    def draw(round_key, spec, shape):
        def signs(seed):
            hidden = jax.random.fold_in(jax.random.fold_in(key, 0), seed)
            return jax.random.rademacher(hidden, (spec.block_dim,), float)

        return jax.vmap(signs)(jnp.arange(shape[0]))

    return Algorithm(init, act, update, "never", "cheat", draw)


class RandomPlayer:
    """Anybody's learner in NumPy."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def reset(self, seed):
        self.generator = np.random.default_rng(seed)

    def act(self, actions, sigma=None):
        return int(self.generator.integers(len(actions)))

    def update(self, x, reward, sigma=None):
        pass


def test_random_play_has_twice_the_lemma_and_the_worst_four_times(small):
    found = {
        name: [row.ratios["lemma"] for row in certify(a, family="hypercube", key=KEY, progress=False).rows]
        for name, a in (("random", baselines.random()), ("worst", baselines.worst()))
    }
    for ratio in found["random"]:
        # The standard error is 0.006 at 256 runs.
        assert ratio.value == pytest.approx(2.0, abs=0.025)
    for ratio in found["worst"]:
        # The same loss in every round, summed in float32.
        assert ratio.value == pytest.approx(4.0, rel=1e-4)


def test_a_learner_that_knows_the_key_is_caught(small):
    secret = tuple(int(word) for word in np.asarray(jax.random.key_data(KEY)))
    certificate = certify(cheat(secret), family="scaled", key=KEY, n_seeds=64, progress=False)
    assert certificate.verdict == BELOW
    assert all(row.leaks for row in certificate.rows)
    assert "below lower bound" in certificate.table()


def test_an_honest_learner_is_consistent_and_a_yardstick_says_what_it_is(small):
    greedy = certify(baselines.greedy(), family="scaled", key=KEY, n_seeds=64, progress=False)
    assert greedy.verdict == CONSISTENT
    oracle = certify(baselines.oracle(), family="scaled", key=KEY, n_seeds=8, progress=False)
    assert (oracle.verdict, oracle.sees_theta) == (INFORMED, True)
    assert [row.regret.value for row in oracle.rows] == pytest.approx([0.0] * 4, abs=1e-5)


def test_rows_hold_bounds_ratios_and_chances(small):
    certificate = certify(baselines.random(), family="scaled", key=KEY, n_seeds=64, progress=False)
    row = certificate.rows[0]
    assert row.ratios["scaled_seq"].value == pytest.approx(row.regret.value / row.bounds["scaled_seq"])
    assert 0.0 < row.bounds["scaled_end"] < row.bounds["scaled_seq"]
    assert row.bootstrap.value == row.regret.value
    assert [worst.x for worst in certificate.worst] == [1.25, 1.25]
    # Random play: every case has regret d gap S exactly in the mean, S^(1/2) at a fixed scaled gap.
    assert certificate.exponents["S"].low < 0.5 < certificate.exponents["S"].high


def test_a_numpy_object_is_certified(small):
    certificate = certify(from_object(RandomPlayer), family="scaled", key=KEY, n_seeds=16, progress=False)
    assert certificate.verdict == CONSISTENT
    assert "[Python loop]" in certificate.algorithm


def test_json_holds_the_table(small, tmp_path):
    certificate = certify(baselines.random(), family="scaled", key=KEY, n_seeds=8, progress=False)
    certificate.to_json(tmp_path / "certificate.json")
    record = json.loads((tmp_path / "certificate.json").read_text())
    assert record["verdict"] == certificate.verdict
    assert record["rows"][1]["regret"]["value"] == certificate.rows[1].regret.value
    assert record["exponents"]["S"]["low"] == certificate.exponents["S"].low
    assert list(tmp_path.iterdir()) == [tmp_path / "certificate.json"]


def test_a_spent_budget_lists_what_was_left_out(small):
    certificate = certify(
        baselines.random(), family="scaled", key=KEY, n_seeds=8, budget_s=1e-9, progress=False
    )
    assert len(certificate.rows) + len(certificate.not_run) == 4
    assert certificate.not_run
    assert "not run: scaled, d = 2" in certificate.table()


def test_the_gap_sweep_divides_by_d_and_the_root_of_the_variance():
    sigma = np.full(60, 0.5)
    sweep = gap_sweep(
        baselines.random(), sigma, 2, x=(0.75, 1.25), n_seeds=64, key=KEY, level=0.999, progress=False
    )
    # Random play loses gap * sum sigma^2 per coordinate: x in units of d sqrt(S).
    for x, estimate in zip(sweep.x, sweep.regret, strict=True):
        assert estimate.low < x < estimate.high
    assert sweep.worst == sweep.regret[1]
    assert sweep.bounds[1] == pytest.approx(0.53, abs=0.02)


def test_the_weak_adversary_is_judged_by_frequency():
    case = least_loaded_case(20_000, 0.1, 10_000.0)
    assert case.eta == 0.1
    assert case.bounds["least_loaded"].value > 0.0


def test_every_family_has_a_bound_that_says_something():
    for name in FAMILIES:
        for case in cases(name):
            if case.x is None:
                assert max(bound.value for bound in case.bounds.values()) > 0.0, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_seeds": 2}, "n_seeds must be >= 3, got 2"),
        ({"level": 95}, r"level must be in \(0, 1\), got 95"),
        ({"family": "cube"}, "family must be one of .*, got 'cube'"),
        ({"family": []}, "family must name at least one family"),
        ({"family": 3}, 'family must be "all" or names of families, got 3'),
        ({"budget_s": 0}, "budget_s must be finite and > 0, got 0"),
        ({"algorithm": "OFUL"}, "algorithm must be an Algorithm"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(arguments, message):
    algorithm = arguments.pop("algorithm", baselines.random())
    with pytest.raises((ValueError, TypeError), match=message):
        certify(algorithm, key=KEY, **arguments)


@pytest.mark.parametrize("x", [2.0, 32.0])
def test_bounds_hold_at_gaps_beyond_the_normal_form(x):
    """In the first round nothing is known: it alone costs d gap sigma^2, however large the gap."""
    sweep = gap_sweep(baselines.greedy(), np.ones(16), 4, x=[x], key=KEY, n_seeds=40, progress=False)
    assert x / 16 <= sweep.bounds[0] <= sweep.regret[0].high
    caught = gap_sweep(baselines.oracle(), np.ones(16), 4, x=[x], key=KEY, n_seeds=3, progress=False)
    assert caught.regret[0].high < caught.bounds[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sigma": np.zeros(8)}, "sigma must hold a positive entry, got only zeros"),
        ({"x": 1.0}, "x must be a sequence of gaps, got 1.0"),
        ({"x": []}, "x must hold at least one gap"),
        ({"x": [-1.0]}, "x must be finite and > 0, got -1.0"),
        ({"level": 95}, r"level must be in \(0, 1\), got 95"),
        ({"d": 0}, "d must be >= 1, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_of_a_sweep_are_named(arguments, message):
    settings = {"sigma": np.ones(8), "d": 2, "key": KEY, "n_seeds": 3, **arguments}
    with pytest.raises((ValueError, TypeError), match=message):
        gap_sweep(baselines.random(), **settings)


def test_a_family_that_does_not_suit_the_learner_is_refused_before_any_case_is_played():
    ahead = baselines.random()._replace(needs_sigma="upfront", name="ahead")
    with pytest.raises(ValueError, match="ahead needs the whole sequence before the first round"):
        certify(ahead, family=["hypercube", "least_loaded"], key=KEY)


def test_the_table_names_the_worst_gap(small):
    certificate = certify(baselines.random(), family="scaled", key=KEY, n_seeds=8, progress=False)
    assert "worst gap at d = 2, S = 60: x = 1.25, 1.2" in certificate.table()


def test_a_learner_without_a_family_it_can_play_is_refused():
    def init(key, spec):
        raise ValueError("needs listed actions")

    picky = Algorithm(init, no_draw, no_draw, "never", "picky", no_draw)
    with pytest.raises(ValueError, match="needs listed actions"):
        certify(picky, family="hypercube", key=KEY)
