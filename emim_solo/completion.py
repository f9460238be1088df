"""Tab completion of ``emim-solo``. This module completes commands, folders and configs; Hydra, keys and groups.

``eval "$(emim-solo -sc install=bash)"`` installs Hydra's shell function, which calls ``emim-solo -sc query=bash`` with
the typed line in ``COMP_LINE``. Hydra itself knows neither the commands nor the config that the line names.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Callable, Mapping

from emim_solo.ground import configs
from emim_solo.ground.errors import UsageError

FLAGS = ("-sc", "--shell-completion")
_PATH, _NAME = ("--config-path", "-cp"), ("--config-name", "-cn")
OF_CONFIG = (*_PATH, *_NAME)
_PARSER = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # the flags by which Hydra finds the config
_PARSER.add_argument(*_PATH)
_PARSER.add_argument(*_NAME)
_SWITCHES = ("--cfg", "--config-name", "--config-path", "--help", "--multirun", "--resolve")


def answer(
    query: str, line: str, commands: Mapping[str, str], composed: Mapping[str, Callable[[list[str]], None]]
) -> None:
    """Print what may follow in a line such as ``emim-solo pretrain --config-path pretrain/digits --config-name e``.

    Args:
        query: ``query=SHELL``, for Hydra.
        line: as typed, up to the cursor.
        commands: every command of ``emim-solo``.
        composed: by name, the commands whose configs Hydra composes.
    """
    *before, current = [*line.split()[1:], ""] if line.endswith(" ") else line.split()[1:] or [""]
    # Errors in a line are reported when it is run, not while it is typed.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(UsageError, SystemExit):
        if not before:
            print(*(name for name in commands if name.startswith(current)), sep="\n")
        elif before[0] not in composed:
            return
        elif before[-1] in _PATH:
            print(*(name for name in configs.folders() if name.startswith(current)), sep="\n")
        elif before[-1] in _NAME:
            given = _PARSER.parse_known_args(before[1:-1])[0]
            print(*configs.names(given.config_path or before[0]), sep="\n")
        elif current.startswith("-"):
            print(*(name for name in _SWITCHES if name.startswith(current)), sep="\n")
        else:
            given, rest = _PARSER.parse_known_args(before[1:])
            os.environ["COMP_LINE"] = " ".join(["emim-solo", *rest, current])
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(given).items() if value]
            composed[before[0]]([*flags, FLAGS[0], query])
