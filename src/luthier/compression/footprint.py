"""How much memory a model takes where it is used: a process of its own loads it, reads a prompt, writes, and says its peak.

Another process, because in this one the peak would be that of calibration, and memory once freed hides what is taken again.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Any

from luthier.config import Storage
from luthier.errors import one_line

PROMPT_TOKENS, DECODED_TOKENS = 512, 32
# Not `-m`, which would look for modules in the present folder first.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from luthier.compression.footprint import main; main(sys.argv[2])"
)
_MARK = "footprint "


@dataclass(frozen=True)
class Footprint:
    """peak_bytes: resident at most (weights that are mapped count where they were touched), Python and its libraries in it;
    before_bytes: of these, resident before the model was loaded."""

    peak_bytes: int
    before_bytes: int


def footprint_of(model: str, *, base: Storage | None, offline: bool, threads: int) -> tuple[Footprint | None, str]:
    """The footprint of a model as `load` names it, or None; and why there is none, or ""."""
    request = json.dumps({"model": model, "base": base, "offline": offline, "threads": threads})
    command = [sys.executable, "-I", "-Wignore", "-c", _START, json.dumps(sys.path), request]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        return None, one_line(error.strerror or error)
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    if done.returncode or line is None:
        reason = f"signal {-done.returncode}" if done.returncode < 0 else (done.stderr.splitlines() or ["no answer"])[-1]
        return None, one_line(reason)
    return Footprint(**json.loads(line.removeprefix(_MARK))), ""


def main(request: str) -> None:
    """What the other process does; its last line is the answer."""
    import torch

    from luthier.models.load import load
    from luthier.training.memory import peak_rss_bytes, rss_bytes

    asked = json.loads(request)
    torch.set_num_threads(asked["threads"])
    before = rss_bytes()
    use(load(asked["model"], base=asked["base"], offline=asked["offline"]).model)
    sys.stdout.write(f"{_MARK}{json.dumps(asdict(Footprint(peak_rss_bytes(), before)))}\n")


def use(model: Any) -> None:
    """A prompt of PROMPT_TOKENS, or as many as the model has positions for, and greedy decoding behind it."""
    from luthier.generation.generator import Generator, position_limit

    limit = position_limit(model)
    length = PROMPT_TOKENS if limit is None else max(1, min(PROMPT_TOKENS, limit - DECODED_TOKENS))
    vocabulary = model.get_input_embeddings().num_embeddings
    Generator(model).generate([[token % vocabulary for token in range(length)]], DECODED_TOKENS)
