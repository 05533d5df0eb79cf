"""A stand-in for the Hugging Face Hub on loopback: what `huggingface_hub` and `datasets` ask for snapshots and rows."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

NAMED = r"/api/(?:models/)?(?P<repo>(?:datasets/)?[^/]+/[^/]+)"
AT = r"(?P<revision>[^/]+)"
INFO = re.compile(rf"{NAMED}/revision/{AT}")
TREE = re.compile(rf"{NAMED}/tree/{AT}(?:/(?P<folder>.+))?")
PATHS = re.compile(rf"{NAMED}/paths-info/{AT}")
ACCESS = re.compile(rf"{NAMED}/auth-check")
FILE = re.compile(rf"/(?P<repo>(?:datasets/)?[^/]+/[^/]+)/resolve/{AT}/(?P<file>.+)")

Files = dict[str, bytes]


@dataclass
class Repository:
    """Commits by their hash, `main` being one of them.

    Attributes:
        gated: everyone sees what it is, and nobody gets a file.
        token: without it the repository does not exist; None is public.
        status: what every request is answered with instead, as 403 or 503.
    """

    commits: dict[str, Files]
    main: str
    gated: bool = False
    token: str | None = None
    status: int | None = None

    def commit(self, revision: str) -> str | None:
        return self.main if revision == "main" else revision if revision in self.commits else None


@dataclass
class HubServer:
    """What it holds, what it was asked, and where it breaks off.

    Attributes:
        repositories: by ORG/NAME, datasets by datasets/ORG/NAME.
        requests: `METHOD path`, in order.
        breaks_at: name of a file of which the first half is sent, once, and then nothing more.
    """

    address: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    breaks_at: str | None = None
    broken: set[str] = field(default_factory=set)

    def gets(self) -> list[str]:
        """Names of the files that were asked for, once for each request."""
        return [line.rpartition("/")[2] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry(name: str, content: bytes) -> dict[str, object]:
    """A file as listings say it."""
    return {"type": "file", "path": name, "size": len(content), "oid": digest(content)[:40]}


def folders(files: Files, within: str) -> list[dict[str, object]]:
    """The folders below `within` that files lie in, as listings say them."""
    names = {f"{parent}/" for name in files for parent in PurePosixPath(name).parents} - {"./", within}
    below = sorted(name.rstrip("/") for name in names if name.startswith(within))
    return [{"type": "directory", "path": name, "size": 0, "oid": digest(name.encode())[:40]} for name in below]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Not to stderr: `requests` has them."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        sent = parse_qs(self.rfile.read(int(self.headers["Content-Length"] or 0)).decode())
        found = next(filter(None, (form.fullmatch(path) for form in (INFO, TREE, PATHS, ACCESS, FILE))), None)
        if found is None:
            return self._answer(404, b"")
        repository = self.hub.repositories.get(found["repo"])
        if repository is None or (repository.token and self.headers["Authorization"] != f"Bearer {repository.token}"):
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if repository.status is not None:
            return self._answer(repository.status, b"")
        if repository.gated and found.re in (ACCESS, FILE):
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if found.re is ACCESS:
            return self._json({})
        commit = repository.commit(unquote(found["revision"]))
        if commit is None:
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if found.re is FILE:
            return self._file(unquote(found["file"]), files, commit)
        if found.re is INFO:
            name, siblings = found["repo"].removeprefix("datasets/"), [{"rfilename": name} for name in files]
            return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings})
        if found.re is PATHS:
            return self._json([entry(name, files[name]) for name in sent.get("paths", []) if name in files])
        within = f"{unquote(found['folder'])}/" if found["folder"] else ""
        listed = {name: content for name, content in files.items() if name.startswith(within)}
        if within and not listed:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        return self._json([*folders(listed, within), *(entry(*file) for file in listed.items())])

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _file(self, name: str, files: Files, commit: str) -> None:
        if name not in files:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content = files[name]
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        begin, end = (int(asked[1]), int(asked[2] or len(content) - 1) + 1) if asked else (0, len(content))
        if asked:
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(content)) - 1}/{len(content)}"
        send = None
        if name == self.hub.breaks_at and self.command == "GET":
            send = 0 if name in self.hub.broken else len(content) // 2
            self.hub.broken.add(name)
        self._answer(206 if asked else 200, content[begin:end], headers, send=send)

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, send: int | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:send])
        self.close_connection = send is not None


@contextmanager
def serving() -> Iterator[HubServer]:
    """A hub at `address` until the block ends."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
