"""Hydra loads this in every Hydra app, so it must stay light: it imports neither torch nor solo-learn."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class EMIMSearchPath(SearchPathPlugin):
    """Registers EMIM with an unmodified solo-learn and puts the shipped configs last on Hydra's search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from emim_solo import configs
        from emim_solo.registration import register

        register()
        search_path.append(provider="emim-solo", path=f"file://{configs.root().as_posix()}")
