"""Hydra loads this in every Hydra app, so it must stay light: it imports neither torch nor solo-learn."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class EMIMSearchPath(SearchPathPlugin):
    """Registers EMIM with an unmodified solo-learn: of Hydra's plugins this kind is asked before every app's job.

    The search path itself stays as it is. Shipped configs on it would be groups of every other Hydra app as well.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from emim_solo.plugin.registration import register

        register()
