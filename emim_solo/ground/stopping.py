"""Ends a command on SIGTERM, Ctrl-C or a closed terminal with the usual status, and a line that says how to continue."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """The process was told to stop. It is no Exception, because code that handles errors must not go on after it.

    The code that was stopped puts into ``continues`` how to continue.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.continues = signum, ""

    @property
    def status(self) -> int:
        """The exit status that a shell reports for a program killed by this signal."""
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}" + (f": {self.continues}" if self.continues else "")


@contextmanager
def stoppable() -> Iterator[None]:
    """Within it, the first signal raises :class:`Stopped`, and a second one ends the process at once.

    Lightning calls this handler after its own. Lightning's handler alone would end the process with status 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # in a loader's worker, which was forked with this handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif received:
            os._exit(128 + signum)
        else:
            received.append(signum)
            raise Stopped(signum)

    defaults = (signal.SIG_DFL, signal.default_int_handler)  # a signal that is ignored, as under nohup, stays ignored
    before = {signum: handler for signum in _SIGNALS if (handler := signal.getsignal(signum)) in defaults}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    except SystemExit as error:
        if received:  # the Stopped was lost in a destructor, and Lightning has ended the run
            raise Stopped(received[0]) from error
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
