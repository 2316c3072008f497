"""Checks that a checkpoint is fit to act: it looks at the image, listens to the instruction, and has sane statistics.

openvla doctor openvla/openvla-7b
openvla doctor runs/my-robot --unnorm-key my_robot --json
openvla doctor runs/my-oft--50000_chkpt --action-chunk 8 --num-cameras 2

The failure it is there for makes no noise: on some versions of transformers the original code loads, runs, and returns
the same action whatever the camera shows.
"""

import json
import sys
from dataclasses import asdict, dataclass

from openvla.cli import command_parser

OLDEST, NEWEST = (4, 57, 6), (6, 0, 0)  # transformers: tested from … up to, not including
OK, WARNING, FAILED = "ok", "warning", "failed"
# Of one length in tokens: padding and position would change the numbers even if the words did not arrive.
INSTRUCTIONS = ("pick up the red cup", "push up the green box", "turn on the left light", "put down the big fork")
MOST_REPLACED = 0.5  # share of tokens that are no actions from which on a policy is not fit
FARTHEST = 1.5  # beyond what a continuous head should say: it was trained on actions in [-1, 1]


@dataclass
class Check:
    """One line of the report. `status`: "ok", "warning" (probably a mistake) or "failed" (must not act)."""

    name: str
    status: str
    detail: str


def diagnose(model, processor, unnorm_key: str | None = None) -> list[Check]:
    """Runs every check on a loaded policy; about a dozen actions' time, of heads that denoise less: but for an action
    per dataset they are asked for one pass. Never raises for a sick policy.

    Args:
        model: `OpenVLAForActionPrediction`.
        processor: `OpenVLAProcessor`.
        unnorm_key: the statistics that will be used; None checks all there are.
    """
    checks = [check_versions(), check_weights(model), *check_statistics(model, unnorm_key)]
    checks += check_tokens(model, processor)
    if not any(check.status == FAILED and check.name in ("weights", "tokens", "prompt") for check in checks):
        checks += check_senses(model, processor, unnorm_key)
    return checks


def is_fit(checks: list[Check]) -> bool:
    """Whether nothing failed; warnings pass."""
    return all(check.status != FAILED for check in checks)


def check_versions() -> Check:
    import torch
    import transformers

    detail = f"python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}"
    numbers = [part for part in transformers.__version__.split(".")[:3] if part.isdigit()]
    version = tuple(int(part) for part in numbers)
    if OLDEST <= version < NEWEST:
        return Check("versions", OK, detail)
    return Check("versions", FAILED, f"{detail}; this code is tested with transformers 4.57.6 to 5.x")


def check_weights(model) -> Check:
    bad, size = [], 0
    for name, parameter in model.named_parameters():
        size += parameter.numel()
        if parameter.is_meta:  # offloaded: not here to be looked at
            continue
        if parameter.is_floating_point() and not parameter.isfinite().all():
            bad.append(name)
    if bad:
        return Check("weights", FAILED, f"{len(bad)} tensors hold NaN or infinity: {', '.join(bad[:3])}")
    return Check("weights", OK, f"{size:,} parameters, {model.dtype}, all finite")


def check_statistics(model, unnorm_key: str | None) -> list[Check]:
    """One check per dataset: readable, finite, in order, and with something to act on."""
    from openvla.action_tokenizer import ActionStats, resolve_unnorm_key

    try:
        keys = sorted(model.norm_stats or {}) if unnorm_key is None else [unnorm_key]
        if not keys:
            resolve_unnorm_key(model.norm_stats, None)  # raises with what to do
    except KeyError as error:
        return [Check("statistics", FAILED, error.args[0])]
    checks = []
    for key in keys:
        try:
            stats = ActionStats.from_norm_stats(model.norm_stats, key, model.config.action_normalization)
        except (KeyError, ValueError) as error:
            checks.append(Check(f"statistics {key}", FAILED, str(error.args[0])))
            continue
        idle = [dim for dim in range(stats.dim) if stats.mask[dim] and stats.low[dim] == stats.high[dim]]
        detail = f"{stats.dim} dims, {int(stats.mask.sum())} normalised"
        if len(idle) == stats.mask.sum():
            checks.append(Check(f"statistics {key}", FAILED, f"{detail}, but no dim has any range: nothing can move"))
        elif idle:
            checks.append(Check(f"statistics {key}", WARNING, f"{detail}; dims {idle} have no range, never move"))
        else:
            checks.append(Check(f"statistics {key}", OK, detail))
    return checks


