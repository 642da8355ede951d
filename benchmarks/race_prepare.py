"""What every contender of training.py starts from: one base in bf16, one initial adapter, the same tokens, the same rates."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from race_data import (
    RANDOM_LENGTHS,
    WORKS,
    Batch,
    Row,
    Weights,
    batches_of,
    needed,
    padded_tokens,
    padding_share,
    random_rows,
    read_lines,
    with_all_labels,
    write_batches,
)

RANK = 16
LONG_RUN = 10_000  # steps: the rate of a long run for every contender
MAX_LENGTH = 2048
HELD_OUT = "held-out"
ROWS_ALONE = frozenset({"k_proj", "v_proj", "qkv_proj"})


def prepare(work: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Write the base, the adapter and a file of batches for each task in `job`; returns facts of the model and the tasks.

    job: model, seed, tasks. A task is {name, work, file, batch_size, steps (all of them, warm-up included)} and for
    random text `lengths`, for rows kept for evaluation `held_out`, their number.
    """
    from luthier.adapters import AdapterSpec, attach, save_adapter, save_full
    from luthier.data import Renderer
    from luthier.models.load import load

    loaded = load(job["model"], base="bf16")
    model = loaded.model
    save_full(model, work / "base", loaded.tokenizer)
    attach(model, AdapterSpec(rank=RANK), seed=job["seed"])
    save_adapter(model, work / "start", base_name=str(work / "base"))
    renderer = Renderer(loaded.tokenizer, max_length=MAX_LENGTH)
    tasks = {task["name"]: _write_task(work, task, renderer, model.config, job["seed"]) for task in job["tasks"]}
    config = model.config
    shape = {
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "key_heads": config.num_key_value_heads,
        "head_size": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    }
    return {"weights": asdict(weights_of(model)), "shape": shape, "tasks": tasks}


def weights_of(model: Any) -> Weights:
    """Count the frozen matrices of a model loaded by luthier. Projections that make keys and values count as everywhere."""
    from luthier.adapters.targets import low_rank_layers
    from luthier.linear import LowRankLinear
    from luthier.training.recompute import decoder_layers

    head = model.get_output_embeddings()
    last = [
        id(module) for name, module in decoder_layers(model)[-1].named_modules() if name.rpartition(".")[2] not in ROWS_ALONE
    ]
    counts = {"everywhere": 0, "last": 0}
    for layer in low_rank_layers(model).values():
        if isinstance(layer, LowRankLinear) and layer is not head:
            counts["last" if id(layer) in last else "everywhere"] += layer.in_features * layer.out_features
    return Weights(**counts, head=head.in_features * head.out_features)


def _write_task(work: Path, task: dict[str, Any], renderer: Any, config: Any, seed: int) -> dict[str, Any]:
    rows = _rows_of(task, renderer, config.vocab_size, seed)
    wanted = task["batch_size"] * task["steps"]
    batches = batches_of(list(itertools.islice(rows, wanted)), task["batch_size"])
    if len(batches) < task["steps"]:
        raise SystemExit(f"{task['name']} takes {wanted} rows; its file has fewer. Try fewer steps.")
    write_batches(work / f"{task['name']}.json", batches)
    if task.get("held_out"):
        write_batches(work / f"{HELD_OUT}.json", [list(itertools.islice(rows, task["held_out"]))])
    return {**task, "learning_rates": _learning_rates(task, config.hidden_size), **_counts(batches)}


def _rows_of(task: dict[str, Any], renderer: Any, vocabulary: int, seed: int) -> Iterator[Row]:
    """The rows of a task in the order in which `luthier train` draws them from the whole file."""
    from luthier.training.order import Order

    if task["work"] == "random":
        lengths = task.get("lengths") or RANDOM_LENGTHS
        yield from random_rows(task["batch_size"] * task["steps"], lengths, vocabulary, seed)
        return
    lines = read_lines(Path(task["file"]))
    if task["work"] == "banking77":
        lines = with_all_labels(lines)
    for number in Order(seed, len(lines)).row_numbers(0, len(lines)):
        example = renderer.render(lines[number], f"{task['file']}:{number + 1}")
        yield Row(example.ids, example.supervised)


def _learning_rates(task: dict[str, Any], hidden_size: int) -> list[float]:
    from luthier.config import RunConfig
    from luthier.training.schedule import default_learning_rate, make_schedule

    config = RunConfig(data="rows", steps=task["steps"], batch_size=task["batch_size"])
    schedule = make_schedule(config, default_learning_rate(hidden_size, "lora", LONG_RUN), task["steps"])
    return [schedule.learning_rate(step) for step in range(1, task["steps"] + 1)]


def _counts(batches: list[Batch]) -> dict[str, Any]:
    lengths = [len(row.ids) for batch in batches for row in batch]
    return {
        "batches": [asdict(needed(batch)) for batch in batches],
        "padded_tokens": [padded_tokens([batch]) for batch in batches],
        "padding_share": padding_share(batches),
        "shortest": min(lengths),
        "longest": max(lengths),
    }


def tasks_of(options: Any) -> list[dict[str, Any]]:
    """Every task that the options ask for: the works, the rows of each length, and the steps that must be exact."""
    files = {"snips": options.snips, "banking77": options.banking77, "e2e": options.e2e}
    tasks: list[dict[str, Any]] = []
    for name in options.works:
        work = WORKS[name]
        steps = options.warmup + options.steps.get(name, work.steps)
        file = str(files[name].resolve()) if name in files else None
        tasks.append({"name": name, "work": name, "file": file, "batch_size": work.batch_size, "steps": steps})
    for length in options.lengths:
        rows = max(1, options.length_tokens // length)
        name, steps = f"length-{length}", options.warmup + options.length_steps
        tasks.append({"name": name, "work": "random", "file": None, "batch_size": rows, "steps": steps, "lengths": [length]})
    if options.exactness:
        file = str(options.snips.resolve())
        tasks.append(
            {"name": "exactness", "work": "snips", "file": file, "batch_size": WORKS["snips"].batch_size,
             "steps": options.exactness, "held_out": options.held_out}
        )  # fmt: skip
    return json.loads(json.dumps(tasks))
