"""A repository on the Hub: what it holds, what a change would do to it, and the one commit that makes it.

Every question to the Hub is asked again where that may help; what then went wrong is told with what it leaves behind.
"""

import base64
import fnmatch
import hashlib
import io
import re
import sys
import time
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

WAITS = (2, 8)  # seconds before asking again; huggingface_hub itself asks up to six times while it sends large files
NEW, CHANGED, UNCHANGED, DELETED = "new", "changed", "unchanged", "deleted"
TOKEN = r"hf_[A-Za-z0-9]{20,}"  # what a token of the Hub looks like
LFS_SUFFIXES, LFS_SIZE = (".safetensors", ".bin", ".model"), 10_000_000  # the Hub's rule, for repositories yet to come


class HubError(RuntimeError):
    """The Hub did not do what it was asked; says why, what that leaves behind, and what to do."""


class File:
    """One file to publish. `content`: bytes, or where to read them."""

    def __init__(self, content: Path | bytes, sha256: str | None = None):
        self.content = content
        if sha256:
            self.sha256 = sha256

    def open(self) -> io.BufferedIOBase:
        return io.BytesIO(self.content) if isinstance(self.content, bytes) else open(self.content, "rb")

    def read(self, size: int = -1) -> bytes:
        with self.open() as file:
            return file.read(size)

    @cached_property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return self._digest(hashlib.sha256())

    @cached_property
    def git_oid(self) -> str:
        """What git calls a file with this content."""
        return self._digest(hashlib.sha1(b"blob %d\0" % self.size))

    def is_in(self, entry) -> bool:
        """Whether an entry of the Hub's tree has this content."""
        if entry is None or entry.size != self.size:
            return False
        return entry.lfs.sha256 == self.sha256 if entry.lfs else entry.blob_id == self.git_oid

    def _digest(self, digest) -> str:
        with self.open() as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()


