"""A Hugging Face Hub of our own on a local port: enough of its HTTP interface to push a model and to load it again.

It keeps everything in memory, checks tokens and metadata as the real one does, and fails where it is told to.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id


TOKEN, READ_TOKEN = "hf_writes", "hf_reads"
USER = "me"
# Step, method and path. The order in which a push takes them, then reading.
ROUTES = [
    ("create", "POST", r"/api/repos/create"),
    ("whoami", "GET", r"/api/whoami-v2"),
    ("branch", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)"),
    ("validate", "POST", r"/api/validate-yaml"),
    ("preupload", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)"),
    ("batch", "POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    ("put", "PUT", r"/lfs/(?P<oid>\w+)"),
    ("verify", "POST", r"/lfs/verify"),
    ("commit", "POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)"),
    ("info", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+?)(?:/revision/(?P<rev>[^/]+))?"),
    ("tree", "GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?"),
    ("resolve", "GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)"),
]
_READS = {"info", "tree", "resolve"}


class Repo:
    """Branches of files, and a commit's number that every commit moves on."""

    def __init__(self, private: bool = False, files: dict[str, bytes] | None = None):
        self.private = private
        self.branches = {"main": dict(files or {})}
        self.commits: list[str] = []  # messages

    def sha(self, branch: str = "main") -> str:
        """The commit that a branch is at."""
        return hashlib.sha1(f"{branch} {self.commits}".encode()).hexdigest()

    def branch(self, revision: str | None) -> str:
        """The branch of that name, or that is at that commit."""
        return next((name for name in self.branches if revision in (name, self.sha(name))), "main")


