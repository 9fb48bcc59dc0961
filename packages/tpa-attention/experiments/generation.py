"""C9: greedy text of a small T6 with every kind of cache and with none.

The model is trained for a few steps on the standard library's source and continues held-out lines of it.
Without a cache every step runs the whole text again; a cache is given the new tokens alone. Tokens must be
the same and logits, in float32, as good as the same.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from tenfold_tools import data
from tenfold_tools.workloads import token_batches, train
from tpa_attention.config import ModelConfig
from tpa_attention.torch.cache import FactorCache, LayerCache
from tpa_attention.torch.model import T6
from tpa_attention.torch.paged_cache import PagedFactorCache

CONFIG = ModelConfig(
    vocab_size=256,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=5,
    head_dim=16,
    q_rank=4,
    k_rank=2,
    v_rank=2,
    max_position_embeddings=256,
)
PROMPTS, PROMPT, NEW = 3, 40, 48  # prefilled by attention, since more than 16 tokens, then decoded one by one
PAGE = 16  # tokens of a block: a text spans several


@dataclass(frozen=True)
class Greedy:
    """What was generated.

    Attributes:
        tokens: (B, NEW).
        logits: (B, NEW, vocabulary), from which they were chosen.
    """

    tokens: Tensor
    logits: Tensor


def trained_model(seed: int, device: str, steps: int = 40) -> T6:
    """The model after a few steps on real text, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    model = T6(CONFIG, generator=generator).to(device)
    batches = token_batches(
        data.stdlib_source().train,
        steps=steps,
        batch=8,
        context=64,
        generator=generator,
        device=device,
    )
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), batches, clip_norm=1.0)
    return model.eval()


def prompts(device: str) -> Tensor:
    """Held-out lines (B, PROMPT)."""
    text = torch.from_numpy(data.stdlib_source().test.astype("int64"))
    return text[: PROMPTS * 1000].view(PROMPTS, 1000)[:, :PROMPT].to(device)


@torch.no_grad()
def without_cache(model: T6, ids: Tensor) -> Greedy:
    """Every step reads the whole text."""
    chosen = []
    for _ in range(NEW):
        chosen.append(model(ids)[:, -1])
        ids = torch.cat([ids, chosen[-1].argmax(-1, keepdim=True)], dim=1)
    return Greedy(ids[:, -NEW:], torch.stack(chosen, dim=1))


@torch.no_grad()
def with_cache(model: T6, ids: Tensor, cache: LayerCache) -> Greedy:
    """The prompt once, then one token at a time."""
    tokens, chosen, new = [], [], ids
    for _ in range(NEW):
        chosen.append(model(new, cache=cache)[:, -1])
        new = chosen[-1].argmax(-1, keepdim=True)
        tokens.append(new)
    return Greedy(torch.cat(tokens, dim=1), torch.stack(chosen, dim=1))


@torch.no_grad()
def by_transformers(model: T6, ids: Tensor, implementation: str) -> Greedy:
    """The same weights behind Hugging Face's `generate` and one of its caches."""
    from tpa_attention.torch.hf import T6Config, T6ForCausalLM

    wrapped = T6ForCausalLM(T6Config(**asdict(model.config), pad_token_id=0)).to(ids.device).eval()
    wrapped.load_state_dict(model.state_dict())
    found = wrapped.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        do_sample=False,
        cache_implementation=implementation,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Greedy(found.sequences[:, -NEW:], torch.stack(found.logits, dim=1))


def caches(scale: str, device: str) -> tuple[dict[str, Callable[[T6, Tensor], Greedy]], list[str]]:
    """Ways to generate with a cache at this scale, and what is missing here with the reason.

    Args:
        scale: "quick" takes the caches of this package, the others those of transformers too.
        device: where the caches are.
    """
    room = PROMPT + NEW

    def contiguous(model: T6, ids: Tensor) -> Greedy:
        return with_cache(model, ids, FactorCache(CONFIG, PROMPTS, room, device))

    def static(model: T6, ids: Tensor) -> Greedy:
        return with_cache(model, ids, FactorCache(CONFIG, PROMPTS, room, device, fixed_shape=True))

    def paged(model: T6, ids: Tensor) -> Greedy:
        blocks = PROMPTS * -(-room // PAGE)
        return with_cache(model, ids, PagedFactorCache(model, blocks, PAGE, batch=PROMPTS, device=device))

    ways: dict[str, Callable[[T6, Tensor], Greedy]] = {
        "FactorCache": contiguous,
        "FactorCache, static": static,
        "PagedFactorCache": paged,
    }
    missing = []
    if scale != "quick":
        if find_spec("transformers") is None:
            missing.append("transformers is not installed")
        else:
            for name in ("dynamic", "static"):
                ways[f"transformers, {name}"] = lambda model, ids, name=name: by_transformers(
                    model, ids, name
                )
    return ways, missing
