"""A page to try a policy on: images, instruction and the robot's state in, the action as numbers and as a picture out.

python -m openvla.serve.app --model runs/my-robot
python -m openvla.serve.app --model openvla/openvla-7b --port 8080

Runs on this machine alone (http://127.0.0.1:7860). As a Gradio Space it is the Space's `app.py`, beside `drawing.py`:
there the Space's file `model_id.txt` names the model, such as `lab/policy`, in its only line. Pictures in a folder
`examples` beside this file are offered to try; a file `pick_up_the_cup.png` comes with the instruction of its name.
Policies of 7 billion parameters need a GPU with 16 GB; small ones run on a processor.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

if __package__:  # the installed package; a Space has the two files side by side
    from openvla.serve.drawing import BARS, draw_motion
else:
    from drawing import BARS, draw_motion

HERE = Path(__file__).parent
MOST_PIXELS = 4096 * 4096
TRACE = ["step", "share of its range in the data", "dim"]
INTRODUCTION = (
    "Show the policy what its camera sees and tell it what to do: it predicts what the robot does next.\n\n"
    "An action means something only for a robot, a controller and a camera placed like those of the data the policy "
    "was trained on. Nothing moves from here."
)


def act(
    model,
    processor,
    images: list[Image.Image | None],
    instruction: str,
    unnorm_key: str | None,
    proprio: str | list[float] | None = None,
) -> dict:
    """One action, or a chunk, in types of JSON but for the arrays.

    Args:
        model, processor: a policy and its processor, from this package or from the policy's own files.
        images: one per camera, in the policy's order.
        unnorm_key: whose statistics give the units; None if there is only one.
        proprio: the robot's state, for policies that take it: numbers, or a text with numbers in it.

    Returns `{"actions": (T, A) float64 in the units of dims, "normalized": (T, A) in [-1, 1], "unnorm_key",
    "dims": [(name, unit)], "token_ids": [T·A], "replaced": [T·A] bool, "milliseconds"}`, without the two about tokens
    for continuous heads. ValueError, KeyError or RuntimeError say what is wrong; there is no default action.
    """
    if missing := [f"{number}" for number, image in enumerate(images, start=1) if image is None]:
        raise ValueError(f"The policy needs {len(images)} image(s); number {', '.join(missing)} is missing.")
    actions_module = sys.modules[type(model.action_tokenizer).__module__]  # `action_tokenizer.py` of this very model
    unnorm_key = actions_module.resolve_unnorm_key(model.norm_stats, unnorm_key)
    state = _read_state(proprio, model.config.proprio_dim)
    start = time.perf_counter()
    inputs = processor(processor.build_prompt(instruction), [images], state).to(model.device)
    result = model.predict_action(**inputs, unnorm_key=unnorm_key, return_dict=True)
    milliseconds = round(1000 * (time.perf_counter() - start), 1)
    dims = actions_module.name_action_dims(model.norm_stats, unnorm_key)
    actions = result["actions"].reshape(-1, len(dims))
    if not np.isfinite(actions).all():
        raise RuntimeError(f"The action holds NaN or infinity: {actions.tolist()}.")
    told = {name: result[name][0].tolist() for name in ("token_ids", "replaced") if name in result}
    stats = actions_module.ActionStats.from_norm_stats(model.norm_stats, unnorm_key, model.config.action_normalization)
    return {
        "actions": actions,
        "normalized": stats.normalize(actions),
        "unnorm_key": unnorm_key,
        "dims": dims,
        **told,
        "milliseconds": milliseconds,
    }


def _read_state(proprio: str | list[float] | None, count: int) -> list[float] | None:
    """The robot's state, of `count` numbers; None for policies that take none."""
    parts = proprio.replace(",", " ").split() if isinstance(proprio, str) else proprio or []
    try:
        state = [float(part) for part in parts]
    except ValueError as error:
        raise ValueError(f"The robot's state must be numbers such as 0.1, 0.25, got {proprio!r}.") from error
    if len(state) != count or not np.isfinite(state).all():
        raise ValueError(
            f"The policy takes {count or 'no'} finite numbers of the robot's state, got {len(state) or 'none'}: "
            f"{proprio!r}."
        )
    return state or None


def headers(steps: int) -> list[str]:
    """Of the table of an action or of a chunk of several steps."""
    return ["dim", "unit", *(["value"] if steps == 1 else [f"step {step}" for step in range(steps)])]


def tabulate(found: dict) -> list[list[str]]:
    """One row per dim: its name, its unit, its value at every step."""
    return [
        [name, unit, *(f"{value:.6f}" for value in values)]
        for (name, unit), values in zip(found["dims"], found["actions"].T)
    ]


def trace(found: dict) -> list[tuple[int, float, str]]:
    """Points `TRACE` of a plot of the chunk: normalised, for metres and radians do not share an axis."""
    names = [name for name, _ in found["dims"]]
    return [
        (step, value, name)
        for step, values in enumerate(found["normalized"].tolist())
        for name, value in zip(names, values)
    ]


