"""Where the package index of this machine's pip keeps a file.

pip's own settings decide: index-url, extra-index-url, find-links, no-index, cert, proxy and trusted-host, from its
configuration files and PIP_... variables alike. Source: the simple repository API, PEP 503 and PEP 691.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import os
import ssl
import subprocess
import sys
import urllib.parse
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from html.parser import HTMLParser
from http.client import HTTPException
from pathlib import Path
from typing import Any

from luthier.errors import one_line

DEFAULT_INDEX = "https://pypi.org/simple"
ACCEPT = "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1"
PAGE_TIMEOUT_SECONDS = 30
MAX_PAGE_BYTES = 1 << 25
FETCH_ERRORS = (OSError, HTTPException, ValueError)


@dataclass(frozen=True)
class IndexSettings:
    """What pip is told about where packages are. pages: addresses to look at, in order."""

    indexes: tuple[str, ...]
    find_links: tuple[str, ...] = ()
    certificates: str | None = None
    proxy: str | None = None
    trusted_hosts: tuple[str, ...] = ()

    def pages(self, package: str) -> list[str]:
        links = [_as_address(link) for link in self.find_links]
        return links + [f"{_as_address(index).rstrip('/')}/{package}/" for index in self.indexes]

    def opener(self, address: str) -> urllib.request.OpenerDirector:
        """An opener with pip's certificates and proxy. HTTP_PROXY and its like hold where pip names no proxy."""
        host = urllib.parse.urlsplit(address).hostname
        context = ssl.create_default_context(cafile=self.certificates)
        if self.certificates is None and importlib.util.find_spec("certifi"):
            context.load_verify_locations(importlib.import_module("certifi").where())  # some Pythons find none of the system's
        if host in self.trusted_hosts:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
        if self.proxy:
            handlers.append(urllib.request.ProxyHandler({"http": self.proxy, "https": self.proxy}))
        return urllib.request.build_opener(*handlers)


def pip_settings() -> IndexSettings:
    """The settings of the pip beside this Python, as `pip config list` gives them; without pip, those of PIP_... variables."""
    listed = _listed_by_pip() if importlib.util.find_spec("pip") else _from_environment(os.environ)
    return settings_from(listed)


def settings_from(listed: Mapping[str, str]) -> IndexSettings:
    """Settings from pip's keys such as `global.index-url`; `download.` goes before `global.`, `:env:.` before both."""

    def get(key: str) -> str | None:
        return next((listed[f"{part}.{key}"] for part in (":env:", "download", "global") if f"{part}.{key}" in listed), None)

    def words(key: str) -> tuple[str, ...]:
        return tuple((get(key) or "").split())

    alone = (get("no-index") or "").strip().lower() in ("1", "true", "yes", "on")
    indexes = () if alone else ((get("index-url") or DEFAULT_INDEX).strip(), *words("extra-index-url"))
    hosts = tuple(host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host for host in words("trusted-host"))
    return IndexSettings(indexes, words("find-links"), get("cert"), get("proxy"), hosts)


def _listed_by_pip() -> dict[str, str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise OSError(f"pip cannot say where its index is ({error})") from error
    listed = {}
    for line in done.stdout.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            try:
                listed[key] = str(ast.literal_eval(value))
            except (ValueError, SyntaxError) as error:
                raise OSError(f"pip describes {key} in a way that is not understood: {value[:80]!r}") from error
    return listed


def _from_environment(variables: Mapping[str, str]) -> dict[str, str]:
    return {f":env:.{key[4:].lower().replace('_', '-')}": value for key, value in variables.items() if key.startswith("PIP_")}


def find_file(settings: IndexSettings, package: str, file_name: str, sha256: str) -> tuple[str | None, list[str]]:
    """The address of `file_name` on the first page that offers it, and what was wrong with the pages before.

    A page that states another hash for it is passed over, for that is another file.
    """
    problems = []
    for page in settings.pages(package):
        try:
            found = _files_on(settings, page).get(file_name)
        except FETCH_ERRORS as error:
            problems.append(f"{without_login(page)}: {one_line(error, 200)}")
            continue
        if found is None:
            problems.append(f"{without_login(page)} does not offer {file_name}")
        elif found[1] not in (None, sha256):
            problems.append(f"{without_login(page)} offers another {file_name}, with sha256 {found[1]}")
        else:
            return found[0], problems
    return None, problems


def _files_on(settings: IndexSettings, page: str) -> dict[str, tuple[str, str | None]]:
    """From file name to its address and sha256, None where the page does not state it."""
    local = local_path(page)
    if local is not None:
        if (local / "index.html").is_file():
            return _from_html((local / "index.html").read_text(encoding="utf-8"), (local / "index.html").as_uri())
        if local.is_dir():
            return {path.name: (path.as_uri(), None) for path in local.iterdir() if path.is_file()}
        return _from_html(local.read_text(encoding="utf-8"), local.as_uri())
    with settings.opener(page).open(request(page, {"Accept": ACCEPT}), timeout=PAGE_TIMEOUT_SECONDS) as answer:
        body = answer.read(MAX_PAGE_BYTES)
        kind, address = answer.headers.get_content_type(), answer.geturl()
    base = _with_login_of(address, page)
    return _from_json(json.loads(body), base) if kind.endswith("json") else _from_html(body.decode("utf-8"), base)


def _from_json(content: Any, base: str) -> dict[str, tuple[str, str | None]]:
    try:
        return {
            file["filename"]: (_with_login_of(urllib.parse.urljoin(base, file["url"]), base), file["hashes"].get("sha256"))
            for file in content["files"]
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("the page is not as PEP 691 says") from error


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.addresses += [value for key, value in attrs if key == "href" and value]


def _from_html(text: str, base: str) -> dict[str, tuple[str, str | None]]:
    links = _Links()
    links.feed(text)
    files = {}
    for link in links.addresses:
        address, _, fragment = urllib.parse.urljoin(base, link).partition("#")
        stated = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
        name = urllib.parse.unquote(urllib.parse.urlsplit(address).path.rpartition("/")[2])
        files[name] = (_with_login_of(address, base), stated)
    return files


def request(address: str, headers: Mapping[str, str]) -> urllib.request.Request:
    """A request for `address`, with the name and password that stand in it as the header that carries them."""
    parts = urllib.parse.urlsplit(address)
    made = urllib.request.Request(without_login(address), headers={"User-Agent": "luthier", **headers})
    if parts.username:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        made.add_unredirected_header("Authorization", "Basic " + b64encode(login.encode()).decode())
    return made


def without_login(address: str) -> str:
    """The address as it may be sent and shown: name and password taken out."""
    parts = urllib.parse.urlsplit(address)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _with_login_of(address: str, source: str) -> str:
    """`address` with the name and password of `source`, where both are of one host and it has none of its own."""
    parts, origin = urllib.parse.urlsplit(address), urllib.parse.urlsplit(source)
    login, at, host = origin.netloc.rpartition("@")
    if not at or "@" in parts.netloc or parts.netloc != host:
        return address
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{login}@{host}"))


def local_path(address: str) -> Path | None:
    """The path of a `file:` address, or None."""
    parts = urllib.parse.urlsplit(address)
    return Path(urllib.request.url2pathname(parts.path)) if parts.scheme == "file" else None


def _as_address(place: str) -> str:
    """pip takes bare paths too, as find-links and as indexes."""
    scheme = urllib.parse.urlsplit(place).scheme
    return place if len(scheme) > 1 else Path(place).expanduser().absolute().as_uri()
