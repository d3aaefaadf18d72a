"""Only errors that have a name come out of a reader, soon, and in little memory."""

import os
import resource

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .feeding import feed
from .targets import TARGETS


EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 300))
SECONDS = 5.0  # of one input; all but loading a model take milliseconds
MEMORY = 400 * 1024  # KB that all inputs of a target together may add


@pytest.mark.parametrize("name", TARGETS)
def test_a_real_file_is_read(name, tmp_path):
    target = TARGETS[name]
    for number, content in enumerate(target.seeds()[:4]):
        (tmp_path / str(number)).mkdir()
        target.read(content, tmp_path / str(number))


@pytest.mark.parametrize("name", TARGETS)
def test_a_file_made_wrong_ends_in_an_error_that_has_a_name(name):
    target = TARGETS[name]
    feed(target, target.seeds()[0])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @given(st.integers(0, 2**64 - 1))
    @settings(
        max_examples=max(EXAMPLES // target.cost, 1),
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def run(number):
        assert feed(target, target.wrong(number))[1] < SECONDS

    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY
