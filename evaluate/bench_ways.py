"""The ways to act that `openvla bench` compares, and the proof that they give the same actions.

Legend: B batch · T action chunk · A action dims.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

from openvla.evaluate.bench_policies import twin

PARALLEL = {"attention": "bidirectional"}
_FAST = "predict_action"
# name -> what it is
TOKEN_WAYS = {
    "original": "generate() with what the original's predict_action computes in vain: the head over all positions of "
    "the prompt, a last block of each tower, a resize per tower",
    "generate": "our model's generate()",
    "eager": _FAST,
    "draft": f"{_FAST} with the right answer as a draft",
    "compiled": f"{_FAST} after compile_for_actions for prompts of this length",
    "compiled-draft": "the same with the right answer as a draft",
    "graphs": f"{_FAST} after compile_for_actions('reduce-overhead') for prompts of this length: CUDA graphs",
    "graphs-draft": "the same with the right answer as a draft",
}
COMPILE_MODES = {"compiled": "default", "graphs": "reduce-overhead"}
# name -> what it is, fields of its policy
HEAD_WAYS = {
    "token-parallel": ("action tokens of the whole chunk in one pass", PARALLEL),
    "l1": ("the actions in one pass", {**PARALLEL, "action_head": "l1"}),
    "l1-original": (
        "the same with what the original's code computes beside it: images one by one and resized once per tower, a "
        "last block of each tower, hidden states of all layers kept, the language-model head over all positions in "
        "float32",
        {**PARALLEL, "action_head": "l1"},
    ),
    "flow": ("10 steps, the prompt computed once", {"attention": "prefix", "action_head": "flow"}),
    "flow-bidirectional": ("10 passes over everything", {**PARALLEL, "action_head": "flow"}),
    "diffusion": ("50 passes over everything", {**PARALLEL, "action_head": "diffusion"}),
    "diffusion-prefix": ("50 steps, the prompt computed once", {"attention": "prefix", "action_head": "diffusion"}),
}
# A token may differ between ways if the two stood closer than so many roundings of the spread of the actions' logits
ROUNDINGS = 16


@dataclass
class Way:
    """One way to act.

    Args:
        prepare: images and instructions -> tensors on the device.
        act: those -> `{"actions": (B, T, A) in the units of the dataset, "token_ids": (B, T·A)}`, the latter of the
            token head.
        detokenise: the last part of `act` alone, on what it gave.
        passes_of: the module whose calls are passes of the language model; None: compiled, nobody can look inside.
        drafted: whether a draft rides along.
        compile_seconds: what it took beforehand.
    """

    name: str
    what: str
    policy: object
    prepare: Callable[[], dict]
    act: Callable[[dict], dict]
    detokenise: Callable[[dict], object]
    passes_of: object | None
    drafted: bool = False
    compile_seconds: float | None = None


@dataclass
class Scene:
    """What all robots of a batch see and are told; `states` are None for policies that take none."""

    instruction: str
    images: list  # [batch][cameras]
    states: list | None
    unnorm_key: str
    noise: object  # (B, T, A), for heads that denoise


class ResizePerTower:
    """The original's image processor: resizes for every tower anew. The same `pixel_values`."""

    def __init__(self, image_processor):
        fill = image_processor.tvf_letterbox_fill or [int(value * 255) for value in image_processor.means[-1]]
        self.towers = []
        for index in range(len(image_processor.input_sizes)):
            one = copy.copy(image_processor)
            one.tvf_letterbox_fill = fill
            for name in ("input_sizes", "interpolations", "means", "stds", "tvf_normalize_params"):
                values = getattr(image_processor, name)
                setattr(one, name, None if values is None else values[index : index + 1])
            self.towers.append(one)

    def preprocess(self, images, **options) -> dict:
        import torch

        parts = [tower.preprocess(images, **options)["pixel_values"] for tower in self.towers]
        return {"pixel_values": torch.cat(parts, dim=1)}


