"""Every cell of the tables of muP for real models (spec c2), as functions of m_in and m_out."""

from math import sqrt

import pytest

from mup_features.roles import Role
from mup_features.width_rules import tied_readout_multiplier, width_scales

M_IN, M_OUT = 4.0, 9.0
INPUT = Role("input", fan_out_mult=M_OUT)
HIDDEN = Role("hidden", fan_in_mult=M_IN, fan_out_mult=M_OUT)
OUTPUT = Role("output", fan_in_mult=M_IN)
BIAS = Role("input", fan_out_mult=M_OUT, matrix=False, scalable=False)
READOUT_BIAS = Role("input", matrix=False, scalable=False)

INIT_STD = {
    "mult": (1, 1 / 2, 1),
    "pure": (1, 1 / 2, 1 / 4),
    "symmetric": (1 / 3, 1 / 2, 1 / 2),
}
MULTIPLIER = {"mult": (1, 1, 1 / 4), "pure": (1, 1, 1), "symmetric": (3, 1, 1 / 2)}
RATE = {
    ("mult", "sgd"): (9, 9 / 4, 4),
    ("mult", "adam"): (1, 1 / 4, 1),
    ("mult", "adafactor"): (1, 1 / 2, 1),
    ("mult", "muon"): (1, 3 / 2, 1),
    ("pure", "sgd"): (9, 9 / 4, 1 / 4),
    ("pure", "adam"): (1, 1 / 4, 1 / 4),
    ("pure", "adafactor"): (1, 1 / 2, 1),
    ("pure", "muon"): (1, 3 / 2, 1 / 4),
    ("symmetric", "sgd"): (1, 9 / 4, 1),
    ("symmetric", "adam"): (1 / 3, 1 / 4, 1 / 2),
    ("symmetric", "adafactor"): (1, 1 / 2, 1),
    ("symmetric", "muon"): (1 / 3, 3 / 2, 1 / 2),
}
EPS = {"mult": (1 / 9, 1 / 9, 1 / 4), "pure": (1 / 9, 1 / 9, 1), "symmetric": (1 / 3, 1 / 9, 1 / 2)}
PLACES = {"input": (0, INPUT), "hidden": (1, HIDDEN), "output": (2, OUTPUT)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", INIT_STD)
def test_initial_sizes_multipliers_and_epsilon(form, place):
    column, role = PLACES[place]
    scales = width_scales(role, form=form)
    assert scales.init == pytest.approx(INIT_STD[form][column], rel=1e-15)
    assert scales.multiplier == pytest.approx(MULTIPLIER[form][column], rel=1e-15)
    assert scales.eps == pytest.approx(EPS[form][column], rel=1e-15)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("form", "optimizer"), RATE)
def test_learning_rates(form, optimizer, place):
    column, role = PLACES[place]
    same = {"adam": ("adam", "adamw", "sign")}.get(optimizer, (optimizer,))
    for name in same:
        scales = width_scales(role, form=form, optimizer=name)
        assert scales.lr == pytest.approx(RATE[form, optimizer][column], rel=1e-15)
        assert scales.lr * scales.weight_decay == pytest.approx(1.0, rel=1e-15)
        assert width_scales(role, form=form, optimizer=name, weight_decay_mode="raw").weight_decay == 1.0


@pytest.mark.parametrize("form", INIT_STD)
def test_biases_have_one_rate_in_every_form(form):
    for optimizer, rate in (("sgd", 9.0), ("adam", 1.0), ("sign", 1.0), ("adafactor", 1.0), ("muon", 1.0)):
        scales = width_scales(BIAS, form=form, optimizer=optimizer)
        assert (scales.init, scales.multiplier, scales.lr, scales.eps) == (1.0, 1.0, rate, 1 / 9)
        scales = width_scales(READOUT_BIAS, form=form, optimizer=optimizer)
        assert (scales.init, scales.multiplier, scales.lr, scales.eps) == (1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "sign", "adafactor"])
