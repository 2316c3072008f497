import json

import pytest
import torch

import openvla
from openvla.evaluate import doctor


def report(model, processor, **kwargs) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.diagnose(model, processor, **kwargs)}


def failed(checks: dict[str, doctor.Check]) -> set[str]:
    return {name for name, check in checks.items() if check.status == doctor.FAILED}


def test_a_healthy_policy(model, processor):
    checks = report(model, processor)
    assert not failed(checks) and doctor.is_fit(list(checks.values()))
    assert {"versions", "weights", "tokens", "prompt", "image", "instruction", "repeatable"} <= set(checks)
    assert checks["image"].status == checks["instruction"].status == checks["action tokens"].status == doctor.OK
    assert {"statistics bridge_orig", "statistics toy_robot", "statistics toy_nomask_6d"} <= set(checks)


def test_a_policy_that_ignores_the_image(fresh_model, processor, monkeypatch):
    patches = torch.zeros(1, 256, 128)
    monkeypatch.setattr(fresh_model.model, "get_image_features", lambda pixels: patches.expand(len(pixels), -1, -1))
    checks = report(fresh_model, processor)
    assert failed(checks) == {"image"} and "ignored" in checks["image"].detail


def test_a_policy_that_ignores_the_instruction(model, processor, monkeypatch):
    monkeypatch.setattr(type(processor), "build_prompt", lambda self, instruction: "In: do it\nOut:")
    assert failed(report(model, processor)) == {"instruction"}


def test_generation_that_loses_the_image(fresh_model, processor, monkeypatch):
    # what the original code does on transformers 4.50 and later
    generate = type(fresh_model).generate

    def forgetful(self, inputs=None, **kwargs):
        kwargs["pixel_values"] = torch.zeros_like(kwargs["pixel_values"])
        return generate(self, inputs, **kwargs)

    monkeypatch.setattr(type(fresh_model), "generate", forgetful)
    assert failed(report(fresh_model, processor)) == {"action tokens"}


def test_broken_weights(fresh_model, processor):
    with torch.no_grad():
        fresh_model.model.projector.fc2.bias[3] = float("nan")
    checks = report(fresh_model, processor)
    assert failed(checks) == {"weights"} and "model.projector.fc2.bias" in checks["weights"].detail


@pytest.mark.parametrize(
    "statistics, status, detail",
    [
        (None, "failed", "no action statistics"),
        ({"robot": {"action": {"q01": [0.0, 0.0], "q99": [0.0, 0.0]}}}, "failed", "nothing can move"),
        ({"robot": {"action": {"q01": [0.0, -1.0], "q99": [0.0, 1.0]}}}, "warning", r"dims [0] have no range"),
        ({"robot": {"action": {"q01": [0.0, -1.0], "q99": [1.0]}}}, "failed", "lengths differ"),
        ({"robot": {"action": {"mean": [0.0]}}}, "failed", "lacks ['q01', 'q99']"),
    ],
)
def test_bad_statistics(fresh_model, statistics, status, detail):
    fresh_model.norm_stats = statistics
    (check,) = doctor.check_statistics(fresh_model, None)
    assert check.status == status and detail in check.detail


def test_an_unknown_key(model):
    (check,) = doctor.check_statistics(model, "bridge")
    assert check.status == doctor.FAILED and "bridge_orig" in check.detail


def test_processor_and_model_that_do_not_fit(model, processor, monkeypatch):
    monkeypatch.setattr(processor, "num_patches", 255)
    checks = report(model, processor)
    assert failed(checks) == {"tokens"} and "makes 255 placeholders, the model needs 256" in checks["tokens"].detail


def test_a_policy_whose_tokens_are_no_actions(fresh_model, processor, monkeypatch):
    with torch.no_grad():
        fresh_model.lm_head.weight[31744:32000] *= 0.01
    checks = report(fresh_model, processor)
    assert failed(checks) == {"action tokens"} and "100% of the tokens" in checks["action tokens"].detail
    monkeypatch.setattr(doctor, "MOST_REPLACED", 1.1)
    assert report(fresh_model, processor)["action tokens"].status == doctor.WARNING


