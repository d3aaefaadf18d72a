"""The recipe of the guide: a model whose layers differ, as ONNX."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from optimum_dsa import DSAStructuredConfig, prune_structures

from ...tiny import tiny_llama, tokens


GUIDE = Path(__file__).resolve().parents[3] / "docs/source/guides/structured.md"


def test_onnxruntime_says_what_a_model_says_whose_layers_differ(tmp_path, monkeypatch):
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    model = tiny_llama()
    prune_structures(model, tokens(), DSAStructuredConfig(0.31, ("ffn", "kv_group"), "magnitude", layout="per_layer"))
    model.save_pretrained(tmp_path / "smaller")
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"<!-- onnx -->\n```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    known = {"__name__": "recipe"}
    exec(compile(code, str(GUIDE), "exec"), known)  # which compares both, and raises where they differ
    assert known["logits"].shape == (1, 23, model.config.vocab_size) and (tmp_path / "smaller.onnx").is_file()
    assert type(known["model"]).__name__.startswith("PerLayer")
