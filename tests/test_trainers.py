"""A loaded and adapted model under other people's training loops: HF Trainer and TRL's SFTTrainer, unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from tiny import write_tiny

import luthier
from luthier.kernels.registry import registered_ops
from luthier.models.blocks import without_blocks

ROWS = [
    {"messages": [{"role": "user", "content": f"say {word}"}, {"role": "assistant", "content": f"{word}!"}]}
    for word in ("one", "two", "three", "four")
] * 8


def adapted(folder: Path):
    model, tokenizer = luthier.load(str(folder))
    luthier.attach(model, luthier.AdapterSpec(rank=4, alpha=8), seed=0)
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


STEPS, LAYERS = 8, 2


@contextmanager
def the_blocks_used() -> Iterator[None]:
    """Every layer of every step goes through our attention, forward and backward."""
    counts = [{op.name: op.native_calls for op in registered_ops()}]
    yield
    counts.append({op.name: op.native_calls for op in registered_ops()})
    for name in ("packed_attention", "packed_attention_backward"):
        assert counts[1][name] - counts[0][name] == LAYERS * STEPS


@contextmanager
def the_modules_used() -> Iterator[None]:
    """Transformers' own forward, and nothing of our attention."""
    before = {op.name: op.native_calls for op in registered_ops()}
    with without_blocks():
        yield
    assert all(op.native_calls == before[op.name] for op in registered_ops() if op.name.startswith("packed_attention"))


def losses_of(trainer, way: AbstractContextManager[None]) -> list[float]:
    """The loss of each step, unrounded: what the trainer logs has four digits only."""
    losses: list[float] = []
    own = trainer.compute_loss

    def compute_loss(*arguments, **named):
        result = own(*arguments, **named)
        losses.append(float((result[0] if isinstance(result, tuple) else result).detach()))
        return result

    trainer.compute_loss = compute_loss
    with way:
        trainer.train()
    assert len(losses) == STEPS
    return losses


def assert_the_same_learning(fast: list[float], plain: list[float]) -> None:
    assert fast == pytest.approx(plain, rel=1e-4)
    assert fast[-1] < fast[0]


def hf_trainer(model, tokenizer, out: Path):
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    encoded = []
    for row in ROWS:
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        encoded.append({"input_ids": ids, "labels": ids})
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, save_steps=4, disable_tqdm=True,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=-100)
    return Trainer(model=model, args=arguments, train_dataset=encoded, data_collator=collator)


def trl_trainer(model, tokenizer, out: Path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        str(out), per_device_train_batch_size=4, max_steps=STEPS, learning_rate=1e-2, logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, max_length=128,
    )  # fmt: skip
    return SFTTrainer(model=model, args=arguments, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)


def check_trainer(make, folder: Path, tmp_path: Path) -> None:
    """Trains through the blocks and, from the same start, through Transformers' modules; the losses are the same."""
    model, tokenizer, frozen = adapted(folder)
    fast = losses_of(make(model, tokenizer, tmp_path / "out"), the_blocks_used())
    assert_only_the_adapter_moved(model, frozen)
    assert_saved_adapter_gives_the_same_logits(model, folder, tmp_path / "adapter")
    plain_model, tokenizer, _ = adapted(folder)
    plain = losses_of(make(plain_model, tokenizer, tmp_path / "plain"), the_modules_used())
    assert_the_same_learning(fast, plain)


@pytest.mark.slow
def test_hf_trainer(tmp_path: Path) -> None:
    check_trainer(hf_trainer, write_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16), tmp_path)


@pytest.mark.slow
def test_trl_sft_trainer(tmp_path: Path) -> None:
    check_trainer(trl_trainer, write_tiny(tmp_path / "model", "qwen2", tied=True), tmp_path)
