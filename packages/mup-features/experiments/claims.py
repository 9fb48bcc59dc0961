"""The claims of "Global Convergence and Rich Feature Learning ... under muP" (Chen et al. 2025), measured.

C1-C3  Features under SP, NTP, IP and muP over width: how far they move, how diverse they stay, and both.
C4     Theorem 4.5 in the limit itself: features of distinct inputs stay linearly independent.
C5     Corollary 4.6: training ends at a global minimum; the certificate holds at every step.
C6, C7 Finite networks approach the limits: muP's by sampling, those of NTP and SP by their kernels.
C8     The best learning rate does not move with width.
C9     The regime of every parametrization, and IP with three hidden layers.

Data are scikit-learn's digits, two points for C6 (and C7 at quick scale), at full scale CIFAR-10 for C1-C3
and C5 and the standard library's source for C8. Networks train in float64 by full-batch gradient descent, but
Adam in float32 in C8. The neighbours hold the parts: `sizes.py`, `data_sets.py` and `cifar.py`, `networks.py`
(real networks), `scheme_measures.py` (C1-C3), `diversity.py` (C4), `minima.py` (C5), `towards_limits.py` (C6,
C7), `tasks.py`, `transformer.py` and `transfer_runs.py` (C8), `charts.py`, `stage.py` (accelerators).
"""

from __future__ import annotations

from dataclasses import asdict

import charts
import diversity
import jax
import minima
import numpy as np
import scheme_measures
import transfer_runs
from data_sets import load
from diversity import precise_enough
from networks import paths
from sizes import CONVERGENCE, DIVERSITY, KERNEL, MINIMUM, SCHEMES, TRANSFER, at_scale
from stage import accelerators
from towards_limits import from_kernels, own_seeds, slope_of_rmse

from mup_features import classify
from mup_features.jax import InfiniteWidthMLP, limiting_kernel
from mup_features.jax.precision import float64
from tenfold_tools.claims import Measurement, Number, Run, above, below, claim, within

PAPER = "Chen et al. 2025 (arXiv 2503.09565)"
SCHEME_SEED = 0  # of C1, C2 and C3, which look at the same networks

# ----------------------------------------------------------------------------- features of four schemes


@claim(
    "C1",
    sentence="Features move by a share that does not fall with width under muP, and falls as 1/sqrt(n) under "
    "SP and NTP.",
    source=f"{PAPER}, section 5, feature change",
    required_from="quick",
    seeds={"quick": 5, "laptop": 5, "full": 5},
    first_seed=SCHEME_SEED,
)
def features_move_only_under_mup(run: Run) -> Measurement:
    size = at_scale(SCHEMES, run)
    measured = scheme_measures.at(run, size)
    slopes = {
        name: scheme_measures.slope(f"slope of log change over log n, {name}", size.widths, values)
        for name, values in measured.change.items()
    }
    return Measurement(
        numbers=[*slopes.values(), *scheme_measures.numbers("change", size.widths, measured.change)],
        criteria=[
            within(slopes["mup"], -0.15, 0.1),
            *(within(slopes[name], -0.65, -0.35) for name in ("sp", "ntp")),
        ],
        configurations=[asdict(size) | {"lr": scheme_measures.LR}],
        figures=[
            charts.versus_width(
                "Change of the last hidden features", "change", size.widths, measured.change, measured.limits
            ),
            *charts.courses(measured, size.widths),
        ],
        note="Mean over samples of |h_T - h_0| / |h_0|, last hidden layer. Under IP |h_0| vanishes, so its "
        f"relative change explodes; unnormalised it is {measured.moved_under_ip:.2g} at the largest width.",
    )


@claim(
    "C2",
    sentence="Features stay diverse under muP, SP and NTP and collapse under IP.",
    source=f"{PAPER}, section 5, smallest eigenvalue of the features' Gram matrix",
    required_from="quick",
    seeds={"quick": 5, "laptop": 5, "full": 5},
    first_seed=SCHEME_SEED,
)
def features_collapse_only_under_ip(run: Run) -> Measurement:
    size = at_scale(SCHEMES, run)
    measured = scheme_measures.at(run, size)
    ratios = {
        name: scheme_measures.log10_ratio(f"log10 of lambda_min over that of IP, {name}", values)
        for name, values in scheme_measures.against(measured.lambda_min, "ip")
    }
    return Measurement(
        numbers=[*ratios.values(), *scheme_measures.numbers("lambda_min", size.widths, measured.lambda_min)],
        criteria=[above(number, 2.0) for number in ratios.values()],
        configurations=[asdict(size) | {"lr": scheme_measures.LR}],
        figures=[
            charts.versus_width(
                "Smallest eigenvalue of the features' Gram matrix",
                "lambda_min(K)",
                size.widths,
                measured.lambda_min,
                measured.limits,
            )
        ],
        note="Ratios are between networks of the largest width with the same seed, post-activations of the "
        "last hidden layer; the factor 100 of the criterion is 2 in log10.",
    )


