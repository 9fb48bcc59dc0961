"""experiments/claims.py declares the claims of the spec, decides by intervals, and holds at tiny sizes."""

import math
from dataclasses import replace
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest

harness = pytest.importorskip("tenfold_tools.claims", reason="the experiments run in the monorepo's workshop")
pytest.importorskip("matplotlib", reason="the experiments draw figures")

from tenfold_tools.claims_runner import load_experiments  # noqa: E402
from tenfold_tools.figures import render  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
Verdict = harness.Verdict


@pytest.fixture(autouse=True, scope="module")
def without_shape_checks():
    """A part of the time here goes into the runtime check of annotations; other tests have it on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def module():
    """The file, loaded as the runner does."""
    return load_experiments(EXPERIMENTS / "claims.py", "linbandit_claims")


@pytest.fixture(scope="module")
def claims(module):
    """The claims by id."""
    return {value.id: value for value in vars(module).values() if isinstance(value, harness.Claim)}


def uneven_of(instance_class):
    """Makes two copies of which the second has twice the gap."""

    def make(*sizes):
        instance = instance_class(*sizes)
        instance._gap = instance._gap * np.array([1.0, 2.0])
        return instance

    return make


@pytest.fixture
def cpu(module):
    """A stage for parts that are not a whole claim."""
    with module.stage(harness.Run("quick", (7,))) as on:
        yield on


def play(claim):
    measurement = claim(harness.Run("quick", claim.seeds_at("quick")))
    assert all("<svg" in render(figure)["light"] for figure in measurement.figures) and measurement.figures
    assert measurement.configurations and measurement.note
    return measurement


def sized(table, *fields, **more):
    """An entry of a table of sizes with other values."""
    return type(table["quick"])(*fields, **more)


def values(measurement):
    return {number.name: number.value for number in measurement.numbers}


# ------------------------------------------------------------------------------------------- what is declared


def test_all_nine_claims_are_required_from_quick_and_have_keys_of_their_own(claims):
    assert list(claims) == ["C1", "C6", "C2", "C3", "C4", "C5", "C7", "C8", "C9"]
    assert {claim.required_from for claim in claims.values()} == {"quick"}
    keys = {name: claim.seeds_at("laptop") for name, claim in claims.items()}
    assert keys.pop("C6") == keys["C1"]  # the same runs
    assert len(set(keys.values())) == 8 and all(len(seeds) == 1 for seeds in keys.values())


def test_laptop_sizes_are_at_least_those_of_the_spec(module):
    zoo = module.zoo
    cube = module.CUBE["laptop"]
    assert (cube.K, cube.d, cube.runs) == (2000, 4, 2000)
    assert {*cube.learners, *cube.slow} == set(zoo.ZOO)
    assert module.COPIES["laptop"].B == (8, 39)
    assert {(r.shape, r.K, r.d) for r in module.peeled.ROWS["laptop"]} >= {("constant", 2**15, 8)}
    assert all(row.runs >= 128 for row in module.peeled.ROWS["laptop"])
    rates, tight = module.RATES["laptop"], module.TIGHT["laptop"]
    assert rates.dims == (2, 4, 8, 12) and max(rates.S) / min(rates.S) >= 30 and rates.runs == 400
    assert (tight.K, tight.dims, tight.runs) == (4000, (4, 8), 1000)
    assert module.SIGN_RULE_RUNS["laptop"] == 100_000
    assert module.WEAK["laptop"].games[0] == ("least_loaded", 100_000, 0.05, 300, 0.25)
    strong, adaptive = module.STRONG["laptop"], module.ADAPTIVE["laptop"]
    assert (strong.d, strong.K, strong.runs) == (6, 400, 400)
    assert (adaptive.d, adaptive.actions, adaptive.K, adaptive.runs) == (6, 10, 2000, 64)
    assert adaptive.levels == (1.0, 0.3, 0.1, 0.03)


def test_the_full_scale_is_not_run_on_a_cpu(claims):
    for claim in claims.values():
        with pytest.raises(harness.NotRun, match="GPU"):
            claim(harness.Run("full", claim.seeds_at("full")))


def test_theorem_41_is_not_zero_where_the_spec_says(module):
    by_label = {row.label: module.peeled.bounds(row) for row in module.peeled.ROWS["laptop"]}
    assert by_label["constant, d 8, K 32768"]["theorem"] == pytest.approx(1.1547, abs=5e-5)
    assert [found["theorem"] for found in by_label.values()].count(0.0) == len(by_label) - 1


# ------------------------------------------------------------------------------------------------- the claims


def test_the_hypercube_is_judged_against_lemma_43(module, claims, monkeypatch):
    tiny = sized(module.CUBE, 64, 2, 300, ("random", "worst"))
    monkeypatch.setitem(module.CUBE, "quick", tiny)
    found = play(claims["C1"])
    assert values(found)["regret / Lemma 4.3, worst"] == pytest.approx(4, abs=1e-9)
    assert values(found)["regret / Lemma 4.3, random"] == pytest.approx(2, abs=0.05)  # 300 runs: s.e. 0.01
    assert len(found.criteria) == 4
    assert [c.verdict for c in found.criteria if "worst" in c.text] == [Verdict.PASS] * 2


def test_lucky_copies_are_counted(module, claims, monkeypatch):
    monkeypatch.setitem(module.CUBE, "quick", sized(module.CUBE, 64, 2, 300, ("random", "worst")))
    game = sized(module.COPIES, (3,), 20, 2, 50, ("worst",), ("random", "worst"))
    monkeypatch.setitem(module.COPIES, "quick", game)
    found = play(claims["C6"])
    assert values(found)["P(regret >= bound / 2), worst"] == 1.0
    assert values(found)["P(all 3 copies lucky), worst"] == 0.0
    assert found.verdict == Verdict.PASS


def test_peeling_bounds_of_zero_decide_nothing(module, claims, monkeypatch):
    row = module.peeled.Row("3-level", 96, 3, 20, ("random",))
    monkeypatch.setitem(module.peeled.ROWS, "quick", (row,))
    found = play(claims["C2"])
    bounds = {name: value for name, value in values(found).items() if name.startswith("bound ")}
    assert len(bounds) == 4 and bounds["bound theorem, 3-level, d 3, K 96"] == 0.0
    assert len(found.criteria) == sum(bound > 0 for bound in bounds.values()) < 4
    assert values(found)["bounds that are 0 here"] == 4 - len(found.criteria)


@pytest.mark.slow
def test_rates_are_fitted_along_d_and_s_and_k(module, claims, monkeypatch):
    tiny = sized(module.RATES, 32, (1, 2), (8, 32), 40, {"greedy": 2})
    monkeypatch.setitem(module.RATES, "quick", tiny)
    found = play(claims["C3"])
    exponents = {name: value for name, value in values(found).items() if name.startswith("exponent")}
    assert list(exponents) == ["exponent of S", "exponent of d", "exponent of K"]
    # one learner, one gap for all S, the same standardised noise: exactly the square root
    assert exponents["exponent of S"] == pytest.approx(0.5, abs=0.02)
    assert len(found.criteria) == 2
    assert {entry["learner"] for entry in found.configurations} == {"greedy"}


def test_tightness_is_reported_at_quick_and_required_at_laptop(module, claims, monkeypatch):
    tiny = sized(module.TIGHT, 32, (2,), 40, {"greedy": 2, "Bayes-UCB": 0}, batches=2)
    monkeypatch.setitem(module.TIGHT, "quick", tiny)
    found = play(claims["C4"])
    assert [c.text.endswith("> 1") for c in found.criteria] == [True, True]
    assert all(entry["runs"] == 80 for entry in found.configurations)
    monkeypatch.setitem(module.TIGHT, "laptop", replace(tiny, learners={"greedy": 2, "Bayes-UCB": 2}))
    monkeypatch.setattr(module.zoo, "learner", lambda _: module.greedy())
    judged = claims["C4"](harness.Run("laptop", (400,)))
    assert sum("< 1.5" in criterion.text for criterion in judged.criteria) == 2


def test_the_sign_rule_is_compared_with_the_exact_number(module, claims, monkeypatch):
    monkeypatch.setitem(module.SIGN_RULE_RUNS, "quick", 400)
    found = play(claims["C5"])
    assert values(found)["LB_seq"] == pytest.approx(9.343680781696, abs=1e-9)
    assert found.verdict == Verdict.PASS
    monkeypatch.setattr(module, "LB_SEQ_D1", 20.0)
    assert play(claims["C5"]).criteria[0].verdict == Verdict.FAIL


@pytest.mark.slow  # five compiled programs
def test_the_weak_adversary_breaks_one_and_not_many(module, claims, monkeypatch):
    tiny = sized(module.WEAK, 200, 1, 40, (("least_loaded", 2000, 0.2, 25, 0.5),), False)
    monkeypatch.setitem(module.WEAK, "quick", tiny)
    found = play(claims["C7"])
    assert values(found)["single instance broken, stops at S/100"] == 1.0
    assert any(
        name.startswith("bound broken, least loaded") and value == 0 for name, value in values(found).items()
    )
    assert len(found.criteria) == 4


def test_a_bound_of_zero_is_no_pass(module, claims, monkeypatch):
    game = module.weak_adversary.Game("least_loaded", 2000, 0.2, 3, 0.001)
    one = np.ones(3)
    nothing = module.weak_adversary.Broken("none", one, one, 0 * one, 1, one)
    monkeypatch.setattr(module.weak_adversary, "against_one", lambda *_: nothing)
    monkeypatch.setattr(module.weak_adversary, "against_many", lambda *_: nothing)
    monkeypatch.setattr(module.weak_adversary, "games", lambda _: [game])
    with pytest.raises(harness.NotRun, match="the bound is 0"):
        claims["C7"](harness.Run("quick", (700,)))


@pytest.mark.slow  # three compiled programs with spans
def test_the_strong_adversary_and_the_fixed_set_leave_little_regret(module, claims, monkeypatch):
    monkeypatch.setitem(module.STRONG, "quick", sized(module.STRONG, 2, 60, 4, 12, ("span explorer",)))
    found = play(claims["C8"])
    assert values(found)["most quiet rounds, strong adversary"] == 2
    assert values(found)["smallest S / K, fixed set"] == pytest.approx(58 / 60)
    assert values(found)["largest regret, fixed set"] <= 4
    assert len(found.criteria) == 9


@pytest.mark.parametrize("digits", [(), pytest.param(("random",), marks=pytest.mark.slow)])
def test_learners_are_compared_at_several_levels_of_noise(module, claims, monkeypatch, digits):
    tiny = sized(module.ADAPTIVE, 2, 3, 40, (1.0, 0.1), 6, ("random",), ("random",), digits, 3)
    monkeypatch.setitem(module.ADAPTIVE, "quick", tiny)
    found = play(claims["C9"])
    numbers = values(found)
    # random play does not look at rewards: the same regret at every level, about the same in both halves
    assert numbers["regret at sigma 1 / at 0.1, random"] == pytest.approx(1, abs=1e-9)
    assert numbers["regret in the second half / in the first, random, sigma 1"] == pytest.approx(1, abs=0.5)
    assert any("digits" in name for name in numbers) == bool(digits)
    assert found.verdict == Verdict.FAIL


# ------------------------------------------------------------------------------------------------- the parts


def test_copies_move_in_turn_and_keep_their_own_regret(module, cpu, monkeypatch):
    names = module.lucky_copies.__globals__
    game = sized(module.COPIES, (2,), 5, 2, 6, (), ())
    gap = math.sqrt(1 / (96 * 5))

    regret = names["regret_of_copies"](cpu, module.zoo.learner("worst"), 2, game)
    np.testing.assert_allclose(
        regret, np.full((6, 2), 5 * 2 * 2 * gap), rtol=1e-12
    )  # K rounds, d signs, 2 gap
    with monkeypatch.context() as patch:
        patch.setitem(names, "HypercubeCopies", uneven_of(names["HypercubeCopies"]))
        regret = names["regret_of_copies"](cpu, module.zoo.learner("worst"), 2, game)
    np.testing.assert_allclose(regret, np.tile([20 * gap, 40 * gap], (6, 1)), rtol=1e-12)


def test_the_worst_gap_is_chosen_on_runs_that_are_not_measured(module, cpu, monkeypatch):
    seen = []

    class Result:
        def __init__(self, stream, gap):
            self.regret = np.full(4, 10.0 * stream + gap)

    def spy(self, algorithm, instance, *, runs, stream=0):
        seen.append((stream, float(instance.gap[0])))
        return Result(stream, float(instance.gap[0]))

    monkeypatch.setattr(type(cpu), "play", spy)
    point = module.rates.Point(1, 16, 16.0, 16)
    worst = module.rates.worst_gap(cpu, "greedy", point, 4, gaps=(0.5, 2.0, 4.5))
    assert list(worst.profile) == [0.5, 2.0]  # x = 4.5 would have theta longer than 1
    assert worst.gap == 2.0 and worst.regret[0] == pytest.approx(0.5)
    assert [stream for stream, _ in seen] == [1, 1, 0]


def test_digits_have_unit_norm_and_rewards_without_noise_are_means(module, cpu):
    instance = module.DigitContexts(4, horizon=3)
    theta = instance.init(jax.random.key(0))
    drawn = instance.draw(jax.random.key(1), ())
    shown = instance.decision_set(theta, 0, 0.0, drawn)
    assert instance.dim == 61 and shown.actions.shape == (4, 61)
    np.testing.assert_allclose(np.linalg.norm(shown.actions, axis=1), 1, rtol=1e-12)
    paid = instance.reward(theta, shown, 2, np.float64(0), drawn)
    assert float(paid.reward) == float(paid.mean) <= float(paid.best_mean)
    assert float(paid.mean) == pytest.approx(float(np.asarray(shown.actions)[2] @ np.asarray(theta)))


def test_runs_are_shared_by_the_devices_of_a_mesh(module, monkeypatch):
    asked = {}
    cpus = tuple(jax.devices("cpu"))[:1] * 2
    on = module.Stage("full", 1, cpus)
    monkeypatch.setitem(type(on).play.__globals__, "Mesh", lambda devices, names: (len(devices), names))
    monkeypatch.setitem(type(on).play.__globals__, "NamedSharding", lambda mesh, _: mesh)
    monkeypatch.setitem(type(on).play.__globals__, "simulate", lambda *_, **options: asked.update(options))
    on.play(None, None, runs=8)
    assert asked["sharding"] == (2, ("runs",)) and asked["n_seeds"] == 8
    on.play(None, None, runs=7)
    assert asked["sharding"] is None
