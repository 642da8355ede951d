"""The same fine-tuning by Luthier and by PEFT with the HF Trainer: what it reaches, how long it takes, what it holds.

    python benchmarks/parity.py --train train.jsonl --valid valid.jsonl [--json parity.json]

Equal on both sides: weights in float32 (one model, written out as a Transformers folder for the peer), token ids and
labels, the order of the rows, the initial adapter, rank 16 and alpha 32 on all linear layers, the learning rate of each
step, fused AdamW without weight decay, clipping at 1.0, and a loss averaged over the batch's supervised tokens.
The peer runs as it is best run: float32, rows padded to the longest of their batch, nothing recomputed, default attention.
Each side has a process of its own. Seconds are those spent inside steps, from the batch to the optimiser's end; the
peer's leave out its collation. Tokens a second count the tokens of the rows, not padding. Peak memory is VmHWM.
The held-out loss of both adapters is measured by Luthier, on one base and over the same tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import describe_machine, peak_rss_bytes, run_part, write_json
from race_data import IGNORED
from race_peers import padded

# kernels.py beside this script must not pass for the package of that name, which the peer looks for.
sys.path.remove(str(Path(__file__).resolve().parent))
LOSS_TOLERANCE = 0.01


def main() -> None:
    options = parse_options()
    if options.part:
        print(json.dumps(PARTS[options.part](Path(options.work))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(options.work or temporary).resolve()
        work.mkdir(parents=True, exist_ok=True)
        write_job(work, options)
        result: dict[str, Any] = {"benchmark": "parity", "machine": describe_machine()}
        for part in PARTS:
            print(f"{part} ...", file=sys.stderr, flush=True)
            result[part] = run_part(__file__, part, ["--work", str(work)])
    result["options"] = {key: getattr(options, key) for key in ("model", "rows", "batch", "epochs", "steps", "seed")}
    result["ratios"] = ratios(result)
    print_result(result)
    if options.json:
        write_json(options.json, result)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="JSONL file of rows to train on")
    parser.add_argument("--valid", type=Path, help="JSONL file of held-out rows")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=1600, help="rows from the beginning of --train (default 1600)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--steps", type=int, help="in place of --epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--work", help="keep the model, the adapters and the run in this folder (default: temporary)")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.part and not (options.train and options.valid):
        parser.error("--train and --valid are needed")
    return options


def write_job(work: Path, options: argparse.Namespace) -> None:
    """The rows that are used and the configuration both sides follow."""
    with options.train.open(encoding="utf-8") as source:
        rows = list(itertools.islice((line for line in source if line.strip()), options.rows))
    (work / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    length = {"steps": options.steps} if options.steps else {"epochs": options.epochs}
    config = {
        "data": str(work / "train.jsonl"), "model": options.model, "base": "f32", "rank": 16, "alpha": 32.0,
        "batch_size": options.batch, "seed": options.seed, "out": str(work / "luthier"), **length,
    }  # fmt: skip
    write_json(work / "job.json", {"config": config, "valid": str(options.valid.resolve())})


def read_job(work: Path) -> dict[str, Any]:
    job: dict[str, Any] = json.loads((work / "job.json").read_text(encoding="utf-8"))
    return job


def prepare(work: Path) -> dict[str, Any]:
    """Write what the peer starts from: the base as a float32 folder, the initial adapter, ordered rows, learning rates."""
    from luthier.adapters import attach, save_adapter, save_full
    from luthier.config import make_config
    from luthier.models.load import load
    from luthier.training.events import Listener
    from luthier.training.order import Order
    from luthier.training.prepare import adapter_spec, read_data
    from luthier.training.schedule import default_learning_rate, make_schedule, total_examples, total_steps

    config = make_config(read_job(work)["config"])
    data = read_data(config, Listener())
    loaded = load(config.model, base=config.base)
    save_full(loaded.model, work / "base", loaded.tokenizer)
    attach(loaded.model, adapter_spec(config), seed=config.seed)
    save_adapter(loaded.model, work / "start", base_name=str(work / "base"))
    examples = data.train.examples
    drawn = [examples[row] for row in Order(config.seed, len(examples)).row_numbers(0, total_examples(config, len(examples)))]
    steps = total_steps(config, len(examples))
    schedule = make_schedule(config, default_learning_rate(loaded.model.config.hidden_size, "lora", steps), steps)
    write_json(work / "peer.json", {
        "rows": [{"input_ids": one.ids, "labels": labels(one.ids, one.supervised)} for one in drawn],
        "learning_rates": [schedule.learning_rate(step) for step in range(1, steps + 1)],
        "config": config.model_dump(mode="json"),
    })  # fmt: skip
    tokens, supervised = sum(len(one.ids) for one in drawn), sum(sum(one.supervised) for one in drawn)
    return {"steps": steps, "tokens": tokens, "supervised_tokens": supervised, "flops": flops(loaded.model, tokens, supervised)}


def labels(ids: list[int], supervised: list[bool]) -> list[int]:
    return [token if counts else IGNORED for token, counts in zip(ids, supervised, strict=True)]


def flops(model: Any, tokens: int, supervised: int) -> int:
    """What the run needs at least in products with frozen matrices: 4 a weight and token (forward, and backward to the
    input), the head only on supervised tokens. Attention, low-rank terms and elementwise work come on top."""
    from luthier.adapters.targets import low_rank_layers
    from luthier.linear import LowRankLinear

    head = model.get_output_embeddings()
    layers = [layer for layer in low_rank_layers(model).values() if isinstance(layer, LowRankLinear) and layer is not head]
    weights = sum(layer.matrix.shape[0] * layer.matrix.shape[1] for layer in layers)
    head_weights = head.matrix.shape[0] * head.matrix.shape[1]
    return 4 * (weights * tokens + head_weights * supervised)


def train_luthier(work: Path) -> dict[str, Any]:
    from luthier.config import make_config
    from luthier.training.run import train

    result = train(make_config(read_job(work)["config"]), overwrite=True)
    lines = (work / "luthier" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    assert result.adapter_dir is not None
    return side(Path(result.adapter_dir), [one["seconds"] for one in records], [one["loss"] for one in records])


def train_peer(work: Path) -> dict[str, Any]:
    """PEFT's model under the HF Trainer, over the rows in the order they are in the file."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    job = json.loads((work / "peer.json").read_text(encoding="utf-8"))
    config, rates = job["config"], job["learning_rates"]
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, work / "start", is_trainable=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, betas=(config["beta1"], config["beta2"]), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates[min(step, len(rates) - 1)])
    arguments = TrainingArguments(
        str(work / "peer-trainer"), per_device_train_batch_size=config["batch_size"], max_steps=len(rates), use_cpu=True,
        max_grad_norm=config["max_grad_norm"], train_sampling_strategy="sequential", logging_steps=1,
        save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=config["seed"],
    )  # fmt: skip
    clock = Clock()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=job["rows"], data_collator=padded, optimizers=(optimizer, schedule),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    model.save_pretrained(work / "peer")
    return side(work / "peer", clock.seconds, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def side(adapter: Path, seconds: list[float], losses: list[float]) -> dict[str, Any]:
    return {
        "adapter": str(adapter),
        "steps": len(seconds),
        "seconds": sum(seconds),
        "median_step_seconds": statistics.median(seconds),
        "losses": losses,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def held_out(work: Path) -> dict[str, Any]:
    """Loss on the held-out rows of the base and of both adapters, each on a base loaded in float32."""
    from luthier.adapters import detach, load_adapter
    from luthier.data import Renderer, load_examples
    from luthier.evaluation.evaluate import evaluate
    from luthier.models.load import load

    job = read_job(work)
    model, tokenizer = load(job["config"]["model"], base="f32")
    renderer = Renderer(tokenizer, max_length=1024)
    dataset = load_examples(job["valid"], renderer)

    def loss() -> float:
        return evaluate(model, tokenizer, dataset, renderer, metrics=("loss",), max_new_tokens=1).metrics["loss"]

    found: dict[str, Any] = {"rows": len(dataset.examples), "tokens": dataset.manifest["supervised_tokens"], "base": loss()}
    for name, folder in (("luthier", work / "luthier" / "adapter"), ("peer", work / "peer")):
        load_adapter(model, folder)
        found[name] = loss()
        detach(model)
    return found


PARTS = {"prepare": prepare, "luthier": train_luthier, "peer": train_peer, "held_out": held_out}


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Luthier over the peer; below 1 is better for loss, time and memory."""
    ours, peer, held = result["luthier"], result["peer"], result["held_out"]
    return {
        "held_out_loss": held["luthier"] / held["peer"],
        "seconds": ours["seconds"] / peer["seconds"],
        "median_step_seconds": ours["median_step_seconds"] / peer["median_step_seconds"],
        "peak_rss_bytes": ours["peak_rss_bytes"] / peer["peak_rss_bytes"],
    }


def print_result(result: dict[str, Any]) -> None:
    ours, peer, held, given, ratio = (result[key] for key in ("luthier", "peer", "held_out", "prepare", "ratios"))
    tokens, peak = given["tokens"], result["machine"]["fma_flops_per_second"]
    print(f"{given['steps']} steps, {tokens:,} tokens, {given['supervised_tokens']:,} supervised; {held['rows']} rows held out")
    print(f"{'':28}{'luthier':>12}{'PEFT + HF':>12}{'ratio':>9}")
    print_row("held-out loss", held["luthier"], held["peer"], ratio["held_out_loss"], ".4f")
    print_row("seconds in steps", ours["seconds"], peer["seconds"], ratio["seconds"], ".1f")
    medians = ours["median_step_seconds"], peer["median_step_seconds"]
    print_row("median step, seconds", *medians, ratio["median_step_seconds"], ".3f")
    print_row("tokens a second", tokens / ours["seconds"], tokens / peer["seconds"], 1 / ratio["seconds"], ",.0f")
    print_row("peak memory, MB", ours["peak_rss_bytes"] / 1e6, peer["peak_rss_bytes"] / 1e6, ratio["peak_rss_bytes"], ",.0f")
    if peak:
        shares = [given["flops"] / one["seconds"] / peak for one in (ours, peer)]
        print_row("share of the FMA peak", shares[0], shares[1], shares[0] / shares[1], ".1%")
        print(f"FMA peak {peak / 1e9:,.0f} GFLOP/s")
    print(f"the base's held-out loss is {held['base']:.4f}; all three are measured by Luthier on the same rows")
    first = abs(ours["losses"][0] / peer["losses"][0] - 1)
    print(f"loss of the first step: {ours['losses'][0]:.6f} and {peer['losses'][0]:.6f}, {first:.1e} apart")
    apart = abs(ratio["held_out_loss"] - 1)
    verdict = "within" if apart <= LOSS_TOLERANCE else "NOT within"
    print(f"held-out losses are {apart:.2%} apart: {verdict} {LOSS_TOLERANCE:.0%}")


def print_row(label: str, ours: float, peer: float, ratio: float, form: str) -> None:
    print(f"{label:28}{ours:>12{form}}{peer:>12{form}}{ratio:>9.3f}")


if __name__ == "__main__":
    main()
