"""The ways in which a model can be merged, what each costs on the run's rows, and which one to take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from luthier.adapters.targets import low_rank_layers
from luthier.errors import ConfigError
from luthier.export import forms
from luthier.export.compare import Difference, Reference, merged_difference
from luthier.export.gguf_settings import ARCHITECTURE_OF
from luthier.export.merge import Merge
from luthier.export.merged_folder import BESIDE_NF4, merged_layer_kind
from luthier.linear import enabled_terms
from luthier.matrices import FactoredMatrix, GGUFMatrix, Matrix
from luthier.models.load import Loaded
from luthier.progress import Progress
from luthier.units import number_text, percent_text, size_text

ORIGINAL, DEQUANTIZED = "original", "dequantized"
BASES = (ORIGINAL, DEQUANTIZED)
REQUANTIZED = ("nf4", "q8_0", "q4_k")
# A form is taken for as good as what was trained where its loss rises by no more than this share, of LEAST_LOSS where it is
# smaller than that, and it writes the same next token at least at this share of tokens, and all along this share of rows.
LOSS_SHARE, LEAST_LOSS = 0.005, 0.1
TOKEN_AGREEMENT, ROW_AGREEMENT = 0.99, 0.97


@dataclass(frozen=True)
class Choice:
    """One way to merge: into which weights (original or dequantized), and what the result is stored in."""

    base: str
    kind: str

    @property
    def label(self) -> str:
        if self.kind == forms.AS_IS:
            return "the blocks trained on, changed matrices in q8_0"
        into = "the original weights" if self.base == ORIGINAL else "the weights trained on"
        return f"{into}, {'re-quantized to ' if self.kind not in forms.DENSE else ''}{self.kind}"


@dataclass(frozen=True)
class Measured:
    """A choice, the bytes of its weights, and how it differs from base plus adapter as they were trained."""

    choice: Choice
    size_bytes: int
    difference: Difference

    @property
    def is_as_good(self) -> bool:
        """Whether loss and next tokens are those of the trained model, as near as the bounds above say."""
        risen = self.difference.loss - self.difference.loss_reference
        bound = LOSS_SHARE * max(self.difference.loss_reference, LEAST_LOSS)
        same = self.difference.token_agreement >= TOKEN_AGREEMENT and self.difference.row_agreement >= ROW_AGREEMENT
        return risen <= bound and same

    def to_json(self) -> dict[str, Any]:
        return {"base": self.choice.base, "dtype": self.choice.kind, "size_bytes": self.size_bytes, **asdict(self.difference)}


def merge_of(trained: Any, original: Loaded | None, base: str) -> Merge:
    """The merge of a trained model into the weights that `base` names."""
    if base == DEQUANTIZED or original is None:
        return Merge(trained)
    return Merge(trained, {name: layer.matrix for name, layer in low_rank_layers(original.model).items()})


def choices_for(model: PreTrainedModel, kind: str, sixteen_bits: str, has_original: bool) -> list[Choice]:
    """What the report compares, on each base there is: the wanted kind, 16 bits, and the re-quantised ones that some form
    holds of the model's family."""
    bases = [ORIGINAL, DEQUANTIZED] if has_original else [DEQUANTIZED]
    small = [one for one in REQUANTIZED if _is_storable(model, one)]
    kinds = dict.fromkeys([kind, *([] if kind in ("bf16", "f16") else [sixteen_bits]), *small])
    return [Choice(base, one) for one in kinds for base in bases]


def _is_storable(model: PreTrainedModel, kind: str) -> bool:
    """Whether the family's weights can be nf4, which stands for (out, in) alone, or the blocks of a GGUF file."""
    if kind != "nf4":
        return model.config.model_type in ARCHITECTURE_OF
    return not any(layer.matrix.transposed for layer in low_rank_layers(model).values())


def measure(
    reference: Reference, trained: Any, original: Loaded | None, choices: Iterable[Choice], progress: Progress | None = None
) -> list[Measured]:
    """Each choice on the reference's rows, one after another."""
    merges = {base: merge_of(trained, original, base) for base in BASES}
    listed = list(choices)
    found: list[Measured] = []
    for choice in listed:
        merge = merges[choice.base]
        if progress is not None:
            progress(f"comparing: {choice.label}", len(found), len(listed))
        difference = merged_difference(reference, merge, storing(merge, choice.kind), plain_kind(choice.kind))
        found.append(Measured(choice, size_of(merge, choice.kind), difference))
    return found


def storing(merge: Merge, kind: str) -> Callable[[str, Tensor], Matrix]:
    """How a model of `kind` stores the merged weight of each layer."""

    def store(name: str, weight: Tensor) -> Matrix:
        if is_untouched(merge, name, kind):
            return merge.matrix(name)
        return forms.as_kind(weight, layer_kind(merge, name, kind), name)

    return store


