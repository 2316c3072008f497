"""Fine-tuning to parallel decoding: every head, more cameras, proprioception, FiLM."""

import json

import numpy as np
import pytest
import torch

import openvla
from openvla.action_tokenizer import ActionStats, ActionTokenizer
from openvla.finetune.collator import ActionCollator
from openvla.finetune.steps import Step, StepDataset

pytest.importorskip("trl")
from test_readers import LENGTHS  # noqa: E402
from test_train_end_to_end import data, finetune, policy, weights  # noqa: E402, F401 (fixtures)

PARALLEL = ["--chunk", "2", "--cameras", "front", "wrist", "--proprio", "true", "--learning_rate", "1e-3"]
HEADS = ["token", "l1", "diffusion", "flow"]


# --- What is fed ---
def steps_of(length: int, chunk: int, pad_chunks: bool) -> StepDataset:
    class Reader:
        name, cameras = "robot", ["front"]

    return StepDataset(Reader(), [length, 2], chunk=chunk, pad_chunks=pad_chunks)


def test_chunks_do_not_run_past_the_end_unless_they_are_padded():
    assert steps_of(5, 3, pad_chunks=False).episode_lengths == [3, 0]  # T - chunk + 1 steps; none of a short one
    assert steps_of(5, 3, pad_chunks=True).episode_lengths == [5, 2]
    assert len(steps_of(5, 1, pad_chunks=False)) == 7
    kept = steps_of(5, 3, pad_chunks=False)
    assert [kept.locate(index) for index in range(3)] == [(0, 0), (0, 1), (0, 2)]


class Config:
    attention, action_head, action_slot_id, proprio_dim = "bidirectional", "token", 32002, 2

    def __init__(self, **changes):
        self.__dict__.update(changes)


def step(instruction: str, values: list[float], padded: int = 0) -> Step:
    actions = np.array(values, dtype=np.float32).reshape(2, 2)
    is_pad = np.arange(2) >= 2 - padded
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    return Step([image], instruction, actions, is_pad, np.array([1.0, 8.0], dtype=np.float32), "here")


STATS = ActionStats(np.array([-1.0, -1.0]), np.array([1.0, 1.0]), np.array([True] * 2), np.array([False] * 2))
STATES = ActionStats(np.array([0.0, 0.0]), np.array([4.0, 4.0]), np.array([True] * 2), np.array([False] * 2))


def collate(processor, steps, **changes) -> dict:
    config = Config(**changes)
    return ActionCollator(None, processor, {"": STATS}, ActionTokenizer(), None, config, {"": STATES}).collate(steps)


def test_tokens_are_labels_of_slots(processor):
    batch = collate(processor, [step("go", [-1, 1, 0.5, 0]), step("pick up the cup", [0, 0, 0, 1], padded=1)])
    ids, labels = batch["input_ids"], batch["labels"]
    assert ids[1, -5:].tolist() == [32002] * 4 + [2]
    assert labels[1, -5:].tolist() == [31872, 31872, -100, -100, 2]  # past the end nothing is scored
    short = int(batch["attention_mask"][0].sum())
    assert ids[0, short - 5 : short].tolist() == [32002] * 4 + [2]
    # 1 becomes a little less in the original's normalisation: the bin before the last
    assert labels[0, short - 5 : short].tolist() == [31999, 31745, 31808, 31872, 2]
    assert (labels[:, : short - 5][0] == -100).all() and (ids[0, short:] == 32000).all()
    torch.testing.assert_close(batch["proprio"], torch.tensor([[-0.5, 1.0]] * 2), atol=1e-6, rtol=0)


def test_continuous_heads_get_actions(processor):
    two = [step("go", [-1, 1, 0.5, 0]), step("go", [0, 0, 0, 3], padded=1)]
    batch = collate(processor, two, action_head="l1")
    assert "labels" not in batch
    torch.testing.assert_close(
        batch["actions"], torch.tensor([[[-1, 1], [0.5, 0]], [[0, 0], [0, 1.0]]]), atol=1e-6, rtol=0
    )  # the last is clipped
    assert batch["counted"].tolist() == [[True, True], [True, False]]
    assert batch["input_ids"][0, -5:].tolist() == [32002] * 4 + [2]
    prefix = collate(processor, two, action_head="flow", attention="prefix")
    assert prefix["input_ids"][0, -5:].tolist() == [29871, *[32002] * 4]  # nothing follows the slots


