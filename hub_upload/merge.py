"""A LoRA adapter merged into its base one weight at a time: no model is built, nothing else is in memory."""

import copy
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from openvla.hub_upload.layout import is_unused
from openvla.hub_upload.weights import SafetensorsFile
from openvla.pretrained_openvla import module_name

_PREFIX = "base_model.model."
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")


class Adapter:
    """What an adapter makes of the weights of its base: `merge(name, weight)`.

    peft's own layers do the arithmetic, so the result is that of `merge_and_unload` on the whole model. Adapters made
    for the original's code are understood; what they hold for parts of the towers that no policy ever reads is left
    out and listed in `unused`.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        model: the policy, whose weights may be on the meta device.
    """

    def __init__(self, folder: Path, model: nn.Module):
        self.config = PeftConfig.from_pretrained(folder)
        if not isinstance(self.config, LoraConfig):
            raise ValueError(f"{folder} holds a {self.config.peft_type} adapter; only LoRA can be merged here.")
        if self.config.lora_bias or str(self.config.init_lora_weights).partition("_")[0] in _CHANGE_THE_BASE:
            raise ValueError(
                f"{folder} has lora_bias={self.config.lora_bias}, init_lora_weights="
                f"{self.config.init_lora_weights!r}: it changes more of its base than the weights of its layers. "
                "Merge it with peft's merge_and_unload instead."
            )
        self.model = model
        file = Path(folder) / "adapter_model.safetensors"
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing; adapters in other files (.bin) are not read.")
        self.source = SafetensorsFile(file)
        self.layers: dict[str, dict[str, str]] = {}  # module -> {name within the module: name in the file}
        self.replaced: dict[str, str] = {}  # parameter -> name in the file, of modules trained as a whole
        self.unused: list[str] = []
        parameters = {name for name, _ in model.named_parameters()}
        modules = {name for name, _ in model.named_modules()}
        unknown = []
        for key in self.source.infos:
            released = key.removeprefix(_PREFIX)
            name = module_name(released).replace(".base_layer.", ".")  # an embedding's own table, saved along
            module, lora, rest = name.partition(".lora_")
            if is_unused(model, released):
                self.unused.append(key)
            elif lora and module in modules:
                self.layers.setdefault(module, {})[f"lora_{rest}"] = key
            elif not lora and name in parameters:
                self.replaced[name] = key
            else:
                unknown.append(key)
        if unknown:
            raise ValueError(f"{folder} is made for another model: {len(unknown)} tensors such as {unknown[0]}.")
        if missing := self._missing(modules, parameters):
            raise ValueError(
                f"{folder} is not whole: its adapter_config.json names {len(missing)} modules that it has no weights "
                f"of, such as {missing[0]}."
            )

    def _missing(self, modules: set[str], parameters: set[str]) -> list[str]:
        """Modules that the adapter's configuration names and its file lacks."""
        whole = [f".{name}." for name in self.config.modules_to_save or ()]
        wanted = {name for name in parameters if any(each in f".{name}" for each in whole)}
        missing = sorted(wanted - set(self.replaced))
        if self.config.target_modules != "all-linear":
            # peft answers with a match object or True
            targets = {name for name in modules if name and check_target_module_exists(self.config, name)}
            missing += sorted(targets - set(self.layers))
        return missing or ([] if self.layers or self.replaced else ["any"])

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight `name` (as modules are named) after merging, in its own dtype and shape."""
        module, _, leaf = name.rpartition(".")
        if name not in self.replaced and (module not in self.layers or leaf != "weight"):
            return weight
        merged = self.source.read(self.replaced[name]).to(weight.dtype) if name in self.replaced else weight
        if module in self.layers and leaf == "weight":
            merged = self._merge_layer(module, merged)
        if merged.shape != weight.shape or not merged.isfinite().all():
            raise ValueError(f"{name} of the adapter is not finite, or not of the base's shape {tuple(weight.shape)}.")
        return merged

    def _merge_layer(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        # 1. That one layer, under its own name in a tree of empty modules
        layer = copy.deepcopy(self.model.get_submodule(module))
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        tree = nn.Module()
        for depth, part in enumerate(reversed(module.split("."))):
            inner = layer if depth == 0 else tree
            tree = nn.Module()
            tree.add_module(part, inner)

        # 2. peft's layer around it, the adapter in float32 as when it is loaded onto a whole model
        config = copy.copy(self.config)
        config.target_modules, config.exclude_modules, config.modules_to_save = {module}, None, None
        config.layers_to_transform = config.layers_pattern = None
        config.init_lora_weights = True
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")
            inject_adapter_in_model(config, tree)
        wrapped = tree.get_submodule(module)
        for name, parameter in wrapped.named_parameters():
            if name.startswith("lora_"):
                parameter.data = parameter.data.float()
        tensors = {f"{module}.{key}": self.source.read(file) for key, file in self.layers[module].items()}
        result = set_peft_model_state_dict(tree, tensors)
        lacking = [key for key in result.missing_keys if ".lora_" in key]
        if lacking or result.unexpected_keys:
            raise ValueError(f"The adapter of {module} is not whole: {lacking or result.unexpected_keys}.")
        wrapped.merge()
        return wrapped.base_layer.weight.data
