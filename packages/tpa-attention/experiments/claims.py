"""The claims of "Tensor Product Attention Is All You Need" (Zhang et al. 2025), measured.

C1-C5   The mathematics: RoPE, the special cases, the counts, decoding from factors.
C6, C8  Training: TPA against MHA at equal parameters, and the ablation of the rank.
C7      Speed: a decode step against the length of the cache.
C9, C10 Use: generation with a cache, conversion of existing layers.

The neighbours hold the runs: `rotation.py`, `special_cases.py`, `integers.py`, `decoding.py`, `language.py`,
`decode_speed.py`, `generation.py`, `conversion.py`; `side_by_side.py` spreads the runs of C6 and C8 over a
GPU, `training_report.py` and `speed_report.py` put together what C6 and C7 report, and `charts.py` draws.
C6's mechanisms, ranks and initial values were fixed before any run; its learning rates are chosen on a seed
that decides nothing.
"""

from dataclasses import asdict

import conversion
import decode_speed
import decoding
import generation
import integers
import language
import rotation
import special_cases
import torch
from charts import bars, curves, grouped_bars, intervals, sorted_errors
from speed_report import speed_at
from training_report import compare_with_mha, training_figures

from tenfold_tools.claims import Measurement, NotRun, Number, Run, below, claim, within
from tpa_attention.config import PRESETS

PAPER = "Zhang et al. 2025 (arXiv 2501.06425)"

# ---------------------------------------------------------------------------------------------- mathematics


@claim(
    "C1",
    sentence="RoPE on the rows of B is RoPE on all heads, at every order, and scores see only distances.",
    source=f"{PAPER}, Theorem 3.1, Theorem C.1",
    required_from="quick",
    first_seed=100,
)
def rope_acts_on_factors(run: Run) -> Measurement:
    (seed,) = run.seeds
    found = {
        setting: rotation.errors(setting, seed)
        for setting in run.track(list(rotation.settings()), "settings")
    }
    numbers = [
        Number(f"largest error of {what}, order {order}", max(getattr(e, field) for e in of_order))
        for order in rotation.ORDERS
        for of_order in [[e for setting, e in found.items() if setting.order == order]]
        for field, what in (
            ("rows", "rotated factors against rotated heads"),
            ("scores", "scores against Q T(t-s) K^T"),
            ("shift", f"scores moved by {rotation.SHIFT} positions"),
        )
    ]
    return Measurement(
        numbers=numbers,
        criteria=[below(number, 1e-12) for number in numbers],
        configurations=[asdict(setting) | asdict(e) | {"seed": seed} for setting, e in found.items()],
        figures=[
            sorted_errors(
                "Errors of rotating factors over all conventions (float64)",
                {
                    f"order {order}": [
                        max(e.rows, e.scores, e.shift) for s, e in found.items() if s.order == order
                    ]
                    for order in rotation.ORDERS
                },
                {"allowed": 1e-12},
            )
        ],
        note="Both layouts, both signs, full and half rotation, against dense rotation matrices.",
    )


@claim(
    "C2",
    sentence="MHA, MQA and GQA are tensor product attention with head factors that do not read the token.",
    source=f"{PAPER}, Section 4",
    required_from="quick",
    first_seed=200,
)
def known_mechanisms_are_special_cases(run: Run) -> Measurement:
    (seed,) = run.seeds
    allowed = {torch.float64: 1e-12, torch.float32: 2e-6}
    numbers, criteria, configurations, drawn = [], [], [], {}
    for dtype, tolerance in run.track(allowed.items(), "types"):
        name = str(dtype).removeprefix("torch.")
        for case in special_cases.cases(dtype):
            number = Number(f"{case.name}, {name}", special_cases.difference(case, seed))
            numbers.append(number)
            criteria.append(below(number, tolerance))
            configurations.append(
                {"mechanism": case.mechanism, "kv_only": case.kv_only, "dtype": name, "seed": seed}
            )
            if dtype == torch.float64:
                drawn[case.name] = number.value
    return Measurement(
        numbers=numbers,
        criteria=criteria,
        configurations=configurations,
        figures=[
            bars(
                "TPA against torch's attention with the same weights (float64)",
                "largest difference of the outputs",
                drawn,
                allowed[torch.float64],
            )
        ],
        note="The other side is torch's scaled_dot_product_attention with dense rotation matrices.",
    )


