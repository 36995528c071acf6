"""A small emulator of Google Cloud Storage on loopback, for tests: one bucket, in memory.

It has the requests of the JSON API that gcsfs and TensorStore send, with generations of objects and preconditions on
them, by which TensorStore commits checkpoints. The emulator on PyPI, gcp-storage-emulator, ignores preconditions.
"""

import hashlib
import itertools
import json
import re
import threading
from base64 import b64encode
from collections.abc import Callable
from datetime import UTC, datetime
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "bucket"


class Object(NamedTuple):
    content: bytes
    generation: int
    updated: str

    def describe(self, name: str) -> dict[str, Any]:
        return {
            "kind": "storage#object",
            "bucket": BUCKET,
            "name": name,
            "size": str(len(self.content)),
            "generation": str(self.generation),
            "metageneration": "1",
            "timeCreated": self.updated,
            "updated": self.updated,
            "etag": str(self.generation),
            "md5Hash": b64encode(hashlib.md5(self.content).digest()).decode(),
        }


class StorageEmulator(ThreadingHTTPServer):
    """Serves from a thread of its own in a `with` block. `objects` can be read and changed meanwhile."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.objects: dict[str, Object] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        """Name and content so far of the uploads in several requests."""
        self.generations = itertools.count(10**15)
        self.lock = threading.Lock()
        self.fault: Callable[[str, str], int] = lambda command, address: 0
        """Returns the status with which to refuse a request, or 0."""

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables with which programs use this emulator."""
        url = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
        }

    def handle_error(self, *_: object) -> None:
        """Ignores clients that leave before they have their answer, for example because they are killed."""

    def __enter__(self) -> "StorageEmulator":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    def put(self, name: str, content: bytes) -> Object:
        self.objects[name] = Object(content, next(self.generations), f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}")
        return self.objects[name]

    def names(self, prefix: str = "") -> list[str]:
        return sorted(name for name in self.objects if name.startswith(prefix))


class Handler(BaseHTTPRequestHandler):
    server: StorageEmulator
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        match = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o)?(?:/([^/]+))?", url.path)
        if not match or match[2] != BUCKET:
            return self.reply(404)
        name = unquote(match[4] or "")
        if status := self.server.fault(self.command, unquote(self.path)):
            return self.reply(status)
        with self.server.lock:
            if match[1] == "/upload":
                return self.upload(query, body)
            if not match[3]:
                return self.reply(200, {"kind": "storage#bucket", "name": BUCKET})
            if self.command == "GET":
                return self.read(name, query) if name else self.list(query)
            if self.command == "DELETE":
                found = self.server.objects.get(name)
                if found is None or (status := failed_precondition(found, query)):
                    return self.reply(404 if found is None else status)
                del self.server.objects[name]
                return self.reply(204)
        return self.reply(501)

    do_GET = do_POST = do_PUT = do_DELETE = handle_request

    def reply(self, status: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else b"" if content is None else json.dumps(content).encode()
        self.send_response(status)
        for header, value in (headers or {}).items():
            self.send_header(header, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def read(self, name: str, query: dict[str, str]) -> None:
        found = self.server.objects.get(name)
        if status := failed_precondition(found, query):
            return self.reply(status)
        if found is None:
            return self.reply(404)
        if query.get("alt") != "media" and not self.path.startswith("/download"):
            return self.reply(200, found.describe(name))
        headers = {"X-Goog-Generation": str(found.generation), "X-Goog-Metageneration": "1"}
        if not (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")):
            return self.reply(200, found.content, headers)
        start, size = int(span[1]), len(found.content)
        stop = min(int(span[2]) + 1 if span[2] else size, size)
        if start >= size:
            return self.reply(416)
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return self.reply(206, found.content[start:stop], headers)

    def list(self, query: dict[str, str]) -> None:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, folders = [], set()
        for name in self.server.names(prefix):
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            elif query.get("startOffset", "") <= name and not ("endOffset" in query and name >= query["endOffset"]):
                items.append(self.server.objects[name].describe(name))
        self.reply(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def upload(self, query: dict[str, str], body: bytes) -> None:
        name = query.get("name", "")
        if upload_id := query.get("upload_id"):
            name, content = self.server.uploads[upload_id]
            content += body
            size = (self.headers.get("Content-Range") or "").rpartition("/")[2]  # of the whole, * if not known yet
            if size == "*" or size.isdecimal() and len(content) < int(size):
                return self.reply(308, headers={"Range": f"bytes=0-{len(content) - 1}"})
            body = bytes(content)
        elif query["uploadType"] == "multipart":
            header = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            description, data = message_from_bytes(header + body).get_payload()
            name = name or json.loads(description.get_payload())["name"]
            body = data.get_payload(decode=True)
        elif query["uploadType"] == "resumable":
            upload_id = str(next(self.server.generations))
            self.server.uploads[upload_id] = (name or json.loads(body)["name"], bytearray())
            address = f"http://127.0.0.1:{self.server.server_port}/upload/storage/v1/b/{BUCKET}/o"
            return self.reply(200, headers={"Location": f"{address}?upload_id={upload_id}"})
        if status := failed_precondition(self.server.objects.get(name), query):
            return self.reply(status)
        return self.reply(200, self.server.put(name, body).describe(name))


def failed_precondition(found: Object | None, query: dict[str, str]) -> int:
    """Returns the status for an object that does not have the generation that a request requires, otherwise 0."""
    generation = found.generation if found else 0
    if int(query.get("ifGenerationMatch", generation)) != generation:
        return 412
    if int(query.get("ifGenerationNotMatch", -1)) == generation:
        return 304
    return 0
