"""SIGTERM, Ctrl-C and a closed terminal end a command as they end any program, with a line that says what goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """The process was told to stop. Not an Exception: nothing that handles errors should go on after it.

    What was stopped says in ``continues`` what goes on from there.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.continues = signum, ""

    @property
    def status(self) -> int:
        """Exit status that a shell gives to a program killed by this signal."""
        return 128 + self.signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}" + (f": {self.continues}" if self.continues else "")


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises :class:`Stopped` where a signal comes in, once; a second one ends the process on the spot.

    Lightning calls the handler that it finds after its own, which alone would end the process with status 0.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()
    received: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a worker of a loader, forked with this handler
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif received:
            os._exit(128 + signum)
        else:
            received.append(signum)
            raise Stopped(signum)

    defaults = (signal.SIG_DFL, signal.default_int_handler)  # what is ignored, as under nohup, stays ignored
    before = {signum: handler for signum in _SIGNALS if (handler := signal.getsignal(signum)) in defaults}
    for signum in before:
        signal.signal(signum, stop)
    try:
        yield
    except SystemExit as error:
        if received:  # the first exception was lost in a destructor, and Lightning has ended the run
            raise Stopped(received[0]) from error
        raise
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
