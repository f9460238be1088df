"""The one error that a user can cause and mend."""

from __future__ import annotations

try:
    from hydra.errors import CompactHydraException
except ModuleNotFoundError:  # where the loss and the score alone are installed

    class CompactHydraException(Exception):  # type: ignore[no-redef]
        pass


class UsageError(CompactHydraException, ValueError):
    """Something given from outside is wrong: a config value, a folder, a checkpoint, an installation.

    The message says in one line what was wrong, what was expected and what to do. The command line prints it and exits
    with status 2; Hydra prints exceptions of its compact kind without traceback, in a clone's main_pretrain.py too.

    Attributes:
        key: what is wrong, for programs: the key of a config (``optimizer.lr``), or a kind (``checkpoint.damaged``).
    """

    def __init__(self, key: str, message: str | None = None) -> None:
        # A DataLoader raises the error of its worker again, with the worker's whole traceback for its only argument.
        text = key if message is None else message
        lines = text.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip().splitlines()
        super().__init__("\\n".join(lines))  # a value in it may have lines
        self.key = "" if message is None else key
