"""What the Hub on loopback is made of: repositories, faults, and answers over HTTP."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler


@dataclass(frozen=True)
class File:
    """A file in a commit: its git object id, its size, and its sha256 if it is in large file storage."""

    oid: str
    size: int
    sha256: str | None = None


@dataclass
class Repository:
    """Commits by id, branches by name."""

    private: bool
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], message: str, branch: str) -> str:
        content = json.dumps([len(self.commits), message, branch, sorted(files)])
        commit = hashlib.sha1(content.encode()).hexdigest()
        self.commits[commit], self.messages[commit], self.branches[branch] = dict(files), message, commit
        return commit

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Fault:
    """The next `times` requests that it fits are answered with `status`; `None` cuts them off."""

    method: str
    path: str
    status: int | None
    times: int = 1


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Connection(BaseHTTPRequestHandler):
    """Bodies in, answers out."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return parts

    def send(self, status: int, content: dict | list | bytes, headers: dict[str, str] | None = None) -> None:
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), **(headers or {})}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
