"""Feed every reader with many inputs, and say what came of them: `python -m tests.fuzz --examples 100000`."""

from __future__ import annotations

import argparse
import logging
import resource
import sys
import warnings

from transformers.utils.logging import disable_progress_bar

from .feeding import feed_many
from .targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--examples", type=int, default=100_000, help="inputs of each target (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="number of the first; a number always gives one input")
    parser.add_argument("--target", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--memory", type=int, default=6, help="GB of address space that may be added (default: 6)")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    disable_progress_bar()
    failed = 0
    for name in args.target:
        target = TARGETS[name]
        target.seeds()
        with open("/proc/self/statm") as file:  # what a bomb asks for is refused, and so found
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + args.memory * 2**30, resource.RLIM_INFINITY))
        tally = feed_many(target, range(args.start, args.start + args.examples))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        seconds, number = tally.slowest
        print(
            f"{name}: {sum(tally.said.values()):,} inputs, {tally.said['read']:,} read, {tally.said['refused']:,} "
            f"refused by name, {tally.said['failed']:,} failed; slowest {seconds:.2f} s (input {number}), memory "
            f"+{tally.memory / 1024:.0f} MB",
            flush=True,
        )
        for place, first in tally.failures.items():
            print(f"    input {first}: {place}", flush=True)
        failed += bool(tally.failures)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
