"""Publishes an exported folder on the Hub: all of it in one commit, or nothing.

openvla upload lab/pick-cup runs/cup/export --dry-run
openvla upload lab/pick-cup runs/cup/export
openvla upload lab/pick-cup runs/cup/export --public --tag v1.0 --space
openvla upload openvla/openvla-7b runs/openvla-7b --create-pr --message "Code for transformers 5"

A new repository is private unless `--public` is given, and even then until all is there: what was public once may have
been copied. Large files go first and the commit that names them last, so that nobody ever finds half a policy; run the
same command again after a broken connection, and what is there already is not sent again. Old weights and code
(*.safetensors, *.bin, their indices and *.py in the root of the repository) that the folder does not have are deleted
in the same commit, nothing else is.
"""

import os
import re
from pathlib import Path

from openvla.cli import command_parser
from openvla.hub_upload.proof import check_proof, published_files
from openvla.hub_upload.remote import CHANGED, DELETED, NEW, TOKEN, UNCHANGED, File, Remote, readable

REPO_ID = r"[\w.-]+/[\w.-]+"
STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.py")  # in the root only
SPACE_CODE = ("app.py", "drawing.py")  # of `openvla.serve`
SPACE_README = """---
title: {title}
emoji: 🤖
colorFrom: gray
colorTo: yellow
sdk: gradio
sdk_version: 6.31.0
app_file: app.py
models:
- {model_id}
tags:
- robotics
- openvla
---

Shows what [{model_id}](https://huggingface.co/{model_id}) would do: an image and an instruction in, a motion out.
"""
SPACE_REQUIREMENTS = ("torch", "transformers>=4.57.6,<6", "numpy", "pillow", "pandas")  # and gradio, by `sdk`


def differs(states: dict[str, str]) -> bool:
    """Whether there is anything to commit."""
    return any(state != UNCHANGED for state in states.values())


def describe(remote: Remote, files: dict[str, File], states: dict[str, str], large: set[str], private: bool) -> str:
    """The plan as a table: one line per file, then what will be sent."""
    state = "new repository" if remote.commit is None else remote.branch + ("" if remote.has_branch else " (new)")
    visibility = "private" if private else "public"
    lines = [f"{remote.id} · {state} · {visibility}" + (" · as a pull request" if remote.create_pr else "")]
    for path, what in states.items():
        size = files[path].size if path in files else remote.files[path].size
        how = "" if what == DELETED else "LFS" if path in large else "regular"
        lines.append(f"  {what:<10}{how:<9}{readable(size):>9}  {path}")
    sent = [path for path, what in states.items() if what in (NEW, CHANGED)]
    num_deleted = sum(what == DELETED for what in states.values())
    size = readable(sum(files[path].size for path in sent))
    return "\n".join([*lines, f"{len(sent)} of {len(files)} files to publish, {size}; {num_deleted} to delete"])


def space_files(model_id: str) -> dict[str, bytes]:
    """`{path: content}` of a Gradio Space that shows a model: this package's demo, its helpers, and what it needs."""
    serve = Path(__file__).parent.parent / "serve"
    files = {name: (serve / name).read_bytes() for name in SPACE_CODE}
    files["model_id.txt"] = f"{model_id}\n".encode()
    files["requirements.txt"] = "".join(f"{line}\n" for line in SPACE_REQUIREMENTS).encode()
    files["README.md"] = SPACE_README.format(title=model_id.rpartition("/")[2], model_id=model_id).encode()
    return files


