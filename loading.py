"""`openvla.load`: a policy and its processor from any OpenVLA checkpoint, in one line and by this package's code."""

import json


def load(pretrained_model_name_or_path: str, quantize: str | None = None, **kwargs):
    """Loads model and processor of a Hub id or a folder, whatever code the repository itself points to.

        model, processor = openvla.load("openvla/openvla-7b", dtype=torch.bfloat16, device_map="auto")

    Args:
        quantize: one of `openvla.quantization.METHODS`, such as "int8": fewer bits for the language model, on CUDA if
            there is one unless `device_map` says otherwise. Lossy.
        kwargs: for `from_pretrained` of the model (`dtype`, `device_map`, `quantization_config`, …); `revision`,
            `token`, `cache_dir`, `local_files_only` and `subfolder` go to the processor, too. Folders that
            OpenVLA-OFT's training left may need `action_chunk` and `num_cameras`, which their files do not tell.

    Returns `(OpenVLAForActionPrediction in eval mode, OpenVLAProcessor)`; with `output_loading_info`, the former is
    `(model, report)`.
    """
    from transformers.utils import cached_file

    from openvla.modeling_openvla import OpenVLAForActionPrediction
    from openvla.processing_openvla import OpenVLAProcessor
    from openvla.quantization import check_quantized, loading_options

    shared = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    shared = {key: kwargs[key] for key in shared if key in kwargs}
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    adapter = cached_file(pretrained_model_name_or_path, "adapter_config.json", **optional, **shared)
    own = cached_file(pretrained_model_name_or_path, "preprocessor_config.json", **optional, **shared)
    if quantize is not None:
        declared = cached_file(pretrained_model_name_or_path, "config.json", **optional, **shared)
        _refuse_to_quantize(pretrained_model_name_or_path, adapter, declared)
        kwargs = loading_options(quantize, kwargs)
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
    if quantize is not None:
        check_quantized(model, quantize)
        model.quantize = quantize  # what `OpenVLAPolicy.metadata` tells
    processor.num_cameras = model.config.num_cameras  # which `kwargs` may have changed
    processor.num_state_tokens = model.config.num_placeholders - model.config.num_image_tokens
    return loaded, processor


def load_onto(device: str, name: str, quantize: str | None = None, **kwargs):
    """`load`, and all of it on one device. Keyword arguments that are None count as not given."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if quantize is not None:  # on its way there: bitsandbytes does not let itself be moved
        return load(name, quantize=quantize, device_map=device, **kwargs)
    model, processor = load(name, **kwargs)
    return model.to(device), processor


def _refuse_to_quantize(name: str, adapter: str | None, declared: str | None) -> None:
    """Raises ValueError for an adapter and for what is quantised already.

    Args:
        adapter, declared: its adapter_config.json and config.json, if there are.
    """
    if adapter is not None:
        raise ValueError(
            f"{name} is an adapter, which is not quantised along with its base: merge them with `openvla export`, and "
            "quantise the result."
        )
    if declared is None:
        return  # whoever loads it says what is missing
    with open(declared, encoding="utf-8") as file:
        already = json.load(file).get("quantization_config")
    if already:
        kind = already.get("quant_method", "some method")
        raise ValueError(f"{name} is quantised already ({kind}): load it without `quantize`.")
