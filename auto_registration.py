"""Tells transformers' Auto classes that `model_type: "openvla"` is ours, without importing transformers or torch.

transformers 5 prefers registered classes over a repository's own code, so that `AutoProcessor` and
`AutoModelForImageTextToText` serve released repositories whose `auto_map` names code that runs on 4.40.1 only. 4.57
prefers the repository's code when `trust_remote_code=True`; there, use `openvla.load`.

Either side may be imported first, and ours imports theirs: whenever a module has finished loading, and none of
transformers' is half loaded, the pairs of which both sides are complete are registered.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

_AUTO = "transformers.models.auto."
# module of transformers -> module of ours that its Auto classes need
_PAIRS = {
    f"{_AUTO}configuration_auto": "openvla.configuration_openvla",
    f"{_AUTO}modeling_auto": "openvla.modeling_openvla",
    f"{_AUTO}image_processing_auto": "openvla.processing_openvla",
    f"{_AUTO}processing_auto": "openvla.processing_openvla",
}
_registered: set[str] = set()
_running: set[str] = set()  # modules of transformers and of ours that are just being loaded


class _RegisterAfterImport(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if len(_registered) == len(_PAIRS) or not (name.startswith("transformers.") or name in _PAIRS.values()):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        exec_module = spec.loader.exec_module

        def exec_and_register(module):
            _running.add(name)
            try:
                exec_module(module)
            finally:
                _running.discard(name)
            register()

        spec.loader.exec_module = exec_and_register
        return spec


def install() -> None:
    """Registers what is already imported, and has the rest registered as it comes. Safe to call twice."""
    if not any(type(finder).__name__ == _RegisterAfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfterImport())
        register()


def register() -> None:
    """Registers every pair whose transformers side is loaded and whose own side is not just being imported.

    Waits while any module of transformers is: ours may need just that one.
    """
    if any(name.startswith("transformers.") for name in _running):
        return
    for auto_name, our_name in _PAIRS.items():
        if auto_name in _registered or auto_name not in sys.modules or our_name in _running:
            continue
        _registered.add(auto_name)  # first: the import below may bring us here again
        _register_pair(sys.modules[auto_name], importlib.import_module(our_name))


def _register_pair(auto, ours) -> None:
    config_class = importlib.import_module("openvla.configuration_openvla").OpenVLAConfig
    kind = auto.__name__.removeprefix(_AUTO)
    if kind == "configuration_auto":
        auto.AutoConfig.register("openvla", config_class, exist_ok=True)
    elif kind == "modeling_auto":
        auto.AutoModel.register(config_class, ours.OpenVLAModel, exist_ok=True)
        for name in ("AutoModelForImageTextToText", "AutoModelForVision2Seq"):  # 5.x has only the first
            if hasattr(auto, name):
                getattr(auto, name).register(config_class, ours.OpenVLAForActionPrediction, exist_ok=True)
    elif kind == "image_processing_auto":
        for key, value in _with_released_name(config_class, ours.OpenVLAImageProcessor, "PrismaticImageProcessor"):
            auto.AutoImageProcessor.register(key, slow_image_processor_class=value, exist_ok=True)
    else:
        for key, value in _with_released_name(config_class, ours.OpenVLAProcessor, "PrismaticProcessor"):
            auto.AutoProcessor.register(key, value, exist_ok=True)


def _with_released_name(config_class, processor_class, released_name: str) -> list[tuple[type, type]]:
    """Released files name their processor class; Auto classes look it up by that name among those registered."""
    from transformers import PretrainedConfig

    namespace = {
        "__module__": processor_class.__module__,
        "__new__": lambda cls, *args, **kw: processor_class(*args, **kw),
    }
    alias = type(released_name, (processor_class,), namespace)
    return [(config_class, processor_class), (type(f"{released_name}Config", (PretrainedConfig,), {}), alias)]
