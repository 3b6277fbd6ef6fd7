"""A stand-in for the Hugging Face Hub's HTTP API: enough for huggingface_hub and datasets to download from folders."""

from __future__ import annotations

import hashlib
import http.server
import json
import socket
import threading
import urllib.parse
from collections import Counter
from pathlib import Path

COMMIT = "a" * 40


class StandInHub:
    """Serves ROOT/models/OWNER/NAME and ROOT/datasets/OWNER/NAME at `url`; a context manager.

    A repository with a file named `.gated` or `.private` is answered as such. `downloads` counts what was fetched, by
    the path of the file. After `break_off_after` bytes, if set, a download loses its connection.
    """

    def __init__(self, root: Path):
        self.root, self.downloads, self.break_off_after = root, Counter(), None
        handler = type("Handler", (Answers,), {"hub": self})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> StandInHub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class Answers(http.server.BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, code: int, body: object = b"", kind: str = "application/json", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.break_off_after is not None and kind == "application/octet-stream":
            self.wfile.write(content[: self.hub.break_off_after])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self.wfile.write(content)

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        url = urllib.parse.urlparse(self.path)
        parts = urllib.parse.unquote(url.path).strip("/").split("/")
        if parts[0] == "api" and len(parts) >= 4:
            self.describe(self.hub.root / parts[1] / parts[2] / parts[3], parts[4:], url.query, body)
        elif "resolve" in parts:
            at = parts.index("resolve")
            kind = parts[0] if parts[0] == "datasets" else "models"
            self.send_file(self.hub.root / kind / parts[at - 2] / parts[at - 1], "/".join(parts[at + 2 :]))
        else:
            self.answer(404, {"error": "not here"})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def refused(self, repository: Path) -> bool:
        """Answers for a repository that is missing, private or gated; returns whether it is one."""
        if not repository.is_dir() or (repository / ".private").exists():
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif (repository / ".gated").exists():
            self.answer(403, {"error": "gated"}, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        else:
            return False
        return True

    def describe(self, repository: Path, rest: list[str], query: str, body: bytes) -> None:
        """Answers the API's questions of a repository: what it is, its tree, what some paths are."""
        if (repository / ".gated").exists() and rest[:1] != ["tree"]:
            return self.answer(200, self.description(repository))
        if self.refused(repository):
            return None
        files = [path for path in sorted(repository.rglob("*")) if path.is_file()]
        entries = {str(path.relative_to(repository)): self.entry(path, repository) for path in files}
        if rest[:1] == ["tree"]:
            under = "/".join(rest[2:])
            inside = {name: entry for name, entry in entries.items() if not under or name.startswith(under + "/")}
            if under and not inside:
                return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            if "recursive=true" in query.lower():
                return self.answer(200, list(inside.values()))
            depth = len(under.split("/")) if under else 0
            top = {}
            for name, entry in inside.items():
                place = "/".join(name.split("/")[: depth + 1])
                top[place] = entry if place == name else dict(type="directory", path=place, oid="d" * 40, size=0)
            return self.answer(200, list(top.values()))
        if rest[:1] == ["paths-info"]:
            as_json = body.startswith(b"{")
            wanted = json.loads(body)["paths"] if as_json else urllib.parse.parse_qs(body.decode()).get("paths", [])
            found = [entries[name] for name in wanted if name in entries]
            folders = [name for name in wanted if any(each.startswith(name.rstrip("/") + "/") for each in entries)]
            return self.answer(200, found + [dict(type="directory", path=f, oid="d" * 40, size=0) for f in folders])
        return self.answer(200, self.description(repository))

    def description(self, repository: Path) -> dict[str, object]:
        name = f"{repository.parent.name}/{repository.name}"
        files = [path for path in sorted(repository.rglob("*")) if path.is_file() and not path.name.startswith(".")]
        return dict(
            id=name, modelId=name, sha=COMMIT, private=False, gated=False, disabled=False, tags=[], downloads=0,
            likes=0, lastModified="2026-01-01T00:00:00.000Z", createdAt="2026-01-01T00:00:00.000Z", cardData={},
            siblings=[dict(rfilename=str(path.relative_to(repository)), size=path.stat().st_size) for path in files],
        )  # fmt: skip

    def entry(self, path: Path, repository: Path) -> dict[str, object]:
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        return dict(type="file", path=str(path.relative_to(repository)), size=path.stat().st_size, oid=digest)

    def send_file(self, repository: Path, name: str) -> None:
        if self.refused(repository):
            return None
        path = repository / name
        if not path.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        content = path.read_bytes()
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        headers = dict(ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        if self.command == "GET":
            self.hub.downloads[f"{repository.name}/{name}"] += 1
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), int(last) if last else len(content) - 1
            headers["Content_Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.answer(206, content[start : end + 1], "application/octet-stream", **headers)
        return self.answer(200, content, "application/octet-stream", **headers)
