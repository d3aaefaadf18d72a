"""The tests, and the surroundings that all of them have: what a machine or a user has set does not reach them.

Here and not in a fixture, for pytest imports this first, and libraries read their variables when they are imported.
Processes that tests start inherit it.
"""

import atexit
import os
import shutil
import tempfile


# Offline switches, tokens, addresses and caches; ranks of a launcher that pytest itself was started by; how wide and
# colourful a terminal is; what Python warns of.
FOREIGN = (
    *("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "ACCELERATE_", "PEFT_", "WANDB_", "TORCHELASTIC_"),
    *("OMPI_", "PMI_", "MV2_", "MASTER_", "GROUP_", "ROLE_", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"),
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS", "MPLBACKEND"),
)


def calm(environment: dict[str, str], home: str) -> dict[str, str]:
    """What of an environment reaches the tests, with caches in the folder `home`."""
    kept = {name: value for name, value in environment.items() if not name.startswith(FOREIGN)}
    return kept | {"HF_HOME": home, "MPLCONFIGDIR": home, "XDG_CACHE_HOME": home}


HOME = tempfile.mkdtemp(prefix="optimum-dsa-tests-")
atexit.register(shutil.rmtree, HOME, ignore_errors=True)
_kept = calm(dict(os.environ), HOME)
for _name in os.environ.keys() - _kept.keys():
    del os.environ[_name]
os.environ.update(_kept)