def waste_as_the_original(policy) -> None:
    """Has linear layers be PyTorch's, and each tower compute one more block, which nothing reads."""

    def compute_in_vain(block, inputs: tuple, output) -> None:
        block.forward(output, *inputs[1:])

    for tower in (policy.model.vision_backbone.featurizer, policy.model.vision_backbone.fused_featurizer):
        if tower is not None:
            tower.blocks[-1].register_forward_hook(compute_in_vain)
    for module in policy.modules():
        vars(module).pop("forward", None)  # of `make_fast`


def name_ways(dim: int) -> dict[str, str]:
    """All ways with what they are, for `dim` tokens of a draft, of which the last is not looked at."""
    drafts = {
        f"draft-{right}": f"{_FAST} with a draft of which the first {right} tokens are right" for right in range(dim)
    }
    return TOKEN_WAYS | drafts | {name: what for name, (what, _) in HEAD_WAYS.items()}


def build_ways(names: list[str], policy, make_processor: Callable, scene: Scene) -> tuple[dict[str, Way], dict]:
    """Ways by name, and why others are left out.

    Args:
        policy: whose weights all ways share; one that is causal, or else it can only act its own way.
        make_processor: config -> processor.
    """
    from openvla.compiled_actions import refusal

    ways, skipped, twins = {}, {}, {}
    for name in names:
        kind = name.split("-")[0]
        if policy.config.attention != "causal" and name not in ("eager", *COMPILE_MODES):
            skipped[name] = "this policy decodes all its actions at once"
        elif name in HEAD_WAYS:
            ways[name] = _head_way(name, policy, make_processor, scene)
        elif name in ("original", "generate"):
            ways[name] = _generate_way(name, policy, make_processor, scene)
        elif kind not in COMPILE_MODES:
            ways[name] = _fast_way(name, policy, policy.model, make_processor, scene)
        elif kind == "graphs" and policy.device.type != "cuda":
            skipped[name] = "CUDA graphs need a GPU"
        elif why := refusal(policy):
            skipped[name] = why
        else:
            if kind not in twins:  # on the same weights: the plain ways stay as they are
                twins[kind] = _compiled_twin(policy, COMPILE_MODES[kind], make_processor, scene)
            other, seconds = twins[kind]
            ways[name] = _fast_way(name, other, None, make_processor, scene)
            ways[name].compile_seconds = seconds
    return ways, skipped


def _compiled_twin(policy, mode: str, make_processor, scene: Scene) -> tuple:
    """A twin that acts compiled, and how many seconds that took."""
    other, start = twin(policy), time.perf_counter()
    prompt = _preparation(policy, make_processor(policy.config), scene)()["input_ids"]
    text = prompt.shape[1] - 1 - policy.config.num_placeholders
    other.compile_for_actions(mode, batch_sizes=(len(scene.images),), text_tokens=(text,), progress=False)
    return other, time.perf_counter() - start


def _fast_way(name: str, policy, passes_of, make_processor, scene: Scene) -> Way:
    """`predict_action`, with a draft if the name says so."""
    prepare, drafted = _preparation(policy, make_processor(policy.config), scene), "draft" in name
    noise, draft = scene.noise if policy.config.denoises else None, None
    batch, dim = len(scene.images), policy.get_action_dim(scene.unnorm_key)

    def act(inputs: dict) -> dict:
        options = {"unnorm_key": scene.unnorm_key, "noise": noise, "draft": draft, "return_dict": True}
        found = policy.predict_action(**inputs, **options)
        return found | {"actions": found["actions"].reshape(batch, -1, dim)}

    if drafted:
        draft = act(prepare())["token_ids"]
        right = int(name.rsplit("-")[-1]) if name[-1].isdecimal() else draft.shape[1]
        start, bins = policy.action_tokenizer.vocab_start, policy.config.n_action_bins
        draft[:, right:] = start + (draft[:, right:] - start + 1) % bins
    what = name_ways(draft.shape[1] if drafted else 1)[name]
    return Way(name, what, policy, prepare, act, _detokeniser(policy, scene), passes_of, drafted)