def parser():
    arguments = command_parser("upload", __doc__)
    arguments.add_argument("repo_id", metavar="REPO_ID", help="OWNER/NAME on the Hub; made if it is not there")
    arguments.add_argument("folder", metavar="FOLDER", type=Path, help="what `openvla export` wrote")
    visibility = arguments.add_mutually_exclusive_group()
    visibility.add_argument("--private", action="store_true", default=None, help="a new repository's default")
    visibility.add_argument("--public", dest="private", action="store_false", help="for everybody to see")
    arguments.add_argument("--revision", metavar="BRANCH", help="branch, made from main if it is not there")
    arguments.add_argument("--create-pr", action="store_true", help="propose it as a pull request")
    arguments.add_argument("--message", help="the commit's first line")
    arguments.add_argument("--description", default="", help="the commit's further lines")
    arguments.add_argument("--tag", metavar="NAME", help="also tag the commit; the tag must be new")
    arguments.add_argument("--keep-card", action="store_true", help="leave a README.md that is on the Hub as it is")
    arguments.add_argument(
        "--space", metavar="SPACE_ID", nargs="?", const="", help="also publish a demo; default id: REPO_ID-demo"
    )
    arguments.add_argument(
        "--dry-run", action="store_true", help="list what would happen to each file, change nothing"
    )
    arguments.add_argument("--token", help="default: HF_TOKEN, or that of `hf auth login`")
    return arguments


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    for what, given in (("REPO_ID", args.repo_id), ("SPACE_ID", args.space)):
        if (given or what == "REPO_ID") and not re.fullmatch(REPO_ID, given):
            raise ValueError(f"{what} is OWNER/NAME, as in lab/pick-cup; got {given!r}.")
    for option, given in (("--tag", args.tag), ("--revision", args.revision)):
        if given is not None and (".." in given or not re.fullmatch(r"\w[\w./+-]*", given)):
            raise ValueError(f"{option} takes a name without blanks and special characters, as v1.0; got {given!r}.")
    if args.create_pr and (args.revision or args.tag or args.space is not None or args.private is not None):
        raise ValueError("--create-pr proposes files for main, nothing else: leave out the other options.")
    if args.space is not None and args.revision:
        raise ValueError("A Space shows what is on main: leave out --space or --revision.")
    if not args.folder.is_dir():
        raise ValueError(f"{args.folder} is no folder.")

    # 1. What is here, what is there; all that can be refused is refused before anything is sent
    digests = check_proof(args.folder)["files"]
    files = {path: File(file, digests.get(path)) for path, file in published_files(args.folder).items()}
    check_assets(args.folder, files)
    api = connect(args.token)
    model = Remote(api, args.repo_id, branch=args.revision or "main", create_pr=args.create_pr)
    if not args.dry_run:
        model.check_token()
    if args.create_pr and model.commit is None:
        raise ValueError(f"{args.repo_id} is not there, or not for this token to see: there is nothing to propose to.")
    if args.keep_card and "README.md" in model.files:
        files.pop("README.md", None)
    elif "README.md" not in files:
        raise ValueError(f"{args.folder} has no README.md: a model without a card is neither found nor understood.")
    else:
        model.check_card(check_card(args.folder, args.repo_id))
    tagged = model.tags.get(args.tag)
    if tagged and (tagged != model.commit or differs(model.states(files, STALE))):
        raise ValueError(f"{args.repo_id} has a tag {args.tag} already, of commit {tagged}: choose another.")
    if args.space is not None:
        space = Remote(api, args.space or f"{args.repo_id}-demo", "space")
        demo = {path: File(content) for path, content in space_files(args.repo_id).items()}
        space.large(demo)  # raises if it is there and this token may not write to it
        if not args.dry_run:
            space.check_owner()

    # 2. The policy, then what points to it
    pull_request = publish(model, files, STALE, args, args.message or "Upload policy with openvla")
    if args.tag and not args.dry_run:
        model.tag(args.tag)
    if args.space is not None:
        publish(space, demo, (), args, f"Show {args.repo_id}")
    if args.dry_run:
        print("dry run: nothing was changed")
        return
    if args.space is not None and model.private:
        print(f"note: the model is private: give {space.url}/settings a secret HF_TOKEN that may read it")
    if not pull_request:
        revision = "" if model.branch == "main" else f', revision="{model.branch}"'
        print(f'\nimport openvla\nmodel, processor = openvla.load("{model.id}"{revision})')


