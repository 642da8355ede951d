"""Put weights into a model skeleton: linear layers and token embeddings become matrices, the rest float32.

Tensor by tensor: memory holds the model as it is stored, the tensor being converted, and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.pytorch_utils import Conv1D

from luthier.config import NF4Options, Storage
from luthier.errors import ModelError, bulleted
from luthier.kernels.storage import KINDS
from luthier.linear import LowRankEmbedding, LowRankLinear
from luthier.matrices import Matrix, NF4Matrix
from luthier.matrices.factored import is_factored
from luthier.models.checkpoint import WeightSource
from luthier.models.fit import listed, really_missing, really_unexpected
from luthier.models.nf4_checkpoint import refuse_other_formats
from luthier.models.stored import is_linear, kept_modules, left_out_note, linear_names, read_matrix, stored_as
from luthier.progress import Progress


class Filler:
    """Fills one skeleton from one source.

    base: how matrices are stored; None and "asis": as the source has them; "nf4": linear layers but the head and
    `nf4.skip_modules` in NF4, all else as the source has it. quantized: the matrices that were made, by source name.
    """

    def __init__(self, model: PreTrainedModel, source: WeightSource, base: Storage | None, where: str, nf4: NF4Options):
        self.model, self.source, self.where = model, source, where
        self.base, self.nf4 = base, nf4
        self.embedding = _name_of(model, model.get_input_embeddings())
        self.head = _name_of(model, model.get_output_embeddings())
        linear = linear_names(model)
        kept = kept_modules(linear, self.head, nf4) if base == "nf4" else []
        self._to_nf4 = {f"{name}.weight" for name in linear if name not in kept} if base == "nf4" else set()
        self._conv1d = {f"{name}.weight" for name in linear if isinstance(model.get_submodule(name), Conv1D)}
        self.quantized: dict[str, NF4Matrix] = {}
        self.tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        self.notes: list[str] = []
        self._done_bytes = 0
        self._source_name = self._match_names()

    def fill(self, progress: Progress | None) -> None:
        """Replace every weight by its stored value, one tensor at a time. Raises ModelError with all that does not fit."""
        self._check()
        total = sum(self._bytes(name) for name in set(self._source_name.values()))
        for name, module in list(self.model.named_modules()):
            if not _has_own_tensors(module):
                continue
            self._replace(name, module)
            self._done_bytes += sum(
                self._bytes(self._source_name[key]) for key in _own_keys(name, module) if key in self._source_name
            )
            if progress is not None:
                progress("quantizing" if self._to_nf4 else "loading", min(self._done_bytes, total), total)
        if self.tied:
            self._tie()
        self.model.requires_grad_(False)
        left_out = left_out_note(self.model)
        self.notes += [left_out] if left_out else []

    def storages(self) -> dict[str, str]:
        """How each matrix will be stored, by the name of its weight in the model; no weight is read.

        A tied head is not named. Raises ModelError with all that does not fit.
        """
        self._check()
        return {key: self._wanted(key, self._source_name[key]) for key in self._matrix_keys()}

    def source_name(self, key: str) -> str:
        """What the source calls the weight of that name in the model."""
        return self._source_name[key]

    # which tensor goes where

    def _match_names(self) -> dict[str, str]:
        """From the model's parameter names to the source's.

        Transformers has renamed parameters of some families since their checkpoints were written, and a checkpoint of
        the bare model lacks the common prefix.
        """
        renamings = [rule for rule in get_model_conversion_mapping(self.model) if isinstance(rule, WeightRenaming)]
        available: dict[str, str] = {}
        for name in self.source.names():
            current = name
            for rule in renamings:
                current, _ = rule.rename_source_key(current)
            available.setdefault(current, name)
        prefix = self.model.base_model_prefix + "."
        matched = {}
        for key in self.model.state_dict():
            if key in available:
                matched[key] = available[key]
            elif key.startswith(prefix) and key.removeprefix(prefix) in available:
                matched[key] = available[key.removeprefix(prefix)]
        if self.tied:
            self._match_tied(matched)
        return matched

    def _match_tied(self, matched: dict[str, str]) -> None:
        """One tensor serves embedding and head; a checkpoint that holds two different ones is not tied after all."""
        embedding, head = f"{self.embedding}.weight", f"{self.head}.weight"
        if embedding in matched and head in matched:
            first, second = matched[embedding], matched[head]
            same = self.source.shape(first) == self.source.shape(second) and torch.equal(
                self.source.tensor(first, mapped=False), self.source.tensor(second, mapped=False)
            )
            if not same:
                self.tied = False
                self.model.config.tie_word_embeddings = False
                self.notes.append("The configuration ties head and embedding, the weights differ: both were loaded, untied.")
                return
        kept = matched.get(embedding, matched.get(head))
        if kept is not None:
            matched[embedding] = matched[head] = kept

    def _check(self) -> None:
        expected = self.model.state_dict()
        used = {*self._source_name.values(), f"{self.head}.weight"}
        unexpected, left_out = really_unexpected(self.model, (name for name in self.source.names() if name not in used))
        refuse_other_formats(unexpected, self.where)
        absent = (key for key in expected if key not in self._source_name)
        missing, computed = really_missing(self.model, absent, expected, self.where)
        self.notes += [*left_out, *computed]
        problems = [f"{key} is missing" for key in missing]
        problems += [f"{name} has no place in the model" for name in unexpected]
        for key, name in self._source_name.items():
            shape = tuple(expected[key].shape)
            if self._is_turned(key, name):
                shape = shape[::-1]
            if shape != self.source.shape(name):
                problems.append(f"{key} must be {shape}; it is {self.source.shape(name)}")
            if self.source.dtype(name) is None:
                problems.append(f"{key} must be stored in f32, bf16 or f16; it is not")
        if problems:
            raise ModelError(
                f"the weights must fit the configuration ({self.model.config.model_type}); "
                f"{self.where}:\n{bulleted(problems)}\n"
                "Check that config.json and the weights belong together."
            )
        kinds = {key: stored_as(self.source, self._source_name[key]) for key in self._matrix_keys()}
        odd = {key: kind for key, kind in kinds.items() if kind not in KINDS and not is_factored(kind)}
        self._check_kinds(kinds, odd)
        if self.base == "nf4":
            self._note_kinds(kinds, odd)

    def _check_kinds(self, kinds: Mapping[str, str], odd: Mapping[str, str]) -> None:
        """Raise ModelError for a matrix that is to stay in blocks that no kernel multiplies with, and for tables in factors.

        kinds: of every matrix, by its key; odd: those of these that no kernel knows.
        """
        kept = [f"{key}: {kind.upper()}" for key, kind in odd.items() if self._wanted(key, self._source_name[key]) == kind]
        if kept:
            raise ModelError(
                f"a matrix stays as it is stored only in {', '.join(KINDS)}; {self.where} has {len(kept)} others:\n"
                f"{bulleted(kept)}\nTry --base nf4, which quantizes them anew while loading, --base bf16, or another "
                "quantization of the model, such as Q4_K_M."
            )
        tables = [f"{key}: {kinds[key]}" for key in self._table_keys() if is_factored(kinds.get(key))]
        if tables:
            raise ModelError(
                f"token embeddings and head are stored whole; {self.where} has them in factors:\n{bulleted(tables)}\n"
                "Compress the model anew."
            )

    def _note_kinds(self, kinds: Mapping[str, str], odd: Mapping[str, str]) -> None:
        """Note what is not as base nf4 asks."""
        factored = [key for key, kind in kinds.items() if is_factored(kind)]
        if factored:
            self.notes.append(f"{listed(factored)} stored in low-rank factors and kept so.")
        widened = [key for key in odd if key not in self._to_nf4]
        if widened:
            size_bytes = sum(self._bytes(self._source_name[key]) for key in widened)
            named = ", ".join(sorted({odd[key].upper() for key in widened}))
            self.notes.append(
                f"{listed(widened)} stored in {named}, which has no kernel here: held in float32, {size_bytes} bytes."
            )
        fixed = [key for key, kind in kinds.items() if kind == "nf4" and self._is_asked_otherwise(key)]
        if fixed:
            self.notes.append(
                f"{listed(fixed)} in NF4 already and kept so: double quantisation and skip_modules change nothing."
            )

    def _is_asked_otherwise(self, key: str) -> bool:
        """Whether a weight that is in NF4 already was to be left out, or to have scales of another kind."""
        if key not in self._to_nf4:
            return key not in (f"{self.head}.weight", f"{self.embedding}.weight")
        matrix = self.source.matrix(self._source_name[key])
        return isinstance(matrix, NF4Matrix) and matrix.double_quant != self.nf4.double_quant

    def _matrix_keys(self) -> list[str]:
        """The weights that become matrices, a tied head's left out."""
        linear = [name for name in linear_names(self.model) if not (self.tied and name == self.head)]
        return [f"{name}.weight" for name in (self.embedding, *linear)]

    def _table_keys(self) -> list[str]:
        return [f"{self.embedding}.weight", f"{self.head}.weight"]

    # how a tensor becomes part of the model

    def _replace(self, name: str, module: nn.Module) -> None:
        if name == self.embedding:
            self.model.set_submodule(name, self._make_embedding(name, module))
        elif is_linear(module):
            if name == self.head and self.tied:
                return
            self.model.set_submodule(name, LowRankLinear(self.make_matrix(f"{name}.weight"), self._bias(name, module)))
        else:
            for key in [key for key, _ in module.named_parameters(recurse=False) if f"{name}.{key}" in self._source_name]:
                setattr(module, key, nn.Parameter(self._plain(f"{name}.{key}"), requires_grad=False))
            persistent = [key for key, _ in module.named_buffers(recurse=False) if f"{name}.{key}" in self._source_name]
            for key in persistent:
                setattr(module, key, self._plain(f"{name}.{key}"))

    def make_matrix(self, key: str) -> Matrix:
        """How a stored tensor becomes a matrix: mapped where it can stay as it is."""
        name = self._source_name[key]
        transposed = key in self._conv1d and not self._is_turned(key, name)
        matrix = read_matrix(self.source, name, key, self._wanted(key, name), transposed, double=self.nf4.double_quant)
        if isinstance(matrix, NF4Matrix) and self.source.kind(name) != "nf4":
            self.quantized[name] = matrix
        return matrix

    def _wanted(self, key: str, name: str) -> str:
        """The storage that this weight is to have. One that is in NF4 or in factors already is not quantised anew."""
        kind = stored_as(self.source, name)
        if self.base == "nf4" and is_factored(kind):
            return kind
        if key in self._to_nf4:
            return "nf4"
        if self.base not in (None, "asis", "nf4"):
            return self.base
        return "f32" if self.base == "nf4" and kind not in KINDS else kind

    def _is_turned(self, key: str, name: str) -> bool:
        """Whether a Conv1D's weight, (in, out) in plain checkpoints, comes as (out, in), as all but dense storages lie."""
        return key in self._conv1d and self.source.kind(name) is not None

    def _plain(self, key: str) -> Tensor:
        """A small tensor in float32, its own copy."""
        return self.source.tensor(self._source_name[key], mapped=False).to(torch.float32, copy=True)

    def _bias(self, name: str, module: nn.Module) -> Tensor | None:
        return None if getattr(module, "bias", None) is None else self._plain(f"{name}.bias")

    def _make_embedding(self, name: str, module: nn.Module) -> LowRankEmbedding:
        scale = getattr(module, "embed_scale", None)
        if type(module) is not nn.Embedding and scale is None:
            raise ModelError(f"token embeddings must be plain or scaled by a constant; {type(module).__name__} is neither.")
        return LowRankEmbedding(
            self.make_matrix(f"{name}.weight"), getattr(module, "padding_idx", None), 1.0 if scale is None else float(scale)
        )

    def _tie(self) -> None:
        """Give the head the embedding's matrix, and tell Transformers under which names the pair now stands."""
        head = self.model.get_submodule(self.head)
        embedding = self.model.get_submodule(self.embedding)
        assert isinstance(embedding, LowRankEmbedding)
        matrix = embedding.matrix
        self.model.set_submodule(self.head, LowRankLinear(matrix, self._bias(self.head, head)))
        pair = {rf"{re.escape(self.head)}\.(matrix\.)?weight": rf"{re.escape(self.embedding)}\.(matrix\.)?weight"}
        self.model._tied_weights_keys = pair
        self.model.all_tied_weights_keys = {f"{self.head}.matrix.weight": f"{self.embedding}.matrix.weight"}

    def _bytes(self, name: str) -> int:
        dtype = self.source.dtype(name) or torch.float32
        return torch.Size(self.source.shape(name)).numel() * dtype.itemsize


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _has_own_tensors(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False))


def _own_keys(name: str, module: nn.Module) -> Iterable[str]:
    return (f"{name}.{key}" for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)])
