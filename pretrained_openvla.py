"""How weights and statistics come in and go out: the class that both models of the policy share.

Modules are nested as `{model: {vision_backbone, projector, language_model}, lm_head}`, files keep the released flat
names; `CHECKPOINT_RENAMES` is the only bridge, used by loading, saving and adapters alike.
"""

import copy
import json
import logging
import os
import re

from safetensors import safe_open
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.utils import cached_file

from .configuration_openvla import OpenVLAConfig
from .oft_files import HUB_KEYS, OFTWeights, find_oft

logger = logging.getLogger(__name__)

# Released name -> module name, as regular expressions.
CHECKPOINT_RENAMES = {
    r"^vision_backbone": "model.vision_backbone",
    r"^projector": "model.projector",
    r"^proprio_projector": "model.proprio_projector",
    r"^noisy_action_projector": "model.noisy_action_projector",
    r"^language_model\.model": "model.language_model",
    r"^language_model\.lm_head": "lm_head",
}
# Left in full precision by bitsandbytes and torchao: few parameters, and they see the image or pick the action.
# transformers 5 takes the beginning of a name, hence those of both models.
UNQUANTIZED_MODULES = ["vision_backbone", "projector", "proprio_projector", "noisy_action_projector"]
UNQUANTIZED_MODULES += [f"model.{name}" for name in UNQUANTIZED_MODULES] + ["action_head", "lm_head"]
# Beside an adapter: what the policy is, whose base may have another head and other inputs. A config.json there would
# make transformers look for the weights there, too.
ADAPTER_CONFIG = "openvla_config.json"
TRANSFORMERS_4 = transformers_version.startswith("4.")

if not TRANSFORMERS_4:
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    # overwrite: remote code is imported anew for every revision of a repository.
    register_checkpoint_conversion_mapping(
        "openvla", [WeightRenaming(source, target) for source, target in CHECKPOINT_RENAMES.items()], overwrite=True
    )


def module_name(released: str) -> str:
    """Where the tensor of a released name lives in the model."""
    for pattern, target in CHECKPOINT_RENAMES.items():
        released = re.sub(pattern, target, released)
    return released


