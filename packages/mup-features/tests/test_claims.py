"""experiments/claims.py declares the claims of the spec, decides by intervals, and plays at toy sizes."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

harness = pytest.importorskip("tenfold_tools.claims", reason="the experiments run in the monorepo's workshop")
pytest.importorskip("matplotlib", reason="the experiments draw figures")
torch = pytest.importorskip("torch", reason="the experiments train networks in torch")

from matplotlib.figure import Figure as Canvas  # noqa: E402

from tenfold_tools.claims_runner import load_experiments  # noqa: E402

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
Verdict = harness.Verdict


@pytest.fixture(scope="module")
def module():
    """The file, loaded as the runner does."""
    return load_experiments(EXPERIMENTS / "claims.py", "mup_features_claims")


@pytest.fixture(scope="module")
def claims(module):
    """The claims by id."""
    return {value.id: value for value in vars(module).values() if isinstance(value, harness.Claim)}


@pytest.fixture
def sized(module, monkeypatch):
    """Sets the entry of a table of sizes: the fields of another scale's entry with other values."""

    def change(table, scale, like="quick", **values):
        entries = getattr(module, table)
        values = {"gpu": False} | values
        monkeypatch.setitem(entries, scale, replace(entries[like], **values))

    return change


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder with 40 random images in CIFAR-10's binary form."""
    records = np.random.default_rng(0).integers(0, 256, (40, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(40) % 8
    records.tofile(tmp_path / "data_batch_1.bin")
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    return records


def play(claim, scale="quick", count=None):
    measurement = claim(harness.Run(scale, claim.seeds_at(scale, count)))
    for figure in measurement.figures:
        canvas = Canvas()
        figure.draw(canvas)
        assert all(axes.has_data() for axes in canvas.axes) and canvas.axes
    assert measurement.configurations and measurement.note
    return measurement


def values(measurement):
    return {number.name: number.value for number in measurement.numbers}


def verdicts(measurement, *words):
    return [c.verdict for c in measurement.criteria if all(word in c.text for word in words)]


# ------------------------------------------------------------------------------------------- what is declared


def test_all_nine_claims_are_there_and_only_transfer_is_not_required(claims):
    assert list(claims) == [f"C{k}" for k in range(1, 10)]
    assert {name for name, claim in claims.items() if claim.required_from is None} == {"C8"}
    assert {claims[f"C{k}"].required_from for k in (1, 2, 3, 4, 5, 6, 7, 9)} == {"quick"}


def test_seeds_are_at_least_those_of_the_spec_and_shared_by_the_first_three_claims_alone(claims):
    wanted = {"C1": (3, 5, 5), "C2": (3, 5, 5), "C3": (3, 5, 5), "C5": (1, 5, 5), "C8": (1, 3, 1)}
    for name, counts in wanted.items():
        for scale, count in zip(harness.SCALES, counts, strict=True):
            assert len(claims[name].seeds_at(scale)) >= count
    first = {name: claim.first_seed for name, claim in claims.items()}
    assert first.pop("C2") == first.pop("C3") == first["C1"]
    assert len(set(first.values())) == 7


def test_sizes_are_at_least_those_of_the_spec(module):
    schemes, minimum, transfer = module.SCHEMES, module.MINIMUM, module.TRANSFER
    assert schemes["quick"].widths == (64, 256, 512)
    assert max(schemes["laptop"].widths) == 1024 and schemes["laptop"].limit
    assert {(s.depth, s.steps) for s in schemes.values()} == {(3, 200)}
    assert (min(schemes["full"].widths), max(schemes["full"].widths)) == (64, 16384)
    assert schemes["full"].data == minimum["full"].data == "cifar"
    quick, laptop, full = (module.DIVERSITY[scale] for scale in harness.SCALES)
    assert (quick.classes * quick.per_class, quick.steps, quick.samples, quick.replicas) == (8, 8, 8192, 4)
    # a departure: the spec has 16384 points at laptop, which takes more than ten minutes with the others
    assert (laptop.classes * laptop.per_class, laptop.steps, laptop.samples) == (32, 50, 8192)
    assert [name for name, _ in laptop.judged] == ["tanh", "silu"]
    assert [name for name, _ in laptop.reported] == ["sigmoid", "relu"]
    assert full.samples == 2**20 and full.accelerators == 2 and full.judged == laptop.judged
    assert minimum["quick"].widths == (256,) and minimum["laptop"].widths == (256, 1024)
    assert {m.steps for m in minimum.values()} == {1000}
    convergence, kernel = module.CONVERGENCE, module.KERNEL
    assert [max(convergence[scale].widths) for scale in harness.SCALES] == [256, 512, 8192]
    assert convergence["quick"].seeds >= 24 and convergence["laptop"].seeds >= 64
    # a departure: the spec has width 2048 at quick
    assert [max(kernel[scale].widths) for scale in harness.SCALES] == [1024, 4096, 16384]
    assert kernel["quick"].data == "two points" and kernel["quick"].seeds >= 8
    assert "quick" not in transfer and transfer["laptop"].widths == (64, 256, 1024)
    assert len(transfer["laptop"].lrs) == 9
    assert (min(transfer["full"].widths), max(transfer["full"].widths)) == (128, 4096)
    assert transfer["full"].task == "text"


@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"])
def test_the_full_scale_says_that_it_needs_a_gpu(claims, name):
    with pytest.raises(harness.NotRun, match="needs a GPU, --scale full --device cuda"):
        claims[name](harness.Run("full", claims[name].seeds_at("full")))


def test_transfer_does_not_run_at_quick(claims):
    with pytest.raises(harness.NotRun, match="runs from --scale laptop"):
        claims["C8"](harness.Run("quick", (800, 801, 802)))


def test_without_cifar_the_reason_names_the_variable(claims, sized, monkeypatch, tmp_path):
    monkeypatch.delenv("CIFAR10_DIR", raising=False)
    sized("SCHEMES", "full", like="full")
    sized("MINIMUM", "full", like="full")
    for name in ("C1", "C5"):
        with pytest.raises(harness.NotRun, match="set CIFAR10_DIR"):
            claims[name](harness.Run("full", (0, 1, 2)))
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    with pytest.raises(harness.NotRun, match=r"data_batch_1\.bin"):
        claims["C1"](harness.Run("full", (0, 1, 2)))


def test_too_few_accelerators_are_said_to_be_so(module, claims, sized, monkeypatch):
    sized("DIVERSITY", "full", like="full")
    run = harness.Run("full", (400,))
    with pytest.raises(harness.NotRun, match="needs 2 accelerators that jax can use, found 1 of kind cpu"):
        claims["C4"](run)
    gpu = SimpleNamespace(platform="gpu")
    monkeypatch.setattr(module.jax, "devices", lambda: [gpu, gpu])
    assert module.accelerators(2) == [gpu, gpu]
    with pytest.raises(harness.NotRun, match="needs 3 accelerators that jax can use, found 2 of kind gpu"):
        module.accelerators(3)


# ------------------------------------------------------------------------------------- features of schemes


SMALL = {"widths": (32, 128), "steps": 100}


def test_features_move_under_mup_and_freeze_under_sp_and_ntp(module, claims, sized):
    sized("SCHEMES", "quick", **SMALL)
    found = play(claims["C1"])
    assert verdicts(found, "mup") == [Verdict.PASS]
    slopes = {name: values(found)[f"slope of log change over log n, {name}"] for name in ("sp", "ntp")}
    assert len(found.criteria) == 3
    assert all(-0.65 < slope < -0.35 for slope in slopes.values())
    # three measures over width would not tell when features moved: three figures over steps do
    assert len(found.figures) == 4
    kernel = module.scheme_measures.at(harness.Run("quick", (0, 1, 2, 3, 4)), module.SCHEMES["quick"])
    moved = {scheme: kernel.courses[scheme, 128].kernel_change[-1].min() for scheme in ("ntp", "mup")}
    assert moved["mup"] > 3 * moved["ntp"]


def test_sp_in_place_of_mup_fails_c1(module, claims, sized, monkeypatch):
    sized("SCHEMES", "quick", **SMALL | {"steps": 99})
    train = module.scheme_measures.train
    sp = {"mup": "sp"}
    monkeypatch.setattr(
        module.scheme_measures, "train", lambda name, *rest, **more: train(sp.get(name, name), *rest, **more)
    )
    found = play(claims["C1"])
    assert verdicts(found, "mup") == [Verdict.FAIL]
    assert verdicts(found, "change over log n, sp") != [Verdict.FAIL]


def test_frozen_features_of_ip_are_not_diverse(module, claims, sized):
    sized("SCHEMES", "quick", **SMALL)
    found = play(claims["C2"])
    assert len(found.criteria) == 3 and found.verdict == Verdict.PASS
    assert values(found)["lambda_min, mup, width 128"] > 100 * values(found)["lambda_min, ip, width 128"]


def test_schemes_that_are_alike_fail_c2(module, claims, sized, monkeypatch):
    sized("SCHEMES", "quick", **SMALL | {"steps": 98})
    train = module.scheme_measures.train
    monkeypatch.setattr(module.scheme_measures, "train", lambda _, *rest, **more: train("mup", *rest, **more))
    found = play(claims["C2"])
    assert [c.verdict for c in found.criteria] == [Verdict.FAIL] * 3


def test_the_joint_gram_of_mup_is_compared_with_every_other_scheme(claims, sized, module, monkeypatch):
    sized("SCHEMES", "quick", widths=(64, 256, 264), steps=4)
    found = play(claims["C3"], count=3)
    # four steps move nothing far; what counts here is what is compared with what
    assert len(verdicts(found, "joint lambda_min of muP over")) == 3
    assert len(verdicts(found, "growth from width 256 to 264")) == 3
    ratios = [n for n in found.numbers if n.name == "log10 of joint lambda_min of muP over sp"]
    made = module.scheme_measures.at(harness.Run("quick", (0, 1, 2)), module.SCHEMES["quick"])
    assert ratios[0].value == pytest.approx(np.log10(made.joint["mup"][-1] / made.joint["sp"][-1]).mean())


@pytest.mark.slow  # compiles the limit
def test_cifar_and_the_limit_take_part_at_the_full_scale(module, claims, sized, images):
    sized("SCHEMES", "full", like="full", widths=(8, 16), steps=4, every=3, limit=(512, 2, 1e-1), depth=2)
    found = play(claims["C1"], "full", count=3)
    made = module.scheme_measures.at(harness.Run("full", (0, 1, 2)), module.SCHEMES["full"])
    assert list(made.steps) == [0, 3, 4]
    assert set(made.limits) == {"change", "lambda_min(K)", "joint lambda_min"}
    assert made.limit_course is not None and made.limit_course.change[-1, 0] == made.limits["change"] > 0
    assert len(found.criteria) == 3
    X, Y = module.load("cifar")
    assert X.shape == (32, 3072) and Y.shape == (32, 10)
    np.testing.assert_allclose(np.linalg.norm(X, axis=1), 1, rtol=1e-12)
    raw = images[:32, 1:].astype(float) / 1.0
    # the first four of each class are the first 32 records, class by class
    order = np.argsort(images[:32, 0], kind="stable")
    centred = raw[order] - raw.mean(axis=0)
    np.testing.assert_allclose(X, centred / np.linalg.norm(centred, axis=1, keepdims=True), rtol=1e-12)


# ------------------------------------------------------------------------------------------- limits, minima


@pytest.mark.slow  # compiles two sizes of the limit
def test_independence_in_the_limit_is_judged_with_its_bias(module, claims, sized, monkeypatch):
    sized("DIVERSITY", "quick", classes=3, steps=2, samples=512, depth=2, reported=(("relu", 1.0),))
    found = play(claims["C4"])
    assert found.verdict == Verdict.PASS
    assert len(found.criteria) == 2  # of tanh: the eigenvalues and their bias; ReLU is reported
    assert {"final loss, relu", "final loss, tanh"} <= set(values(found))


@pytest.mark.slow  # compiles the limit with its population on a mesh
def test_a_collapsed_limit_fails_c4(module, claims, sized, monkeypatch):
    used = []
    monkeypatch.setattr(module, "accelerators", lambda count: used.append(count) or module.jax.devices())
    sized("DIVERSITY", "full", classes=3, steps=2, samples=256, depth=2, accelerators=2)
    few = module.diversity.few_digits

    def twice(*sizes):
        X, Y = few(*sizes)
        return X[[0, 1, 0]], Y[[0, 1, 0]]

    monkeypatch.setattr(module.diversity, "few_digits", twice)
    with pytest.warns(UserWarning, match="equal rows"):
        found = play(claims["C4"], "full")
    assert used == [2]
    assert Verdict.PASS not in verdicts(found, "standard errors in every layer")


def test_coarse_measurements_give_no_verdict_but_refute_nothing(module):
    assert module.precise_enough(harness.Number("noise", 0.2), 0.1).verdict == Verdict.INCONCLUSIVE
    assert module.precise_enough(harness.Number("noise", math.nan), 0.1).verdict == Verdict.INCONCLUSIVE
    assert module.precise_enough(harness.Number("noise", 0.05), 0.1).verdict == Verdict.PASS


def test_the_certificate_holds_at_every_step_and_the_loss_is_judged_at_the_end(claims, sized):
    sized("MINIMUM", "quick", widths=(96,), steps=20)
    found = play(claims["C5"])
    assert verdicts(found, "bound over loss") == verdicts(found, "share of steps") == [Verdict.PASS]
    assert verdicts(found, "log10 of the loss") == [Verdict.FAIL]  # 20 steps do not reach 1e-6
    assert values(found)["smallest bound over loss, width 96"] >= 1


def test_a_bound_below_the_loss_or_none_at_all_fails_c5(module, claims, sized, monkeypatch):
    sized("MINIMUM", "quick", widths=(96,), steps=2)
    certificate = module.minima.global_min_certificate

    def halved(*arguments):
        made = certificate(*arguments)
        return SimpleNamespace(bound=0.5 * made.value, value=made.value, certifiable=True)

    monkeypatch.setattr(module.minima, "global_min_certificate", halved)
    assert verdicts(play(claims["C5"]), "bound over loss") == [Verdict.FAIL]
    monkeypatch.setattr(
        module.minima, "global_min_certificate", lambda *_: SimpleNamespace(certifiable=False)
    )
    assert verdicts(play(claims["C5"]), "share of steps") == [Verdict.FAIL]


def test_c5_takes_its_images_at_the_full_scale(claims, sized, images):
    sized("MINIMUM", "full", like="full", widths=(64, 96), steps=2)
    found = play(claims["C5"], "full", count=3)
    for width in (64, 96):
        assert len(verdicts(found, f"width {width}")) == 3
        assert verdicts(found, "share of steps", f"width {width}") == [Verdict.PASS]


@pytest.mark.slow  # compiles the limit
def test_networks_approach_the_limit_at_the_rate_of_the_spec(module, claims, sized, monkeypatch):
    sized("CONVERGENCE", "quick", widths=(16, 128), seeds=48, samples=1024)
    found = play(claims["C6"])
    assert values(found)["slope of log RMSE over log n"] == pytest.approx(-0.5, abs=0.15)
    assert values(found)["RMSE of f_T, width 16"] > values(found)["RMSE of f_T, width 128"]
    assert len(found.figures) == 3
    run = module.paths
    monkeypatch.setattr(module, "paths", lambda _, *rest, **more: run("ntp", *rest, **more))
    assert verdicts(play(claims["C6"]), "slope") == [Verdict.FAIL]  # NTP has another limit


@pytest.mark.slow  # networks of width 512
def test_wide_networks_follow_their_own_kernel(module, claims, sized, monkeypatch):
    sized("KERNEL", "quick", widths=(32, 512), seeds=12, steps=3)
    found = play(claims["C7"])
    assert verdicts(found, "other scheme's kernel") == [Verdict.PASS] * 2
    assert len(found.criteria) == 4
    for scheme in ("ntp", "sp"):
        # 1/2 in theory; a dozen networks of two widths leave about 0.1
        slope = values(found)[f"slope of the distance over width, {scheme}"]
        assert slope == pytest.approx(-0.5, abs=0.25)
    kernel = module.limiting_kernel
    monkeypatch.setattr(
        module,
        "limiting_kernel",
        lambda X, **more: kernel(
            X, **more | {"parametrization": "sp" if more["parametrization"] == "ntp" else "ntp"}
        ),
    )
    assert verdicts(play(claims["C7"]), "other scheme's kernel") == [Verdict.FAIL] * 2


def test_each_network_is_held_against_descent_from_its_own_outputs(module):
    rng = np.random.default_rng(0)
    X, Y, root = (rng.standard_normal((3, columns)) for columns in (4, 2, 3))
    theta, run = root @ root.T, harness.Run("laptop", (700,))
    size = replace(module.KERNEL["laptop"], widths=(8, 12), seeds=3, steps=4, depth=1, lr=0.3)
    kernels = {"ntp": theta, "sp": 2 * theta}
    found = module.from_kernels(run, size, kernels, X, Y)
    common = {"depth": 1, "lr": 0.3, "steps": 4, "reduction": "mean", "device": "cpu"}
    for scheme, name in product(kernels, kernels):
        left = np.linalg.matrix_power(np.eye(3) - 0.3 / 3 * kernels[name], 4)
        for row, width in enumerate(size.widths):
            made = module.paths(scheme, width, X, Y, seeds=module.own_seeds(run, row, 3), **common)
            for network, f in enumerate(made.f):
                distance = np.sqrt(((f[-1] - Y - left @ (f[0] - Y)) ** 2).mean())
                # sums in another order
                assert found[scheme][name][row, network] == pytest.approx(distance, rel=1e-12)


def test_the_interval_of_a_slope_resamples_the_networks_of_each_width_on_its_own(module):
    widths, rows = (16, 64, 256), np.random.default_rng(1).random((3, 7)) / np.array([[4.0], [8.0], [16.0]])
    rng = np.random.default_rng(0)
    slopes = []
    for _ in range(999):
        drawn = np.stack([row[rng.integers(0, 7, 7)] for row in rows])
        slopes.append(np.polyfit(np.log(widths), np.log(np.sqrt((drawn**2).mean(axis=1))), 1)[0])
    found = module.slope_of_rmse(widths, rows)
    assert (found.low, found.high) == pytest.approx(np.quantile(slopes, [0.025, 0.975]), rel=1e-9)
    rmse = np.sqrt((rows**2).mean(axis=1))
    assert found.value == pytest.approx(np.polyfit(np.log(widths), np.log(rmse), 1)[0], rel=1e-9)


@pytest.mark.slow  # kernels of 32 samples by quadrature
def test_kernels_of_digits_use_the_mean_over_samples(claims, sized):
    sized("KERNEL", "full", like="full", widths=(32, 256), seeds=3, steps=2)
    found = play(claims["C7"], "full")
    for scheme in ("ntp", "sp"):
        near, far = (
            values(found)[f"distance from the kernel's outputs, {scheme}, width {n}"] for n in (256, 32)
        )
        assert near < far < 0.2


# ------------------------------------------------------------------------------------ transfer and regimes


@pytest.mark.slow  # imports torch's compiler and trains 60 networks
def test_transfer_on_digits_yields_shifts_and_coordinate_checks(claims, sized):
    sized("TRANSFER", "laptop", like="laptop", widths=(64, 128), lrs=(2.0**-9, 2.0**-7, 2.0**-5), steps=3)
    found = play(claims["C8"], "laptop")
    assert len(found.criteria) == 2 and len(found.figures) == 4
    assert "Coordinate checks: mup" in found.note
    assert abs(values(found)["steepest slope of changes over width, mup"]) < 1


@pytest.mark.slow  # coordinate checks of two schemes
def test_standard_practice_in_place_of_mup_fails_c8(module, claims, sized, monkeypatch):
    lrs = tuple(2.0**-k for k in range(12, 5, -1))
    sized("TRANSFER", "laptop", like="laptop", widths=(64, 256), lrs=lrs, steps=1)

    def moving(width, lr, seed):
        return (math.log2(lr) + 8 + math.log2(width / 64)) ** 2 + 1e-3 * seed

    sweep = module.transfer_runs.lr_sweep
    monkeypatch.setattr(module.transfer_runs, "lr_sweep", lambda _, *grid: sweep(moving, *grid))
    found = play(claims["C8"], "laptop")
    assert values(found)["shift of the best rate in octaves, mup"] == pytest.approx(2)
    assert verdicts(found, "mup") == [Verdict.FAIL]
    assert verdicts(found, "sp_const") == [Verdict.PASS]


@pytest.mark.slow  # transformers of width 128
def test_the_transformer_on_text_runs_the_code_of_the_full_scale(module, claims, sized, monkeypatch):
    sized("TRANSFER", "full", like="full", widths=(128, 256), lrs=(2.0**-9, 2.0**-8, 2.0**-7), steps=2)
    held_out = module.transfer_runs.TASKS["text"].evaluation
    monkeypatch.setitem(held_out.__globals__, "EVALUATED", 8)  # 256 would be half of the time of this test
    assert held_out("cpu")[0].shape == (8, 128)
    found = play(claims["C8"], "full", count=1)
    assert values(found)["loss at the best rate, mup, width 256"] < 8
    assert len(found.figures) == 4


@pytest.mark.slow  # compiles the limit
def test_the_classifier_and_ip_are_as_the_theory_says(module, claims, monkeypatch):
    found = play(claims["C9"])
    assert found.verdict == Verdict.PASS
    assert values(found)["largest |f_2| over |y|, ip"] == 0
    monkeypatch.setitem(module.REGIMES, "ntp", 0.0)
    assert verdicts(play(claims["C9"]), "r of ntp") == [Verdict.FAIL]