def check_tokens(model, processor) -> list[Check]:
    config, tokenizer = model.config, processor.tokenizer
    rows = model.get_input_embeddings().num_embeddings
    problems = []
    if processor.image_token_id != config.image_token_id:
        problems.append(
            f"<image> is {processor.image_token_id} in the processor, {config.image_token_id} in the model"
        )
    if processor.num_placeholders != config.num_placeholders:
        given = processor.num_placeholders
        problems.append(f"the processor makes {given} placeholders, the model needs {config.num_placeholders}")
    if max(config.image_token_id, config.action_token_end - 1, len(tokenizer) - 1) >= rows:
        problems.append(f"ids beyond the embedding table of {rows} rows")
    if processor.prompt_end_token_id != config.prompt_end_token_id:
        problems.append(
            f"prompts end in {processor.prompt_end_token_id}, the model wants {config.prompt_end_token_id}"
        )
    if problems:
        return [Check("tokens", FAILED, "; ".join(problems))]
    start, end = model.action_tokenizer.vocab_start, model.action_tokenizer.vocab_end
    checks = [Check("tokens", OK, f"actions {start} … {end - 1}, <image> {config.image_token_id}")]
    try:
        checks.append(Check("prompt", OK, repr(processor.build_prompt("…"))))
    except ValueError as error:
        checks.append(Check("prompt", FAILED, str(error)))
    return checks


def check_senses(model, processor, unnorm_key: str | None) -> list[Check]:
    """Four scenes, four instructions and four states of the robot must change the state that the first action is read
    from; and more."""
    import torch

    from openvla.action_tokenizer import ActionStats

    config, dim = model.config, _any_action_dim(model, unnorm_key)
    scenes, prompts = _scenes(), [processor.build_prompt(instruction) for instruction in INSTRUCTIONS]
    has_tokens = config.action_head == "token"

    def observe(some_prompts, some_scenes, state: float = 0.0):
        images = [[scene] * processor.num_cameras for scene in some_scenes]
        inputs = processor(some_prompts, images).to(model.device)
        if config.proprio_dim:
            inputs["proprio"] = torch.full((len(some_prompts), config.proprio_dim), state, device=model.device)
        return inputs

    def act(inputs, to_the_end: bool = False):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn((1, config.action_chunk, dim), generator=generator).expand(
            len(inputs["input_ids"]), -1, -1
        )
        options = {"noise": noise, "num_denoising_steps": 1 if config.denoises and not to_the_end else None}
        return model.sample_actions(**inputs, action_dim=dim, output_hidden_states=True, **options)

    def answer(output) -> torch.Tensor:
        return output.token_ids if has_tokens else output.actions

    # 1. Does what comes in arrive? Same shapes throughout, so that nothing but the input can change the numbers.
    by_image = [act(observe(prompts[:1], [scene])) for scene in scenes]
    by_instruction = [act(observe([prompt], scenes[:1])) for prompt in prompts]
    asked = [("image", by_image), ("instruction", by_instruction)]
    if config.proprio_dim:
        asked.append(("robot's state", [act(observe(prompts[:1], scenes[:1], x)) for x in (0.0, -1.0, 0.5, 1.0)]))
    lengths = {len(observe([prompt], scenes[:1])["input_ids"][0]) for prompt in prompts}
    checks = []
    for name, outputs in asked:
        states = torch.cat([output.hidden_states[:, 0].float() for output in outputs])  # (4, D)
        change = ((states[1:] - states[:1]).norm(dim=1) / states[:1].norm()).min().item()
        distinct = len({tuple(answer(output).flatten().tolist()) for output in outputs})
        detail = f"changes the state at the first action by {change:.2%} or more; {distinct} of 4 actions differ"
        if not change > 1e-6:  # also when NaN
            checks.append(Check(name, FAILED, f"{detail}. It is ignored: do not act with this policy."))
        elif name == "instruction" and len(lengths) > 1:
            checks.append(Check(name, WARNING, f"{detail}; prompts differ in length, so this proves little"))
        else:
            checks.append(Check(name, OK if distinct > 1 else WARNING, detail))

    # 2. Is the answer the same each time, and is it an action?
    same = torch.equal(answer(by_instruction[0]), answer(by_image[0]))
    checks.append(Check("repeatable", OK if same else FAILED, f"same input, {'same' if same else 'another'} action"))
    inputs = observe(prompts[:1] * len(scenes), scenes)
    if has_tokens:
        replaced = torch.cat([output.replaced for output in by_image + by_instruction]).float().mean().item()
        checks.append(_check_action_tokens(model, inputs, act(inputs).token_ids[:, :dim], replaced))
    else:
        actions = act(observe(prompts[:1], scenes[:1]), to_the_end=True).actions
        status = OK if actions.abs().max() <= FARTHEST else WARNING
        checks.append(
            Check("range", status, f"actions from {actions.min():.2f} to {actions.max():.2f}; [-1, 1] is usual")
        )

    # 3. The way a robot asks: through the statistics, in their units
    for key in [unnorm_key] if unnorm_key is not None else sorted(model.norm_stats or {}):
        try:
            inputs = observe(prompts[:1], scenes[:1])
            if config.proprio_dim:
                options = (model.norm_stats, key, config.action_normalization, "proprio")
                stats = ActionStats.from_norm_stats(*options)
                inputs["proprio"] = (stats.low + stats.high) / 2
            model.predict_action(**inputs, unnorm_key=key)
        except (KeyError, ValueError, RuntimeError) as error:
            checks.append(Check(f"act {key}", FAILED, str(error.args[0])))
    return checks


