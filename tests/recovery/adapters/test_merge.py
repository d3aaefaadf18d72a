import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from optimum_dsa import DSAConfig, DSAPruner, find_architecture
from optimum_dsa.recovery.adapters.merge import Merged

from ...tiny import tiny_llama, tokens


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["k_proj"]}])
@pytest.mark.parametrize("fill", [False, True])
def test_merging_an_adapter_of_the_dense_model_says_how_many_zeros_it_would_fill(fill, settings, tmp_path, caplog):
    tiny_llama().save_pretrained(tmp_path / "dense")
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), adapters).save_pretrained(
        tmp_path / "adapter"
    )
    pruner = DSAPruner(tiny_llama())
    pruner.prune(tokens(), DSAConfig(0.5, "wanda", "uniform"))
    under = [
        w
        for w in find_architecture(pruner.model).weights
        if w.module.endswith(("q_proj", "v_proj", *settings.get("modules_to_save", ())))
    ]
    zeros = sum(int((weight.tensor(pruner.model) == 0).sum()) for weight in under)
    before = pruner.report.removed
    pruner.model = PeftModel.from_pretrained(pruner.model, str(tmp_path / "adapter"))
    assert pruner.merge(fill=fill) == Merged(zeros, zeros)
    assert f"a value for {zeros} of the {zeros} zeros under them (100.00%)" in caplog.text
    assert pruner.report.removed == (before - zeros if fill else before)
    assert pruner.verify().holds
    pruner.save_pretrained(tmp_path / "merged")
    assert DSAPruner.from_pretrained(tmp_path / "merged").verify().holds
    with pytest.raises(ValueError, match="is no PEFT model"):
        pruner.merge()
