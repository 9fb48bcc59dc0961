"""Every row of the package's feature table has tests, and they exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FEATURES = {
    "hard instances of the paper as environments": (
        "test_hypercubes.py",
        "test_composites.py",
        "test_multi_instances.py",
    ),
    "variance adversaries with enforced information sets": ("test_adversaries.py", "test_environment.py"),
    "lower-bound evaluators in three tiers": ("test_bounds.py", "test_scaled_bound.py", "test_weak.py"),
    "numeric audit of each information-theoretic step": ("test_information.py", "test_proofs.py"),
    "heteroscedastic algorithms": ("test_save.py", "test_weighted.py", "test_ids.py"),
    "homoscedastic algorithms and the VOFUL membership test": (
        "test_oful.py",
        "test_suplinucb.py",
        "test_thompson.py",
        "test_baselines.py",
        "test_voful.py",
    ),
    "changing decision sets with masks": ("test_decision_sets.py", "test_faults.py"),
    "scan over rounds, vmap over seeds, sharded over devices": (
        "test_simulate.py::test_two_devices_equal_one",
        "test_simulate.py::test_a_run_does_not_depend_on_how_many_others_there_are",
    ),
    "exact block-sparse execution": (
        "test_save.py::test_blocks_equal_one_block",
        "test_composites.py::test_block_and_dense_mode_agree_on_groups_of_different_size",
    ),
    "certify, leak detection, gap sweep, plots": (
        "test_certify.py::test_a_learner_that_knows_the_key_is_caught",
        "test_plots.py",
    ),
    "Gymnasium single and vector environments": ("test_gym.py",),
    "learners of the proofs": ("test_explorers.py",),
    "anybody's objects, in a loop and by callback": ("test_object_loop.py", "test_object_callback.py"),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_has_its_tests(feature):
    for place in FEATURES[feature]:
        name, _, function = place.partition("::")
        source = (TESTS / name).read_text()
        assert re.search(rf"^def {function or 'test_'}", source, re.MULTILINE), place
