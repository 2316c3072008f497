"""The Hub for tests is no yes-man: what it would let pass, the tests of `openvla upload` could not find."""

import hashlib
import json
import urllib.error
import urllib.request

import pytest
from hub_server import LocalHub, git_oid


def ask(url, method="GET", body=None, token="hf_write", **headers):
    """`(status, headers, content)`; redirects are not followed."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_):
            return None

    if token:
        headers["Authorization"] = f"Bearer {token}"
    if isinstance(body, (dict, list)):
        lines = body if isinstance(body, list) else [body]
        body, headers["Content-Type"] = "\n".join(map(json.dumps, lines)).encode(), "application/json"
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        answer = urllib.request.build_opener(Stay).open(request)
    except urllib.error.HTTPError as error:
        answer = error
    return answer.status, answer.headers, answer.read()


@pytest.fixture
def hub(tmp_path):
    with LocalHub(tmp_path / "hub") as hub:
        ask(f"{hub.endpoint}/api/repos/create", "POST", {"name": "cup", "organization": "lab", "private": True})
        yield hub


def send(hub, content: bytes, claimed: bytes | None = None) -> tuple[int, str]:
    """Uploads a large file as what `claimed` is; returns the status and the object's id."""
    oid = hashlib.sha256(claimed or content).hexdigest()
    wanted = {"objects": [{"oid": oid, "size": len(content)}], "ref": {"name": "main"}}
    _, _, answer = ask(f"{hub.endpoint}/lab/cup.git/info/lfs/objects/batch", "POST", wanted)
    (described,) = json.loads(answer)["objects"]
    return ask(described["actions"]["upload"]["href"], "PUT", content, token=None)[0], oid


def commit(hub, *lines, parent: str | None = None):
    header = {"summary": "a commit", **({"parentCommit": parent} if parent else {})}
    lines = [{"key": "header", "value": header}, *({"key": key, "value": value} for key, value in lines)]
    return ask(f"{hub.endpoint}/api/models/lab/cup/commit/main", "POST", lines)


def test_large_files_must_be_what_they_claim(hub):
    status, oid = send(hub, b"what came", claimed=b"not this ")
    assert status == 400
    status, _, answer = commit(hub, ("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 9}))
    assert status == 400 and b"is not here" in answer
    status, oid = send(hub, b"what came")
    assert status == 200
    assert commit(hub, ("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 8}))[0] == 400
    assert len(hub.history("lab/cup")) == 1
    assert commit(hub, ("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid, "size": 9}))[0] == 200
    assert hub.content("lab/cup", hub.history("lab/cup")[-1], "a.bin") == b"what came"


def test_commits_build_on_the_newest(hub):
    first = hub.history("lab/cup")[0]["oid"]
    addition = ("file", {"path": "a.txt", "content": "aGk=", "encoding": "base64"})
    assert commit(hub, addition, parent=first)[0] == 200
    assert commit(hub, addition, parent=first)[0] == 412
    assert commit(hub, addition, ("deletedFile", {"path": "b.txt"}))[0] == 404
    assert len(hub.history("lab/cup")) == 2
    assert hub.history("lab/cup")[-1]["files"]["a.txt"]["oid"] == git_oid(b"hi")
    assert git_oid(b"hi") == "32f95c0d1244a78b2be1bab8de17906fabb2c4a8"  # `printf hi | git hash-object --stdin`


def test_private_repositories_do_not_exist_for_others(hub):
    url = f"{hub.endpoint}/api/models/lab/cup"
    assert ask(url)[0] == ask(url, token="hf_read")[0] == 200
    assert ask(url, token="hf_wrong")[0] == 401
    for token in (None, "hf_other"):
        status, headers, _ = ask(url, token=token)
        assert status == 404 and headers["X-Error-Code"] == "RepoNotFound"
    assert ask(f"{hub.endpoint}/api/models/lab/cup/settings", "PUT", {"private": False}, token="hf_read")[0] == 403


def test_files_survive_a_restart_and_are_read_in_pieces(hub):
    _, oid = send(hub, b"0123456789")
    assert commit(hub, ("lfsFile", {"path": "a.bin", "algo": "sha256", "oid": oid}))[0] == 200
    head = hub.history("lab/cup")[-1]["oid"]
    with LocalHub(hub.folder) as again:
        status, headers, _ = ask(f"{again.endpoint}/lab/cup/resolve/main/a.bin", "HEAD")
        assert status == 302 and headers["Location"].startswith(f"http://localhost:{again.port}/")
        assert (headers["X-Repo-Commit"], headers["X-Linked-Size"]) == (head, "10")
        assert headers["X-Linked-ETag"] == f'"{oid}"'
        status, _, content = ask(headers["Location"], token=None, Range="bytes=4-")
        assert (status, content) == (206, b"456789")
        status, headers, _ = ask(f"{again.endpoint}/lab/cup/resolve/main/b.bin")
        assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", head)
