"""Plants one mistake at a time in a copy of the package and shows which tests notice: `make test-bite`.

python tests/plant_mistakes.py gripper tokens    # only those that have one of these words in their name

Token ids alone notice few of these: the recorded checkpoint's margins are wide. The tensor comparisons must.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
# what -> (file, text, replacement)
MISTAKES = {
    "tanh GELU in the towers": ("vision_towers.py", "else F.gelu(x)", 'else F.gelu(x, approximate="tanh")'),
    "rms_norm_eps 1e-5": ("configuration_openvla.py", '"rms_norm_eps": 1e-6', '"rms_norm_eps": 1e-5'),
    "LayerNorm eps 1e-5": ("configuration_openvla.py", "norm_eps: float = 1e-6", "norm_eps: float = 1e-5"),
    "bilinear resize": (
        "processing_openvla.py",
        '"bicubic": Image.Resampling.BICUBIC',
        '"bicubic": Image.Resampling.BILINEAR',
    ),
    "last block not skipped": ("vision_towers.py", "range(tower.depth - 1)", "range(tower.depth)"),
    "tower statistics swapped": ("processing_openvla.py", "self._normalizations)", "self._normalizations[::-1])"),
    "SigLIP before DINOv2": (
        "vision_towers.py",
        "torch.cat([patches, self.fused_featurizer(images[:, 3:], language)], dim=2)",
        "torch.cat([self.fused_featurizer(images[:, 3:], language), patches], dim=2)",
    ),
    "trailing token forgotten": ("modeling_openvla.py", "row.append(end_id)", "pass"),
    "1e-8 in unnormalize": (
        "action_tokenizer.py",
        "0.5 * (actions + 1.0) * (self.high - self.low)",
        "0.5 * (actions + 1.0) * (self.high - self.low + 1e-8)",
    ),
    "one bin off": ("action_tokenizer.py", "self.vocab_end - ids - 1", "self.vocab_end - ids"),
    "padding attended to": (
        "modeling_openvla.py",
        "[0] * (length - len(row)) + [1]",
        "[1] * (length - len(row)) + [1]",
    ),
    "answer scored a place early": (
        "finetune/collator.py",
        "labels[index, len(row) - len(answer) : len(row)]",
        "labels[index, len(row) - len(answer) - 1 : len(row) - 1]",
    ),
    "attention stays causal": ("modeling_openvla.py", "return key >= 0", "return key < 0"),
    "images see the slots of a prefix": ("modeling_openvla.py", "one_pass = prefix and not past", "one_pass = False"),
    "slots read where they are": (
        "modeling_openvla.py",
        "num_read=whole.shape[1] - length + 1,",
        "num_read=whole.shape[1] - length,",
    ),
    "slots trained where they are": ("modeling_openvla.py", "slots = F.pad(slots[:, 1:], (0, 1))", "pass"),
    "slots not emptied": (
        "modeling_openvla.py",
        "inputs_embeds.masked_fill(slots.unsqueeze(-1), 0.0)",
        "inputs_embeds",
    ),
    "padding in FiLM's mean": ("modeling_openvla.py", "is_text = is_text & attention_mask.bool()", "pass"),
    "gamma without its one": ("vision_towers.py", "(1 + self.scale(language)", "(self.scale(language)"),
    "noise not clipped": ("action_heads.py", "/ kept.sqrt()).clamp(-1.0, 1.0)", "/ kept.sqrt())"),
    "time runs backwards": (
        "action_heads.py",
        "FLOW_TIME_SCALE * step / steps",
        "FLOW_TIME_SCALE * (1 - step / steps)",
    ),
    "chunks past the end are scored": ("action_heads.py", "(errors * counted[..., None]).sum()", "errors.sum()"),
    "chunks end anywhere": ("finetune/steps.py", "else chunk - 1", "else 0"),
    "wrong quantile": ("finetune/statistics.py", "np.quantile(values, 0.99", "np.quantile(values, 0.999"),
    "Bridge off by a step": ("finetune/oxe.py", "reached[1:] - reached[:-1]", "reached[:-1] - reached[1:]"),
    "gripper not inverted": ("finetune/oxe.py", "return 1.0 - gripper", "return gripper"),
    "chunk past the episode": ("finetune/steps.py", "len(episode) - 1)", "len(episode) - 2)"),
    "weights of a mixture ignored": ("finetune/steps.py", "if weights is None else weights)", "if True else weights)"),
    "pixel statistics not rounded": ("hub_upload/prismatic.py", "dtype=torch.bfloat16).tolist", "dtype=None).tolist"),
    "positions not antialiased": ("hub_upload/prismatic.py", "antialias=True)", "antialias=False)"),
    "statistics of the base": ("hub_upload/export.py", "if source.adapter is None:", "if True:"),
    "centre crop of the base": ("hub_upload/export.py", "folder if own else weights,", "weights,"),
    "merged in low precision": ("hub_upload/merge.py", "parameter.data.float()", "parameter.data"),
    "anything is proof": ("hub_upload/proof.py", "if worst > allowed:", "if False:"),
    "old weights stay on the Hub": ("hub_upload/remote.py", "states[path] = DELETED", "pass"),
    "others' changes overwritten": ("hub_upload/remote.py", "parent_commit=self.commit", "parent_commit=None"),
    "conventions not compared": ("evaluate/envs/__init__.py", "if differences:", "if False:"),
    "LIBERO's gripper not turned round": ("evaluate/envs/libero.py", "-np.sign(2 *", "np.sign(2 *"),
    "HDF5's gripper not turned round": ("evaluate/baselines.py", "not isinstance(reader, HDF5Reader)", "True"),
    "expert not in tokens": ("evaluate/baselines.py", "through_tokens(np.stack(actions), self.stats)", "actions"),
    "90 % for 95 %": ("evaluate/report.py", "1.959963984540054", "1.644853626951472"),
    "adapter's head forgotten": ("hub_upload/merge.py", 'if any(each in f".{name}" for each in whole)', "if False"),
    "proof deaf to the state": (
        "hub_upload/trial.py",
        "torch.where(proprio > 0, proprio - 1, proprio + 1)",
        "proprio",
    ),
    "proof of half an action": ("hub_upload/proof.py", "ACTION_RANGE = 2.0", "ACTION_RANGE = 4.0"),
    "LoRA of FiLM's towers not scaled": ("oft_files.py", "scale * up @ down", "up @ down"),
    "one key names the robot": ("oft_files.py", "and all(key.startswith(name)", "and any(key.startswith(name)"),
    "statistics left on the Hub": ("oft_files.py", "ADAPTER, STATISTICS)", "ADAPTER)"),
    "state not asked for": ("serve/handler.py", "if self.model.config.proprio_dim else None", "if False else None"),
    "job of a dead process lost": ("evaluate/processes.py", "pending.appendleft(job)", "pass"),
    "oldest chunk weighs least": ("serve/action_queue.py", "np.exp(-self.ensemble", "np.exp(self.ensemble"),
    "gripper averaged": (
        "serve/action_queue.py",
        "action[self.averaged] = (weights @ predictions / weights.sum())[self.averaged]",
        "action = weights @ predictions / weights.sum()",
    ),
    "one noise for a batch": ("modeling_openvla.py", "for seed in seeds:", "for seed in seeds[:1] * len(seeds):"),
    "drafts are believed": ("action_decoding.py", "right = int(leading.min())", "right = guesses.shape[1]"),
    "drafts right in one row are in all": ("action_decoding.py", "int(leading.min())", "int(leading.max())"),
    "last layer under another mask": (
        "language_layers.py",
        "attention_mask[:, :, unread:]",
        "attention_mask[:, :, :num_read]",
    ),
    "gradients lose the weight": ("linear_layers.py", "input if for_weight else None, weight", "input * 0, weight"),
    "oneDNN trusts a slice": ("linear_layers.py", "        and weight.is_contiguous()\n", ""),
    "draft sees what follows it": ("language_layers.py", ".tril(past + unread)", ".tril(past + length)"),
    "compiled tokens see padding": ("compiled_actions.py", "<= positions[:, :, None]", ">= 0 * positions[:, :, None]"),
    "drafts are of other steps": (
        "serve/action_queue.py",
        "steps = np.arange(len(chunk)) +",
        "steps = np.arange(len(chunk)) + 0 *",
    ),
    "chunks counted past the end": ("evaluate/offline.py", "[~step.is_pad for", "[step.is_pad | True for"),
    "noise of evaluations by chance": ("evaluate/offline.py", "[(NOISE_SEED, index) for", "[None for"),
    "layers of odd sizes stay as they are": ("quantization.py", "if odd or (", "if odd and ("),
    "scales of zero": ("quantization.py", '"activation_value_lb": 1e-12', '"activation_value_lb": None'),
    "torchao takes the towers, too": (
        "pretrained_openvla.py",
        '.quant_method == "torchao" and',
        ".quant_method and False and",
    ),
    "scales without a fingerprint": (
        "serve/policy.py",
        "plain_tensors(parameter.detach())",
        "plain_tensors(parameter.detach())[:1]",
    ),
    "any token will do": ("serve/guard.py", "and not any(known)", "and not known"),
    "bodies on paths that need no token": ("serve/guard.py", "in OPEN and not brings_body", "in OPEN"),
    "old observations are answered": ("serve/batching.py", "> self.max_age:", "> 1000 * self.max_age:"),
    "ages in seconds": ("serve/observations.py", 'times["age_ms"] or 0) / 1000', 'times["age_ms"] or 0) / 1e6'),
    "the oldest of a session wins": ("serve/batching.py", "max(newest, turn.arrived)", "turn.arrived"),
    "answers in another order": (
        "serve/service.py",
        "for place, answer in zip(places,",
        "for place, answer in zip(places[::-1],",
    ),
    "nothing is clamped": ("serve/safety.py", "np.clip(actions, self.low, self.high)", "actions.copy()"),
    "grippers as the dataset has them": ("serve/vla_eval.py", "action > 0.5, -1.0, 1.0)", "action > 0.5, 1.0, -1.0)"),
    "a chunk goes on after an error": ("serve/vla_eval.py", "episode.reset()  # a robot", "pass  # a robot"),
    "keys that nobody looks at": ("serve/observations.py", "if unread := [", "if unread := [] and ["),
    "wrist for main": ("serve/observations.py", "[*main, *arm] if", "[*arm, *main] if"),
    "what is no action is right": ("evaluate/offline.py", '& ~output["replaced"]', ""),
}
EVALUATING = ("envs", "envs_metaworld", "rollout", "demos", "report", "offline", "quantization")
SERVING = ("policy", "action_queue", "client", "handler", "quantization", "batching", "observations", "safety", "wire")
SERVING += ("server",)
PUBLISHING = ("convert", "export", "hub_server", "upload", "model_card", "handler", "app", "drawing")


def main(words: list[str]) -> None:
    chosen = [mistake for mistake in MISTAKES if not words or any(word in mistake for word in words)]
    if not chosen:
        sys.exit(f"No mistake's name has one of {words} in it; there are {list(MISTAKES)}.")
    unnoticed = []
    for mistake in chosen:
        file, text, replacement = MISTAKES[mistake]
        with tempfile.TemporaryDirectory() as parent:
            copy = Path(parent) / "openvla"
            ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "*.egg-info")
            shutil.copytree(ROOT, copy, ignore=ignored)
            source = (copy / file).read_text()
            if text not in source:
                sys.exit(f"{mistake}: {text!r} is no longer in {file}")
            (copy / file).write_text(source.replace(text, replacement))
            # The copy's folder is named openvla, and comes first on the path.
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-rf",
                "-m",
                "not slow",
                "-p",
                "no:cacheprovider",
                "tests",
            ]
            if file.startswith("hub_upload/"):
                command[-1:] = [f"tests/test_{name}.py" for name in PUBLISHING]
            elif file.startswith("evaluate/"):
                command[-1:] = [f"tests/test_{name}.py" for name in EVALUATING]
            elif file.startswith("serve/"):
                command[-1:] = [f"tests/test_{name}.py" for name in SERVING]
            else:
                slow = ("cli", "doctor", "hub_roundtrip", "train_end_to_end", *PUBLISHING)
                command += [f"--ignore=tests/test_{name}.py" for name in slow]
            environment = {
                "PYTHONPATH": parent,
                "PATH": "/usr/bin:/bin",
                "HF_HUB_OFFLINE": "1",
                "HOME": str(Path.home()),
            }
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        failures = sorted(
            {re.sub(r"\[.*", "", name) for name in re.findall(r"^FAILED tests/(\S+)", done.stdout, re.M)}
        )
        print(f"{mistake}: {len(failures)} tests fail")
        for failure in failures:
            print(f"    {failure}")
        if not failures:
            unnoticed.append(mistake)
            print(done.stdout[-1000:], done.stderr[-1000:])
    if unnoticed:
        sys.exit(f"unnoticed: {unnoticed}")


if __name__ == "__main__":
    main(sys.argv[1:])