@claim(
    "C3",
    sentence="Only under muP are features both far from where they began and diverse.",
    source=f"{PAPER}, section 5, joint space-time Gram matrix",
    required_from="quick",
    seeds={"quick": 5, "laptop": 5, "full": 5},
    first_seed=SCHEME_SEED,
)
def only_mup_is_rich_in_space_and_time(run: Run) -> Measurement:
    size = at_scale(SCHEMES, run)
    measured = scheme_measures.at(run, size)
    ratios = {
        name: scheme_measures.log10_ratio(f"log10 of joint lambda_min of muP over {name}", 1 / values)
        for name, values in scheme_measures.against(measured.joint, "mup")
    }
    growth = {
        name: Number.mean(
            f"log10 growth from width 256 to {size.widths[-1]}, {name}",
            np.log10(values[-1] / values[size.widths.index(256)]),
        )
        for name, values in measured.joint.items()
        if name != "ip"
    }
    return Measurement(
        numbers=[
            *ratios.values(),
            *growth.values(),
            *scheme_measures.numbers("joint lambda_min", size.widths, measured.joint),
        ],
        criteria=[
            *(above(number, 1.0) for number in ratios.values()),
            *(below(growth[name], 0.0) for name in ("sp", "ntp")),
            above(growth["mup"], 0.0),
        ],
        configurations=[asdict(size) | {"lr": scheme_measures.LR}],
        figures=[
            charts.versus_width(
                "Smallest eigenvalue of the joint Gram matrix of features before and after",
                "joint lambda_min",
                size.widths,
                measured.joint,
                measured.limits,
            )
        ],
        note="Pre-activations of the last hidden layer at steps 0 and T. Width 64 has n = 2N, where the "
        "joint matrix is nearly singular by chance; it is drawn and not judged.",
    )


# ------------------------------------------------------------------------------------------ in the limit


@claim(
    "C4",
    sentence="At infinite width features of distinct inputs are linearly independent at every step.",
    source=f"{PAPER}, Theorem 4.5",
    required_from="quick",
    first_seed=400,
)
def features_stay_independent_in_the_limit(run: Run) -> Measurement:
    size = at_scale(DIVERSITY, run)
    devices = accelerators(size.accelerators) if size.accelerators else None
    found = {
        name: diversity.measured(run, size, name, lr, devices)
        for name, lr in run.track([*size.judged, *size.reported], "activations")
    }
    return Measurement(
        numbers=[number for one in found.values() for number in one.numbers],
        criteria=[criterion for name, _ in size.judged for criterion in found[name].criteria],
        configurations=[asdict(size)],
        figures=[
            charts.over_steps(
                "Smallest eigenvalue of K of the last hidden layer at infinite width",
                "lambda_min(K)",
                np.arange(size.steps + 1),
                {name: one.smallest for name, one in found.items()},
            )
        ],
        note="Thresholds are 5 jackknife standard errors over replicas, or rounding if that is larger. First "
        "pre-activations are linear in the inputs and exempt where the inputs are dependent. Bias is judged "
        "at the last step by a run with half the points and half the replicas.",
    )


# ----------------------------------------------------------------------------------------- global minima


ROUNDING = 1e-9  # of a bound over a loss that is 1e-8 of numbers of order 1


