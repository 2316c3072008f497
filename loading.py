"""`openvla.load`: a policy and its processor from any OpenVLA checkpoint, in one line and by this package's code."""


def load(pretrained_model_name_or_path: str, **kwargs):
    """Loads model and processor of a Hub id or a folder, whatever code the repository itself points to.

        model, processor = openvla.load("openvla/openvla-7b", dtype=torch.bfloat16, device_map="auto")

    Args:
        kwargs: for `from_pretrained` of the model (`dtype`, `device_map`, `quantization_config`, …); `revision`,
            `token`, `cache_dir`, `local_files_only` and `subfolder` go to the processor, too.

    Returns `(OpenVLAForActionPrediction in eval mode, OpenVLAProcessor)`.
    """
    from openvla.modeling_openvla import OpenVLAForActionPrediction
    from openvla.processing_openvla import OpenVLAProcessor

    shared = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    processor = OpenVLAProcessor.from_pretrained(
        pretrained_model_name_or_path, **{key: kwargs[key] for key in shared if key in kwargs}
    )
    model = OpenVLAForActionPrediction.from_pretrained(pretrained_model_name_or_path, **kwargs)
    return model.eval(), processor
