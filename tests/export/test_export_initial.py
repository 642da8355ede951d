"""Adapters that began from the weights or their inputs, in every form: each stands on the base as anyone has it."""

from __future__ import annotations

from pathlib import Path

import pytest
from exporting import logits, relative
from tiny import write_tiny
from tiny_runs import tiny_config

from luthier.export.export import export
from luthier.export.subject import open_subject
from luthier.training.load_run import load_target
from luthier.training.run import train


@pytest.mark.parametrize(
    ("family", "method", "init", "variant"),
    [("llama", "lora", "pissa", "rslora"), ("qwen2", "qlora", "pissa", "lora"), ("phi3", "qlora", "qera", "lora")],
)
def test_every_form_computes_what_was_trained(tmp_path: Path, family: str, method: str, init: str, variant: str) -> None:
    model = write_tiny(tmp_path / "model", family, tied=False)
    changes = {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"o_proj": 3.0}}
    config = tiny_config(model, tmp_path, method=method, init=init, variant=variant, steps=2, **changes)
    train(config)
    for form in ("peft", "merged", "gguf", "gguf-adapter", "mlx"):
        out, verify = tmp_path / form, form != "mlx"
        dtype = {"merged": "f32", "gguf": "f32"}.get(form)
        report = export(str(config.out), to=form, out=out, dtype=dtype, verify=verify, rows=4)
        assert all(one.passed for one in report.verification)
        assert bool(report.verification) == verify
        assert f"| init | `{init}` |" in (out / "README.md").read_text()
    if method == "lora":  # an mlx folder does not say that its base was quantised
        back, tuned = open_subject(str(tmp_path / "mlx")).model, load_target(str(config.out)).model
        assert relative(logits(back), logits(tuned)) < 1e-5