@claim(
    "C5",
    sentence="Under muP training reaches a global minimum, certified at every step by the gradient alone.",
    source=f"{PAPER}, Corollary 4.6; certificate: spec c6",
    required_from="quick",
    seeds={"quick": 3, "laptop": 5, "full": 5},
    first_seed=500,
)
def training_ends_at_a_certified_global_minimum(run: Run) -> Measurement:
    size = at_scale(MINIMUM, run)
    numbers, criteria, losses = [], [], {}
    for width, made in minima.descend(run, size).items():
        losses[f"width {width}"] = made.loss
        reached = Number.mean(
            f"log10 of the loss at the end over that at the start, width {width}",
            np.log10(made.loss[-1] / made.loss[0]),
        )
        smallest = Number(f"smallest bound over loss, width {width}", made.slack.min())
        share = Number(f"share of steps certified, width {width}", np.isfinite(made.slack).mean())
        numbers += [reached, smallest, share]
        criteria += [below(reached, -6.0), above(smallest, 1.0 - ROUNDING), within(share, 1.0, 1.0)]
    return Measurement(
        numbers=numbers,
        criteria=criteria,
        configurations=[asdict(size) | {"lr": minima.LR}],
        figures=[charts.over_steps("Training loss under muP", "loss", np.arange(size.steps + 1), losses)],
        note="The certificate bounds the loss by the readout's gradient and lambda_min(K) of every step and "
        "seed; it is exact mathematics, so only rounding may break it.",
    )


# --------------------------------------------------------------------------------- towards the limits


ENTRIES = np.triu_indices(2)  # of a Gram matrix of two points


@claim(
    "C6",
    sentence="Outputs of muP networks approach the limit as 1/sqrt(n).",
    source="Yang and Hu 2021 (arXiv 2011.14522); spec claim 6",
    required_from="quick",
    first_seed=600,
)
def networks_approach_the_limit(run: Run) -> Measurement:
    size = at_scale(CONVERGENCE, run)
    X, y = load("two points")
    common = {"depth": size.depth, "lr": 0.3, "reduction": "sum"}
    with float64():
        limit = InfiniteWidthMLP(
            input_dim=2,
            samples=size.samples,
            replicas=size.replicas,
            key=jax.random.key(run.seeds[0]),
            **common,
        ).fit(X, y, size.steps, record=("f", "K"))
    errors = []
    for row, width in enumerate(run.track(size.widths, "widths")):
        seeds = own_seeds(run, row, size.seeds)
        made = paths("mup", width, X, y, steps=size.steps, seeds=seeds, device=run.device, **common)
        errors.append(np.sqrt(((made.f[:, -1] - limit.f[-1]) ** 2).mean(axis=(1, 2))))
    rows = np.stack(errors)  # [widths, seeds]
    rmse = np.sqrt((rows**2).mean(axis=1))
    slope = slope_of_rmse(size.widths, rows)
    noise = Number(
        "standard error of the limit over the smallest RMSE", limit.stderr("f")[-1].max() / rmse.min()
    )
    return Measurement(
        numbers=[
            slope,
            *(
                Number(f"RMSE of f_T, width {width}", value)
                for width, value in zip(size.widths, rmse, strict=True)
            ),
            noise,
        ],
        criteria=[within(slope, -0.6, -0.4), precise_enough(noise, 0.1)],
        configurations=[asdict(size) | common],
        figures=[
            charts.rates("Distance from the limit", size.widths, {"mup": rows}, -0.5),
            charts.with_limit(
                f"Outputs of networks of width {size.widths[-1]} and of the limit",
                "f",
                ("sample 0", "sample 1"),
                made.f[..., 0],
                limit.f[..., 0],
                limit.stderr("f")[..., 0],
            ),
            charts.with_limit(
                f"Features of networks of width {size.widths[-1]} and of the limit",
                "entry of K, last layer",
                ("K 00", "K 01", "K 11"),
                made.K[:, :, *ENTRIES],
                limit.K_post[-1][:, *ENTRIES],
                limit.stderr("K_post")[:, -1][:, *ENTRIES],
            ),
        ],
        note="The slope's interval is a bootstrap over networks.",
    )


@claim(
    "C7",
    sentence="Wide NTP networks follow kernel gradient descent with the NTK, SP networks with it less the "
    "first layer's term.",
    source="Jacot et al. 2018 (arXiv 1806.07572); spec claim 7",
    required_from="quick",
    first_seed=700,
)
def kernel_regimes_follow_their_kernels(run: Run) -> Measurement:
    size = at_scale(KERNEL, run)
    X, Y = load(size.data)
    with float64():
        kernels = {
            scheme: np.asarray(
                limiting_kernel(X, depth=size.depth, activation="tanh", parametrization=scheme)
            )
            for scheme in ("ntp", "sp")
        }
    numbers, criteria, curves = [], [], {}
    for scheme, rows in from_kernels(run, size, kernels, X, Y).items():
        curves[scheme] = rows[scheme]
        wrong = "sp" if scheme == "ntp" else "ntp"
        slope = slope_of_rmse(size.widths, rows[scheme], f"slope of the distance over width, {scheme}")
        share = Number.mean(
            f"distance over that to the other scheme's kernel, width {size.widths[-1]}, {scheme}",
            rows[scheme][-1] / rows[wrong][-1],
        )
        numbers += [slope, share]
        numbers += [
            Number.mean(f"distance from the kernel's outputs, {scheme}, width {width}", values)
            for width, values in zip(size.widths, rows[scheme], strict=True)
        ]
        criteria += [below(slope, -0.35), below(share, 0.5)]
    return Measurement(
        numbers=numbers,
        criteria=criteria,
        configurations=[asdict(size)],
        figures=[charts.rates("Distance from kernel gradient descent", size.widths, curves, -0.5)],
        note="Kernel descent starts from each network's own outputs f_0. Distances are root mean squares "
        "over samples at the last step; they fall as 1/sqrt(n).",
    )


