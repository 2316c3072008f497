"""A policy goes to a Hub whole or not at all, and comes back as it was."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from hub_server import LocalHub, mirror
from huggingface_hub import constants

import openvla
from openvla.hub_upload import remote, upload
from openvla.hub_upload.model_card import CardFacts, write_card
from openvla.hub_upload.proof import check_proof, published_files, write_proof

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub's own
TOKEN = "hf_" + "aB3" * 10  # nobody's


@pytest.fixture(scope="module")
def exported(checkpoint, processor, tmp_path_factory) -> Path:
    """A proven folder with several large files. Do not write."""
    folder = tmp_path_factory.mktemp("exported") / "policy"
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5MB")
    processor.save_pretrained(folder)
    write_card(folder, CardFacts(repo_id="lab/cup", license="mit"))
    write_proof(folder, {"passed": True})
    return folder


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy, to be changed."""
    return Path(shutil.copytree(exported, tmp_path / "policy"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, and huggingface_hub of this process pointed at it as HF_ENDPOINT does at its import."""
    with LocalHub(tmp_path / "hub", chunk_size=3_000_000) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
        monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        forget_sessions()
        yield hub
    forget_sessions()


@pytest.fixture
def impatient(monkeypatch):
    """Nobody waits before asking again."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def forget_sessions() -> None:
    """Of huggingface_hub, which decides when it makes one whether it is offline (0.x), and shares it."""
    from huggingface_hub import utils

    getattr(utils, "reset_sessions", None) and utils.reset_sessions()
    getattr(huggingface_hub, "close_session", lambda: None)()


def api(hub, token: str = "hf_write") -> huggingface_hub.HfApi:
    return huggingface_hub.HfApi(endpoint=hub.endpoint, token=token)


def assert_whole(hub, folder, commit, *others: str) -> None:
    """The commit holds the folder, byte by byte, beside `others`."""
    files = published_files(folder)
    assert set(commit["files"]) == {*files, ".gitattributes", *others}
    for path, file in files.items():
        assert hub.content("lab/cup", commit, path) == file.read_bytes(), path


def edit_card(folder, old: str = "", new: str = "", more: str = "") -> None:
    card = (folder / "README.md").read_text()
    assert old in card
    (folder / "README.md").write_text(card.replace(old, new) + more if old else card + more)


def change_weights(folder) -> str:
    """Another last shard, proven again. Returns its name."""
    shard = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    write_proof(folder, {"passed": True})
    return shard.name


# --- What arrives ---
def test_a_new_repository_is_private_whole_and_one_commit(hub, exported, capsys):
    upload.main(["lab/cup", str(exported), "--message", "First grasp", "--description", "From 50 episodes"])
    first, commit = hub.history("lab/cup")
    assert_whole(hub, exported, commit)
    assert set(first["files"]) == {".gitattributes"}
    assert (commit["title"], commit["description"]) == ("First grasp", "From 50 episodes")
    large = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(large) >= 3 and all(commit["files"][name]["lfs"] for name in large)
    assert not commit["files"]["config.json"]["lfs"]
    assert hub.count("put") > 0 and hub.count("put_part") >= 6 and hub.count("complete") >= 2  # whole and in parts
    assert hub.repos["models", "lab/cup"].private is True
    printed = capsys.readouterr().out
    assert f"published: {hub.endpoint}/lab/cup at {commit['oid']}" in printed
    assert printed.endswith('import openvla\nmodel, processor = openvla.load("lab/cup")\n')
    assert "sending by LFS" in printed


def test_an_unchanged_folder_makes_no_commit(hub, exported, capsys):
    upload.main(["lab/cup", str(exported)])
    capsys.readouterr()
    before = hub.count("put", "put_part", "commit", "batch")
    upload.main(["lab/cup", str(exported)])
    assert len(hub.history("lab/cup")) == 2 and hub.count("put", "put_part", "commit", "batch") == before
    assert f"unchanged: {hub.endpoint}/lab/cup at {hub.history('lab/cup')[-1]['oid']}" in capsys.readouterr().out


def test_only_what_changed_is_sent(hub, folder, capsys):
    upload.main(["lab/cup", str(folder)])
    puts = hub.count("put", "put_part")
    edit_card(folder, more="It grasps.\n")
    upload.main(["lab/cup", str(folder)])
    _, before, after = hub.history("lab/cup")
    assert {path for path in after["files"] if after["files"][path] != before["files"][path]} == {"README.md"}
    assert hub.count("put", "put_part") == puts
    assert_whole(hub, folder, after)
    name = change_weights(folder)
    capsys.readouterr()
    upload.main(["lab/cup", str(folder)])
    sent = [path for route, path in hub.requests if route in ("put", "put_part")][puts:]
    after = hub.history("lab/cup")[-1]
    assert sent and all(after["files"][name]["lfs"] in path for path in sent)
    assert re.findall(r"\[\d/\d\] \S+", capsys.readouterr().err) == [f"[1/1] {name}"]
    assert_whole(hub, folder, after)


def test_stale_weights_and_code_go_in_the_same_commit_and_nothing_else(hub, folder):
    upload.main(["lab/cup", str(folder)])
    kept = {"notes.md", "examples/run.py", "adapter/adapter_model.bin", "demo.png"}
    stale = {"model-00009-of-00009.safetensors", "old.safetensors.index.json", "pytorch_model.bin", "old_code.py"}
    hub.write("lab/cup", dict.fromkeys(kept | stale, b"of the old days"))
    change_weights(folder)
    upload.main(["lab/cup", str(folder)])
    history = hub.history("lab/cup")
    assert len(history) == 4
    assert_whole(hub, folder, history[-1], *kept)


def test_strangers_load_what_was_published(hub, exported, images, recorded, tmp_path):
    # The command and transformers as users run them: each in its own process, HF_ENDPOINT from outside
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_write"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def run(script, *arguments):
        command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    run("import sys; from openvla.hub_upload import upload; upload.main(sys.argv[1:])", "lab/cup", str(exported))
    images[0].save(tmp_path / "picture.png")
    environment["HF_HUB_DISABLE_XET"] = "1"
    script = """
        import sys; sys.modules["openvla"] = None
        import huggingface_hub, json, torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        processor = AutoProcessor.from_pretrained("lab/cup", trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained("lab/cup", trust_remote_code=True, dtype=torch.float32)
        action = model.eval().predict_action(**processor(sys.argv[2], sys.argv[1]), unnorm_key="bridge_orig")
        print(json.dumps([action.tolist(), type(model).__module__, huggingface_hub.snapshot_download("lab/cup")]))
    """
    entry = recorded["inputs"][0]
    action, module, snapshot = json.loads(run(script, str(tmp_path / "picture.png"), entry["prompt"]))
    np.testing.assert_allclose(action, entry["actions"]["bridge_orig"], atol=1e-6)
    assert module.startswith("transformers_modules.")
    for path, file in published_files(exported).items():
        assert (Path(snapshot) / path).read_bytes() == file.read_bytes(), path


@pytest.mark.slow
def test_a_third_party_mirror_reads_what_we_publish(hub, exported, tmp_path):
    python = os.environ.get("OPENVLA_OLAH_PYTHON")
    if not python:
        pytest.skip("OPENVLA_OLAH_PYTHON names no interpreter with olah 0.5.4")
    upload.main(["lab/cup", str(exported), "--public"])
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
    with mirror(hub, python, tmp_path / "mirror") as endpoint:
        script = "import huggingface_hub; print(huggingface_hub.snapshot_download('lab/cup'))"
        environment |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": ""}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + (tmp_path / "mirror" / "olah.log").read_text()[-4000:]
    for path, file in published_files(exported).items():
        assert (Path(done.stdout.strip()) / path).read_bytes() == file.read_bytes(), path
    assert hub.count("resolve") >= len(published_files(exported))


# --- Where it goes, who sees it ---
def test_visibility_changes_only_when_asked(hub, exported):
    repo_id = "lab/cup"
    upload.main([repo_id, str(exported), "--public"])
    assert hub.repos["models", repo_id].private is False
    upload.main([repo_id, str(exported)])
    assert hub.repos["models", repo_id].private is False
    upload.main([repo_id, str(exported), "--private"])
    assert hub.repos["models", repo_id].private is True
    upload.main([repo_id, str(exported)])
    assert hub.repos["models", repo_id].private is True
    upload.main([repo_id, str(exported), "--public"])
    assert hub.repos["models", repo_id].private is False
    assert len(hub.history(repo_id)) == 2


def test_a_branch_is_made_and_main_left_alone(hub, folder, capsys):
    upload.main(["lab/cup", str(folder), "--revision", "robot/left"])
    assert len(hub.history("lab/cup")) == 1
    assert_whole(hub, folder, hub.history("lab/cup", "refs/heads/robot/left")[-1])
    assert 'openvla.load("lab/cup", revision="robot/left")' in capsys.readouterr().out
    change_weights(folder)
    upload.main(["lab/cup", str(folder), "--revision", "robot/left"])
    history = hub.history("lab/cup", "refs/heads/robot/left")
    assert len(history) == 3 and len(hub.history("lab/cup")) == 1
    assert_whole(hub, folder, history[-1])


def test_a_tag_is_no_branch(hub, folder):
    upload.main(["lab/cup", str(folder), "--tag", "v1"])
    change_weights(folder)
    before = hub.count("put", "put_part", "branch", "commit")
    with pytest.raises(ValueError, match=r"v1 is a tag of lab/cup.*name a branch \(main, or a new one\)"):
        upload.main(["lab/cup", str(folder), "--revision", "v1"])
    assert hub.count("put", "put_part", "branch", "commit") == before and len(hub.history("lab/cup")) == 2


def test_an_interrupted_first_upload_leaves_nothing_public(hub, exported, impatient):
    seen = []
    hub.faults.meanwhile["commit"] = lambda: seen.append(hub.repos["models", "lab/cup"].private)
    hub.faults.errors["batch"] = 1000
    with pytest.raises(remote.HubError, match="Nothing was published on lab/cup"):
        upload.main(["lab/cup", str(exported), "--public"])
    assert hub.repos["models", "lab/cup"].private is True
    hub.faults.errors.clear()
    upload.main(["lab/cup", str(exported), "--public", "--space"])
    assert seen == [True] and hub.repos["models", "lab/cup"].private is False
    assert hub.repos["spaces", "lab/cup-demo"].private is False


def test_a_pull_request_is_open_to_strangers(hub, folder, monkeypatch, capsys):
    upload.main(["lab/cup", str(folder), "--public"])
    change_weights(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(remote.HubError, match="may not write to lab/cup.*Nothing was published on lab/cup"):
        upload.main(["lab/cup", str(folder)])
    upload.main(["lab/cup", str(folder), "--create-pr"])
    assert len(hub.history("lab/cup")) == 2
    assert_whole(hub, folder, hub.history("lab/cup", "refs/pr/1")[-1])
    assert f"proposed: {hub.endpoint}/lab/cup/discussions/1" in capsys.readouterr().out
    change_weights(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    upload.main(["lab/cup", str(folder), "--revision", "refs/pr/1"])  # further commits to the same
    assert len(hub.history("lab/cup", "refs/pr/1")) == 4
    assert_whole(hub, folder, hub.history("lab/cup", "refs/pr/1")[-1])
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(ValueError, match="nothing to propose to"):
        upload.main(["lab/nowhere", str(folder), "--create-pr"])


def test_a_tag_is_new_or_nothing_happens(hub, folder):
    upload.main(["lab/cup", str(folder), "--tag", "v1"])
    tagged = hub.repos["models", "lab/cup"].refs["refs/tags/v1"]
    assert tagged == hub.history("lab/cup")[-1]["oid"]
    upload.main(["lab/cup", str(folder), "--tag", "v1"])  # is there, of this very content
    change_weights(folder)
    with pytest.raises(ValueError, match=f"has a tag v1 already, of commit {tagged}"):
        upload.main(["lab/cup", str(folder), "--tag", "v1"])
    assert len(hub.history("lab/cup")) == 2 and hub.repos["models", "lab/cup"].refs["refs/tags/v1"] == tagged
    upload.main(["lab/cup", str(folder), "--tag", "v2"])
    assert hub.repos["models", "lab/cup"].refs["refs/tags/v2"] == hub.history("lab/cup")[-1]["oid"]


def test_a_space_shows_the_model(hub, exported, capsys):
    upload.main(["lab/cup", str(exported), "--space"])
    commit = hub.history("lab/cup-demo", kind="spaces")[-1]
    serve = Path(upload.__file__).parent.parent / "serve"
    files = {path: hub.content("lab/cup-demo", commit, path, "spaces") for path in commit["files"]}
    assert set(files) == {".gitattributes", "app.py", "drawing.py", "model_id.txt", "requirements.txt", "README.md"}
    assert files["model_id.txt"] == b"lab/cup\n" and files["app.py"] == (serve / "app.py").read_bytes()
    assert b"sdk: gradio\n" in files["README.md"] and b"\nmodels:\n- lab/cup\n" in files["README.md"]
    space = hub.repos["spaces", "lab/cup-demo"]
    assert space.private is True and space.sdk == "gradio"
    assert "secret HF_TOKEN" in capsys.readouterr().out
    upload.main(["lab/cup", str(exported), "--space", "lab/show", "--public"])
    assert hub.repos["spaces", "lab/show"].private is False and hub.repos["models", "lab/cup"].private is False
    assert len(hub.history("lab/cup")) == 2


# --- Looking first ---
READING = {"info", "tree", "refs", "preupload", "validate_yaml"}


def test_a_dry_run_of_a_new_repository(hub, exported, capsys):
    upload.main(["lab/cup", str(exported), "--dry-run", "--space"])
    printed = capsys.readouterr().out
    assert not hub.repos and {route for route, _ in hub.requests} <= READING
    assert "lab/cup · new repository · private" in printed and "lab/cup-demo · new repository" in printed
    rows = re.findall(r"^  (\w+) +(LFS|regular) +[\d.]+ \w?B  (\S+)$", printed.partition("files to publish")[0], re.M)
    assert {path for _, _, path in rows} == set(published_files(exported))
    assert all(how == ("LFS" if path.endswith(".safetensors") else "regular") for _, how, path in rows)
    assert printed.endswith("dry run: nothing was changed\n")


def test_a_dry_run_tells_what_would_change(hub, folder, capsys):
    upload.main(["lab/cup", str(folder)])
    hub.write("lab/cup", {"old.py": b"print()", "notes.md": b"keep"})
    shard = change_weights(folder)
    (folder / "extra.json").write_text("{}")
    write_proof(folder, {"passed": True})
    capsys.readouterr()
    before = len(hub.requests)
    upload.main(["lab/cup", str(folder), "--dry-run"])
    assert {route for route, _ in hub.requests[before:]} <= READING and len(hub.history("lab/cup")) == 3
    printed = capsys.readouterr().out
    rows = re.findall(r"^  (new|changed|unchanged|deleted) .*  (\S+)$", printed, re.M)
    expected = dict.fromkeys(published_files(folder), "unchanged")
    expected |= {shard: "changed", "extra.json": "new", "old.py": "deleted"}
    assert {path: state for state, path in rows} == expected
    size = remote.readable((folder / shard).stat().st_size + len("{}"))
    assert f"2 of {len(expected) - 1} files to publish, {size}; 1 to delete" in printed


# --- What is refused ---
def test_unproven_and_changed_folders_are_refused(hub, folder):
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    with pytest.raises(ValueError, match=r"changed since it was proven \(config.json\)"):
        upload.main(["lab/cup", str(folder)])
    (folder / ".proof.json").unlink()
    with pytest.raises(ValueError, match="has no proof that it acts"):
        upload.main(["lab/cup", str(folder)])
    assert not hub.requests


@pytest.mark.parametrize(
    "options, message",
    [
        (["cup"], "OWNER/NAME"),
        (["lab/cup", "--create-pr", "--tag", "v1"], "leave out the other options"),
        (["lab/cup", "--space", "--revision", "left"], "what is on main"),
        (["lab/cup", "--space", "lab/a/b"], "SPACE_ID is OWNER/NAME.*'lab/a/b'"),
        (["lab/cup", "--space", "show"], "SPACE_ID is OWNER/NAME.*'show'"),
        (["lab/cup", "--tag", "a b"], "--tag takes a name without blanks.*'a b'"),
        (["lab/cup", "--tag", "v1..2"], "--tag takes a name"),
        (["lab/cup", "--revision", "left~1"], "--revision takes a name"),
    ],
)
def test_options_that_contradict_each_other(options, message, hub, exported):
    with pytest.raises(ValueError, match=message):
        upload.main([options[0], str(exported), *options[1:]])
    assert not hub.requests


def test_the_card_is_checked_first(hub, folder):
    good = (folder / "README.md").read_text()
    edit_card(folder, "license: mit", "license: 5")  # the Hub's to find
    with pytest.raises(ValueError, match='metadata that the Hub refuses: "license" must be a str'):
        upload.main(["lab/cup", str(folder)])
    wrong = {
        "---\nlicense: [mit\n---\n": r"README.md has metadata that is not YAML: while parsing",
        "---\nlicense: mit\n---\n": r"README.md: pipeline_tag is None.*nothing about unnorm_key 'bridge_orig'",
        good + "![It](assets/gone.png)\n": r"README.md: it shows 'assets/gone.png', which is not there",
        good + f"HF_TOKEN={TOKEN}\n": r"README.md contains what looks like a token of the Hub \(hf_…\)",
        good.replace('"lab/cup"', '"lab/bowl"'): r"loads lab/bowl, not lab/cup: export again with `--repo-id lab/cup`",
    }
    for card, message in wrong.items():
        (folder / "README.md").write_text(card)
        with pytest.raises(ValueError, match=message) as refused:
            upload.main(["lab/cup", str(folder)])
        assert TOKEN not in str(refused.value)
    (folder / "README.md").write_bytes(good.encode() + "Grün".encode("latin-1"))
    with pytest.raises(ValueError, match=r"policy/README.md is not UTF-8 .*0xfc"):
        upload.main(["lab/cup", str(folder)])
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="has no README.md"):
        upload.main(["lab/cup", str(folder)])
    assert not hub.repos


def test_a_card_for_no_place_yet_is_published_with_a_note(hub, folder, capsys):
    edit_card(folder, '"lab/cup"', '"your-name/your-policy"')
    upload.main(["lab/cup", str(folder)])
    assert "says your-name/your-policy: `openvla export --repo-id lab/cup` would name it" in capsys.readouterr().out
    assert_whole(hub, folder, hub.history("lab/cup")[-1])


def test_only_pictures_of_the_card_are_published(hub, folder, capsys):
    (folder / "assets").mkdir()
    for name in ("shown.png", "with blank.png", "old.png", "notes.txt", ".hidden"):
        (folder / "assets" / name).write_bytes(name.encode() + TOKEN.encode() * (name == "notes.txt"))
    edit_card(folder, more='![It](assets/shown.png) <img src="assets/with%20blank.png">\n')
    upload.main(["lab/cup", str(folder)])
    commit = hub.history("lab/cup")[-1]
    assert {name for name in commit["files"] if "/" in name} == {"assets/shown.png", "assets/with blank.png"}
    assert hub.content("lab/cup", commit, "assets/shown.png") == b"shown.png"
    note = "note: README.md does not mention assets/notes.txt, assets/old.png: not published"
    assert note in capsys.readouterr().out
    edit_card(folder, more="See assets/notes.txt.\n")
    with pytest.raises(ValueError, match="assets/notes.txt contains what looks like a token"):
        upload.main(["lab/cup", str(folder)])
    assert len(hub.history("lab/cup")) == 2


def test_links_out_of_the_folder_are_refused(hub, folder, tmp_path):
    (tmp_path / "secret").write_text("of this machine")
    (folder / "inside.json").symlink_to("config.json")
    assert published_files(folder)["inside.json"].read_bytes() == (folder / "config.json").read_bytes()
    for link, target in (("notes.txt", tmp_path / "secret"), ("everything", tmp_path)):
        (folder / link).symlink_to(target)
        with pytest.raises(ValueError, match=f"{link} is a link to {target}, outside of the folder"):
            upload.main(["lab/cup", str(folder)])
        (folder / link).unlink()
    assert not hub.requests


@pytest.mark.parametrize("record", ["{}", "[]", '{"files": 3}', '{"files"'])
def test_what_is_no_proof_is_refused(record, folder):
    (folder / ".proof.json").write_text(record)
    with pytest.raises(ValueError, match=r".proof.json is no record .* export it again"):
        check_proof(folder)


def test_a_card_on_the_hub_can_be_kept(hub, folder):
    upload.main(["lab/cup", str(folder)])
    hub.write("lab/cup", {"README.md": b"---\nlicense: mit\n---\nBetter words.\n"})
    change_weights(folder)
    edit_card(folder, '"lab/cup"', '"lab/bowl"')  # would be refused if it were to be published
    upload.main(["lab/cup", str(folder), "--keep-card"])
    commit = hub.history("lab/cup")[-1]
    assert hub.content("lab/cup", commit, "README.md").endswith(b"Better words.\n")
    edit_card(folder, '"lab/bowl"', '"lab/cup"')
    upload.main(["lab/cup", str(folder)])
    assert_whole(hub, folder, hub.history("lab/cup")[-1])


def test_files_that_the_hub_would_ignore_are_refused(hub, exported):
    api(hub).create_repo("lab/cup")
    hub.write("lab/cup", {".gitignore": b"*.safetensors\n"})
    with pytest.raises(ValueError, match=r"\.gitignore that would leave out model-00001"):
        upload.main(["lab/cup", str(exported)])
    assert len(hub.history("lab/cup")) == 2 and not hub.count("put", "put_part", "commit")


@pytest.mark.parametrize(
    "token, message",
    [
        ("hf_read", "This token may only read"),
        ("hf_wrong", "refuses this token .* `hf auth login`"),
        ("hf_other", "may not write to lab/cup"),
        ("", "wants a token: log in with `hf auth login`, or give --token or HF_TOKEN"),
    ],
)
def test_tokens_that_do_not_do(token, message, hub, exported, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(remote.HubError, match=message):
        upload.main(["lab/cup", str(exported)])
    assert not hub.repos
    upload.main(["lab/cup", str(exported), "--token", "hf_write"])
    assert len(hub.history("lab/cup")) == 2


@pytest.mark.parametrize("given", ["hf_write ", "hf_write\n", " hf_write\r\n"])
def test_blanks_around_a_token_are_no_matter(given, hub, exported):
    upload.main(["lab/cup", str(exported), "--token", given])
    assert len(hub.history("lab/cup")) == 2


@pytest.mark.parametrize("given", [f"{TOKEN} x", f"{TOKEN}\r\nx", f"{TOKEN}\x00", f"{TOKEN}\u200b", f"é{TOKEN}"])
def test_tokens_that_cannot_be_are_not_printed(given, hub, exported, capsys):
    with pytest.raises(ValueError, match="The token has blanks, line ends or other characters") as refused:
        upload.main(["lab/cup", str(exported), "--token", given])
    captured = capsys.readouterr()
    assert TOKEN not in str(refused.value) + captured.out + captured.err
    assert not hub.requests


def test_no_message_tells_a_token(hub, capsys, impatient):
    broken = remote.Remote(api(hub, "hf_write"), "lab/cup")
    answers = iter([OSError(f"Illegal header b'Bearer hf_write' {TOKEN}"), OSError(f"again hf_write, {TOKEN}")] * 2)

    def ask():
        raise next(answers)

    with pytest.raises(remote.HubError, match="Illegal header b'Bearer hf_…' hf_…. Nothing was published") as stop:
        broken._ask(ask)
    printed = capsys.readouterr().err
    assert printed.splitlines()[1] == "OSError: again hf_…, hf_…; asking again in 8 s"
    assert all(token not in printed + str(stop.value) for token in ("hf_write", TOKEN))


def test_a_space_that_cannot_be_is_refused_before_the_model_is_published(hub, exported):
    api(hub, "hf_other").create_repo("stranger/show", repo_type="space", space_sdk="gradio", private=False)
    with pytest.raises(remote.HubError, match="may not write to stranger/show"):
        upload.main(["lab/cup", str(exported), "--space", "stranger/show"])
    with pytest.raises(remote.HubError, match="may not make .*/spaces/stranger/new.* it is lab's.* not as stranger"):
        upload.main(["lab/cup", str(exported), "--space", "stranger/new"])
    assert ("models", "lab/cup") not in hub.repos and not hub.count("put", "put_part")


def test_a_change_by_somebody_else_is_not_overwritten(hub, folder):
    upload.main(["lab/cup", str(folder)])
    change_weights(folder)
    hub.faults.meanwhile["commit"] = lambda: hub.write("lab/cup", {"README.md": b"mine"})
    with pytest.raises(remote.HubError, match="Somebody else changed lab/cup"):
        upload.main(["lab/cup", str(folder)])
    *_, before, theirs = hub.history("lab/cup")
    assert len(hub.history("lab/cup")) == 3 and hub.content("lab/cup", theirs, "README.md") == b"mine"


# --- What breaks ---
def test_one_broken_connection_is_no_matter(hub, exported, impatient):
    hub.faults.cut_from, hub.faults.cuts = 3, 1
    hub.faults.errors = {"create": 1, "preupload": 1, "batch": 1, "complete": 1, "commit": 1, "tree": 1}
    upload.main(["lab/cup", str(exported)])
    assert len(hub.history("lab/cup")) == 2
    assert_whole(hub, exported, hub.history("lab/cup")[-1])


@pytest.mark.parametrize("fault", ["cut", "errors in batch", "errors in commit", "token"])
def test_after_a_broken_upload_the_rest_is_sent(fault, hub, exported, impatient):
    large = sorted(exported.glob("*.safetensors"))
    if fault == "cut":
        hub.faults.cut_from, hub.faults.cuts = 4, 1000
        message = r"(ConnectionError|ReadError|WriteError|RemoteProtocolError|Connection).*"
    elif fault == "token":
        # one request later, in the middle of the second file
        hub.faults.meanwhile["complete"] = lambda: setattr(hub.faults, "token_requests", 1)
        message = "refuses this token"
    else:
        route = fault.split()[-1]
        hub.faults.errors[route] = 1000
        message = r"the Hub has a problem \(status 500\)"
    with pytest.raises(remote.HubError, match=message) as stop:
        upload.main(["lab/cup", str(exported)])
    done = re.search(
        rf"run the same command again: (\d) of {len(large)} large files are already there", str(stop.value)
    )
    assert "Nothing was published on lab/cup" in str(stop.value) and done
    assert int(done[1]) == {"errors in batch": 0, "errors in commit": len(large)}.get(fault, 1)
    assert len(hub.history("lab/cup")) == 1  # main shows no part of it
    stored = {path.name for path in (hub.folder / "models--lab--cup" / "lfs").glob("*")}
    assert len(stored) >= int(done[1])

    hub.faults = type(hub.faults)()
    before = len(hub.requests)
    upload.main(["lab/cup", str(exported)])
    sent = [path for route, path in hub.requests[before:] if route in ("put", "put_part")]
    assert not any(name in path for name in stored for path in sent)
    assert len(hub.history("lab/cup")) == 2
    assert_whole(hub, exported, hub.history("lab/cup")[-1])


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, exported, impatient):
    hub.faults.lost["commit"] = 1
    upload.main(["lab/cup", str(exported)])
    assert len(hub.history("lab/cup")) == 2 and hub.count("commit") == 1


def test_what_the_hub_shows_afterwards_is_compared(hub, exported):
    def corrupt():
        hub.history("lab/cup")[-1]["files"]["tokenizer.json"]["oid"] = "0" * 40

    # after the commit is the first look at the tree that counts
    hub.faults.meanwhile["commit"] = lambda: hub.faults.meanwhile.update(tree=corrupt)
    with pytest.raises(remote.HubError, match=r"is not what was sent \(tokenizer.json\)"):
        upload.main(["lab/cup", str(exported)])


def test_no_way_to_the_hub(hub, exported, impatient, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    with pytest.raises(remote.HubError, match="offline mode is enabled.*Nothing was published on lab/cup"):
        upload.main(["lab/cup", str(exported)])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    forget_sessions()
    with pytest.raises(remote.HubError, match="http://127.0.0.1:9: ConnectionError|http://127.0.0.1:9: ConnectError"):
        upload.main(["lab/cup", str(exported)])
    assert not hub.requests


def test_a_tag_that_fails_says_that_the_commit_is_there(hub, exported, impatient):
    hub.faults.errors["tag"] = 1000
    with pytest.raises(remote.HubError, match="Commit [0-9a-f]{40} is published; run the same command again"):
        upload.main(["lab/cup", str(exported), "--tag", "v1"])
    hub.faults.errors.clear()
    upload.main(["lab/cup", str(exported), "--tag", "v1"])
    assert hub.repos["models", "lab/cup"].refs["refs/tags/v1"] == hub.history("lab/cup")[-1]["oid"]
    assert len(hub.history("lab/cup")) == 2
