"""One training step of Luthier alone: seconds, share of the multiply-add peak, peak memory, and where the time goes.

    python benchmarks/step.py [--base asis] [--documents 512 512] [--pack-tokens N] [--threads N] [--out step.json]

LoRA of rank 16 on all linear layers, documents of random tokens, every token supervised that has one before it, AdamW.
The step runs as fused blocks and as Transformers' modules (still on the kernels for linear layers), each in a process of
its own. Seconds are the least of `steps` after one that warms up, and the processor's seconds those of the same step: on a
busy machine they say more. The share is 4 flops for each matrix weight and token that meet, over the probed FMA peak of
the same minute and the wall time; terms and attention are not counted. `operations` is one further step under torch's
profiler: seconds of the processor inside each operation itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from common import describe_machine, peak_rss_bytes, run_part, write_json

# Libraries look for a package called `kernels`; a script of that name lies in this folder.
sys.path.remove(str(Path(__file__).resolve().parent))

RANK = 16
PARTS = ("blocks", "modules")


def main() -> None:
    options = parse()
    if options.part:
        print(json.dumps(measure(options)))
        return
    shared = ["--model", options.model, "--base", options.base, "--steps", str(options.steps)]
    shared += ["--recompute", str(options.recompute), "--documents", *map(str, options.documents)]
    shared += ["--threads", str(options.threads)] if options.threads else []
    shared += ["--pack-tokens", str(options.pack_tokens)] if options.pack_tokens else []
    results = [{"path": part, **run_part(__file__, part, shared)} for part in PARTS]
    for result in results:
        show(result)
    if options.out:
        write_json(options.out, {"benchmark": "step", "machine": describe_machine(), "results": results})


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base", choices=("asis", "f32", "bf16", "f16", "nf4"), default="asis")
    parser.add_argument("--documents", nargs="+", type=int, default=[512, 512], help="tokens of each document")
    parser.add_argument("--pack-tokens", type=int, help="tokens in one forward pass, at most; default: all")
    parser.add_argument("--recompute", type=int, default=0, help="layers whose activations are computed again in backward")
    parser.add_argument("--steps", type=int, default=3, help="measured steps; one before them warms up")
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the steps of one part in this process."""
    import torch

    from luthier.adapters import AdapterSpec, attach, trainable_parameters
    from luthier.config import RunConfig
    from luthier.kernels.probe import fma_peak
    from luthier.models.blocks import without_blocks
    from luthier.models.load import load
    from luthier.training.optimizer import Optimizer, flushed_denormals
    from luthier.training.prepare import set_training_mode
    from luthier.training.recompute import set_recomputed

    if options.threads:
        torch.set_num_threads(options.threads)
    model = load(options.model, base=options.base, offline=True).model
    attach(model, AdapterSpec(rank=RANK), seed=0)
    set_training_mode(model)
    set_recomputed(model, options.recompute)
    packs = random_packs(options.documents, model.config.vocab_size, options.pack_tokens or sum(options.documents))
    optimizer = Optimizer(trainable_parameters(model), RunConfig(data="random"))
    with without_blocks() if options.part == "modules" else nullcontext(), flushed_denormals():
        one_step(model, optimizer, packs)
        runs, peaks = [], []
        for _ in range(options.steps):
            before = fma_peak()
            runs.append(one_step(model, optimizer, packs))
            peaks.append((before + fma_peak()) / 2)
        memory = peak_rss_bytes()
        operations = profiled(lambda: one_step(model, optimizer, packs))
    fastest = min(range(len(runs)), key=lambda run: runs[run]["seconds"])
    flops = useful_flops(model, packs)
    return {
        **{key: value for key, value in vars(options).items() if key not in ("part", "out")},
        **runs[fastest],
        "loss": runs[-1]["loss"],
        "tokens_per_second": sum(options.documents) / runs[fastest]["seconds"],
        "flops": flops,
        "fma_peak": peaks[fastest],
        "share": flops / runs[fastest]["seconds"] / peaks[fastest],
        "peak_rss_bytes": memory,
        "every_step": runs,
        "operations": operations,
    }


def random_packs(lengths: list[int], vocabulary: int, pack_tokens: int) -> list[Any]:
    """Documents of random tokens, the same ones each time, in packs of at most `pack_tokens` tokens."""
    import torch

    from luthier.data import Example
    from luthier.data.packing import pack_examples

    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    examples = [Example(row, [True] * len(row), [], "", None, f"row {n}") for n, row in enumerate(rows)]
    return pack_examples(examples, max_tokens=pack_tokens)


def one_step(model: Any, optimizer: Any, packs: list[Any]) -> dict[str, float]:
    """Forward and backward of each pack, and one update; seconds of each, and of the processor for all."""
    from luthier.evaluation.loss import supervised_loss

    processor, started = time.process_time(), time.perf_counter()
    supervised_tokens = sum(pack.supervised_tokens for pack in packs)
    total = forward_seconds = 0.0
    for pack in packs:
        began = time.perf_counter()
        loss = supervised_loss(model, pack) / supervised_tokens
        forward_seconds += time.perf_counter() - began
        loss.backward()
        total += float(loss.detach())
        del loss
    backward = time.perf_counter()
    optimizer.clip()
    optimizer.step(1e-4)
    optimizer.zero_grad()
    ended = time.perf_counter()
    return {
        "loss": total,
        "seconds": ended - started,
        "processor_seconds": time.process_time() - processor,
        "forward_seconds": forward_seconds,
        "backward_seconds": backward - started - forward_seconds,
        "update_seconds": ended - backward,
    }


def useful_flops(model: Any, packs: list[Any]) -> int:
    """Forward and the gradient to the input, 2 flops a weight and token each; the head's for supervised tokens alone."""
    from luthier.linear import LowRankLinear

    head = model.get_output_embeddings()
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear) and module is not head]
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    tokens, supervised = sum(pack.tokens for pack in packs), sum(pack.supervised_tokens for pack in packs)
    return 4 * (weights * tokens + head.in_features * head.out_features * supervised)


def profiled(step: Any) -> dict[str, float]:
    """Seconds of the processor inside each operation itself, the costly ones first; below a thousandth left out."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    own = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    total = sum(own.values())
    return {key: seconds for key, seconds in sorted(own.items(), key=lambda item: -item[1]) if seconds > total / 1000}


def show(result: dict[str, Any]) -> None:
    print(
        f"{result['path']:8} {result['seconds']:7.2f} s ({result['processor_seconds']:.2f} s of the processor), "
        f"{result['tokens_per_second']:6.0f} tokens/s, {100 * result['share']:3.0f} % of the peak, "
        f"{result['peak_rss_bytes'] / 1e6:,.0f} MB, loss {result['loss']:.5f}"
    )
    for name, seconds in list(result["operations"].items())[:12]:
        print(f"         {seconds:7.3f} s  {name}")


if __name__ == "__main__":
    main()
