"""Hidden states at the action slots -> continuous actions: regression, diffusion and flow matching, one contract.

A head is made for one chunk length and action size, and lies with its weights in the policy's safetensors:

    corrupt(actions) -> Corrupted        what the slots are fed in training, and what the head must say
    forward(hidden)  -> (B, T, A)        what it says
    loss(hidden, target, counted)        how far that is off
    sample(slots, noise, steps)          actions in [-1, 1]; `slots(noisy, times)` runs the policy over the slots

Parameter names are those of OpenVLA-OFT's files. Source: Kim et al. 2025 (arXiv:2502.19645); diffusion: Ho et al. 2020
(arXiv:2006.11239), Nichol and Dhariwal 2021 (arXiv:2102.09672), Song et al. 2021 (arXiv:2010.02502); flow matching:
Lipman et al. 2023 (arXiv:2210.02747) with the times of Black et al. 2024 (arXiv:2410.24164).

Legend: B batch · T action chunk · A action dims · D hidden.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

DIFFUSION_STEPS = 50  # of training; acting may take fewer
FLOW_TIME_SCALE = 1000.0  # sinusoids resolve integers; a flow's time goes from 0 to 1

Slots = Callable[[torch.Tensor | None, torch.Tensor | None], torch.Tensor]


@dataclass
class Corrupted:
    """One training example of a head.

    Args:
        noisy: `(B, T, A)` what the slots are fed; None: nothing, their embeddings are zero.
        times: `(B,)` how noisy that is; None with `noisy`.
        target: `(B, T, A)` what the head must say.
    """

    noisy: torch.Tensor | None
    times: torch.Tensor | None
    target: torch.Tensor


class ResidualBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ffn(x)


class ResidualMLP(nn.Module):
    """The A hidden states of each step, side by side -> its A numbers: `(B, T·A, D)` -> `(B, T, A)` float32."""

    def __init__(self, hidden_size: int, action_dim: int):
        super().__init__()
        self.action_dim = action_dim
        self.layer_norm1 = nn.LayerNorm(action_dim * hidden_size)
        self.fc1 = nn.Linear(action_dim * hidden_size, hidden_size)
        self.mlp_resnet_blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden_size)
        self.fc2 = nn.Linear(hidden_size, action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        batch, slots, dim = hidden.shape
        x = hidden.reshape(batch, slots // self.action_dim, self.action_dim * dim).to(self.fc1.weight.dtype)
        x = F.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x)).float()


class L1ActionHead(nn.Module):
    """Says the actions themselves, in one pass; trained on the absolute error."""

    def __init__(self, hidden_size: int, action_dim: int):
        super().__init__()
        self.model = ResidualMLP(hidden_size, action_dim)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model(hidden)

    def corrupt(self, actions: torch.Tensor, generator: torch.Generator | None = None) -> Corrupted:
        return Corrupted(None, None, actions)

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        return _mean((self(hidden) - target).abs(), counted)

    def sample(self, slots: Slots, noise: torch.Tensor, steps: int | None = None) -> torch.Tensor:
        return self(slots(None, None))


class DiffusionActionHead(nn.Module):
    """Says the noise in noisy actions; acts by taking it away step by step (DDIM, without noise of its own)."""

    def __init__(self, hidden_size: int, action_dim: int):
        super().__init__()
        self.noise_predictor = nn.ModuleDict({"mlp_resnet": ResidualMLP(hidden_size, action_dim)})

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.noise_predictor["mlp_resnet"](hidden)

    def corrupt(self, actions: torch.Tensor, generator: torch.Generator | None = None) -> Corrupted:
        times = torch.randint(DIFFUSION_STEPS, (len(actions),), generator=generator).to(actions.device)
        noise = _normal(actions, generator)
        kept = signal_share(actions.device)[times][:, None, None]
        return Corrupted(kept.sqrt() * actions + (1 - kept).sqrt() * noise, times.float(), noise)

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        return _mean((self(hidden) - target).square(), counted)

    def sample(self, slots: Slots, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """Actions from `noise` `(B, T, A)` float32 in `steps` equal strides, a divisor of 50."""
        shares, stride, noisy = signal_share(noise.device), DIFFUSION_STEPS // steps, noise
        for time in reversed(range(0, stride * steps, stride)):
            predicted = self(slots(noisy, noise.new_full((len(noise),), time)))
            kept = shares[time]
            kept_next = shares[time - stride] if time >= stride else torch.ones_like(kept)
            clean = ((noisy - (1 - kept).sqrt() * predicted) / kept.sqrt()).clamp(-1.0, 1.0)
            noisy = kept_next.sqrt() * clean + (1 - kept_next).sqrt() * predicted
        return noisy


class FlowActionHead(nn.Module):
    """Says in which direction noisy actions have to move; acts by going there in Euler steps."""

    def __init__(self, hidden_size: int, action_dim: int):
        super().__init__()
        self.velocity = ResidualMLP(hidden_size, action_dim)  # not as in L1, whose weights would fit and mean actions

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.velocity(hidden)

    def corrupt(self, actions: torch.Tensor, generator: torch.Generator | None = None) -> Corrupted:
        """Straight lines from noise (time 0) to actions (time 1); times lean to the noisy end, Beta(1, 1.5)."""
        uniform = torch.rand(len(actions), generator=generator).to(actions)
        times = 1 - (1 - uniform) ** (1 / 1.5)
        noise, share = _normal(actions, generator), times[:, None, None]
        return Corrupted(share * actions + (1 - share) * noise, times * FLOW_TIME_SCALE, actions - noise)

    def loss(self, hidden: torch.Tensor, target: torch.Tensor, counted: torch.Tensor | None = None) -> torch.Tensor:
        return _mean((self(hidden) - target).square(), counted)

    def sample(self, slots: Slots, noise: torch.Tensor, steps: int) -> torch.Tensor:
        """Actions from `noise` `(B, T, A)` float32 in `steps` Euler steps."""
        actions = noise
        for step in range(steps):
            times = noise.new_full((len(noise),), FLOW_TIME_SCALE * step / steps)
            actions = actions + self(slots(actions, times)) / steps
        return actions


ACTION_HEADS = {"l1": L1ActionHead, "diffusion": DiffusionActionHead, "flow": FlowActionHead}


class ProprioProjector(nn.Module):
    """The robot's state, normalised, as one embedding: `(B, proprio dims)` -> `(B, 1, D)`."""

    def __init__(self, proprio_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(proprio_dim, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, proprio: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(proprio.to(self.fc1.weight.dtype))))[:, None]


