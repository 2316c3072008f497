"""What clients of all protocols send -> observations as `OpenVLAPolicy.infer` takes them.

Robots' scripts name cameras, states and instructions as they like. Where names leave no doubt they are understood;
where they do, the observation is refused, with the names that would do.

Legend: P proprioception dims.
"""

import numpy as np

from openvla.serve.handler import MAX_INSTRUCTION
from openvla.serve.wire import Malformed

INSTRUCTIONS = ("instruction", "prompt", "task_description", "task")
STATES = ("proprio", "state", "states")
ON_THE_ARM = ("wrist", "hand", "gripper")  # in the name of a camera
MAX_SIDE = 4096
MAX_SEED = 2**63


def read_observation(content, metadata: dict, options: tuple[str, ...] = ()) -> dict:
    """`images` in the policy's order, `instruction`, and `proprio` if the policy takes it.

    Args:
        content: a map with pictures (uint8 arrays, by name, or in the policy's order as a list `images`), the
            instruction and the robot's state; nested, or with names such as "observation/image". Anything else is not
            looked at.
        metadata: `OpenVLAPolicy.metadata`.
        options: names that mean something else in the protocol.

    Raises Malformed for what is missing or ambiguous.
    """
    if not isinstance(content, dict):
        raise Malformed(f"Expected an observation as a map, got {type(content).__name__}.")
    fields = {name: value for name, value in _flatten(content) if name not in options}
    observation = {"images": _pictures(fields, metadata), "instruction": _instruction(fields)}
    if metadata["proprio_dim"]:
        observation["proprio"] = check_state(_one(fields, STATES, "state of the robot"), metadata)
    if (seed := content.get("seed")) is not None:
        if type(seed) is not int or not 0 <= seed < MAX_SEED:
            raise Malformed(f"Expected a seed as an integer from 0, got {str(seed)[:40]}.")
        observation["seed"] = seed
    return observation


def check_state(state, metadata: dict) -> np.ndarray:
    """`(P,)` float64."""
    count, names = metadata["proprio_dim"], metadata["proprio_names"]
    try:
        values = np.asarray(state, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        values = np.zeros(0)
    if values.shape != (count,) or not np.isfinite(values).all():
        got = "one that is not finite" if values.shape == (count,) else f"{len(values)} numbers"
        raise Malformed(
            f"The policy takes the robot's state: {count} finite numbers{f' {names}' if names else ''} in the units "
            f"of its dataset; got {got}."
        )
    return values


def check_picture(picture: np.ndarray, name: str) -> np.ndarray:
    """`(H, W, 3)` uint8, also of `(3, H, W)`."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or 0 in picture.shape:
        raise Malformed(f"Expected {name!r} as a picture (H, W, 3) of uint8, got {picture.shape} of {picture.dtype}.")
    if picture.shape[0] == 3 and picture.shape[2] != 3:
        picture = picture.transpose(1, 2, 0)
    if picture.shape[2] != 3 or max(picture.shape) > MAX_SIDE:
        raise Malformed(f"Expected {name!r} as (H, W, 3), sides up to {MAX_SIDE}, got {picture.shape}.")
    return np.ascontiguousarray(picture)


def choose_pictures(pictures: dict[str, np.ndarray], cameras: list[str] | None, count: int) -> list[np.ndarray]:
    """The pictures in the policy's order.

    Args:
        pictures: by the names that the client gave them, in its order.
        cameras: the policy's, if its training wrote them down.
        count: of the policy's cameras.

    By name if all are there. Otherwise as OpenVLA-OFT's server does it: first what looks on, then what sits on the
    arm. Of either kind there must be as many as the policy has, and of cameras whose names are known one of a kind.
    """
    by_name = {_last(name): picture for name, picture in pictures.items()}
    wanted = [_last(name) for name in cameras or []]
    if wanted and len(by_name) == len(pictures) and set(wanted) <= set(by_name):
        return [by_name[name] for name in wanted]
    kinds = [_is_on_the_arm(name) for name in cameras or []] or [False] + [True] * (count - 1)
    found = {kind: [name for name in pictures if _is_on_the_arm(name) is kind] for kind in (False, True)}
    fits = all(kinds.count(kind) in (0, len(names)) for kind, names in found.items())
    if not fits or (cameras is not None and max(kinds.count(False), kinds.count(True)) > 1):
        raise Malformed(
            f"The policy looks through {count} camera(s){f', {cameras}' if cameras else ''}; of the pictures "
            f"{list(pictures)[:20]} it is not clear which is which: send them as a list `images` in its order, or by "
            "its names."
        )
    names = {kind: iter(found[kind]) for kind in found}
    return [pictures[next(names[kind])] for kind in kinds]


def _pictures(fields: dict, metadata: dict) -> list[np.ndarray]:
    cameras, count = metadata["cameras"], metadata["num_cameras"]
    if isinstance(in_order := fields.get("images"), list):
        if len(in_order) != count or not all(isinstance(picture, np.ndarray) for picture in in_order):
            order = f" of the cameras {cameras}" if cameras else ""
            raise Malformed(f"Expected {count} picture(s){order} as a list, got {len(in_order)} entries.")
        return [check_picture(picture, f"images[{index}]") for index, picture in enumerate(in_order)]
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    pictures = {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim == 3}
    if not pictures:
        raise Malformed(
            "The observation has no picture, which is (H, W, 3) of uint8; its arrays are "
            f"{[f'{name} {array.shape} of {array.dtype}' for name, array in list(arrays.items())[:10]]}."
        )
    chosen = choose_pictures(pictures, cameras, count)
    names = {id(picture): name for name, picture in pictures.items()}
    return [check_picture(picture, names[id(picture)]) for picture in chosen]


def _instruction(fields: dict) -> str:
    instruction = _one(fields, INSTRUCTIONS, "instruction")
    if not isinstance(instruction, str) or not instruction.strip() or len(instruction) > MAX_INSTRUCTION:
        got = f"{len(instruction)} characters" if isinstance(instruction, str) else type(instruction).__name__
        raise Malformed(f"Expected an instruction of 1 to {MAX_INSTRUCTION} characters, got {got}.")
    try:
        instruction.encode()
    except UnicodeEncodeError:
        raise Malformed("The instruction holds half of a character that needs two (a lone surrogate).") from None
    return instruction


def _one(fields: dict, names: tuple[str, ...], what: str):
    found = {name: value for name, value in fields.items() if _last(name) in names}
    if len(found) != 1:
        raise Malformed(
            f"Expected one {what}, called one of {list(names)}, got {list(found) or f'only {list(fields)[:20]}'}."
        )
    return next(iter(found.values()))


def _flatten(content: dict, depth: int = 3):
    """(name, value) of all that is in nested maps."""
    for name, value in content.items():
        if not isinstance(name, str):
            raise Malformed(f"Expected names as text, got {str(name)[:40]!r}.")
        if isinstance(value, dict) and depth:
            yield from ((f"{name}/{inner}", each) for inner, each in _flatten(value, depth - 1))
        else:
            yield name, value


def _last(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]


def _is_on_the_arm(name: str) -> bool:
    return any(word in _last(name).lower() for word in ON_THE_ARM)
