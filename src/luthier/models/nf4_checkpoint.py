"""Weights that bitsandbytes stored in NF4, read from the folder that Transformers saved them to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from luthier.errors import ModelError, ShapeError, bulleted
from luthier.matrices import NF4Matrix
from luthier.matrices.nf4 import STATE_KEY
from luthier.models.checkpoint import SafetensorsCheckpoint
from luthier.models.mixed_checkpoint import MixedCheckpoint

# What a compressed model's config.json names, so that Transformers does not take it for a model without these weights.
COMPRESSED_METHOD = "luthier"
STATE_MARK = ".quant_state.bitsandbytes__"
PART_ENDS = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE_KEY.removeprefix("weight"))
# What other quantizers call the tensors they put beside or in place of a weight.
OTHER_FORMATS = {
    ".SCB": "bitsandbytes int8",
    ".qweight": "gptq or awq",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "fp8 or int8",
    ".weight_scale_inv": "fp8",
}


def check_quantization(content: dict[str, Any], where: str) -> None:
    """Raise ModelError, naming what they are, if a config.json says that its weights are quantised otherwise than in
    bitsandbytes NF4."""
    settings = content.get("quantization_config")
    if not settings:
        return
    kind = _kind_named(settings) if isinstance(settings, dict) else repr(settings)
    if kind not in ("bitsandbytes nf4", COMPRESSED_METHOD):
        raise _refusal(where, kind)


def refuse_other_formats(names: Iterable[str], where: str) -> None:
    """Raise ModelError, naming the format, if a tensor that no model has shows another quantizer's work.

    names: of the tensors that have no place in the model. For checkpoints whose config.json says nothing.
    """
    for name in names:
        kind = OTHER_FORMATS.get(f".{name.rpartition('.')[2]}")
        if kind:
            raise _refusal(where, f"{kind} ({name})")


def _refusal(where: str, kind: str) -> ModelError:
    return ModelError(
        f"{where}: quantized weights must be bitsandbytes nf4 or a GGUF file; these are {kind}. "
        "Use the original model; --method qlora quantizes it while loading."
    )


def _kind_named(settings: dict[str, Any]) -> str:
    method = str(settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "of an unknown kind"))
    if method != "bitsandbytes":
        return method
    if settings.get("load_in_8bit"):
        return "bitsandbytes int8"
    return f"bitsandbytes {settings.get('bnb_4bit_quant_type', 'fp4')}"


def holds_nf4(plain: SafetensorsCheckpoint) -> bool:
    """Whether some weight lies beside a state of bitsandbytes."""
    return any(STATE_MARK in name for name in plain.names())


def nf4_checkpoint(plain: SafetensorsCheckpoint) -> MixedCheckpoint:
    """A folder with weights in bitsandbytes NF4 beside plain ones.

    Raises ModelError naming every weight whose parts are missing, do not fit, or are of another format.
    """
    found = read_nf4(plain)
    return MixedCheckpoint(plain, found, {f"{name}{end}" for name in found for end in PART_ENDS})


def nf4_matrix(plain: SafetensorsCheckpoint, names: Mapping[str, str]) -> NF4Matrix:
    """The matrix of tensors that `part_names` found, mapped. Raises ShapeError where parts are missing or do not fit."""
    return NF4Matrix.from_tensors({part: plain.tensor(name, mapped=True) for part, name in names.items()})


def part_names(weight: str, present: AbstractSet[str]) -> dict[str, str]:
    """From what NF4Matrix calls its parts to the names of those that are `present` of the weight called so."""
    return {f"weight{end}": f"{weight}{end}" for end in PART_ENDS if f"{weight}{end}" in present}


def read_nf4(plain: SafetensorsCheckpoint) -> dict[str, NF4Matrix]:
    """Every weight stored in NF4, by its name, its parts mapped. Raises ModelError with all problems."""
    found: dict[str, NF4Matrix] = {}
    problems: list[str] = []
    present = set(plain.names())
    marked = _marked(plain.names(), problems)
    if problems and not marked:
        raise _refusal(str(plain.folder), f"bitsandbytes {problems[0].rpartition(' ')[2]} ({problems[0].partition(' ')[0]})")
    for name in marked:
        try:
            found[name] = nf4_matrix(plain, part_names(name, present))
        except ShapeError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ModelError(f"the 4-bit weights of {plain.folder} must be whole nf4:\n{bulleted(problems)}\nDownload them again.")
    return found


def _marked(names: Iterable[str], problems: list[str]) -> list[str]:
    """The weights beside which bitsandbytes keeps a state; those in another format than NF4 are problems."""
    marked = []
    for key in names:
        name, mark, kind = key.partition(STATE_MARK)
        if mark and kind == "nf4" and name.endswith(".weight"):
            marked.append(name)
        elif mark:
            problems.append(f"{name} is stored as {kind}")
    return marked
