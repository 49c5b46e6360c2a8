"""A small Hub on the loopback interface, for the real client: repositories, LFS, tokens, faults.

Everything lives in memory. `Hub` holds the state and is what tests look at; `_Handler` speaks HTTP.
Answers and error codes follow what the huggingface_hub client sends and reads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

MULTIPART_FROM = 24_000  # bytes; LFS files from this size on are uploaded in parts
CHUNK = 10_000
DATE = "2025-01-01T00:00:00Z"
LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".png")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Entry:
    """One version of one file."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid


@dataclass
class Repository:
    """Commits by id, and branches and tags that name them."""

    owner: str
    private: bool = False
    kind: str = "model"  # or "space"
    sdk: str | None = None  # of a Space
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)  # (commit, title), oldest first
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)
    pull_requests: list[tuple[str, str]] = field(default_factory=list)  # (author, title)

    def resolve(self, revision: str) -> str | None:
        """A commit's id from a branch, a tag or an id."""
        known = revision if revision in self.commits else None
        return self.branches.get(revision) or self.tags.get(revision) or known

    def commit(self, branch: str, title: str, files: dict[str, Entry]) -> str:
        text = json.dumps([len(self.log), title, {k: v.oid for k, v in sorted(files.items())}])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.parents[sha] = self.branches.get(branch)
        self.branches[branch] = sha
        self.log.append((sha, title))
        return sha


@dataclass
class Fault:
    """What goes wrong at requests whose `METHOD path` contains `where`, the first `times` times."""

    where: str
    times: int
    kind: str  # "drop" closes the connection, "corrupt" serves a wrong byte


