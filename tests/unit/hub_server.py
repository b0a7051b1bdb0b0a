"""As much of the Hugging Face hub as an upload needs, on this machine."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_good"


class Hub:
    """What has been put there: by repository, whether it is private, and its files."""

    def __init__(self) -> None:
        self.private: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.full = False
        """Whether uploads are refused."""
        self.role = "write"
        """What the token may do."""

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any, dict[str, str]]:
        words = path.partition("?")[0].strip("/").split("/")
        if words[1:] == ["whoami-v2"]:
            token = {"displayName": "mine", "role": self.role}
            return 200, {"name": "owner", "type": "user", "auth": {"type": "access_token", "accessToken": token}}, {}
        if words[1:] == ["repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.private.setdefault(name, private)
            return 200, {"url": f"{self.url}/{name}"}, {}
        name = "/".join(words[2:4])
        if name not in self.private:
            return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if "preupload" in words:
            asked = json.loads(body)["files"]
            return (
                200,
                {"files": [dict(path=one["path"], uploadMode="regular", shouldIgnore=False) for one in asked]},
                {},
            )
        if "tree" in words:
            kept = self.files.get(name, {})
            return 200, [dict(type="file", path=path, size=len(kept[path]), oid="0" * 40) for path in kept], {}
        if "commit" in words:
            if self.full:
                return 403, {"error": "storage limit reached"}, {}
            for line in map(json.loads, body.splitlines()):
                kept = self.files.setdefault(name, {})
                if line["key"] == "deletedFile":
                    del kept[line["value"]["path"]]
                if line["key"] == "file":
                    kept[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.url}/{name}/commit/c0ffee", "commitOid": "c0ffee"}, {}
        return 200, {"id": name, "private": self.private[name], "sha": "c0ffee", "siblings": []}, {}

    url = ""


@contextmanager
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the library talks to, with a token that is good there."""
    from huggingface_hub import constants

    kept = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer("GET")

        def do_POST(self) -> None:
            self._answer("POST")

        def _answer(self, method: str) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, found, headers = 401, {"error": "Invalid username or password."}, {}
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                status, found, headers = kept.answer(method, self.path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        kept.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", kept.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        try:
            yield kept
        finally:
            server.shutdown()
            thread.join()
