"""A small Hub on 127.0.0.1, in memory: the endpoints that huggingface_hub's client calls to create, upload to, list and
download from model repositories, with tokens and private repositories. Errors look as the real Hub's."""

import asyncio
import base64
import copy
import hashlib
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


@dataclass
class Blob:
    """A file: its content, and whether it went through LFS."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        """As git names it, or LFS."""
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """Commits by id, each all files by path; branches by name."""

    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, Blob], branch: str) -> str:
        text = json.dumps([len(self.commits), branch, sorted((p, b.oid) for p, b in files.items())])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


class Refused(Exception):
    def __init__(self, status: int, code: str, message: str):
        self.response = JSONResponse(
            {"error": message}, status, headers={"X-Error-Code": code, "X-Error-Message": message}
        )


class Hub:
    """What is stored, and how the server misbehaves.

    Attributes:
        users: user name by token. repos: by id. objects: LFS contents by SHA-256.
        hold: while set, an LFS upload that has begun never ends. begun: an upload has begun. requests: all that came.
        fail_commits: how many commits are answered with an internal error.
        edits: what somebody else does to a repository just before a commit arrives, one a commit.
    """

    def __init__(self) -> None:
        self.users = {"hf_ann": "ann", "hf_bob": "bob"}
        self.hold, self.begun = threading.Event(), threading.Event()
        self.url = ""
        self.reset({}, {})

    def reset(self, repos: dict[str, Repo], objects: dict[str, bytes]) -> None:
        """Stores copies of these and nothing else, and behaves."""
        self.repos, self.objects = copy.deepcopy(repos), dict(objects)
        self.hold.clear()
        self.begun.clear()
        self.requests: list[str] = []
        self.fail_commits = 0
        self.edits: list[Callable[[Repo], None]] = []

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        found = self.repos[repo]
        return {path: blob.content for path, blob in found.commits[found.branches[revision]].items()}

    # Requests

    def user(self, request: Request) -> str | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.users:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return self.users[token]

    def repo(self, request: Request, write: bool = False) -> tuple[str, Repo]:
        name = f"{request.path_params['owner']}/{request.path_params['name']}"
        user, repo = self.user(request), self.repos.get(name)
        if repo is None or (repo.private and user != name.split("/")[0]):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and user != name.split("/")[0]:
            raise Refused(403, "", f"You don't have the rights to write to {name}")
        return name, repo

    def revision(self, request: Request, repo: Repo) -> str:
        sha = repo.find(request.path_params["revision"])
        if sha is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {request.path_params['revision']}")
        return sha

    async def whoami(self, request: Request):
        user = self.user(request)
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        return JSONResponse({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    async def create(self, request: Request):
        user, wanted = self.user(request), await request.json()
        if user is None:
            raise Refused(401, "", "Invalid username or password.")
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if owner != user:
            raise Refused(403, "", f"You don't have the rights to create a model under the namespace {owner}")
        if name in self.repos:
            return JSONResponse({"error": "You already created this model repo", "url": f"{self.url}/{name}"}, 409)
        self.repos[name] = Repo(bool(wanted.get("private")) or wanted.get("visibility") == "private")
        self.repos[name].commit({".gitattributes": Blob(b"*.safetensors filter=lfs\n", False)}, "main")
        return JSONResponse({"url": f"{self.url}/{name}", "name": name, "id": name})

    async def branch(self, request: Request):
        _, repo = self.repo(request, write=True)
        name = request.path_params["revision"]
        if name in repo.branches:
            return JSONResponse({"error": "Reference already exists"}, 409)
        repo.branches[name] = repo.branches["main"]
        return JSONResponse({})

    async def validate(self, request: Request):
        text = (await request.json())["content"]
        errors = []
        try:
            data = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
            if index := data.get("model-index"):
                model_index_to_eval_results(index)
            for key in ("tags", "datasets"):
                if key in data and not (isinstance(data[key], list) and all(isinstance(v, str) for v in data[key])):
                    errors.append({"message": f'"{key}" must be an array of strings'})
            for key in ("library_name", "pipeline_tag", "base_model_relation"):
                if key in data and not isinstance(data[key], str):
                    errors.append({"message": f'"{key}" must be a string'})
        except Exception as error:  # whatever is wrong is the answer
            errors.append({"message": str(error)})
        return JSONResponse({"errors": errors, "warnings": []}, 400 if errors else 200)

    async def preupload(self, request: Request):
        _, repo = self.repo(request, write=True)
        self.revision(request, repo)
        files = (await request.json())["files"]
        modes = [(f["path"], "lfs" if f["path"].endswith((".safetensors", ".png")) else "regular") for f in files]
        return JSONResponse(
            {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None} for path, mode in modes]}
        )

    async def lfs_batch(self, request: Request):
        self.repo(request, write=True)
        objects = []
        for wanted in (await request.json())["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.objects:
                answer["actions"] = {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}
            objects.append(answer)
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def lfs_put(self, request: Request):
        content = b""
        async for chunk in request.stream():
            content += chunk
            self.begun.set()
            while self.hold.is_set() and not await request.is_disconnected():
                await asyncio.sleep(0.02)
        if hashlib.sha256(content).hexdigest() != request.path_params["oid"]:
            return JSONResponse({"error": "wrong content"}, 400)
        self.objects[request.path_params["oid"]] = content
        return Response()

    async def commit(self, request: Request):
        name, repo = self.repo(request, write=True)
        if self.fail_commits:
            self.fail_commits -= 1
            return JSONResponse({"error": "Internal Error"}, 500)
        if self.edits:
            self.edits.pop(0)(repo)
        parent = self.revision(request, repo)
        files = dict(repo.commits[parent])
        for line in (await request.body()).splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header" and value.get("parentCommit") not in (None, parent):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
            elif key == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refused(400, "", f"An LFS pointer points to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob(self.objects[value["oid"]], True)
            elif key == "deletedFile":
                del files[value["path"]]
        branch = request.path_params["revision"]
        if request.query_params.get("create_pr"):
            branch = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}"
        sha = repo.commit(files, branch)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{self.url}/{name}/commit/{sha}"}
        return JSONResponse(answer | {"pullRequestUrl": f"{self.url}/{name}/discussions/1"})

    async def info(self, request: Request):
        name, repo = self.repo(request)
        request.path_params.setdefault("revision", "main")
        sha = self.revision(request, repo)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        return JSONResponse({"_id": name, "id": name, "sha": sha, "private": repo.private, "siblings": siblings})

    async def tree(self, request: Request):
        _, repo = self.repo(request)
        sha = self.revision(request, repo)
        under = request.path_params.get("path", "").strip("/")
        return JSONResponse([_entry(p, b) for p, b in repo.commits[sha].items() if p.startswith(under)])

    async def paths_info(self, request: Request):
        _, repo = self.repo(request)
        sha = self.revision(request, repo)
        body = await request.body()
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else (await request.form()).getlist("paths")
        return JSONResponse([_entry(p, repo.commits[sha][p]) for p in wanted if p in repo.commits[sha]])

    async def resolve(self, request: Request):
        _, repo = self.repo(request)
        sha = self.revision(request, repo)
        blob = repo.commits[sha].get(request.path_params["path"])
        if blob is None:
            raise Refused(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        content, status = blob.content, 200
        if (wanted := request.headers.get("range", "")).startswith("bytes="):
            first = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            content, status = content[first:], 206
        if request.method == "HEAD":
            return Response(status_code=status, headers=headers | {"Content-Length": str(len(content))})
        return Response(content, status, headers)


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 130}
    return entry


def application(hub: Hub) -> Starlette:
    async def refused(request: Request, error: Any):
        return error.response

    async def unknown(request: Request):
        return JSONResponse({"error": f"this small Hub does not know {request.url.path}"}, 501)

    async def noted(scope, receive, send):
        if scope["type"] == "http":
            hub.requests.append(f"{scope['method']} {scope['path']}")
        await app(scope, receive, send)

    model = "/api/models/{owner}/{name}"
    routes = [
        Route("/api/whoami-v2", hub.whoami),
        Route("/api/repos/create", hub.create, methods=["POST"]),
        Route("/api/validate-yaml", hub.validate, methods=["POST"]),
        Route(f"{model}/preupload/{{revision:path}}", hub.preupload, methods=["POST"]),
        Route(f"{model}/commit/{{revision:path}}", hub.commit, methods=["POST"]),
        Route(f"{model}/branch/{{revision:path}}", hub.branch, methods=["POST"]),
        Route(f"{model}/paths-info/{{revision}}", hub.paths_info, methods=["POST"]),
        Route(f"{model}/tree/{{revision}}", hub.tree),
        Route(f"{model}/tree/{{revision}}/{{path:path}}", hub.tree),
        Route(f"{model}/revision/{{revision:path}}", hub.info),
        Route(model, hub.info),
        Route("/{owner}/{name}.git/info/lfs/objects/batch", hub.lfs_batch, methods=["POST"]),
        Route("/lfs/{oid}", hub.lfs_put, methods=["PUT"]),
        Route("/{owner}/{name}/resolve/{revision}/{path:path}", hub.resolve, methods=["GET", "HEAD"]),
        Route("/{path:path}", unknown, methods=["GET", "HEAD", "POST", "PUT", "DELETE"]),
    ]
    app = Starlette(routes=routes, exception_handlers={Refused: refused})
    return noted  # type: ignore[return-value]


@contextmanager
def running():
    """A Hub that answers at ``hub.url`` for as long as the context lasts."""
    hub = Hub()
    server = uvicorn.Server(
        uvicorn.Config(application(hub), host="127.0.0.1", port=0, log_level="critical", lifespan="off")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    hub.url = f"http://127.0.0.1:{port}"
    try:
        yield hub
    finally:
        hub.hold.clear()
        server.should_exit = server.force_exit = True
        thread.join(10)
