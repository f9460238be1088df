"""Tab completion of ``emim-solo``: commands, folders and configs by us, keys and groups by Hydra.

``eval "$(emim-solo -sc install=bash)"`` gives a shell Hydra's function. It asks ``emim-solo -sc query=bash`` with the
line typed so far in ``COMP_LINE``, and Hydra then knows neither our commands nor the config that is named in the line.
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
_PARSER = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # of what Hydra must know to find the config
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
        composed: by name those whose configs Hydra composes.
    """
    *before, current = [*line.split()[1:], ""] if line.endswith(" ") else line.split()[1:] or [""]
    # What is wrong in a line is said when it is run, not while it is typed.
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
