"""What a machine or a user has set does not reach the tests.

`conftest.py` imports this before anything else, for libraries read their variables when they are imported. What tests
start inherits what is left. Nothing but pytest may import it: a launcher's variables are cleared as well.
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
    *("OPTIMUM_DSA_", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "PYTHONWARNINGS", "MPLBACKEND"),
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
