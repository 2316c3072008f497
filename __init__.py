"""OpenVLA policies on today's transformers: act, fine-tune, evaluate, serve, publish.

Importing this package costs nothing: names load on first use. It also makes transformers' Auto classes serve
`model_type: "openvla"` with this code (see `auto_registration`).
"""

import importlib

__version__ = "0.1.0"

_MODULES = {
    "configuration_openvla": ["OpenVLAConfig"],
    "action_tokenizer": ["ActionStats", "ActionTokenizer"],
    "processing_openvla": ["OpenVLAImageProcessor", "OpenVLAProcessor"],
    "action_decoding": ["ActionOutput"],
    "modeling_openvla": ["OpenVLAForActionPrediction", "OpenVLAModel"],
    "loading": ["load"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


if __name__ == "openvla":  # pytest also imports this file under the name of its folder
    importlib.import_module("openvla.auto_registration").install()
