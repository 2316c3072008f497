"""What clients of all protocols send -> observations as `OpenVLAPolicy.infer` takes them.

Robots' scripts name cameras, states and instructions as they like. Where names leave no doubt they are understood;
where they do, the observation is refused, with the names that would do.

Legend: P proprioception dims.
"""

import time

import numpy as np

from openvla.serve.batching import Turn
from openvla.serve.handler import MAX_INSTRUCTION
from openvla.serve.wire import Malformed

INSTRUCTIONS = ("instruction", "prompt", "task_description", "task")
STATES = ("proprio", "state", "states")
ON_THE_ARM = ("wrist", "hand", "gripper")  # in the name of a camera
# Names that say no more than that it is the picture that looks on, or the one on the arm: they may stand for a camera
# that the policy calls otherwise, if it has one of the kind. "left" for "right" may not.
ANY_MAIN = ("image", "full_image", "image_primary", "primary", "main", "rgb", "picture", "frame")
ANY_ON_THE_ARM = ("wrist", "wrist_image", "image_wrist", "hand", "hand_image", "gripper_image")
# What decides about the answer, too: where a protocol does not look at it, it must not be there
OPTIONS = ("unnorm_key", "session", "timestamp", "age_ms", "max_age_ms", "seed")
AHEAD = 0.1  # seconds that a robot's clock may be ahead of ours
SESSION = 200  # characters
LATEST = 1e12  # of numbers that are times
MAX_SIDE = 4096
MAX_SEED, MAX_SEEDS = 2**63, 8


def read_observation(content, metadata: dict, options: tuple[str, ...] = OPTIONS) -> dict:
    """`images` in the policy's order, `instruction`, and `proprio` if the policy takes it.

    Args:
        content: a map with pictures (uint8 arrays, by name, or in the policy's order as a list `images`), the
            instruction and the robot's state; nested, or with names such as "observation/image". Anything else is not
            looked at.
        metadata: `OpenVLAPolicy.metadata`.
        options: names in `content` itself that the protocol looks at; of `OPTIONS`, other places are refused.

    Raises Malformed for what is missing or ambiguous.
    """
    if not isinstance(content, dict):
        raise Malformed(f"Expected an observation as a map, got {type(content).__name__}.")
    fields = {name: value for name, value in flatten(content).items() if name not in options}
    if unread := [name for name in fields if _last(name) in OPTIONS and fields[name] is not None]:
        raise Malformed(
            f"Nobody looks at {unread[0]!r}, which would change the answer: beside the pictures this protocol takes "
            f"{list(options)}."
        )
    observation = {"images": _pictures(fields, metadata), "instruction": _instruction(fields)}
    if metadata["proprio_dim"]:
        observation["proprio"] = check_state(_one(fields, STATES, "state of the robot"), metadata)
    if (seed := content.get("seed")) is not None:
        numbers = seed if isinstance(seed, list) else [seed]
        if not 0 < len(numbers) <= MAX_SEEDS or not all(
            type(each) is int and 0 <= each < MAX_SEED for each in numbers
        ):
            raise Malformed(f"Expected a seed as an integer from 0 or a list of some, got {str(seed)[:40]}.")
        observation["seed"] = tuple(seed) if isinstance(seed, list) else seed
    return observation


