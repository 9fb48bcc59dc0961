"""The claims of "Variance-Dependent Regret Lower Bounds for Contextual Bandits" (He and Gu 2025), played.

C1, C6  One variance: Lemma 4.3 in expectation and, half of it, with constant probability.
C2      A prefixed sequence: Theorem 4.1.
C3-C5   Ours: the variance-scaled hypercube. Rate, tightness, and equality in one dimension.
C7      A weak adversary: Theorem 5.2.
C8      A strong one: Theorem 5.4 and Corollary 5.7.
C9      The other side: learners that adapt to the variance.

Theory has no data set: all inputs are exactly known (C9 adds contexts from a real one). A claim has one seed,
a jax key; chance is over the vectorised runs, whose numbers are in the tables below, and intervals are over
runs. The neighbours hold the parts: `stage.py` where runs take place, `zoo.py` the learners, `copies.py`
hypercubes side by side, `rates.py` the sweeps of C3, `peeled.py` the sequences of C2, `weak_adversary.py`,
`digit_contexts.py`, and `charts.py`.
"""

from dataclasses import asdict
from functools import lru_cache

import adaptive
import charts
import numpy as np
import peeled
import rates
import strong
import tightness
import weak_adversary
import zoo
from copies import lucky_copies
from digit_contexts import DigitContexts
from sizes import ADAPTIVE, COPIES, CUBE, RATES, SIGN_RULE_RUNS, STRONG, TIGHT, WEAK, Cube
from stage import Stage, frequency, mean, stage

from linbandit_lowerbounds.adversaries import CooperativeStrong
from linbandit_lowerbounds.algorithms.baselines import greedy
from linbandit_lowerbounds.algorithms.explorers import span_explorer
from linbandit_lowerbounds.bounds import hypercube_bound, prefixed_bound
from linbandit_lowerbounds.contexts import RandomContexts, fixed_set_counterexample
from linbandit_lowerbounds.hypercubes import BernoulliHypercube, VarianceScaledHypercube
from linbandit_lowerbounds.intervals import mean_interval
from tenfold_tools.claims import (
    Criterion,
    Measurement,
    NotRun,
    Number,
    Run,
    Verdict,
    above,
    below,
    claim,
    not_above,
    within,
)

PAPER = "He and Gu 2025 (arXiv 2503.12020)"
CUBE_SEED = 100  # of C1 and C6, which look at the same runs

# ----------------------------------------------------------------------------------------------- one variance


@lru_cache(maxsize=4)
def cube_regrets(on: Stage, size: Cube) -> dict[str, np.ndarray]:
    """Regret of every learner in every run on the Bernoulli hypercube; C1 and C6 share it."""
    instance = BernoulliHypercube(size.K, size.d)
    runs = dict.fromkeys(size.learners, size.runs) | dict.fromkeys(size.slow, size.slow_runs)
    return {
        name: on.play(zoo.bernoulli_learner(name), instance, runs=count).regret
        for name, count in runs.items()
    }


@claim(
    "C1",
    sentence="On the Bernoulli hypercube every policy has at least the regret of Lemma 4.3, at most 4 times.",
    source=f"{PAPER}, Lemma 4.3",
    required_from="quick",
    first_seed=CUBE_SEED,
)
def no_policy_beats_lemma_43(run: Run) -> Measurement:
    size = CUBE[run.scale]
    with stage(run) as on:
        regrets = cube_regrets(on, size)
    bounds = {kind: hypercube_bound(size.K, size.d, kind=kind).value for kind in ("lemma", "tight")}
    ratios = {
        name: mean(f"regret / Lemma 4.3, {name}", regret, bounds["lemma"]) for name, regret in regrets.items()
    }
    exact = 1e-9  # float64, 10^5 compensated additions
    return Measurement(
        numbers=[
            *ratios.values(),
            Number("tight bound / Lemma 4.3", bounds["tight"] / bounds["lemma"]),
            *[mean(f"regret / tight bound, {name}", r, bounds["tight"]) for name, r in regrets.items()],
        ],
        criteria=[
            *[above(number, 1.0) for number in ratios.values()],
            within(ratios["random"], 1.98, 2.02),
            within(ratios["worst"], 4 - exact, 4 + exact),
        ],
        configurations=[asdict(size) | {"seed": CUBE_SEED, "dtype": "float64"}],
        figures=[
            charts.intervals(
                f"Regret over Lemma 4.3 (d {size.d}, K {size.K})", ratios, "regret / bound", 1.0, 4.0
            )
        ],
        note="Every policy lies in [1, 4], random play at 2: this instance certifies, it does not rank. "
        "Ridge regression on one action after the other cannot tell the signs apart: greedy is near 2."
        + (f" {', '.join(size.slow)}: {size.slow_runs} runs." if size.slow else "")
        + (" OFUL, SAVE and Bayes-UCB list 2^d actions and are left out." if size.d > 12 else ""),
    )


