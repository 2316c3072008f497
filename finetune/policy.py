"""Opens the policy that a run starts from as what it shall become: another head, other cameras and inputs.

What the starting checkpoint does not have (a head, a projector, FiLM) starts at random, everything else as it was.
"""

import logging

# Modules beside towers, projector and language model: always trained, whole, with adapters too
NEW_PARTS = ("action_head", "proprio_projector", "noisy_action_projector")
FILM = ("scale", "shift")  # in every block of the towers

logger = logging.getLogger(__name__)


def open_policy(name: str, fields: dict, **options) -> tuple:
    """Model and processor.

    Args:
        fields: of `policy_fields`.
        options: for `from_pretrained`.

    Raises ValueError if the checkpoint lacks anything but what `fields` add.
    """
    from openvla.loading import load

    if not fields:
        return load(name, **options)
    (model, report), processor = load(name, output_loading_info=True, **fields, **options)
    missing = {key for key in report["missing_keys"] if not is_new(key)}
    if missing or report["mismatched_keys"]:
        raise ValueError(
            f"{name} lacks {sorted(missing)[:3]}, and has {list(report['mismatched_keys'])[:2]} of other shapes: only "
            "heads, projectors and FiLM may be new."
        )
    new = sorted(key for key in report["missing_keys"] if is_new(key))
    if new:
        logger.warning("%d tensors start at random: %s …", len(new), ", ".join(new[:3]))
    return model, processor


def is_new(parameter: str) -> bool:
    """Whether a parameter belongs to what is always trained whole."""
    parts = parameter.split(".")
    return any(part in parts for part in NEW_PARTS) or ("vision_backbone" in parts and parts[-2] in FILM)
