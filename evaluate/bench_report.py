"""The tables of a benchmark's result."""

from openvla.evaluate.bench_clock import STAGES


def title_of(result: dict) -> str:
    settings, hardware = result["settings"], result["hardware"]
    name = settings["model"] or f"{settings['size']}, random weights"
    name += f", {result['runs'][0]['parameters'] / 1e6:,.0f} M parameters"
    threads = f"{hardware['threads']} thread{'s' * (hardware['threads'] > 1)}"
    return f"{name}, {hardware['name']}{'' if hardware['device'].startswith('cuda') else f', {threads}'}"


def tell(result: dict) -> str:
    """Tables of all runs."""
    lines = [title_of(result)]
    for run in result["runs"]:
        lines += ["", *tell_run(run)]
    if len(result["settings"]["batch"]) > 1:
        lines += ["", f"{'':<10}{'way':<18}{'robots':>7}{'p50 ms':>10}{'p99 ms':>10}{'ms/robot':>10}{'actions/s':>11}"]
        rows = [(run["dtype"], row, run["batch"]) for run in result["runs"] for row in run["ways"]]
        for dtype, row, batch in sorted(rows, key=lambda each: (each[0], each[1]["way"], each[2])):
            one = f"{dtype:<10}{row['way']:<18}{batch:>7}{row['ms']['p50']:>10.1f}{row['ms']['p99']:>10.1f}"
            lines.append(f"{one}{row['ms']['p50'] / batch:>10.1f}{row['actions_per_second']:>11.1f}")
    return "\n".join(lines)


def tell_run(run: dict) -> list[str]:
    if not run["ways"]:
        return [f"skipped: {name} ({why})" for name, why in run["skipped"].items()]
    best, against = run["ceilings"]["best"], run["against"]
    shape = " x ".join(map(str, best["matmul_shape"]))
    lines = [
        f"{run['dtype']}, batch {run['batch']}. This machine: copy {best['copy_gb_s']:.1f} GB/s, matrix times vector "
        f"{best['matvec_gb_s']:.1f} GB/s, matrices {best['matmul_gflop_s']:.1f} GFLOP/s ({shape})",
        f"{'':<20}{'p50 ms':>9}{'p95':>9}{'p99':>9}{'Hz':>8}{'actions/s':>11}   "
        f"{f'x {against} (quartiles)':<26}{'policy':>8}{'passes':>8}{'MiB':>7}{'floor ms':>10}{'x floor':>8}",
    ]
    for row in run["ways"]:
        ms, ratio = row["ms"], row["times_as_fast"]
        spread = f"{ratio['median']:.3g} ({ratio['quartiles'][0]:.3g} to {ratio['quartiles'][1]:.3g})"
        memory = "-" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
        lines.append(
            f"{row['way']:<20}{ms['p50']:>9.1f}{ms['p95']:>9.1f}{ms['p99']:>9.1f}{row['hz']:>8.3g}"
            f"{row['actions_per_second']:>11.3g}   {spread:<26}{row['policy_times_as_fast']['median']:>8.3g}"
            f"{row['passes']:>8}{memory:>7}{row['floor_ms']['total']:>10.1f}{row['times_floor']:>8.2f}"
        )
    lines += [f"{'ms by stage / floor':<20}" + "".join(f"{stage:>16}" for stage in STAGES)]
    for row in run["ways"]:
        if row["stages_ms"]:
            cells = []
            for stage in STAGES:
                floor = row["floor_ms"].get(stage)
                cells.append(f"{row['stages_ms'][stage]:.1f}" + ("" if floor is None else f" / {floor:.1f}"))
            lines.append(f"{row['way']:<20}" + "".join(f"{cell:>16}" for cell in cells))
    compiled = [f"{row['way']} {row['compile_seconds']:.0f}" for row in run["ways"] if row["compile_seconds"]]
    lines += [f"seconds to compile: {', '.join(compiled)}"] if compiled else []
    for row in run["ways"]:
        if row.get("differing_tokens"):
            margin = f"at most {row['largest_margin']:.2g} of the logits' spread apart: rounding"
            lines.append(f"{row['way']}: {row['differing_tokens']} tokens differ, {margin}")
    return lines + [f"skipped: {name} ({why})" for name, why in run["skipped"].items()]