@claim(
    "C6",
    sentence="Half of Lemma 4.3 is reached with probability at least 1/7, and B copies are not all lucky.",
    source=f"{PAPER}, Lemmas A.1 and A.2; the constant 1/7 is ours (reverse Markov inequality)",
    required_from="quick",
    first_seed=CUBE_SEED,
)
def half_the_bound_is_reached_with_constant_probability(run: Run) -> Measurement:
    cube, game = CUBE[run.scale], COPIES[run.scale]
    half = 0.5 * hypercube_bound(cube.K, cube.d).value
    with stage(run) as on:
        regrets = cube_regrets(on, cube)
        copies = {
            (name, B): lucky_copies(on, zoo.bernoulli_learner(name), B, game)
            for name, B in run.track([(n, B) for n in game.learners for B in game.B], "copies")
        }
    reached = {
        name: frequency(f"P(regret >= bound / 2), {name}", regrets[name] >= half) for name in game.single
    }
    all_lucky = {
        (name, B): frequency(f"P(all {B} copies lucky), {name}", each.all(1))
        for (name, B), each in copies.items()
    }
    one = [
        Number(f"share of lucky copies, {name}, B = {B}", each.mean()) for (name, B), each in copies.items()
    ]
    return Measurement(
        numbers=[*reached.values(), *all_lucky.values(), *one],
        criteria=[
            *[above(number, 1 / 7) for number in reached.values()],
            *[not_above(number, (6 / 7) ** B) for (_, B), number in all_lucky.items()],
        ],
        configurations=[asdict(cube), asdict(game)],
        figures=[
            charts.histogram("Regret over runs, and half of Lemma 4.3", regrets[name], 2 * half, name)
            for name in game.single
            if name in (game.single[0], "Bayes-UCB")
        ],
        note="The runs of C1. One learner sees all copies, which move in turn; a copy is lucky below half of "
        "its bound. (6/7)^B is what independence promises at least: the real shares are far smaller.",
    )


# ---------------------------------------------------------------------------------------- a prefixed sequence


@claim(
    "C2",
    sentence="Against a known sequence of variances regret is at least d sqrt(sum of variances) / log K.",
    source=f"{PAPER}, Theorem 4.1, (4.1), (4.2)",
    required_from="quick",
    first_seed=200,
)
def peeling_bounds_hold_for_any_sequence(run: Run) -> Measurement:
    rows = peeled.ROWS[run.scale]
    bounds = {row: peeled.bounds(row) for row in rows}
    with stage(run) as on:
        jobs = [(row, name) for row in rows for name in row.learners]
        regrets = {job: peeled.regret(on, *job) for job in run.track(jobs, "sequences")}
    numbers = {(row, name): mean(f"regret, {row.label}, {name}", r) for (row, name), r in regrets.items()}
    criteria = [
        above(numbers[row, name], bound)
        for row, name in jobs
        for bound in bounds[row].values()
        if bound > 0.0
    ]
    values = [
        Number(f"bound {kind}, {row.label}", bound) for row in rows for kind, bound in bounds[row].items()
    ]
    zero = sum(bound == 0.0 for row in rows for bound in bounds[row].values())
    return Measurement(
        numbers=[*numbers.values(), *values, Number("bounds that are 0 here", zero)],
        criteria=criteria,
        configurations=[asdict(row) for row in rows],
        figures=[
            charts.grouped_bars(
                "Regret and the peeling bounds",
                "regret",
                {
                    row.label: {kind: bound for kind, bound in bounds[row].items() if bound > 0.0}
                    | {name: numbers[row, name].value for name in row.learners}
                    for row in rows
                },
            )
        ],
        note="Bounds that are 0 here (a condition fails: `theorem` needs S >= 1 + 384 d^2) decide nothing. "
        "Criteria compare the interval of the mean with each non-zero bound."
        + (" OFUL, SAVE and Bayes-UCB list 2^d actions: they play the row with d = 8 at most."),
    )


