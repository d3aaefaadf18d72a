"""Who works where: a GPU for every process, or the CPU for all."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimum_dsa import DSACallback, use_cpu
from optimum_dsa.common import devices
from optimum_dsa.common.devices import choose_device, own_device, own_share


@pytest.fixture
def machine(monkeypatch):
    """`machine(gpus, processes, rank)`: what torch and a launcher would say there."""
    devices._warn.cache_clear()

    def set_up(gpus, processes=None, rank=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        for name, value in (("LOCAL_WORLD_SIZE", processes), ("LOCAL_RANK", rank)):
            monkeypatch.delenv(name, raising=False)
            if value is not None:
                monkeypatch.setenv(name, str(value))

    return set_up


@given(st.integers(1, 16), st.integers(0, 16))
def test_each_has_a_gpu_of_its_own_or_all_are_on_the_cpu(processes, gpus):
    chosen = [choose_device(processes, gpus, rank) for rank in range(processes)]
    if processes <= gpus:
        assert len({torch.device(name).index for name in chosen}) == processes
        assert all(torch.device(name).index < gpus for name in chosen)
    else:
        assert set(chosen) == {"cpu"}


@pytest.mark.parametrize(
    "gpus,processes,rank,expected",
    [
        (0, None, None, "cpu"),
        (1, None, None, "cuda"),
        (2, None, None, "cuda"),
        (1, 1, 0, "cuda:0"),
        (1, 2, 1, "cpu"),
        (2, 2, 1, "cuda:1"),
        (0, 2, 1, "cpu"),
        (1, None, 3, "cuda:0"),  # a launcher that shows each process its own GPU
        (2, None, -1, "cuda"),  # how some say that there is no launcher
    ],
)
def test_what_this_process_finds(machine, gpus, processes, rank, expected):
    machine(gpus, processes, rank)
    assert own_device() == expected and use_cpu() == (expected == "cpu")


def test_a_warning_names_processes_and_gpus_once_and_in_one_process(machine, caplog):
    with caplog.at_level(logging.WARNING, "optimum_dsa"):
        for gpus, processes, rank in ((0, 2, 0), (2, 2, 0), (1, 2, 1)):
            machine(gpus, processes, rank)
            own_device()
        assert not caplog.records
        machine(1, 2, 0)
        own_device()
        own_device()
    (record,) = caplog.records
    assert "2 processes and 1 GPU on this machine" in record.getMessage() and "gloo" in record.getMessage()


@pytest.mark.parametrize("backend,refused", [("nccl", True), ("cuda:nccl,cpu:gloo", True), ("gloo", False)])
def test_training_through_nccl_needs_a_gpu_for_each(machine, monkeypatch, backend, refused):
    class Trainer:
        class callback_handler:
            callbacks = []

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    machine(2, 2, 0)
    DSACallback().attach(Trainer)
    machine(1, 2, 0)
    for begin in (lambda: DSACallback().attach(Trainer), lambda: DSACallback().on_init_end(None, None, None)):
        if refused:
            with pytest.raises(ValueError, match=r"2 processes share 1 GPU, .*use_cpu=optimum_dsa.use_cpu\(\)"):
                begin()
        else:
            begin()


@pytest.mark.parametrize("gpus,processes", [(0, 2), (1, 2), (2, 2), (8, 2), (7, 3)])
def test_processes_divide_a_machine_and_nothing_is_anybodys_twice(machine, monkeypatch, gpus, processes):
    monkeypatch.setattr(devices, "memory_available", lambda device="cpu": 1000)
    shares = []
    for rank in range(processes):
        machine(gpus, processes, rank)
        shares.append(own_share())
        # What it talks through is its own.
        assert torch.device(own_device()).index in (shares[-1] if gpus >= processes else (None,))
    given = [index for share in shares for index in share if index != "cpu"]
    assert sorted(given) == (list(range(gpus)) if gpus >= processes else [])
    assert all(share["cpu"] == 900 // processes for share in shares)
    assert all(size == 900 for share in shares for index, size in share.items() if index != "cpu")


def test_who_is_alone_has_all_of_a_machine(machine):
    machine(4)
    assert own_share() is None
