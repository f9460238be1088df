"""Finds, lists and copies the shipped configs, in ``scripts/`` of a checkout or ``emim_solo/scripts`` of an installation."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

from emim_solo.ground.errors import UsageError
from emim_solo.ground.files import read_text


@cache
def root() -> Path:
    """The folder of the shipped configs."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "scripts", package.parent / "scripts"):
        if (folder / "pretrain").is_dir():
            return folder
    raise UsageError("configs.missing", f"the shipped configs are missing beside '{package}': install emim-solo again")


def find(name: str | os.PathLike[str]) -> Path:
    """The folder for ``--config-path``: the user's own, else the shipped one of this name, with or without ``scripts/`` before it."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    shipped = Path(*folder.parts[1:]) if folder.parts[:1] == ("scripts",) else folder
    if not folder.is_absolute() and ".." not in shipped.parts and (root() / shipped).is_dir():
        return root() / shipped
    expected = f"expected a folder, or a shipped one: {', '.join(folders())}"
    raise UsageError("configs.folder", f"no config folder '{name}': {expected}; 'emim-solo configs' lists them")


def files() -> list[Path]:
    """Every shipped file, relative to :func:`root`, sorted."""
    return [path.relative_to(root()) for path in sorted(root().rglob("*")) if path.suffix in (".yaml", ".sh")]


def folders() -> list[str]:
    """Names for :func:`find`: the shipped folders that have whole configs."""
    return sorted({path.parent.as_posix() for path in files() if _is_whole(path)})


def names(folder: str | os.PathLike[str]) -> list[str]:
    """The whole configs of a folder, for ``--config-name``; UsageError if there is no such folder."""
    return sorted(path.name for path in find(folder).iterdir() if _is_whole(path))


def _is_whole(path: Path) -> bool:
    """Whether a file is a complete config, not a part of another one, a protocol or a search."""
    parts = ("augmentations", "score", "tune")
    return path.suffix == ".yaml" and not path.name.startswith("_") and path.parent.name not in parts


def stems(folder: str) -> list[str]:
    """Names of the YAML files in a shipped folder: the protocols in ``score``, the searches in ``tune``."""
    return sorted(path.stem for path in (root() / folder).glob("*.yaml"))


def values(name: str, folder: str, kind: str) -> dict[Any, Any]:
    """The values of the user's YAML file, else of the shipped one of this name in ``folder``. ``kind`` says in errors what it is."""
    import yaml  # not above: where torch is alone, a command still says in one line what it needs
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    paths = [Path(name).expanduser(), root() / folder / f"{name}.yaml"]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        expected = f"expected a YAML file, or a shipped one: {', '.join(stems(folder))}"
        raise UsageError(kind, f"no {kind} '{name}': {expected}")
    text = read_text(path)
    try:
        if not isinstance(yaml.compose(text, yaml.SafeLoader), yaml.MappingNode | None):
            raise UsageError(kind, f"{kind} '{path}' is no mapping: expected settings by name")
        return cast(dict[Any, Any], OmegaConf.to_container(OmegaConf.create(text)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UsageError(kind, f"{kind} '{path}' is no YAML ({' '.join(str(error).split())})") from error


def copy(target: str | os.PathLike[str], *, force: bool = False) -> list[Path]:
    """Copy every shipped file; returns the copies. If one exists already, UsageError without ``force``, and nothing is written."""
    folder = Path(target).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UsageError("--copy", f"'{folder}' is a file: expected a folder to copy the configs into")
    taken = [path for path in files() if (folder / path).exists()]
    if taken and not force:
        text = f"'{folder}' has {len(taken)} of these files already, '{taken[0]}' first"
        raise UsageError("--copy", f"{text}: choose another folder, or overwrite them with --force")
    for path in files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root() / path, folder / path)
    return [folder / path for path in files()]


def main(argv: Sequence[str] | None = None) -> None:
    """``emim-solo configs``: list the configs, print the path of one folder, or copy all with ``--copy DIR``."""
    text, example = (
        "List the shipped configs, or copy them to change them.",
        "example: emim-solo configs --copy emim-scripts",
    )
    parser = argparse.ArgumentParser(prog="emim-solo configs", description=text, epilog=example)
    where = "print where this one is, as in --config-path $(emim-solo configs FOLDER)"
    parser.add_argument("folder", nargs="?", help=where)
    parser.add_argument("--copy", metavar="DIR", help="copy all of them into DIR")
    parser.add_argument("--force", action="store_true", help="with --copy: overwrite files that are there")
    arguments = parser.parse_args(argv)
    if arguments.copy is not None:
        print(f"{len(copy(arguments.copy, force=arguments.force))} files in '{arguments.copy}'")
    elif arguments.folder is not None:
        print(find(arguments.folder))
    else:
        print(f"in '{root()}', usable from anywhere as --config-path FOLDER --config-name FILE:")
        for folder in folders():
            print(f"  {folder}: {', '.join(names(root() / folder))}")
        print(f"protocols of emim-solo score, usable as --protocol NAME: {', '.join(stems('score'))}")
        print(f"searches of emim-solo tune, usable as --search NAME: {', '.join(stems('tune'))}")
        print("for the scripts of a solo-learn clone, to be copied and run with bash:")
        print(f"  {', '.join(path.as_posix() for path in files() if path.suffix == '.sh')}")
