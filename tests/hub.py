"""A Hugging Face hub on this machine: the part of its HTTP interface that huggingface_hub uses for
model repositories of one user, with commits, large files by LFS, and downloads of any commit.

`Hub.environment` makes processes take it for the hub; `Hub.refuse` makes it answer 503, 403 or 401.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN, USER = "hf_of_the_tests_alone", "user"
Files = dict[str, bytes]  # by name


class Refused(Exception):
    def __init__(self, status: int, message: str, **told: str):
        super().__init__(message)
        self.status, self.told = status, {"error": message} | told


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """A process that was killed leaves its connections."""


class Hub:
    """commits: of each repository by name, oldest first. refuse: (method, address) -> the status to
    answer with, or 0."""

    def __init__(self):
        self.repositories: dict[str, list[tuple[str, Files]]] = {}
        self.private: dict[str, bool] = {}
        self.large: Files = {}  # by sha256
        self.messages: list[str] = []
        self.refuse: Callable[[str, str], int] = lambda method, address: 0
        self.lock = threading.RLock()
        self._numbers = itertools.count(1)
        handler = type("Handler", (Handler,), {"hub": self})
        self._server = Server(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that take this server for the hub."""
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, name: str) -> Files:
        """Of a repository's newest commit."""
        return self.repositories[name][-1][1]

    def put(self, name: str, files: Files) -> str:
        """A commit of these files alone."""
        with self.lock:
            commit = f"{next(self._numbers):040x}"
            self.repositories.setdefault(name, []).append((commit, files))
            return commit


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if status := self.hub.refuse(self.command, self.path):
                raise Refused(status, "refused by the test")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "/put/" not in self.path:
                raise Refused(401, "Invalid username or password.")
            with self.hub.lock:
                headers, data = self.answer(self.command, urllib.parse.unquote(self.path), body)
            status = 200
        except Refused as error:
            status, headers = error.status, {"X-Error-Message": str(error)}
            data = json.dumps(error.told).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def answer(self, method: str, address: str, body: bytes) -> tuple[dict, bytes]:
        path = urllib.parse.urlsplit(address).path
        as_json = lambda value: ({}, json.dumps(value).encode())
        if path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            if told["organization"] != USER:
                raise Refused(403, f"You have no rights in the namespace {told['organization']}")
            url = f"{self.hub.address}/{name}"
            if name in self.hub.repositories:
                raise Refused(409, "You already created this model repo", url=url)
            self.hub.put(name, {".gitattributes": b"*.bin filter=lfs\n"})
            self.hub.private[name] = told.get("private", told.get("visibility") == "private")
            return as_json({"url": url})
        if path == "/api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/put/(\w+)", path):
            if hashlib.sha256(body).hexdigest() != found[1]:
                raise Refused(400, "another sha256")
            self.hub.large[found[1]] = body
            return as_json({})
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            put = lambda oid: {"upload": {"href": f"{self.hub.address}/put/{oid}"}}
            return as_json({"transfer": "basic", "objects": [
                one if one["oid"] in self.hub.large else one | {"actions": put(one["oid"])}
                for one in wanted
            ]})
        if found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            commit, files = self.commit(found[1], found[2])
            if found[3] not in files:
                raise Refused(404, "Entry not found")
            data = files[found[3]]
            tag = hashlib.sha256(data).hexdigest()
            return {"X-Repo-Commit": commit, "ETag": f'"{tag}"'}, data
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/([\w-]+)(?:/(\w+))?)?", path)
        if not found:
            raise Refused(501, f"{method} {address}")
        name, verb, revision = found.groups()
        commit, files = self.commit(name, revision or "main")
        if verb in (None, "revision"):
            return as_json({"id": name, "sha": commit, "private": self.hub.private.get(name, False),
                            "siblings": [{"rfilename": file} for file in sorted(files)]})
        if verb == "tree":
            return as_json([{"type": "file", "path": file, "size": len(data), "oid": "0" * 40}
                            for file, data in sorted(files.items())])
        if verb == "preupload":
            mode = lambda one: "lfs" if one["size"] > 1000 else "regular"
            return as_json({"files": [
                {"path": one["path"], "uploadMode": mode(one), "shouldIgnore": False}
                for one in json.loads(body)["files"]
            ]})
        if verb == "super-squash":
            self.hub.repositories[name] = [(commit, files)]
            kept = {hashlib.sha256(data).hexdigest() for data in files.values()}
            self.hub.large = {oid: d for oid, d in self.hub.large.items() if oid in kept}
            return as_json({})
        return as_json(self._committed(name, commit, dict(files), body))

    def commit(self, name: str, revision: str) -> tuple[str, Files]:
        if name not in self.hub.repositories:
            raise Refused(404, "Repository not found")
        commits = self.hub.repositories[name]
        if revision == "main":
            return commits[-1]
        if revision not in dict(commits):
            raise Refused(404, "Revision not found")
        return revision, dict(commits)[revision]

    def _committed(self, name: str, parent: str, files: Files, body: bytes) -> dict:
        for line in body.splitlines():
            told = json.loads(line)
            kind, value = told["key"], told["value"]
            if kind == "header":
                if value.get("parentCommit", parent) != parent:
                    raise Refused(412, "A commit has happened since")
                self.hub.messages.append(value["summary"])
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.large:
                    raise Refused(400, f"no such object: {value['oid']}")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif kind == "deletedFolder":
                files = {k: d for k, d in files.items() if not k.startswith(value["path"])}
            else:
                raise Refused(501, kind)
        commit = self.hub.put(name, files)
        return {"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit}
