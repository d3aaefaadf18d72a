"""What a machine says of itself."""

import re
from pathlib import Path

import pytest
import torch

from optimum_dsa.common.machine import machine_name, settled_memory, shown_bytes


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


def test_bytes_are_shown_in_three_digits():
    assert [shown_bytes(number) for number in (0, 999, 1e3, 12_345, 3e9)] == [
        "0 B",
        "999 B",
        "1 KB",
        "12.3 KB",
        "3 GB",
    ]
