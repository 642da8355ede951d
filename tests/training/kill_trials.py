"""Kills a run with SIGKILL again and again and lets it go on; prints what each trial ended with.

Run by test_kill.py in a process of its own: it imports once, works on one thread and forks a child for every trial.
Arguments: model folder, working folder, then one moment a trial, at which the child is killed: the number of a call
among those that touch the disk or end a step, or the beginning of one's label, such as `os.replace env.json`. Before a
moment, `over:` starts the trial with `--overwrite` over a finished run.
Prints one JSON object: moments (all labels of a run that is not killed, in order) and trials [{kill, ended, retries,
hash}]: ended is what became of each process of the trial, "finished", "killed" or "refused".
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_runs import Recorder, adapter_hash, tiny_config

from luthier.config import RunConfig
from luthier.errors import CheckpointError
from luthier.training import checkpoint, prepare, report, run
from luthier.training.rundir import is_finished

# Whatever writes, syncs, renames or deletes.
WATCHED = [
    (os, "mkdir"),
    (os, "fsync"),
    (os, "rename"),
    (os, "replace"),
    (os, "unlink"),
    (os, "rmdir"),
    (checkpoint, "save_file"),
]
LATER = 61
MOST_RETRIES = 40
REFUSED = 3


class Moments:
    """The calls made so far, by label; the process is killed before the one at `kill`."""

    def __init__(self, kill: str):
        self.kill = kill
        self.labels: list[str] = []

    def reached(self, label: str) -> None:
        number = len(self.labels)
        self.labels.append(label)
        if number == int(self.kill) if self.kill.isdigit() else label.startswith(self.kill):
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, owner: Any, name: str) -> Callable[..., Any]:
        function = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            paths = [Path(argument).name for argument in arguments if isinstance(argument, (str, Path))]
            self.reached(" ".join([f"{owner.__name__.rpartition('.')[2]}.{name}", *paths[-1:]]))
            return function(*arguments, **named)

        return call


def child(work: Callable[[Recorder], Any], kill: str, labels_file: Path) -> str:
    """Do `work` in a forked process that is killed at the moment `kill`; says how it ended."""
    pid = os.fork()
    if pid == 0:
        moments = Moments(kill)
        for owner, name in WATCHED:
            setattr(owner, name, moments.watched(owner, name))
        try:
            work(Recorder(lambda step: moments.reached(f"step {step}")))
        except CheckpointError as error:
            if "--overwrite" not in str(error) and "`luthier train` starts one" not in str(error):
                raise
            os._exit(REFUSED)
        labels_file.write_text(json.dumps(moments.labels))
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "finished", REFUSED: "refused"}[os.waitstatus_to_exitcode(status)]


def trial(config: RunConfig, kill: str, labels_file: Path) -> dict[str, Any]:
    """Start a run and kill it, then do what its messages say, a little later killed each time, until it is finished.

    A run that cannot be resumed must say how to start it again, and then start.
    """
    run_dir = Path(str(config.out))

    def begin(listener: Recorder) -> None:
        run.train(config, listener=listener)

    def begin_again(listener: Recorder) -> None:
        run.train(config, listener=listener, overwrite=True)

    def go_on(listener: Recorder) -> None:
        run.resume(run_dir, listener=listener)

    ended = [child(begin_again if run_dir.exists() else begin, kill, labels_file)]
    while ended[-1] != "finished":
        assert len(ended) < MOST_RETRIES
        again = begin_again if ended[-1] == "refused" else go_on
        ended.append(child(again, str(LATER * len(ended)), labels_file))
    assert is_finished(run_dir)
    return {"kill": kill, "ended": ended, "retries": len(ended) - 1, "hash": adapter_hash(run_dir)}


def main() -> None:
    torch.set_num_threads(1)
    report.write_plots = lambda *_: None
    model, folder, *kills = sys.argv[1:]
    labels_file, straight = Path(folder) / "labels.json", Path(folder) / "straight"
    config = tiny_config(Path(model), Path(folder), out=str(straight), dropout=0.2, save_every=2, steps=6)
    plan = run.make_plan(config, prepare.read_data(config, Recorder()), Recorder())
    run.make_plan = lambda *_, **__: plan  # measured once for all processes
    trials = [trial(config, "never", labels_file)]
    labels = json.loads(labels_file.read_text())
    for number, kill in enumerate(kills):
        out = Path(folder) / f"run-{number}"
        if kill.startswith("over:"):
            shutil.copytree(straight, out)
        changed = config.model_copy(update={"out": str(out)})
        trials.append(trial(changed, kill.removeprefix("over:"), labels_file))
    print(json.dumps({"moments": labels, "trials": trials}))


if __name__ == "__main__":
    main()