class NoisyActionProjector(nn.Module):
    """Each number of noisy actions as one embedding: `(B, T, A)` -> `(B, T·A, D)`.

    `takes_time`: the time of denoising enters here; otherwise it is a token of its own, as in OpenVLA-OFT.
    """

    def __init__(self, hidden_size: int, takes_time: bool):
        super().__init__()
        self.fc1 = nn.Linear(1, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)
        self.time = nn.Linear(hidden_size, hidden_size) if takes_time else None

    def forward(self, noisy: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        dtype = self.fc1.weight.dtype
        x = self.fc1(noisy.flatten(1)[..., None].to(dtype))
        if self.time is not None:
            x = x + self.time(time_embedding(times, x.shape[-1]).to(dtype))[:, None]
        return self.fc2(F.gelu(x))


def time_embedding(times: torch.Tensor, dim: int) -> torch.Tensor:
    """Sines, then cosines, of `times` `(B,)` at dim / 2 frequencies from 1 down to 1 / 10000: `(B, dim)` float32."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, device=times.device) * (-math.log(10000.0) / (half - 1)))
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def signal_share(device: torch.device | str = "cpu") -> torch.Tensor:
    """Of the variance of noisy actions, what is signal after 1 … 50 steps of noise: `(50,)`, the squared cosine of
    Nichol and Dhariwal 2021, eq. 17."""

    def remaining(step: int) -> float:
        return math.cos((step / DIFFUSION_STEPS + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - remaining(step + 1) / remaining(step), 0.999) for step in range(DIFFUSION_STEPS)]
    return torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0).to(device)


def _normal(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like)  # drawn on the CPU: the same on every device


def _mean(errors: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Mean over `errors` `(B, T, A)`; steps that are not `counted` `(B, T)` count as without error. So every other one
    weighs the same, in whatever batches it comes."""
    if counted is None:
        return errors.mean()
    return (errors * counted[..., None]).sum() / errors.numel()
