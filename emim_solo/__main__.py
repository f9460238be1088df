"""``python -m emim_solo SCRIPT args...`` runs a script with EMIM registered; ``python -m emim_solo COMMAND`` is ``emim-solo``.

The first form is for solo-learn's scripts that never start Hydra (main_knn.py, main_umap.py). For DDP, start a script
with ``torchrun -m emim_solo SCRIPT args...``: Lightning's launcher would start the other processes without EMIM.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from emim_solo import cli
from emim_solo.ground.errors import UsageError
from emim_solo.plugin.registration import register


def main() -> None:
    """Run a script, or a command of the package. Exits with status 2 if there is no such script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", *cli.COMMANDS):
        cli.main(arguments)
        return
    script = Path(arguments[0])
    if not script.is_file():
        commands = ", ".join(cli.COMMANDS)
        cli.refuse(f"no script '{script}': expected a Python file, or one of the commands {commands}")
    try:
        register()
        sys.argv = arguments
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = str(script.resolve().parent)  # as Python itself does for `python SCRIPT`
        runpy.run_path(str(script), run_name="__main__")
    except UsageError as error:
        cli.refuse(str(error))


if __name__ == "__main__":
    main()
