"""The recipes of the guide: a model whose layers differ, as ONNX and as OpenVINO's IR."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from optimum_dsa import DSAStructuredConfig, prune_structures

from ...tiny import tiny_llama, tokens


GUIDE = Path(__file__).resolve().parents[3] / "docs/source/guides/structured.md"


@pytest.mark.parametrize(
    ("recipe", "needs", "written"),
    [
        ("onnx", ("onnx", "onnxscript", "onnxruntime"), ("smaller.onnx",)),
        ("openvino", ("openvino",), ("smaller.xml", "smaller.bin")),
    ],
)
def test_the_engine_says_what_a_model_says_whose_layers_differ(recipe, needs, written, tmp_path, monkeypatch):
    if missing := [name for name in needs if find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    model = tiny_llama()
    prune_structures(model, tokens(), DSAStructuredConfig(0.31, ("ffn", "kv_group"), "magnitude", layout="per_layer"))
    model.save_pretrained(tmp_path / "smaller")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(rf"<!-- {recipe} -->\n```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    known = {"__name__": "recipe"}
    exec(compile(code, str(GUIDE), "exec"), known)  # which compares both, and raises where they differ
    assert known["logits"].shape == (1, 23, model.config.vocab_size)
    assert all((tmp_path / name).is_file() for name in written)
    assert type(known["model"]).__name__.startswith("PerLayer")
