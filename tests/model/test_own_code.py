"""The code that a checkpoint brings: run where it is trusted, said where it is not, and saved with what it loads."""

from __future__ import annotations

import pytest
import torch
import transformers

from optimum_dsa import DSAConfig, DSAPruner
from optimum_dsa.checkpoint.load import load_model
from optimum_dsa.checkpoint.skeleton import open_skeleton
from optimum_dsa.model.own_code import code_map, own_class

from ..own_code import own_code
from ..test_commands import run
from ..tiny import tiny_llama, tokens


pytestmark = pytest.mark.usefixtures("modules")


def halved():
    """What the own code computes, with plain hooks on transformers' class."""
    model = tiny_llama()
    for layer in model.model.layers[1::2]:
        layer.mlp.register_forward_hook(lambda module, args, output: output / 2)
    return model


def test_own_code_wins_over_a_class_of_the_same_name(tmp_path):
    folder, given = own_code(tmp_path / "own"), tokens()
    with torch.no_grad():
        expected, plain = halved()(given).logits, tiny_llama()(given).logits
        loaded = load_model(str(folder), trust_remote_code=True)(given).logits
    assert torch.equal(loaded, expected)
    assert not torch.allclose(plain, expected)


def test_masks_are_those_of_the_model_as_it_computes(tmp_path):
    pruner = DSAPruner.from_pretrained(own_code(tmp_path / "own"), trust_remote_code=True)
    hooked, plain = DSAPruner(halved()), DSAPruner(tiny_llama())
    for one in (pruner, hooked, plain):
        one.prune(tokens(), DSAConfig(0.5, "wanda", "uniform"))
    right = dict(hooked.masks())
    assert all(torch.equal(mask, right[name]) for name, mask in pruner.masks())
    assert not all(torch.equal(mask, right[name]) for name, mask in plain.masks())


@pytest.mark.parametrize(
    "name,keys,parent",
    [
        ("LlamaForCausalLM", ("AutoModelForCausalLM", "AutoModel"), "LlamaForCausalLM"),
        ("HalvedModel", ("AutoModel",), "LlamaModel"),
        ("HalvedForCausalLM", ("AutoModel",), "LlamaForCausalLM"),
        ("HalvedForScores", ("AutoModelForOdditiesOfOurs",), "LlamaForCausalLM"),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_the_code_travels_with_every_output(tmp_path, name, keys, parent, compressed):
    folder, out, given = own_code(tmp_path / "own", name, keys, parent), tmp_path / "out", tokens()
    pruner = DSAPruner.from_pretrained(folder, trust_remote_code=True)
    assert type(pruner.model).__name__ == name
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(out, compressed=compressed)
    again = DSAPruner.from_pretrained(out, trust_remote_code=True)
    assert type(again.model).__name__ == name
    assert again.verify().holds
    with torch.no_grad():
        assert torch.equal(again.model(given)[0], pruner.model(given)[0])
    if hasattr(transformers, keys[0]):
        plain = getattr(transformers, keys[0]).from_pretrained(out, trust_remote_code=True)
        assert type(plain).__name__ == name
    written = {path.name: path.read_text() for path in out.glob("*.py")}
    assert written == {path.name: path.read_text() for path in folder.glob("*.py")}


def test_own_code_that_is_not_run_is_said(tmp_path, caplog):
    assert type(load_model(str(own_code(tmp_path / "own")))) is transformers.LlamaForCausalLM
    assert "brings its own code (modeling_halves.LlamaForCausalLM), which is not run" in caplog.text
    assert "transformers' LlamaForCausalLM" in caplog.text


def test_code_that_transformers_cannot_do_without_is_asked_for_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("nobody is asked"))
    folder = own_code(
        tmp_path / "own",
        model_type="halved",
        auto_map={"AutoConfig": "modeling_halves.Own", "AutoModel": "modeling_halves.LlamaForCausalLM"},
    )
    with pytest.raises(
        ValueError, match=r"model_type 'halved'; read that code, and run it with trust_remote_code"
    ) as e:
        load_model(str(folder))
    assert len(str(e.value)) < 400
    arguments = ["prune", str(folder), "-o", str(tmp_path / "out"), "-s", "0.5", "--method", "magnitude"]
    code, _, errors = run(monkeypatch, capsys, *arguments, "--allocation", "uniform")
    assert code == 2 and len(errors.strip().splitlines()) == 1 and "--trust-remote-code" in errors


@pytest.mark.parametrize(
    "code,message",
    [
        ("import a_package_that_nobody_has\n", "a_package_that_nobody_has"),
        ("raise KeyError('mine')\n", "ends in KeyError"),
        ("class Another: ...\n", "LlamaForCausalLM"),
        ("class LlamaForCausalLM: ...\n", "no model class of transformers"),
    ],
)
def test_code_that_cannot_be_run_ends_in_one_line(tmp_path, code, message):
    folder = own_code(tmp_path / "own")
    (folder / "modeling_halves.py").write_text(code)
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(folder), trust_remote_code=True)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    "stated", [["x"], "x", {"AutoModel": "no class"}, {"AutoModel": "../../up.Class"}, {7: "a.b"}]
)
def test_what_is_no_map_is_refused(stated):
    with pytest.raises(ValueError, match="auto_map|module.Class"):
        code_map({"auto_map": stated}, "here")


def test_a_tokenizers_entry_is_none_of_a_models():
    pair = {"AutoTokenizer": ["tokenization.Slow", None], "AutoModel": "modeling.Own"}
    assert code_map({"auto_map": pair}, "here") == {"AutoModel": "modeling.Own"}


def test_of_several_classes_the_architecture_is_taken(tmp_path):
    folder = own_code(tmp_path / "own", "LlamaForCausalLM")
    (folder / "modeling_halves.py").write_text(
        "import transformers\nclass A(transformers.LlamaModel): ...\nclass B(transformers.LlamaForCausalLM): ...\n"
    )
    code = {"AutoModel": "modeling_halves.A", "AutoModelForCausalLM": "modeling_halves.B"}
    assert own_class(code, ["A"], folder, {}).__name__ == "A"
    assert own_class(code, ["B"], folder, {}).__name__ == "B"
    assert own_class(code, ["Neither"], folder, {}).__name__ == "B"


def test_a_plan_is_made_of_the_own_class(tmp_path):
    folder = own_code(tmp_path / "own", "HalvedModel", ("AutoModel",), "LlamaModel")
    model, _ = open_skeleton(folder, trust_remote_code=True)
    assert type(model).__name__ == "HalvedModel"


def test_a_teacher_is_trusted_where_the_model_is(tmp_path, text, monkeypatch, capsys):
    pruner = DSAPruner.from_pretrained(own_code(tmp_path / "dense"), trust_remote_code=True)
    pruner.prune(None, DSAConfig(0.5, "magnitude", "uniform"))
    pruner.save_pretrained(tmp_path / "out")
    seen = []

    def recover(self, train, config, validation, teacher, *args):
        seen.append(teacher)
        raise ValueError("seen")

    monkeypatch.setattr(DSAPruner, "recover", recover)
    arguments = ["recover", str(tmp_path / "out"), "-o", str(tmp_path / "better"), "--dataset", text]
    code, _, errors = run(monkeypatch, capsys, *arguments, "--teacher", str(tmp_path / "dense"), "--trust-remote-code")
    assert code == 2 and "seen" in errors
    assert type(seen[0]).__module__.startswith("transformers_modules")
