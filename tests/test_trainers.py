"""A loaded and adapted model under other people's training loops: HF Trainer and TRL's SFTTrainer, unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

import luthier
from luthier.kernels.registry import registered_ops

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("one", "two", "three", "four")
] * 8


def adapted(folder: Path):
    model, tokenizer = luthier.load(str(folder))
    luthier.attach(model, luthier.AdapterSpec(rank=4, alpha=8))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    return model, tokenizer, frozen


def assert_only_the_adapter_moved(model: torch.nn.Module, frozen: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    moved = [p.abs().max().item() for name, p in model.named_parameters() if name.endswith("lora_B")]
    assert moved
    assert min(moved) > 0


def assert_saved_adapter_gives_the_same_logits(model: torch.nn.Module, folder: Path, adapter: Path) -> None:
    ids = torch.arange(3, 40)[None]
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    luthier.save_adapter(model, adapter)
    again, _ = luthier.load(str(folder))
    luthier.load_adapter(again, adapter)
    again.eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)


@contextmanager
def the_blocks_used(layers: int, steps: int) -> Iterator[None]:
    """Every layer of every step goes through our attention, forward and backward."""
    counts = [{op.name: op.native_calls for op in registered_ops()}]
    yield
    counts.append({op.name: op.native_calls for op in registered_ops()})
    for name in ("packed_attention", "packed_attention_backward"):
        assert counts[1][name] - counts[0][name] == layers * steps


@pytest.mark.slow
def test_hf_trainer(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    folder = write_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16)
    model, tokenizer, frozen = adapted(folder)
    encoded = []
    for row in ROWS:
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        encoded.append({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, save_steps=4, disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    trainer = Trainer(model=model, args=arguments, train_dataset=encoded, data_collator=collator)
    with the_blocks_used(layers=2, steps=8):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_only_the_adapter_moved(model, frozen)
    assert_saved_adapter_gives_the_same_logits(model, folder, tmp_path / "adapter")


@pytest.mark.slow
def test_trl_sft_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder = write_tiny(tmp_path / "model", "qwen2", tied=True)
    model, tokenizer, frozen = adapted(folder)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    arguments = SFTConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=8, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, max_length=128,
    )  # fmt: skip
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)
    with the_blocks_used(layers=2, steps=8):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_only_the_adapter_moved(model, frozen)
    assert_saved_adapter_gives_the_same_logits(model, folder, tmp_path / "adapter")