@claim(
    "C3",
    sentence="Real models and caches have the parameters and bytes that the formulas count.",
    source=f"{PAPER}, Table 1, Appendix H",
    required_from="quick",
)
def formulas_count_real_tensors(run: Run) -> Measurement:
    sizes = PRESETS[:2] if run.scale == "quick" else PRESETS
    found = [
        integers.count_model(size, mechanism)
        for size, mechanism in run.track(integers.models(sizes), "models")
    ]
    wrong = Number("comparisons that are not equal", sum(count.mismatches for count in found))
    numbers = [
        Number(
            f"parameters, {count.size} {count.mechanism}",
            count.parameters,
            published=count.published_parameters,
        )
        for count in found
    ]
    numbers += [
        Number(
            f"cached numbers per token and layer, {count.size} {count.mechanism}",
            count.cached,
            published=count.published_cached,
        )
        for count in found
    ]
    return Measurement(
        numbers=[wrong, *numbers],
        criteria=[within(wrong, 0, 0)],
        configurations=[asdict(count) for count in found],
        figures=[
            curves(
                "Cache of the medium models, one sequence, bfloat16",
                "cached tokens",
                "GiB",
                integers.cache_curves("medium"),
                logarithmic=True,
            )
        ],
        note="The trained TPA models save 3.9 to 5.6 times against MHA; MQA and GQA with two groups cache "
        "less still. The paper's MLA baselines from medium on carry 16 to 18 % more parameters in all.",
    )


@claim(
    "C4",
    sentence="A decode step in factor space costs the multiply-adds of Appendix A.4.",
    source=f"{PAPER}, Appendix A.4, examples I to III",
    required_from="quick",
)
def decoding_costs_what_the_appendix_says(run: Run) -> Measurement:
    sizes = PRESETS[:2] if run.scale == "quick" else PRESETS
    examples = {name: integers.example_slopes(name) for name in run.track(integers.EXAMPLES, "examples")}
    found = [count for counts in examples.values() for count in counts]
    found += [count for size in sizes for count in integers.preset_slopes(size)]
    wrong = Number("slopes that are not twice the integer", sum(count.mismatches for count in found))
    numbers = [
        Number(
            f"multiply-adds per cached token, {count.name}",
            count.flops / 2,
            published=None if count.published is None else count.published / 2,
        )
        for count in found
    ]
    return Measurement(
        numbers=[wrong, *numbers],
        criteria=[within(wrong, 0, 0)],
        configurations=[asdict(count) for count in found],
        figures=[
            grouped_bars(
                "Multiply-adds of one decode step per cached token",
                "multiply-adds",
                {
                    f"example {name}": {count.name.split(", ", 1)[1]: count.flops / 2 for count in counts}
                    for name, counts in examples.items()
                },
            )
        ],
        note="Matrix products seen by torch's flop counter with M and 2M cached tokens. The elementwise "
        "products with A_K and A_V and the exponentials are not counted, as in the paper.",
    )


@claim(
    "C5",
    sentence="Decoding from factors equals attention to materialised keys and values, without their memory.",
    source=f"{PAPER}, Algorithms 1 to 3",
    required_from="quick",
    first_seed=500,
)
def flash_decoding_is_exact(run: Run) -> Measurement:
    (seed,) = run.seeds
    generator = torch.Generator().manual_seed(seed)
    calls = [decoding.random_call(generator) for _ in range(40 if run.scale == "quick" else 200)]
    allowed = {torch.float64: 1e-10, torch.float32: 2e-5}
    errors: dict[str, list[float]] = {}
    for call in run.track(calls, "shapes"):
        factors = decoding.random_factors(call, generator)
        for dtype in allowed:
            for way, error in decoding.errors(call, factors, dtype, run.device).items():
                errors.setdefault(f"{way}, {str(dtype).removeprefix('torch.')}", []).append(error)
    worst = {name: Number(f"largest error, {name}", max(values)) for name, values in errors.items()}

    lengths = (32768, 65536)  # at least two blocks each, of which two are alive at a time
    shapes = [(heads, width) for heads in (8, 32) for width in (32, 128)]
    jobs = [(heads, width, tokens) for heads, width in shapes for tokens in lengths]
    scratch = {job: decoding.scratch(*job, run.device) for job in run.track(jobs, "scratch")}
    growth = [
        Number(
            f"growth of scratch over that of h M D numbers, h {heads}, D {width}",
            (scratch[heads, width, lengths[-1]] - scratch[heads, width, lengths[0]])
            / (4 * heads * width * (lengths[-1] - lengths[0])),
        )
        for heads, width in shapes
    ]
    return Measurement(
        numbers=[
            *worst.values(),
            *growth,
        ],
        criteria=[
            *[
                below(number, allowed[torch.float64 if name.endswith("float64") else torch.float32])
                for name, number in worst.items()
            ],
            *[below(number, 0.01) for number in growth],
        ],
        configurations=[
            *[asdict(call) | {"seed": seed, "device": run.device} for call in calls],
            *[{"heads, width, tokens": job, "scratch_bytes": size} for job, size in scratch.items()],
        ],
        figures=[
            sorted_errors(
                "Largest error of a decode call over random shapes",
                errors,
                {"float64": allowed[torch.float64], "float32": allowed[torch.float32]},
            ),
            curves(
                "Memory during a decode call, beyond its inputs (float32)",
                "cached tokens",
                "MiB",
                {
                    f"h {heads}, D {width}": (
                        lengths,
                        [scratch[heads, width, tokens] / 2**20 for tokens in lengths],
                    )
                    for heads, width in shapes
                },
                logarithmic=True,
            ),
        ],
        note="The way 'reference' forms all logits; memory is that of what `impl='auto'` chooses.",
    )


