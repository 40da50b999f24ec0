"""A Hugging Face Hub on this machine, for tests of code that uses the real huggingface_hub client (HF_ENDPOINT=url).

Speaks what `model_info`, `dataset_info`, `list_repo_tree`, `hf_hub_download` and `snapshot_download` ask for over plain
HTTP: repo info, file tree, HEAD and GET of files with ranges, and the errors' codes; with a folder for `uploads`, also
`create_repo` and `create_commit` of small files. A repo is a folder with one revision, main. Leaves out Xet, LFS,
redirects to a CDN and pages of long trees.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test"  # opens gated and private repos
ROUTE = re.compile(  # /api/models/NAME, /api/datasets/NAME/revision/REV, …/tree/REV/FOLDER, /NAME/resolve/REV/FILE
    r"/(?:api/(?:models/)?)?(?P<repo>(?:datasets/)?[^/]+(?:/[^/]+)?)"
    r"(?:/(?P<verb>revision|tree|resolve)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)


class File(NamedTuple):
    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class HubRequest:
    method: str
    path: str
    token: str | None
    first_byte: int  # > 0 if the client asked to resume there
    status: int


class Hub(ThreadingHTTPServer):
    """Serves {"owner/name": folder, "datasets/owner/name": folder} while its `with` lasts.

    Files of `gated` repos and all of `private` ones need TOKEN. `cut` maps names of files to a number of bytes after
    which the connection closes, once; `stall` to one after which it sends nothing more. Repos that clients with TOKEN
    create lie in `uploads`.
    """

    def __init__(
        self,
        repos: Mapping[str, Path],
        gated: Collection[str] = (),
        private: Collection[str] = (),
        cut: Mapping[str, int] | None = None,
        stall: Mapping[str, int] | None = None,
        uploads: Path | None = None,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {name: list_files(Path(folder)) for name, folder in repos.items()}
        self.gated, self.private = gated, private
        self.cut, self.stall = dict(cut or {}), dict(stall or {})
        self.uploads = uploads
        self.requests: list[HubRequest] = []
        self.closing = threading.Event()

    def __enter__(self) -> "Hub":
        threading.Thread(target=partial(self.serve_forever, poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def fetched(self) -> list[str]:
        """The names of the files whose bytes were asked for, in order."""
        matches = (ROUTE.fullmatch(request.path) for request in self.requests if request.method == "GET")
        return [match["path"] for match in matches if match and match["verb"] == "resolve"]


@contextmanager
def serve(repos: Mapping[str, Path]) -> Iterator[str]:
    """Serves the folders and gives the URL to set as HF_ENDPOINT."""
    with Hub(repos) as hub:
        yield hub.url


def list_files(folder: Path) -> dict[str, File]:
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    shas = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {name: File(path, path.stat().st_size, sha) for name, path, sha in zip(names, paths, shas, strict=True)}


def commit_of(files: dict[str, File]) -> str:
    return hashlib.sha1(repr([(name, file.sha256) for name, file in files.items()]).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        match = ROUTE.fullmatch(unquote(url.path))
        repo, verb, revision, path = match.groups() if match else (None, None, None, None)
        files = self.server.repos.get(repo)
        if files is None or (repo in self.server.private and self.token != TOKEN):
            return self.fail(404 if self.token else 401, "RepoNotFound")
        commit = commit_of(files)
        if revision not in (None, "main", commit):
            return self.fail(404, "RevisionNotFound")
        if verb == "resolve":
            if repo in self.server.gated and self.token != TOKEN:
                return self.fail(403 if self.token else 401, "GatedRepo")
            if path not in files:
                return self.fail(404, "EntryNotFound")
            return self.send_file(path, files[path], commit)
        if verb == "tree":
            inside = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
            tree = [{"type": "file", "path": n, "size": f.size, "oid": f.sha256[:40]} for n, f in inside.items()]
            return self.send(200, json.dumps(tree).encode())
        with_sizes = "blobs=" in url.query
        siblings = [{"rfilename": n, **({"size": f.size} if with_sizes else {})} for n, f in files.items()]
        info = {"id": repo.removeprefix("datasets/"), "sha": commit, "private": False, "siblings": siblings}
        self.send(200, json.dumps(info | {"tags": [], "downloads": 0, "likes": 0}).encode())

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.read_body()
        if self.server.uploads is None or self.token != TOKEN:
            return self.fail(403 if self.token else 401, "")
        if self.path == "/api/validate-yaml":
            return self.send(200, b'{"errors": [], "warnings": []}')
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            created = self.server.repos.setdefault(repo, {}) == {}
            return self.send(200 if created else 409, json.dumps({"url": f"{self.server.url}/{repo}"}).encode())
        match = re.fullmatch(r"/api/models/(?P<repo>.+)/(?P<verb>preupload|commit)/main", unquote(self.path))
        if match is None or match["repo"] not in self.server.repos:
            return self.fail(404, "RepoNotFound")
        if match["verb"] == "preupload":
            files = [f | {"uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            return self.send(200, json.dumps({"files": files}).encode())
        for operation in map(json.loads, body.splitlines()):
            if operation["key"] == "file":
                path = self.server.uploads / match["repo"] / operation["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(operation["value"]["content"]))
        self.server.repos[match["repo"]] = list_files(self.server.uploads / match["repo"])
        oid = commit_of(self.server.repos[match["repo"]])
        url = f"{self.server.url}/{match['repo']}/commit/{oid}"
        self.send(200, json.dumps({"success": True, "commitUrl": url, "commitOid": oid}).encode())

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    @property
    def token(self) -> str | None:
        return (self.headers["Authorization"] or "").removeprefix("Bearer ") or None

    @property
    def range(self) -> tuple[int, int] | None:  # first byte, and one past the last
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        return (int(match[1]), int(match[2] or sys.maxsize - 1) + 1) if match else None

    def send_file(self, name: str, file: File, commit: str) -> None:
        headers = {"ETag": f'"{file.sha256}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.range is None:
            return self.send(200, file.path.read_bytes(), headers, name)
        start, end = self.range[0], min(self.range[1], file.size)
        if start >= end:
            return self.send(416, b"", headers | {"Content-Range": f"bytes */{file.size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{file.size}"
        self.send(206, file.path.read_bytes()[start:end], headers, name)

    def fail(self, status: int, code: str) -> None:
        self.send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, name: str = "") -> None:
        path, first_byte = unquote(urlsplit(self.path).path), (self.range or (0,))[0]
        self.server.requests.append(HubRequest(self.command, path, self.token, first_byte, status))
        self.send_response(status)
        for key, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if (count := self.server.cut.pop(name, None)) is not None:
            self.wfile.write(body[:count])
            self.close_connection = True
        elif (count := self.server.stall.get(name)) is not None:
            self.wfile.write(body[:count])
            self.server.closing.wait()
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass
