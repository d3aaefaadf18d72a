"""What stays is learned: under the budget, better than where it began, and the same after an interruption."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertForMaskedLM

from optimum_dsa import demo_model, demo_texts, load_tokens, perplexity
from optimum_dsa.common.registry import UnknownNameError
from optimum_dsa.pruning.structured.configuration import DSAStructuredConfig
from optimum_dsa.pruning.structured.learners import LEARNERS
from optimum_dsa.pruning.structured.learners import learned as settled
from optimum_dsa.pruning.structured.learners import learner as loop
from optimum_dsa.pruning.structured.prune import prune_structures

from ....tiny import same_state, state, tiny_llama, tokens
from ..families import FAMILIES


LEARNS = {"structures": ("ffn", "kv_group"), "layout": "per_layer", "learn_steps": 6, "batch_size": 2}


@pytest.mark.parametrize("layout", ["uniform", "per_layer"])
@pytest.mark.parametrize("learner", LEARNERS)
def test_no_more_goes_than_was_asked_and_all_that_fits(learner, layout):
    model = tiny_llama()
    asked = {unit: parameter.requires_grad for unit, parameter in model.named_parameters()}
    report = prune_structures(
        model, tokens(), DSAStructuredConfig(0.3, **{**LEARNS, "layout": layout}, learner=learner)
    )
    least = min(report.costs.values()) * (3 if layout == "uniform" else 1)
    assert 0.3 * report.prunable - least < report.removed <= 0.3 * report.prunable
    if layout == "uniform":
        assert len({kept for unit, kept in report.kept.items() if unit.endswith("ffn")}) == 1
    assert {name: each.requires_grad for name, each in model.named_parameters()} == asked
    assert not model.training and not hasattr(model, "peft_config")
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all("lora" not in name for name, _ in model.named_modules())


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_run_that_was_killed_ends_as_one_that_was_not(learner, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "KEPT_EVERY", 2)
    config = DSAStructuredConfig(0.3, **LEARNS, learner=learner, update="none")
    whole = tiny_llama()
    prune_structures(whole, tokens(), config)

    class Killed(BaseException):
        pass

    step, model = LEARNERS[learner].step, tiny_llama()
    before = state(model)

    def dies(self, number):
        if number == 3:
            raise Killed
        return step(self, number)

    monkeypatch.setattr(LEARNERS[learner], "step", dies)
    with pytest.raises(Killed):
        prune_structures(model, tokens(), config, tmp_path)
    assert same_state(model, before)  # and nothing of what was half learned
    seen = []
    monkeypatch.setattr(LEARNERS[learner], "step", lambda self, number: (seen.append(number), step(self, number))[1])
    prune_structures(model, tokens(), config, tmp_path, resume=True)
    assert seen == [2, 3, 4, 5]
    assert same_state(model, state(whole))


OTHERS = {
    "with sparsity=0.3, not 0.2": {"sparsity": 0.2},
    "with importance='wanda_sp', not 'flap'": {"importance": "flap"},
    "with update='none', not 'refit'": {"update": "refit"},
    "with batch_size=2, not 3": {"batch_size": 3},
    "with learn_rate=0.02, not 0.05": {"learn_rate": 0.05},
    r"with learn_steps=6, not 7; resume it with the same settings, or name another folder\.": {"learn_steps": 7},
}


def test_it_goes_on_with_the_same_run_alone(tmp_path):
    config = DSAStructuredConfig(0.3, **LEARNS, learner="projected_gates", update="none", importance="wanda_sp")
    prune_structures(tiny_llama(), tokens(), config, tmp_path)
    runs = {said: (tiny_llama(), tokens(), replace(config, **changes)) for said, changes in OTHERS.items()}
    text = tokens()
    text[0] = text[0].flip(0)  # the same sum
    runs["with another model"] = tiny_llama(seed=1), tokens(), config
    runs["with another calibration"] = tiny_llama(), text, config
    for said, (model, given, asked) in runs.items():
        before = state(model)
        with pytest.raises(ValueError, match=rf"The run in .*projected_gates\.pt was made {said}"):
            prune_structures(model, given, asked, tmp_path, resume=True)
        assert same_state(model, before)


@pytest.mark.parametrize("learner", ["projected_gates", "deterministic_gates", "hard_concrete"])
def test_scales_become_weights_where_nothing_is_fitted(learner):
    """Without an update, what is left are columns of the dense model, each times one number."""
    dense, model = tiny_llama(), tiny_llama()
    if learner == "hard_concrete":  # adapters would change rows as well
        dense, model = FAMILIES["GPTNeoX"][0](), FAMILIES["GPTNeoX"][0]()
    config = DSAStructuredConfig(0.2, layout="per_layer", learn_steps=6, update="none", learner=learner)
    report = prune_structures(model, tokens(), config)
    reader = "gpt_neox.layers.1.mlp.dense_4h_to_h" if learner == "hard_concrete" else "model.layers.1.mlp.down_proj"
    unit = next(unit for unit in report.gone if unit.endswith("1:ffn"))
    stay = [n for n in range(48) if n not in report.gone[unit]]
    ratio = model.get_submodule(reader).weight / dense.get_submodule(reader).weight[:, stay]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-3, atol=1e-4)
    assert (ratio[0] - 1).abs().max() > 1e-4


@pytest.mark.parametrize("learner, steps", [("projected_gates", 10), ("deterministic_gates", 80)])
def test_learning_is_better_than_where_it_began(learner, steps):
    """On the trained model and text that nothing was learned from."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model())
    cut = {"num_samples": 16, "sequence_length": 64}
    calibration, validation = (
        load_tokens(demo_texts(part), tokenizer, **cut) for part in ("calibration", "validation")
    )
    lost = {}
    for name in (None, learner):
        model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
        settings = {"learner": name, "learn_steps": steps, "batch_size": 4} if name else {}
        config = DSAStructuredConfig(0.3, update="none", layout="per_layer", **settings)
        prune_structures(model, calibration, config)
        lost[name] = perplexity(model, validation)
    assert lost[learner] < lost[None]


