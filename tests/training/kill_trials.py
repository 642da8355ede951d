"""Kills a run with SIGKILL again and again and lets it go on; prints what each trial ended with.

Run by test_kill.py in a process of its own: it imports once, works on one thread and forks a child for every trial.
Arguments: model folder, working folder, then one number a trial: which of the calls that touch the disk or end a
step is the child's last. Prints one JSON object: trials [{kill, finished_by_itself, resumes, hash}].
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_runs import Recorder, adapter_hash, tiny_config

from luthier.training import checkpoint, files, report, run
from luthier.training.rundir import is_finished

# Whatever writes, syncs, renames or deletes, in the modules of a run.
WATCHED = [(os, "fsync"), (os, "rename"), (os, "replace"), (checkpoint, "save_file"), (files, "remove_tree"), (Path, "unlink")]


def counted(function: Callable[..., Any], calls: itertools.count, last: int) -> Callable[..., Any]:
    """`function`, except that the process is killed before call number `last` of all counted ones."""

    def call(*arguments: Any, **named: Any) -> Any:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)

    return call


def child(work: Callable[[Recorder], Any], last: int) -> bool:
    """Do `work` in a forked process that is killed at call `last` after its first checkpoint; True if it came to its end."""
    pid = os.fork()
    if pid == 0:
        calls = itertools.count()
        for owner, name in WATCHED:
            setattr(owner, name, counted(getattr(owner, name), calls, last))
        work(Recorder(counted(lambda _: None, calls, last)))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
    return not os.WIFSIGNALED(status)


def trial(model: Path, folder: Path, kill: int) -> dict[str, Any]:
    """Start a run, kill it at call `kill`, then resume and kill it a little later each time until it is finished."""
    config = tiny_config(model, folder, out=str(folder / f"run-{kill}"), dropout=0.2, save_every=2, steps=6)
    run_dir = Path(str(config.out))
    finished = child(lambda listener: run.train(config, listener=listener), kill)
    started = any(run_dir.glob("checkpoints/step-*"))
    if not started:
        return {"kill": kill, "started": False}
    resumes = 0
    while not is_finished(run_dir):
        resumes += 1
        child(lambda listener: run.resume(run_dir, listener=listener), kill + 23 * resumes)
    return {"kill": kill, "started": True, "finished_by_itself": finished, "resumes": resumes, "hash": adapter_hash(run_dir)}


def main() -> None:
    torch.set_num_threads(1)
    report.write_plots = lambda *_: None
    model, folder, *kills = sys.argv[1:]
    print(json.dumps({"trials": [trial(Path(model), Path(folder), int(kill)) for kill in kills]}))


if __name__ == "__main__":
    main()
