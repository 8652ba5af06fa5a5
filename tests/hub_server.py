"""A small server with as much of the hub's HTTP interface as huggingface_hub needs to read and to push models."""
import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

API = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/([^?]+))?")
FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class Hub(ThreadingHTTPServer):
    """Repositories are folders <root>/<owner>/<name>; `faults` says what goes wrong, `asked` what was asked for."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked, self.commits, self.uploads = root, [], [], {}
        self.faults: dict[str, object] = {}  # status, cut (bytes), gated, token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def names(self, repository: str) -> list[str]:
        folder = self.root / repository
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    def commit(self, repository: str) -> str:
        """The hash of a repository's content."""
        parts = [f"{name} {(self.root / repository / name).stat().st_mtime_ns}" for name in self.names(repository)]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, content: object, status: int = 200) -> None:
        self.answer(status, json.dumps(content).encode(), Content_Type="application/json")

    def refused(self, repository: str, revision: str, *, of_file: bool) -> bool:
        """Answer as the hub does where something is not there, or not for everyone; False: it is."""
        faults = self.server.faults
        if faults.get("status"):
            self.answer(int(faults["status"]), b"out of order")
        elif faults.get("token") and self.headers.get("Authorization") != f"Bearer {faults['token']}":
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid username or password.")
        elif not (self.server.root / repository).is_dir():
            self.answer(401, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        elif revision not in ("main", "v1", self.server.commit(repository)):
            self.answer(404, X_Error_Code="RevisionNotFound", X_Error_Message=f"Invalid rev id: {revision}")
        elif faults.get("gated") and of_file:
            self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to model is restricted")
        else:
            return False
        return True

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.command} {self.path}")
        if found := FILE.fullmatch(self.path.partition("?")[0]):
            repository, revision, name = found[1], unquote(found[2]), unquote(found[3])
            if not self.refused(repository, revision, of_file=True):
                self.send_file(repository, name)
        elif found := API.fullmatch(self.path.partition("?")[0]):
            repository, revision = found[1], unquote(found[3] or "main")
            if not self.refused(repository, revision, of_file=False):
                self.json({"id": repository, "modelId": repository, "sha": self.server.commit(repository),
                           "siblings": [{"rfilename": name} for name in self.server.names(repository)]})
        else:
            self.answer(404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def send_file(self, repository: str, name: str) -> None:
        path = self.server.root / repository / name
        commit = self.server.commit(repository)
        if not path.is_file():
            self.answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", X_Repo_Commit=commit)
            return
        body = path.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X_Repo_Commit": commit, "Accept_Ranges": "bytes"}
        cut = self.server.faults.get("cut")
        if self.command == "GET" and cut is not None:  # the server dies in the middle
            self.send_response(200)
            for key, value in {**headers, "Content_Length": str(len(body))}.items():
                self.send_header(key.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body[:int(str(cut))])
            self.wfile.flush()
            self.close_connection = True
            self.server.socket.close()
            threading.Thread(target=self.server.shutdown).start()
            self.connection.close()
            return
        self.answer(200, body, **headers)

    def do_POST(self) -> None:
        self.server.asked.append(f"POST {self.path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self.read_chunks()
        if self.server.faults.get("status"):
            self.answer(int(self.server.faults["status"]), b"out of order")
        elif not str(self.headers.get("Authorization", "")).startswith("Bearer hf_"):
            self.answer(401, X_Error_Message="Invalid username or password.")
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            (self.server.root / name).mkdir(parents=True, exist_ok=True)
            self.json({"url": f"{self.server.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.json({"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/\w+", self.path):
            wanted = json.loads(body)["files"]
            self.json({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                 for file in wanted]})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/\w+", self.path):
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    path = self.server.root / found[1] / entry["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(entry["value"]["content"]))
                else:
                    self.server.commits.append(entry["value"])
            commit = self.server.commit(found[1])
            self.json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{commit}", "commitOid": commit,
                       "success": True})
        else:
            self.answer(404)

    def read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        found = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """The hub over the folder `root`, on a free port of this machine."""
    server = Hub(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
