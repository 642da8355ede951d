"""compression.json: how a compressed model's matrices are stored in the safetensors files beside it.

    {"format": "luthier-compressed", "version": 1, "origin": "the model it was made from",
     "files": {"compressed.safetensors": {"size_bytes": 80000000, "sha256": "..."}},
     "layers": {"model.layers.0.mlp.up_proj": {"shape": [1536, 576], "kind": "r128/nf4,bf16", "right_of": null}, ...}}

A layer's kind is f32, bf16, f16, nf4, a type of GGUF blocks, or what `FactoredKind` writes. Its tensors: `<layer>.weight` with
what bitsandbytes keeps beside it for nf4, uint8 rows of blocks for GGUF types; of a factored matrix `<layer>.left.weight`,
`<layer>.right.weight`, `<layer>.places` in the pivoted form, and `<layer>.weight` for the matrix the factors are added to.
right_of: the layer under whose name the right factor lies where layers share one. Files are not called as Transformers
calls them, so that it does not take the folder for a model with most of its weights missing and draw these at random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from luthier.disk import known_sha256
from luthier.errors import ModelError, bulleted, nearest, one_line
from luthier.kernels.storage import KINDS
from luthier.matrices.factored import FactoredKind
from luthier.strict_json import read_json
from luthier.units import shortened

DESCRIPTION_FILE = "compression.json"
VERSION: Literal[1] = 1
MAX_SIZE = 1 << 31
LONGEST_NAME = 120  # of a layer or file in a message


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(_Strict):
    """A safetensors file as it was written."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class LayerEntry(_Strict):
    """One matrix, (out_features, in_features)."""

    shape: list[int] = Field(min_length=2, max_length=2)
    kind: str = Field(max_length=64)
    right_of: str | None = Field(None, max_length=1024)

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def factored(self) -> FactoredKind | None:
        return FactoredKind.parse(self.kind)


class Description(_Strict):
    """The whole of compression.json."""

    format: Literal["luthier-compressed"]
    version: Literal[1]
    origin: str = Field("", max_length=4096)
    files: dict[str, FileEntry] = Field(min_length=1)
    layers: dict[str, LayerEntry] = Field(min_length=1)

    def to_text(self) -> str:
        return self.model_dump_json(indent=1) + "\n"


def is_compressed(folder: Path) -> bool:
    """Whether the folder says that it holds a compressed model."""
    return (folder / DESCRIPTION_FILE).exists()


def read_description(folder: Path) -> Description:
    """The description in `folder`, each of its statements possible and in keeping with the others.

    Raises ModelError, with every problem in it, for a file that is not JSON, is of another version, has unknown fields, or
    describes storages and sizes that cannot be. The weights are not looked at.
    """
    path = folder / DESCRIPTION_FILE
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} must be readable JSON; {one_line(error)}. Copy the model again.") from error
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > VERSION:
        raise ModelError(
            f"{path} must be of version {VERSION} or less; it is of {shortened(str(version), 20)}. Update luthier."
        )
    try:
        description = Description.model_validate(content)
    except ValidationError as error:
        problems = [
            f"{shortened('.'.join(map(str, one['loc'])), LONGEST_NAME) or 'the file'}: {one['msg']}" for one in error.errors()
        ]
        raise ModelError(f"{path} must describe a compressed model:\n{bulleted(problems)}\nCopy the model again.") from error
    problems = [problem for name, entry in description.layers.items() for problem in _problems(name, entry, description)]
    if problems:
        raise ModelError(f"{path} describes what cannot be:\n{bulleted(problems)}\nCopy the model again.")
    return description


def check_files(folder: Path, description: Description) -> None:
    """Raise ModelError unless the weight files are, byte for byte, those that the description was written with.

    The files are known to stand in the folder.
    """
    problems = []
    for name, entry in description.files.items():
        size_bytes = (folder / name).stat().st_size
        if size_bytes != entry.size_bytes:
            problems.append(f"{shortened(name, LONGEST_NAME)} must have {entry.size_bytes} bytes; it has {size_bytes}")
        elif known_sha256(folder / name) != entry.sha256:
            problems.append(f"{shortened(name, LONGEST_NAME)} has another sha256 than when it was written")
    if problems:
        raise ModelError(f"the weights of {folder} must be whole; they are not:\n{bulleted(problems)}\nCopy the model again.")


def _problems(name: str, entry: LayerEntry, description: Description) -> list[str]:
    """What cannot be in one layer's entry."""
    short = shortened(name, LONGEST_NAME)
    if not all(1 <= size < MAX_SIZE for size in entry.shape):
        return [f"{short}: sizes lie between 1 and {MAX_SIZE - 1}; got {shortened(str(entry.shape), 80)}"]
    factored = entry.factored
    if factored is None and entry.kind not in KINDS:
        return [f"{short}: {entry.kind!r} names no storage.{nearest(entry.kind, KINDS)}"]
    if factored is None:
        return [f"{short}: only factored layers share a right factor"] if entry.right_of is not None else []
    # A right factor that layers share may have more rows than one of these layers; pivots are rows of the layer itself.
    most = min(entry.rows - 1, entry.columns) if factored.pivoted else entry.columns
    if factored.rank > most:
        return [f"{short}: its rank is at most {most}; got {factored.rank}"]
    if entry.right_of is None:
        return []
    owner = description.layers.get(entry.right_of)
    theirs = None if owner is None else owner.factored
    if owner is None or theirs is None or owner.right_of is not None:
        return [f"{short}: '{shortened(entry.right_of, LONGEST_NAME)}' has no right factor of its own to share"]
    same = (theirs.rank, theirs.right, owner.columns) == (factored.rank, factored.right, entry.columns)
    return (
        [] if same else [f"{short}: it shares a right factor of {shortened(entry.right_of, LONGEST_NAME)} that does not fit it"]
    )
