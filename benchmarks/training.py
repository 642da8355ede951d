"""Training steps of Luthier beside those of its peers: dataset tokens a second, share of the physical limit, memory.

    python benchmarks/training.py --snips train.jsonl --banking77 train.jsonl --e2e train.jsonl --out training.json
        [--resume] [--exactness] [--lengths] [--plots docs/pictures] [--readme README.md]

Works: random text of 2 x 512 tokens, every token supervised; snips (messages) in batches of 8; banking77
(instruction/input/output) in batches of 8 with every label of the file listed in each row's instruction; e2e
(prompt/completion) in batches of 16. Contenders: Luthier with LoRA and with QLoRA; PEFT under the HF Trainer and under
TRL's SFTTrainer, LoRA and, with bitsandbytes, QLoRA; rank 16 on all linear layers.

Equal for all: the weights (one folder in bf16), tokens and targets, the first K batches in the order `luthier train` draws
them, the first A and B, the learning rate of each step, AdamW, clipping at 1.0. First losses are compared to show it.
Peers: float32, nothing recomputed, and of "padded rows grouped by length" and "one row without padding" the faster, by a
trial on each work where padding is worth one. Every run is a process of its own; contenders take turns in rounds. Time
runs from drawn examples to the end of the update, for the peers from the end of a step to the end of the next. Warm-up
batches are left out. Luthier passes several times over the measured batches, since its steps are short. Peak memory is
VmHWM of the process, loading included. See race_data.useful_flops for the limit.
--exactness: losses of snips by step, fast path against Transformers' modules with each example alone, and the held-out loss.
--lengths: the cost of a token in rows of 128 to 4,096 tokens, as many tokens in each step.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import describe_machine
from race_data import PADDING_WORTH_A_TRIAL, WORKS
from race_figures import CONTENDERS, LUTHIER, PEERS, figures_of, length_points, without_attention
from race_luthier import run_luthier
from race_peers import run_peer
from race_plots import write_pictures
from race_prepare import prepare, tasks_of
from race_record import Record, limit_memory, run_job
from race_table import full_table, insert_section, notes_of, readme_section, summary_table, verdicts

# kernels.py beside this script must not pass for the package of that name, which the peers look for.
sys.path.remove(str(Path(__file__).resolve().parent))
PARTS = {
    "prepare": prepare,
    "machine": lambda _work, _job: describe_machine(),
    "luthier": run_luthier,
    "peer": run_peer,
}
STACKS = {"trainer": "The HF Trainer", "trl": "TRL"}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)


def main() -> None:
    options = parse_options()
    if options.part:
        job = json.loads(options.part.read_text(encoding="utf-8"))
        limit_memory()
        print(json.dumps(PARTS[job["part"]](options.part.parent, job)))
        return
    kept = {key: getattr(options, key) for key in ("threads", "seed", "warmup", "passes", "rounds")}
    record = Record(options.out, {"model": Path(options.model).name, **kept}, resume=options.resume)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, record, Path(folder))
        try:
            bench.prepare()
            bench.choose_collators()
            bench.race()
            bench.measure_lengths()
            bench.measure_exactness()
        except KeyboardInterrupt:
            print("stopped; what is done follows, and --resume goes on with the rest", file=sys.stderr)
            if "machine" not in record.state:
                raise
    report(options, record)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snips", type=Path, help="JSONL file of messages")
    parser.add_argument("--banking77", type=Path, help="JSONL file of instruction, input and output, the output a label")
    parser.add_argument("--e2e", type=Path, help="JSONL file of prompt and completion")
    parser.add_argument("--model", default="smollm2-135m", help="alias, folder or .gguf file")
    parser.add_argument("--works", nargs="*", choices=tuple(WORKS), default=list(WORKS), help="none: no race")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    default = " ".join(f"{work.name}={work.steps}" for work in WORKS.values())
    parser.add_argument("--steps", nargs="+", type=named_number, default=[], help=f"measured steps (default {default})")
    parser.add_argument("--warmup", type=int, default=1, help="batches before the measured ones, at least 1")
    parser.add_argument("--passes", type=int, default=3, help="of Luthier over the measured batches")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--exactness", nargs="?", type=int, const=50, default=0, metavar="STEPS", help="of snips (50)")
    parser.add_argument("--held-out", type=int, default=200, help="rows of snips behind those steps")
    parser.add_argument("--lengths", nargs="*", type=int, default=None, help=f"of rows (default {LENGTHS})")
    parser.add_argument("--length-tokens", type=int, default=4096, help="tokens of each step of --lengths")
    parser.add_argument("--length-steps", type=int, default=2)
    parser.add_argument("--length-peer", choices=PEERS, help="default: the fastest LoRA peer on random text")
    parser.add_argument("--out", type=Path, help="JSON file, written after every process")
    parser.add_argument("--resume", action="store_true", help="go on with --out; what failed is run again")
    parser.add_argument("--plots", type=Path, help="write the pictures into this folder")
    parser.add_argument("--readme", type=Path, help="put table, pictures and conditions between the markers of this file")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.steps = dict(options.steps)
    options.lengths = list(LENGTHS) if options.lengths == [] else options.lengths or []
    missing = [name for name in ("snips", "banking77", "e2e") if name in options.works and getattr(options, name) is None]
    if options.exactness and options.snips is None:
        missing.append("snips")
    if not options.part and missing:
        parser.error(f"{', '.join(f'--{name}' for name in dict.fromkeys(missing))} needed, or --works without it")
    if options.warmup < 1 or min([options.rounds, options.passes, options.length_steps, *options.steps.values()]) < 1:
        parser.error("--warmup, --rounds, --passes and steps must be at least 1")
    if options.readme and not options.plots:
        parser.error("--readme shows the pictures; give --plots too")
    return options


def named_number(text: str) -> tuple[str, int]:
    """work=K of --steps."""
    name, _, number = text.partition("=")
    if name not in WORKS or not number.isdigit():
        raise argparse.ArgumentTypeError(f"must be WORK=K with a work of {', '.join(WORKS)}; got {text!r}")
    return name, int(number)


class Bench:
    """The stages of the benchmark. Each leaves what it found in `record` and skips what is there already."""

    def __init__(self, options: argparse.Namespace, record: Record, work: Path):
        self.options, self.record, self.work = options, record, work

    def run(self, part: str, key: str, **job: Any) -> dict[str, Any]:
        """Run a job in a process of its own and say how it went."""
        result = run_job(Path(__file__).resolve(), self.work, {"part": part, **job}, self.options.threads)
        ended = f"{result['failed']}: {result['message']}" if "failed" in result else "done"
        print(f"{key}: {ended} ({result['process_seconds']:.0f} s)", file=sys.stderr, flush=True)
        return result

    def required(self, part: str, key: str, **job: Any) -> dict[str, Any]:
        result = self.run(part, key, **job)
        if "failed" in result:
            raise SystemExit(f"nothing can be measured without {key}; it ended with {result['failed']}: {result['message']}")
        return result

    def prepare(self) -> None:
        job = {"model": self.options.model, "seed": self.options.seed, "tasks": tasks_of(self.options)}
        self.record.accept_facts(self.required("prepare", "prepare", **job))
        if "machine" not in self.record.state:
            self.record.state["machine"] = self.required("machine", "machine")
            self.record.write()

    def run_contender(self, contender: str, task: str, **extra: Any) -> dict[str, Any]:
        """One process of a contender on a task; what it recorded, with its name, the task and the collator."""
        stack, method = contender.split("-")
        warmup = extra.pop("warmup", self.options.warmup)
        job = {"task": task, "method": method, "warmup": warmup, "seed": self.options.seed, **extra}
        label = " ".join([task, contender, *(str(extra[key]) for key in ("collator", "round") if key in extra)])
        if stack == "luthier":
            result = self.run("luthier", label, **{"passes": self.options.passes, **job})
        else:
            rates = self.record.state["facts"]["tasks"][task]["learning_rates"]
            result = self.run("peer", label, stack=stack, learning_rates=rates, **job)
        return {"contender": contender, "task": task, **{k: extra[k] for k in ("collator", "round") if k in extra}, **result}

    def choose_collators(self) -> None:
        """The fastest collator of each peer's trainer on each work, and why; LoRA's choice holds for QLoRA."""
        for task in self.options.works:
            stacks = sorted({one.split("-")[0] for one in self.options.contenders if one in PEERS}, reverse=True)
            for stack in stacks:
                if stack not in self.record.state["collators"].get(task, {}):
                    choice = self._choose(task, stack)
                    self.record.put("collators", task, {**self.record.state["collators"].get(task, {}), stack: choice})

    def _choose(self, task: str, stack: str) -> dict[str, Any]:
        share = self.record.state["facts"]["tasks"][task]["padding_share"]
        if share < PADDING_WORTH_A_TRIAL:
            return {"collator": "grouped", "why": f"Padding is {share:.1%} of a padded batch, so no other could gain more."}
        seconds = {}
        for collator in ("grouped", "flat"):
            key = f"{task}/{stack}/{collator}"
            if not self.record.has("trials", key):
                self.record.put("trials", key, self.run_contender(f"{stack}-lora", task, collator=collator))
            if self.record.has("trials", key):
                seconds[collator] = sum(step["seconds"] for step in self.record.state["trials"][key]["steps"])
        if not seconds:
            raise SystemExit(f"{stack} ran {task} with no collator; its messages are above.")
        taken = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        return {"collator": min(seconds, key=lambda name: seconds[name]), "why": f"{STACKS[stack]} on trial: {taken}."}

    def race(self) -> None:
        """Rounds over all works; in each the contenders take turns, another one first each time."""
        for number in range(self.options.rounds):
            for task in self.options.works:
                first = number % len(self.options.contenders)
                for contender in [*self.options.contenders[first:], *self.options.contenders[:first]]:
                    key = f"{task}/{contender}/{number + 1}"
                    if self.record.has("runs", key):
                        continue
                    extra: dict[str, Any] = {"round": number + 1}
                    if contender in PEERS:
                        extra["collator"] = self.record.state["collators"][task][contender.split("-")[0]]["collator"]
                    self.record.put("runs", key, self.run_contender(contender, task, **extra))
                print("\n".join(verdicts(self.record.state, figures_of(self.record.state))), file=sys.stderr, flush=True)

    def measure_lengths(self) -> None:
        """Luthier and one peer over rows of each length, shortest first; a contender ends where a length does not fit.

        Without a peer among the contenders Luthier alone.
        """
        shape = self.record.state["facts"]["shape"]
        contenders = [LUTHIER[0], *([self._length_peer()] if set(PEERS) & set(self.options.contenders) else [])]
        for contender in contenders if self.options.lengths else ():
            for length in sorted(self.options.lengths):
                key = f"length-{length}/{contender}"
                extra = {"attention": True, "shape": shape, "passes": 1} if contender in LUTHIER else {"collator": "padded"}
                if not self.record.has("lengths", key):
                    self.record.put("lengths", key, self.run_contender(contender, f"length-{length}", **extra))
                if not self.record.has("lengths", key):
                    break

    def _length_peer(self) -> str:
        found = figures_of(self.record.state).get("random", {}).get("contenders", {})
        peers = [one for one in PEERS if one in found and one.endswith("-lora")]
        fastest = max(peers, key=lambda one: found[one]["tokens_per_second"], default="trainer-lora")
        return self.options.length_peer or fastest

    def measure_exactness(self) -> None:
        for key in ("fast", "plain") if self.options.exactness else ():
            if not self.record.has("exactness", key):
                extra = {"plain": key == "plain", "held_out": True, "warmup": 0, "passes": 1}
                self.record.put("exactness", key, self.run_contender(LUTHIER[0], "exactness", **extra))


def report(options: argparse.Namespace, record: Record) -> None:
    """Print the tables, write pictures and the README's section. Exit code 1 if a process of the race failed."""
    state = record.state
    figures = figures_of(state)
    print("\n\n".join([summary_table(state, figures), full_table(state, figures), "\n".join(notes_of(state, figures))]))
    print("\n".join(verdicts(state, figures)))
    for contender, points in length_points(state).items():
        print(contender, ", ".join(f"{p['length']}: {1e3 * p['seconds']:.2f} ms a token" for p in points))
        if all("attention" in point for point in points):
            rest = without_attention(points)
            print(f"without attention's own, the dearest length costs {max(rest) / min(rest):.3f} times the cheapest")
    pictures = write_pictures(state, options.plots) if options.plots else []
    if options.readme:
        beside = options.readme.resolve().parent
        images = [(text, Path(os.path.relpath(path.resolve(), beside)).as_posix()) for text, path in pictures]
        insert_section(options.readme, readme_section(state, figures, images))
    failed = [key for key, run in state["runs"].items() if "failed" in run]
    if failed:
        raise SystemExit(f"these processes failed: {', '.join(failed)}. Mend the cause and go on with --resume.")


if __name__ == "__main__":
    main()