def test_a_prompt_stands_before_every_window_and_nothing_is_asked_of_it():
    tokenizer, seen = AutoTokenizer.from_pretrained(demo_model()), []
    model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.float32).eval()
    given = torch.arange(40).reshape(4, 10)
    prompt = tokenizer("You are being pruned", add_special_tokens=False)["input_ids"]
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    config = DSAStructuredConfig(0.2, learner="projected_gates", learn_steps=1, learn_prompt="You are being pruned")
    with pytest.raises(ValueError, match="learn_prompt='You are being pruned' is text, and there is no tokenizer"):
        prune_structures(model, given, config)
    assert not seen
    prune_structures(model, given, config, tokenizer=tokenizer)
    (learned_from,) = [each for each in seen if each.shape == (4, 10 + len(prompt))]
    assert learned_from[:, : len(prompt)].tolist() == [prompt] * 4 and 10 in learned_from[:, len(prompt)]
    with pytest.raises(ValueError, match="learn_prompt='a' is of a learner, and none is named"):
        DSAStructuredConfig(0.2, learn_prompt="a")


def test_where_there_is_nothing_to_go_on_from_learning_begins_anew_and_says_so(tmp_path, caplog):
    config = DSAStructuredConfig(0.3, **LEARNS, learner="policy_gradient", update="none")
    whole, model = tiny_llama(), tiny_llama()
    prune_structures(whole, tokens(), config)
    prune_structures(model, tokens(), config, tmp_path, resume=True)
    assert same_state(model, state(whole))
    assert f"{tmp_path / 'policy_gradient.pt'} is not there to go on from; learning begins anew." in caplog.text


def test_learned_widths_are_called_after_the_learner_and_given_ones_as_they_are():
    for layout, name in (("per_layer", "policy_gradient"), ("uniform", "uniform")):
        config = DSAStructuredConfig(0.3, **{**LEARNS, "layout": layout}, learner="policy_gradient", update="none")
        assert prune_structures(tiny_llama(), tokens(), config).allocation.name == name


def test_a_learner_without_its_library_is_refused_before_work(monkeypatch):
    monkeypatch.setattr(settled, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="learner='hard_concrete' needs peft: "):
        prune_structures(tiny_llama(), tokens(), DSAStructuredConfig(0.3, learner="hard_concrete"))


def test_a_loss_that_is_not_finite_is_refused_and_the_model_is_as_it_was(monkeypatch):
    model = tiny_llama()
    before = copy.deepcopy(state(model))
    monkeypatch.setattr(LEARNERS["projected_gates"], "step", lambda self, number: float("nan"))
    with pytest.raises(ValueError, match="Step 1 of projected_gates has a loss of nan; give a lower rate than 0.02"):
        prune_structures(model, tokens(), DSAStructuredConfig(0.3, **LEARNS, learner="projected_gates"))
    assert same_state(model, before)


def test_what_cannot_be_learned_is_refused_before_work():
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    bert = BertForMaskedLM(BertConfig(**settings, intermediate_size=48)).eval()
    with pytest.raises(ValueError, match="learns from the next tokens .* BertForMaskedLM predicts masked tokens"):
        prune_structures(bert, tokens(), DSAStructuredConfig(0.3, learner="hard_concrete"))
    with pytest.raises(UnknownNameError, match="Unknown learner 'hard_concret'. Did you mean 'hard_concrete'"):
        DSAStructuredConfig(0.3, learner="hard_concret")
    with pytest.raises(ValueError, match="learn_steps=5 is of a learner, and none is named"):
        DSAStructuredConfig(0.3, learn_steps=5)
