"""build_param_groups sorts every parameter once; GammaScheduler writes gamma into every group."""

import copy
import math

import pytest

torch = pytest.importorskip("torch", reason="parameter groups need torch")

from torch import nn  # noqa: E402

from mars_optim.torch import MARS  # noqa: E402
from mars_optim.torch.param_groups import GammaScheduler, build_param_groups  # noqa: E402

ALL_TYPES = ["mars-adamw", "mars-lion", "mars-shampoo", "mars-m", "mars-sgd"]
ORTHOGONALISED = ["mars-shampoo", "mars-m"]


class LanguageModel(nn.Module):
    def __init__(self, tied=True, head="lm_head"):
        super().__init__()
        self.wte = nn.Embedding(11, 4)
        self.block = nn.ModuleDict({"mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.add_module(head, nn.Linear(4, 11, bias=False))
        if tied:
            getattr(self, head).weight = self.wte.weight


class HuggingFaceModel(LanguageModel):
    def __init__(self):
        super().__init__(tied=False, head="to_logits")

    def get_output_embeddings(self):
        return self.to_logits


class TimmModel(nn.Module):
    """A bag of embeddings and a head that only `get_classifier` knows."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(11, 4)
        self.mlp = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3)

    def get_classifier(self):
        return self.out


def names_by_algorithm(groups):
    sorted_names = {"mars": [], "adamw": []}
    for group in groups:
        sorted_names[group["algorithm"] or "mars"] += group["param_names"]
    return sorted_names


@pytest.mark.parametrize("mars_type", ORTHOGONALISED)
def test_a_tied_embedding_is_not_orthogonalised_and_appears_once(mars_type):
    groups = build_param_groups(LanguageModel(), mars_type)
    names = names_by_algorithm(groups)
    assert names["adamw"] == ["wte.weight"]
    assert names["mars"] == ["block.mlp.weight", "block.mlp.bias", "block.norm.weight", "block.norm.bias"]


@pytest.mark.parametrize("mars_type", ORTHOGONALISED)
@pytest.mark.parametrize("head", ["lm_head", "head", "classifier", "unembed"])
def test_an_untied_head_with_a_usual_name_goes_to_adamw(mars_type, head):
    names = names_by_algorithm(build_param_groups(LanguageModel(tied=False, head=head), mars_type))
    assert names["adamw"] == ["wte.weight", f"{head}.weight"]


def test_the_head_that_the_model_itself_names_goes_to_adamw():
    names = names_by_algorithm(build_param_groups(HuggingFaceModel(), "shampoo"))
    assert names["adamw"] == ["wte.weight", "to_logits.weight"]


@pytest.mark.parametrize("mars_type", ORTHOGONALISED)
def test_bags_of_embeddings_and_the_classifier_that_the_model_names_go_to_adamw(mars_type):
    names = names_by_algorithm(build_param_groups(TimmModel(), mars_type))
    # the head's bias goes with it: whole heads are named by the model
    assert names == {"mars": ["mlp.weight", "mlp.bias"], "adamw": ["bag.weight", "out.weight", "out.bias"]}


def test_a_head_with_another_name_needs_a_pattern():
    model = LanguageModel(tied=False, head="readout")
    assert "readout.weight" in names_by_algorithm(build_param_groups(model, "m"))["mars"]
    names = names_by_algorithm(build_param_groups(model, "m", adamw_patterns=["readout.*"]))
    assert names["adamw"] == ["wte.weight", "readout.weight"]


@pytest.mark.parametrize("mars_type", ["mars-adamw", "mars-lion", "mars-sgd"])
def test_elementwise_types_keep_embeddings_unless_a_pattern_says_otherwise(mars_type):
    assert names_by_algorithm(build_param_groups(LanguageModel(), mars_type))["adamw"] == []
    groups = build_param_groups(LanguageModel(), mars_type, adamw_patterns=["wte.*"])
    assert names_by_algorithm(groups)["adamw"] == ["wte.weight"]


def test_a_pattern_may_use_any_name_of_a_tied_parameter():
    groups = build_param_groups(LanguageModel(), adamw_patterns=["lm_head.*"])
    assert names_by_algorithm(groups)["adamw"] == ["wte.weight"]


@pytest.mark.parametrize("mars_type", ALL_TYPES)
def test_every_trainable_parameter_is_in_exactly_one_group_under_its_name(mars_type):
    model = LanguageModel(tied=False)
    model.block["mlp"].bias.requires_grad_(False)
    groups = build_param_groups(
        model, mars_type, weight_decay=0.1, adamw_patterns=["*.mlp.*"], no_decay_patterns=["*norm*", "wte*"]
    )
    by_name = dict(model.named_parameters())
    seen = [
        (name, parameter)
        for group in groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
    ]
    assert sorted(name for name, _ in seen) == sorted(set(by_name) - {"block.mlp.bias"})
    assert all(by_name[name] is parameter for name, parameter in seen)
    assert {group["mars_type"] for group in groups} == {mars_type}


def test_patterns_decide_what_is_decayed():
    groups = build_param_groups(
        LanguageModel(), "shampoo", weight_decay=0.1, no_decay_patterns=["*.bias", "*norm*"]
    )
    decay = {name: group["weight_decay"] for group in groups for name in group["param_names"]}
    assert decay == {
        "block.mlp.weight": 0.1,
        "wte.weight": 0.1,
        "block.mlp.bias": 0.0,
        "block.norm.weight": 0.0,
        "block.norm.bias": 0.0,
    }


def test_matrices_on_the_adamw_path_decay_as_told_and_not_as_vectors():
    groups = build_param_groups(LanguageModel(), "shampoo", weight_decay=0.02)
    decay = {group["algorithm"]: group.get("weight_decay_1d") for group in groups}
    assert decay == {None: None, "adamw": 0.02}


@pytest.mark.parametrize("mars_type", ["adamw", "shampoo"])
def test_vectors_take_the_plain_path_unless_the_optimizer_says_otherwise(mars_type):
    for optimize_1d in (False, True):
        model = nn.Linear(3, 3)
        optimizer = MARS(build_param_groups(model, mars_type), lr=0.1, optimize_1d=optimize_1d)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        assert "last_grad" in optimizer.state[model.weight]
        assert ("last_grad" in optimizer.state[model.bias]) is optimize_1d


@pytest.mark.parametrize("short", ["adamw", "lion", "shampoo", "m", "sgd"])
def test_the_prefix_of_the_type_is_optional(short):
    assert build_param_groups(nn.Linear(2, 2), short)[0]["mars_type"] == f"mars-{short}"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": [nn.Linear(2, 2)]}, TypeError, "model must be a torch.nn.Module, got list"),
        ({"mars_type": "muon"}, ValueError, "mars_type must be one of mars-adamw, .* got 'muon'"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be finite and >= 0, got -0.1"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay must be finite and >= 0, got nan"),
        ({"adamw_patterns": "weight"}, TypeError, "adamw_patterns must be a sequence of patterns"),
        ({"no_decay_patterns": ["*.bais"]}, ValueError, "no_decay_patterns: '\\*.bais' matches no"),
        (
            {"model": nn.Linear(2, 2).requires_grad_(False)},
            ValueError,
            "at least one parameter that requires",
        ),
    ],
)
def test_bad_arguments_are_named(unchecked, arguments, error, message):
    with pytest.raises(error, match=message):
        build_param_groups(**({"model": nn.Linear(2, 2)} | arguments))


def optimizer_with_gamma(groups=2):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=0.1)
    for group in optimizer.param_groups:
        group["gamma"] = 0.025
    return optimizer


def run(scheduler, steps):
    gammas = [scheduler.optimizer.param_groups[0]["gamma"]]
    for _ in range(steps):
        scheduler.step()
        gammas.append(scheduler.optimizer.param_groups[0]["gamma"])
    return gammas


def test_gamma_is_written_into_every_group_at_once_and_at_each_step():
    optimizer = optimizer_with_gamma(groups=3)
    scheduler = GammaScheduler(optimizer, lambda step: 0.1 * step)
    assert [group["gamma"] for group in optimizer.param_groups] == [0.0] * 3
    scheduler.step()
    assert [group["gamma"] for group in optimizer.param_groups] == [0.1] * 3


def test_constant_linear_and_cosine_take_their_textbook_values():
    assert run(GammaScheduler.constant(optimizer_with_gamma(), 0.3), 2) == [0.3, 0.3, 0.3]
    linear = run(GammaScheduler.linear(optimizer_with_gamma(), 0.0, 0.2, 4), 5)
    assert linear == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2], abs=1e-15)
    # half a cosine: 1, (1 + cos(pi/4))/2 = 0.853553..., 1/2, 0.146446..., 0, and 0 ever after
    cosine = run(GammaScheduler.cosine(optimizer_with_gamma(), 1.0, 0.0, 4), 5)
    assert cosine == pytest.approx([1.0, 0.8535533905932737, 0.5, 0.14644660940672627, 0.0, 0.0], abs=1e-15)


def test_loading_a_state_continues_the_schedule():
    whole = run(GammaScheduler.linear(optimizer_with_gamma(), 0.0, 1.0, 10), 8)
    first = GammaScheduler.linear(optimizer_with_gamma(), 0.0, 1.0, 10)
    run(first, 5)
    resumed = GammaScheduler.linear(optimizer_with_gamma(), 0.0, 1.0, 10)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(resumed, 3) == whole[5:]


@pytest.mark.parametrize("state", [{}, {"last_step": -1}, {"last_step": 1.5}, {"last_step": 1, "fn": None}])
def test_a_foreign_state_is_refused_and_changes_nothing(state):
    scheduler = GammaScheduler.linear(optimizer_with_gamma(), 0.0, 1.0, 10)
    with pytest.raises(ValueError, match="state_dict must hold just last_step"):
        scheduler.load_state_dict(state)
    assert scheduler.state_dict() == {"last_step": 0}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda opt: GammaScheduler(opt, lambda _: -1.0),
            "fn must return a finite gamma >= 0, got -1.0 at step 0",
        ),
        (lambda opt: GammaScheduler(opt, lambda _: math.nan), "finite gamma >= 0, got nan at step 0"),
        (lambda opt: GammaScheduler.linear(opt, 0.0, 1.0, 0), "steps must be >= 1, got 0"),
        (lambda opt: GammaScheduler.cosine(opt, -0.1, 1.0, 5), "start must be finite and >= 0, got -0.1"),
        (lambda opt: GammaScheduler.linear(opt, 0.1, math.inf, 5), "end must be finite and >= 0, got inf"),
    ],
)
def test_bad_schedules_are_refused_and_change_nothing(build, message):
    optimizer = optimizer_with_gamma()
    with pytest.raises(ValueError, match=message):
        build(optimizer)
    assert [group["gamma"] for group in optimizer.param_groups] == [0.025] * 2


def test_an_optimizer_without_gamma_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match="must have gamma in every param group"):
        GammaScheduler.constant(optimizer, 0.1)
