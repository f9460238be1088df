"""A plugin of Hydra. Every Hydra app loads it, so it must load fast: it imports neither torch nor solo-learn."""

from __future__ import annotations

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class EMIMSearchPath(SearchPathPlugin):
    """Registers EMIM with an unmodified solo-learn, because Hydra calls a plugin of this kind before each app's job.

    The search path itself is not changed. Shipped configs on it would be config groups of every other Hydra app, too.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from emim_solo.plugin.registration import register

        register()
