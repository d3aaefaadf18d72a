"""A command that is asked to end: by SIGTERM as by Ctrl-C."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..common.launched import process_count


class Terminated(KeyboardInterrupt):
    """SIGTERM came: what `kill`, a scheduler and a machine that is shut down send."""


def _never() -> bool:
    return False


@contextmanager
def stoppable(whole: Callable[[], bool] = _never) -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`, so that what is half-written goes and the user is told how to go on.

    From when the work is `whole` on it does nothing: what is left is to say so, and a process that is ended then would
    say that it had failed.
    """
    # Under a launcher a process may wait for others in a call that no exception ends; it is killed as ever.
    alone = process_count() == 1
    main = threading.current_thread() is threading.main_thread()
    if not (alone and main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return
    owner = os.getpid()

    def end(*_):
        if os.getpid() == owner:
            if whole():
                return
            raise Terminated
        # A process that was forked off to help, and has nothing to clear away.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if whole():  # libraries take a second to be shut down
            atexit.register(signal.signal, signal.SIGTERM, signal.SIG_IGN)
