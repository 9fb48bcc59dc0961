"""experiments/claims.py declares the claims of the spec, and those without chance hold."""

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the experiments train torch models")
harness = pytest.importorskip("tenfold_tools.claims", reason="the experiments run in the monorepo's workshop")

from tenfold_tools.claims_runner import load_experiments  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def claims():
    """The claims by id, loaded as the runner does."""
    module = load_experiments(EXPERIMENTS / "claims.py", "mars_claims")
    found = [value for value in vars(module).values() if isinstance(value, harness.Claim)]
    return {claim.id: claim for claim in found}


def run(claim, scale="quick"):
    return claim(harness.Run(scale, claim.seeds_at(scale)))


def test_the_eight_claims_have_the_status_of_the_spec(claims):
    statuses = {name: claim.required_from for name, claim in claims.items()}
    assert statuses == {
        "R1": "quick",
        "R2": "quick",
        "R3": "quick",
        "R4": "quick",
        "R5": "laptop",
        "R6": "laptop",
        "R7": None,
        "R8": None,
    }


def test_the_claims_use_the_seed_counts_of_the_spec(claims):
    counts = {
        name: tuple(len(claim.seeds_at(scale)) for scale in ("quick", "laptop", "full"))
        for name, claim in claims.items()
    }
    assert counts["R1"] == counts["R2"] == counts["R5"] == (4, 10, 30)
    assert counts["R6"] == (3, 5, 20)
    assert counts["R7"][1:] == (2, 10)


def test_no_verdict_uses_the_seeds_of_the_pilot_or_of_the_selection(claims):
    for name, claim in claims.items():
        if claim.seeds is not None:
            assert min(claim.seeds_at("full")) > 9, name
    assert claims["R7"].seeds_at("full") == tuple(range(20, 30))


@pytest.mark.parametrize("name", ["R3", "R4"])
def test_claims_without_chance_pass(claims, name):
    measurement = run(claims[name])
    assert measurement.verdict == harness.Verdict.PASS, [str(c.text) for c in measurement.criteria]
    assert measurement.configurations
    assert len(measurement.figures) == 1


def test_the_tuned_comparison_is_not_run_at_quick_scale(claims):
    with pytest.raises(harness.NotRun, match="tunes every arm on a grid"):
        run(claims["R7"])