def _check_action_tokens(model, inputs, expected, replaced: float) -> Check:
    """Whether the language model prefers actions, and decoded one by one gives them to `generate`, too.

    Args:
        inputs: a batch of four scenes.
        expected: `(4, A)` ids of its first actions by `sample_actions`.
        replaced: share of the tokens that were no actions.
    """
    import torch

    if replaced > 0:
        detail = f"{replaced:.0%} of the tokens on synthetic scenes were no actions; the best actions were taken"
        return Check("action tokens", WARNING if replaced < MOST_REPLACED else FAILED, detail)
    if model.config.attention != "causal":
        return Check("action tokens", OK, "the language model prefers actions")
    dim = expected.shape[1]
    generated = model.generate(**inputs, max_new_tokens=dim, do_sample=False)[:, -dim:]
    if torch.equal(generated, expected):
        return Check("action tokens", OK, "generate() and predict_action() agree on a batch of 4 scenes")
    detail = f"generate() gives {generated.tolist()}, predict_action() {expected.tolist()}"
    return Check("action tokens", FAILED, detail)


def _scenes() -> list:
    """A ramp, noise, black and stripes: uint8 `(256, 256, 3)`."""
    import numpy as np

    ramp = (np.add.outer(np.arange(256), np.arange(256)) // 2).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    stripes = np.where(np.arange(256) // 32 % 2, 255, 40).astype(np.uint8)
    stripes = np.broadcast_to(stripes[:, None, None], noise.shape)
    return [np.stack([ramp, ramp[::-1], 255 - ramp], axis=-1), noise, np.zeros_like(noise), stripes]


def _any_action_dim(model, unnorm_key: str | None) -> int:
    if model.config.action_dim is not None or not model.norm_stats:
        return model.config.action_dim or 7
    stats = model.norm_stats.get(unnorm_key) or next(iter(model.norm_stats.values()))
    return len(stats["action"]["q01"]) if "q01" in stats.get("action", {}) else 7


def main(argv: list[str]) -> None:
    parser = command_parser("doctor", __doc__)
    parser.add_argument("model", metavar="CHECKPOINT", help="folder or Hub id")
    parser.add_argument("--unnorm-key", help="check these statistics only; default: all")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--device", help="cuda, cpu, …; default: cuda if there is one")
    parser.add_argument("--action-chunk", type=int, metavar="STEPS", help="of a folder of OpenVLA-OFT's training")
    parser.add_argument("--num-cameras", type=int, metavar="COUNT", help="of a folder of OpenVLA-OFT's training")
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    args = parser.parse_args(argv)

    import torch

    from openvla.loading import load

    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    told = {name: getattr(args, name) for name in ("revision", "action_chunk", "num_cameras")}
    told = {name: value for name, value in told.items() if value is not None}
    model, processor = load(args.model, dtype=args.dtype, **told)
    checks = diagnose(model.to(device), processor, args.unnorm_key)
    if args.json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        width = max(len(check.name) for check in checks)
        for check in checks:
            print(f"{check.status:<8} {check.name:<{width}}  {check.detail}")
        print("\nfit to act" if is_fit(checks) else "\nNOT fit to act")
    if not is_fit(checks):
        sys.exit(1)