# ------------------------------------------------------------------------------ the variance-scaled hypercube


@claim(
    "C3",
    sentence="The smallest worst-case regret of the zoo grows like d and like the square root of S.",
    source=f"{PAPER}, Theorem 4.1 and Section 1, without the logarithm on our hypercube",
    required_from="quick",
    first_seed=300,
)
def regret_grows_like_d_root_s(run: Run) -> Measurement:
    size = RATES[run.scale]
    lines = rates.lines(size.dims, size.S, size.K)
    points = list(dict.fromkeys(point for line in lines.values() for point in line))
    jobs = [(point, name) for point in points for name, most in size.learners.items() if point.d <= most]
    with stage(run) as on:
        found = {
            (point, name): rates.worst_gap(on, name, point, size.runs)
            for point, name in run.track(jobs, "learners and points")
        }
        best = {
            point: rates.best_learner(worst for (at, _), worst in found.items() if at == point)
            for point in points
        }
        exponents = {name: rates.exponent(name, line, best, on) for name, line in lines.items()}
    return Measurement(
        numbers=[*exponents.values(), *[rates.level(worst) for worst in found.values()]],
        criteria=[within(exponents["S"], 0.45, 0.55), within(exponents["d"], 0.9, 1.1)],
        configurations=rates.configurations(found, best),
        figures=[
            *[rates.sandwich(name, line, found) for name, line in lines.items()],
            rates.profile(max(points, key=lambda p: (p.S, p.d <= 4, p.d)), found),
        ],
        note="Gaps with ||theta|| <= 1; worst gap and best learner are chosen on runs that the exponents do "
        "not use. The best learner's regret in units of d sqrt(S) still rises with d (from 0.53 at d = 1, "
        "where the sign rule is optimal), which lifts the exponent of d above 1: "
        + ", ".join(f"d {p.d}: {rates.level(best[p]).value:.3g} ({best[p].learner})" for p in lines["d"])
        + ". Learners play up to these dimensions: "
        + ", ".join(f"{name} {most}" for name, most in size.learners.items())
        + ".",
    )


@claim(
    "C4",
    sentence="LB_seq of the variance-scaled hypercube holds, and the best learner is within 1.5 times it.",
    source="docs/proofs.md, section 4 (ours)",
    required_from="quick",
    first_seed=400,
)
def our_bound_is_tight(run: Run) -> Measurement:
    size = TIGHT[run.scale]
    with stage(run) as on:
        sigma = tightness.log_uniform(on, size.K)
        jobs = tightness.jobs(size)
        found = {job: tightness.play(on, job, sigma, size) for job in run.track(jobs, "learners, gaps")}
    ratios = {job: mean(f"regret / LB_seq, {job.label}", p.regret, p.bound) for job, p in found.items()}
    best = tightness.best_learners(found)
    tight = [below(ratios[job], 1.5) for job in best if job.d <= size.learners["Bayes-UCB"]]
    return Measurement(
        numbers=[*ratios.values(), *[Number(f"LB_seq, d {j.d}, x {j.x:.3g}", found[j].bound) for j in best]],
        criteria=[
            *[above(number, 1.0) for number in ratios.values()],
            *(tight if run.scale != "quick" else ()),
        ],
        configurations=tightness.configurations(found, best, sigma),
        figures=[
            charts.intervals(
                "Regret over LB_seq", {job.label: n for job, n in ratios.items()}, "ratio", 1.0, 1.5
            )
        ],
        note="sigma is log-uniform in [0.05, 1]. The best learner is chosen on other runs than those shown. "
        + ("At quick scale 1.5 is reported, not required: " if run.scale == "quick" else "")
        + "; ".join(criterion.text for criterion in tight)
        + ".",
    )


