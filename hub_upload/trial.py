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

    config = openvla.OpenVLAConfig.from_pretrained(request["config"])
    options = {"config": config, "dtype": getattr(torch, request["dtype"])}
    if request["new_parts"]:  # the adapter brings them; until then they are random
        options["output_loading_info"] = True
    model = openvla.OpenVLAForActionPrediction.from_pretrained(request["folder"], **options)
    model = model[0] if request["new_parts"] else model
    model.norm_stats = request["norm_stats"]
    processor = openvla.OpenVLAProcessor.from_pretrained(request["processor"])
    processor.num_cameras = config.num_cameras
    processor.num_state_tokens = config.num_placeholders - config.num_image_tokens
    if request["center_crop_area"] is not None:
        processor.image_processor.center_crop_area = request["center_crop_area"]
    return model.eval(), processor


def noise_for(model, number: int) -> torch.Tensor:
    """What heads that denoise start from: `(1, T, A)`, the same in every process."""
    shape = (1, model.config.action_chunk, model.config.action_dim or 1)
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def ask(
    model, processor, observation: dict, number: int, tokens, images: list, other_state: bool = False
) -> np.ndarray:
    """What the head says, float32.

    Returns logits `(T·A, vocabulary)` of each action token, behind the prompt and, decoded one by one, those of
    `tokens` before it; of continuous heads `(T·A, 1)` what they say in one pass, the noisy actions being `noise_for`.

    Args:
        other_state: every number of the robot's state changed by half of its range.
    """
    inputs = processor(processor.build_prompt(observation["instruction"]), [images], observation["proprio"])
    if observation["proprio"] is not None:
        proprio = model._normalize_proprio(inputs["proprio"], observation["unnorm_key"])
        inputs["proprio"] = torch.where(proprio > 0, proprio - 1, proprio + 1) if other_state else proprio
    with torch.no_grad():
        if model.config.attention != "causal":
            steps = 1 if model.config.denoises else None
            options = {"noise": noise_for(model, number), "num_denoising_steps": steps, "output_hidden_states": True}
            hidden = model.sample_actions(**inputs, **options).hidden_states  # (1, T·A, D)
            said = (model.action_head or model.lm_head)(hidden)[0].float()
            return said.reshape(hidden.shape[1], -1).numpy()
        given = torch.as_tensor(np.asarray(tokens)[None, :-1], dtype=torch.long)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], given], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return model(**inputs, logits_to_keep=len(tokens)).logits[0].float().numpy()


def without_adapter(model, new_parts: bool) -> None:
    """Takes an adapter's effect off; but of one that brings whole parts of the policy, only that of its LoRA."""
    if not new_parts:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        # as `model.disable_adapters`, which transformers 5.24 refuses to do with PEFT before 0.22
        for module in model.modules():
            if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
                module.enable_adapters(False)
        return
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or ".lora_embedding_B." in name:
            torch.nn.init.zeros_(parameter)


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
    asked = []
    for number, observation in enumerate(request["observations"]):
        # 1. Act. Both processes score the tokens that the source chose
        images = [np.load(file) for file in observation["images"]]
        inputs = processor(processor.build_prompt(observation["instruction"]), [images], observation["proprio"])
        options = {"noise": noise_for(model, number), "unnorm_key": observation["unnorm_key"], "return_dict": True}
        output = model.predict_action(**inputs, **options)
        found[f"action.{number}"] = output["actions"]
        tokens = None
        if "token_ids" in output:
            tokens = observation.get("tokens", output["token_ids"][0].tolist())
            found[f"tokens.{number}"] = np.array(tokens)

        # 2. What the head says; and with one camera's picture turned to its negative, or another state
        question = (model, processor, observation, number)
        found[f"said.{number}"] = ask(*question, tokens, images)
        for camera in range(len(images)):
            shown = [255 - image if i == camera else image for i, image in enumerate(images)]
            found[f"blind.{number}.image {camera}"] = ask(*question, tokens and tokens[:1], shown)
        if observation["proprio"] is not None:
            found[f"blind.{number}.state"] = ask(*question, tokens and tokens[:1], images, other_state=True)
        asked.append((*question, tokens, images))

    # 3. How much an adapter changes at all
    if request.get("adapter"):
        without_adapter(model, request["new_parts"])
        for number, question in enumerate(asked):
            found[f"plain.{number}"] = ask(*question)
    np.savez(request["out"], **found)


if __name__ == "__main__":
    main()