def test_what_is_not_counted_does_not_move_the_loss(checkpoint):
    from test_oft import small

    model = small("bidirectional", "l1", checkpoint, chunk=2)
    ids = torch.tensor([[1, *[32001] * 256, 29871, *[32002] * 14, 2]])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(1, 6, 224, 224)}
    actions = torch.zeros(1, 2, 7)
    with torch.no_grad():
        first = model(**inputs, actions=actions, counted=torch.tensor([[True, False]])).loss
        actions[:, 1] = 100.0
        assert model(**inputs, actions=actions, counted=torch.tensor([[True, False]])).loss == first
        assert model(**inputs, actions=actions, counted=torch.tensor([[True, True]])).loss > 10 * first


# --- What is trained ---
@pytest.mark.parametrize("head", HEADS)
def test_a_causal_policy_becomes_one_that_decodes_in_parallel(head, policy, data, tmp_path, capsys):  # noqa: F811
    film = ["--film", "true"] if head == "l1" else []
    options = ["--head", head, *PARALLEL, *film, "--mode", "full", "--max_steps", "3"]
    finetune(policy, data, tmp_path / "run", *options, "--validation_share", "0.5", "--eval_strategy", "steps")
    told = capsys.readouterr().out
    model, processor = openvla.load(tmp_path / "run" / "merged")
    config = model.config
    assert (config.action_head, config.action_chunk, config.action_dim) == (head, 2, 7)
    assert config.attention == ("prefix" if head == "flow" else "bidirectional")
    assert (config.num_cameras, config.proprio_dim, config.film) == (2, 8, bool(film))
    assert (processor.num_cameras, processor.num_state_tokens) == (2, 1 + (head == "diffusion"))
    if head != "token":
        assert "action_head" in told and "lm_head" in told

    images = [np.zeros((32, 32, 3), dtype=np.uint8)] * 2
    inputs = processor(processor.build_prompt("pick up the cup"), images, np.zeros(8))
    assert model.predict_action(**inputs).shape == (2, 7)

    entries = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    scored = [entry for entry in entries if "eval_l1" in entry]
    assert scored and ("eval_token_accuracy" in scored[0]) == (head == "token")
    assert {"eval_l1/action 0", "eval_l1_physical/action 0"} <= set(scored[0]) or any(
        key.startswith("eval_l1_physical/") for key in scored[0]
    )


def test_the_next_run_goes_on_with_the_same_cameras_and_its_own_head(policy, data, tmp_path, caplog):  # noqa: F811
    short = ["--mode", "full", "--max_steps", "1", "--save_strategy", "no"]
    first = ["--head", "diffusion", *PARALLEL, *short, "--cameras", "wrist", "front"]
    finetune(policy, data, tmp_path / "first", *first)
    merged = tmp_path / "first" / "merged"
    model, processor = openvla.load(merged)
    assert model.norm_stats[data.name]["cameras"] == ["wrist", "front"] and model.config.num_denoising_steps == 50

    finetune(merged, data, tmp_path / "next", "--head", "flow", "--chunk", "2", *short)
    model, _ = openvla.load(tmp_path / "next" / "merged")
    assert model.norm_stats[data.name]["cameras"] == ["wrist", "front"] and model.config.num_denoising_steps == 10
    finetune(tmp_path / "next" / "merged", data, tmp_path / "last", "--head", "l1", "--chunk", "2", *short)
    assert openvla.load(tmp_path / "last" / "merged")[0].config.num_denoising_steps is None
    # a velocity is no action: the new head does not start from the old one
    assert [record.args[0] for record in caplog.records if "start at random" in record.msg][-1] == 16
    with pytest.raises(ValueError, match=r"lacks 16 tensors \(action_head.model"):
        openvla.load(tmp_path / "next" / "merged", action_head="l1", attention="bidirectional")


