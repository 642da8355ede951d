"""The peers' side of training.py: PEFT under the HF Trainer and under TRL's SFTTrainer, LoRA and, with bitsandbytes, QLoRA.

They run at their best fair setting on a CPU: float32, nothing recomputed, denormals flushed, torch's fused AdamW, and the
collator that was fastest in a trial. TRL turns the adapter of a quantised model to bfloat16, in which such a processor
multiplies ten times slower; it is turned back.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from common import peak_rss_bytes
from race_data import IGNORED, Batch, grouped, read_batches
from race_luthier import mean_peak, probed_peak

COLLATORS = ("padded", "grouped", "flat")


def run_peer(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Train over the task's batches, in the order in which Luthier gets them; one record a step.

    job: stack ("trainer" or "trl"), method ("lora" or "qlora"), task, warmup, collator, learning_rates.
    collator: "padded" pads each batch to its longest row; "grouped" does so after the measured rows were sorted by length
    into other batches of the same size; "flat" lays a batch end to end as one row with positions that restart.
    Seconds run from the end of one step to the end of the next: data loading, collation, logging and the optimiser are in.
    """
    import torch

    torch.set_flush_denormal(True)
    batches = read_batches(work / f"{job['task']}.json")[: job.get("most_steps")]
    if job["collator"] == "grouped":
        batches = batches[: job["warmup"]] + grouped(batches[job["warmup"] :])
    model = peft_model(work, job["method"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    rates = job["learning_rates"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])
    make = hf_trainer if job["stack"] == "trainer" else trl_trainer
    trainer = make(work, model, batches, job["collator"], (optimizer, schedule))
    for parameter in trained:
        parameter.data = parameter.data.to(torch.float32)
    trainer.train()
    (clock,) = (one for one in trainer.callback_handler.callbacks if hasattr(one, "is_the_clock"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [step | {"batch": n, "loss": loss} for n, (step, loss) in enumerate(zip(clock.steps, losses, strict=True))]
    return {
        "warmup": steps[: job["warmup"]],
        "steps": [step | {"pass": 0} for step in steps[job["warmup"] :]],
        "peak_rss_bytes": peak_rss_bytes(),
    }


def peft_model(work: Path, method: str) -> Any:
    """The base in float32, or its linear layers in NF4 with double quantisation, with the initial adapter on it."""
    import torch
    from peft import PeftModel, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if method == "lora":
        base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    else:
        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
        base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32, quantization_config=nf4)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return PeftModel.from_pretrained(base, work / "start", is_trainable=True)


def settings_of(work: Path, batches: list[Batch]) -> dict[str, Any]:
    """What both trainers are told."""
    return {
        "output_dir": str(work / "trainer"),
        "per_device_train_batch_size": len(batches[0]),
        "max_steps": len(batches),
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def rows_of(batches: list[Batch]) -> list[dict[str, list[int]]]:
    return [{"input_ids": row.ids, "labels": row.labels} for batch in batches for row in batch]


def hf_trainer(work: Path, model: Any, batches: list[Batch], collator: str, optimizers: Any) -> Any:
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    collate: Any = DataCollatorWithFlattening() if collator == "flat" else padded
    return Trainer(
        model=model, args=TrainingArguments(**settings_of(work, batches)), train_dataset=rows_of(batches),
        data_collator=collate, optimizers=optimizers, callbacks=[make_clock()],
    )  # fmt: skip


def trl_trainer(work: Path, model: Any, batches: list[Batch], collator: str, optimizers: Any) -> Any:
    """SFTTrainer on rows that are tokens already; padding_free is its own name for laying a batch end to end."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(**settings_of(work, batches), max_length=None, packing=False, padding_free=collator == "flat")
    return SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows_of(batches)),
        processing_class=AutoTokenizer.from_pretrained(work / "base"), optimizers=optimizers, callbacks=[make_clock()],
    )  # fmt: skip


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Any]:
    """A batch of rows as long as its longest, padded on the right."""
    import torch

    longest = max(len(row["input_ids"]) for row in rows)

    def filled(key: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[key] + [filler] * (longest - len(row[key])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": filled("input_ids", 0), "labels": filled("labels", IGNORED), "attention_mask": mask}


def make_clock() -> Any:
    """A callback that notes the seconds from the end of one step to the end of the next, and the peak around each."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        is_the_clock = True

        def __init__(self) -> None:
            self.steps: list[dict[str, Any]] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self._start(probed_peak())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds, peak = time.perf_counter() - self.started, probed_peak()
            self.steps.append({"seconds": seconds, "fma_peak": mean_peak(self.peak, peak)})
            self._start(peak)

        def _start(self, peak: float | None) -> None:
            self.peak, self.started = peak, time.perf_counter()

    return Clock()
