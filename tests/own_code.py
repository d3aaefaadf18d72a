"""Checkpoints that bring their own code, as repositories on the Hub do."""

from __future__ import annotations

import json
from pathlib import Path

from optimum_dsa.commands.embedded import demo_model

from .tiny import tiny_llama


HALVES = """
def halved(output):
    return output / 2
"""
MODELING = '''
import transformers

from .halves import halved


class {name}(transformers.{parent}):
    """Every second MLP gives half of what transformers' own gives."""

    def __init__(self, config):
        super().__init__(config)
        for layer in getattr(self, "model", self).layers[1::2]:
            layer.mlp.register_forward_hook(lambda module, args, output: halved(output))
'''


def own_code(
    folder: Path,
    name: str = "LlamaForCausalLM",
    keys: tuple[str, ...] = ("AutoModelForCausalLM",),
    parent: str = "LlamaForCausalLM",
    **facts,
) -> Path:
    """A folder with a tiny Llama whose class `name` is in the folder's own code, under `keys` of its auto_map."""
    model = tiny_llama()
    (model if parent == "LlamaForCausalLM" else model.model).save_pretrained(folder)
    (folder / "halves.py").write_text(HALVES)
    (folder / "modeling_halves.py").write_text(MODELING.format(name=name, parent=parent))
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [name], "auto_map": dict.fromkeys(keys, f"modeling_halves.{name}")} | facts
    (folder / "config.json").write_text(json.dumps(config))
    for part in ("tokenizer.json", "tokenizer_config.json"):
        (folder / part).write_bytes((Path(demo_model()) / part).read_bytes())
    return folder
