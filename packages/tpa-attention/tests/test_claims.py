"""experiments/claims.py declares the claims of the spec, decides as it says, and the cheap ones hold."""

import sys
from pathlib import Path

import jaxtyping
import pytest

torch = pytest.importorskip("torch", reason="the experiments build torch models")
harness = pytest.importorskip("tenfold_tools.claims", reason="the experiments run in the monorepo's workshop")

from tenfold_tools.claims_runner import load_experiments  # noqa: E402
from tenfold_tools.figures import render  # noqa: E402
from tenfold_tools.stats import Estimate  # noqa: E402
from tpa_attention import accounting  # noqa: E402
from tpa_attention.torch.blockwise import SCRATCH  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
Verdict = harness.Verdict


@pytest.fixture(autouse=True, scope="module")
def unchecked():
    """Without the runtime check of annotations, a third of the time here: tests of the layers have it on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def module():
    """The file, loaded as the runner does."""
    return load_experiments(EXPERIMENTS / "claims.py", "tpa_claims")


@pytest.fixture(scope="module")
def claims(module):
    """The claims by id."""
    return {value.id: value for value in vars(module).values() if isinstance(value, harness.Claim)}


def run(claim, scale="quick", seeds=None):
    return claim(harness.Run(scale, claim.seeds_at(scale) if seeds is None else seeds))


# ------------------------------------------------------------------------------------------- what is declared


def test_the_ten_claims_have_the_status_of_the_spec(claims):
    statuses = {name: claim.required_from for name, claim in claims.items()}
    exact = dict.fromkeys(("C1", "C2", "C3", "C4", "C5", "C9", "C10"), "quick")
    assert statuses == exact | {"C6": "laptop", "C7": "laptop", "C8": None}


def test_the_claims_use_the_seed_counts_of_the_spec(claims):
    counts = {
        name: tuple(len(claim.seeds_at(scale)) for scale in harness.SCALES)
        for name, claim in claims.items()
        if claim.seeds is not None
    }
    assert counts == {"C6": (1, 3, 5), "C8": (1, 2, 5)}


def test_no_verdict_uses_the_tuning_seed(module, claims):
    assert module.language.TUNING_SEED == 99
    assert 99 not in {*claims["C6"].seeds_at("full"), *claims["C8"].seeds_at("full")}


# -------------------------------------------------------------------------------------- claims without chance


@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C4", "C9", "C10"])
def test_claims_without_chance_pass(claims, name):
    measurement = run(claims[name])
    assert measurement.verdict == Verdict.PASS, [c.text for c in measurement.criteria]
    assert measurement.configurations
    assert all("<svg" in render(figure)["light"] for figure in measurement.figures) and measurement.figures


@pytest.mark.slow  # forty random shapes in two types
def test_decoding_is_exact_on_random_shapes(claims):
    measurement = run(claims["C5"])
    assert measurement.verdict == Verdict.PASS, [c.text for c in measurement.criteria]
    assert all("<svg" in render(figure)["dark"] for figure in measurement.figures)


def test_decoding_is_exact_with_empty_and_short_sequences(module):
    decoding = module.decoding
    call = decoding.Call(3, 2, 20, 5, 8, 16, (3, 2, 4), kv_only=False, lens=(0, 1, 17))
    factors = decoding.random_factors(call, torch.Generator().manual_seed(0))
    errors = decoding.errors(call, factors, torch.float64, "cpu")
    assert set(errors) == {"reference", "factors", "records"}
    assert max(errors.values()) < 1e-10  # the claim's own bound
    # the same call against another truth: the measurement is able to fail
    moved = factors._replace(bv=factors.bv + 1)
    assert (
        float((decoding.materialised(call, moved) - decoding.materialised(call, factors)).abs().max()) > 0.1
    )


def test_random_calls_cover_the_ranges_of_the_claim(module):
    generator = torch.Generator().manual_seed(0)
    calls = [module.decoding.random_call(generator) for _ in range(200)]
    assert {rank for call in calls for rank in call.ranks} == {1, 2, 3, 4}
    assert {0, 1} <= {length for call in calls for length in call.lens}
    assert {call.kv_only for call in calls} == {True, False}
    assert max(call.queries for call in calls) == 16
    assert all(len(call.lens) == call.batch and max(call.lens) <= call.tokens for call in calls)


def test_scratch_does_not_grow_with_the_cache(module):
    block = SCRATCH // 32  # tokens taken at a time with 32 heads; two blocks are alive at a time
    sizes = [module.decoding.scratch(32, 16, tokens, "cpu") for tokens in (2 * block, 6 * block)]
    assert sizes[0] == sizes[1] < 6 * block * 32 * 16 * 4 / 10


def test_the_memory_of_a_call_counts_what_is_alive_at_once(module):
    source = torch.ones(1000)

    def two_at_a_time():
        first = source * 2  # 4000 bytes
        first = first + 1  # 4000 more, before the old ones go
        return first.view(10, 100)[:5].sum()  # views are free, the sum is 4 bytes

    assert module.decoding.live_peak(two_at_a_time) == 8000
    assert module.decoding.live_peak(lambda: source.view(10, 100).T) == 0


# ---------------------------------------------------------------------------------------- C6 and C8: training


def test_arms_have_the_parameters_and_caches_of_the_design(module):
    language = module.language
    sizes = {
        arm.name: (accounting.params(arm.config), accounting.cache_numbers(arm.config))
        for arm in (*language.BASELINES, language.TPA, *language.OTHERS)
    }
    assert sizes == {
        "MHA, h 4": (65_536, 256),
        "MQA, h 7": (65_536, 64),
        "GQA, h 6, 2 KV heads": (65_536, 128),
        "TPA (4,1,1), h 8": (63_488, 80),
        "KV-only rank 1, h 6": (58_880, 76),
        "TPA (3,2,2), h 7": (63_616, 156),
        "TPA (4,1,1), h 8, init t6": (63_488, 80),
    }


def test_arms_of_a_seed_share_batches_and_embedding(module, monkeypatch):
    language, seen = module.language, []

    def look(model, optimizer, batches, **options):
        first = next(iter(batches))
        seen.append((model.model.embed_tokens.weight.detach().clone(), first, options["clip_norm"]))
        return [1.0]

    monkeypatch.setattr(language, "train", look)
    monkeypatch.setattr(language, "evaluate", lambda *_: (1.0, 0.0))
    text, length = language.data.stdlib_source(), language.Length(60, 1, "cpu")
    for arm, seed in ((language.MHA, 600), (language.TPA, 600), (language.MHA, 601)):
        language.train_model(arm, seed, text, length)
    (mha, batch, clip), (tpa, same, _), (other, different, _) = seen
    assert clip == 1.0
    assert torch.equal(mha, tpa) and not torch.equal(mha, other)
    assert torch.equal(batch[0], same[0]) and not torch.equal(batch[0], different[0])
    assert batch[0].shape == (16, 128)


def test_a_gpu_trains_as_many_models_at_a_time_as_there_are_cores(module, monkeypatch):
    count = module.language.side_by_side.worker_count
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [count("cuda", 56), count("cuda:1", 3), count("cpu", 56)] == [16, 3, 1]


@pytest.mark.slow  # two processes that import torch
def test_jobs_side_by_side_come_back_in_order_and_their_errors_too(module):
    language = module.language
    signs = [harness.Number("x", value, value - 1, value + 1) for value in (-3.0, 0.0, 3.0, -3.0)]
    jobs = [*((number,) for number in signs), (None,)]
    found = language.side_by_side.results(language.superiority, jobs, 2, language.THIS)
    assert [next(found) for _ in signs] == ["supported", "undecided", "not supported", "supported"]
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'high'"):
        next(found)
    assert "language" not in sys.modules


def losses(module, monkeypatch, level):
    """Training is replaced by `level(arm, seed)`."""
    language = module.language

    def fake(run, arms, seeds, length):
        return {
            (arm.name, seed): language.Trained(level(arm, seed), [3.0, 2.0, level(arm, seed)])
            for arm in arms
            for seed in seeds
        }

    monkeypatch.setattr(language, "train_all", fake)


@pytest.mark.parametrize(
    ("gap", "noise", "verdict"),
    [
        (-0.1, 0.01, Verdict.PASS),
        (0.03, 0.005, Verdict.PASS),  # worse, within the margin of 0.05
        (0.2, 0.01, Verdict.FAIL),
        (0.03, 0.1, Verdict.INCONCLUSIVE),
    ],
)
def test_training_is_judged_by_the_bound_of_the_paired_difference(
    module, claims, monkeypatch, gap, noise, verdict
):
    def level(arm, seed):
        return 2.0 + seed + (gap + noise * (seed - 601) if arm.mechanism == "tpa" else 0.0)

    losses(module, monkeypatch, level)
    measurement = run(claims["C6"], "laptop")
    assert measurement.verdict == verdict, [c.text for c in measurement.criteria]
    assert len(measurement.configurations) == 2 * 3
    assert ("MHA, h 4: supported" in measurement.note) == (gap < 0)


def test_one_sided_bounds_are_the_interval_at_ninety_percent(module):
    one_sided = module.compare_with_mha.__globals__["one_sided"]
    number = one_sided("x", [0.0, 1.0, 2.0])
    # t quantile 2.919986 at 0.95 with 2 degrees of freedom, standard error 1 / sqrt(3)
    assert number.high - 1.0 == pytest.approx(2.919986 / 3**0.5, abs=1e-6)
    assert 1.0 - number.low == pytest.approx(2.919986 / 3**0.5, abs=1e-6)


def test_the_whole_design_tunes_every_arm_on_the_tuning_seed_and_reports_every_run(
    module, claims, monkeypatch
):
    losses(module, monkeypatch, lambda arm, seed: 2.0 + abs(arm.lr - 1.5e-3) + 1e-3 * seed)
    measurement = run(claims["C6"], "full")
    tuning = [c for c in measurement.configurations if c["purpose"] == "tuning"]
    judging = [c for c in measurement.configurations if c["purpose"] == "judging"]
    assert {(c["seed"], c["lr"]) for c in tuning} == {(99, 1.5e-3), (99, 3e-3), (99, 6e-3)}
    assert {c["lr"] for c in judging} == {1.5e-3}
    numbers = {number.name: number for number in measurement.numbers}
    assert numbers["TPA (4,1,1), h 8, init t6 minus MHA, h 4"].value == pytest.approx(0.0)
    assert len(tuning) == 7 * 3 and len(judging) == 7 * 5
    assert all("<svg" in render(figure)["light"] for figure in measurement.figures)


def test_one_seed_of_training_decides_nothing(module, claims, monkeypatch):
    losses(module, monkeypatch, lambda *_: 2.0)
    with pytest.raises(harness.NotRun, match="one seed of 60 steps") as caught:
        run(claims["C6"])
    assert caught.value.measurement.criteria


def test_the_ablation_of_the_rank_is_not_run_at_quick_and_undecided_with_two_seeds(
    module, claims, monkeypatch
):
    losses(module, monkeypatch, lambda arm, seed: 3.0 - 0.1 * arm.ranks[1] + 1e-3 * seed)
    with pytest.raises(harness.NotRun, match="from --scale laptop"):
        run(claims["C8"])
    assert run(claims["C8"], "laptop").verdict == Verdict.INCONCLUSIVE
    assert run(claims["C8"], "full").verdict == Verdict.PASS


# -------------------------------------------------------------------------------------------------- C7: speed


def timings(module, monkeypatch, per_token):
    """Timing is replaced by seconds per token of each alternative."""
    speed = module.decode_speed

    def fake(tokens, repeats, device):
        rounds = [1.0 + 0.01 * (i % 3) for i in range(repeats)]
        seconds = {name: tuple(tokens * cost * r for r in rounds) for name, cost in per_token.items()}
        ratios = {}
        for name, cost in per_token.items():
            ratio = cost / per_token[speed.TPA]
            ratios[name] = Estimate(ratio, 0.99 * ratio, 1.01 * ratio)
        return speed.Length(tokens, seconds, ratios)

    monkeypatch.setattr(speed, "measure", fake)


@pytest.mark.parametrize(
    ("mha", "gqa", "verdict"),
    [(4e-7, 2e-7, Verdict.PASS), (2e-7, 2e-7, Verdict.FAIL), (4e-7, 1.2e-7, Verdict.FAIL)],
)
def test_speed_is_judged_at_32k_against_mha_and_gqa(module, claims, monkeypatch, mha, gqa, verdict):
    speed = module.decode_speed
    timings(module, monkeypatch, {speed.TPA: 1e-7, speed.MHA: mha, speed.GQA: gqa, speed.FOLDED: 1e-7})
    measurement = run(claims["C7"], "laptop")
    assert measurement.verdict == verdict, [c.text for c in measurement.criteria]
    assert [c["tokens"] for c in measurement.configurations] == [4096, 8192, 16384, 32768, 65536]
    with pytest.raises(harness.NotRun, match="judged at 32k") as caught:
        run(claims["C7"])
    assert not caught.value.measurement.criteria
    if verdict is Verdict.PASS:
        assert all("<svg" in render(figure)["light"] for figure in caught.value.measurement.figures)


def test_all_ways_to_decode_are_timed_and_give_heads_of_the_same_shape(module):
    calls = module.decode_speed.alternatives(64, "cpu")
    assert {call().numel() for call in calls.values()} == {32 * 64}
    length = module.decode_speed.measure(64, 3, "cpu")
    assert {len(seconds) for seconds in length.seconds.values()} == {3}
    assert length.ratios[module.decode_speed.TPA].value == 1.0


def test_slopes_are_fitted_round_by_round(module):
    speed = module.decode_speed
    lengths = [
        speed.Length(m, {speed.TPA: (1.0 + m, 2.0 + m), speed.MHA: (3.0 * m, 4.0 + 5.0 * m)}, {})
        for m in (10, 20, 40)
    ]
    assert speed.slope_difference(lengths, speed.MHA).value == pytest.approx((1 - 3 + 1 - 5) / 2)
    assert speed.slope(lengths, speed.TPA) == pytest.approx(1.0)