def test_statistics_that_do_not_fit_the_policy(fresh_model, processor):
    fresh_model.config.action_dim = 6
    checks = report(fresh_model, processor)
    assert failed(checks) == {"act bridge_orig", "act toy_robot"}
    assert "does not fit config.action_dim=6" in checks["act toy_robot"].detail


# --- Policies that decode in parallel ---
@pytest.mark.parametrize("kind", [{}, {"head": "diffusion"}, {"film": True, "proprio": False}], ids=str)
def test_a_healthy_policy_that_decodes_in_parallel(kind, oft_policy):
    model, processor = oft_policy(**kind)
    checks = report(model, processor, unnorm_key="toy_robot")
    assert {check.status for check in checks.values()} == {doctor.OK}
    assert {"image", "instruction", "repeatable", "range"} <= set(checks) and "action tokens" not in checks
    assert ("robot's state" in checks) == kind.get("proprio", True)


def test_tokens_decoded_in_parallel_have_to_be_actions(oft_policy, monkeypatch):
    model, processor = oft_policy("token", proprio=False)  # which was never trained for it
    checks = report(model, processor, unnorm_key="toy_robot")
    assert failed(checks) == {"action tokens"} and "% of the tokens" in checks["action tokens"].detail
    head = model.lm_head.weight.detach().clone()
    head[:31744] = head[32000:] = 0.0  # so that the best logit, if it is positive, is an action's
    monkeypatch.setattr(model.lm_head.weight, "data", head)
    checks = report(model, processor, unnorm_key="toy_robot")
    assert not failed(checks) and checks["action tokens"].detail == "the language model prefers actions"


def test_a_state_that_makes_no_difference(oft_folder):
    model, processor = openvla.load(oft_folder(), dtype=torch.float32, action_chunk=8, num_cameras=2)
    torch.nn.init.zeros_(model.model.proprio_projector.fc2.weight)
    checks = report(model, processor, unnorm_key="toy_robot")
    assert failed(checks) == {"robot's state"} and "by 0.00%" in checks["robot's state"].detail
    torch.nn.init.constant_(model.action_head.model.fc2.bias, 3.0)
    assert report(model, processor, unnorm_key="toy_robot")["range"].status == doctor.WARNING


def test_statistics_of_another_state(oft_policy):
    model, processor = oft_policy()
    checks = report(model, processor)  # the state of bridge_orig has 7 dims
    assert failed(checks) == {"act bridge_orig"}
    assert "takes proprio of 8 dims, got (1, 7)" in checks["act bridge_orig"].detail


def test_a_processor_that_knows_of_no_state(oft_policy, monkeypatch):
    model, processor = oft_policy()
    monkeypatch.setattr(processor, "num_state_tokens", 0)
    checks = report(model, processor, unnorm_key="toy_robot")
    assert failed(checks) == {"tokens"} and "makes 512 placeholders, the model needs 513" in checks["tokens"].detail


def test_command_on_what_the_training_of_openvla_oft_leaves(oft_folder, capsys):
    told = ["--action-chunk", "8", "--num-cameras", "2", "--unnorm-key", "toy_robot"]
    doctor.main([str(oft_folder()), *told, "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert checks["robot's state"]["status"] == checks["range"]["status"] == "ok"


def test_command(checkpoint, tmp_path, capsys):
    doctor.main([str(checkpoint), "--json"])
    assert {check["status"] for check in json.loads(capsys.readouterr().out)} == {"ok"}
    doctor.main([str(checkpoint), "--unnorm-key", "toy_robot"])
    assert capsys.readouterr().out.endswith("fit to act\n")
    with pytest.raises(SystemExit) as stop:
        doctor.main([str(checkpoint), "--unnorm-key", "bridge"])
    assert stop.value.code == 1 and "NOT fit to act" in capsys.readouterr().out
