"""Drafts of the answer save passes and change no token, whatever they say."""

import numpy as np
import pytest
import torch

import openvla
from openvla.action_decoding import TokenChoice

KEY = "bridge_orig"
FIRST, END = 31744, 32000


def inputs_of(processor, recorded, images, indices: list[int]) -> dict:
    prompts = [recorded["inputs"][index]["prompt"] for index in indices]
    return processor(prompts, [images[index] for index in indices])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_draft_needs_one_pass(dtype, model, checkpoint, processor, recorded, images):
    if dtype != torch.float32:
        model = openvla.OpenVLAForActionPrediction.from_pretrained(checkpoint, dtype=dtype).eval()
    for index in range(len(recorded["inputs"]) - 1):
        inputs = inputs_of(processor, recorded, images, [index])
        plain = model.sample_actions(**inputs, action_dim=7)
        assert (plain.passes, plain.accepted) == (7, None)
        drafted = model.sample_actions(**inputs, action_dim=7, draft=plain.token_ids)
        assert drafted.token_ids.tolist() == plain.token_ids.tolist()
        assert drafted.passes == 1 and drafted.accepted.tolist() == [6]
        torch.testing.assert_close(
            drafted.log_probs, plain.log_probs, atol=1e-4 if dtype == torch.float32 else 0.05, rtol=0
        )


@pytest.mark.parametrize("wrong", range(7))
def test_a_draft_is_taken_up_to_its_first_wrong_token(wrong, model, processor, recorded, images):
    inputs = inputs_of(processor, recorded, images, [3])
    plain = model.predict_action(**inputs, unnorm_key=KEY, return_dict=True)
    draft = plain["token_ids"].copy()
    draft[0, wrong] += 1 if draft[0, wrong] < END - 1 else -1
    drafted = model.predict_action(**inputs, unnorm_key=KEY, draft=draft, return_dict=True)
    np.testing.assert_array_equal(drafted["token_ids"], plain["token_ids"])
    np.testing.assert_array_equal(drafted["actions"], plain["actions"])
    assert drafted["accepted"].tolist() == [min(wrong, 6)]  # nothing follows the last token: it is not looked at


def test_rows_of_a_batch_with_drafts_of_their_own(model, processor, recorded, images):
    indices = [0, 6, 2]  # instructions of several lengths
    inputs = inputs_of(processor, recorded, images, indices)
    plain = model.sample_actions(**inputs, action_dim=7)
    draft = plain.token_ids.clone()
    draft[1, 3:] = FIRST
    draft[2, 1] = END - 1
    expected = [(row.cumprod(0).sum() if len(row) else 0) for row in (draft[:, :-1] == plain.token_ids[:, :-1]).long()]
    drafted = model.sample_actions(**inputs, action_dim=7, draft=draft)
    assert torch.equal(drafted.token_ids, plain.token_ids)
    assert drafted.accepted.tolist() == [int(each) for each in expected] and drafted.passes <= 6


@pytest.mark.parametrize(
    "draft, message",
    [
        ([[FIRST] * 6], r"Expected a draft \(1, 7\) of token ids from 31744 to 31999, got \[\[31744, "),
        ([[FIRST] * 7] * 2, r"Expected a draft \(1, 7\)"),
        ([FIRST] * 6 + [END], "from 31744 to 31999"),
        ([FIRST - 1] * 7, "from 31744 to 31999"),
        ([float("nan")] * 7, "from 31744 to 31999"),
    ],
)
def test_drafts_that_are_no_actions_are_refused(draft, message, model, processor, recorded, images):
    inputs = inputs_of(processor, recorded, images, [0])
    with pytest.raises(ValueError, match=message):
        model.predict_action(**inputs, unnorm_key=KEY, draft=np.array(draft))
    with pytest.raises(ValueError, match="not for sampling"):
        model.predict_action(**inputs, unnorm_key=KEY, draft=np.full(7, FIRST), do_sample=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_actions_choose_as_the_whole_head_does(dtype, model):
    """Only 256 of 32,064 rows are computed to choose; of a head that is more than a matrix, all."""
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(64, 32064, bias=False).to(dtype), torch.randn(500, 7, 64).to(dtype)
    tokenizer = model.action_tokenizer
    rows = TokenChoice(head, tokenizer, None, "actions")
    whole = TokenChoice(torch.nn.Sequential(head), tokenizer, None, "actions")
    assert rows.rows.shape == (256, 64) and whole.rows is None
    ids = rows(hidden)
    logits = head(hidden)[..., FIRST:END]
    assert torch.equal(whole(hidden), logits.argmax(-1) + FIRST)
    chosen = logits.gather(-1, ids[..., None] - FIRST)[..., 0].float()
    worst = (logits.amax(-1).float() - chosen).max().item()
    assert torch.equal(ids, whole(hidden)) if dtype == torch.float32 else worst <= 2**-7 * logits.abs().max()
    told = rows.describe(hidden, ids)
    assert bool(told["finite"])
    torch.testing.assert_close(told["log_probs"].exp(), logits.float().softmax(-1).amax(-1), atol=1e-2, rtol=0)
    assert torch.equal(told["replaced"], (head(hidden).argmax(-1) < FIRST) | (head(hidden).argmax(-1) >= END))
    hooked = torch.nn.Linear(64, 32064, bias=False)
    hooked.register_forward_hook(lambda *_: None)
    assert TokenChoice(hooked, tokenizer, None, "actions").rows is None
