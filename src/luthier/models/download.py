"""One file from the network: resumed where it stopped, with its hash checked before anything else sees it."""

from __future__ import annotations

import errno
import os
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError

from luthier.disk import sha256_of
from luthier.errors import ModelError, PreflightError, one_line
from luthier.models.package_index import IndexSettings, request, without_login
from luthier.progress import Progress

CHUNK_BYTES = 1 << 18
TIMEOUT_SECONDS = 30
ATTEMPTS = 5
WAIT_SECONDS = 1.0


def download(
    address: str, destination: Path, *, size_bytes: int, sha256: str, settings: IndexSettings, progress: Progress | None
) -> None:
    """Fetch `address` into `destination`, keeping what has come in `destination`.part until it is whole.

    A part that is there already is continued by a Range request; a connection that breaks is tried ATTEMPTS times.
    Raises ModelError if the file cannot be fetched or its sha256 is not the one asked for, PreflightError on a full disk.
    """
    part = destination.with_name(destination.name + ".part")
    for attempt in range(ATTEMPTS):
        resumed = part.is_file() and part.stat().st_size > 0
        try:
            _continue(address, part, size_bytes, settings, progress)
        except HTTPError as error:
            if error.code != 416 and error.code < 500:
                raise _failed(address, part, f"HTTP {error.code} {error.reason}") from error
            if error.code == 416:
                part.unlink(missing_ok=True)
            problem: Exception = error
        except (OSError, HTTPException) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise _disk_full(part, size_bytes) from error
            problem = error
        else:
            actual = sha256_of(part)
            if actual == sha256:
                os.replace(part, destination)
                return
            part.unlink()
            if not resumed:
                raise ModelError(
                    f"{without_login(address)} must have sha256 {sha256}; it has {actual}, and was deleted. "
                    "The index serves another file: try another one with PIP_INDEX_URL."
                )
            problem = ModelError(f"what had come before has sha256 {actual}")
        if attempt + 1 < ATTEMPTS:
            time.sleep(WAIT_SECONDS * 2**attempt)
    raise _failed(address, part, str(problem)) from problem


def _continue(address: str, part: Path, size_bytes: int, settings: IndexSettings, progress: Progress | None) -> None:
    """Append to `part` until it has `size_bytes`. Raises OSError or HTTPException where the connection ends before."""
    done = part.stat().st_size if part.is_file() else 0
    if done == size_bytes:
        return
    headers = {"Range": f"bytes={done}-"} if 0 < done < size_bytes else {}
    with settings.opener(address).open(request(address, headers), timeout=TIMEOUT_SECONDS) as answer:
        if not (headers and _continues_at(answer, done)):
            done = 0
        with part.open("ab" if done else "wb") as file:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                done += len(chunk)
                if done > size_bytes:
                    break
                if progress is not None:
                    progress("downloading", done, size_bytes)
            file.flush()
            os.fsync(file.fileno())
    if done < size_bytes:
        raise ConnectionError(f"the connection ended after {done} of {size_bytes} bytes")


def _continues_at(answer: HTTPResponse, position: int) -> bool:
    return answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(f"bytes {position}-")


def _failed(address: str, part: Path, reason: str) -> ModelError:
    kept = f" What has come is kept in {part}; the same command goes on from there." if part.is_file() else ""
    return ModelError(f"{without_login(address)} could not be fetched: {one_line(reason)}.{kept} Check the network.")


def _disk_full(part: Path, size_bytes: int) -> PreflightError:
    return PreflightError(
        f"the disk must have {size_bytes} bytes free for the download; {part.parent} is full. Free some, or set LUTHIER_CACHE."
    )