class Refused(Exception):
    """An HTTP error with the headers by which the client tells errors apart."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class Hub:
    """The server's state. Users are in the organisation "org"; a token either writes or reads."""

    def __init__(self) -> None:
        self.tokens = {
            "writer": ("alice", {"org", "alice"}, True),
            "reader": ("bob", {"org", "bob"}, False),
            "stranger": ("carol", {"carol"}, True),
        }
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, where: str, kind: str, times: int = 1) -> None:
        """Plans a fault."""
        self.faults.append(Fault(where, times, kind))

    def fault(self, request: str, kind: str) -> bool:
        """True if a planned fault hits this request; it is used up by that."""
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.kind == kind and fault.where in request:
                    fault.times -= 1
                    return True
        return False

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Name → content at a revision."""
        repository = self.repositories[repo]
        commit = repository.commits[repository.resolve(revision)]
        return {name: entry.content for name, entry in commit.items()}

    def titles(self, repo: str) -> list[str]:
        """Titles of all commits, oldest first."""
        return [title for _, title in self.repositories[repo].log]

    def seen(self, pattern: str) -> int:
        """How many requests `METHOD path` matched a pattern."""
        return sum(re.search(pattern, request) is not None for request in self.requests)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Quiet."""

    def _answer_request(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        if self.hub.fault(request, "drop"):
            self.rfile.read1(100)
            self.close_connection = True
            self.connection.close()
            return
        self.body = self._read_body()
        try:
            with self.hub.lock:
                self._dispatch(request)
        except Refused as error:
            self._refuse(error)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer_request

    def _dispatch(self, request: str) -> None:
        # Spaces have the same routes under another name.
        path = re.sub(r" /(api/)?spaces/(?!create)", r" /\1models/", request, count=1)
        self.kind = "model" if path == request else "space"
        request = path if "/api/" in path else path.replace(" /models/", " /", 1)
        for pattern, action in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                action(self, **{key: unquote(value) for key, value in match.groupdict().items()})
                return
        raise Refused(404, f"no route for {request}")

    # ---- HTTP ----------------------------------------------------------------------------

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _refuse(self, error: Refused) -> None:
        headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
        body = json.dumps({"error": str(error)}).encode()
        self._send(error.status, body, **{k: v for k, v in headers.items() if v})

    # ---- who may do what -----------------------------------------------------------------

    def _user(self) -> tuple[str, set[str], bool] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repository(self, repo: str, write: bool = False) -> Repository:
        user, found = self._user(), self.hub.repositories.get(repo)
        member = user is not None and repo.split("/")[0] in user[1]
        other = found is not None and found.kind != self.kind
        if found is None or other or (found.private and not member):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write:
            self._may_write(repo.split("/")[0])
        return found

    def _may_write(self, owner: str) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Log in to write")
        if owner not in user[1] or not user[2]:
            raise Refused(403, f"You don't have the rights to write in the namespace {owner}")

    def _commit(self, repo: str, revision: str) -> tuple[str, dict[str, Entry]]:
        repository = self._repository(repo)
        sha = repository.resolve(revision)
        if sha is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repository.commits[sha]

    # ---- repositories --------------------------------------------------------------------

    def who_am_i(self) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Log in first")
        organisations = [{"name": name} for name in user[1] - {user[0]}]
        self._json({"type": "user", "name": user[0], "orgs": organisations})

    def create(self) -> None:
        wish, user = json.loads(self.body), self._user()
        owner = wish.get("organization") or (user[0] if user else "")
        self._may_write(owner)
        repo = f"{owner}/{wish['name']}"
        known = repo in self.hub.repositories
        if not known:
            private = wish.get("visibility") == "private" or wish.get("private")
            kind = wish.get("type") or "model"
            if kind == "space" and not wish.get("sdk"):
                raise Refused(400, "A Space needs an SDK")
            fresh = Repository(owner, private, kind, wish.get("sdk"))
            fresh.commit("main", "initial commit", {})
            self.hub.repositories[repo] = fresh
        place = "spaces/" if self.hub.repositories[repo].kind == "space" else ""
        url = f"{self.hub.endpoint}/{place}{repo}"
        self._json({"url": url, "name": repo}, 409 if known else 200)

    def info(self, repo: str, revision: str = "main") -> None:
        sha, files = self._commit(repo, revision)
        siblings = [{"rfilename": name} for name in files]
        private = self.hub.repositories[repo].private
        self._json({"id": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []})

    def tree(self, repo: str, revision: str) -> None:
        _, files = self._commit(repo, revision)
        deep = "recursive=true" in urlsplit(self.path).query.lower()
        folders = {name.rsplit("/", 1)[0] for name in files if "/" in name}
        rows = [{"type": "directory", "path": name, "oid": "0" * 40} for name in sorted(folders)]
        self._json(rows + [_row(n, e) for n, e in files.items() if deep or "/" not in n])

    def commits(self, repo: str, revision: str) -> None:
        sha, _ = self._commit(repo, revision)
        repository, rows = self.hub.repositories[repo], []
        titles, more = dict(repository.log), {"message": "", "authors": [], "date": DATE}
        while sha:
            rows.append({"id": sha, "title": titles[sha], **more})
            sha = repository.parents[sha]
        self._json(rows)

    def discussions(self, repo: str) -> None:
        rows = [
            {
                "num": number,
                "title": title,
                "author": {"name": author},
                "createdAt": DATE,
                "status": "open",
                "isPullRequest": True,
                "repo": {"name": repo, "type": "model"},
            }
            for number, (author, title) in enumerate(self._repository(repo).pull_requests, 1)
        ]
        self._json({"count": len(rows), "start": 0, "discussions": rows})

    def refs(self, repo: str) -> None:
        repository = self._repository(repo)
        named = {"branches": repository.branches, "tags": repository.tags}
        kinds = {"branches": "heads", "tags": "tags"}
        rows = {
            kind: [
                {"name": name, "ref": f"refs/{kinds[kind]}/{name}", "targetCommit": sha}
                for name, sha in shas.items()
            ]
            for kind, shas in named.items()
        }
        self._json({**rows, "converts": []})

    def add_tag(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        tag = json.loads(self.body)["tag"]
        if tag in repository.tags:
            raise Refused(409, "Tag exists")
        repository.tags[tag] = self._commit(repo, revision)[0]
        self._json({})

    def add_branch(self, repo: str, branch: str) -> None:
        repository = self._repository(repo, write=True)
        if branch in repository.branches:
            raise Refused(409, "Branch exists")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        repository.branches[branch] = self._commit(repo, start)[0]
        self._json({})

    # ---- upload --------------------------------------------------------------------------

    def validate_yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        self._repository(repo, write=True)
        _, files = self._commit(repo, revision)
        rows = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": files[file["path"]].etag if file["path"] in files else None,
            }
            for file in json.loads(self.body)["files"]
        ]
        self._json({"files": rows})

    def lfs_batch(self, repo: str) -> None:
        self._repository(repo, write=True)
        wanted = json.loads(self.body)["objects"]
        self._json({"transfer": "basic", "objects": [self._upload_plan(repo, w) for w in wanted]})

    def _upload_plan(self, repo: str, wanted: dict[str, Any]) -> dict[str, Any]:
        oid, size = wanted["oid"], wanted["size"]
        if oid in self.hub.blobs:
            return {"oid": oid, "size": size}
        base = f"{self.hub.endpoint}/lfs/{repo}/{oid}"
        upload: dict[str, Any] = {"href": base}
        if size >= MULTIPART_FROM:
            numbers = range(1, -(-size // CHUNK) + 1)
            header = {str(number): f"{base}/part/{number}" for number in numbers}
            upload = {"href": f"{base}/complete", "header": {**header, "chunk_size": str(CHUNK)}}
        actions = {"upload": upload, "verify": {"href": f"{base}/verify"}}
        return {"oid": oid, "size": size, "actions": actions}

    def put_blob(self, repo: str, oid: str) -> None:
        self._keep(oid, self.body)
        self._send(200, b"")

    def put_part(self, repo: str, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self.body
        self._send(200, b"", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')

    def complete(self, repo: str, oid: str) -> None:
        parts = self.hub.parts.pop(oid)
        self._keep(
            oid, b"".join(parts[row["partNumber"]] for row in json.loads(self.body)["parts"])
        )
        self._json({})

    def _keep(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refused(400, "The content's SHA-256 is not the announced one")
        self.hub.blobs[oid] = content

    def verify(self, repo: str, oid: str) -> None:
        wanted = json.loads(self.body)
        if len(self.hub.blobs.get(oid, b"")) != wanted["size"]:
            raise Refused(400, "The object is not there as announced")
        self._json({})

    def add_commit(self, repo: str, revision: str) -> None:
        repository = self._repository(repo, write=True)
        _, files = self._commit(repo, revision)
        files, title = dict(files), ""
        for line in self.body.splitlines():
            row = json.loads(line)
            value = row["value"]
            if row["key"] == "header":
                title = value["summary"]
            else:
                self._apply(files, row["key"], value)
        sha = repository.commit(revision, title, files)
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url})

    def _apply(self, files: dict[str, Entry], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Entry(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise Refused(400, f"LFS object of {path} was never uploaded")
            files[path] = Entry(self.hub.blobs[value["oid"]], lfs=True)
        elif key == "deletedFile":
            files.pop(path)
        else:
            for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                files.pop(name)

    # ---- download ------------------------------------------------------------------------

    def serve(self, repo: str, revision: str, file: str) -> None:
        sha, files = self._commit(repo, revision)
        if file not in files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            self._send(404, b"Entry not found", **headers)
            return
        entry = files[file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{entry.etag}"', "Accept-Ranges": "bytes"}
        if entry.lfs:
            headers |= {
                "X-Linked-Etag": f'"{entry.sha256}"',
                "X-Linked-Size": str(len(entry.content)),
            }
        content = entry.content
        if self.command == "GET" and self.hub.fault(f"GET {self.path}", "corrupt"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        self._send_range(content, headers)

    def _send_range(self, content: bytes, headers: dict[str, str]) -> None:
        wish = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wish is None:
            self._send(200, content, **headers)
            return
        start, end = int(wish[1]), int(wish[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(206, content[start : end + 1], **headers)


def _row(name: str, entry: Entry) -> dict[str, Any]:
    row = {"type": "file", "path": name, "size": len(entry.content), "oid": entry.oid}
    lfs = {"oid": entry.sha256, "size": len(entry.content), "pointerSize": 134}
    return {**row, "lfs": lfs} if entry.lfs else row


ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"GET /api/whoami-v2", _Handler.who_am_i),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"GET /api/models/{REPO}", _Handler.info),
    (rf"GET /api/models/{REPO}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    (rf"GET /api/models/{REPO}/commits/(?P<revision>[^/]+)", _Handler.commits),
    (rf"GET /api/models/{REPO}/discussions", _Handler.discussions),
    (rf"GET /api/models/{REPO}/refs", _Handler.refs),
    (rf"POST /api/models/{REPO}/tag/(?P<revision>[^/]+)", _Handler.add_tag),
    (rf"POST /api/models/{REPO}/branch/(?P<branch>[^/]+)", _Handler.add_branch),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>[^/]+)", _Handler.add_commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (rf"PUT /lfs/{REPO}/(?P<oid>\w+)", _Handler.put_blob),
    (rf"PUT /lfs/{REPO}/(?P<oid>\w+)/part/(?P<number>\d+)", _Handler.put_part),
    (rf"POST /lfs/{REPO}/(?P<oid>\w+)/complete", _Handler.complete),
    (rf"POST /lfs/{REPO}/(?P<oid>\w+)/verify", _Handler.verify),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.serve),
]
