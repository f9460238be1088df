"""The error that a user can cause and correct."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

try:
    from hydra.errors import CompactHydraException
except ModuleNotFoundError:  # Hydra is missing if only the loss and the score are installed

    class CompactHydraException(Exception):  # type: ignore[no-redef]
        pass


class UsageError(CompactHydraException, ValueError):
    """An input is wrong: a config value, a folder, a checkpoint, an installation.

    The message says in one line what was wrong, what was expected and what to do. The command line prints it and exits
    with status 2. The base class is Hydra's, so that Hydra prints no traceback, also in solo-learn's main_pretrain.py.

    Attributes:
        key: what is wrong, for programs: the key of a config (``optimizer.lr``), or a kind (``checkpoint.damaged``).
    """

    def __init__(self, key: str, message: str | None = None) -> None:
        # A DataLoader raises a worker's error again, with the worker's whole traceback as its only argument.
        text = key if message is None else message
        lines = text.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip().splitlines()
        super().__init__("\\n".join(lines))  # a value in the message may have several lines
        self.key = "" if message is None else key


@contextmanager
def memory_in_one_line() -> Iterator[None]:
    """Within it, the end of memory becomes a UsageError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UsageError("memory", f"out of memory ({' '.join(str(error).split()[:12])})") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; for CPU memory, torch raises a plain RuntimeError."""
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in known)
