"""What a folder gives in a fresh process; run as a script, this is that process.

    python loads.py '{"Llama/padded": ["out/llama", null, true], ...}'

A row is a folder, what to import before, and whether its own code is trusted. The inputs lie beside the weights.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import peft
import torch
import transformers as tf


INPUTS = "inputs.pt"  # the class of the model, and its inputs by name


def said(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def written(model, inputs):
    """Tokens that a model writes without a cache, with one, and with a static one; none of a kind that writes none."""
    if not model.can_generate():
        return []
    torch.manual_seed(0)
    ways = [{"use_cache": False}, {"use_cache": True}]
    if hasattr(model.config, "per_layer_blocks"):
        ways.append({"cache_implementation": "static", "disable_compile": True})
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    given = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["input_ids"])}
    return [model.generate(**given, **options, **way).tolist() for way in ways]


def learnt(model, inputs):
    """Whether one step on low-rank adapters of all matrices changes what is said."""
    before = said(model, inputs)
    names = ["lm_head", "embed_out", "classifier", "decoder"]
    config = peft.LoraConfig(r=2, target_modules="all-linear", exclude_modules=names, init_lora_weights=False)
    tuned = peft.get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], 0.1)
    loss = tuned(**inputs).logits.square().mean()
    loss.backward()
    optimizer.step()
    after = said(tuned, inputs)
    return bool(loss.isfinite() and after.isfinite().all() and not torch.equal(before, after))


def facts(folder, trusted):
    made, inputs = torch.load(Path(folder, INPUTS))
    model, told = getattr(tf, made).from_pretrained(folder, trust_remote_code=trusted, output_loading_info=True)
    assert not any(told.values()), told
    model.eval()
    logits = said(model, inputs)
    if hasattr(model.config, "per_layer_blocks"):
        model.set_attn_implementation("eager")
        assert torch.allclose(said(model, inputs), logits, atol=1e-5), "another attention says something else"
        model.save_pretrained(Path(folder, "again"))
        again = getattr(tf, made).from_pretrained(Path(folder, "again"), trust_remote_code=trusted).eval()
        assert type(again).__name__ == type(model).__name__
        assert torch.allclose(said(again, inputs), logits, atol=1e-6), "saved again, it says something else"
    count = sum(parameter.numel() for parameter in model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": count,
        "logits": logits.tolist(),
        "written": written(model, inputs),
        "learnt": learnt(model, inputs),
    }


def main(asked):
    torch.set_num_threads(1)
    tf.logging.set_verbosity_error()
    found = {}
    for name, (folder, needed, trusted) in sorted(asked.items(), key=lambda item: item[1][1] or ""):
        if needed:
            __import__(needed)
        assert needed or "optimum_dsa" not in sys.modules
        try:
            found[name] = facts(folder, trusted)
        except Exception:  # noqa: BLE001 - one that fails is told apart from the others
            found[name] = {"error": traceback.format_exc()}
    return found


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
