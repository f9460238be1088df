"""The configs that are shipped: finds them by name, lists them, copies them.

They lie in ``scripts/`` of a checkout and in ``emim_solo/scripts`` of an installed package.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from emim_solo.ground.errors import UsageError


@cache
def root() -> Path:
    """The folder of the shipped configs."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "scripts", package.parent / "scripts"):
        if (folder / "pretrain").is_dir():
            return folder
    raise UsageError("configs.missing", f"the shipped configs are missing beside '{package}': install emim-solo again")


def find(name: str | os.PathLike[str]) -> Path:
    """The folder that ``--config-path`` means: one of the user's own, else the shipped one of that name.

    Args:
        name: a folder, absolute or relative to the working directory, or a shipped one such as ``pretrain/digits``;
            ``scripts/pretrain/digits`` is the same one.

    Raises:
        UsageError: neither exists.
    """
    given = Path(name).expanduser()
    if given.is_dir():
        return given.resolve()
    if not given.is_absolute():
        plain = given.relative_to("scripts") if given.parts[:1] == ("scripts",) else given
        shipped = root() / plain
        if shipped.is_dir() and ".." not in plain.parts:
            return shipped
    raise UsageError(
        "configs.folder",
        f"no config folder '{name}': expected a folder, or a shipped one: {', '.join(folders())}; "
        "'emim-solo configs' lists what is in them",
    )


def files() -> Iterator[Path]:
    """Every shipped file, relative to :func:`root`, sorted."""
    for path in sorted(root().rglob("*")):
        if path.suffix in (".yaml", ".sh") and path.is_file():
            yield path.relative_to(root())


def folders() -> list[str]:
    """What may be given to :func:`find`: folders with whole configs."""
    return sorted({path.parent.as_posix() for path in files() if _is_whole(path)})


def names(folder: str | os.PathLike[str]) -> list[str]:
    """The whole configs of a folder, what ``--config-name`` may be.

    Raises:
        UsageError: there is no such folder.
    """
    return sorted(path.name for path in find(folder).iterdir() if _is_whole(path))


def protocols() -> list[str]:
    """Names of the shipped protocols of ``emim-solo score``."""
    return _stems("score")


def searches() -> list[str]:
    """Names of the shipped searches of ``emim-solo tune``."""
    return _stems("tune")


def _stems(folder: str) -> list[str]:
    return sorted(path.stem for path in (root() / folder).glob("*.yaml"))


def file_or_shipped(name: str, folder: str, kind: str) -> Path:
    """A YAML file of the user's own, else the one of that name in a shipped folder; ``kind`` says what it is.

    Raises:
        UsageError: there is neither.
    """
    path = Path(name).expanduser()
    path = path if path.is_file() else root() / folder / f"{name}.yaml"
    if not path.is_file():
        raise UsageError(
            kind, f"no {kind} '{name}': expected a YAML file, or a shipped one: {', '.join(_stems(folder))}"
        )
    return path


def copy(target: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
    """Copy every shipped file into ``target``, keeping the folders.

    Args:
        target: created if missing.
        force: overwrite files that are there.

    Returns:
        The files written.

    Raises:
        UsageError: a file is there already and ``force`` is False; then nothing is written.
    """
    folder = Path(target).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError("--copy", f"'{folder}' is a file: expected a folder to copy the configs into")
    taken = [path for path in files() if (folder / path).exists()]
    if taken and not force:
        raise UsageError(
            "--copy",
            f"'{folder}' has {len(taken)} of these files already, '{taken[0]}' first: "
            "choose another folder, or overwrite them with --force",
        )
    written = []
    for path in files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root() / path, folder / path)
        written.append(folder / path)
    return written


def main(argv: Sequence[str] | None = None) -> None:
    """``emim-solo configs``: list them, print where one folder is, or copy all with ``--copy DIR``."""
    parser = argparse.ArgumentParser(
        prog="emim-solo configs", description="List the configs that are shipped, or copy them to change them."
    )
    parser.add_argument(
        "folder", nargs="?", help="print where this one is, as in --config-path $(emim-solo configs FOLDER)"
    )
    parser.add_argument("--copy", metavar="DIR", help="copy all of them into DIR")
    parser.add_argument("--force", action="store_true", help="with --copy: overwrite files that are there")
    arguments = parser.parse_args(argv)
    if arguments.copy is not None:
        written = copy(arguments.copy, force=arguments.force)
        print(f"{len(written)} files in '{arguments.copy}'")
        return
    if arguments.folder is not None:
        print(find(arguments.folder))
        return
    print(f"in '{root()}', usable from anywhere as --config-path FOLDER --config-name FILE:")
    for folder in folders():
        print(f"  {folder}: {', '.join(names(root() / folder))}")
    print(f"protocols of emim-solo score, usable as --protocol NAME: {', '.join(protocols())}")
    print(f"searches of emim-solo tune, usable as --search NAME: {', '.join(searches())}")
    print("for the scripts of a solo-learn clone, to be copied and run with bash:")
    print(f"  {', '.join(path.as_posix() for path in files() if path.suffix == '.sh')}")


def _is_whole(path: Path) -> bool:
    """Whether a file is a config of its own, not a part of others (``_base.yaml``, ``augmentations/``), a protocol or a search."""
    parts = ("augmentations", "score", "tune")
    return path.suffix == ".yaml" and not path.name.startswith("_") and path.parent.name not in parts
