"""`python -m optimum_dsa` is `optimum-cli dsa`, for `torchrun` and `accelerate launch`: these start modules."""

import sys

from optimum.commands.optimum_cli import main


if __name__ == "__main__":
    sys.argv = ["optimum-cli", "dsa", *sys.argv[1:]]
    main()