LB_SEQ_D1 = 9.343680781696


@claim(
    "C5",
    sentence="In one dimension the sign of the posterior mean attains LB_seq with equality.",
    source="docs/proofs.md, section 4 (ours): 2 gap sum_k Q(gap sqrt(k - 1)) = 9.343680781696",
    required_from="quick",
    first_seed=500,
)
def sign_rule_attains_the_bound(run: Run) -> Measurement:
    runs = SIGN_RULE_RUNS[run.scale]
    sigma = np.ones(400)
    with stage(run) as on:
        instance = VarianceScaledHypercube(sigma, 1, 0.0375)
        regret = on.play(greedy(prior="gap"), instance, runs=runs).regret
    bound = prefixed_bound(sigma, 1, kind="scaled_seq", delta=0.0375).value
    measured = Number("mean regret, 99 % interval", *mean_interval(regret, 0.99), published=LB_SEQ_D1)
    inside = measured.low <= LB_SEQ_D1 <= measured.high
    return Measurement(
        numbers=[measured, Number("LB_seq", bound, published=LB_SEQ_D1)],
        criteria=[
            Criterion(
                f"{measured.text(LB_SEQ_D1)} holds {LB_SEQ_D1:.6f}", Verdict.PASS if inside else Verdict.FAIL
            ),
            within(Number("LB_seq", bound), LB_SEQ_D1 - 1e-9, LB_SEQ_D1 + 1e-9),
        ],
        configurations=[{"K": 400, "d": 1, "gap": 0.0375, "sigma": 1.0, "runs": runs, "seed": 500}],
        figures=[charts.histogram("Regret of the sign rule over runs", regret[:100_000], bound, "sign rule")],
        note="A 99 % interval misses the truth once in a hundred keys; the key is fixed.",
    )


# ----------------------------------------------------------------------------------------- adaptive variances


@claim(
    "C7",
    sentence="A weak adversary breaks one tuned instance, but not the instances that are many.",
    source=f"{PAPER}, Theorem 5.2; the least-loaded instance is ours",
    required_from="quick",
    first_seed=700,
)
def many_copies_resist_a_weak_adversary(run: Run) -> Measurement:
    size = WEAK[run.scale]
    with stage(run) as on:
        single = [
            weak_adversary.against_one(on, name, adversary, size.d, size.K, size.runs)
            for name, adversary in run.track(weak_adversary.adversaries(size), "single instance")
        ]
        games = weak_adversary.games(size)
        many = {game: weak_adversary.against_many(on, game) for game in run.track(games, "many instances")}
    broken = {b.adversary: frequency(f"single instance broken, {b.adversary}", b.below) for b in single}
    failed = {g: frequency(f"bound broken, {g.label}", b.below) for g, b in many.items() if b.bound.min() > 0}
    if len(failed) < len(many):
        zero = ", ".join(game.label for game in many if game not in failed)
        raise NotRun(f"the bound is 0 for some run: {zero}")
    early, hint = single[:2]
    worst = Number("largest share of the largest possible regret", float((early.regret / early.most).max()))
    return Measurement(
        numbers=[
            *broken.values(),
            *failed.values(),
            worst,
            *weak_adversary.details(single, many, size),
        ],
        criteria=[
            above(broken[early.adversary], 0.5),
            above(broken[hint.adversary], 0.5),
            within(worst, 0.0, 1.0 + 1e-9),
            *[below(number, game.eta) for game, number in failed.items()],
        ],
        configurations=[asdict(size), *[asdict(game) for game in games]],
        figures=[
            charts.scatter(
                "Regret against the bound at the variance of each run",
                {b.adversary: (b.bound, b.regret) for b in [*single, *many.values()]},
            ),
            charts.visits(
                "Visits in the cyclic construction when noise stops at K/2 (K 4096)",
                (np.arange(4096) < 2048).astype(float),
            ),
        ],
        note=weak_adversary.NOTE,
    )


