"""Models of the Hugging Face hub: safetensors, JSON and tokenizer files only, into the hub's own cache."""

from __future__ import annotations

import json
import os
import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from tqdm.auto import tqdm

from luthier.errors import ConfigError, ModelError, one_line
from luthier.models.checkpoint import INDEX_FILE, SINGLE_FILE
from luthier.progress import Progress

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
UNWANTED = ["*/*", "consolidated*.safetensors"]
REACH_SECONDS = 3.0
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def is_offline() -> bool:
    """Whether the environment forbids the hub: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE."""
    values = (os.environ.get(key, "") for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.strip().lower() in ("1", "true", "yes", "on") for value in values)


def looks_like_name(name: str) -> bool:
    """Whether `name` has the form org/name of the hub."""
    return NAME.fullmatch(name) is not None and ".." not in name and "--" not in name and not name.endswith((".gguf", ".git"))


def cached_snapshot(name: str) -> Path | None:
    """The folder of the hub's cache that holds the model whole, or None. Opens no socket."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except (OSError, ValueError):
        return None
    return folder if is_whole(folder) else None


def is_whole(folder: Path) -> bool:
    """Whether a snapshot has configuration, tokenizer and all its weights; an interrupted download leaves some of them out."""
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return False
    if (folder / SINGLE_FILE).is_file():
        return True
    try:
        shards = set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values())
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def unreachable(name: str) -> str | None:
    """Why the hub does not answer for the model within REACH_SECONDS, or None where it does."""
    address = f"{constants.ENDPOINT}/api/models/{name}"
    try:
        asked = urllib.request.Request(address, headers={"User-Agent": "luthier"})
        with urllib.request.urlopen(asked, timeout=REACH_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code} from {constants.ENDPOINT}"
    except urllib.error.URLError as error:
        return f"{constants.ENDPOINT}: {error.reason}"
    except (OSError, HTTPException) as error:
        return f"{constants.ENDPOINT}: {error}"


def snapshot(name: str, *, offline: bool, progress: Progress | None) -> Path:
    """The folder of the model `org/name`, fetched unless it is cached or `offline`.

    Raises ConfigError where the hub has no such model or does not give it, ModelError where it cannot be reached or,
    offline, where the cache does not hold the model whole.
    """
    if offline:
        folder = cached_snapshot(name)
        if folder is None:
            raise ModelError(
                f"offline, a hub model must be in the hub's cache; {name} is not in {constants.HF_HUB_CACHE}, or not whole. "
                "Run once without --offline and HF_HUB_OFFLINE, or give a model folder."
            )
        return folder
    try:
        return Path(
            snapshot_download(name, allow_patterns=WANTED, ignore_patterns=UNWANTED, tqdm_class=_reporting_bar(progress))
        )
    except GatedRepoError as error:
        raise ConfigError(
            f"the hub must grant access to {name}; it is gated. Accept its terms there, then `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"a hub id must name a model that exists; {name} does not, or is private. Check it, or `hf auth login`."
        ) from error
    except Exception as error:
        # What a broken connection raises belongs to the client's HTTP library, which is another one in every version.
        reason = one_line(error.__cause__ or error)
        raise ModelError(f"{name} could not be fetched from {constants.ENDPOINT}: {reason}. Check the network.") from error


def _reporting_bar(progress: Progress | None) -> type[tqdm]:
    """A tqdm class that draws nothing and tells `progress` how many bytes have come.

    The hub's client runs one bar over files and one or two over bytes; of the latter the one that is furthest counts.
    """
    done: dict[int, int] = {}

    class Bar(tqdm):
        def __init__(self, *args, **options):
            options["disable"] = True
            options.pop("name", None)
            self.counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.counts_bytes and progress is not None:
                done[id(self)] = int(self.n)
                progress("downloading", max(done.values()), max(int(self.total or 0), *done.values()))

    return Bar