def is_untouched(merge: Merge, name: str, kind: str) -> bool:
    """Whether the layer's matrix is in the wanted GGUF blocks already and no term changes it: then they are copied."""
    matrix = merge.matrix(name)
    same = isinstance(matrix, GGUFMatrix) and layer_kind(merge, name, kind) == matrix.kind
    return same and not enabled_terms(merge.layers[name])


def layer_kind(merge: Merge, name: str, kind: str) -> str:
    """How the matrix of one layer is stored in a model of `kind`."""
    if kind not in forms.MERGED_KINDS:
        return gguf_layer_kind(merge, name, kind)
    name = merge.embedding if name == merge.head and merge.tied else name
    return merged_layer_kind(merge, name, kind)


def gguf_layer_kind(merge: Merge, name: str, kind: str) -> str:
    """llama.cpp's rule: the matrix that makes the logits has at least 6 bits, all others the kind asked for.

    With "asis" the kind that the matrix has, or `forms.changed_kind` of it where a term changes it. Raises ConfigError for
    "asis" of a matrix in factors.
    """
    matrix = merge.matrix(name)
    if kind == forms.AS_IS and isinstance(matrix, FactoredMatrix):
        raise ConfigError(
            f"--dtype asis keeps the blocks of a GGUF base; {name} is stored in low-rank factors, which no GGUF type holds. "
            "Try --dtype f16, which multiplies them out."
        )
    if kind == forms.AS_IS:
        return forms.changed_kind(matrix.kind) if enabled_terms(merge.layers[name]) else matrix.kind
    is_output = name == merge.head or (name == merge.embedding and merge.tied)
    wanted = "q6_k" if is_output and kind in ("q4_0", "q4_1", "q4_k") else kind
    return forms.fitting_kind(wanted, matrix.shape[1])


def size_of(merge: Merge, kind: str) -> int:
    """The bytes of all weights stored as `kind`; norms and biases of a GGUF file are float32."""
    total = 0
    for part in merge.parts():
        if part.layer is not None:
            total += forms.size_bytes(part.shape, layer_kind(merge, part.layer, kind))
        else:
            total += forms.size_bytes(part.shape, plain_kind(kind))
    return total


def plain_kind(kind: str) -> str:
    """How norms and biases are stored in a model of `kind`."""
    return kind if kind in forms.DENSE else BESIDE_NF4 if kind == "nf4" else "f32"


def recommend(all_measured: list[Measured], kinds: Collection[str], default_base: str) -> tuple[Measured, str]:
    """Of the choices stored in one of `kinds` the one to take, and why, in words.

    It is the dense one whose logits differ least, unless smaller ones are as good; then it is the smallest of these. What
    is smaller and as good in a kind that only another form holds is named after it.
    """
    chosen, reason = _recommended([one for one in all_measured if one.choice.kind in kinds], default_base)
    elsewhere = [one for one in all_measured if one.choice.kind not in kinds and one.is_as_good]
    smallest = min(elsewhere, key=lambda one: one.size_bytes, default=chosen)
    if smallest.size_bytes >= chosen.size_bytes:
        return chosen, reason
    form = "merged" if smallest.choice.kind in forms.MERGED_KINDS else "gguf"
    found = f"As good in {size_text(smallest.size_bytes)}: --to {form} --dtype {smallest.choice.kind}"
    base = f" --base {smallest.choice.base}" if smallest.choice.base != default_base else ""
    return chosen, f"{reason} {found}{base}."


def _recommended(measured: list[Measured], default_base: str) -> tuple[Measured, str]:
    dense = [one for one in measured if one.choice.kind in forms.DENSE]
    best = min(dense, key=lambda one: (one.difference.logits_error, one.choice.base != default_base))
    small = [one for one in measured if one.is_as_good and one.size_bytes < best.size_bytes]
    if small:
        chosen = min(small, key=lambda one: (one.size_bytes, one.difference.logits_error))
        reason = f"it takes {size_text(chosen.size_bytes)} instead of {size_text(best.size_bytes)} and {_says(chosen)}"
        return chosen, f"Recommended: {chosen.choice.label}: {reason}."
    why = "no smaller type of this form is as good"
    if not best.is_as_good:
        why = "the others are worse; to lose nothing, keep the adapter apart"
    return best, f"Recommended: {best.choice.label}: {_says(best)}; {why}."


def warning(chosen: Measured) -> str | None:
    """What a person must be told of a form that is not as good as what was trained."""
    return None if chosen.is_as_good else f"This form is not as good as what was trained: it {_says(chosen)}."


def _says(one: Measured) -> str:
    difference = one.difference
    return (
        f"writes the same next token at {percent_text(difference.token_agreement)} of {difference.tokens} tokens, "
        f"with a loss of {number_text(difference.loss)} against {number_text(difference.loss_reference)}"
    )