# ------------------------------------------------------------------------------------------------- training


@claim(
    "C6",
    sentence="At equal parameters TPA trains at least as well as MHA, with 3.2 times fewer cached numbers.",
    source=f"{PAPER}, Figures 2 to 4, Tables 2 and 3 (models of 124M to 1.5B parameters)",
    required_from="laptop",
    seeds={"quick": 1, "laptop": 3, "full": 5},
    first_seed=600,
)
def tpa_trains_as_well_as_mha(run: Run) -> Measurement:
    steps = {"quick": 60, "laptop": 400, "full": 1500}[run.scale]
    length = language.Length(steps, 100 if run.scale == "quick" else None, run.device)
    arms, tried = [language.MHA, language.TPA], []
    if run.scale == "full":
        arms, tried = language.tune(run, [*language.BASELINES, language.TPA, *language.OTHERS], length)
    found = language.train_all(run, arms, run.seeds, length)
    measurement = compare_with_mha(arms, run.seeds, found, length, tried)
    if run.scale == "quick":
        raise NotRun("one seed of 60 steps decides nothing; judged from --scale laptop", measurement)
    return measurement


@claim(
    "C7",
    sentence="Decoding with TPA is faster than with MHA and GQA, the more so the longer the cache.",
    source=f"{PAPER}, Section 5 (decoding time with FlashTPA, Figures 5 and 6)",
    required_from="laptop",
)
def decoding_is_faster_as_the_cache_grows(run: Run) -> Measurement:
    on_gpu = run.device.startswith("cuda")
    exponents = (12, 14) if run.scale == "quick" else range(12, 17)
    if on_gpu and run.scale == "full":
        exponents = range(12, 20)
    repeats = 5 if run.scale == "quick" else 51 if on_gpu else 9
    lengths = [
        decode_speed.measure(2**exponent, repeats, run.device)
        for exponent in run.track(list(exponents), "cache lengths")
    ]
    measurement = speed_at(lengths, repeats, run.device, judged=run.scale != "quick")
    if run.scale == "quick":
        raise NotRun(
            "two lengths and five rounds are reported; judged at 32k from --scale laptop", measurement
        )
    return measurement


@claim(
    "C8",
    sentence="More ranks of K and V train better.",
    source=f"{PAPER}, Figure 10 (KV-only, XL)",
    seeds={"quick": 1, "laptop": 2, "full": 5},
    first_seed=800,
)
def more_ranks_train_better(run: Run) -> Measurement:
    if run.scale == "quick":
        raise NotRun("three ranks of 200 steps on two seeds take minutes; runs from --scale laptop")
    steps = 200 if run.scale == "laptop" else 1500
    length = language.Length(steps, None, run.device)
    arms = language.RANKS
    found = language.train_all(run, arms, run.seeds, length)
    gaps = [language.gap(arm, arms[0], run.seeds, found) for arm in arms[1:]]
    levels = language.levels(arms, run.seeds, found)
    return Measurement(
        numbers=[*gaps, *levels.values()],
        criteria=[below(gaps[-1], 0.0)],
        configurations=language.configurations(arms, run.seeds, found, length, "judging"),
        figures=[
            *training_figures(arms, run.seeds, found, f"{steps} steps"),
            intervals("Held-out loss by rank", levels, "nats per byte"),
        ],
        note="The number of heads stays at 6, so parameters and cache grow with the rank.",
    )