def _generate_way(name: str, policy, make_processor, scene: Scene) -> Way:
    processor, detokenise = make_processor(policy.config), _detokeniser(policy, scene)
    options = {}
    if name == "original":
        policy = twin(policy)
        waste_as_the_original(policy)
        processor.image_processor = ResizePerTower(processor.image_processor)
        options["logits_to_keep"] = 0  # all
    count = policy.config.action_chunk * policy.get_action_dim(scene.unnorm_key)

    def act(inputs: dict) -> dict:
        inputs = _with_normalized_state(policy, inputs, scene)
        ids = policy.generate(**inputs, **options, max_new_tokens=count, do_sample=False)[:, -count:].cpu().numpy()
        return {"token_ids": ids, "actions": detokenise({"token_ids": ids})}

    prepare = _preparation(policy, processor, scene)
    return Way(name, TOKEN_WAYS[name], policy, prepare, act, detokenise, policy)


def _head_way(name: str, policy, make_processor, scene: Scene) -> Way:
    """A chunk in parallel: `predict_action` of a policy with this head, or what the original computes for it."""
    what, fields = HEAD_WAYS[name]
    import torch

    torch.manual_seed(0)  # heads of the same kind are the same
    head = twin(policy, **fields)
    if name != "l1-original":
        return _fast_way(name, head, head.model, make_processor, scene)
    waste_as_the_original(head)
    processor, stats = make_processor(head.config), _statistics(head, scene)
    processor.image_processor = ResizePerTower(processor.image_processor)

    def act(inputs: dict) -> dict:
        normalized = act_as_the_original(head, _with_normalized_state(head, inputs, scene))
        return {"actions": stats.unnormalize(normalized.numpy())}

    return Way(name, what, head, _preparation(head, processor, scene), act, _detokeniser(head, scene), head.model)


def act_as_the_original(policy, inputs: dict):
    """One chunk of a policy with L1 head, with what OpenVLA-OFT's code computes beside it; the same actions.

    Returns `(B, T, A)` float64 in [-1, 1], on the CPU.
    """
    import torch

    model, config = policy.model, policy.config
    ids, mask = policy._pad_prompts(policy._complete_prompts(inputs["input_ids"], inputs.get("attention_mask")))
    count = config.action_chunk * config.action_dim
    suffix = torch.tensor([config.action_slot_id] * count + [config.text_config.eos_token_id], device=ids.device)
    ids = torch.cat([ids, suffix.expand(len(ids), -1)], dim=1)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, len(suffix)), value=1)
    with torch.no_grad():
        backbone, patches = model.vision_backbone, []
        for image in inputs["pixel_values"].to(policy.dtype).split(6, dim=1):
            features = backbone.featurizer(image[:, :3]), backbone.fused_featurizer(image[:, 3:])
            patches.append(torch.cat(features, dim=2))
        outputs = model(
            input_ids=ids,
            image_features=model.projector(torch.cat(patches, dim=1)),
            proprio=inputs.get("proprio"),
            attention_mask=mask,
            use_cache=False,
            output_hidden_states=True,
        )
        policy.lm_head(outputs.last_hidden_state).float()
        hidden = policy._read_slots(outputs.hidden_states[-1], ids)
        return policy.action_head(hidden).double().cpu()


def _preparation(policy, processor, scene: Scene) -> Callable[[], dict]:
    images = scene.images if policy.config.num_cameras > 1 else [cameras[0] for cameras in scene.images]
    states = scene.states if policy.config.proprio_dim else None

    def prepare() -> dict:
        prompts = [processor.build_prompt(scene.instruction)] * len(images)
        return processor(prompts, images, states).to(policy.device)

    return prepare


def _statistics(policy, scene: Scene, entry: str = "action"):
    from openvla.action_tokenizer import ActionStats

    return ActionStats.from_norm_stats(policy.norm_stats, scene.unnorm_key, policy.config.action_normalization, entry)


def _detokeniser(policy, scene: Scene) -> Callable[[dict], object]:
    """Token ids or, without, actions -> actions in the units of the dataset."""
    stats, tokenizer, batch = _statistics(policy, scene), policy.action_tokenizer, len(scene.images)

    def detokenise(found: dict):
        if "token_ids" in found:
            return stats.unnormalize(tokenizer.decode(found["token_ids"].reshape(batch, -1, stats.dim)))
        return stats.unnormalize(found["actions"])

    return detokenise


