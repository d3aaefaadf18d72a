"""A Hugging Face Hub on loopback, as much of it as the real client needs to push, list and load models.

It can be told to fail: `server.fail("PUT", "/_lfs/", 503)` answers the next such request with 503, and a status of
`None` cuts the connection after half of the request's body.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

from .hub_parts import Connection, Fault, File, Refusal, Repository


TOKEN = "hf_loopback"
LFS = (".safetensors", ".bin", ".png")


class HubServer:
    """The server; use it in a `with`.

    Attributes:
        url: where it listens.
        repositories: by id.
        cards: id of a base model -> metadata of its card.
        log: method and path of every request.
    """

    def __init__(self, user: str = "tester"):
        self.user = user
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.cards: dict[str, dict] = {}
        self.log: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fail(self, method: str, path: str, status: int | None, times: int = 1) -> None:
        """Let the next `times` requests fail whose path matches the pattern `path`."""
        self.faults.append(Fault(method, path, status, times))

    def content(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        """What lies in a repository."""
        found = self.repositories[repository]
        files = found.commits[found.resolve(revision)]
        return {name: self.blobs[file.sha256 or file.oid] for name, file in files.items()}

    def fault(self, method: str, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and fault.method == method and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def repository(self, name: str, revision: str | None = None) -> tuple[Repository, str]:
        """A repository and the commit of a revision."""
        if name not in self.repositories:
            raise Refusal(404, "RepoNotFound", "Repository not found")
        found = self.repositories[name]
        commit = found.resolve(revision or "main")
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found, commit


class Handler(Connection):
    """One connection. Routes are methods that `ROUTES` names."""

    hub: HubServer

    def answer(self) -> None:
        address = urlparse(self.path)
        path = unquote(address.path)
        self.query = parse_qs(address.query)
        with self.hub.lock:
            self.hub.log.append((self.command, path))
            fault = self.hub.fault(self.command, path)
        if fault and fault.status is None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.body()
        try:
            if fault:
                raise Refusal(fault.status, "Injected", "made to fail")
            with self.hub.lock:
                self.route(path, body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            self.send(refusal.status, {"error": refusal.message}, headers)

    do_GET = do_POST = do_PUT = do_HEAD = answer

    def route(self, path: str, body: bytes) -> None:
        for method, pattern, name in ROUTES:
            if (found := re.fullmatch(pattern, path)) and self.command in method:
                if self.command in ("POST", "PUT") and "/_lfs" not in path and path != "/api/validate-yaml":
                    self.check_token()
                return getattr(self, name)(*found.groups(), body)
        raise Refusal(404, "NoRoute", f"no route for {self.command} {path}")

    def check_token(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise Refusal(401, "Unauthorized", "Invalid username or password.")

    def validate(self, body: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self.send(409, {"error": "You already created this model repo", **answer})
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self.hub.repositories[name].commit({}, "initial commit", "main")
        self.send(200, answer)

    def branch(self, name: str, branch: str, body: bytes) -> None:
        repository, commit = self.hub.repository(name)
        if branch in repository.branches:
            raise Refusal(409, "Conflict", "Reference already exists")
        repository.branches[branch] = commit
        self.send(200, {})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        repository, commit = self.hub.repository(name, revision)
        answers = []
        for file in json.loads(body)["files"]:
            large, there = file["path"].endswith(LFS), repository.commits[commit].get(file["path"])
            oid = there and (there.sha256 or there.oid)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers, "commitOid": commit})

    def batch(self, name: str, body: bytes) -> None:
        answers = []
        for asked in json.loads(body)["objects"]:
            answers.append({"oid": asked["oid"], "size": asked["size"]})
            if asked["oid"] not in self.hub.blobs:
                upload, verify = (f"{self.hub.url}/_lfs/{asked['oid']}{end}" for end in ("", "/verify"))
                answers[-1]["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        self.send(200, {"transfer": "basic", "objects": answers})

    def store(self, sha256: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refusal(422, "Mismatch", "The content has another sha256.")
        self.hub.blobs[sha256] = body
        self.send(200, b"")

    def verify(self, sha256: str, body: bytes) -> None:
        self.send(200 if sha256 in self.hub.blobs else 404, {})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        repository, commit = self.hub.repository(name, revision)
        files, message = dict(repository.commits[commit]), ""
        for line in body.splitlines():
            step = json.loads(line)
            kind, value = step["key"], step["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                content = base64.b64decode(value["content"])
                oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                self.hub.blobs[oid] = content
                files[value["path"]] = File(oid, len(content))
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refusal(400, "BadRequest", f"The object {value['oid']} was not uploaded.")
                files[value["path"]] = File(value["oid"][:40], value["size"], value["oid"])
            elif kind == "deletedFile":
                del files[value["path"]]
        asked = self.query.get("create_pr") == ["1"]
        branch = f"refs/pr/{len(repository.commits)}" if asked else revision
        made = repository.commit(files, message, branch)
        answer = {"success": True, "commitOid": made, "commitUrl": f"{self.hub.url}/{name}/commit/{made}"}
        if asked:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        self.send(200, answer)

    def info(self, name: str, revision: str | None, body: bytes) -> None:
        if name in self.hub.cards:
            return self.send(200, {"id": name, "siblings": [], "cardData": self.hub.cards[name]})
        repository, commit = self.hub.repository(name, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[commit])]
        self.send(200, {"id": name, "sha": commit, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str, folder: str | None, body: bytes) -> None:
        repository, commit = self.hub.repository(name, revision)
        entries = []
        for path, file in sorted(repository.commits[commit].items()):
            entries.append({"type": "file", "oid": file.oid, "size": file.size, "path": path})
            if file.sha256:
                entries[-1]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
        wanted = [entry for entry in entries if entry["path"].startswith(f"{folder}/" if folder else "")]
        if folder and not wanted:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist")
        self.send(200, wanted)

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        repository, commit = self.hub.repository(name, revision)
        file = repository.commits[commit].get(path)
        if file is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": commit}
            return self.send(404, {"error": "Entry not found"}, headers)
        content = self.hub.blobs[file.sha256 or file.oid]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.sha256 or file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked or self.command == "HEAD":
            return self.send(200, content, headers)
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self.send(206, content[first : last + 1], headers)


NAME = r"([^/]+/[^/]+)"
REVISION = r"(refs/pr/\d+|[^/]+)"
ROUTES = (
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", "branch"),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", "preupload"),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/_lfs/([0-9a-f]{64})", "store"),
    ("POST", r"/_lfs/([0-9a-f]{64})/verify", "verify"),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", "commit"),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(.+))?", "tree"),
    ("GET", rf"/api/models/{NAME}(?:/revision/(.+))?", "info"),
    ("GET HEAD", rf"/{NAME}/resolve/{REVISION}/(.+)", "resolve"),
)