def read_turn(content: dict, arrived: float) -> Turn:
    """Whose observation it is, and how old; Malformed for what is no time. See `Turn`."""
    session = content.get("session")
    if session is not None and (not isinstance(session, str) or len(session) > SESSION):
        raise Malformed(f"Expected a session as text of up to {SESSION} characters.")
    times = {name: content.get(name) for name in ("timestamp", "age_ms", "max_age_ms")}
    for name, value in times.items():
        if value is not None and (type(value) not in (int, float) or not 0 <= value < LATEST):
            raise Malformed(f"Expected {name} as a number from 0, got {str(value)[:40]}.")
    on_the_way = (times["age_ms"] or 0) / 1000
    if times["timestamp"] is not None:
        since = time.time() - times["timestamp"] - (time.monotonic() - arrived)  # when it arrived
        if since < -AHEAD:
            raise Malformed(f"timestamp is {-since:.1f} s in the future: set the robot's clock, or leave it out.")
        on_the_way = max(since, on_the_way)
    allowed = times["max_age_ms"]
    return Turn(arrived, session, on_the_way, None if allowed is None else allowed / 1000)


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

    By the policy's names if all are there, whole or the last part of each. Otherwise general names such as "image" and
    "wrist_image" stand for the one camera that looks on and the one on the arm. Policies whose cameras have no names
    are asked as OpenVLA-OFT's server is: one that looks on, then those on the arm in the client's order.
    """
    if cameras is None:
        main = [name for name in pictures if not is_on_the_arm(name)]
        arm = [name for name in pictures if is_on_the_arm(name)]
        chosen = [*main, *arm] if len(main) == 1 and len(arm) == count - 1 else main if count == len(main) == 1 else []
    elif set(cameras) <= set(pictures):
        chosen = cameras
    else:
        chosen = _by_last_names(pictures, cameras) or _by_general_names(pictures, cameras)
    if not chosen:
        raise Malformed(
            f"The policy looks through {count} camera(s){f', {cameras}' if cameras else ''}; of the pictures "
            f"{list(pictures)[:20]} it is not clear which is which: send them as a list `images` in its order, or by "
            "its names."
        )
    return [pictures[name] for name in chosen]


def _by_last_names(pictures: dict, cameras: list[str]) -> list[str]:
    """The client's name for each camera; none if any is missing, or two have the same."""
    given, wanted = [_last(name) for name in pictures], [_last(name) for name in cameras]
    if len(set(wanted)) < len(wanted) or any(given.count(name) != 1 for name in wanted):
        return []
    names = dict(zip(given, pictures))
    return [names[name] for name in wanted]


def _by_general_names(pictures: dict, cameras: list[str]) -> list[str]:
    kinds = [is_on_the_arm(name) for name in cameras]
    general = {
        False: [name for name in pictures if _last(name) in ANY_MAIN],
        True: [name for name in pictures if _last(name) in ANY_ON_THE_ARM],
    }
    if len(cameras) == 1 and not general[kinds[0]]:  # the picture of the one camera, wherever that sits
        return general[False] if len(pictures) == len(general[False]) == 1 else []
    if len(set(kinds)) < len(kinds) or any(len(general[kind]) != 1 for kind in kinds):
        return []
    return [general[kind][0] for kind in kinds]


def _pictures(fields: dict, metadata: dict) -> list[np.ndarray]:
    cameras, count = metadata["cameras"], metadata["num_cameras"]
    arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
    pictures = {name: array for name, array in arrays.items() if array.dtype == np.uint8 and array.ndim == 3}
    if isinstance(in_order := fields.get("images"), list):
        if len(in_order) != count or not all(isinstance(picture, np.ndarray) for picture in in_order):
            order = f" of the cameras {cameras}" if cameras else ""
            raise Malformed(f"Expected {count} picture(s){order} as a list, got {len(in_order)} entries.")
        if pictures:
            raise Malformed(
                f"Beside the list `images` there are pictures {list(pictures)[:20]}: send one or the other."
            )
        return [check_picture(picture, f"images[{index}]") for index, picture in enumerate(in_order)]
    if not pictures:
        raise Malformed(
            "The observation has no picture, which is (H, W, 3) of uint8; its arrays are "
            f"{[f'{name} {array.shape} of {array.dtype}' for name, array in list(arrays.items())[:10]]}."
        )
    chosen = choose_pictures(pictures, cameras, count)
    return [check_picture(picture, "a picture") for picture in chosen]


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


def flatten(content: dict, depth: int = 3) -> dict:
    """All that is in nested maps, by names such as "observation/image"; Malformed for a name that is there twice."""
    found: dict = {}
    for name, value in content.items():
        if not isinstance(name, str):
            raise Malformed(f"Expected names as text, got {str(name)[:40]!r}.")
        is_map = isinstance(value, dict) and depth
        inner = {f"{name}/{key}": each for key, each in flatten(value, depth - 1).items()} if is_map else {name: value}
        for twice in inner:
            if twice in found:
                raise Malformed(f"{twice!r} is there twice.")
        found |= inner
    return found


def _last(name: str) -> str:
    return name.replace("/", ".").rpartition(".")[2]


def is_on_the_arm(name: str) -> bool:
    """Whether a camera's name says so."""
    return any(word in _last(name).lower() for word in ON_THE_ARM)