class OpenVLAPreTrainedModel(PreTrainedModel):
    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # A whole tower: `device_map` would otherwise part its position table from its blocks.
    _no_split_modules = ["VisionTransformer", "OpenVLAProjector"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True  # transformers 4.57
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _checkpoint_conversion_mapping = CHECKPOINT_RENAMES  # peft reads it to load adapters made for the original

    def __init__(self, config: OpenVLAConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # What released files hold beyond what is ever used: last blocks, final norms and pooling heads of the towers.
        names = ("featurizer", "fused_featurizer")
        self._keys_to_ignore_on_load_unexpected = [
            rf"vision_backbone\.{name}\.{unused}"
            for name, tower in zip(names, config.vision_towers)
            for unused in (rf"blocks\.{tower.depth - 1}\.", r"norm\.", r"attn_pool\.", r"fc_norm\.", r"head\.")
        ]

    def _init_weights(self, module: nn.Module):
        if getattr(module, "starts_as_in_torch", False):  # heads and FiLM, as the original trains them
            module.reset_parameters()
            return
        super()._init_weights(module)
        if hasattr(module, "scale_factor"):
            nn.init.constant_(module.scale_factor, module.init_value)
        elif hasattr(module, "pos_embed"):
            nn.init.trunc_normal_(module.pos_embed, std=0.02)
            for token in (module.cls_token, module.reg_token):
                if token is not None:
                    nn.init.normal_(token, std=1e-6)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """`PreTrainedModel.from_pretrained`, and five things that would otherwise go wrong in silence.

        Weights that are missing or of another shape raise instead of being drawn at random (unless
        `output_loading_info` asks for the report, or `ignore_mismatched_sizes` allows it). bitsandbytes and torchao
        leave `UNQUANTIZED_MODULES` alone unless `llm_int8_skip_modules` or `modules_to_not_convert` say otherwise. A
        `dataset_statistics.json` beside the weights, which the original's fine-tuning writes, replaces
        `config.norm_stats`, as in the original's deployment. Policies of OpenVLA-OFT get the parts that lie beside
        their weights (`oft_files.py`), and may need `action_chunk` and `num_cameras`. One whose `config` says nothing
        of it (`AutoConfig` cannot tell) is refused.
        """
        if pretrained_model_name_or_path is None:  # a state_dict is given instead
            return super().from_pretrained(None, *args, **kwargs)
        path = str(pretrained_model_name_or_path)
        hub_keys = (*HUB_KEYS, "force_download", "subfolder")
        hub_kwargs = {key: kwargs[key] for key in hub_keys if kwargs.get(key) is not None}
        if isinstance(kwargs.get("config"), str | os.PathLike):
            kwargs["config"] = cls.config_class.from_pretrained(kwargs["config"])
        oft_files = _find_oft(path, hub_kwargs, kwargs.get("config"))
        for flag in ("load_in_4bit", "load_in_8bit"):  # removed in transformers 5, still passed by old scripts
            if kwargs.pop(flag, False):
                kwargs["quantization_config"] = BitsAndBytesConfig(**{flag: True})
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = _keep_towers_unquantized(kwargs["quantization_config"])

        is_adapter = _file(path, "adapter_config.json", hub_kwargs) is not None
        told = _file(path, ADAPTER_CONFIG, hub_kwargs) if is_adapter and "config" not in kwargs else None
        if told is not None:
            kwargs["config"] = cls.config_class.from_json_file(told)
        report_wanted = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        if not TRANSFORMERS_4 and getattr(model, "_weight_conversions", None) is not None:
            # It notes the renames that the file needed, to undo those when saving: parts that the file lacks, and that
            # training adds, would be saved under our names.
            used = {pattern for each in model._weight_conversions for pattern in each.source_patterns}
            unused = {source: target for source, target in CHECKPOINT_RENAMES.items() if source not in used}
            model._weight_conversions += [WeightRenaming(source, target) for source, target in unused.items()]
        missing = {key for key in report["missing_keys"] if ".lora_" not in key}  # those start as no-ops
        if is_adapter:
            missing = {key.replace(".modules_to_save.default.", ".") for key in missing}  # peft's wrapping
            missing -= _held_whole(path, hub_kwargs)
        if oft_files is not None:
            missing -= model._load_oft(oft_files)
        report["missing_keys"] = missing
        missing = sorted(missing)
        mismatched = [] if kwargs.get("ignore_mismatched_sizes") else list(report["mismatched_keys"])
        if (missing or mismatched) and not report_wanted:
            raise ValueError(
                f"{path} lacks {len(missing)} tensors ({', '.join(missing[:3])} …) and has {len(mismatched)} of "
                f"another shape ({mismatched[:2]}): a policy with random parts must not act."
            )
        model.config.norm_stats = _dataset_statistics(path, hub_kwargs, model.config.norm_stats)
        return (model, report) if report_wanted else model

    def _load_oft(self, files) -> set[str]:
        """Puts in what lies beside the weights; returns the names of it."""
        weights = {module_name(name): tensor for name, tensor in OFTWeights(files).items()}
        if not hasattr(self, "lm_head"):  # the base model alone
            weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
            weights = {name: tensor for name, tensor in weights.items() if not name.startswith("action_head.")}
        own = dict(self.named_parameters())
        unlike = [name for name, tensor in weights.items() if name in own and own[name].shape != tensor.shape]
        if unlike:
            raise ValueError(
                f"{files.folder} holds {len(unlike)} tensors that do not fit its policy, such as {unlike[0]} of "
                f"{tuple(weights[unlike[0]].shape)} for {tuple(own[unlike[0]].shape)}: other sizes need another head."
            )
        unknown = [
            name
            for name in self.load_state_dict(weights, strict=False).unexpected_keys
            if not any(re.search(pattern, name) for pattern in self._keys_to_ignore_on_load_unexpected)
        ]
        if unknown:
            raise ValueError(f"{files.folder} holds weights that its policy does not have: {unknown[:5]} …")
        if offloaded := [name for name in weights if name in own and own[name].is_meta]:
            raise ValueError(
                f"{len(offloaded)} tensors such as {offloaded[0]} come from beside the weights of {files.folder}, and "
                "cannot be offloaded: make it one folder with `openvla convert`, or choose another device_map."
            )
        logger.warning("Of what transformers may call missing, %d tensors come from beside the weights.", len(weights))
        return set(weights)

    def save_pretrained(self, save_directory, **kwargs):
        """`PreTrainedModel.save_pretrained` in the released layout, with `dataset_statistics.json` for older tools."""
        if self.config.norm_stats is not None:
            os.makedirs(save_directory, exist_ok=True)
            path = os.path.join(save_directory, "dataset_statistics.json")
            with open(path + ".tmp", "w", encoding="utf-8") as file:
                json.dump(self.config.norm_stats, file, indent=2)
            os.replace(path + ".tmp", path)
        if not hasattr(self, "lm_head") and not TRANSFORMERS_4:  # the base model alone has names of its own there
            state_dict = kwargs.pop("state_dict", None) or self.state_dict()
            kwargs |= {"state_dict": self._fix_state_dict_keys_on_save(state_dict), "save_original_format": False}
        super().save_pretrained(save_directory, **kwargs)

    # transformers 4.57 applies renames only to its own models: the three hooks below do it there.
    def load_adapter(self, *args, **kwargs):
        if TRANSFORMERS_4:
            options = dict(kwargs.get("adapter_kwargs") or {})
            kwargs["adapter_kwargs"] = {**options, "key_mapping": options.get("key_mapping") or CHECKPOINT_RENAMES}
        return super().load_adapter(*args, **kwargs)

    def _get_key_renaming_mapping(self, checkpoint_keys, key_mapping=None, *unused_flags, **unused_kwargs):
        is_base = not hasattr(self, "lm_head")
        return super()._get_key_renaming_mapping(
            checkpoint_keys, {**CHECKPOINT_RENAMES, **(key_mapping or {})}, is_base, False
        )

    def _fix_state_dict_keys_on_save(self, state_dict: dict) -> dict:
        if not hasattr(self, "lm_head"):  # the base model alone: its names lack the "model." of the full one
            state_dict = {f"model.{key}": value for key, value in state_dict.items()}
        back = {target: source.strip("^").replace("\\", "") for source, target in CHECKPOINT_RENAMES.items()}
        renamed = {}
        for key, value in state_dict.items():
            target = next((t for t in back if key.startswith(t + ".")), None)
            renamed[key if target is None else back[target] + key[len(target) :]] = value
        return renamed


def _file(path: str, name: str, hub_kwargs: dict) -> str | None:
    optional = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return cached_file(path, name, **optional, **hub_kwargs)


def _held_whole(path: str, hub_kwargs: dict) -> set[str]:
    """Parameters that an adapter brings as a whole."""
    file = _file(path, "adapter_model.safetensors", hub_kwargs)
    if file is None:
        return set()
    with safe_open(file, framework="pt") as weights:
        names = weights.keys()
    names = [name for name in names if ".lora_" not in name]
    held = {module_name(name.removeprefix("base_model.model.")).replace(".base_layer.", ".") for name in names}
    return held | {name.removeprefix("model.") for name in held}  # of the base model alone


def _find_oft(path: str, hub_kwargs: dict, config: OpenVLAConfig | None):
    """The files of a policy of OpenVLA-OFT, or None. Raises ValueError if `config` takes it for something else."""
    file = _file(path, "config.json", hub_kwargs)
    if file is None:  # an adapter: its base has one
        return None
    with open(file, encoding="utf-8") as stream:
        files = find_oft(path, json.load(stream), **hub_kwargs)
    if files is not None and config is not None and config.attention == "causal":
        raise ValueError(
            f"{path} holds a policy of OpenVLA-OFT ({files.folder}), which needs bidirectional attention and mostly a "
            "head of its own; its config.json does not say so, and this would act wrongly as a plain OpenVLA. Load it "
            "with `openvla.load` or `OpenVLAForActionPrediction.from_pretrained`, or make it one folder for "
            "everybody: `openvla convert`."
        )
    return files


def _keep_towers_unquantized(quantization_config):
    """A copy that skips `UNQUANTIZED_MODULES`, of bitsandbytes and torchao; other kinds are left as they are."""
    quantization_config = copy.deepcopy(quantization_config)
    if isinstance(quantization_config, dict):
        if quantization_config.get("load_in_4bit") or quantization_config.get("load_in_8bit"):
            quantization_config.setdefault("llm_int8_skip_modules", list(UNQUANTIZED_MODULES))
    elif getattr(quantization_config, "llm_int8_skip_modules", ()) is None:
        quantization_config.llm_int8_skip_modules = list(UNQUANTIZED_MODULES)
    elif quantization_config.quant_method == "torchao" and quantization_config.modules_to_not_convert is None:
        quantization_config.modules_to_not_convert = list(UNQUANTIZED_MODULES)
    return quantization_config


def _dataset_statistics(path: str, hub_kwargs: dict, norm_stats: dict | None) -> dict | None:
    """The statistics beside the weights if there are any, else those of the config."""
    name = "dataset_statistics.json"
    try:
        file = cached_file(path, name, _raise_exceptions_for_missing_entries=False, **hub_kwargs)
    except OSError as error:  # offline, and never asked for before
        logger.warning("Cannot tell whether %s has a %s (%s); using config.norm_stats alone.", path, name, error)
        return norm_stats
    if file is None:
        return norm_stats
    with open(file, encoding="utf-8") as stream:
        statistics = json.load(stream)
    if norm_stats and norm_stats != statistics:
        logger.warning("%s replaces config.norm_stats: %s, not %s.", name, sorted(statistics), sorted(norm_stats))
    return statistics