# ------------------------------------------------------------------------------------------ muTransfer


@claim(
    "C8",
    sentence="The best learning rate of Adam stays with width under muP and moves under standard practice.",
    source="Yang et al. 2022 (arXiv 2203.03466), figure 1; spec claim 8",
    seeds={"quick": 3, "laptop": 3, "full": 3},
    first_seed=800,
)
def the_best_rate_transfers_under_mup(run: Run) -> Measurement:
    size = at_scale(TRANSFER, run)
    reports = {scheme: transfer_runs.sweep(run, size, scheme) for scheme in ("mup", "sp_const")}
    checks = {scheme: transfer_runs.coordinates(run, size, scheme) for scheme in reports}
    shifts = {name: transfer_runs.shift(name, report) for name, report in reports.items()}
    losses = [
        Number(f"loss at the best rate, {scheme}, width {width}", report.optimum(width).loss)
        for scheme, report in reports.items()
        for width in size.widths
    ]
    return Measurement(
        numbers=[
            *shifts.values(),
            *losses,
            *(transfer_runs.steepest(name, check) for name, check in checks.items()),
        ],
        criteria=[below(shifts["mup"], 0.5), above(shifts["sp_const"], 1.5)],
        configurations=[asdict(size)],
        figures=[
            *(
                charts.sweep(f"Loss over learning rate, {charts.NAMES[name]}", report)
                for name, report in reports.items()
            ),
            *(
                charts.coordinates(f"Coordinate check, {charts.NAMES[name]}", check)
                for name, check in checks.items()
            ),
        ],
        note="Optimum of a parabola in log rate around the best rate of the grid; bootstrap over seeds. "
        + " ".join(warning for report in reports.values() for warning in report.warnings())
        + " Coordinate checks: "
        + ", ".join(f"{name} {check.verdict().outcome}" for name, check in checks.items())
        + ".",
    )


# --------------------------------------------------------------------------------------------- regimes

REGIMES = {"mup": 0.0, "ntp": 0.5, "sp": 0.5, "sp_const": -1.0, "mfp": 0.0}


@claim(
    "C9",
    sentence="The classifier gives every scheme its regime, and IP with three hidden layers stays where it "
    "starts.",
    source="Yang and Hu 2021 (arXiv 2011.14522), Theorems 3.2-3.4; Hajjar et al. 2021 (arXiv 2110.15596)",
    required_from="quick",
    first_seed=900,
)
def regimes_are_as_classified(run: Run) -> Measurement:
    found = {name: Number(f"r of {name}", classify(name).r) for name in REGIMES}
    X, y = load("two points")
    residual = {}
    for scheme in ("ip", "ip_llr"):
        with float64():
            made = InfiniteWidthMLP(
                depth=3,
                input_dim=2,
                lr=0.3,
                reduction="sum",
                parametrization=scheme,
                samples=4096,
                key=jax.random.key(run.seeds[0]),
            ).fit(X, y, 2, record=("f",))
        moved = np.abs(made.replicas["f"][:, 2]).max(axis=(1, 2)) / np.abs(y).max()
        residual[scheme] = Number.mean(f"largest |f_2| over |y|, {scheme}", moved)
    return Measurement(
        numbers=[*found.values(), *residual.values()],
        criteria=[
            *(within(number, REGIMES[name] - 1e-12, REGIMES[name] + 1e-12) for name, number in found.items()),
            within(residual["ip"], 0.0, 1e-12),
            above(residual["ip_llr"], 1e-3),
        ],
        configurations=[{"depth": 3, "lr": 0.3, "activation": "tanh", "samples": 4096}],
        note="`ip_llr` enlarges the first step so that every layer moves at order one; with tanh the third "
        "layer follows at step 2.",
    )
