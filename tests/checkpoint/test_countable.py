"""What has to be made dense before its zeros are counted, and what has not."""

from optimum_dsa import quantize
from optimum_dsa.checkpoint.countable import INTEGERS, countable

from ..tiny import tiny_llama


def test_a_folder_of_floats_is_counted_as_it_is_and_numbers_are_made_dense(tmp_path):
    folder = tmp_path / "in"
    tiny_llama().save_pretrained(folder)
    (folder / "dsa_config.json").write_text("{}")
    (folder / "modeling_own.py").write_text("")
    scratch = tmp_path / "scratch"
    assert countable(str(folder), scratch) == (str(folder), None) and not scratch.exists()
    assert countable("somebody/model", scratch) == ("somebody/model", None)
    quantize(folder, tmp_path / "out", 8, 0)
    assert countable(str(tmp_path / "out"), scratch) == (str(scratch), INTEGERS)
    found = {file.name for file in scratch.iterdir()}
    assert found == {"config.json", "dsa_config.json", "model.safetensors", "modeling_own.py"}
