"""A stand-in for the Hugging Face Hub that takes uploads: repositories are created, and files committed."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """What was uploaded so far."""

    def __init__(self) -> None:
        self.address = ""
        self.created: list[dict[str, Any]] = []
        """The requests that created repositories."""
        self.commits: list[dict[str, bytes | None]] = []
        """The files of each commit. A file that it deletes is None."""
        self.files: list[str] = []
        """The files in the repository before."""
        self.refuse: str | None = None
        """Requests whose path ends with this are refused."""

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Returns the status and the content of the answer to a POST request."""
        path = path.partition("?")[0]
        if self.refuse and path.endswith(self.refuse):
            return 403, {"error": "You have no permission to write here."}
        if path == "/api/repos/create":
            self.created.append(found := json.loads(body))
            return 200, {"url": f"{self.address}/{found['organization']}/{found['name']}"}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
        if "/commit/" in path:
            entries = [json.loads(line) for line in body.splitlines()]
            files = [entry["value"] for entry in entries if entry["key"] == "file"]
            deleted = [entry["value"]["path"] for entry in entries if entry["key"] == "deletedFile"]
            self.commits.append(
                {file["path"]: base64.b64decode(file["content"]) for file in files} | dict.fromkeys(deleted)
            )
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": f"{path} is unknown"}


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Runs a stand-in on a free port."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "/tree/main" in self.path:
                self.send(200, [{"type": "file", "path": name, "oid": "0" * 40, "size": 1} for name in hub.files])
            else:
                self.send(404, {"error": f"{self.path} is unknown"})

        def do_POST(self) -> None:
            self.send(*hub.answer(self.path, self.rfile.read(int(self.headers["Content-Length"]))))

        def send(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
