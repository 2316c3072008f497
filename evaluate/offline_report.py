"""What an offline evaluation found: tables for people, entries for the model card, files."""

from pathlib import Path

from openvla.evaluate.offline_plots import dim_label
from openvla.evaluate.offline_scoring import MODES
from openvla.evaluate.report import write_json


def name_dims(norm_stats: dict, unnorm_key: str, reader) -> list[tuple[str, str]]:
    """`(name, unit)` per action dim, as the checkpoint tells; where it can only guess or count, the dataset's names,
    if it has any. Their units no reader knows."""
    from openvla.action_tokenizer import name_action_dims

    dims = name_action_dims(norm_stats, unnorm_key)
    recorded = getattr(reader, "action_names", None) or []
    is_guess = dims == [(f"action {index}", "") for index in range(len(dims))] or dims[0][0].endswith("?")
    if is_guess and len(recorded) == len(dims) == len(set(recorded)):
        return [(name, "") for name in recorded]
    return dims


def format_tables(found: dict) -> str:
    """Per dim, and in total beside what needs no policy."""
    policy = {mode.replace("_", "-"): found[mode] for mode in MODES if mode in found}
    (mode, scores), baselines = next(iter(policy.items())), found["baselines"]
    labels = [dim_label(dim["name"], dim["unit"]) for dim in scores["dims"]]
    settings = found["settings"]
    amount = f"{found['episodes']} episodes ({settings['split']}), {found['steps']:,} steps"
    lines = [f"{settings['checkpoint']} on {settings['dataset']}: {amount}; as {settings['unnorm_key']!r}", ""]

    # 1. Per dim
    has_tokens = "token_accuracy" in scores
    told = ", tokens right" if has_tokens else ""
    lines.append(f"{mode}, per dim: absolute error in its unit (scaled: between -1 and 1){told}")
    rows = [["", "error", "95 % interval", "median", "p95", "bias", "scaled"] + ["exact", "±1 bin"] * has_tokens]
    for label, dim in zip(labels, scores["dims"]):
        cells = [label, f"{dim['mae']:.4g}", _interval(dim["mae_interval"], ".3g")]
        cells += [f"{dim['median']:.4g}", f"{dim['p95']:.4g}", f"{dim['bias']:+.2g}", f"{dim['l1_normalized']:.4f}"]
        if has_tokens:
            cells += [f"{dim['token_accuracy']:.1%}", f"{dim['within_one_bin']:.1%}"]
        rows.append(cells)
    lines += [*_table(rows), "", "error per dim of what needs no policy"]
    rows = [["", *baselines]]
    for index, label in enumerate(labels):
        rows.append([label, *(f"{each['dims'][index]['mae']:.4g}" for each in baselines.values())])

    # 2. By how far ahead in the chunk
    compared = {**policy, "previous action": baselines["previous action"]}
    if "ahead" in scores:
        lines += [*_table(rows), "", "all dims, by steps ahead in the chunk: error, scaled"]
        rows = [["ahead", "actions", *compared] + ["tokens right"] * has_tokens]
        for place, first in enumerate(scores["ahead"]):
            cells = [str(place), f"{first['actions']:,}"]
            cells += [f"{each['ahead'][place]['l1_normalized']:.4f}" for each in compared.values()]
            rows.append(cells + ([f"{first['token_accuracy']:.1%}"] if has_tokens else []))

    # 3. In total
    lines += [*_table(rows), "", "all dims"]
    rows = [["", *["tokens right", "95 % interval"] * has_tokens, "error, scaled", "95 % interval"]]
    for name, each in {**policy, **baselines}.items():
        cells = [name]
        if has_tokens:
            cells += [f"{each['token_accuracy']:.1%}", _interval(each["token_accuracy_interval"], ".1%")]
        rows.append([*cells, f"{each['l1_normalized']:.4f}", _interval(each["l1_normalized_interval"], ".4f")])
    lines += _table(rows)
    if replaced := found.get("free_running", {}).get("replaced"):
        lines += ["", f"At {replaced:.2%} of the tokens the model preferred one that is no action."]
    return "\n".join(lines)


def _interval(interval: list[float] | None, form: str) -> str:
    return "unknown" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def card_entries(found: dict) -> list[dict]:
    """What `openvla export --evaluation` writes on the model card; format: `hub_upload/model_card.py`."""
    settings = found["settings"]
    dataset = settings["dataset"]
    if settings["split"] != "all":
        dataset += f" ({settings['split']} episodes)"
    if settings["quantize"] is not None:
        dataset += f", policy quantised as {settings['quantize']}"
    entries = []
    for mode in MODES:
        for metric in [name for name in ("token_accuracy", "l1_normalized") if name in found.get(mode, ())]:
            entry = {"dataset": dataset, "metric": f"{mode}_{metric}", "value": found[mode][metric]}
            entry |= {"episodes": found["episodes"], "command": found["command"]}
            if interval := found[mode][f"{metric}_interval"]:
                entry["interval"] = interval
            entries.append(entry)
    return entries


def write_report(folder: Path, found: dict, pictures: dict[str, bytes]) -> None:
    """Writes pictures and numbers, results.json last. Pictures of an earlier evaluation leave the folder."""
    from openvla.finetune.inspection import write

    folder.mkdir(parents=True, exist_ok=True)
    for file in [*folder.glob("episode_*.png"), folder / "errors.png", folder / "ahead.png"]:
        if file.name not in pictures:
            file.unlink(missing_ok=True)
    for name, picture in pictures.items():
        write(folder / name, picture)
    write_json(folder / "evaluation.json", card_entries(found))
    write_json(folder / "results.json", found)
