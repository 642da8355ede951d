"""Does an export compute what was trained? It is opened by the program it is for and compared on rows of the run's data."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.adapters import detach, load_adapter
from luthier.adapters.targets import low_rank_layers
from luthier.data import Example
from luthier.export import forms, llama_cpp
from luthier.export.by_llama_cpp import judged_by_llama_cpp
from luthier.export.choices import storing
from luthier.export.compare import Reference, merged_difference, model_difference
from luthier.export.gguf_adapter import read_adapter
from luthier.export.merge import Merge
from luthier.export.mlx import to_peft_folder
from luthier.export.subject import Subject
from luthier.export.verification import Verification, judged_by_logits
from luthier.linear import LowRankTerm
from luthier.models.load import load

OUR_READER, AS_TRAINED, THE_MERGE = "luthier's reader", "the model as trained", "the merge in memory"


def verify_merge(reference: Reference, merge: Merge) -> Verification:
    """The merge itself, before anything is rounded, against the model as trained."""
    difference = merged_difference(reference, merge, storing(merge, "f32"), "f32")
    return judged_by_logits("the merge in memory, in f32", difference, AS_TRAINED)


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
        found.append(judged_by_llama_cpp(path, None, loaded.model, subject.tokenizer, examples))
    return found


def verify_gguf_adapter(path: Path, subject: Subject, reference: Reference, examples: Sequence[Example]) -> list[Verification]:
    """The adapter file read back and put on the base it was trained on; in llama.cpp too, where the base is a GGUF file.

    Where it was trained on other weights than the file's, such as NF4 made of them, llama.cpp is compared with our own
    reading of file and adapter: that the adapter computes something else there is said beside.
    """
    trained = {name: layer.terms for name, layer in low_rank_layers(subject.model).items()}
    _put_read_terms(path, subject.model)
    try:
        found = [_judged(OUR_READER, subject.model, reference, AS_TRAINED)]
    finally:
        for name, layer in low_rank_layers(subject.model).items():
            layer.terms = trained[name]
    file = subject.source.path
    if llama_cpp.is_installed() and file.is_file():
        ours = subject.model
        if not subject.is_as_stored:
            ours = load(str(file), offline=True).model
            _put_read_terms(path, ours)
        found.append(judged_by_llama_cpp(file, path, ours, subject.tokenizer, examples))
    return found


def _put_read_terms(path: Path, model: PreTrainedModel) -> None:
    read = read_adapter(path, model.config)
    for name, layer in low_rank_layers(model).items():
        terms = torch.nn.ModuleDict()
        if name in read.pairs:
            terms["read"] = LowRankTerm(*read.pairs[name], read.scaling(name))
        layer.terms = terms


def _judged(by: str, model: PreTrainedModel, reference: Reference, against: str) -> Verification:
    return judged_by_logits(by, model_difference(reference, model), against)
