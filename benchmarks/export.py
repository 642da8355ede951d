"""Every exported form of a run, opened by the program it is for, beside base and adapter as they were trained.

    python benchmarks/export.py RUN [RUN ...] --work FOLDER [--rows 200] [--forms peft,gguf-f16 ...] [--out export.json]

Each form is written by `luthier.export` into FOLDER (one that is there already is compared as it is) and gives its logits at
every supervised token of the rows, one row at a time: PEFT and Transformers in float32, llama.cpp as llama-cpp-python opens
it, with its cache of keys and values in float32 or, with --cache f16, in its own default. "trained" compares with the model as
trained, "stored" with the same merge rounded in memory to what the file holds, which separates what the type costs from
what is wrong. Greedy text: llama.cpp's answer to every prompt is the same text as ours or not. Where its likeliest tokens
behind the prompt are the row's own up to the end of the answer, that is its answer and nothing is decoded; elsewhere it
decodes, token by token (--decode: everywhere, which takes several times as long).

Asked of a form: peft and merged-*: logits within 1e-4 of the largest, of what was trained where nothing is rounded, else of the
stored merge. gguf-f16, and gguf-adapter on the base's own file: the same greedy text on 97 % of rows, loss within 0.5 %.
gguf-adapter-f16 is the adapter's file on the base written in float16, and rounded-inputs is our own forward on the base as it
is with the inputs of blocks in 8 bits, as llama.cpp takes them: what gguf-adapter differs by more than the first, and as much
as the second, is that rounding. "loss apart" is the loss over that of the model as trained, less one, with
the 95 % interval over rows (paired bootstrap): what lies across 0 may be chance.
`--forms` not given: all that the run can have. The JSON file is written after each form; what it has is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import describe_machine, write_json

# Libraries look for packages called as scripts in this folder are.
sys.path.remove(str(Path(__file__).resolve().parent))

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.data import Example
    from luthier.export.compare import Reference
    from luthier.export.subject import Subject

FORMS = (
    "peft", "merged-f32", "merged-bf16", "merged-nf4", "mlx", "gguf-f16", "gguf-bf16", "gguf-q8_0", "gguf-q6_k", "gguf-q4_k",
    "gguf-q4_1", "gguf-q4_0", "gguf-asis", "gguf-adapter", "gguf-adapter-f16", "rounded-inputs",
)  # fmt: skip
ON_TEXT = ("gguf-f16", "gguf-adapter")
LOGITS, TEXT, LOSS = 1e-4, 0.97, 0.005
REFERENCE_BYTES = 8 << 30
DRAWS = 2000


@dataclass
class Trained:
    """The model as trained on the rows: its logits there and its greedy answers."""

    subject: Subject
    examples: list[Example]
    reference: Reference
    answers: list[str]
    max_new_tokens: int


@dataclass
class Opened:
    """A form in its program. logits: of each pack of the reference, in order; answers: greedy, filled in with the logits,
    None where only logits are compared."""

    by: str
    logits: Iterator[Tensor]
    answers: list[str] | None = None
    note: str = ""


def main() -> None:
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"benchmark": "export", "rows": options.rows, "runs": {}}
    if options.out and options.out.exists():
        result = json.loads(options.out.read_text(encoding="utf-8"))
    result["machine"] = describe_machine()
    for run in options.runs:
        measured = result["runs"].setdefault(run.name, {})
        trained: Trained | None = None
        for form in options.forms:
            if form in measured:
                continue
            trained = trained or train_side(run, options)
            measured[form] = measure(trained, form, options)
            print(f"{run.name}: {form}: {json.dumps(measured[form])}", file=sys.stderr, flush=True)
            if options.out:
                write_json(options.out, result)
    print(table(result["runs"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="finished runs, LoRA or QLoRA")
    parser.add_argument("--work", type=Path, required=True, help="folder for the exports")
    parser.add_argument("--data", help="rows to compare on; default: the run's own")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--forms", default=",".join(FORMS), help="with commas between")
    parser.add_argument("--cache", choices=("f32", "f16"), default="f32", help="llama.cpp's keys and values")
    parser.add_argument("--decode", action="store_true", help="llama.cpp decodes every answer token by token")
    parser.add_argument("--out", type=Path, help="write the result as JSON, and go on from it")
    options = parser.parse_args()
    options.forms = options.forms.split(",")
    unknown = sorted(set(options.forms) - set(FORMS))
    if unknown:
        parser.error(f"--forms are of {', '.join(FORMS)}; got {', '.join(unknown)}")
    return options


def train_side(run: Path, options: argparse.Namespace) -> Trained:
    """Load the run's model, and have it answer and give its logits."""
    from luthier.evaluation.generate import generate_batch
    from luthier.export.compare import reference_of
    from luthier.export.subject import open_subject, rows_of

    subject = open_subject(str(run))
    examples = rows_of(subject, options.data, options.rows)
    reference = reference_of(subject.model, examples, REFERENCE_BYTES)
    if not examples or reference.rows != len(examples):
        raise SystemExit(
            f"{reference.rows} of {len(examples)} rows carry loss and fit; all must. Give other --data or fewer --rows."
        )
    prompts = [example.prompt_ids for example in examples]
    answers = generate_batch(subject.model, subject.tokenizer, prompts, max_new_tokens=options.max_new_tokens)
    return Trained(subject, examples, reference, answers, options.max_new_tokens)


