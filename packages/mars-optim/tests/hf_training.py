"""Tiny models from their configurations, a Trainer for them, and the same training as a loop by hand."""

import copy

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    get_scheduler,
)

from mars_optim.torch import MARS

STEPS = 4
ROUNDING = 1e-10  # float64, 4 steps; AdamW's division by small second moments amplifies rounding
OPTIONS = {"lr": 0.01, "lr_1d": 0.02, "gamma": 0.5, "clip": 0.2}


def llama():
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return LlamaForCausalLM(config).double()


def gpt2(dropout=0.0):
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=17,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=16,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


def sequences(count=32):
    """Token sequences; the first label is ignored, so every way to count the labels agrees."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 17, (count, 7), generator=generator)
    return [
        {
            "input_ids": t,
            "labels": torch.cat([torch.tensor([-100]), t[1:]]),
            "attention_mask": torch.ones_like(t),
        }
        for t in tokens
    ]


class Recorder:
    """Collates a batch and remembers it, so that a loop by hand sees the Trainer's order."""

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        self.batches.append({name: torch.stack([s[name] for s in samples]) for name in samples[0]})
        return self.batches[-1]


def trainer_for(model, folder, *, cls=Trainer, recorder=None, data=None, arguments=None, **extra):
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "weight_decay": 0.3,
        "max_grad_norm": 0.5,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 4,
    }
    return cls(
        model=model,
        args=TrainingArguments(**{**defaults, **(arguments or {})}),
        train_dataset=sequences() if data is None else data,
        data_collator=Recorder() if recorder is None else recorder,
        **extra,
    )


def by_hand(model, groups_of, batches, *, is_approx, accumulate=1, max_grad_norm=0.5, **options):
    """The same training as a loop; the exact form by way 4 with a copy of the model as the previous point."""
    optimizer = MARS(groups_of(model), is_approx=is_approx, **{**OPTIONS, **options})
    schedule = get_scheduler("linear", optimizer, 0, STEPS)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    names = {p: name for name, p in model.named_parameters()}
    previous = None

    def backward(network, step):
        part = batches[step]
        for batch in part:
            (network(**batch).loss / len(part)).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm)

    batches = [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]
    for step in range(STEPS):
        h = None
        if previous is not None and not is_approx:
            previous.zero_grad()
            backward(previous, step)
            gradients = {name: p.grad for name, p in previous.named_parameters()}
            h = [gradients[names[p]] for p in params]
        previous = copy.deepcopy(model)
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step(prev_grads=h)
        schedule.step()
    return weights(model)


def weights(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def assert_same(actual, expected, *, atol):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=atol, err_msg=name)


def decay_groups(model):
    """The Trainer's rule, written again: biases and norms do not decay."""
    no_decay = [p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n or "ln_" in n]
    ids = {id(p) for p in no_decay}
    decay = [p for p in model.parameters() if id(p) not in ids]
    return [{"params": decay, "weight_decay": 0.3}, {"params": no_decay, "weight_decay": 0.0}]
