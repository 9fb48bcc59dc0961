"""The byte-level transformer of the full scale, and what muP makes of it."""

from pathlib import Path

import pytest

pytest.importorskip("tenfold_tools.claims", reason="the experiments run in the monorepo's workshop")
torch = pytest.importorskip("torch")

from tenfold_tools.claims_runner import load_experiments  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.fixture(scope="module")
def runs():
    """transfer_runs.py, loaded as the runner would."""
    return load_experiments(EXPERIMENTS / "transfer_runs.py", "mup_features_transfer_runs")


@pytest.fixture
def text(runs):
    """The task on text."""
    return runs.TASKS["text"]


def test_no_byte_sees_a_later_one(text):
    model = text.model(32, 0, False)
    tokens = torch.arange(12).reshape(1, 12)
    before = model(tokens)
    tokens[0, 8] = 200
    after = model(tokens)
    assert torch.equal(before[0, :8], after[0, :8])
    assert not torch.allclose(before[0, 8:], after[0, 8:])


def test_attention_has_the_usual_scale_at_base_width_and_mups_elsewhere(text):
    scales = {
        (width, mup): text.model(width, 0, mup).blocks[0].scale
        for width in (32, 128)
        for mup in (False, True)
    }
    assert scales[128, True] == pytest.approx(scales[128, False]) == pytest.approx(32**-0.5)
    assert scales[32, False] == pytest.approx(8**-0.5)
    assert scales[32, True] == pytest.approx(32**0.5 / 8)


def test_mup_changes_nothing_at_base_width(runs, text):
    plain, none = runs.model_of(text, "sp_const", 128, 3)
    scaled, roles = runs.model_of(text, "mup", 128, 3)
    assert none is None and roles is not None
    tokens = torch.arange(8).reshape(1, 8)
    # attention_scale(32, 32) is sqrt(32)/32, the same as 1/sqrt(32) but for one rounding
    torch.testing.assert_close(plain(tokens), scaled(tokens), rtol=1e-5, atol=1e-5)


def test_roles_of_the_transformer_are_those_of_the_table(runs, text):
    _, roles = runs.model_of(text, "mup", 256, 0)
    kinds = {name: role.kind for name, role in roles.items()}
    assert kinds["tokens.weight"] == kinds["positions.weight"] == kinds["norm.weight"] == "input"
    assert kinds["readout.weight"] == "output"
    assert {kinds[f"blocks.1.{name}.weight"] for name in ("query", "mix", "up", "down")} == {"hidden"}
    assert kinds["blocks.0.before_network.weight"] == "input"


def test_batches_repeat_for_the_same_seed_and_step_and_targets_are_the_next_bytes(text):
    inputs, targets = text.draw("cpu", 3, 5, 7)
    again, _ = text.draw("cpu", 3, 5, 7)
    other, _ = text.draw("cpu", 3, 5, 8)
    assert torch.equal(inputs, again) and not torch.equal(inputs, other)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs.shape == (3, 128)


def test_a_width_that_the_heads_do_not_divide_is_refused(text):
    with pytest.raises(ValueError, match="multiple of 4 heads, got 30"):
        text.model(30, 0, False)


def test_building_models_leaves_the_global_generator_alone(text):
    state = torch.random.get_rng_state()
    text.model(32, 0, True)
    assert torch.equal(state, torch.random.get_rng_state())