def measure(trained: Trained, form: str, options: argparse.Namespace) -> dict[str, Any]:
    """One form's figures, or why it has none."""
    from luthier.errors import LuthierError
    from luthier.export.export import export

    if form == "rounded-inputs":
        return measure_rounding(trained)
    to, kind = ("gguf-adapter", "") if form.startswith("gguf-adapter") else form.partition("-")[::2]
    folder = options.work / f"{trained.subject.name}-{form}"
    began = time.perf_counter()
    try:
        if not folder.exists():
            export(str(trained.subject.run_dir), to=to, out=folder, dtype=kind or None, rows=0)
        seconds = time.perf_counter() - began
        opened = OPENERS[to](trained, folder, options)
    except LuthierError as error:
        return {"left_out": str(error)}
    row: dict[str, Any] = {"by": opened.by, "note": opened.note, "seconds_to_export": seconds}
    row |= compared(trained.reference, opened.logits)
    row["size_bytes"] = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if to == "merged" and kind != "f32":
        row["stored"] = asdict(against_stored(trained, folder, kind, options))
    if opened.answers is not None:
        same = [one == other for one, other in zip(opened.answers, trained.answers, strict=True)]
        row["equal_text"] = sum(same) / len(same)
    return row | {"asked": asked(form, row)}


def measure_rounding(trained: Trained) -> dict[str, Any]:
    from luthier.adapters.targets import low_rank_layers
    from luthier.export.rounding import rounded_logits
    from luthier.matrices import GGUFMatrix

    if not any(isinstance(layer.matrix, GGUFMatrix) for layer in low_rank_layers(trained.subject.model).values()):
        return {"left_out": "the base has no blocks of a GGUF file"}
    row = {"by": "our forward, inputs of blocks in 8 bits", "note": "", "size_bytes": 0, "asked": None}
    return row | compared(trained.reference, rounded_logits(trained.subject.model, trained.reference))


