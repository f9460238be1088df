"""``python -m emim_solo.benchmark.pretrain_one CONFIG VERSION``: one run of a benchmark in processes of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf

from emim_solo.ground.errors import UsageError


def main(arguments: Sequence[str]) -> int:
    """Train from a config file; returns the exit status."""
    from emim_solo.ground.stopping import Stopped, stoppable
    from emim_solo.training.pretraining import prepare, pretrain

    config, version = arguments
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    try:
        with stoppable():
            pretrain(prepare(cfg), version=version)
    except Stopped as stopped:
        return stopped.status
    except (UsageError, FloatingPointError) as error:
        print(f"emim-solo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
