"""Small T6 models for Hugging Face whose next tokens differ from one another, and prompts for them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests read folders that they wrote

import torch
import transformers

from tpa_attention.torch.hf import T6Config, T6ForCausalLM

transformers.utils.logging.disable_progress_bar()

VOCAB = 31
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "head_dim": 8,
    "tie_word_embeddings": False,
    "max_position_embeddings": 128,
}
MODELS = {
    "contextual": {"q_rank": 3},
    "KV-only": {"mechanism": "kvonly"},
    "non-contextual A": {"variant": "noncontextual_a"},
    "non-contextual B": {"variant": "noncontextual_b"},
    "shared B": {"shared_kv_b": True},
    "shared B, non-contextual A": {"shared_kv_b": True, "variant": "noncontextual_a"},
    "rotate on load": {"rotate_on_load": True},
    "third order": {"factor_dims": (4, 2)},
    "gate and norms": {"output_gate": True, "out_norm": True, "factor_norm": True, "norm_affine": True},
    "partial rotation": {"rope_fraction": 0.5},
    "no rotation": {"rope_fraction": 0.0},
    "MHA": {"mechanism": "mha"},
    "MQA": {"mechanism": "mqa"},
    "GQA": {"mechanism": "gqa", "num_attention_heads": 4, "num_key_value_heads": 2},
    "MLA": {"mechanism": "mla", "kv_latent": 6, "q_latent": 5, "rope_dim": 4},
}


def build(name="contextual", seed=0, dtype=torch.float64, **options):
    """A model of the named kind in evaluation mode; float64, so that rounding decides no token."""
    model = T6ForCausalLM(T6Config(**{**SIZES, **MODELS[name], **options}))
    randomize(model, seed)
    return model.to(dtype).eval()


def randomize(model, seed=0):
    """Parameters of size 0.4: attention that looks far back, and text that does not repeat itself."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)


def prompt(batch=2, length=7, seed=1):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model, ids, new=4, **options):
    return model.generate(ids, **{"max_new_tokens": new, "do_sample": False, **options})
