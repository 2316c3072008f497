"""The mathematics of the heads, by hand: schedules, what is fed, what is sampled."""

import math

import pytest
import torch
from torch import nn

from openvla.action_heads import (
    DiffusionActionHead,
    FlowActionHead,
    L1ActionHead,
    NoisyActionProjector,
    ProprioProjector,
    ResidualMLP,
    signal_share,
    time_embedding,
)

SHAPE = (4, 3, 2)


@pytest.fixture
def actions() -> torch.Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))


class Oracle(nn.Module):
    """In the place of a head's network: says what it is given."""

    def forward(self, said: torch.Tensor) -> torch.Tensor:
        return said


def test_the_signal_that_is_left():
    shares = signal_share()
    assert shares.shape == (50,)

    def remaining(step):
        return math.cos((step / 50 + 0.008) / 1.008 * math.pi / 2) ** 2

    # products of 1 - beta telescope, until betas are cut at 0.999
    for step in (0, 10, 48):
        assert shares[step].item() == pytest.approx(remaining(step + 1) / remaining(0), rel=2e-5)
    assert shares[49].item() == pytest.approx(shares[48].item() * 0.001, rel=1e-4)
    assert (shares[1:] < shares[:-1]).all()


def test_time_embeddings():
    found = time_embedding(torch.tensor([0.0, 3.0]), 6)
    assert found[0].tolist() == [0, 0, 0, 1, 1, 1]
    angles = [3.0, 3.0 * 1e-2, 3.0 * 1e-4]
    expected = [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    torch.testing.assert_close(found[1], torch.tensor(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_who_knows_the_noise_denoises_in_any_number_of_steps(steps, actions, noise):
    head = DiffusionActionHead(8, 2)
    head.noise_predictor["mlp_resnet"] = Oracle()
    times = []

    def slots(noisy, time):
        times.append(int(time[0]))
        kept = signal_share()[times[-1]]
        return (noisy - kept.sqrt() * actions) / (1 - kept).sqrt()  # the noise that is in it

    start = signal_share()[50 - 50 // steps]
    found = head.sample(slots, start.sqrt() * actions + (1 - start).sqrt() * noise, steps)
    torch.testing.assert_close(found, actions, atol=1e-4, rtol=0)
    assert times == list(range(50 - 50 // steps, -1, -50 // steps))


def test_a_step_of_denoising_by_hand():
    head = DiffusionActionHead(8, 1)
    head.noise_predictor["mlp_resnet"] = Oracle()
    shares = signal_share()
    noisy, said = torch.tensor([[[0.7]]]), torch.tensor([[[0.2]]])
    # two steps: times 25 and 0
    clean = (0.7 - math.sqrt(1 - shares[25]) * 0.2) / math.sqrt(shares[25])
    middle = math.sqrt(shares[0]) * max(-1, min(1, clean)) + math.sqrt(1 - shares[0]) * 0.2
    last = (middle - math.sqrt(1 - shares[0]) * 0.2) / math.sqrt(shares[0])
    found = head.sample(lambda noisy, time: said, noisy, 2)
    assert found.item() == pytest.approx(max(-1, min(1, last)), abs=1e-6)


def test_what_would_lie_outside_is_clipped():
    head = DiffusionActionHead(8, 1)
    head.noise_predictor["mlp_resnet"] = Oracle()
    found = head.sample(lambda noisy, time: torch.zeros(1, 1, 1), torch.tensor([[[3.0]]]), 50)
    assert found.item() == 1.0


def test_diffusion_is_trained_on_the_noise_that_was_added(actions):
    head, generator = DiffusionActionHead(8, 2), torch.Generator().manual_seed(0)
    corrupted = head.corrupt(actions, generator)
    kept = signal_share()[corrupted.times.long()][:, None, None]
    torch.testing.assert_close(
        (corrupted.noisy - (1 - kept).sqrt() * corrupted.target) / kept.sqrt(), actions, atol=5e-3, rtol=0
    )
    many = head.corrupt(torch.zeros(20000, 1, 1), generator)
    assert sorted(set(many.times.tolist())) == list(range(50))
    assert many.times.mean().item() == pytest.approx(24.5, abs=0.4)
    assert many.target.std().item() == pytest.approx(1.0, abs=0.02)


def test_a_flow_goes_straight(actions, noise):
    head = FlowActionHead(8, 2)
    head.velocity = Oracle()
    times = []

    def slots(noisy, time):
        times.append(time[0].item())
        return actions - noise

    torch.testing.assert_close(head.sample(slots, noise, 4), actions, atol=1e-6, rtol=0)
    assert times == [0.0, 250.0, 500.0, 750.0]  # what the networks see of times 0, 1/4, 1/2, 3/4


def test_a_flow_is_trained_on_its_direction(actions):
    head, generator = FlowActionHead(8, 2), torch.Generator().manual_seed(0)
    corrupted = head.corrupt(actions, generator)
    left = (1 - corrupted.times / 1000)[:, None, None]
    torch.testing.assert_close(corrupted.noisy + left * corrupted.target, actions, atol=1e-5, rtol=0)
    times = head.corrupt(torch.zeros(20000, 1, 1), generator).times / 1000
    # Beta(1, 1.5): mean 1 / 2.5, median 1 - 2 ** (-1 / 1.5)
    assert times.mean().item() == pytest.approx(0.4, abs=0.01)
    assert times.median().item() == pytest.approx(1 - 2 ** (-1 / 1.5), abs=0.01)
    assert times.min() >= 0 and times.max() <= 1


@pytest.mark.parametrize("head", [L1ActionHead, DiffusionActionHead, FlowActionHead])
def test_losses_count_what_is_counted(head, actions):
    torch.manual_seed(0)
    head = head(8, 2)
    hidden = torch.randn(4, 6, 8)
    counted = torch.tensor([[True, True, False]] * 4)
    said = head(hidden)
    error = (said - actions).abs() if isinstance(head, L1ActionHead) else (said - actions) ** 2
    assert head.loss(hidden, actions).item() == pytest.approx(error.mean().item(), rel=1e-5)
    assert head.loss(hidden, actions, counted).item() == pytest.approx(
        error[:, :2].sum().item() / error.numel(), rel=1e-5
    )
    # in one batch or in several, the same
    counted = torch.tensor([[True, True, True], [True, False, False], [True, True, False], [True, True, True]])
    parts = [head.loss(hidden[row : row + 1], actions[row : row + 1], counted[row : row + 1]) for row in range(4)]
    assert head.loss(hidden, actions, counted).item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-5)


def test_each_step_is_read_from_its_own_slots():
    torch.manual_seed(0)
    network, hidden = ResidualMLP(8, 2), torch.randn(1, 6, 8)
    before = network(hidden)
    hidden[0, 4] += 1.0  # the first slot of the third step
    moved = (network(hidden) - before).abs().amax(dim=-1)[0]
    assert moved[:2].tolist() == [0, 0] and moved[2] > 1e-3
    assert network(hidden.bfloat16()).dtype == torch.float32  # whatever comes in


def test_projectors():
    torch.manual_seed(0)
    state = ProprioProjector(3, 8)
    expected = state.fc2(nn.functional.gelu(state.fc1(torch.tensor([[0.1, 0.2, 0.3]]))))
    assert torch.equal(state(torch.tensor([[0.1, 0.2, 0.3]])), expected[:, None])

    noisy = NoisyActionProjector(8, takes_time=True)
    values = torch.tensor([[[0.5, -0.5], [0.5, 1.0]]])
    found = noisy(values, torch.tensor([3.0]))
    assert found.shape == (1, 4, 8) and torch.equal(found[0, 0], found[0, 2])  # the same number, the same embedding
    assert not torch.allclose(found, noisy(values, torch.tensor([4.0])))
    plain = NoisyActionProjector(8, takes_time=False)
    assert torch.equal(plain(values, torch.tensor([3.0])), plain(values, torch.tensor([4.0])))