def _with_normalized_state(policy, inputs: dict, scene: Scene) -> dict:
    """What `predict_action` does to the robot's state, for ways that do not pass through it."""
    import torch

    if "proprio" not in inputs:
        return dict(inputs)
    state = _statistics(policy, scene, "proprio").normalize(inputs["proprio"].cpu().numpy())
    return {**inputs, "proprio": torch.from_numpy(state).to(policy.device, torch.float32)}


# --- The same actions ------------------------------------------------------------------------------------------------
def check_agreement(ways: dict[str, Way], policy, scene: Scene) -> dict[str, dict]:
    """How each way's tokens differ from the first token way's: `{name: {"differing_tokens", "largest_margin"}}`.

    Raises RuntimeError where they do and must not: in float32 at all; in shorter types where the two tokens were not
    within rounding of each other. Margins are in standard deviations of the logits of all actions.
    """
    import numpy as np
    import torch

    found = {name: way.act(way.prepare()) for name, way in ways.items()}
    for name, way in ways.items():
        compiled = getattr(way.policy, "_compiled", None)
        if way.passes_of is None and (compiled is None or compiled.told):
            raise RuntimeError(f"{name} acted without compilation: {compiled and sorted(compiled.told)}.")
    one_by_one = [name for name in ways if name not in HEAD_WAYS and policy.config.attention == "causal"]
    agreement = {}
    for name in one_by_one:
        first, mine = found[one_by_one[0]]["token_ids"], found[name]["token_ids"]
        differs = first != mine
        largest, limit = 0.0, rounding_limit(policy.dtype)
        if differs.any():
            inputs = _with_normalized_state(policy, ways[name].prepare(), scene)
            largest = max(margins(policy, inputs, first, mine))
        if differs.any() and (largest > limit or limit == 0.0):
            raise RuntimeError(
                f"{name} gives the tokens {mine.tolist()}, {one_by_one[0]} {first.tolist()}: not comparable. Where "
                f"they first differ, their logits are {largest:.3g} spreads apart; {limit:.3g} would be rounding."
            )
        agreement[name] = {"differing_tokens": int(differs.sum()), "largest_margin": largest}
    if {"l1", "l1-original"} <= ways.keys():
        apart = np.abs(found["l1"]["actions"] - found["l1-original"]["actions"]).max()
        if apart > (1e-4 if policy.dtype == torch.float32 else 0.1):
            raise RuntimeError(f"l1-original acts {apart:.3g} from l1: not comparable.")
        agreement["l1-original"] = {"largest_difference": float(apart)}
    return agreement


def rounding_limit(dtype) -> float:
    """How many spreads of the actions' logits may lie between two tokens of which rounding chooses; of float32, 0."""
    import torch

    return 0.0 if dtype == torch.float32 else ROUNDINGS * torch.finfo(dtype).eps


def margins(policy, inputs: dict, tokens, others) -> list[float]:
    """Where rows of two answers first differ, how far apart the logits of their tokens are, in spreads.

    Args:
        inputs: of the processor, whose `proprio` has been normalised.
        tokens, others: `(B, T·A)` ids in numpy; the margin of rows that do not differ is left out.
    """
    import numpy as np
    import torch

    found, start, end = [], policy.action_tokenizer.vocab_start, policy.action_tokenizer.vocab_end
    for row in np.flatnonzero((tokens != others).any(axis=1)):
        place = int((tokens[row] != others[row]).argmax())
        one = {name: values[row : row + 1] for name, values in inputs.items()}
        known = torch.from_numpy(tokens[row : row + 1, :place]).to(policy.device)
        one["input_ids"] = torch.cat([one["input_ids"], known], dim=1)
        one["attention_mask"] = torch.cat([one["attention_mask"], torch.ones_like(known)], dim=1)
        with torch.no_grad():
            logits = policy(**one, logits_to_keep=1).logits[0, -1].float()
        apart = (logits[tokens[row, place]] - logits[others[row, place]]).abs()
        found.append(float(apart / logits[start:end].std()))
    return found
