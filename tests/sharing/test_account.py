"""What a card and a page say of the weights is what was done to them, and no more."""

import json

import pytest

from optimum_dsa import DSAConfig, DSAPruner, DSAStructuredConfig, ReconstructConfig, RecoveryConfig, UpdateConfig
from optimum_dsa.recovery.recoveries import RECOVERIES
from optimum_dsa.sharing.account import account, details, notes, settings, training_settings
from optimum_dsa.sharing.card import model_card
from optimum_dsa.sharing.outcome import Outcome
from optimum_dsa.sharing.page import _lists, page, title

from ..recovery.test_recover import regular, small
from ..tiny import tiny_llama, tokens
from .common import change


def saved_as(folder, config=None, *recoveries, **facts):
    """The outcome of a model pruned by `config`, if at all, and recovered; `facts` are changed in its file."""
    pruner = DSAPruner(tiny_llama())
    if config is not None:
        pruner.prune(tokens(24), config)
    for recovery in recoveries:
        pruner.recover(regular(), recovery)
    pruner.save_pretrained(folder)
    change(folder, "dsa_config.json", **facts)
    return Outcome.read(folder)


def shown(outcome):
    """The card's text and the page's."""
    return str(model_card(outcome, "me/x", {})), page([outcome], {})


ALL = DSAConfig(
    0.5,
    "alps",
    "uniform",
    pattern="2:4",
    permute="ria",
    exclude=["*.layers.0.mlp.up_proj.weight"],
    update=UpdateConfig(targets="dense", true_sequential=True),
    reconstruct=ReconstructConfig(8, rate=1e-3),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model to which everything was done that pruning can do."""
    return saved_as(tmp_path_factory.mktemp("whole"), ALL)


PLAIN = ["Pruning chose what goes and left the weights that stay as the base model has them."]


@pytest.mark.parametrize(
    "config,recoveries,told",
    [
        (DSAConfig(0.6), [], [*PLAIN, "It was not trained."]),
        (
            DSAConfig(0.6, "sparsegpt", "uniform"),
            [],
            [
                "The weights that stay were changed by sparsegpt, on the calibration text, to keep the outputs of "
                "their own matrix.",
                "It was not trained.",
            ],
        ),
        (
            DSAConfig(0.6, allocation="uniform"),
            [{}, {"method": "elsa"}],
            [
                *PLAIN,
                "Then it was trained for 6 steps by recover with the method sparse-lora, which kept every zero.",
                "Then it was trained for 6 steps by recover with the method elsa, which chose its zeros anew.",
            ],
        ),
        (
            None,
            [{"method": "elsa", "sparsity": 0.5}, {"method": "full"}],
            [
                "It was dense, and was trained for 6 steps by recover with the method elsa, which chose its zeros "
                "meanwhile.",
                "Then it was trained for 6 steps by recover with the method full, which kept every zero.",
            ],
        ),
    ],
    ids=["chosen", "updated", "trained", "sparse"],
)
def test_what_became_of_the_weights_is_told_in_order(tmp_path, config, recoveries, told):
    outcome = saved_as(tmp_path / "x", config, *(small(**changes) for changes in recoveries))
    assert account(outcome) == told
    card, text = shown(outcome)
    assert " ".join(told) in card and " ".join(told) in text
    assert ("not trained" in card) == ("not trained" in text) == (not recoveries)
    chosen_by = "elsa" if "elsa" in str(told) else config.method
    assert f"method `{chosen_by}`" in card and f"<b>{chosen_by}</b>" in text


def test_everything_that_pruning_did_is_in_card_and_page(whole):
    config, report = whole.report.config, whole.report
    told = account(whole)
    assert "changed by admm, on the calibration text, to keep the outputs of the dense model. Channels were" in told[0]
    assert told[1].startswith("Blocks were trained for 8 steps towards the output of the dense one")
    assert len(told) == 2  # training of blocks is training
    assert notes(whole) == report.notes and len(notes(whole)) == 3
    (_, caption, blocks), (_, _, dense) = details(whole)
    assert [row[0] for row in blocks.rows] == list(report.reconstruction) and "lost" in caption
    for row, found in zip(blocks.rows, report.reconstruction.values()):
        assert row[1:3] == [f"{found.before:.2%}", f"{found.after:.2%}"]
        assert row[3:] == ([f"{found.rate:g}", str(found.steps)] if found.steps else ["–", "as it was"])
    assert dense.rows == [["excluded", "1", "model.layers.0.mlp.up_proj.weight", "6.67%"]]  # 48 · 32 of 3 · 7,680
    before, after = (sum(shares) / len(report.permuted) for shares in zip(*report.permuted.values()))
    for text in shown(whole):
        for part in (f"{after:.2%} of their score stays, and {before:.2%}", "What stayed dense", "up_proj.weight"):
            assert part in text, part
        for found in report.reconstruction.values():
            assert f"{found.before:.2%}" in text and f"{found.after:.2%}" in text
        for name in ("permute", "reconstruct", "rate", "targets", "update", "damping"):
            assert name in text, name
    assert config == ALL and settings(whole)["update"] == "admm"


def test_what_there_is_nothing_to_say_of_is_not_there(tmp_path):
    outcome = saved_as(tmp_path / "x", DSAConfig(0.6))
    assert details(outcome) == [] and notes(outcome) == []
    assert not {"reconstruct", "rate", "span", "permute"} & settings(outcome).keys()
    for text in shown(outcome):
        assert "Training of the blocks" not in text and "stayed dense" not in text and "<ul>" not in text


def test_reasons_for_staying_dense_are_a_row_each(tmp_path):
    names = {f"model.layers.{index}.mlp.router.weight": "a router" for index in range(7)}
    outcome = saved_as(tmp_path / "x", DSAConfig(0.6), dense={**names, "model.layers.0.x": "excluded"})
    ((_, _, table),) = details(outcome)
    assert [row[:2] for row in table.rows] == [["a router", "7"], ["excluded", "1"]]
    assert table.rows[0][2].endswith("model.layers.3.mlp.router.weight and 3 more")


def test_the_settings_of_a_budget_name_no_method_that_pruned(tmp_path):
    outcome = saved_as(tmp_path / "x", None, small(method="elsa", sparsity=0.5))
    assert settings(outcome) == {
        "sparsity": 0.5, "allocation": "uniform", "pattern": "matrix", "granularity": "block", "exclude": [],
        "include": [], "blocks": [],
    }  # fmt: skip
    assert title([outcome]).endswith("with 50 % of its weights removed, in a training")
    card, text = shown(outcome)
    assert "magnitude" not in card and "magnitude" not in text
    assert "\nThen it was trained" not in card and card.count("optimum-cli dsa recover BASE_MODEL") == 1


def test_zeros_that_were_found_have_no_method(tmp_path):
    dense = tiny_llama()
    for layer in dense.model.layers:
        layer.mlp.up_proj.weight.data[:, ::2] = 0
    pruner = DSAPruner(dense)
    pruner.recover(regular(), small(steps=1))
    pruner.save_pretrained(tmp_path)
    outcome = Outcome.read(tmp_path)
    assert account(outcome)[0] == "Nothing says how the zeros came about: they were found in the model."
    card, text = shown(outcome)
    assert "magnitude" not in card and "optimum-cli dsa prune" not in card and "- unknown" not in card
    assert "optimum-cli dsa recover OUT" in card and "It was not trained" not in card + text


@pytest.mark.parametrize("training", [None, {"kind": "DSACallback", "step": 7, "schedule": None}])
def test_the_relation_to_the_base_model_is_that_of_what_was_done(tmp_path, training):
    base = {"name": "org/base", "revision": None}
    facts = {"base_model": base} | ({"recovery": training} if training else {})
    outcome = saved_as(tmp_path / "x", DSAConfig(0.6), **facts)
    card = model_card(outcome, "me/x", {})
    assert card.data.base_model_relation == ("finetune" if training else "quantized")
    assert not training or account(outcome)[1:] == ["Then it was trained with DSACallback, up to step 7."]
    scheduled = {"recovery": {"kind": "DSACallback", "step": 7, "schedule": {"end": 5}}}
    change(tmp_path / "x", "dsa_config.json", **scheduled)
    assert account(Outcome.read(tmp_path / "x")) == [
        "It was pruned in the course of a training with DSACallback, up to step 7."
    ]


def test_settings_of_a_training_are_those_that_had_a_say():
    for method in RECOVERIES:
        found = training_settings({"config": RecoveryConfig(method).to_dict()})
        assert ("rank" in found) == (method == "sparse-lora") and ("penalty" in found) == (method == "elsa")
        assert "temperature" not in found and {"steps", "weight_decay", "seed"} <= found.keys()


def test_a_page_has_the_settings_of_a_training_that_are_not_the_defaults(tmp_path):
    lists = dict(_lists(saved_as(tmp_path / "x", DSAConfig(0.6), small(learning_rate=0.5))))
    assert ("learning_rate", "0.5") in lists["Settings of the training"]
    assert "weight_decay" not in dict(lists["Settings of the training"])


def test_names_that_nobody_registered_here_end_nothing(tmp_path):
    outcome = saved_as(tmp_path / "x", DSAConfig(0.6), config__method="theirs")
    assert outcome.report is None and account(outcome) == [] and notes(outcome) == []
    assert "theirs" in page([outcome], {})


def test_earlier_trainings_in_a_file_are_held_against_the_schema(tmp_path):
    saved_as(tmp_path / "x", DSAConfig(0.6), small(steps=1))
    data = json.loads((tmp_path / "x" / "dsa_config.json").read_text())
    change(tmp_path / "x", "dsa_config.json", recovery={**data["recovery"], "earlier": [{"kind": "recover"}]})
    with pytest.raises(ValueError, match="does not follow its schema"):
        Outcome.read(tmp_path / "x")


@pytest.mark.parametrize(
    "config, told",
    [
        (DSAStructuredConfig(0.34, ("block",)), ["by block_influence first", "were left as they were"]),
        (DSAStructuredConfig(0.2), ["by wanda_sp first", "was fitted anew", "of the bytes of a token in the cache"]),
        (
            DSAStructuredConfig(0.2, learner="policy_gradient", learn_steps=1, update="none"),
            ["chosen by policy_gradient, which began with wanda_sp", "were left as they were"],
        ),
    ],
)
def test_what_is_said_of_a_cut_is_what_chose_it_and_what_made_up_for_it(tmp_path, config, told):
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), config)
    pruner.save_pretrained(tmp_path / "cut")
    found = " ".join(account(Outcome.read(tmp_path / "cut")))
    assert all(words in found for words in told), found
