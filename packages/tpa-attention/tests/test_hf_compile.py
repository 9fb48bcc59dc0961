"""Generation with a static cache whose step torch.compile made one graph of, in a process of its own."""

import pytest
import torch
import transformers
from hf_cases import build, greedy, prompt


def generate_compiled(rank, world_size, name, pads, backend):
    """Tokens of a static cache with a compiled step, those without a cache, and the number of graphs."""
    model, ids = build(name, dtype=torch.float32), prompt(2, 9)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        mask[row, :pad] = 0
    expected = greedy(model, ids, attention_mask=mask, use_cache=False)
    how = transformers.CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    how._compile_all_devices = True  # generate compiles on a GPU only, unless told to
    torch._dynamo.utils.counters.clear()
    tokens = greedy(model, ids, attention_mask=mask, cache_implementation="static", compile_config=how)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return tokens.tolist(), expected.tolist(), graphs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pads", "backend"),
    [
        ("contextual", (0, 0), "inductor"),
        ("contextual", (0, 4), "aot_eager"),
        ("KV-only", (0, 4), "aot_eager"),
        ("rotate on load", (0, 4), "aot_eager"),
        ("MLA", (0, 4), "aot_eager"),
    ],
)
def test_static_cache_with_a_compiled_step_gives_the_same_tokens(run_distributed, name, pads, backend):
    ((tokens, expected, graphs),) = run_distributed(generate_compiled, 1, name, pads, backend, timeout=300)
    assert tokens == expected
    assert graphs == 1  # one graph serves all steps
