"""Fast ways to act choose the tokens of `generate()`: for what was recorded, and for 1,000 observations of noise
(100 in the usual suite).

In float32, always. In bfloat16, kernels for other shapes round otherwise: where a row first differs, its two tokens
must be so near each other that rounding decides.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import openvla
from openvla.evaluate.bench_ways import margins, rounding_limit

START, END, COUNT = 31744, 32000, 14
WORDS = ["go", "pick", "up", "the", "cup", "red", "block", "slowly", "and", "put", "it", "down"]
MANY = pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
BOTH_TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@pytest.fixture
def chunky(dtype, small_checkpoint, liven):
    """Two steps at a time, on pictures of 28 pixels."""
    model, processor = openvla.load(small_checkpoint, dtype=torch.float32, action_chunk=2, action_dim=7)
    return liven(model).to(dtype), processor


def observations(processor, count: int):
    """So many in batches of four: instructions of 1 to 8 words, and noise to look at."""
    rng = np.random.default_rng(0)
    for _ in range(count // 4):
        prompts = [processor.build_prompt(" ".join(rng.choice(WORDS, rng.integers(1, 9)))) for _ in range(4)]
        pictures = [Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(4)]
        yield processor(prompts, pictures)


def draft_of(case: int, truth: np.ndarray, rng) -> np.ndarray:
    """Noise, right up to a point, shifted by one, or constant."""
    noise = rng.integers(START, END, truth.shape)
    right = np.arange(COUNT) < rng.integers(0, COUNT + 1, (len(truth), 1))
    kinds = noise, np.where(right, truth, noise), np.roll(truth, 1, axis=1), np.broadcast_to(truth[:, :1], truth.shape)
    return kinds[case % 4].copy()


def count_differing(model, inputs: dict, tokens: np.ndarray, others: np.ndarray) -> int:
    """Rows that differ, none of them by more than rounding."""
    found = margins(model, inputs, tokens, others)
    assert max(found, default=-1.0) < rounding_limit(model.dtype), found
    return len(found)


def generated(model, inputs: dict, count: int) -> np.ndarray:
    return model.generate(**inputs, max_new_tokens=count, do_sample=False)[:, -count:].numpy()


@BOTH_TYPES
def test_recorded_observations(dtype, captured, checkpoint, processor, recorded, images):
    model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=dtype).eval()
    expected = "action_ids" if dtype == torch.float32 else "action_ids_bf16"
    for mode in (None, "default"):
        model.compile_for_actions(mode, text_tokens=(100,), progress=False)
        for entry in recorded["inputs"]:
            inputs = processor(entry["prompt"], images[entry["index"]])
            tokens = np.array([entry[expected]])
            for draft in (None, tokens, np.full((1, 7), START)):
                found = model.sample_actions(**inputs, action_dim=7, draft=draft).token_ids.numpy()
                np.testing.assert_array_equal(found, tokens)
            np.testing.assert_array_equal(generated(model, inputs, 7), tokens)
    assert not model._compiled.told  # why anything was not compiled


@MANY
@BOTH_TYPES
def test_random_observations(dtype, count, chunky):
    """And drafts of every quality, which say how many of their tokens were right."""
    model, processor = chunky
    rng, passes, rights, answers, differing = np.random.default_rng(0), [], [], set(), []
    for case, inputs in enumerate(observations(processor, count)):
        plain = generated(model, inputs, COUNT)
        truth = model.sample_actions(**inputs).token_ids.numpy()
        draft = draft_of(case, truth, rng)
        drafted = model.sample_actions(**inputs, draft=draft)
        found = drafted.token_ids.numpy()
        differing.append([count_differing(model, inputs, plain, each) for each in (truth, found)])
        leading = (draft[:, :-1] == found[:, :-1]).cumprod(axis=1).sum(axis=1)
        np.testing.assert_array_equal(drafted.accepted.numpy(), leading)
        assert 1 <= drafted.passes <= COUNT - leading.min()
        passes.append(drafted.passes)
        rights.append(leading.max())
        answers |= set(map(tuple, truth))
    assert len(answers) > 0.8 * count and max(rights) == COUNT - 1 and len(set(passes)) > 4
    print(f"{dtype}: of {count}, {np.sum(differing, axis=0).tolist()} differ from generate(), fast and drafted")


@BOTH_TYPES
@pytest.mark.parametrize("backend, count", [("captured", 100), pytest.param("code", 1000, marks=pytest.mark.slow)])
def test_random_observations_compiled(backend, count, dtype, chunky, request):
    request.getfixturevalue("captured") if backend == "captured" else torch._dynamo.reset()
    model, processor = chunky
    model.compile_for_actions(batch_sizes=(4,), text_tokens=(40,), progress=False)
    compiled, rng, differing = model._compiled, np.random.default_rng(1), []
    with torch.compiler.set_stance("fail_on_recompile"):
        for case, inputs in enumerate(observations(processor, count)):
            model._compiled = None
            plain = model.sample_actions(**inputs).token_ids.numpy()
            model._compiled = compiled
            draft = draft_of(case, plain, rng)
            found = [model.sample_actions(**inputs, draft=each).token_ids.numpy() for each in (None, draft)]
            differing.append([count_differing(model, inputs, plain, each) for each in found])
    assert not compiled.told
    print(f"{dtype}, {backend}: of {count}, {np.sum(differing, axis=0).tolist()} differ, without and with draft")
