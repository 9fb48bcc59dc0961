"""Equal settings are one learner, however they are spelled, and its config names all of them."""

import numpy as np
import pytest

from linbandit_lowerbounds.algorithms.baselines import greedy
from linbandit_lowerbounds.algorithms.explorers import oful_guard
from linbandit_lowerbounds.algorithms.oful import oful
from linbandit_lowerbounds.algorithms.save import save


def test_settings_that_are_the_defaults_change_nothing():
    assert oful() is oful(delta=0.01) is oful(lam=1, delta=0.01) is oful(delta=0.01, lam=np.float64(1.0))
    assert oful() is not oful(delta=0.02)


def test_config_names_every_setting():
    """A resumed simulation must notice another default of another version."""
    assert oful(lam=2).config == (
        "oful(R=1.0, S_theta=1.0, X=1.0, delta=0.01, explore='enumerate', lam=2.0, radius='determinant', "
        "radius_scale=1.0)"
    )
    assert save(preset="practical").config.startswith("save(R=1.0, c=1.0, delta=0.01, explore=None, preset=")


def test_config_of_a_wrapper_holds_that_of_the_learner_inside():
    assert oful(delta=0.5).config in oful_guard(inner=oful(delta=0.5), K=100, d=2).config


def test_wrong_settings_raise_what_the_factory_says():
    with pytest.raises(TypeError, match="unexpected keyword argument 'lamda'"):
        oful(lamda=1.0)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'd'"):
        oful_guard(inner=oful(), K=10)
    with pytest.raises(TypeError, match="lam must be a real number"):
        oful(lam=np.ones(1))
    with pytest.raises(TypeError, match="oful takes keyword arguments only"):
        oful(0.1)


def test_constants_that_are_not_the_defaults_are_in_the_name():
    assert oful(delta=0.1, lam=2.0).name == "OFUL (delta 0.1, lam 2)"
    assert save(preset="practical", delta=0.1).name == "SAVE (practical, delta 0.1)"
    assert greedy(lam=2.0).name == "greedy (lam 2)"
    assert oful(delta=0.01).name == "OFUL"
