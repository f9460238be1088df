"""Reads and writes files. Each is written to a temporary name and renamed, so that it is whole or absent. Errors name the file."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

from emim_solo.ground.errors import UsageError

_OF_PATHS = (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError)
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG, errno.EFBIG, errno.EIO, errno.EMFILE)
_IN_NO_NAME = r'[/\\:*?"<>|{}\x00-\x1f\x7f]'
_LONGEST_NAME = 120


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to. It is renamed to ``path`` when the block ends, and deleted if the block fails."""
    path = Path(path)
    # The suffix stays at the end, because savefig and Image.save choose the format by it.
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished{path.suffix}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_figure(stem: Path, figure: Any) -> None:
    """Write a matplotlib figure to ``stem``.png and ``stem``.pdf, each whole or not at all."""
    for suffix in (".png", ".pdf"):  # Path.with_suffix would replace the .5-val of emim-0.5-val
        with whole(f"{stem}{suffix}") as unfinished:
            figure.savefig(unfinished, dpi=200)


def read_text(path: str | os.PathLike[str]) -> str:
    """A text file in UTF-8, with or without a byte order mark; UsageError if it has another encoding."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"{error.reason} at byte {error.start}"
        raise UsageError("file.encoding", f"'{path}' is not UTF-8 ({reason}): save it as UTF-8") from error


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in a JSON file; UsageError if the file is damaged or holds something else."""
    try:
        content = json.loads(read_text(path))
        if not isinstance(content, dict):
            raise TypeError(f"got {type(content).__name__}")
    except (json.JSONDecodeError, TypeError) as error:
        text = f"'{path}' is damaged: expected an object in JSON ({error})"
        raise UsageError("file.damaged", f"{text}; put a whole copy in its place, or remove it") from error
    return content


def writable_folder(path: str | os.PathLike[str], key: str, needed: int = 0) -> Path:
    """Make a folder and check, before any work, that it is writable and that its disk has ``needed`` bytes left."""
    folder = Path(path)
    probe = folder / f".{os.getpid()}.unfinished"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UsageError(key, f"{key}: cannot write to '{folder}' ({error.strerror}): choose another folder") from error
    if free < needed:
        text = f"the disk of '{folder}' has {free / 1e6:.0f} MB left, {needed / 1e6:.0f} MB and more are needed"
        raise UsageError("disk.full", f"{key}: {text}: make room, or choose another folder")
    return folder


def check_name(key: str, name: Any) -> None:
    """Refuse a name of a run or method that would, as a file name, lead to another folder or be invalid."""
    text = name if isinstance(name, str) else ""
    wrong = re.search(_IN_NO_NAME, text)
    if wrong or not text.strip() or text != text.strip() or text[0] in ".-" or len(text.encode()) > _LONGEST_NAME:
        expected = f"1 to {_LONGEST_NAME} letters, digits, '_', '-', '+' and the like, the first a letter or digit"
        has = f", has {wrong[0]!r}" if wrong else ""
        raise UsageError(key, f"{key}={name!r} becomes a file name{has}: expected {expected}")


def as_name(text: str) -> str:
    """A text in which ``-`` replaces each character that a file name cannot have."""
    return re.sub(_IN_NO_NAME, "-", text)


def explain(error: OSError) -> str | None:
    """One line for the user about a disk, a folder or a download that failed; None for any other error."""
    if isinstance(error, URLError):
        return f"cannot download what is not there yet ({error.reason}): put it into the folder that the config names, or connect"
    if not isinstance(error, _OF_PATHS) and error.errno not in _OF_DISKS:
        return None
    name = error.filename2 or error.filename
    place = f" '{name}'" if name else ""
    return (
        f"cannot write or read{place}: {error.strerror or error}; make room or choose another folder, and start again"
    )
