"""Acts on a few observations in a process of its own, as a stranger with transformers alone, or as this package.

`openvla export` runs this file's text twice and compares. As a stranger it runs where `import openvla` fails, with the
Auto classes and the code that lies in the folder. Only what a stranger has may be imported here.
"""

import json
import sys

import numpy as np
import torch


def load_as_a_stranger(request: dict):
    """Model and processor of `request["folder"]`, the way the model card says."""
    import transformers

    options = {"trust_remote_code": True}
    processor = transformers.AutoProcessor.from_pretrained(request["folder"], **options)
    model = transformers.AutoModelForImageTextToText.from_pretrained(request["folder"], dtype="auto", **options)
    if not type(model).__module__.startswith("transformers_modules."):
        raise RuntimeError(f"The model's code came from {type(model).__module__}, not from the folder.")
    return model.eval(), processor


def load_as_the_package(request: dict):
    """The policy before it was exported: `request["folder"]`, with the adapter `request["adapter"]` beside it."""
    import openvla

    dtype = getattr(torch, request["dtype"])
    model = openvla.OpenVLAForActionPrediction.from_pretrained(request["folder"], dtype=dtype)
    if request["adapter"]:
        model.load_adapter(request["adapter"])
    model.norm_stats = request["norm_stats"]
    return model.eval(), openvla.OpenVLAProcessor.from_pretrained(request["processor"])


def act(model, processor, observations: list[dict]) -> dict[str, np.ndarray]:
    """Logits behind the prompt, tokens and action of every observation `{"images", "instruction", "unnorm_key"}`.

    `blind.N` are the logits with every image turned to its negative: if they are the same, nobody looks at the image.
    """
    found = {}
    for number, observation in enumerate(observations):
        images = [np.load(file) for file in observation["images"]]
        for name, shown in (("logits", images), ("blind", [255 - image for image in images])):
            inputs = processor(processor.build_prompt(observation["instruction"]), [shown])
            with torch.no_grad():
                logits = model(**inputs, logits_to_keep=1).logits[0, -1]
            found[f"{name}.{number}"] = logits.float().numpy()
            if name == "logits":
                output = model.predict_action(**inputs, unnorm_key=observation["unnorm_key"], return_dict=True)
                found[f"tokens.{number}"], found[f"action.{number}"] = output["token_ids"], output["actions"]
    return found


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    load = load_as_the_package if request["as_the_package"] else load_as_a_stranger
    model, processor = load(request)
    np.savez(request["out"], dtype=str(model.dtype), **act(model, processor, request["observations"]))


if __name__ == "__main__":
    main()
