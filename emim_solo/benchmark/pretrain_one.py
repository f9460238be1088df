"""``python -m emim_solo.benchmark.pretrain_one CONFIG VERSION``: pretrain one run of a benchmark in its own processes."""

from __future__ import annotations

import sys
from typing import Any

from omegaconf import OmegaConf

from emim_solo.ground.errors import UsageError
from emim_solo.ground.stopping import Stopped, stoppable
from emim_solo.training.pretraining import prepare, pretrain

DIVERGED = 3  # the status of a run whose loss became NaN or infinite

if __name__ == "__main__":
    config: Any = OmegaConf.load(sys.argv[1])
    try:
        with stoppable():
            pretrain(prepare(config), version=sys.argv[2])
    except Stopped as stopped:
        raise SystemExit(stopped.status) from None
    except UsageError as error:
        raise SystemExit(f"emim-solo: {error}") from None
    except FloatingPointError as error:
        print(f"emim-solo: {error}", file=sys.stderr)
        raise SystemExit(DIVERGED) from None