@pytest.mark.parametrize("mode", ["full", "last-layer", "lora"])
def test_new_parts_are_trained_and_saved_in_every_mode(mode, policy, data, tmp_path):  # noqa: F811
    # twice from the same seed: what starts at random is the same, so all that differs has moved
    film = ["--film", "true", "--head", "diffusion", *PARALLEL, "--mode", mode]
    finetune(policy, data, tmp_path / "one", *film, "--max_steps", "1")
    finetune(policy, data, tmp_path / "three", *film, "--max_steps", "3")
    one, three = weights(tmp_path / "one" / "merged"), weights(tmp_path / "three" / "merged")
    assert set(one) == set(three)
    new = [name for name in one if name.startswith(("action_head.", "proprio_projector.", "noisy_action_projector."))]
    new += [name for name in one if name.split(".")[-2] in ("scale", "shift")]
    assert len(new) == 16 + 4 + 4 + 2 * 2 * 2 * 2  # two towers of two blocks, weights and biases
    still = [name for name in new if torch.equal(one[name], three[name])]
    assert not still
    assert torch.equal(one["language_model.lm_head.weight"], three["language_model.lm_head.weight"])
    if mode == "lora":  # the adapter alone brings its head
        start = openvla.load(tmp_path / "three" / "adapter")[0]
        whole = openvla.load(tmp_path / "three" / "merged")[0]
        assert start.config.action_head == "diffusion" and start.config.num_cameras == 2
        inputs = {"input_ids": torch.tensor([[1, 512, 29871]]), "pixel_values": torch.zeros(1, 12, 28, 28)}
        inputs |= {"proprio": np.zeros(8), "noise": torch.zeros(1, 2, 7), "num_denoising_steps": 2}
        np.testing.assert_allclose(start.predict_action(**inputs), whole.predict_action(**inputs), atol=1e-5)


def test_a_resumed_run_draws_the_noise_it_would_have_drawn(policy, data, tmp_path):  # noqa: F811
    options = ["--head", "flow", *PARALLEL, "--mode", "full", "--save_steps", "2", "--augment", "false"]
    whole = finetune(policy, data, tmp_path / "whole", *options, "--max_steps", "4")
    finetune(policy, data, tmp_path / "parts", *options, "--max_steps", "2")
    parts = finetune(policy, data, tmp_path / "parts", *options, "--max_steps", "4", "--resume", "true")
    assert parts == whole


@pytest.mark.parametrize("head", HEADS)
def test_each_head_overfits_one_batch_and_samples_its_actions(head, policy):  # noqa: F811
    # two observations, told apart by their state alone, and what to do
    fields = {"action_head": head, "attention": "prefix" if head == "flow" else "bidirectional"}
    fields |= {"action_chunk": 2, "action_dim": 3, "proprio_dim": 2}
    torch.manual_seed(0)
    (model, _), _ = openvla.load(policy, output_loading_info=True, **fields)
    actions = torch.tensor([[[0.5, -0.5, 0.9], [0.0, 0.3, -0.2]], [[-0.4, 0.6, -0.8], [0.1, 0.0, 0.7]]])
    proprio = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    end = [] if head == "flow" else [2]
    ids = torch.tensor([[1, *[32001] * model.config.num_placeholders, 512, 29871, *[32002] * 6, *end]] * 2)
    batch = {"input_ids": ids, "pixel_values": torch.zeros(2, 6, 28, 28), "proprio": proprio}
    if head == "token":
        batch["labels"] = torch.full_like(ids, -100)
        batch["labels"][ids == 32002] = torch.from_numpy(model.action_tokenizer.encode(actions.numpy())).flatten()
    else:
        batch["actions"] = actions
        batch = {name: value.repeat(32, *[1] * (value.ndim - 1)) for name, value in batch.items()}  # much noise
    steps = {"token": 150, "l1": 150, "diffusion": 800, "flow": 600}[head]
    model.model.vision_backbone.requires_grad_(False)  # there is nothing to see
    if head != "token":
        model.get_input_embeddings().requires_grad_(False)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    prompts = ids[:, : -6 - len(end)]
    found = [
        model.sample_actions(prompts, torch.zeros(2, 6, 28, 28), proprio=proprio, noise=torch.randn(2, 2, 3)).actions
        for _ in range(4)
    ]
    errors = torch.stack([(each - actions).abs() for each in found])
    if head in ("token", "l1"):  # tokens come back as the centres of their bins
        assert errors.max() < {"token": 1 / 255 + 1e-6, "l1": 0.02}[head]
    else:  # how far the worst of the noise ends depends on roundings
        assert errors.mean() < 0.03


@pytest.mark.parametrize(
    "options, message",
    [
        (["--chunk", "2"], "--attention, --chunk and --film belong to parallel decoding"),
        (["--head", "flow", "--chunk", "40"], "no episode of 40 steps"),
        (["--head", "guess"], "action_head must be one of"),
        (["--head", "l1", "--attention", "causal"], "attention cannot be 'causal'"),
        (["--head", "l1", "--lora_head", "true"], "which head 'l1' never asks"),
    ],
)
def test_options_that_cannot_be(options, message, policy, data, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        finetune(policy, data, tmp_path / "run", *options, "--max_steps", "1")
    assert not (tmp_path / "run").exists()
    assert max(LENGTHS) < 40