def compared(reference: Reference, logits: Iterator[Tensor]) -> dict[str, Any]:
    """What differs from the model as trained, and how far the losses are apart, with the interval over rows."""
    import torch
    import torch.nn.functional as F

    from luthier.export.compare import difference_to

    sums = torch.zeros(2, reference.rows, dtype=torch.float64)

    def summed() -> Iterator[Tensor]:
        for pack, rows, wanted, got in zip(reference.packs, reference.row_of, reference.logits, logits, strict=True):
            for side, own in zip(sums, (wanted, got), strict=True):
                side.index_add_(0, rows, F.cross_entropy(own, pack.targets, reduction="none").to(torch.float64))
            yield got

    difference = difference_to(reference, summed())
    draws = torch.randint(reference.rows, (DRAWS, reference.rows), generator=torch.Generator().manual_seed(0))
    before, after = (side[draws].sum(1) for side in sums)
    interval = torch.quantile(after / before - 1, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {
        "trained": asdict(difference),
        "loss_apart": float(sums[1].sum() / sums[0].sum() - 1),
        "loss_apart_interval": interval,
    }


def asked(form: str, row: dict[str, Any]) -> bool | None:
    """Whether the form does what is asked of it; None where nothing is."""
    if form == "peft" or form.startswith("merged") or form == "mlx":
        return bool(row.get("stored", row["trained"])["largest_logits_error"] <= LOGITS)
    if form not in ON_TEXT or row["note"]:
        return None
    risen = abs(row["trained"]["loss"] - row["trained"]["loss_reference"])
    return bool(row["equal_text"] >= TEXT and risen <= LOSS * row["trained"]["loss_reference"])


def against_stored(trained: Trained, folder: Path, kind: str, options: argparse.Namespace) -> Any:
    """The folder as Transformers reads it, beside the merge rounded in memory to the same type."""
    from luthier.export.choices import merge_of, plain_kind, storing
    from luthier.export.compare import difference_to, merged_reference

    merge = merge_of(trained.subject.model, None, "dequantized")
    stored = merged_reference(trained.reference, merge, storing(merge, kind), plain_kind(kind))
    return difference_to(stored, open_merged(trained, folder, options).logits)


def open_peft(trained: Trained, folder: Path, options: argparse.Namespace) -> Opened:
    """The adapter in PEFT, on the base as Transformers, and for 4 bits bitsandbytes, reads it."""
    from importlib.metadata import version

    from peft import PeftModel

    subject = trained.subject
    base_folder, file, note = subject.source.path, None, ""
    if any(getattr(module, "kind", None) == "nf4" for module in subject.model.modules()):
        base_folder, note = nf4_base(trained, options), "base in NF4 by bitsandbytes"
    elif base_folder.is_file():
        base_folder, file = base_folder.parent, base_folder.name
    model = PeftModel.from_pretrained(plain_model(base_folder, file), str(folder)).eval()
    return Opened(f"PEFT {version('peft')}", transformers_logits(model, trained.reference), note=note)


def nf4_base(trained: Trained, options: argparse.Namespace) -> Path:
    """The run's base as a folder that Transformers opens with bitsandbytes."""
    from luthier.models.quantize import quantize

    config = trained.subject.config
    assert config is not None
    folder = options.work / f"{trained.subject.name}-base-nf4"
    if not folder.exists():
        quantize(trained.subject.base, folder, nf4=config.nf4_options)
    return folder


def open_merged(trained: Trained, folder: Path, options: argparse.Namespace) -> Opened:
    from importlib.metadata import version

    nf4 = folder.name.endswith("nf4")
    by = f"Transformers {version('transformers')}" + (f", bitsandbytes {version('bitsandbytes')}" if nf4 else "")
    return Opened(by, transformers_logits(plain_model(folder, None), trained.reference))


def plain_model(folder: Path, file: str | None) -> Any:
    """The model in plain Transformers, computing in float32, in 4 bits too. file: a GGUF file in the folder."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32, local_files_only=True).eval()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes, which computes and dequantises in bfloat16 unless told
            module.compute_dtype, module.compute_type_is_set = torch.float32, True
            module.weight.quant_state.dtype = torch.float32
    return model


def transformers_logits(model: Any, reference: Reference) -> Iterator[Tensor]:
    """At the supervised tokens of each pack, each row alone."""
    import torch

    with torch.no_grad():
        for pack in reference.packs:
            bounds = zip(pack.starts.tolist(), pack.starts[1:].tolist(), strict=False)
            parts = []
            for first, end in bounds:
                own = pack.predict[(pack.predict >= first) & (pack.predict < end)] - first
                parts.append(model(input_ids=pack.ids[None, first:end]).logits[0, own].to(torch.float32))
            yield torch.cat(parts)


def open_mlx(trained: Trained, folder: Path, options: argparse.Namespace) -> Opened:
    """No mlx here: the folder is read back by our reader of its layout."""
    from luthier.export.compare import model_logits
    from luthier.export.subject import open_subject

    back = open_subject(str(folder), base_model=trained.subject.base)
    return Opened("our reader of mlx-lm's layout", model_logits(back.model, trained.reference))


def open_gguf(trained: Trained, folder: Path, options: argparse.Namespace) -> Opened:
    return in_llama_cpp(trained, next(folder.glob("*.gguf")), None, options)


def open_gguf_adapter(trained: Trained, folder: Path, options: argparse.Namespace) -> Opened:
    """On the base's own file; for an adapter trained on NF4 that is another base than it was trained on, which is noted."""
    subject = trained.subject
    if not subject.source.path.is_file():
        raise_left_out("the base is no GGUF file")
    base = subject.source.path
    if folder.name.endswith("f16"):
        base = f16_base(subject, options)
    opened = in_llama_cpp(trained, base, next(folder.glob("*.gguf")), options)
    storage = subject.config.storage if subject.config is not None else None
    opened.note = "" if storage != "nf4" else "trained on NF4, here on the file it was made from"
    return opened


def f16_base(subject: Subject, options: argparse.Namespace) -> Path:
    """The base without its adapter as a GGUF file in float16: llama.cpp rounds what goes into blocks to 8 bits, not this."""
    from luthier.export.export import export

    folder = options.work / f"{Path(subject.base).stem}-f16"
    if not folder.exists():
        export(subject.base, to="gguf", out=folder, rows=0)
    return next(folder.glob("*.gguf"))


def raise_left_out(reason: str) -> None:
    from luthier.errors import ConfigError

    raise ConfigError(reason)


def in_llama_cpp(trained: Trained, path: Path, adapter: Path | None, options: argparse.Namespace) -> Opened:
    from luthier.data import Renderer
    from luthier.evaluation.pieces import text_of
    from luthier.evaluation.stops import end_tokens
    from luthier.export.llama_cpp import LlamaCpp

    subject = trained.subject
    longest = max(len(example.ids) for example in trained.examples) + trained.max_new_tokens + 1
    judge = LlamaCpp(path, longest, adapter=adapter, exact_cache=options.cache == "f32")
    stops = end_tokens(subject.model, subject.tokenizer, Renderer(subject.tokenizer, max_length=64))
    answers: list[str] = []

    def answer(example: Example, logits: Tensor) -> str:
        """logits: behind every token of the row."""
        start = len(example.prompt_ids)
        own = example.ids[start:]
        ends = next((place for place, token in enumerate(own) if token in stops), None)
        read = logits[start - 1 :].argmax(1).tolist()
        if ends is None or options.decode or example.ids[:start] != example.prompt_ids or read[: ends + 1] != own[: ends + 1]:
            own, ends = judge.answer(example.prompt_ids, trained.max_new_tokens, stops), None
        return text_of(subject.tokenizer, own[:ends][: trained.max_new_tokens])

    def logits() -> Iterator[Tensor]:
        """Row by row, the answer behind the logits: the prompt is in llama.cpp's cache then."""
        import torch

        for pack in trained.reference.packs:
            parts = []
            for place, (first, end) in enumerate(zip(pack.starts.tolist(), pack.starts[1:].tolist(), strict=False)):
                own = pack.predict[(pack.predict >= first) & (pack.predict < end)] - first
                row = judge.logits(pack.ids[first:end].tolist())
                parts.append(row[own])
                answers.append(answer(trained.examples[pack.rows[place]], row))
            yield torch.cat(parts)
        judge.close()

    return Opened(judge.name, logits(), answers)


OPENERS: dict[str, Callable[[Trained, Path, argparse.Namespace], Opened]] = {
    "peft": open_peft, "merged": open_merged, "mlx": open_mlx, "gguf": open_gguf, "gguf-adapter": open_gguf_adapter,
}  # fmt: skip


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line a form."""
    heads = ["run", "form", "opened by", "MB", "logits: trained", "logits: stored", "loss", "loss trained", "loss apart",
             "95 %", "next token", "greedy text", "as asked"]  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    for run, forms in runs.items():
        for form, row in forms.items():
            if "left_out" in row:
                lines.append([run, form, f"left out: {row['left_out'].splitlines()[0]}", *[""] * 10])
                continue
            trained, by = row["trained"], row["by"] + (f"; {row['note']}" if row["note"] else "")
            lines.append([
                run, form, by, f"{row['size_bytes'] / 1e6:.0f}", f"{trained['largest_logits_error']:.1e}",
                f"{row['stored']['largest_logits_error']:.1e}" if "stored" in row else "", f"{trained['loss']:.5f}",
                f"{trained['loss_reference']:.5f}", f"{row['loss_apart']:+.2%}",
                "{:+.2%} to {:+.2%}".format(*row["loss_apart_interval"]), f"{trained['token_agreement']:.2%}",
                f"{row['equal_text']:.1%}" if "equal_text" in row else "",
                {True: "yes", False: "no", None: ""}[row["asked"]],
            ])  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    main()
