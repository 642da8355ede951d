"""What `eval` and `chat` are pointed at: runs, models, adapters."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import send_at, tiny_config

from luthier.errors import ConfigError, Interrupted
from luthier.models.load import load
from luthier.training.load_run import load_target
from luthier.training.run import train

pytestmark = pytest.mark.usefixtures("without_plots")
IDS = torch.arange(3, 40)[None]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_a_run_gives_its_tuned_model(tiny_llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config(tiny_llama, tmp_path))
    tuned, plain = load_target(str(run)), load_target(str(tiny_llama))
    assert (tuned.adapter, tuned.run_dir, tuned.name) == (str(run / "adapter"), run, str(run))
    assert (plain.adapter, plain.run_dir) == (None, None)
    assert torch.equal(logits(plain.model), logits(load(str(tiny_llama)).model))
    assert not torch.allclose(logits(tuned.model), logits(plain.model), atol=1e-3)
    assert (tuned.notes, plain.notes) == ([], [])
    other = load_target(str(tiny_llama), adapter=str(run / "adapter"))
    assert torch.equal(logits(other.model), logits(tuned.model))
    assert not any(module.training for module in tuned.model.modules())


def test_a_full_run_gives_its_own_weights(tiny_llama: Path, tmp_path: Path) -> None:
    keys = {"method": "full", "rank": 16, "alpha": 32, "steps": 2, "learning_rate": 1e-3}
    train(tiny_config(tiny_llama, tmp_path, **keys))
    tuned = load_target(str(tmp_path / "run"))
    assert tuned.adapter is None
    assert not torch.allclose(logits(tuned.model), logits(load(str(tiny_llama)).model), atol=1e-3)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/model", "a\0b", "", "no/such/model/here"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ConfigError):
        load_target(name, offline=True)


def test_an_unfinished_run_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(tiny_config(tiny_llama, tmp_path), listener=send_at(1, signal.SIGINT))
    with pytest.raises(ConfigError, match=r"the run must be finished; .* is not\. Finish it with `luthier resume"):
        load_target(str(tmp_path / "run"))
