"""A bucket on this machine: the part of Cloud Storage's JSON interface that gcsfs, tensorstore and
google-cloud-storage use, over HTTP, with conditions on generations and resumable uploads.

No package offers one with both. `Bucket.environment` makes processes take it for Cloud Storage;
`Bucket.refuse` makes it answer 503, 403 or 401. `python -m tests.bucket COMMAND` runs a command
that sees it as gs://bucket.
"""

import base64
import dataclasses
import email
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c

NAME = "bucket"


class Refused(Exception):
    def __init__(self, status: int, message: str = ""):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass
class Blob:
    data: bytes
    generation: int
    updated: float


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_) -> None:
        """A process that was killed leaves its connections."""


class Bucket:
    """refuse: (method, address) -> the status to answer with, or 0."""

    def __init__(self):
        self.blobs: dict[str, Blob] = {}
        self.refuse: Callable[[str, str], int] = lambda method, address: 0
        self.refused = 0
        self.uploads: dict[str, tuple[str, dict, bytearray]] = {}
        self.lock = threading.RLock()
        self._numbers = itertools.count(time.time_ns())
        handler = type("Handler", (Handler,), {"bucket": self})
        self._server = Server(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Of processes that take this server for Cloud Storage."""
        address = f"http://127.0.0.1:{self._server.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address,
            # gcsfs asks for the kind of a bucket by gRPC, which is not here.
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody", "NO_PROXY": "127.0.0.1",
        }

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def names(self, folder: str = "") -> list[str]:
        return sorted(name for name in self.blobs if name.startswith(folder))

    def put(self, name: str, data: bytes, query: dict[str, str]) -> dict:
        with self.lock:
            self.check(name, query)
            self.blobs[name] = Blob(bytes(data), next(self._numbers), time.time())
            return self.told(name)

    def get(self, name: str, query: dict[str, str]) -> Blob:
        with self.lock:
            if name not in self.blobs:
                raise Refused(404, f"No such object: {NAME}/{name}")
            self.check(name, query)
            return self.blobs[name]

    def remove(self, name: str, query: dict[str, str]) -> None:
        with self.lock:
            self.get(name, query)
            del self.blobs[name]

    def check(self, name: str, query: dict[str, str]) -> None:
        generation = str(self.blobs[name].generation) if name in self.blobs else "0"
        if query.get("ifGenerationMatch", generation) != generation:
            raise Refused(412, "conditionNotMet")
        if query.get("ifGenerationNotMatch") == generation:
            raise Refused(304)

    def told(self, name: str) -> dict:
        blob = self.blobs[name]
        crc = base64.b64encode(google_crc32c.value(blob.data).to_bytes(4, "big"))
        md5 = base64.b64encode(hashlib.md5(blob.data).digest())
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(blob.updated))
        when += f".{int(blob.updated % 1 * 1000):03d}Z"
        return {
            "kind": "storage#object", "name": name, "bucket": NAME, "id": name,
            "size": str(len(blob.data)), "generation": str(blob.generation), "metageneration": "1",
            "timeCreated": when, "updated": when, "md5Hash": md5.decode(), "crc32c": crc.decode(),
            "contentType": "application/octet-stream", "storageClass": "STANDARD", "etag": "x",
        }

    def listed(self, query: dict[str, str]) -> dict:
        """Objects, and the folders below a prefix, from a page token on."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        limit, token = int(query.get("maxResults", 1000)), query.get("pageToken", "")
        items, folders, last = [], {}, ""
        with self.lock:
            for name in self.names(prefix):
                if name < start or (end and name >= end) or name <= token:
                    continue
                if len(items) + len(folders) >= limit:
                    return self._page(items, folders) | {"nextPageToken": last}
                head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
                if delimiter and found:
                    folders[prefix + head + delimiter] = None
                    last = prefix + head + delimiter + "\U0010ffff"
                else:
                    items.append(self.told(name))
                    last = name
        return self._page(items, folders)

    def _page(self, items: list, folders: dict) -> dict:
        return {"kind": "storage#objects", "items": items, "prefixes": list(folders)}


class Handler(BaseHTTPRequestHandler):
    bucket: Bucket
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        try:
            status = self.bucket.refuse(self.command, self.path)
            if status:
                self.bucket.refused += 1
                raise Refused(status, "refused by the test")
            status, headers, data = self.answer(self.command, self.path, body)
        except Refused as error:
            told = {"error": {"code": error.status, "message": str(error)}}
            status, headers = error.status, {}
            data = b"" if status == 304 else json.dumps(told).encode()  # which has no body
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def answer(self, method: str, address: str, body: bytes) -> tuple[int, dict, bytes]:
        where = urllib.parse.urlsplit(address)
        query = dict(urllib.parse.parse_qsl(where.query))
        if where.path.startswith("/batch/"):
            return self._batch(body)
        found = re.fullmatch(
            r"(/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+)(?:/(\w+)/(.*))?)?)?",
            where.path,
        )
        if not found:
            raise Refused(501, f"{method} {address}")
        kind, bucket, name, verb, rest = found.groups()
        if bucket != NAME:
            raise Refused(404, "The specified bucket does not exist.")
        name = urllib.parse.unquote(name or "")
        as_json = lambda value: (200, {}, json.dumps(value).encode())
        if kind == "/upload":
            return self._upload(method, query, body)
        if not name:
            if where.path.endswith("/o"):
                return as_json(self.bucket.listed(query))
            return as_json({"kind": "storage#bucket", "name": NAME, "location": "HERE"})
        if verb:
            target = urllib.parse.unquote(rest.rpartition("o/")[2])
            told = self.bucket.put(target, self.bucket.get(name, {}).data, {})
            if verb == "moveTo":
                self.bucket.remove(name, {})
                return as_json(told)
            return as_json({"done": True, "resource": told})
        if method == "DELETE":
            self.bucket.remove(name, query)
            return 204, {}, b""
        blob = self.bucket.get(name, query)
        if query.get("alt") != "media":
            return as_json(self.bucket.told(name))
        return self._media(blob)

    def _media(self, blob: Blob) -> tuple[int, dict, bytes]:
        headers = {
            "Content-Type": "application/octet-stream", "x-goog-generation": str(blob.generation),
            "x-goog-stored-content-length": str(len(blob.data)),
        }
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return 200, headers, blob.data
        size = len(blob.data)
        first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
        last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
        if first >= size:
            raise Refused(416, "range")
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return 206, headers, blob.data[first : last + 1]

    def _upload(self, method: str, query: dict[str, str], body: bytes) -> tuple[int, dict, bytes]:
        as_json = lambda value: (200, {}, json.dumps(value).encode())
        if "upload_id" in query:
            return self._more(query["upload_id"], method, body)
        if query.get("uploadType") == "media":
            return as_json(self.bucket.put(query["name"], body, query))
        if query.get("uploadType") == "resumable":
            told, session = json.loads(body or b"{}"), hashlib.sha1(body).hexdigest()
            session += str(time.time_ns())
            with self.bucket.lock:
                name = query.get("name") or told["name"]
                self.bucket.uploads[session] = name, query, bytearray()
            place = f"http://{self.headers['Host']}/upload/storage/v1/b/{NAME}/o?upload_id={session}"
            return 200, {"Location": place}, b""
        kind = self.headers["Content-Type"].replace("'", '"')
        edge = b"--" + email.message_from_string(f"Content-Type: {kind}\n").get_boundary().encode()
        # The parts begin after an edge, and end before a line break and the next.
        first = body.index(edge) + len(edge)
        second = body.index(edge, first)
        split = lambda part: re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
        told = json.loads(split(body[first:second]))
        data = split(body[second + len(edge) : body.rindex(edge)])
        data = data.removesuffix(b"\n").removesuffix(b"\r")
        return as_json(self.bucket.put(told["name"], data, query))

    def _more(self, session: str, method: str, body: bytes) -> tuple[int, dict, bytes]:
        """A piece of a resumable upload, which is an object only when it is whole."""
        with self.bucket.lock:
            if session not in self.bucket.uploads:
                raise Refused(404, "no such upload")
            if method == "DELETE":
                del self.bucket.uploads[session]
                raise Refused(499, "")
            name, query, data = self.bucket.uploads[session]
            given = self.headers.get("Content-Range") or "bytes */*"
            asked = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", given)
            if asked[1]:
                if int(asked[1]) > len(data):
                    raise Refused(416, "a gap")
                data[int(asked[1]) :] = body
            elif body:
                data += body
            if (asked[3] == "*" and asked[1]) or (asked[3] != "*" and int(asked[3]) > len(data)):
                return 308, {"Range": f"bytes=0-{len(data) - 1}"} if data else {}, b""
            del self.bucket.uploads[session]
            return 200, {}, json.dumps(self.bucket.put(name, bytes(data), query)).encode()

    def _batch(self, body: bytes) -> tuple[int, dict, bytes]:
        """Removals, each with its own answer."""
        edge, answers = "batch_of_answers", ""
        for address in re.findall(rb"^DELETE (\S+) HTTP", body, re.MULTILINE):
            try:
                status, text = self.answer("DELETE", address.decode(), b"")[0], ""
            except Refused as error:
                status, text = error.status, json.dumps({"error": {"message": str(error)}})
            answers += f"\n--{edge}\nContent-Type: application/http\n\n"
            answers += f"HTTP/1.1 {status} X\n\n{text}"
        kind = {"Content-Type": f"multipart/mixed; boundary={edge}"}
        return 200, kind, f"{answers}\n--{edge}--".encode()


if __name__ == "__main__":
    alone = Bucket()
    sys.exit(subprocess.run(sys.argv[1:], env=os.environ | alone.environment).returncode)
