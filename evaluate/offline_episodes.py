"""Which episodes of a dataset an offline evaluation looks at: a split of `openvla finetune`'s, or a selection."""

from pathlib import Path

import numpy as np

from openvla.cli import parse_numbers

SPLITS = ("all", "held-out", "training")


def find_run(checkpoint: str, folder: str | None) -> dict:
    """`run.json` of the run that a checkpoint came from, by default of the folder it lies in; empty if unknown."""
    from openvla.hub_upload.card_facts import read_run

    place = Path(folder).expanduser() if folder else Path(checkpoint).expanduser().resolve().parent
    return read_run(place)[0] if folder or (place / "run.json").exists() else {}


def split_of_run(reader, split: str, run: dict, share: float, seed: int, skip_bad: bool) -> list[int]:
    """Episodes of a split, as `openvla finetune` made it.

    Args:
        run: its `run.json`, which must agree with what is found here; empty: unknown.
        skip_bad: whether it left out bad episodes, which takes a pass over the data to know.
    """
    from openvla.finetune.sft import split_episodes
    from openvla.finetune.statistics import scan

    lengths = scan(reader, skip_bad=True).lengths if skip_bad else [1] * len(reader)
    if split == "all":
        return [index for index, length in enumerate(lengths) if length]
    training, held_out = split_episodes(lengths, share, seed)
    trained = dict(zip(run["norm_stats"], run["lengths"])).get(reader.name) if run else None
    if trained is not None and len(trained) != len(training):
        raise ValueError(
            f"The run trained on {len(trained)} episodes of {reader.name}; a share of {share} held out here leaves "
            f"{len(training)}: not the same data, or pass --skip-bad-episodes as the run did."
        )
    return held_out if split == "held-out" else training


def choose_episodes(candidates: list[int], selection: str | None, sample: int | None, seed: int) -> list[int]:
    """Episodes of a selection such as `0-9,20` (None: all candidates), or `sample` of the candidates at random.

    Raises ValueError if that is none, or names others than the candidates.
    """
    if not candidates:
        raise ValueError("There is no episode to evaluate in this split of the dataset: choose another --split.")
    if selection is not None and sample is not None:
        raise ValueError("Expected either --episodes or --sample.")
    if sample is not None:
        if not 1 <= sample <= len(candidates):
            raise ValueError(f"--sample {sample}: expected 1 to {len(candidates)} episodes.")
        return sorted(np.random.default_rng(seed).permutation(candidates)[:sample].tolist())
    if selection is None:
        return candidates
    chosen = parse_numbers(selection, candidates[-1] + 1, "--episodes")
    if unknown := sorted(set(chosen) - set(candidates)):
        more = " …" if len(unknown) > 10 else ""
        raise ValueError(
            f"--episodes {selection!r}: {unknown[:10]}{more} are not among the {len(candidates)} to choose from, "
            f"{candidates[0]} … {candidates[-1]}."
        )
    return chosen
