"""A Hub for tests: what huggingface_hub and mirrors ask of huggingface.co, on 127.0.0.1, with its state in a folder.

python tests/hub_server.py FOLDER --port 8000   # then HF_ENDPOINT=http://127.0.0.1:8000 HF_TOKEN=hf_write hf upload …

It believes nothing it is told: sizes and SHA-256 of large files are checked, a commit that names an object which is
not there is refused. A commit is one atomic write. `faults` breaks connections, answers 500, lets tokens expire.
There is no Xet: large files go by git-LFS, so clients need HF_HUB_DISABLE_XET=1.
"""

import argparse
import base64
import contextlib
import datetime
import fnmatch
import hashlib
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, unquote

import uvicorn
import yaml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

TOKENS = {"hf_write": ("lab", "write"), "hf_read": ("lab", "read"), "hf_other": ("stranger", "write")}
LFS_NAMES = ("*.safetensors", "*.bin", "*.model", "*.h5", "*.onnx", "*.pt", "*.parquet", "*.zip")
LFS_FROM, LFS_BINARY_FROM = 10_000_000, 100_000  # bytes; the latter for files with a zero in their first 512 bytes
GITATTRIBUTES = "".join(f"{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES).encode()


@dataclass
class Faults:
    """What shall go wrong. Routes are named like the methods of `LocalHub` that answer them.

    Args:
        cut_from: the first PUT of large files, counted from 0, whose connection is closed half-way; `cuts`: how many.
        errors: `{route: times}` that are answered 500 before anything is done.
        lost: `{route: times}` whose work is done, but whose answer never arrives.
        meanwhile: `{route: function}` to call once, before the next answer.
        token_requests: requests after which every token has expired.
    """

    cut_from: int = 0
    cuts: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    lost: dict[str, int] = field(default_factory=dict)
    meanwhile: dict[str, Callable] = field(default_factory=dict)
    token_requests: int | None = None


@dataclass
class Repo:
    """`commits`: `{commit: {parent, title, description, date, files: {path: {oid, size, lfs: SHA-256 or None}}}}`."""

    kind: str  # models, spaces
    id: str
    private: bool
    sdk: str | None = None
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1 -> commit
    commits: dict[str, dict] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.kind}--{self.id.replace('/', '--')}"

    @property
    def url(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"


class LocalHub:
    """`with LocalHub(folder) as hub:` serves `hub.endpoint` from a thread; the same folder again is the same Hub.

    Args:
        chunk_size: large files beyond it are uploaded in parts of this many bytes.
    """

    def __init__(self, folder: Path, chunk_size: int = 5_000_000, port: int = 0):
        self.folder, self.chunk_size, self.faults = Path(folder), chunk_size, Faults()
        self.requests: list[tuple[str, str]] = []  # (route, path) of all that arrived
        self.repos = {}
        for path in self.folder.glob("*/repo.json"):
            repo = Repo(**json.loads(path.read_text()))
            self.repos[repo.kind, repo.id] = repo
        self._socket = socket.create_server(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every answer takes 40 ms
        self.port = self._socket.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        # Another host than the endpoint's, as the real one: a redirect within it means a renamed repository.
        self.storage = f"http://localhost:{self.port}/lfs"
        config = uvicorn.Config(self._app(), log_level="critical", loop="asyncio", http="h11", lifespan="off")
        self._server = uvicorn.Server(config)

    def __enter__(self) -> "LocalHub":
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join(10)

    # --- For tests ---
    def history(self, repo_id: str, ref: str = "refs/heads/main", kind: str = "models") -> list[dict]:
        """Commits of a branch, oldest first."""
        repo, commits = self.repos[kind, repo_id], []
        commit = repo.refs[ref]
        while commit:
            commits.append({"oid": commit, **repo.commits[commit]})
            commit = commits[-1]["parent"]
        return commits[::-1]

    def write(self, repo_id: str, files: dict[str, bytes], ref: str = "refs/heads/main") -> str:
        """A commit by somebody else: adds regular files."""
        repo = self.repos["models", repo_id]
        parent = repo.refs[ref]
        files = {path: self._blob(repo, content) for path, content in files.items()}
        return self._commit(repo, ref, parent, repo.commits[parent]["files"] | files, "by somebody else")

    def content(self, repo_id: str, commit: dict, path: str, kind: str = "models") -> bytes:
        return self._path(self.repos[kind, repo_id], commit["files"][path]).read_bytes()

    def count(self, *routes: str) -> int:
        """How many requests came to these routes so far."""
        return sum(route in routes for route, _ in self.requests)

    # --- Plumbing ---
    def _app(self):
        api, lfs = "/api/{kind}/{owner}/{name}", "/{owner}/{name}.git/info/lfs/objects"
        file = "/{owner}/{name}/resolve/{revision}/{path:path}"
        table = [
            ("GET", "/api/whoami-v2", self.whoami),
            ("POST", "/api/repos/create", self.create),
            ("POST", "/api/validate-yaml", self.validate_yaml),
            ("GET", api, self.info),
            ("GET", f"{api}/revision/{{revision}}", self.info),
            ("GET", f"{api}/refs", self.refs),
            ("GET", f"{api}/tree/{{revision}}", self.tree),
            ("GET", f"{api}/tree/{{revision}}/{{path:path}}", self.tree),
            ("POST", f"{api}/paths-info/{{revision}}", self.paths_info),
            ("POST", f"{api}/preupload/{{revision}}", self.preupload),
            ("POST", f"{api}/commit/{{revision}}", self.commit),
            ("POST", f"{api}/branch/{{branch}}", self.branch),
            ("POST", f"{api}/tag/{{revision}}", self.tag),
            ("PUT", f"{api}/settings", self.settings),
            ("PUT", "/lfs/{folder}/{oid}", self.put),
            ("PUT", "/lfs/{folder}/{oid}/{part:int}", self.put_part),
            ("POST", "/lfs/{folder}/{oid}/complete", self.complete),
            ("GET", "/lfs/{folder}/{oid}", self.get),
        ]
        for prefix in ("/spaces", ""):
            table += [("POST", f"{prefix}{lfs}/batch", self.batch), ("POST", f"{prefix}{lfs}/verify", self.verify)]
            table += [("GET", f"{prefix}{file}", self.resolve)]
        routes = [Route(path, self._with_faults(handler), methods=[method]) for method, path, handler in table]

        def refuse(request, error):
            return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)

        app = Starlette(routes=routes, exception_handlers={HTTPException: refuse})

        async def quoted(scope, receive, send):  # a branch `robot/left` is one part of a path, `robot%2Fleft`
            await app({**scope, "path": scope["raw_path"].decode()}, receive, send)

        return quoted

    def _with_faults(self, handler):
        async def answer(request):
            name = handler.__name__
            self.requests.append((name, unquote(request.url.path)))
            if self.faults.errors.get(name, 0) > 0:
                self.faults.errors[name] -= 1
                return JSONResponse({"error": "Internal Error - a test wants it"}, 500)
            self.faults.meanwhile.pop(name, lambda: None)()
            response = await handler(request)
            if self.faults.lost.get(name, 0) > 0:
                self.faults.lost[name] -= 1
                _cut(request)
            return response

        return answer

    def _user(self, request, needed: bool = False) -> tuple[str | None, str | None]:
        """`(name, role)`; `(None, None)` if nobody says who they are."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not given and not needed:
            return None, None
        if given in TOKENS and self.faults.token_requests is not None:
            self.faults.token_requests -= 1
        expired = self.faults.token_requests is not None and self.faults.token_requests < 0
        if given not in TOKENS or expired:
            raise _error(401, "Invalid credentials in Authorization header")
        return TOKENS[given]

    def _repo(self, request, write: bool = False) -> Repo:
        owner, name = (unquote(request.path_params[key]) for key in ("owner", "name"))
        kind = request.path_params.get("kind", "spaces" if request.url.path.startswith("/spaces/") else "models")
        user, role = self._user(request, needed=write)
        repo = self.repos.get((kind, f"{owner}/{name}"))
        if repo is None or (repo.private and user != owner):
            raise _error(404, "Repository not found", "RepoNotFound")
        if write and (user != owner or role != "write"):
            raise _error(403, f"You don't have the rights to write to {repo.id}")
        return repo

    def _revision(self, request, repo: Repo) -> str:
        """The commit that the request is about."""
        name = unquote(request.path_params.get("revision", "main"))
        for ref in (f"refs/heads/{name}", f"refs/tags/{name}", name):
            if ref in repo.refs:
                return repo.refs[ref]
        if name in repo.commits:
            return name
        raise _error(404, f"Invalid rev id: {name}", "RevisionNotFound")

    def _path(self, repo: Repo, entry: dict) -> Path:
        place = ("lfs", entry["lfs"]) if entry["lfs"] else ("blobs", entry["oid"])
        return self.folder / repo.folder / Path(*place)

    def _save(self, repo: Repo) -> None:
        path = self.folder / repo.folder / "repo.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(asdict(repo)))
        os.replace(path.with_suffix(".tmp"), path)

    def _commit(self, repo: Repo, ref: str, parent: str | None, files: dict, title: str, description: str = "") -> str:
        commit = {"parent": parent, "title": title, "description": description, "files": files}
        commit["date"] = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        oid = hashlib.sha1(json.dumps([repo.id, commit]).encode()).hexdigest()
        repo.commits[oid], repo.refs[ref] = commit, oid
        self._save(repo)
        return oid

    def _blob(self, repo: Repo, content: bytes) -> dict:
        entry = {"oid": git_oid(content), "size": len(content), "lfs": None}
        path = self._path(repo, entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return entry

    # --- Accounts, repositories ---
    async def whoami(self, request):
        name, role = self._user(request, needed=True)
        return JSONResponse({"type": "user", "name": name, "auth": {"accessToken": {"role": role}}, "orgs": []})

    async def create(self, request):
        body = await request.json()
        user, role = self._user(request, needed=True)
        owner, kind = body.get("organization") or user, body.get("type", "model") + "s"
        if user != owner or role != "write":
            raise _error(403, f'You don\'t have the rights to create a {kind[:-1]} under the namespace "{owner}"')
        private = body.get("private") is True or body.get("visibility") == "private"  # huggingface_hub 0.x or later
        repo = Repo(kind, f"{owner}/{body['name']}", private, body.get("sdk"))
        url = {"url": f"{self.endpoint}/{repo.url}", "name": repo.id}
        if (kind, repo.id) in self.repos:
            return JSONResponse({"error": "You already created this repo", **url}, 409)
        self.repos[kind, repo.id] = repo
        files = {".gitattributes": self._blob(repo, GITATTRIBUTES)}
        self._commit(repo, "refs/heads/main", None, files, "initial commit")
        return JSONResponse(url)

    async def settings(self, request):
        repo, body = self._repo(request, write=True), await request.json()
        repo.private = body["private"] if "private" in body else body["visibility"] == "private"
        self._save(repo)
        return JSONResponse({"private": repo.private})

    async def validate_yaml(self, request):
        try:
            card = _front_matter((await _body(request))["content"])
        except yaml.YAMLError as error:
            return JSONResponse({"errors": [{"message": f"not YAML: {error}"}], "warnings": []}, 400)
        errors = []
        for key, kind in {"license": str, "library_name": str, "pipeline_tag": str, "tags": list}.items():
            if key in card and not isinstance(card[key], kind):
                errors.append({"message": f'"{key}" must be a {kind.__name__}'})
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return JSONResponse({"errors": errors, "warnings": warnings}, 400 if errors else 200)

    # --- Reading ---
    async def info(self, request):
        repo = self._repo(request)
        commit = self._revision(request, repo)
        files = repo.commits[commit]["files"]
        readme = self._path(repo, files["README.md"]).read_text("utf-8") if "README.md" in files else ""
        card, siblings = _front_matter(readme), []
        for path, entry in sorted(files.items()):
            described = _describe(path, entry)
            details = {"size": entry["size"], "blobId": entry["oid"]}
            if entry["lfs"]:
                details["lfs"] = {**described["lfs"], "sha256": entry["lfs"]}
            siblings.append({"rfilename": path, **(details if "blobs" in request.query_params else {})})
        created = next(iter(repo.commits.values()))["date"]
        answer = {"_id": repo.folder, "id": repo.id, "author": repo.id.split("/")[0], "sha": commit}
        answer |= {"private": repo.private, "gated": False, "disabled": False, "downloads": 0, "likes": 0}
        answer |= {"createdAt": created, "lastModified": repo.commits[commit]["date"], "siblings": siblings}
        answer |= {"cardData": card, "tags": card.get("tags", []), "modelId": repo.id, "sdk": repo.sdk}
        answer |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
        return JSONResponse(answer, headers={"X-Repo-Commit": commit})

    async def refs(self, request):
        repo = self._repo(request)
        kinds = {"branches": "refs/heads/", "tags": "refs/tags/", "pullRequests": "refs/pr/"}
        answer = {"converts": []}
        for kind, prefix in kinds.items():
            refs = {ref: commit for ref, commit in repo.refs.items() if ref.startswith(prefix)}
            answer[kind] = [{"name": ref[len(prefix) :], "ref": ref, "targetCommit": oid} for ref, oid in refs.items()]
        if "include_prs" not in request.query_params:
            del answer["pullRequests"]
        return JSONResponse(answer)

    async def tree(self, request):
        repo = self._repo(request)
        commit = self._revision(request, repo)
        folder = unquote(request.path_params.get("path", "")).strip("/")
        found, recursive = {}, request.query_params.get("recursive", "").lower() in ("1", "true")
        for path, entry in sorted(repo.commits[commit]["files"].items()):
            if folder and not path.startswith(f"{folder}/"):
                continue
            parts = path[len(folder) :].strip("/").split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                inner = "/".join([*([folder] if folder else []), *parts[:depth]])
                found[inner] = {"type": "directory", "path": inner, "size": 0, "oid": git_oid(inner.encode())}
            if recursive or len(parts) == 1:
                found[path] = _describe(path, entry)
        if folder and not found:
            raise _error(404, f"{folder} does not exist on {commit}", "EntryNotFound")
        return JSONResponse(list(found.values()), headers={"X-Repo-Commit": commit})

    async def paths_info(self, request):
        repo, body = self._repo(request), await _body(request)
        files = repo.commits[self._revision(request, repo)]["files"]
        paths = body["paths"] if isinstance(body["paths"], list) else [body["paths"]]
        return JSONResponse([_describe(path, files[path]) for path in paths if path in files])

    async def resolve(self, request):
        repo = self._repo(request)
        commit, path = self._revision(request, repo), unquote(request.path_params["path"])
        entry = repo.commits[commit]["files"].get(path)
        if entry is None:
            raise _error(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if not entry["lfs"]:
            return FileResponse(self._path(repo, entry), headers=headers, media_type="application/octet-stream")
        headers |= {"X-Linked-Size": str(entry["size"]), "X-Linked-ETag": f'"{entry["lfs"]}"'}
        return RedirectResponse(f"{self.storage}/{repo.folder}/{entry['lfs']}", 302, headers)

    # --- Writing ---
    async def preupload(self, request):
        repo, body = self._repo(request, write="create_pr" not in request.query_params), await request.json()
        files, answers = repo.commits[self._revision(request, repo)]["files"], []
        ignored = body.get("gitIgnore")
        if ignored is None and ".gitignore" in files:
            ignored = self._path(repo, files[".gitignore"]).read_text()
        for file in body["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            binary = b"\0" in sample and file["size"] >= LFS_BINARY_FROM
            large = binary or file["size"] >= LFS_FROM or _matches(path, LFS_NAMES)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "oid": None}
            if path in files:
                answer["oid"] = files[path]["lfs"] or files[path]["oid"]
            answers.append({**answer, "shouldIgnore": _matches(path, (ignored or "").split())})
        return JSONResponse({"files": answers})

    async def batch(self, request):
        body = await request.json()
        repo = self._repo(request, write="ref" in body)  # without a `ref` it is for a pull request
        objects = []
        for wanted in body["objects"]:
            answer, oid, size = {"oid": wanted["oid"], "size": wanted["size"]}, wanted["oid"], wanted["size"]
            objects.append(answer)
            if (self.folder / repo.folder / "lfs" / oid).exists():
                continue  # no actions: it is here
            url = f"{self.storage}/{repo.folder}/{oid}"
            upload = {"href": f"{url}?size={size}"}
            if size > self.chunk_size:
                parts = range(1, -(-size // self.chunk_size) + 1)
                upload = {"href": f"{url}/complete?size={size}"}
                upload["header"] = {"chunk_size": str(self.chunk_size), **{f"{n:05d}": f"{url}/{n}" for n in parts}}
            verify = {"href": f"{self.endpoint}/{repo.url}.git/info/lfs/objects/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        return JSONResponse({"transfer": "basic", "objects": objects})

    async def _receive(self, request, path: Path) -> str:
        """Stores the body; returns its MD5. Cuts the connection half-way if the faults say so."""
        number = self.count("put", "put_part") - 1
        half = int(request.headers.get("content-length", 2)) // 2
        cut = 0 <= number - self.faults.cut_from < self.faults.cuts
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, received = hashlib.md5(), 0
        with open(path.with_name(f"{path.name}.{id(request)}"), "wb") as file:
            async for block in request.stream():
                file.write(block)
                digest.update(block)
                received += len(block)
                if cut and received >= half:
                    _cut(request)
                    raise ClientDisconnect
        os.replace(file.name, path)
        return digest.hexdigest()

    async def put(self, request):
        folder, oid = request.path_params["folder"], request.path_params["oid"]
        path = self.folder / folder / "incoming" / oid
        etag = await self._receive(request, path)
        self._accept(path, folder, oid, int(request.query_params["size"]))
        return Response(headers={"ETag": f'"{etag}"'})

    async def put_part(self, request):
        folder, oid, part = (request.path_params[key] for key in ("folder", "oid", "part"))
        etag = await self._receive(request, self.folder / folder / "incoming" / f"{oid}.parts" / f"{part:05d}")
        return Response(headers={"ETag": f'"{etag}"'})

    async def complete(self, request):
        folder, oid, body = request.path_params["folder"], request.path_params["oid"], await request.json()
        incoming = self.folder / folder / "incoming"
        with open(incoming / oid, "wb") as whole:
            for part in sorted(body["parts"], key=lambda part: part["partNumber"]):
                content = (incoming / f"{oid}.parts" / f"{part['partNumber']:05d}").read_bytes()
                if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
                    raise _error(400, f"part {part['partNumber']} is not what was sent")
                whole.write(content)
        self._accept(incoming / oid, folder, body["oid"], int(request.query_params["size"]))
        shutil.rmtree(incoming / f"{oid}.parts")
        return JSONResponse({"success": True})

    def _accept(self, path: Path, folder: str, oid: str, size: int) -> None:
        content = path.read_bytes()
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            path.unlink()
            raise _error(400, f"{len(content)} bytes arrived whose SHA-256 is not {oid}, or which are not {size}")
        (self.folder / folder / "lfs").mkdir(exist_ok=True)
        os.replace(path, self.folder / folder / "lfs" / oid)

    async def get(self, request):
        """A signed link: whoever has it may read, without a token. Ranges are answered with 206."""
        path = self.folder / request.path_params["folder"] / "lfs" / request.path_params["oid"]
        return FileResponse(path, headers={"ETag": f'"{path.name}"'}, media_type="application/octet-stream")

    async def verify(self, request):
        repo, body = self._repo(request), await request.json()
        path = self.folder / repo.folder / "lfs" / body["oid"]
        if not path.exists() or path.stat().st_size != body["size"]:
            raise _error(404, f"LFS object {body['oid']} of {body['size']} bytes is not here")
        return JSONResponse({"success": True})

    async def commit(self, request):
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line]
        pull_request = request.query_params.get("create_pr") == "1"
        self._user(request, needed=True)
        repo, name = self._repo(request, write=not pull_request), unquote(request.path_params["revision"])
        parent = self._revision(request, repo)
        ref = name if name.startswith("refs/pr/") else f"refs/heads/{name}"
        if pull_request:
            ref = f"refs/pr/{1 + sum(other.startswith('refs/pr/') for other in repo.refs)}"
        elif ref not in repo.refs:
            raise _error(400, f"{name} is no branch")
        header, files = lines[0]["value"], dict(repo.commits[parent]["files"])
        if header.get("parentCommit", parent) != parent:
            raise _error(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            self._apply(repo, files, line["key"], line["value"])
        oid = self._commit(repo, ref, parent, files, header["summary"], header.get("description", ""))
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.endpoint}/{repo.url}/commit/{oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.endpoint}/{repo.url}/discussions/{ref.rpartition('/')[2]}"
        return JSONResponse(answer)

    def _apply(self, repo: Repo, files: dict, key: str, value: dict) -> None:
        """One line of a commit."""
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            if len(content) >= LFS_FROM:
                raise _error(400, f"{path} is too large for a regular file")
            files[path] = self._blob(repo, content)
        elif key == "lfsFile":
            stored = self.folder / repo.folder / "lfs" / value["oid"]
            if not stored.exists() or stored.stat().st_size != value.get("size", stored.stat().st_size):
                raise _error(400, f"{path}: LFS object {value['oid']} of this size is not here")
            size = stored.stat().st_size
            files[path] = {"oid": git_oid(_pointer(value["oid"], size)), "size": size, "lfs": value["oid"]}
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/" if key == "deletedFolder" else None
            gone = [name for name in files if name == path or (folder and name.startswith(folder))]
            if not gone:
                raise _error(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise _error(400, f"{key} is nothing this Hub can do")

    async def branch(self, request):
        repo, body = self._repo(request, write=True), await request.json()
        request.path_params["revision"] = body.get("startingPoint", "main")
        name = unquote(request.path_params["branch"])
        return self._new_ref(repo, f"refs/heads/{name}", self._revision(request, repo))

    async def tag(self, request):
        repo, body = self._repo(request, write=True), await request.json()
        return self._new_ref(repo, f"refs/tags/{body['tag']}", self._revision(request, repo))

    def _new_ref(self, repo: Repo, ref: str, commit: str):
        if ref in repo.refs:
            raise _error(409, f"Reference {ref} exists already")
        repo.refs[ref] = commit
        self._save(repo)
        return JSONResponse({"ref": ref, "targetCommit": commit})


def git_oid(content: bytes) -> str:
    """What git calls a file with this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _describe(path: str, entry: dict) -> dict:
    described = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
    if entry["lfs"]:
        pointer_size = len(_pointer(entry["lfs"], entry["size"]))
        described["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": pointer_size}
    return described


def _matches(path: str, patterns) -> bool:
    return any(fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(Path(path).name, pattern) for pattern in patterns)


def _front_matter(card: str) -> dict:
    if not card.startswith("---\n"):
        return {}
    return yaml.safe_load(card[4:].partition("\n---")[0]) or {}


async def _body(request) -> dict:
    """JSON, or a form: mirrors send `paths=a&paths=b`."""
    if "json" in request.headers.get("content-type", ""):
        return await request.json()
    form = parse_qs((await request.body()).decode())
    return {key: values[0] if len(values) == 1 else values for key, values in form.items()}


def _error(status: int, message: str, code: str | None = None, headers: dict | None = None) -> HTTPException:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
    return HTTPException(status, message, headers)


def _cut(request) -> None:
    """Closes the socket, as a dead router does; uvicorn offers no other way than its own object behind `receive`."""
    request.receive.__self__.transport.abort()


@contextlib.contextmanager
def mirror(hub: LocalHub, python: str, folder: Path):
    """The third-party mirror olah 0.5.4, run by the interpreter `python`, in front of a Hub; yields its address."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [python, "-m", "olah.server", "--host", "127.0.0.1", "--port", str(port), "--hf-scheme", "http"]
    command += ["--hf-netloc", f"127.0.0.1:{hub.port}", "--hf-lfs-netloc", f"localhost:{hub.port}"]
    command += ["--mirror-netloc", f"127.0.0.1:{port}", "--mirror-lfs-netloc", f"127.0.0.1:{port}"]
    command += ["--repos-path", str(folder / "repos"), "--log-path", str(folder / "logs")]
    with open(folder / "olah.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    with LocalHub(args.folder, port=args.port) as hub:
        print(f"HF_ENDPOINT={hub.endpoint} HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_write")
        threading.Event().wait()