@pytest.mark.parametrize("form", INIT_STD)
def test_without_alignment_hidden_and_readout_learn_faster_by_the_root_of_the_fan_in(form, optimizer):
    for role, factor in ((INPUT, 1.0), (BIAS, 1.0), (HIDDEN, sqrt(M_IN)), (OUTPUT, sqrt(M_IN))):
        full = width_scales(role, form=form, optimizer=optimizer).lr
        assert width_scales(role, form=form, optimizer=optimizer, alignment="none").lr == pytest.approx(
            factor * full, rel=1e-15
        )
        half = width_scales(role, form=form, optimizer=optimizer, alignment=0.5).lr
        assert half == width_scales(role, form=form, optimizer=optimizer, alignment="none").lr


def test_muon_orthogonalises_matrices_only():
    kernel = Role("hidden", fan_in_mult=M_IN, fan_out_mult=M_OUT, matrix=False)
    assert width_scales(kernel, optimizer="muon").lr == width_scales(kernel, optimizer="adam").lr == 1 / 4
    assert width_scales(HIDDEN, optimizer="muon", alignment="none").lr == 3 / 2


@pytest.mark.parametrize("form", INIT_STD)
def test_where_no_multiplier_can_stand_the_weight_takes_all_of_it(form):
    readout = Role("output", fan_in_mult=M_IN, scalable=False)
    for optimizer in ("sgd", "adam"):
        assert width_scales(readout, form=form, optimizer=optimizer) == width_scales(
            OUTPUT, form="pure", optimizer=optimizer
        )
    embedding = Role("input", fan_out_mult=M_OUT, scalable=False)
    assert width_scales(embedding, form=form) == width_scales(INPUT, form="mult")


@pytest.mark.parametrize(
    ("form", "embedding", "readout"), [("mult", 1, 1 / 9), ("pure", 1, 1 / 9), ("symmetric", 3, 1 / 3)]
)
def test_a_tied_readout_has_a_multiplier_of_its_own(form, embedding, readout):
    role = Role("input", fan_out_mult=M_OUT, tied=True)
    scales = width_scales(role, form=form, optimizer="sgd")
    assert scales.multiplier == embedding
    assert tied_readout_multiplier(role, form) == pytest.approx(readout, rel=1e-15)
    # the readout sees base std / m and the rate eta / m of the table, whatever the form
    assert scales.init * tied_readout_multiplier(role, form) == pytest.approx(1 / M_OUT, rel=1e-15)
    assert scales.lr * tied_readout_multiplier(role, form) ** 2 == pytest.approx(1 / M_OUT, rel=1e-15)


def test_everything_is_one_at_base_width():
    for role in (Role("input"), Role("hidden"), Role("output"), Role("input", tied=True)):
        for form, optimizer in RATE:
            for alignment in ("full", "none"):
                scales = width_scales(role, form=form, optimizer=optimizer, alignment=alignment)
                assert {scales.init, scales.multiplier, scales.lr, scales.weight_decay, scales.eps} == {1.0}


@pytest.mark.parametrize(
    ("option", "rule"),
    [
        ({"form": "odd"}, "form must be one of"),
        ({"optimizer": "lion"}, "optimizer must be one of"),
        ({"weight_decay_mode": "none"}, "weight_decay_mode must be one of"),
        ({"alignment": "half"}, "alignment must be 'full', 'none' or a number"),
        ({"alignment": 0.4}, r"alignment must be 'full', 'none' or a number in \[0.5, 1\], got 0.4"),
    ],
)
def test_unknown_options_are_refused(option, rule):
    with pytest.raises(ValueError, match=rule):
        width_scales(HIDDEN, **option)


def test_only_an_embedding_is_tied():
    with pytest.raises(ValueError, match="kind must be 'input' for a tied embedding, got 'output'"):
        Role("output", tied=True)