# ------------------------------------------------------------------------------------------------------- use


@claim(
    "C9",
    sentence="Generation with a cache gives the text and the logits of generation without one.",
    source=f"{PAPER}, Section 3 (keys are cached rotated)",
    required_from="quick",
    first_seed=900,
)
def cached_generation_is_exact(run: Run) -> Measurement:
    (seed,) = run.seeds
    model, ids = generation.trained_model(seed, run.device), generation.prompts(run.device)
    expected = generation.without_cache(model, ids)
    ways, missing = generation.caches(run.scale, run.device)
    changed, errors = [], []
    for name in run.track(ways, "caches"):
        found = ways[name](model, ids)
        changed.append(Number(f"tokens that differ, {name}", int((found.tokens != expected.tokens).sum())))
        difference = float((found.logits - expected.logits).abs().max())
        errors.append(Number(f"largest difference of logits, {name}", difference))
    different = Number("different tokens in the text", len(expected.tokens.unique()))
    return Measurement(
        numbers=[*changed, *errors, different],
        criteria=[
            *[within(number, 0, 0) for number in changed],
            *[below(number, 1e-5) for number in errors],
        ],
        configurations=[
            {"cache": name, "prompt": generation.PROMPT, "new": generation.NEW, "seed": seed} for name in ways
        ],
        figures=[
            bars(
                "Logits with a cache against none (float32)",
                "largest difference",
                dict(zip(ways, [number.value for number in errors], strict=True)),
                1e-5,
            )
        ],
        note="Greedy continuation of held-out lines, T6 with ranks (4,2,2)."
        + "".join(f" Left out: {reason}." for reason in missing),
    )


@claim(
    "C10",
    sentence="A GQA layer with G groups is TPA of rank G exactly; truncation errs by the singular values.",
    source=f"{PAPER}, Section 4; Eckart and Young 1936",
    required_from="quick",
    first_seed=1000,
)
def conversion_is_exact_or_optimal(run: Run) -> Measurement:
    (seed,) = run.seeds
    jobs = [(name, q_rank) for name in conversion.GROUPS for q_rank in (None, conversion.HEADS)]
    exact = [
        Number(
            f"relative error at rank G, {name}, {'KV-only' if q_rank is None else 'R_Q = h'}",
            conversion.exact_error(conversion.GROUPS[name], q_rank, seed),
        )
        for name, q_rank in run.track(jobs, "exact")
    ]
    heads = conversion.random_weights(seed)
    cut = [conversion.truncate(heads, rank) for rank in run.track(range(1, conversion.HEADS), "truncated")]
    worked = [
        conversion.truncate(conversion.worked_weights(), rank + 1)
        for rank in range(len(conversion.WORKED_ERRORS))
    ]
    disagreement = Number(
        "largest relative difference of truncation error and formula",
        max(truncation.disagreement for truncation in (*cut, *worked)),
    )
    published = Number(
        "largest relative difference to the worked example",
        max(abs(t.held / known - 1) for t, known in zip(worked, conversion.WORKED_ERRORS, strict=True)),
    )
    numbers = [Number(f"relative error of the weights at rank {t.rank} of 8", t.held) for t in cut]
    return Measurement(
        numbers=[*exact, disagreement, published, *numbers],
        criteria=[below(number, 1e-10) for number in (*exact, disagreement, published)],
        configurations=[asdict(truncation) | {"seed": seed} for truncation in cut]
        + [{"groups": conversion.GROUPS[name], "q_rank": q_rank, "seed": seed} for name, q_rank in jobs],
        figures=[
            curves(
                "Relative error of the weights after truncation",
                "rank of K and V",
                "relative error",
                {
                    "held by the layer": ([t.rank for t in cut], [t.held for t in cut]),
                    "formula": ([t.rank for t in cut], [t.formula for t in cut]),
                },
                logarithmic=True,
            )
        ],
        note="float64; eight heads whose singular values fall by half. Singular values by NumPy.",
    )
