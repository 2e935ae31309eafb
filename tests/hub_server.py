"""A Hugging Face hub for tests: the part of its API that downloads need, on this machine.

    with serve({"owner/name": Repository({"config.json": b"{}"})}) as hub:
        hub.url, hub.log     # the address, and each request as "GET owner/name/config.json"
"""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse

LARGE = (".safetensors", ".bin", ".pth", ".model")  # what the hub keeps in LFS, with a sha256


@dataclasses.dataclass
class Repository:
    """Files at one commit, and what goes wrong with them."""

    files: dict  # {name: bytes}
    commit: str = "a" * 40
    branch: str = "main"
    refusal: tuple | None = None  # (status, X-Error-Code): for everything in it
    listed: bool = False  # the refusal is for the files, not for their list
    corrupt: set = dataclasses.field(default_factory=set)  # names whose first byte arrives flipped
    cut: dict = dataclasses.field(default_factory=dict)  # {name: how often its body ends halfway}
    slow: float = 0.0  # seconds before each answer


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def blob_id(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status, code):
        self.answer(status, b"{}", **({"X_Error_Code": code, "X_Error_Message": code} if code else {}))

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = api or file
        name = match[1] if match else None
        self.server.log.append(f"{self.command} {f'{name}/{file[3]}' if file else path}")
        repository = self.server.repositories.get(name)
        if repository is None:
            return self.refuse(401 if api else 404, None if api else "RepoNotFound")
        time.sleep(repository.slow)
        if repository.refusal and not (api and repository.listed):
            return self.refuse(*repository.refusal)
        if (match[2] or repository.branch) not in (repository.branch, repository.commit):
            return self.refuse(404, "RevisionNotFound")
        return self.info(name, repository) if api else self.file(file[3], repository)

    do_HEAD = do_GET

    def info(self, name, repository):
        siblings = [
            {"rfilename": n, "size": len(data), "blobId": blob_id(data)}
            | ({"lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134}} if n.endswith(LARGE) else {})
            for n, data in repository.files.items()
        ]
        info = {"id": name, "sha": repository.commit, "siblings": siblings, "private": False, "tags": []}
        self.answer(200, json.dumps(info).encode(), Content_Type="application/json")

    def file(self, name, repository):
        if name not in repository.files:
            return self.refuse(404, "EntryNotFound")
        data = repository.files[name]
        etag = sha256(data) if name.endswith(LARGE) else blob_id(data)
        headers = {"ETag": f'"{etag}"', "X_Repo_Commit": repository.commit, "X_Linked_Size": len(data)}
        if name in repository.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        if start:
            self.server.log[-1] += f" from {start}"
            headers["Content_Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if self.command == "GET" and repository.cut.get(name, 0):
            repository.cut[name] -= 1
            self.answer(206 if start else 200, body[: len(body) // 2], **headers, Content_Length=len(body))
            self.close_connection = True
            return None
        return self.answer(206 if start else 200, body, **headers)


@contextlib.contextmanager
def serve(repositories):
    """A server in a thread, stopped at the end."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.repositories, server.log = dict(repositories), []
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
