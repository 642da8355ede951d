"""Weights of a Transformers folder: safetensors files, single or sharded, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from luthier.errors import ModelError, PreflightError, bulleted, one_line
from luthier.matrices import Matrix
from luthier.strict_json import read_json
from luthier.units import shortened, visible

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LONGEST_NAME = 200  # of a tensor or file in a message
PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class WeightSource(Protocol):
    """Where weights come from. Names are those of the Transformers model's parameters."""

    def names(self) -> list[str]:
        """Every tensor's name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape as `tensor` gives it."""

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype `tensor` gives it in; None where it holds no floating-point numbers."""

    def kind(self, name: str) -> str | None:
        """What it is stored as where that is no floating-point dtype: nf4, a type of GGUF blocks, two factors; else None."""

    def matrix(self, name: str) -> Matrix:
        """A tensor whose kind is not None, as the matrix that keeps it, mapped where it can be."""

    def tensor(self, name: str, *, mapped: bool) -> Tensor:
        """The tensor in numbers. mapped: it may stay on disk, read when used; else it is read now and the file let go."""


class SafetensorsCheckpoint:
    """The tensors of one folder's `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

    files: the files to read in place of these, by the names that another file of the folder, `listed_in`, gives them.
    Raises ModelError, with every problem in it, if a file is missing, damaged, or lies outside the folder, or if
    the folder holds only pickled weights, which are never opened.
    """

    def __init__(self, folder: Path, files: Iterable[str] | None = None, listed_in: str = INDEX_FILE):
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._dtype_of: dict[str, str] = {}
        self._mapped: dict[Path, safe_open] = {}
        index = _read_index(folder) if files is None else {}
        problems: list[str] = []
        for path in _shards(folder, index) if files is None else _listed_files(folder, files, listed_in):
            problems += self._read_header(path)
        problems += [
            f"{shortened(name, LONGEST_NAME)} is not in {shortened(file, LONGEST_NAME)}, where the index puts it"
            for name, file in index.items()
            if name not in self._file_of
        ]
        if problems:
            raise ModelError(
                f"the weights of {folder} must be whole; they are not:\n{bulleted(problems)}\nDownload the model again."
            )

    def _read_header(self, path: Path) -> list[str]:
        problems: list[str] = []
        try:
            # Torch maps a whole file as memory of its own, which fails where the file is larger than the machine's.
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in self._file_of:
                        twice = f"{visible(self._file_of[name].name)} and in {visible(path.name)}"
                        problems.append(f"{shortened(name, LONGEST_NAME)} is in {twice}")
                    part = file.get_slice(name)
                    self._file_of[name] = path
                    self._shape_of[name] = tuple(part.get_shape())
                    self._dtype_of[name] = part.get_dtype()
        except (SafetensorError, OSError) as error:
            problems.append(f"{visible(path.name)} is damaged or cut short ({one_line(error)})")
        return problems

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape_of[name]

    def dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self._dtype_of[name])

    def stored_dtype(self, name: str) -> str:
        """The dtype by safetensors' own name: F32, BF16, U8 and so on."""
        return self._dtype_of[name]

    def kind(self, name: str) -> str | None:
        return None

    def matrix(self, name: str) -> Matrix:
        raise ModelError(f"{name} is stored in plain numbers, not in blocks.")

    def tensor(self, name: str, *, mapped: bool) -> Tensor:
        path = self._file_of[name]
        if not mapped:
            # A mapping of its own, so that the pages read are given back as soon as the caller has converted them.
            with _mapping(path) as file:
                return file.get_tensor(name)
        if path not in self._mapped:
            self._mapped[path] = _mapping(path)
        tensor = self._mapped[path].get_tensor(name)
        # Writers need not align what they write, and kernels want whole elements at their own addresses.
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()


def _mapping(path: Path) -> safe_open:
    """The file's tensors, mapped. Raises PreflightError where the system has no room for a mapping of its size."""
    try:
        return safe_open(path, framework="pt")
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        raise PreflightError(
            f"a weight file must be no larger than this machine can map at once; {path} has {path.stat().st_size} bytes. Cut "
            "it in shards where there is more memory: save_pretrained(new_folder, max_shard_size='2GB')."
        ) from error


def _read_index(folder: Path) -> dict[str, str]:
    """The index's map from tensor to file name; empty where there is no index. Raises ModelError if it is malformed."""
    path = folder / INDEX_FILE
    if not path.is_file() or (folder / SINGLE_FILE).is_file():
        return {}
    try:
        weight_map = read_json(path)["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise ModelError(f"{path} must be JSON with a weight_map; {reason}. Download the model again.") from error
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{path}: weight_map must give a file name for every tensor. Download the model again.")
    return weight_map


def _shards(folder: Path, index: dict[str, str]) -> list[Path]:
    """The files to read, each a regular file inside `folder`. Raises ModelError naming those that are not."""
    return _listed_files(folder, index.values(), INDEX_FILE) if index else [_single_file(folder)]


def _listed_files(folder: Path, names: Iterable[str], listed_in: str) -> list[Path]:
    problems = []
    shards = []
    for file in sorted(set(names)):
        path = folder / file
        if not _stays_inside(folder, file):
            problems.append(f"{file[:200]!r} leads out of the folder")
        elif not _is_file(path):
            problems.append(f"{shortened(file, LONGEST_NAME)} is missing")
        else:
            shards.append(path)
    if problems:
        raise ModelError(
            f"every file in {folder / listed_in} must stand in that folder:\n{bulleted(problems)}\nDownload the model again."
        )
    return shards


def _single_file(folder: Path) -> Path:
    path = folder / SINGLE_FILE
    if path.is_file():
        return path
    pickled = sorted(file.name for pattern in PICKLE_PATTERNS for file in folder.glob(pattern))
    if pickled:
        raise ModelError(
            f"weights must be in safetensors; {folder} holds {', '.join(pickled[:3])}, which are pickles and could run "
            "code, so they are "
            "never opened. Convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )
    raise ModelError(
        f"a model folder holds {SINGLE_FILE} or {INDEX_FILE}; {folder} has neither. Check the path or download the model again."
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long for the file system
        return False


def _stays_inside(folder: Path, file: str) -> bool:
    """Whether the name `file` stays in `folder`, links followed. The hub's own cache links snapshots to its blobs."""
    parts = PurePosixPath(file).parts
    if not parts or PurePosixPath(file).is_absolute() or ".." in parts or "\\" in file or "\0" in file:
        return False
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        allowed.append((folder.parent.parent / "blobs").resolve())
    try:
        target = (folder / file).resolve()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or links that lead round in a circle
        return False
    return any(target.is_relative_to(root) for root in allowed)
