"""Tokens a second of generation: ours, llama.cpp with the same 4-bit weights, and Transformers in float32.

    python benchmarks/generation.py [--kinds q4_1,q4_0] [--rounds 5] [--out generation.json]

One process loads SmolLM2-135M three ways: as its GGUF file by us and by llama.cpp (llama-cpp-python, extra `llamacpp`), for
each of --kinds (q4_1 is the file as published, others are written from it by `luthier export`), and as float32 weights by
plain Transformers. All take turns in every round, with the same number of threads, the same prompts and greedy answers without
an end; a figure is the best of the rounds. --figures and --by choose works and contenders where a whole run is too long.

- prompt: --prompt-tokens over the seconds until the first token behind them is chosen.
- one stream: --new-tokens over the seconds that they take longer than the first token alone, behind a prompt of 32 tokens.
- streams: the same for --streams prompts of 24 to 54 tokens together; their new tokens counted together. llama.cpp decodes them
  as sequences of one batch; Transformers pads them.

`limit`: the bytes of the file over the read bandwidth that was probed, the most that one stream can reach; it is no limit
where the processor's cache holds much of the file. `same`: the share of the one stream's first 32 tokens up to which
the greedy answer is that of Transformers on the same float32 values, which shows that all compute the same thing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from common import describe_machine, write_json

# Libraries look for packages called as scripts in this folder are.
sys.path.remove(str(Path(__file__).resolve().parent))

ROWS = Path(__file__).resolve().parent.parent / "examples" / "requests" / "train.jsonl"
TARGETS = (  # what, the figure, of ours to whose, at least
    ("one stream over llama.cpp's", "one_stream", "llama.cpp", 1.0),
    ("prompt over llama.cpp's", "prompt", "llama.cpp", 2.5),
    ("streams over Transformers'", "streams", "Transformers", 4.0),
)
CHECKED = 32
FIGURES, CONTENDERS = ("prompt", "one_stream", "streams"), ("luthier", "llama.cpp", "Transformers")
Ids = list[int]


class Contender(Protocol):
    def answers(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        """`count` greedy tokens behind each prompt, all prompts together, nothing kept from before."""


class Luthier:
    def __init__(self, path: Path):
        import luthier
        from luthier.generation import Generator, generation_obstacle

        self._model, _ = luthier.load(str(path))
        obstacle = generation_obstacle(self._model)
        if obstacle is not None:
            raise SystemExit(f"the native decoder is what is measured, and it does not run: {obstacle}.")
        self._generator = Generator(self._model)

    def answers(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        return self._generator.generate(prompts, count)


class Transformers:
    """The same values in float32."""

    def __init__(self, path: Path):
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        self._model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
        ).eval()

    def answers(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        import torch

        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        output = self._model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return output[:, longest:].tolist()


class LlamaCpp:
    """llama.cpp through its C interface: prompts are sequences of one cache, logits asked for only where they are used."""

    def __init__(self, path: Path, threads: int, streams: int, tokens: int):
        import llama_cpp

        self._api = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C holds no reference to it
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        model_settings = llama_cpp.llama_model_default_params()
        model_settings.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_settings)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = streams * tokens, streams
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._model or not self._context:
            raise SystemExit(f"llama.cpp does not open {path}.")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch_tokens = int(settings.n_batch)
        self._batch = llama_cpp.llama_batch_init(self._batch_tokens, 0, streams)
        self.system = llama_cpp.llama_print_system_info().decode()

    def answers(self, prompts: Sequence[Ids], count: int) -> list[Ids]:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        wanted = [
            (token, place, stream, place == len(prompt) - 1)
            for stream, prompt in enumerate(prompts)
            for place, token in enumerate(prompt)
        ]
        found: list[Ids] = [[] for _ in prompts]
        for first in range(0, len(wanted), self._batch_tokens):
            self._decode(wanted[first : first + self._batch_tokens], found)
        for step in range(1, count):
            places = [len(prompt) + step - 1 for prompt in prompts]
            self._decode(
                [(own[-1], place, stream, True) for stream, (own, place) in enumerate(zip(found, places, strict=True))], found
            )
        return found

    def _decode(self, tokens: list[tuple[int, int, int, bool]], found: list[Ids]) -> None:
        """Run (token, place, stream, whether its logits are wanted) and keep the likeliest token behind those that are."""
        import numpy as np

        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, (token, place, stream, is_wanted) in enumerate(tokens):
            batch.token[number], batch.pos[number], batch.logits[number] = token, place, is_wanted
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, stream
        if self._api.llama_decode(self._context, batch) != 0:
            raise SystemExit("llama.cpp could not decode a batch.")
        for number, (_, _, stream, is_wanted) in enumerate(tokens):
            if is_wanted:
                row = self._api.llama_get_logits_ith(self._context, number)
                found[stream].append(int(np.ctypeslib.as_array(row, (self._vocabulary,)).argmax()))


def main() -> None:
    options = parse()
    import torch

    from luthier.models.source import resolve

    if options.threads:
        torch.set_num_threads(options.threads)
    published = resolve("smollm2-135m").path
    prompts = make_prompts(published, options)
    result: dict[str, Any] = {
        "benchmark": "generation", "machine": describe_machine(), "threads": torch.get_num_threads(), "versions": versions(),
        "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "streams": options.streams, "kinds": {},
    }  # fmt: skip
    for kind in options.kinds:
        path = published if kind == "q4_1" and published.is_file() else written_as(kind, published, options.work)
        result["kinds"][kind] = measure_kind(path, prompts, options, result)
        if options.out:
            write_json(options.out, result)
    print(table(result))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default="q4_1,q4_0", help="4-bit types, with commas between: q4_1, q4_0")
    parser.add_argument("--figures", default=",".join(FIGURES), help="what is measured, with commas between")
    parser.add_argument("--by", default=",".join(CONTENDERS), help="the contenders, with commas between")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--work", type=Path, default=Path("bench-generation"), help="folder for files of other types")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    options = parser.parse_args()
    for name, known in (("kinds", ("q4_1", "q4_0")), ("figures", FIGURES), ("by", CONTENDERS)):
        chosen = getattr(options, name).split(",")
        setattr(options, name, chosen)
        if unknown := sorted(set(chosen) - set(known)):
            parser.error(f"--{name}: of {', '.join(known)}; got {', '.join(unknown)}")
    if min(options.new_tokens, options.prompt_tokens, options.streams, options.rounds) < 1:
        parser.error("counts must be at least 1")
    return options


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "llama_cpp_python")}


def written_as(kind: str, published: Path, work: Path) -> Path:
    """The published weights in blocks of another type, as a file that is kept for the next time."""
    from luthier.export.export import export

    folder = work / f"smollm2-135m-{kind}"
    if not folder.exists():
        export(str(published), to="gguf", out=folder, dtype=kind, rows=0)
    return next(folder.glob("*.gguf"))


def make_prompts(published: Path, options: argparse.Namespace) -> dict[str, list[Ids]]:
    """The prompts of each work, cut out of the example task's requests."""
    import luthier

    _, tokenizer = luthier.load(str(published))
    ids = tokenizer(ROWS.read_text(encoding="utf-8")[:200_000], add_special_tokens=False).input_ids
    places = [1000 + 100 * stream for stream in range(options.streams)]
    streams = [ids[place : place + 24 + 2 * (stream % 16)] for stream, place in enumerate(places)]
    return {"prompt": [ids[: options.prompt_tokens]], "one_stream": [ids[600:632]], "streams": streams}


