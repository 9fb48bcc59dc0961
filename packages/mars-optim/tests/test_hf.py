"""MARS in the Hugging Face Trainer, on a tiny Llama and GPT-2 built from their configurations."""

import gc
import os

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_training import (
    OPTIONS,
    ROUNDING,
    STEPS,
    Recorder,
    assert_same,
    by_hand,
    decay_groups,
    gpt2,
    llama,
    sequences,
    trainer_for,
    weights,
)
from transformers import Trainer, TrainerCallback, get_scheduler

from mars_optim.torch import MARS
from mars_optim.torch.hf import MARSTrainer, TrainerMARS, optimizer_cls_and_kwargs
from mars_optim.torch.wrapper import VarianceReduced

# what the two libraries warn of is not ours to fix
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """Keep the imported modules out of the garbage collection that follows each training."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("make", [llama, gpt2])
def test_trainer_with_class_and_options_equals_a_loop_by_hand(make, tmp_path):
    model, twin, recorder = make(), make(), Recorder()
    trainer = trainer_for(
        model,
        tmp_path,
        recorder=recorder,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, **OPTIONS),
    )
    trainer.train()
    expected = by_hand(twin, decay_groups, recorder.batches, is_approx=True)
    assert_same(weights(model), expected, atol=ROUNDING)


def test_trainer_with_optimizer_and_schedule_equals_a_loop_by_hand(tmp_path):
    model, twin, recorder = llama(), llama(), Recorder()
    optimizer = MARS(decay_groups(model), **OPTIONS)
    schedule = get_scheduler("linear", optimizer, 0, STEPS)
    trainer_for(model, tmp_path, recorder=recorder, optimizers=(optimizer, schedule)).train()
    assert_same(weights(model), by_hand(twin, decay_groups, recorder.batches, is_approx=True), atol=ROUNDING)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_exact_form_through_the_trainer_equals_an_exact_loop_by_hand(make, accumulate, tmp_path):
    model, twin, recorder = make(), make(), Recorder()
    trainer = trainer_for(
        model,
        tmp_path,
        cls=MARSTrainer,
        recorder=recorder,
        arguments={"gradient_accumulation_steps": accumulate},
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, is_approx=False, **OPTIONS),
    )
    trainer.train()
    expected = by_hand(twin, decay_groups, recorder.batches, is_approx=False, accumulate=accumulate)
    assert_same(weights(model), expected, atol=ROUNDING)
    approximate = by_hand(make(), decay_groups, recorder.batches, is_approx=True, accumulate=accumulate)
    name = next(iter(expected))
    assert np.abs(approximate[name] - expected[name]).max() > 1e-4  # the two forms can be told apart here


@pytest.mark.parametrize("is_approx", [True, False])
def test_wrapped_adamw_trains_in_the_trainer_as_mars_adamw_on_all_tensors(is_approx, tmp_path):
    shared = {"lr": 0.01, "betas": (0.95, 0.99), "weight_decay": 0.0}
    own = {"gamma": 0.5, "clip": 0.2, "is_approx": is_approx}
    model, twin, recorder = gpt2(), gpt2(), Recorder()
    optimizer = VarianceReduced(torch.optim.AdamW(model.parameters(), **shared), **own)
    trainer_for(model, tmp_path, cls=MARSTrainer, recorder=recorder, optimizers=(optimizer, None)).train()

    def one_group(network):
        return [{"params": list(network.parameters())}]

    expected = by_hand(twin, one_group, recorder.batches, optimize_1d=True, **shared, **own)
    assert_same(weights(model), expected, atol=ROUNDING)


def test_last_step_of_an_epoch_with_fewer_micro_batches_is_exact_too(tmp_path):
    model, twin, recorder = llama(), llama(), Recorder()
    trainer = trainer_for(
        model,
        tmp_path,
        cls=MARSTrainer,
        recorder=recorder,
        data=sequences(6),  # three batches of two: steps of two micro-batches and of one
        arguments={"gradient_accumulation_steps": 2},
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, is_approx=False, **OPTIONS),
    )
    trainer.train()
    uneven = UnevenBatches(recorder.batches)
    assert_same(weights(model), by_hand(twin, decay_groups, uneven, is_approx=False), atol=ROUNDING)


class UnevenBatches:
    """Micro-batches in steps of two and one in turn, sliced step by step."""

    def __init__(self, batches):
        self.steps = [batches[start:stop] for start, stop in ((0, 2), (2, 3), (3, 5), (5, 6))]

    def __len__(self):
        return len(self.steps)

    def __getitem__(self, index):
        return self.steps[index.start]


def train_on_one_of_two(rank, world_size, folder):
    """One rank's weights and batches; accelerate learns of the process group from the environment."""
    from accelerate.state import AcceleratorState

    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**launched, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
            patch.setitem(os.environ, name, str(value))
        model, recorder = llama(), Recorder()
        trainer = trainer_for(
            model,
            folder,
            cls=MARSTrainer,
            recorder=recorder,
            arguments={"gradient_accumulation_steps": 2, "ddp_backend": "gloo"},
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, is_approx=False, **OPTIONS),
        )
        trainer.train()
        AcceleratorState._reset_state(reset_partial_state=True)
    return weights(model), recorder.batches


