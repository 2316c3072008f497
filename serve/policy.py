"""The one door for acting: an observation goes in, an action in physical units comes out.

    policy = OpenVLAPolicy.from_pretrained("openvla/openvla-7b", unnorm_key="bridge_orig")
    result = policy.infer({"images": camera_frame, "instruction": "pick up the cup"})
    result["actions"]                 # (T, A) float64: metres and radians in bridge_orig, gripper 1 = open

Evaluation in simulators and every server go through it; of chunks, `ActionQueue` makes one action per control step.
Legend: T action chunk · A action dims · P proprioception dims · B observations.
"""

import copy
import hashlib
import time
from pathlib import Path

import numpy as np

from openvla.serve.safety import STATISTICS, Forbidden, Limits, limits_of_statistics, range_of_statistics, read_limits

KEYS = {"images", "instruction", "proprio", "seed", "draft"}
IMAGE_OPTIONS = ("center_crop_area", "jpeg_quality", "lanczos3_size")


class OpenVLAPolicy:
    """A model, its processor and one dataset's statistics.

    Args:
        model: `OpenVLAForActionPrediction`.
        processor: `OpenVLAProcessor`.
        unnorm_key: whose statistics give the units; None if the checkpoint has exactly one dataset.
        image_options: for the processor's image part, such as `{"center_crop_area": 0.9}`.
        strict: raise when the language model prefers a token that is no action, instead of taking the best action.
        num_denoising_steps: of heads that denoise; None: as the checkpoint declares. Fewer are faster and less exact.
        seed: of the noise that these heads start from, for observations without a `seed` of their own: the same
            observation and seed give the same action, whoever else is in the batch. None: other noise each time.
        checkpoint: where it came from, for `metadata`.
        drafts: whether observations may hold a `draft`; False: it is not looked at.
        clamp: actions beyond the range of the statistics become the nearest within.
        limits: a robot's file of limits; see `safety`.
    """

    def __init__(
        self,
        model,
        processor,
        unnorm_key: str | None = None,
        image_options: dict | None = None,
        strict: bool = False,
        num_denoising_steps: int | None = None,
        seed: int | None = None,
        checkpoint: str | None = None,
        drafts: bool = True,
        clamp: bool = False,
        limits: str | Path | None = None,
    ):
        from openvla.action_tokenizer import ActionStats, name_action_dims, resolve_unnorm_key

        self.model, self.processor = model, processor
        self.unnorm_key = resolve_unnorm_key(model.norm_stats, unnorm_key)
        self.stats = ActionStats.from_norm_stats(model.norm_stats, self.unnorm_key, model.config.action_normalization)
        self.image_options, self.strict, self.checkpoint = dict(image_options or {}), strict, checkpoint
        self.seed, self.drafts = seed, drafts
        self.num_denoising_steps = model.config.choose_denoising_steps(num_denoising_steps)
        self.limits: list[Limits] = [self._range()] if clamp else []
        if limits is not None:
            names = [name for name, _ in name_action_dims(model.norm_stats, self.unnorm_key)]
            self.limits.append(read_limits(limits, names))

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        unnorm_key: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        prefer: tuple[str, ...] = (),
        action_chunk: int | None = None,
        num_cameras: int | None = None,
        quantize: str | None = None,
        compile_mode: str | None = None,
        batch_sizes: tuple[int, ...] = (1,),
        any_key: bool = False,
        **options,
    ) -> "OpenVLAPolicy":
        """Loads a Hub id or a folder.

        Args:
            unnorm_key: see the class; if None, the first of the keys in `prefer` that the checkpoint has.
            dtype: "auto" (as stored), "float32", "bfloat16", "float16".
            device: None: CUDA if there is one.
            action_chunk, num_cameras: of folders that OpenVLA-OFT's training left, whose files do not tell.
            quantize: "int8" or another of `openvla.quantization.METHODS`: less memory, but lossy.
            compile_mode: of `model.compile_for_actions`, such as "reduce-overhead": takes a while, then acts sooner.
            batch_sizes: numbers of observations at a time that are compiled.
            any_key: if there are several keys and none is named, take the first, to ask for others by
                `with_statistics`.
            options: of the class.
        """
        import torch

        from openvla.loading import load_onto

        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        told = {"revision": revision, "action_chunk": action_chunk, "num_cameras": num_cameras}
        model, processor = load_onto(device, checkpoint, quantize, dtype=dtype, **told)
        prefer += tuple(model.norm_stats or ()) if any_key else ()
        known = [key for key in prefer if key in (model.norm_stats or {})]
        unnorm_key = unnorm_key or (known[0] if known else None)
        policy = cls(model, processor, unnorm_key, checkpoint=checkpoint, **options)
        model.compile_for_actions(compile_mode, batch_sizes=batch_sizes)
        return policy

    def with_statistics(self, unnorm_key: str) -> "OpenVLAPolicy":
        """The same model and options, for another dataset; without the limits of a robot, whose units were others."""
        from openvla.action_tokenizer import ActionStats

        other = copy.copy(self)
        if unnorm_key == self.unnorm_key:
            return other
        scheme = self.model.config.action_normalization
        other.unnorm_key = unnorm_key
        other.stats = ActionStats.from_norm_stats(self.model.norm_stats, unnorm_key, scheme)
        other.limits = [other._range() for limits in self.limits if limits.source == STATISTICS]
        return other

    def _range(self) -> Limits:
        """Of the statistics."""
        from openvla.action_tokenizer import name_action_dims

        names = [name for name, _ in name_action_dims(self.model.norm_stats, self.unnorm_key)]
        return limits_of_statistics(self.stats, self.model.norm_stats[self.unnorm_key]["action"], names)

    def warm_up(self, batch: int = 1) -> float:
        """Acts on grey pictures, `batch` observations at once, until nothing more is set up; milliseconds of the last
        time."""
        plain = copy.copy(self)  # what it says of nothing is nobody's action: no reason to refuse
        plain.limits, plain.strict = [], False
        grey = np.full((*self.processor.image_processor.input_sizes[0][1:], 3), 127, dtype=np.uint8)
        state = {"proprio": np.zeros(self.model.config.proprio_dim)} if self.model.config.proprio_dim else {}
        observation = {"images": [grey] * self.processor.num_cameras, "instruction": "wait", **state}
        for _ in range(2):
            timing = plain.infer_batch([observation] * batch)[0]["timing"]
        return timing["preprocess_ms"] + timing["infer_ms"]

    @property
    def needs(self) -> tuple[str, ...]:
        """What simulators have to send; baselines need less."""
        return ("images", *["seed"] * self.model.config.denoises, *["draft"] * self.takes_drafts)

    @property
    def takes_drafts(self) -> bool:
        """Whether a guess of the answer may save passes, as of policies that answer token by token."""
        return self.drafts and self.model.config.attention == "causal"

    @property
    def metadata(self) -> dict:
        """What the policy declares, in types of JSON: to be compared with a robot's or a simulator's conventions."""
        from openvla.action_tokenizer import name_action_dims

        config, declared = self.model.config, self.model.norm_stats[self.unnorm_key]
        bounds = declared["action"]
        low_and_high = range_of_statistics(self.stats, bounds) or (self.stats.low, self.stats.high)
        dims = [
            {"name": name, "unit": unit, "low": float(low), "high": float(high)}
            for (name, unit), low, high in zip(name_action_dims(self.model.norm_stats, self.unnorm_key), *low_and_high)
        ]
        image_processor = self.processor.image_processor
        denoising = {"num_denoising_steps": self.num_denoising_steps, "seed": self.seed} if config.denoises else {}
        return {
            "checkpoint": self.checkpoint,
            "quantize": getattr(self.model, "quantize", None),
            "drafts": self.takes_drafts,
            "unnorm_key": self.unnorm_key,
            "action_dims": dims,
            "mask": self.stats.mask.tolist(),
            "action_chunk": config.action_chunk,
            "action_head": config.action_head,
            **denoising,
            "attention": config.attention,
            "proprio_dim": config.proprio_dim,
            "proprio_names": self._proprio_names(),
            "control_frequency": declared.get("control_frequency"),
            "frame": bounds.get("frame"),
            "limits": [limits.source for limits in self.limits],
            "num_cameras": self.processor.num_cameras,
            "cameras": self._cameras,
            "image_size": list(image_processor.input_sizes[0][1:]),
            **{name: self.image_options.get(name, getattr(image_processor, name)) for name in IMAGE_OPTIONS},
            "action_normalization": config.action_normalization,
            "prompt_template": self.processor.prompt_template,
        }

    def _proprio_names(self) -> list[str] | None:
        """Of the P numbers, if the policy takes any and its statistics name them."""
        declared = self.model.norm_stats[self.unnorm_key].get("proprio", {})
        return declared.get("names") if self.model.config.proprio_dim else None

    @property
    def _cameras(self) -> list[str] | None:
        """In the policy's order, if its training wrote them down."""
        return self.model.norm_stats[self.unnorm_key].get("cameras")

    def fingerprint(self) -> str:
        """Tells whether two policies have the same weights, wherever they lie: a hash over 64 numbers of each."""
        import torch

        from openvla.quantization import plain_tensors

        digest, generator = hashlib.sha256(), torch.Generator().manual_seed(0)
        for name, parameter in self.model.named_parameters():
            for tensor in plain_tensors(parameter.detach()):  # of quantised ones there are several
                values = tensor.flatten()
                places = torch.randint(len(values), (64,), generator=generator)
                sample = values[places.to(values.device)].cpu().contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(sample.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def infer(self, observation: dict) -> dict:
        """The action for one observation.

        Args:
            observation: `images`, one per camera in the policy's order (an image, a list, or a dict by the names in
                `metadata["cameras"]`; RGB, of any kind the processor takes), `instruction`; `proprio` `(P,)` in the
                units and order of the statistics' dataset, if the policy takes it (`metadata["proprio_dim"]`):
                otherwise it is not looked at; and if you like, for heads that denoise, `seed`, an integer from 0 or
                several of them; for policies that answer token by token, `draft`, `(T·A,)` token ids that the answer
                may resemble, such as the last `token_ids`: they save time, and change no token but, in short types,
                between two that rounding cannot tell apart.

        Returns `actions` `(T, A)` float64 in the units of the statistics; of the token head `token_ids` and `replaced`
        `(T·A,)`, the latter True where the language model preferred a token that is no action; `timing` in
        milliseconds; if there was a draft, `accepted`, how many of its tokens were right, and `passes` of the
        language model; and of policies with limits `clamped`, what they changed (`Limits.apply`).

        Raises ValueError for an observation that is not whole, RuntimeError for an action that is not finite or that
        the robot's limits forbid.
        """
        return self.infer_batch([observation])[0]

    def infer_batch(self, observations: list[dict]) -> list[dict]:
        """The actions for several observations, in one pass; see `infer`. Each may have its own instruction."""
        answers = self.try_batch(observations)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    def try_batch(self, observations: list[dict]) -> list[dict | RuntimeError]:
        """The same; an action that is not finite or forbidden is the error in its place, not the others'."""
        import torch

        start = time.perf_counter()
        prompts = [self.processor.build_prompt(_instruction(observation)) for observation in observations]
        images = [_images(observation, self._cameras) for observation in observations]
        takes_proprio = self.model.config.proprio_dim > 0
        states = np.stack([self._proprio(each) for each in observations]) if takes_proprio else None
        noise = self.model.draw_noise([observation.get("seed", self.seed) for observation in observations])
        draft = self._drafts(observations)
        inputs = self.processor(prompts, images, states, **self.image_options).to(self.model.device)
        prepared = time.perf_counter()
        with torch.no_grad():
            result = self.model.predict_action(
                **inputs,
                unnorm_key=self.unnorm_key,
                num_denoising_steps=self.num_denoising_steps,
                noise=noise,
                strict=self.strict,
                draft=draft,
                return_dict=True,
            )
        actions = result["actions"].reshape(len(observations), self.model.config.action_chunk, self.stats.dim)
        finished = time.perf_counter()
        timing = {"preprocess_ms": 1000 * (prepared - start), "infer_ms": 1000 * (finished - prepared)}
        timing |= {"batch_size": len(observations)}
        tokens = [name for name in ("token_ids", "replaced", "accepted") if name in result]  # by kind of policy
        passes = {} if draft is None else {"passes": result["passes"]}
        return [
            self._check(rows, {**{name: result[name][row] for name in tokens}, **passes, "timing": timing})
            for row, rows in enumerate(actions)
        ]

    def _check(self, actions: np.ndarray, rest: dict) -> dict | RuntimeError:
        """The answer with `actions` `(T, A)` within the limits, or why there is none."""
        if not np.isfinite(actions).all():
            return RuntimeError(f"An action holds NaN or infinity: {actions.tolist()}. Nothing was returned.")
        changed: list[dict] = []
        for limits in self.limits:
            try:
                actions, beyond = limits.apply(actions)
            except Forbidden as error:
                return error
            changed += beyond
        return {"actions": actions, **rest} | ({"clamped": changed} if self.limits else {})

    def _drafts(self, observations: list[dict]) -> np.ndarray | None:
        """`(B, T·A)`, if every observation has one."""
        drafts = [observation.get("draft") for observation in observations] if self.takes_drafts else [None]
        if any(draft is None for draft in drafts):
            return None
        expected = (self.model.config.action_chunk * self.stats.dim,)
        for draft in drafts:
            if np.shape(draft) != expected:
                raise ValueError(f"Expected drafts of {expected} token ids, got {np.shape(draft)}.")
        return np.stack(drafts)

    def _proprio(self, observation: dict) -> np.ndarray:
        """`(P,)` float64, checked."""
        expected, names = self.model.config.proprio_dim, self._proprio_names()
        wanted = f"The policy takes proprio of {expected} dims{f' ({names})' if names else ''}, in dataset units"
        if observation.get("proprio") is None:
            raise ValueError(f"{wanted}; the observation has none.")
        state = np.asarray(observation["proprio"], dtype=np.float64)
        if state.shape != (expected,) or not np.isfinite(state).all():
            raise ValueError(f"{wanted} and finite, got shape {state.shape}: {state.tolist()}.")
        return state


def _instruction(observation: dict) -> str:
    if not isinstance(observation, dict) or (unknown := sorted(map(str, set(observation) - KEYS))):
        got = type(observation).__name__ if not isinstance(observation, dict) else f"also {unknown}"
        raise ValueError(f"Expected an observation with the keys {sorted(KEYS)}, got {got}.")
    if missing := [key for key in ("images", "instruction") if key not in observation]:
        raise ValueError(f"The observation has no {missing}, only {sorted(observation)}.")
    return observation["instruction"]


def _images(observation: dict, cameras: list[str] | None) -> list:
    images = observation["images"]
    if isinstance(images, dict):
        if cameras is None and len(images) > 1:
            raise ValueError(
                f"The policy's statistics do not name its cameras: pass a list in its order, not {list(images)}."
            )
        if cameras is not None and set(images) != set(cameras):
            raise ValueError(f"Expected images of the cameras {cameras}, got {list(images)}.")
        return [images[camera] for camera in cameras or images]
    return list(images) if isinstance(images, list | tuple) else [images]
