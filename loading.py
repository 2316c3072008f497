"""`openvla.load`: a policy and its processor from any OpenVLA checkpoint, in one line and by this package's code."""

import json


def load(pretrained_model_name_or_path: str, **kwargs):
    """Loads model and processor of a Hub id or a folder, whatever code the repository itself points to.

        model, processor = openvla.load("openvla/openvla-7b", dtype=torch.bfloat16, device_map="auto")

    Args:
        kwargs: for `from_pretrained` of the model (`dtype`, `device_map`, `quantization_config`, …); `revision`,
            `token`, `cache_dir`, `local_files_only` and `subfolder` go to the processor, too. Folders that
            OpenVLA-OFT's training left may need `action_chunk` and `num_cameras`, which their files do not tell.

    Returns `(OpenVLAForActionPrediction in eval mode, OpenVLAProcessor)`; with `output_loading_info`, the former is
    `(model, report)`.
    """
    from transformers.utils import cached_file

    from openvla.modeling_openvla import OpenVLAForActionPrediction
    from openvla.processing_openvla import OpenVLAProcessor

    shared = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    shared = {key: kwargs[key] for key in shared if key in kwargs}
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    adapter = cached_file(pretrained_model_name_or_path, "adapter_config.json", **optional, **shared)
    own = cached_file(pretrained_model_name_or_path, "preprocessor_config.json", **optional, **shared)
    if adapter is None or own is not None:
        told = {"num_cameras": kwargs["num_cameras"]} if "num_cameras" in kwargs else {}
        processor = OpenVLAProcessor.from_pretrained(pretrained_model_name_or_path, **shared, **told)
    else:  # a LoRA adapter alone: the model comes with its base, and so does the processor
        with open(adapter, encoding="utf-8") as file:
            base = json.load(file)["base_model_name_or_path"]
        processor = OpenVLAProcessor.from_pretrained(base, **{k: v for k, v in shared.items() if k != "revision"})
    loaded = OpenVLAForActionPrediction.from_pretrained(pretrained_model_name_or_path, **kwargs)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.eval()
    processor.num_cameras = model.config.num_cameras  # which `kwargs` may have changed
    processor.num_state_tokens = model.config.num_placeholders - model.config.num_image_tokens
    return loaded, processor
