"""What a process of tests/processes.py does; run there with ``given`` among its globals."""

import multiprocessing
import os
import runpy
import sys

given = globals()["given"]  # by processes.start
multiprocessing.set_start_method("fork", force=True)  # that of an ordinary process, for the workers of its loaders
for number, name in ((1, "stdout"), (2, "stderr")):
    file = os.open(os.path.join(given["output"], name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, number)
sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - as long as the process
sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
if given["cwd"] is not None:
    os.chdir(given["cwd"])
os.environ.update(given["env"])
if given["prepare"]:
    exec(given["prepare"])
if given["script"] is None:
    from emim_solo.cli import main

    sys.argv = ["emim-solo", *given["arguments"]]
    main(given["arguments"])
else:
    sys.argv = [given["script"], *given["arguments"]]
    runpy.run_path(given["script"], run_name="__main__")