def remark(found: dict) -> str:
    """What to know about this action, as Markdown: whose units, how long it took, and whether to trust it."""
    text = f"in the units of **{found['unnorm_key']}** · {found['milliseconds']:.0f} ms"
    if count := sum(found.get("replaced", ())):
        text += (
            f"\n\n⚠️ **The model preferred a token that is no action at {count} of {len(found['replaced'])} places;** "
            "the best action tokens were taken instead. The picture or the task is unlike the training data."
        )
    return text


def build_app(model, processor):
    """The page for a policy as `gradio.Blocks`. Its function is also an API endpoint, `/act`."""
    import gradio
    import pandas

    keys, steps, count = sorted(model.norm_stats or {}), model.config.action_chunk, processor.num_cameras
    is_folder = Path(model.name_or_path).exists()
    name = Path(model.name_or_path).name if is_folder else model.name_or_path
    title = name if is_folder else f"[{name}](https://huggingface.co/{name})"

    def answer(*values):
        *images, instruction, unnorm_key = values[: count + 2]
        try:
            found = act(model, processor, images, instruction, unnorm_key, *values[count + 2 :])
        except (ValueError, KeyError, RuntimeError) as error:
            raise gradio.Error(str(error.args[0]), print_exception=False) from None
        stats = model.norm_stats[found["unnorm_key"]]["action"]
        picture = images[0].convert("RGB")
        picture.thumbnail((1024, 1024))  # as large as a page needs; 12 megapixels take a second
        drawn = draw_motion(picture, found["actions"], found["dims"], stats if "q01" in stats else None)
        exact = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found.items()}
        plot = [pandas.DataFrame(trace(found), columns=TRACE)] if steps > 1 else []
        return [drawn, remark(found), tabulate(found), *plot, exact]

    with gradio.Blocks(title=f"{name} · OpenVLA", analytics_enabled=False) as app:
        gradio.Markdown(f"# {title}\n{INTRODUCTION}")
        with gradio.Row():
            with gradio.Column(scale=2):
                labels = ["image"] if count == 1 else [f"camera {number + 1}" for number in range(count)]
                # image_mode None: gradio would turn 16-bit pixels white, our processor refuses them
                images = [gradio.Image(label=label, type="pil", image_mode=None, height=300) for label in labels]
                instruction = gradio.Textbox(label="instruction", placeholder="pick up the cup", submit_btn=False)
                unnorm_key = gradio.Dropdown(
                    keys, value=keys[0] if len(keys) == 1 else None, label="dataset whose units the action takes"
                )
                state = []
                if numbers := model.config.proprio_dim:
                    label = f"the robot's state: {numbers} numbers in the units of that dataset"
                    state = [gradio.Textbox(usual_state(model, keys), label=label)]
                button = gradio.Button("act", variant="primary")
            with gradio.Column(scale=3):
                # no buttons: they would cover what is drawn in the corner
                outputs = [gradio.Image(label="predicted motion", interactive=False, format="png", buttons=[])]
                outputs.append(gradio.Markdown())
                outputs.append(gradio.Dataframe(headers=headers(steps), label="action", interactive=False))
                if steps > 1:
                    colors = {name: "#{:02x}{:02x}{:02x}".format(*color) for name, color in BARS.items()}
                    columns = {"x": TRACE[0], "y": TRACE[1], "color": TRACE[2]}
                    outputs.append(gradio.LinePlot(**columns, color_map=colors, y_lim=[-1, 1], label="chunk"))
                with gradio.Accordion("all digits, as JSON", open=False):
                    outputs.append(gradio.JSON(show_label=False))
        inputs = [*images, instruction, unnorm_key, *state]
        gradio.on([button.click, instruction.submit], answer, inputs, outputs, api_name="act")
        pictures = sorted(path for path in HERE.glob("examples/*") if path.suffix in (".png", ".jpg"))
        if pictures and count == 1:
            rows = [[str(path), path.stem.replace("_", " ")] for path in pictures]
            gradio.Examples(rows, [images[0], instruction], cache_examples=False)
    return app


def usual_state(model, keys: list[str]) -> str:
    """The mean of the only dataset's states, to begin with; nothing if there are several."""
    mean = model.norm_stats[keys[0]].get("proprio", {}).get("mean", []) if len(keys) == 1 else []
    return ", ".join(f"{value:.4g}" for value in mean)


def load(model_id: str):
    """`(model, processor)` of a folder or Hub id; bfloat16 on CUDA, float32 on a processor."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if __package__:
        from openvla.loading import load

        model, processor = load(model_id, dtype=dtype)
    else:  # in a Space this package is not installed: the code comes with the model
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=True)
        model = AutoModelForImageTextToText.from_pretrained(model_id, trust_remote_code=True, dtype=dtype)
    return model.to(device).eval(), processor


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="PATH_OR_ID", help="folder or Hub id; default: what model_id.txt says")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    model_id = args.model
    if model_id is None:
        if not (HERE / "model_id.txt").exists():
            parser.error(f"which model? Pass --model, or write its Hub id into {HERE / 'model_id.txt'}.")
        model_id = (HERE / "model_id.txt").read_text().strip()
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # PIL warns from here on and refuses twice as many, undecoded
    # Without a server_name gradio listens on loopback, unless the Space's environment says otherwise.
    build_app(*load(model_id)).launch(server_port=args.port, show_error=True, max_file_size="8mb")


if __name__ == "__main__":
    main()