class Hub(ThreadingHTTPServer):
    """The server. `repos` and `lfs` are what it holds, `steps` what was asked of it."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.lfs: dict[str, bytes] = {}
        self.steps: list[str] = []
        self.failures: dict[str, list] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fail(self, step: str, how: int | str, times: int = 1_000) -> None:
        """Answer a step with an HTTP status, or `"drop"` the connection."""
        self.failures[step] = [how] * times

    def handle_error(self, request, client_address):
        pass  # a client that goes away is no news

    def files(self, repo: str, branch: str = "main") -> dict[str, bytes]:
        """The content of a branch."""
        return self.repos[repo].branches[branch]


@contextmanager
def running():
    """A hub that runs in a thread."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def metadata_errors(content: str) -> list[str]:
    """What the hub would say of a model card's metadata."""
    match = REGEX_YAML_BLOCK.search(content)
    try:
        data = yaml.safe_load(match.group(2)) if match else {}
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["metadata should be a mapping"]
    errors = [f"{name} is empty" for name, value in data.items() if value is None or value in ("", [], {})]
    for name in ("base_model", "datasets"):
        values = data.get(name, [])
        for value in [values] if isinstance(values, str) else values:
            try:
                validate_repo_id(value)
            except HFValidationError as error:
                errors.append(f"{name}: {error}")
    for name in ("license", "pipeline_tag", "library_name"):
        if name in data and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", str(data[name])):
            errors.append(f"{name}: {data[name]!r} is not one that is known")
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append("tags should be strings")
    for model in data.get("model-index", []):
        if not model.get("name") or not isinstance(model.get("results"), list):
            errors.append("model-index needs a name and results")
        for result in model.get("results", []):
            needed = [result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name")]
            needed += [metric.get("type") for metric in result["metrics"]]
            if not all(isinstance(value, str) and value for value in needed):
                errors.append(f"model-index: incomplete result {result}")
            if not all(isinstance(metric["value"], (int, float)) for metric in result["metrics"]):
                errors.append(f"model-index: a value is not a number in {result}")
    return errors


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_HEAD(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        found = ((step, re.fullmatch(pattern, path)) for step, wanted, pattern in ROUTES if wanted == method)
        step, match = next(((step, match) for step, match in found if match), (None, None))
        if step is None:
            self._send(404, {"error": f"no such route: {method} {path}"})
            return
        self.server.steps.append(step)
        planned = self.server.failures.get(step)
        if planned:
            how = planned.pop()
            if how == "drop":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            else:
                self._send(how, {"error": f"told to fail with {how}"})
            return
        user = {f"Bearer {TOKEN}": "write", f"Bearer {READ_TOKEN}": "read"}.get(self.headers.get("Authorization"))
        if step not in {*_READS, "put"} and user is None:
            self._send(401, {"error": "Invalid credentials"}, {"X-Error-Message": "Invalid credentials"})
            return
        if step in ("create", "branch", "preupload", "batch", "commit") and user != "write":
            self._send(403, {"error": "this token may only read"})
            return
        parts = match.groupdict()
        if parts.get("repo") is not None:
            repo = self.server.repos.get(parts["repo"])
            if repo is None or (repo.private and user is None):
                self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
                return
            known = {*repo.branches, *map(repo.sha, repo.branches)}
            if step != "branch" and parts.get("rev") is not None and parts["rev"] not in known:
                self._send(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
                return
            parts["repo"] = repo
        getattr(self, f"_{step}")(body, **parts)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _create(self, body):
        request = json.loads(body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        if not name.startswith(f"{USER}/"):
            self._send(403, {"error": f"you are not a member of {name.split('/')[0]}"})
            return
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            self._send(409, {"error": "You already created this model repo", **answer})
            return
        self.server.repos[name] = Repo(request.get("visibility") == "private")
        self._send(200, answer)

    def _whoami(self, body):
        self._send(200, {"type": "user", "name": USER, "auth": {"accessToken": {"role": "write"}}})

    def _branch(self, body, repo, rev):
        if rev in repo.branches:
            self._send(409, {"error": "Reference already exists"})
            return
        repo.branches[rev] = dict(repo.branches["main"])
        self._send(200, {})

    def _validate(self, body):
        errors = metadata_errors(json.loads(body)["content"])
        content = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._send(400 if errors else 200, content)

    def _preupload(self, body, repo, rev):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def _batch(self, body, repo):
        objects = []
        for wanted in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{self.server.url}/lfs/verify"},
            }
            known = wanted["oid"] in self.server.lfs
            objects.append({**wanted, **({} if known else {"actions": actions})})
        self._send(200, {"transfer": "basic", "objects": objects})

    def _put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            self._send(400, {"error": "checksum"})
            return
        self.server.lfs[oid] = body
        self._send(200, b"")

    def _verify(self, body):
        wanted = json.loads(body)
        good = len(self.server.lfs.get(wanted["oid"], b"")) == wanted["size"]
        self._send(200 if good else 404, {})

    def _commit(self, body, repo, rev):
        header, *operations = (json.loads(line) for line in body.splitlines())
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                repo.branches[rev][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                repo.branches[rev][value["path"]] = self.server.lfs[value["oid"]]
        repo.commits.append(header["value"]["summary"])
        url = f"{self.server.url}/{self._name(repo)}/commit/{repo.sha(rev)}"
        self._send(200, {"commitUrl": url, "commitOid": repo.sha(rev)})

    def _name(self, repo) -> str:
        return next(name for name, other in self.server.repos.items() if other is repo)

    def _info(self, body, repo, rev):
        names = repo.branches[repo.branch(rev)]
        data = {
            "id": self._name(repo),
            "sha": repo.sha(repo.branch(rev)),
            "private": repo.private,
            "siblings": [{"rfilename": n} for n in names],
        }
        card = names.get("README.md", b"").decode()
        match = REGEX_YAML_BLOCK.search(card)
        self._send(200, {**data, "cardData": yaml.safe_load(match.group(2)) if match else {}})

    def _tree(self, body, repo, rev, path):
        files = repo.branches[repo.branch(rev)]
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for name, data in files.items()
            if path is None or name.startswith(f"{path}/")
        ]
        if path is not None and not rows:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, rows)

    def _resolve(self, body, repo, rev, path):
        headers = {"X-Repo-Commit": repo.sha(repo.branch(rev))}
        data = repo.branches[repo.branch(rev)].get(path)
        if data is None:
            self._send(404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        self._send(200, data, {**headers, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})
