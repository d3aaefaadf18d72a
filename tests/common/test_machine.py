"""What a machine says of itself."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimum_dsa.common.machine import bytes_in, lying_in_files, machine_name, settled_memory, shown_bytes


def test_a_machine_is_its_processor_and_nobody_s_name():
    assert re.fullmatch(r".+, \d+ cores?", machine_name())


def test_where_nobody_says_a_processor_is_what_python_calls_it(monkeypatch):
    def missing(self, *args, **options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert machine_name() == "riscv64, 1 core"


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="the system does not say")
def test_what_is_given_back_is_not_this_process_s():
    before = settled_memory()
    kept = torch.ones(2**24)
    assert 2**26 <= settled_memory() - before < 2**26 + 2**23
    del kept
    assert abs(settled_memory() - before) < 2**23


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="the system does not say")
def test_what_is_read_where_it_lies_is_told_from_what_was_copied(tmp_path):
    save_file({"a": torch.ones(1000), "b": torch.ones(10)}, tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    here = {name: tensor.clone() for name, tensor in found.items()}
    assert lying_in_files(here.values()) == 0
    mapped = torch.from_file(str(tmp_path / "x.safetensors"), size=100, dtype=torch.uint8)
    assert lying_in_files([*here.values(), mapped, torch.empty(0), torch.empty(3, device="meta")]) == 100


def test_bytes_are_shown_in_three_digits():
    assert [shown_bytes(number) for number in (0, 999, 1e3, 12_345, 3e9)] == [
        "0 B",
        "999 B",
        "1 KB",
        "12.3 KB",
        "3 GB",
    ]


def test_bytes_are_read_as_they_are_shown():
    assert [bytes_in(text) for text in ("80GB", "1.5 tb", "2KB", " 7 B ")] == [80 * 10**9, 15 * 10**11, 2000, 7]
    for text in ("80", "GB", "-1GB", "0GB", "80GiB"):
        with pytest.raises(ValueError, match="such as 80GB; got"):
            bytes_in(text)
