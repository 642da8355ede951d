"""Does an export compute what was trained? It is opened by the program it is for and compared on rows of the run's data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from luthier.adapters import detach, load_adapter
from luthier.adapters.targets import low_rank_layers
from luthier.data import Example, Renderer
from luthier.evaluation.generate import generate_batch
from luthier.evaluation.pieces import text_of
from luthier.evaluation.stops import end_tokens
from luthier.export import forms, llama_cpp
from luthier.export.choices import LEAST_LOSS, LOSS_SHARE, storing
from luthier.export.compare import (
    Difference,
    Reference,
    difference_to,
    merged_difference,
    model_difference,
    reference_of,
)
from luthier.export.gguf_adapter import read_adapter
from luthier.export.merge import Merge
from luthier.export.mlx import to_peft_folder
from luthier.export.subject import Subject
from luthier.linear import LowRankTerm
from luthier.models.load import load

OUR_READER, AS_TRAINED, THE_MERGE = "luthier's reader", "the model as trained", "the merge in memory"
LARGEST_ERROR = 1e-4  # of logits: both sides compute in float32 with the same weights
LEAST_EQUAL_ROWS = 0.97
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Verification:
    """by: the program that opened the export; against: what it was compared with; bound: what was asked of it, in words;
    equal_answers, equal_tokens: shares of rows whose greedy text, and whose tokens, are the same, None if not looked at."""

    by: str
    against: str
    passed: bool
    bound: str
    difference: Difference
    equal_answers: float | None = None
    equal_tokens: float | None = None

    def to_json(self) -> dict[str, Any]:
        content = asdict(self)
        return content | {"difference": asdict(self.difference)}


def verify_merge(reference: Reference, merge: Merge) -> Verification:
    """The merge itself, before anything is rounded, against the model as trained."""
    difference = merged_difference(reference, merge, storing(merge, "f32"), "f32")
    return _judgement("the merge in memory, in f32", difference, AS_TRAINED)


def verify_merged(folder: Path, expected: Reference, kind: str) -> Verification:
    """Open the folder in plain Transformers, in float32; nf4, for which that needs a package, by our own reader.

    expected: the logits of the merge, stored as `kind`.
    """
    if kind == "nf4":
        return _judged(OUR_READER, load(str(folder), offline=True).model, expected, THE_MERGE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return _judged(f"Transformers {version('transformers')}", model.eval(), expected, THE_MERGE)


def verify_peft(folder: Path, subject: Subject, reference: Reference) -> Verification:
    """Open the adapter in PEFT on the base in plain Transformers where both can be had; else by our own reader.

    Of a base in 4 bits PEFT needs another program's copy: there our reader puts it on the base as it was trained, in the
    place of the adapter on `subject`.
    """
    dense = all(layer.matrix.kind in forms.DENSE for layer in low_rank_layers(subject.model).values())
    if find_spec("peft") is not None and dense and subject.source.path.is_dir():
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(subject.source.path, dtype=torch.float32, local_files_only=True)
        model: Any = PeftModel.from_pretrained(base, str(folder)).eval().base_model.model
        return _judged(f"PEFT {version('peft')}", model, reference, AS_TRAINED)
    detach(subject.model)
    load_adapter(subject.model, folder)
    return _judged(OUR_READER, subject.model, reference, AS_TRAINED)


def verify_mlx(folder: Path, subject: Subject, reference: Reference) -> Verification:
    """Read mlx-lm's files back and put them on the base as it was trained, in the place of the adapter on `subject`."""
    detach(subject.model)
    with TemporaryDirectory() as scratch:
        load_adapter(subject.model, to_peft_folder(folder, subject.model, Path(scratch) / "adapter"))
    return _judged(OUR_READER, subject.model, reference, AS_TRAINED)


def verify_gguf(path: Path, subject: Subject, expected: Reference, examples: Sequence[Example]) -> list[Verification]:
    """The file in our own reader against the merge, and, with the extra llamacpp, in llama.cpp against our reading of it."""
    loaded = load(str(path), offline=True)
    found = [_judged(OUR_READER, loaded.model, expected, THE_MERGE)]
    if llama_cpp.is_installed():
        found.append(_by_llama_cpp(path, None, loaded.model, subject.tokenizer, examples))
    return found


def verify_gguf_adapter(path: Path, subject: Subject, reference: Reference, examples: Sequence[Example]) -> list[Verification]:
    """The adapter file read back and put on the base it was trained on; in llama.cpp too, where that base is a GGUF file."""
    trained = {name: layer.terms for name, layer in low_rank_layers(subject.model).items()}
    _put_read_terms(path, subject.model)
    try:
        found = [_judged(OUR_READER, subject.model, reference, AS_TRAINED)]
    finally:
        for name, layer in low_rank_layers(subject.model).items():
            layer.terms = trained[name]
    if llama_cpp.is_installed() and subject.source.path.is_file():
        found.append(_by_llama_cpp(subject.source.path, path, subject.model, subject.tokenizer, examples))
    return found


def _put_read_terms(path: Path, model: PreTrainedModel) -> None:
    read = read_adapter(path, model.config)
    for name, layer in low_rank_layers(model).items():
        terms = torch.nn.ModuleDict()
        if name in read.pairs:
            terms["read"] = LowRankTerm(*read.pairs[name], read.scaling(name))
        layer.terms = terms


def _judged(by: str, model: PreTrainedModel, reference: Reference, against: str) -> Verification:
    return _judgement(by, model_difference(reference, model), against)


def _judgement(by: str, difference: Difference, against: str) -> Verification:
    bound = f"logits within {LARGEST_ERROR:g} of the largest"
    return Verification(by, against, difference.largest_logits_error <= LARGEST_ERROR, bound, difference)


def _by_llama_cpp(
    path: Path, adapter: Path | None, ours: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Verification:
    """llama.cpp against our own reading of the same file: logits, greedy answers and tokens."""
    reference = reference_of(ours, examples)
    asked = [example for example in examples if example.prompt_ids]
    longest = max(len(example.ids) for example in examples)
    longest = max([longest, *(len(example.prompt_ids) for example in asked)]) + ANSWER_TOKENS + 1
    judge = llama_cpp.LlamaCpp(path, longest, adapter=adapter)
    try:
        difference = difference_to(reference, (judge.pack_logits(pack) for pack in reference.packs))
        stops = end_tokens(ours, tokenizer, Renderer(tokenizer, max_length=64))
        theirs = [text_of(tokenizer, judge.answer(example.prompt_ids, ANSWER_TOKENS, stops)) for example in asked]
        texts = [str(tokenizer.decode(example.ids)) for example in examples]
        cut = [judge.tokens(text, special=True) == tokenizer(text, add_special_tokens=True).input_ids for text in texts]
    finally:
        judge.close()
    answers = generate_batch(ours, tokenizer, [one.prompt_ids for one in asked], max_new_tokens=ANSWER_TOKENS)
    equal = sum(a == b for a, b in zip(answers, theirs, strict=True)) / len(asked) if asked else None
    near = abs(difference.loss - difference.loss_reference) <= LOSS_SHARE * max(difference.loss_reference, LEAST_LOSS)
    bound = f"loss within {LOSS_SHARE:.1%} (of {LEAST_LOSS:g} where it is smaller)"
    bound += f", the same greedy text on {LEAST_EQUAL_ROWS:.0%} of rows"
    passed = near and (equal is None or equal >= LEAST_EQUAL_ROWS)
    return Verification(judge.name, "our reading of the file", passed, bound, difference, equal, sum(cut) / len(cut))
