"""What C7 reports of its timings: paired ratios at each length, slopes over the lengths, and what decides.

On the CPU the interval of the time ratio at 32k tokens must lie above 3 (MHA) and 1.3 (GQA-4), on a GPU above
10 and 1.8, and TPA's time must grow more slowly in M than MHA's.
"""

from charts import curves
from decode_speed import FOLDED, GQA, HEADS, MHA, TPA, WIDTH, Length, slope, slope_difference

from tenfold_tools.claims import Criterion, Measurement, Number, above, below


def speed_at(lengths: list[Length], repeats: int, device: str, *, judged: bool) -> Measurement:
    """The measurement of C7.

    Args:
        lengths: timings, that at 32k tokens among them where it is judged.
        repeats: rounds of each.
        device: where they were taken.
        judged: whether there are criteria.
    """
    on_gpu = device.startswith("cuda")
    rivals = (MHA, GQA, FOLDED)
    ratios = {
        (name, length.tokens): Number(
            f"time of {name} over TPA at {length.tokens} tokens",
            length.ratios[name].value,
            length.ratios[name].low,
            length.ratios[name].high,
        )
        for length in lengths
        for name in rivals
    }
    growth = {}
    for name in rivals:
        estimate = slope_difference(lengths, name)
        growth[name] = Number(
            f"time per cached token, TPA minus {name}",
            1e9 * estimate.value,
            1e9 * estimate.low,
            1e9 * estimate.high,
            "ns",
        )
    slopes = [
        Number(f"time per cached token, {name}", 1e9 * slope(lengths, name), unit="ns")
        for name in (TPA, *rivals)
    ]
    criteria: list[Criterion] = []
    if judged:
        against_mha, against_gqa = (10.0, 1.8) if on_gpu else (3.0, 1.3)
        criteria = [
            above(ratios[MHA, 2**15], against_mha),
            above(ratios[GQA, 2**15], against_gqa),
            below(growth[MHA], 0.0),
        ]
    return Measurement(
        numbers=[*ratios.values(), *growth.values(), *slopes],
        criteria=criteria,
        configurations=[
            {
                "tokens": length.tokens,
                "heads": HEADS,
                "head_dim": WIDTH,
                "repeats": repeats,
                "device": device,
                "seconds": length.seconds,
            }
            for length in lengths
        ],
        figures=[
            curves(
                "Time of one decode step",
                "cached tokens",
                "milliseconds",
                {
                    name: (
                        [length.tokens for length in lengths],
                        [1e3 * length.median(name) for length in lengths],
                    )
                    for name in (TPA, *rivals)
                },
                logarithmic=True,
            )
        ],
        note="Interleaved rounds in one process; intervals over the rounds. GQA is judged as torch offers it "
        "(enable_gqa). Folding the heads of a group into query rows makes another GQA, which stands beside "
        "and decides nothing.",
    )