def connect(token: str | None):
    """huggingface_hub's client, with the token that will be used in `api.token`."""
    import huggingface_hub
    from huggingface_hub import constants

    # Read at call time by huggingface_hub 0.36 and 2.4, so this is early enough wherever it was imported before.
    if constants.ENDPOINT != "https://huggingface.co" and "HF_HUB_DISABLE_XET" not in os.environ:
        print(f"note: {constants.ENDPOINT} may not have Xet: sending by LFS (HF_HUB_DISABLE_XET=0 for Xet)")
        constants.HF_HUB_DISABLE_XET = True
    token = (token or "").strip() or (huggingface_hub.get_token() or "").strip()
    if token and not re.fullmatch("[!-~]+", token):  # whatever sends it would show it in its complaint
        raise ValueError(
            "The token has blanks, line ends or other characters inside that no token has: copy it again from "
            f"{constants.ENDPOINT}/settings/tokens."
        )
    return huggingface_hub.HfApi(token=token or False, library_name="openvla")


def check_assets(folder: Path, files: dict[str, File]) -> None:
    """Tells which of `assets/` stay here, since the card does not show them. Raises ValueError if one has a token."""
    there = [path.relative_to(folder) for path in sorted(folder.glob("assets/**/*")) if path.is_file()]
    hidden = [path for path in there if any(part.startswith(".") for part in path.parts)]
    if left_out := [path.as_posix() for path in there if path.as_posix() not in files and path not in hidden]:
        print(f"note: README.md does not mention {', '.join(left_out)}: not published")
    for path, file in files.items():
        if path.startswith("assets/"):
            check_for_tokens(path, file.read())


def check_card(folder: Path, repo_id: str) -> str:
    """The card's text. Raises ValueError for all that can be found wrong with it without asking anybody."""
    import yaml

    from openvla.hub_upload.card_text import PLACEHOLDER
    from openvla.hub_upload.model_card import validate_card

    path = folder / "README.md"
    check_for_tokens(str(path), path.read_bytes())
    try:
        text = path.read_text("utf-8")
        validate_card(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} has metadata that is not YAML: {' '.join(str(error).split())}") from error
    named = set(re.findall(r"""^\s*repository = ["'](.+?)["']""", text, re.MULTILINE))
    if PLACEHOLDER in named:
        print(f"note: the code in README.md says {PLACEHOLDER}: `openvla export --repo-id {repo_id}` would name it")
    if others := sorted(named - {repo_id, PLACEHOLDER}):
        raise ValueError(
            f"The code in {path} loads {', '.join(others)}, not {repo_id}: export again with `--repo-id {repo_id}`, "
            "or edit the card."
        )
    return text


def check_for_tokens(path: str, content: bytes) -> None:
    if re.search(TOKEN.encode(), content):
        raise ValueError(
            f"{path} contains what looks like a token of the Hub (hf_…): take it out. If others may have seen it, "
            "revoke it in the Hub's settings."
        )


def publish(remote: Remote, files: dict[str, File], stale: tuple[str, ...], args, message: str) -> str | None:
    """Makes one repository hold `files`, or prints what that would change. Returns the URL of a pull request."""
    large = remote.large(files)  # raises before anything is made
    if not args.dry_run and remote.prepare(args.private):
        large = remote.large(files)
    states = remote.states(files, stale)
    private = args.private if args.private is not None else remote.private is not False
    print(describe(remote, files, states, large, private))
    if args.dry_run:
        return None
    pull_request = remote.push(files, states, large, message, args.description) if differs(states) else None
    if args.private is False and remote.private:
        remote.make_public()
    if pull_request:
        print(f"proposed: {pull_request}")
    else:
        print(f"{'published' if differs(states) else 'unchanged'}: {remote.url} at {remote.commit}")
    return pull_request
