"""A prune that the model refuses leaves nothing that hinders the next."""

from pathlib import Path

from optimum_dsa import DSAPruner, demo_model
from optimum_dsa.model.stacks import UnprunableError

from ..test_commands import run


def test_blocks_of_a_refused_run_do_not_have_to_be_resumed(monkeypatch, capsys, tmp_path):
    def refused(self, source, config, checkpoints, resume):
        Path(checkpoints).mkdir(parents=True, exist_ok=True)
        Path(checkpoints, "block-00000.safetensors").write_bytes(b"x")
        raise UnprunableError("this weight cannot be pruned")

    monkeypatch.setattr(DSAPruner, "prune", refused)
    options = ["-s", "0.5", "--method", "magnitude", "--allocation", "uniform"]
    for _ in range(2):
        code, _, errors = run(monkeypatch, capsys, "prune", str(demo_model()), "-o", str(tmp_path / "out"), *options)
        assert code == 2 and "this weight cannot be pruned" in errors
    assert [*tmp_path.iterdir()] == []
