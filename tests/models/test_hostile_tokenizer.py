"""Tokenizers from strangers: whatever is wrong with their files, there is one ModelError, no code runs and nothing hangs."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
from tiny import write_tiny

from luthier.errors import ModelError
from luthier.models import load as load_module
from luthier.models.load import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "model", "llama")


def refused(folder: Path, message: str = "the folder must hold a whole tokenizer") -> str:
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(str(folder))
    assert len(str(caught.value)) < 1000
    return str(caught.value)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "", "nul", '{"model": {"type": "BPE"', "[1, 2]", "\ud800"]
)
def test_json_that_is_none(folder: Path, file: str, content: str) -> None:
    (folder / file).write_bytes(content.encode("utf-8", "surrogatepass"))
    refused(folder)


def test_a_pipe_in_the_folder_does_not_hang(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")
    refused(folder, r"a model folder holds files; .*tokenizer\.json is a pipe or a device")


def test_a_file_without_end_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "MAX_TOKENIZER_BYTES", 1 << 20)
    os.truncate(folder / "tokenizer.json", (1 << 20) + 1)
    refused(folder, r"a tokenizer's file has at most 1048576 bytes; .*tokenizer\.json has 1048577")


def test_merges_and_tokens_that_contradict_each_other(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"].append(["never", "there"])
    (folder / "tokenizer.json").write_text(json.dumps(content))
    refused(folder)


@pytest.mark.parametrize("name", ["EvilTokenizer", "os.system", "../../evil", "PreTrainedModel"])
def test_a_class_that_is_no_tokenizer(folder: Path, name: str) -> None:
    """It is refused, or the tokenizer in tokenizer.json is read all the same; nothing of that name is run."""
    edit(folder / "tokenizer_config.json", tokenizer_class=name)
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with contextlib.suppress(ModelError):
        assert load_tokenizer(str(folder))("<|im_end|>").input_ids == [2]


def test_pickles_beside_the_tokenizer_are_not_opened(folder: Path) -> None:
    marker = folder.parent / "ran"
    for name in ("vocab.bin", "tokenizer.bin", "vocab.pkl", "training_args.bin", "corpus.bin"):
        (folder / name).write_bytes(pickle.dumps(_Payload(str(marker))))
    load_tokenizer(str(folder))
    assert not marker.exists()


class _Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@pytest.mark.parametrize("seed", range(3))
def test_random_mutations(folder: Path, seed: int) -> None:
    """Values of tokenizer.json and its settings replaced at random: it loads, or there is a ModelError, and nothing else."""
    rng = random.Random(seed)
    names = ("tokenizer.json", "tokenizer_config.json")
    whole = {name: json.loads((folder / name).read_text()) for name in names}
    refusals = 0
    for _ in range(30):
        for name in names:
            (folder / name).write_text(json.dumps(whole[name]))
        name = rng.choice(names)
        content = json.loads((folder / name).read_text())
        _mutate(content, rng)
        (folder / name).write_text(json.dumps(content))
        try:
            load_tokenizer(str(folder))
        except ModelError:
            refusals += 1
    assert refusals > 3


VALUES: tuple[Any, ...] = (None, -1, 1 << 70, 0.5, "", "x" * 1000, [], {}, [[]], {"type": "Evil"}, True, "(", "\u0000")


def _mutate(content: Any, rng: random.Random) -> None:
    """Put something else in the place of one value, wherever it stands."""
    while True:
        keys = list(content) if isinstance(content, dict) else range(len(content))
        key = rng.choice(list(keys))
        inner = content[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            content = inner
            continue
        content[key] = rng.choice(VALUES)
        return