class Remote:
    """A branch of a repository on the Hub, as it was when last looked at.

    Args:
        kind: "model" or "space".
        create_pr: changes become a pull request against `branch`.

    `commit` is None if there is no such repository, `has_branch` says whether there is such a branch; if not, `files`
    are those of main. `private` is None if there is no such repository.
    """

    def __init__(self, api, repo_id: str, kind: str = "model", branch: str = "main", create_pr: bool = False):
        self.api, self.id, self.kind, self.branch, self.create_pr = api, repo_id, kind, branch, create_pr
        self.where = {"repo_id": repo_id, "repo_type": kind}
        self.num_sent, self.num_large, self.published = 0, 0, None
        self.look()

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{'' if self.kind == 'model' else 'spaces/'}{self.id}"

    def look(self) -> None:
        from huggingface_hub.errors import RepositoryNotFoundError

        self.commit, self.private, self.files, self.tags = None, None, {}, {}
        main = self._ask(self.api.repo_info, **self.where, missing=RepositoryNotFoundError)
        self.has_branch = False
        if main is None:
            return
        refs = self._ask(self.api.list_repo_refs, **self.where, include_pull_requests=True)
        branches = {branch.name: branch.target_commit for branch in refs.branches}
        branches |= {pull.ref: pull.target_commit for pull in refs.pull_requests or []}  # refs/pr/1
        self.tags = {tag.name: tag.target_commit for tag in refs.tags}
        if self.branch in self.tags.keys() - branches.keys():  # the Hub would take it for a revision as well
            raise ValueError(
                f"{self.branch} is a tag of {self.id}, and tags stay where they are: name a branch "
                f"({', '.join(sorted(branches))}, or a new one)."
            )
        self.has_branch = self.branch in ("main", *branches)
        self.commit = main.sha if self.branch == "main" else branches.get(self.branch, main.sha)
        self.private = main.private
        self.files = self._tree(self.commit)

    def states(self, files: dict[str, File], stale: tuple[str, ...] = ()) -> dict[str, str]:
        """`{path: "new", "changed", "unchanged" or "deleted"}` of what is to be published and what is in its way."""
        states = {}
        for path, file in files.items():
            entry = self.files.get(path)
            states[path] = NEW if entry is None else UNCHANGED if file.is_in(entry) else CHANGED
        for path in self.files.keys() - files.keys():
            if "/" not in path and any(fnmatch.fnmatchcase(path, pattern) for pattern in stale):
                states[path] = DELETED
        return dict(sorted(states.items()))

    def large(self, files: dict[str, File]) -> set[str]:
        """Which files the Hub keeps as large ones. Raises if its `.gitignore` would drop any of them."""
        if self.commit is None:
            return {path for path, file in files.items() if path.endswith(LFS_SUFFIXES) or file.size >= LFS_SIZE}
        branch, answers, names = self.branch if self.has_branch else "main", [], list(files)
        route = f"{self.kind}s/{self.id}/preupload/{quote(branch, safe='')}{'?create_pr=1' if self.create_pr else ''}"
        for start in range(0, len(names), 256):
            body = {"files": []}
            for path in names[start : start + 256]:
                sample = base64.b64encode(files[path].read(512)).decode()
                body["files"].append({"path": path, "size": files[path].size, "sample": sample})
            answers += self._post(route, body)["files"]
        if ignored := [answer["path"] for answer in answers if answer.get("shouldIgnore")]:
            raise ValueError(f"{self.id} has a .gitignore that would leave out {', '.join(ignored)}: change it first.")
        return {answer["path"] for answer in answers if answer["uploadMode"] == "lfs"}

    def check_card(self, text: str) -> None:
        """Has the Hub validate the card's metadata. Raises ValueError with what is wrong."""
        answer = self._post("validate-yaml", {"content": text, "repoType": self.kind}, accept=(400,))
        for warning in answer.get("warnings", []):
            print(f"note: README.md: {warning.get('message')}", file=sys.stderr)
        if errors := [str(error.get("message")) for error in answer.get("errors", [])]:
            raise ValueError(f"README.md has metadata that the Hub refuses: {'; '.join(errors)}")

    def check_token(self) -> None:
        """Raises if nobody is logged in, or somebody who may only read: better now than after hours of sending."""
        if not self.api.token:
            raise HubError(
                f"{self.api.endpoint} wants a token: log in with `hf auth login`, or give --token or HF_TOKEN."
            )
        user = self._ask(self.api.whoami)
        if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise HubError(
                f"This token may only read: make one that may write at {self.api.endpoint}/settings/tokens."
            )

    def check_owner(self) -> None:
        """Raises if the repository is yet to be made, in the name of somebody else."""
        user = self._ask(self.api.whoami)
        names = [user["name"], *(organization["name"] for organization in user.get("orgs", []))]
        owner = self.id.partition("/")[0]
        if self.commit is None and owner.lower() not in map(str.lower, names):
            raise HubError(
                f"This token may not make {self.url}, which is not there (or not for it to see): it is {names[0]}'s, "
                f"who may write as {', '.join(names)}, not as {owner}."
            )

    def prepare(self, private: bool | None) -> bool:
        """Makes repository and branch if they are missing, and a public repository private; returns if it was new.

        A new one is private in any case, until what belongs into it is there: see `make_public`.
        """
        is_new = self.commit is None
        if is_new:
            sdk = {"space_sdk": "gradio"} if self.kind == "space" else {}
            self._ask(self.api.create_repo, **self.where, private=True, exist_ok=True, **sdk)
            self.look()
        elif private and not self.private:
            self._ask(self.api.update_repo_settings, **self.where, private=True)
            self.private = True
        if not self.has_branch:
            self._ask(self.api.create_branch, **self.where, branch=self.branch, exist_ok=True)
            self.look()
        return is_new

    def push(
        self, files: dict[str, File], states: dict[str, str], large: set[str], message: str, description: str
    ) -> str | None:
        """Sends what is new or changed, commits it at once, reads it back. Returns the URL of the pull request."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants

        patient = constants.HF_HUB_DISABLE_XET  # Xet has its own patience, of many minutes
        additions = {
            path: CommitOperationAdd(path, str(file.content) if isinstance(file.content, Path) else file.content)
            for path, file in files.items()
            if states[path] in (NEW, CHANGED)
        }
        self.num_sent, self.num_large = 0, len(large & additions.keys())
        where = {**self.where, "revision": self.branch, "create_pr": self.create_pr}
        for path in sorted(large & additions.keys()):
            print(f"[{self.num_sent + 1}/{self.num_large}] {path}  {readable(files[path].size)}", file=sys.stderr)
            send = {"additions": [additions[path]], "free_memory": False, **where}
            self._ask(self.api.preupload_lfs_files, patient=patient, **send)
            self.num_sent += 1
        deletions = [CommitOperationDelete(path) for path, state in states.items() if state == DELETED]
        commit, pull_request = self._commit(
            operations=[*deletions, *additions.values()],
            commit_message=message,
            commit_description=description,
            parent_commit=self.commit,
            **where,
        )
        self.commit = self.published = commit
        self._verify(files, [path for path, state in states.items() if state == DELETED])
        return pull_request

    def _commit(self, **commit) -> tuple[str, str | None]:
        attempts = []

        def attempt():
            if attempts:  # perhaps only the answer was lost; if it is another's commit, the files will differ
                head = self.api.repo_info(**self.where, revision=self.branch).sha
                if head != self.commit:
                    return head, None
            attempts.append(1)
            done = self.api.create_commit(**commit)
            return done.oid, done.pr_url

        return self._ask(attempt, patient=not self.create_pr)  # a second try may open a second pull request

    def _verify(self, files: dict[str, File], deleted: list[str]) -> None:
        tree = self._tree(self.published)
        wrong = [path for path, file in files.items() if not file.is_in(tree.get(path))]
        wrong += [path for path in deleted if path in tree]
        if wrong:
            raise HubError(
                f"{self.url} at {self.published} is not what was sent ({', '.join(wrong[:5])}): "
                f"look at its history, then run the same command again."
            )

    def tag(self, name: str) -> None:
        if name not in self.tags:
            self._ask(self.api.create_tag, **self.where, tag=name, revision=self.commit)

    def make_public(self) -> None:
        self._ask(self.api.update_repo_settings, **self.where, private=False)
        self.private = False

    # --- Asking, and saying what went wrong ---
    def _tree(self, commit: str) -> dict:
        entries = self._ask(lambda: list(self.api.list_repo_tree(**self.where, revision=commit, recursive=True)))
        return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}

    def _post(self, route: str, body: dict, accept: tuple[int, ...] = ()) -> dict:
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def post():
            headers = build_hf_headers(token=self.api.token)
            response = get_session().post(f"{self.api.endpoint}/api/{route}", json=body, headers=headers)
            if response.status_code not in accept:
                hf_raise_for_status(response)
            return response.json()

        return self._ask(post)

    def _ask(self, call, missing: type | None = None, patient: bool = True, **arguments):
        """What the Hub answers; None if it says that the `missing` thing is not there. Asks again if that may help."""
        waits = list(WAITS) if patient else []
        while True:
            try:
                return call(**arguments)
            except _hub_errors() as error:
                anonymous = _status(error) == 401 and not self.api.token  # so the Hub says "not there" to strangers
                if missing and isinstance(error, missing) and (_status(error) == 404 or anonymous):
                    return None
                if not waits or not _may_pass(error):
                    raise HubError(self._explain(error)) from error
                print(f"{self._hide_token(_cause(error))}; asking again in {waits[0]} s", file=sys.stderr)
                time.sleep(waits.pop(0))

    def _hide_token(self, text: str) -> str:
        text = text.replace(self.api.token, "hf_…") if self.api.token else text
        return re.sub(TOKEN, "hf_…", text)

    def _explain(self, error: BaseException) -> str:
        status = _status(error)
        if status == 401:
            which = "refuses this token (mistyped or expired)" if self.api.token else "wants a token"
            reason = f"{self.api.endpoint} {which}: log in with `hf auth login`, or give --token or HF_TOKEN."
        elif status == 403:
            reason = (
                f"This token may not write to {self.id}: make one that may at {self.api.endpoint}/settings/tokens."
            )
        elif status == 404:
            reason = f"{self.id} is not there, or this token may not see it."
        elif status == 412:
            reason = f"Somebody else changed {self.id} in the meantime: look at {self.url}/commits/{self.branch}."
        else:
            reason = f"{self.api.endpoint}: {self._hide_token(_cause(error))}."
        if self.published:
            return f"{reason} Commit {self.published} is published; run the same command again to do the rest."
        if self.create_pr and _may_pass(error) and self.num_sent == self.num_large:
            return f"{reason} The pull request may be there nevertheless: look at {self.url}/discussions."
        there = f": {self.num_sent} of {self.num_large} large files are already there" if self.num_large else ""
        return f"{reason} Nothing was published on {self.id}; run the same command again{there}."


def _hub_errors() -> tuple[type, ...]:
    """requests' errors (huggingface_hub 0.x) are OSErrors, httpx's (1 and later) share a base with HfHubHTTPError."""
    from huggingface_hub.errors import HfHubHTTPError

    return (RuntimeError, OSError, *HfHubHTTPError.__bases__)


def _chain(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that is behind an error; None if there was no answer."""
    responses = (getattr(link, "response", None) for link in _chain(error))
    return next((response.status_code for response in responses if response is not None), None)


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    if (status := _status(error)) is not None:
        return status >= 500 or status in (408, 429)
    return not any(
        isinstance(link, (OfflineModeIsEnabled, FileNotFoundError, PermissionError)) for link in _chain(error)
    )


def _cause(error: BaseException) -> str:
    """The first line of what is behind an error."""
    if (status := _status(error)) is not None and status >= 500:
        return f"the Hub has a problem (status {status})"
    links = list(_chain(error))
    link = links[1] if isinstance(error, RuntimeError) and len(links) > 1 else error  # "Error while uploading …"
    text = getattr(link, "server_message", None) or str(link)
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return f"{type(link).__name__}: {line}".rstrip(".: ") if status is None else line.rstrip(".")


def readable(size: int) -> str:
    """Bytes as people read them: 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
