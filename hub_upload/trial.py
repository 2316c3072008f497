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
    """The policy before it was exported, without its adapter: `request["folder"]`."""
    import openvla

    dtype = getattr(torch, request["dtype"])
    model = openvla.OpenVLAForActionPrediction.from_pretrained(request["folder"], dtype=dtype)
    model.norm_stats = request["norm_stats"]
    processor = openvla.OpenVLAProcessor.from_pretrained(request["processor"])
    if request["center_crop_area"] is not None:
        processor.image_processor.center_crop_area = request["center_crop_area"]
    return model.eval(), processor


def score(model, processor, observation: dict, tokens, images: list) -> np.ndarray:
    """Logits `(T·A, vocabulary)` float32 of each action token, behind the prompt and those of `tokens` before it."""
    inputs = processor(processor.build_prompt(observation["instruction"]), [images])
    given = torch.as_tensor(np.asarray(tokens)[None, :-1], dtype=torch.long)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], given], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        return model(**inputs, logits_to_keep=len(tokens)).logits[0].float().numpy()


def main() -> None:
    with open(sys.argv[1], encoding="utf-8") as file:
        request = json.load(file)
    load = load_as_the_package if request["as_the_package"] else load_as_a_stranger
    model, processor = load(request)
    if request.get("adapter"):
        model.load_adapter(request["adapter"])
        model.eval()
    found = {"dtype": np.array(str(model.dtype)), "norm_stats": np.array(json.dumps(model.norm_stats))}
    found["actions"] = np.array([model.action_tokenizer.vocab_start, model.action_tokenizer.vocab_end])
    given, pictures = [], []
    for number, observation in enumerate(request["observations"]):
        # 1. Act. Both processes score the tokens that the source chose
        images = [np.load(file) for file in observation["images"]]
        inputs = processor(processor.build_prompt(observation["instruction"]), [images])
        output = model.predict_action(**inputs, unnorm_key=observation["unnorm_key"], return_dict=True)
        found[f"action.{number}"] = output["actions"]
        tokens = observation.get("tokens", output["token_ids"][0].tolist())
        found[f"tokens.{number}"] = np.array(tokens)

        # 2. Logits of all action tokens; and of the first, with one camera's picture turned to its negative
        found[f"logits.{number}"] = score(model, processor, observation, tokens, images)
        for camera in range(len(images)):
            shown = [255 - image if i == camera else image for i, image in enumerate(images)]
            found[f"blind.{number}.{camera}"] = score(model, processor, observation, tokens[:1], shown)
        given.append(tokens)
        pictures.append(images)

    # 3. How much an adapter changes at all
    if request.get("adapter"):
        del model  # one policy at a time in memory
        model, _ = load(request)
        for number, observation in enumerate(request["observations"]):
            found[f"plain.{number}"] = score(model, processor, observation, given[number], pictures[number])
    np.savez(request["out"], **found)


if __name__ == "__main__":
    main()
