"""Real processes that begin with the package imported: a fork server imports it once for each worker of pytest.

``subprocess`` costs ten seconds of imports a process. These are processes of their own as well, with their own working
directory, environment, output and signals; what they do not test is the import itself and the console script.
"""

from __future__ import annotations

import multiprocessing
import runpy
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("process_child.py")
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "emim_solo.benchmark.runner",
        "emim_solo.tuning.command",
        "emim_solo.evaluation.score",
        "emim_solo.checkpoints.export",
    ]
)


class Started:
    """A process that was started, called as ``subprocess.Popen`` is where that is needed."""

    def __init__(self, process: Any, folder: Path) -> None:
        self.process, self.folder = process, folder
        self.pid = process.pid

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, "still running"
        return int(code)

    def send_signal(self, number: int) -> None:
        import os

        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")


def start(
    *arguments: object,
    script: Path | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    prepare: str = "",
) -> Started:
    """Start ``emim-solo ARGUMENTS``, or a script with these arguments.

    Args:
        arguments: of the command or the script.
        script: a Python file; None for the command line of the package.
        cwd: working directory; that of the tests otherwise.
        env: variables beside those that are there.
        prepare: Python that the process runs first.
    """
    folder = Path(tempfile.mkdtemp())
    given = {
        "arguments": [str(argument) for argument in arguments],
        "script": None if script is None else str(script),
        "cwd": None if cwd is None else str(cwd),
        "env": dict(env or {}),
        "prepare": prepare,
        "output": str(folder),
    }
    process = _CONTEXT.Process(target=runpy.run_path, args=(str(CHILD), {"given": given}, "child"))
    process.start()
    return Started(process, folder)


def command(*arguments: object, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """:func:`start` to its end."""
    started = start(*arguments, **options)
    code = started.wait(timeout)
    return subprocess.CompletedProcess(arguments, code, started.stdout, started.stderr)
