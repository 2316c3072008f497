"""The `openvla` command: one verb per job, each a module with its own `main(argv)`."""

import argparse
import importlib
import sys

COMMANDS = {
    "predict": ("openvla.serve.predict", "act once: image + instruction -> action"),
    "try": ("openvla.evaluate.attempt", "watch a policy try a task in LIBERO: the first thing to do"),
    "finetune": ("openvla.finetune.sft", "train on demonstrations: LoRA, QLoRA, partial or full"),
    "stats": ("openvla.finetune.stats", "check a dataset and print its statistics"),
    "data inspect": ("openvla.finetune.inspection", "what is in a dataset and what will hurt, as an HTML report"),
    "data convert": ("openvla.finetune.conversion", "turn any dataset we read into a LeRobot v3 dataset"),
    "convert": ("openvla.hub_upload.convert", "the original's checkpoints -> a folder that loads today"),
    "export": ("openvla.hub_upload.export", "adapter or checkpoint -> a folder like a Hub repository, proven to act"),
    "upload": ("openvla.hub_upload.upload", "publish an exported folder on the Hub, with a Space if you like"),
    "serve": ("openvla.serve.server", "answer robots: REST, openpi's websockets, vla-eval, and a page to try it"),
    "evaluate": ("openvla.evaluate.simulate", "success in simulators, or error against recorded actions (--data)"),
    "demos": ("openvla.evaluate.demos.make", "demonstrations from scripted experts in a simulator"),
    "doctor": ("openvla.evaluate.doctor", "check that a checkpoint sees, listens and has sane statistics"),
    "bench": ("openvla.evaluate.bench", "milliseconds per action, measured side by side"),
}
RESUMABLE = ("upload", "evaluate", "demos")


def usage() -> str:
    verbs = "\n".join(f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items())
    return f"usage: openvla [--traceback] COMMAND …\n\n{verbs}\n\nopenvla COMMAND --help shows examples and options."


def command_parser(command: str, doc: str) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring: its first paragraph, then the examples below the options."""
    description, _, examples = doc.partition("\n\n")
    return argparse.ArgumentParser(
        f"openvla {command}",
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parse_numbers(text: str, count: int, what: str) -> list[int]:
    """`"0,3-5"` -> `[0, 3, 4, 5]`, `"all"` -> all; ValueError for what is not below `count`."""
    if text == "all":
        return list(range(count))
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise ValueError(f"Expected {what} as numbers such as 0,3-5, got {text!r}.")
        numbers += range(int(first), int(last or first) + 1)
    if not numbers or max(numbers) >= count or len(set(numbers)) < len(numbers):
        raise ValueError(f"{what} go from 0 to {count - 1}, each once; got {text!r}.")
    return sorted(numbers)


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Errors of the user's making end in one line and status 1; `--traceback` shows where from."""
    argv = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in argv
    argv = [argument for argument in argv if argument != "--traceback"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    if argv[0] == "--version":
        print(importlib.import_module("openvla").__version__)
        return
    words = 1 + any(verb.startswith(f"{argv[0]} ") for verb in COMMANDS)
    verb = " ".join(argv[:words])
    if verb not in COMMANDS:
        sys.exit(f"openvla: unknown command {verb!r}\n\n{usage()}")
    command = importlib.import_module(COMMANDS[verb][0])
    try:
        command.main(argv[words:])
    except KeyboardInterrupt:
        if traceback:
            raise
        hint = "; run the same command again to go on" if verb in RESUMABLE else ""
        print(f"openvla {verb}: stopped{hint}", file=sys.stderr)
        sys.exit(130)  # as shells say it: 128 + SIGINT
    except (ValueError, KeyError, OSError, RuntimeError, ImportError) as error:
        if traceback:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(f"openvla {verb}: {message}")


if __name__ == "__main__":
    main()