@claim(
    "C8",
    sentence="Against a strong adversary or on a fixed set regret stays below 2d although S >= K/2.",
    source=f"{PAPER}, Theorem 5.4, Corollary 5.7, Remark 4.5 (2d where means lie in [-1, 1])",
    required_from="quick",
    first_seed=800,
)
def strong_adversaries_admit_no_lower_bound(run: Run) -> Measurement:
    size = STRONG[run.scale]
    with stage(run) as on:
        fixed, quiet_first = fixed_set_counterexample(strong.fixed_set(on, size.actions, size.d), size.K)
        contexts = RandomContexts(size.d, size.actions, horizon=size.K)
        games = {"strong adversary": (contexts, CooperativeStrong()), "fixed set": (fixed, quiet_first)}
        found = {name: on.play(span_explorer(), *game, runs=size.runs) for name, game in games.items()}
        cube = VarianceScaledHypercube(quiet_first.sigma, size.d)
        contextual = {
            name: on.play(strong.learner(name), cube, runs=size.runs).regret for name in size.contextual
        }
    LB = prefixed_bound(np.asarray(quiet_first.sigma), size.d, kind="scaled_seq").value
    audits = [audit for name, result in found.items() for audit in strong.audits(name, result, size)]
    ratios = [mean(f"regret / LB_seq, same sigmas, {name}", r, LB) for name, r in contextual.items()]
    return Measurement(
        numbers=[*[number for number, _, _ in audits], *ratios],
        criteria=[
            *[within(number, low, high) for number, low, high in audits],
            *[above(number, 1.0) for number in ratios],
        ],
        configurations=[asdict(size)],
        figures=[
            charts.below_a_limit(
                "Regret of the span explorer",
                {name: result.regret for name, result in found.items()},
                2.0 * size.d,
                "2d",
            )
        ],
        note="All runs count, not their mean. The same sequence (d quiet rounds, then 1) on the "
        "variance-scaled hypercube, whose decision sets follow sigma, forces LB_seq.",
    )


# ------------------------------------------------------------------------------------------------- from above


@claim(
    "C9",
    sentence="Variance-aware learners have at least 3 times less regret when sigma falls from 1 to 0.03.",
    source=f"{PAPER}, Section 1 (the bound matches the upper bound of SAVE); Zhao et al. 2023",
    required_from="quick",
    first_seed=900,
)
def variance_aware_regret_falls_with_the_variance(run: Run) -> Measurement:
    size = ADAPTIVE[run.scale]
    with stage(run) as on:
        instance = RandomContexts(size.d, size.actions, horizon=size.K)
        names = [*size.judged, *size.reported]
        found = {
            name: adaptive.over_levels(on, name, instance, size, size.runs)
            for name in run.track(names, "learners")
        }
        real = DigitContexts(size.actions, horizon=size.K)
        digits = {name: adaptive.over_levels(on, name, real, size, size.digits_runs) for name in size.digits}
    falls = {name: adaptive.fall(f"{name}", at, size) for name, at in found.items()}
    on_digits = [adaptive.fall(f"{name}, contexts are digits", at, size) for name, at in digits.items()]
    linear = [adaptive.halves(name, found[name][size.levels[0]], size) for name in size.reported]
    return Measurement(
        numbers=[
            *falls.values(),
            *on_digits,
            *linear,
            *[mean(f"regret, sigma {s:g}, {n}", r.regret) for n, at in found.items() for s, r in at.items()],
        ],
        criteria=[above(falls[name], 3.0) for name in size.judged],
        configurations=[asdict(size)],
        figures=[adaptive.sandwich(size, found)],
        note="SAVE with the constants of its theorem explores throughout at this scale: its regret is linear "
        "in the rounds, which is stated, not failed. The practical preset has no proof. Random contexts are "
        "kind: OFUL, which takes every round for noisy, falls with sigma too, but less than weighted UCB. "
        "Contexts that are digits (rows of unit norm, from laptop scale) are reported.",
    )
