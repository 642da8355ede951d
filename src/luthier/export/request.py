"""What may be asked of an export, and where it may go: all that can be said before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from luthier.data.read import open_source
from luthier.errors import ConfigError, PreflightError, nearest, one_line
from luthier.export import forms
from luthier.export.choices import BASES
from luthier.export.forms import AS_IS

MERGED_FORMS, ADAPTER_FORMS = ("merged", "gguf"), ("peft", "mlx", "gguf-adapter")
FORMS = (*MERGED_FORMS, *ADAPTER_FORMS)
DEFAULT_ROWS = 32
# File systems hold names of 255 bytes; what follows the name and a temporary beginning need some of them.
NAME_BYTES = 150


def check_request(to: str, dtype: str | None, base: str | None) -> None:
    """Raise ConfigError for a form, a dtype or a base that is not known, or that this form has no use for."""
    if to not in FORMS:
        raise ConfigError(f"--to is one of {', '.join(FORMS)}; got {to!r}.{nearest(to, FORMS)}")
    if to in ADAPTER_FORMS and (dtype is not None or base is not None):
        raise ConfigError(f"--dtype and --base say how weights are merged; --to {to} merges none. Leave them out.")
    if base is not None and base not in BASES:
        raise ConfigError(f"--base is one of {', '.join(BASES)}; got {base!r}.{nearest(base, BASES)}")
    kinds = forms.MERGED_KINDS if to == "merged" else (*forms.GGUF_KINDS, AS_IS)
    if dtype is not None and dtype not in kinds:
        raise ConfigError(f"--dtype with --to {to} is one of {', '.join(kinds)}; got {dtype!r}.{nearest(dtype, kinds)}")


def check_data(to: str, data: str | None, rows: int, *, verify: bool, offline: bool) -> None:
    """Raise ConfigError for rows that nothing would be compared on, DataError for a file that is not there."""
    if data is None:
        return
    if rows == 0:
        raise ConfigError("--data names rows to compare on; got --rows 0 beside it. Leave one of them out.")
    if to in ADAPTER_FORMS and not verify:
        raise ConfigError(
            f"--data names rows to compare on, which --to {to} does with --verify alone. Add it, or leave --data out."
        )
    open_source(data, offline=offline)


def new_folder(out: str | Path) -> Path:
    """The absolute path of `out`, whose parent is there now. Raises ConfigError where something stands there already,
    PreflightError where the parent cannot be made or written to."""
    try:
        folder = Path(out).expanduser().absolute()
        os.lstat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError) as error:  # RuntimeError: `~name` of a person this machine does not know
        reason = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise ConfigError(f"--out needs the name of a new folder; {out}: {reason}. Choose another.") from error
    else:
        raise ConfigError(f"an export goes to a new folder; {folder} exists. Choose another --out, or remove it.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PreflightError(
            f"{folder.parent} must be a folder that can be written to; {error.strerror}. Choose another --out."
        ) from error
    if not os.access(folder.parent, os.W_OK):
        raise PreflightError(f"{folder.parent} must be a folder that can be written to; it is not. Choose another --out.")
    return folder


def file_name(name: str) -> str:
    """A name for a file, of at most NAME_BYTES: letters, digits, - _ . of `name`, - in place of all else."""
    kept = "".join(char if char.isalnum() or char in "-_." else "-" for char in name).strip(".")
    return kept.encode()[:NAME_BYTES].decode(errors="ignore") or "model"