def opened(path: Path, longest: int, options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Contender]:
    """The contenders asked for. longest: tokens of a stream."""
    found: dict[str, Contender] = {}
    if "luthier" in options.by:
        found["luthier"] = Luthier(path)
    if "llama.cpp" in options.by:
        llama = LlamaCpp(path, result["threads"], options.streams, longest)
        result["llama.cpp"], found["llama.cpp"] = llama.system, llama
    if "Transformers" in options.by:
        found["Transformers"] = Transformers(path)
    return found


def measure_kind(
    path: Path, prompts: dict[str, list[Ids]], options: argparse.Namespace, result: dict[str, Any]
) -> dict[str, Any]:
    """Every contender's best figures on one file, and their ratios."""
    longest = max(len(prompt) for own in prompts.values() for prompt in own) + options.new_tokens + 2
    contenders = opened(path, longest, options, result)
    found = {name: one.answers(prompts["one_stream"], CHECKED)[0] for name, one in contenders.items()}
    truth = found.get("Transformers")
    best: dict[str, dict[str, float]] = {name: {} for name in contenders}
    for number in range(options.rounds):
        for name, contender in rotated(list(contenders.items()), number):
            for figure, rate in round_of(contender, prompts, options).items():
                best[name][figure] = max(best[name].get(figure, 0.0), rate)
            print(f"{path.name}: round {number + 1}: {name}: {json.dumps(best[name])}", file=sys.stderr, flush=True)
    read = result["machine"]["read_bytes_per_second"]
    return {
        "file": path.name, "size_bytes": path.stat().st_size, "tokens_per_second": best,
        "same": {} if truth is None else {name: agreement(own, truth) for name, own in found.items()},
        "limit": None if read is None else read / path.stat().st_size,
        "targets": [
            {"what": what, "ratio": best["luthier"][figure] / best[other][figure], "at_least": least}
            for what, figure, other, least in TARGETS
            if figure in options.figures and {"luthier", other} <= set(best)
        ],
    }  # fmt: skip


def rotated(items: list[Any], by: int) -> list[Any]:
    return items[by % len(items) :] + items[: by % len(items)]


def round_of(contender: Contender, prompts: dict[str, list[Ids]], options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of each work, once."""
    rates, count = {}, options.new_tokens
    if "prompt" in options.figures:
        (long,) = prompts["prompt"]
        rates["prompt"] = len(long) / seconds(lambda: contender.answers([long], 1))
    for work in ("one_stream", "streams"):
        if work in options.figures:
            own = prompts[work]
            first = seconds(lambda own=own: contender.answers(own, 1))
            rates[work] = len(own) * count / (seconds(lambda own=own: contender.answers(own, count + 1)) - first)
    return rates


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def agreement(found: Ids, truth: Ids) -> float:
    """The share of the truth before the first token that differs."""
    common = next((place for place, (one, other) in enumerate(zip(found, truth, strict=True)) if one != other), len(truth))
    return common / len(truth)


def table(result: dict[str, Any]) -> str:
    """Markdown: a line a contender and file, then what was asked."""
    lines = [
        f"| weights | by | prompt of {result['prompt_tokens']} | one stream | {result['streams']} streams | same |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    asked = ["", "| weights | ratio | measured | asked |", "| --- | --- | --- | --- |"]
    for kind, own in result["kinds"].items():
        for name, rates in own["tokens_per_second"].items():
            weights = "f32" if name == "Transformers" else kind
            figures = " | ".join(f"{rates[figure]:.0f}" if figure in rates else "" for figure in FIGURES)
            same = f"{own['same'][name]:.0%}" if name in own["same"] else ""
            lines.append(f"| {weights} | {name} | {figures} | {same} |")
        asked += [f"| {kind} | {row['what']} | {row['ratio']:.2f} | {row['at_least']:.1f} |" for row in own["targets"]]
    return "\n".join(lines + asked)


if __name__ == "__main__":
    main()