@pytest.mark.slow  # two processes import transformers
def test_exact_form_under_ddp_with_accumulation_equals_one_process_on_the_whole_batch(
    run_distributed, tmp_path
):
    # the limit is for a busy machine
    (first, ours), (second, theirs) = run_distributed(train_on_one_of_two, 2, str(tmp_path), timeout=300)
    whole = [batch for pair in zip(ours, theirs, strict=True) for batch in pair]
    assert_same(second, first, atol=0)
    expected = by_hand(llama(), decay_groups, whole, is_approx=False, accumulate=4)
    assert_same(first, expected, atol=ROUNDING)


@pytest.mark.parametrize("is_approx", [True, False])
def test_second_pass_is_paid_for_in_the_exact_form_only(is_approx, tmp_path):
    class Counting(MARSTrainer):
        calls = 0

        def compute_loss(self, *args, **kwargs):
            self.calls += 1
            return super().compute_loss(*args, **kwargs)

    model = llama()
    trainer = trainer_for(
        model,
        tmp_path,
        cls=Counting,
        arguments={"gradient_accumulation_steps": 2},
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, is_approx=is_approx, **OPTIONS),
    )
    trainer.train()
    assert trainer.calls == STEPS * 2 * (1 if is_approx else 2)


class CorrectionRatios(TrainerCallback):
    """Asks the optimiser for its statistics before and after each step."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.seen = []

    def on_step_begin(self, *_, **__):
        self.optimizer.stats()

    def on_step_end(self, *_, **__):
        self.seen.append(self.optimizer.stats()["correction_ratio"])


def test_correction_vanishes_at_lr_zero_since_dropout_masks_are_replayed(tmp_path):
    model = gpt2(dropout=0.5)
    optimizer = MARS(model.parameters(), lr=0.0, lr_1d_ratio=1.0, is_approx=False)
    ratios = CorrectionRatios(optimizer)
    trainer_for(
        model,
        tmp_path,
        cls=MARSTrainer,
        arguments={"gradient_accumulation_steps": 2},
        optimizers=(optimizer, None),
        callbacks=[ratios],
    ).train()
    assert ratios.seen == [0.0] * STEPS


def test_plain_trainer_refuses_the_exact_form_instead_of_approximating(tmp_path):
    model = llama()
    trainer = trainer_for(
        model, tmp_path, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, is_approx=False)
    )
    with pytest.raises(RuntimeError, match="at_previous_params"):
        trainer.train()


def test_other_optimizers_train_as_in_the_plain_trainer(tmp_path):
    results = []
    for cls in (Trainer, MARSTrainer):
        model = llama()
        trainer_for(model, tmp_path, cls=cls).train()
        results.append(weights(model))
    assert_same(results[1], results[0], atol=0)


@pytest.mark.parametrize("is_approx", [True, False])
def test_resuming_from_a_checkpoint_equals_uninterrupted_training(is_approx, tmp_path):
    def run(folder, **arguments):
        model = llama()
        trainer = trainer_for(
            model,
            folder,
            cls=MARSTrainer,
            arguments={"save_strategy": "steps", "save_steps": 2, **arguments},
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, is_approx=is_approx, **OPTIONS),
        )
        return model, trainer

    model, trainer = run(tmp_path)
    trainer.train()
    resumed, trainer = run(tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(weights(resumed), weights(model), atol=0)


def test_no_decay_group_of_the_trainer_reaches_biases_and_norms(tmp_path):
    model = gpt2()
    trainer = trainer_for(model, tmp_path, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, lr=0.01))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is MARS
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], decayed["weight_decay_1d"]) == (0.3, 0.1)
    assert (spared["weight_decay"], spared["weight_decay_1d"]) == (0.0, 0.0)
    assert all(p.ndim == 1 for p in spared["params"])
    assert all(p.ndim == 2 for p in decayed["params"])


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("mars_type", ["mars-m", "shampoo"])
def test_embeddings_and_heads_go_to_adamw_and_decay_as_the_trainer_says(mars_type, make, tmp_path):
    model = make()
    cls, options = optimizer_cls_and_kwargs(model, mars_type=mars_type, lr=0.01)
    trainer = trainer_for(model, tmp_path, optimizer_cls_and_kwargs=(cls, options))
    optimizer = trainer.create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    plain = [g for g in optimizer.param_groups if g["algorithm"] == "adamw"]
    expected = {"model.embed_tokens.weight", "lm_head.weight"} if make is llama else WHERE_GPT2_EMBEDS
    assert {names[id(p)] for g in plain for p in g["params"]} == expected
    assert [(g["weight_decay"], g["weight_decay_1d"]) for g in plain] == [(0.3, 0.3)]
    listed = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(listed) == sorted(names)
    trainer.train()


WHERE_GPT2_EMBEDS = {"transformer.wte.weight", "transformer.wpe.weight"}  # the head is tied to wte


def test_patterns_send_further_matrices_to_adamw(tmp_path):
    model = llama()
    chosen = optimizer_cls_and_kwargs(model, adamw_patterns=["*.o_proj.weight"])
    optimizer = trainer_for(model, tmp_path, optimizer_cls_and_kwargs=chosen).create_optimizer()
    assert type(optimizer) is TrainerMARS
    plain = [p for g in optimizer.param_groups if g["algorithm"] == "adamw" for p in g["params"]]
    assert [id(p) for p in plain] == [id(model.model.layers[0].self_attn.o_proj.weight)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_decay": 0.1}, ValueError, "weight_decay must be set in TrainingArguments.*got 0.1"),
        ({"learning_rate": 0.1}, TypeError, "options must be arguments of MARS, got learning_rate"),
        ({"params": []}, TypeError, "got params"),
        ({"gamma": -1.0}, ValueError, "gamma must be"),
        ({"adamw_patterns": ["nothing"]}, ValueError, "matches no trainable parameter"),
    ],
)
def test_options_that_do_not_fit_raise_at_once(options, error, message):
    with pytest.raises(error, match=message):
        optimizer_cls_and_kwargs(llama(), **options)


def test_sharded_backends_are_refused_in_the_exact_form(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    model = llama()
    trainer = trainer_for(
        model,
        tmp_path,
        cls=MARSTrainer,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(model, is_approx=False),
    )
    trainer.create_optimizer()
    trainer._upcoming = [trainer.data_collator(sequences(2))]
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda _: DistributedType.FSDP))
    with pytest.raises(RuntimeError, match="one process or under DDP"):
        trainer.training_step(model, trainer._upcoming[0])
