"""VSD's adaptation: what it answers, in one call or in pieces, and how it is saved."""

import io

import pytest
import torch
from adapted import adapt, flow_model, latent_model, question, taught

from errors import UserError

# ---- asking -----------------------------------------------------------------------------------------------------------------


def test_guidance_of_the_camera():
    prior = latent_model()
    adaptation = taught(prior)
    asked = question(prior)
    without, seen = adaptation.predict(*asked, camera=False), adaptation.predict(*asked)
    calls = []
    adaptation.network.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    for scale, expected, sizes in (
        (1.0, seen, [2]),
        (0.0, without, [2]),
        (0.5, (without + seen) / 2, [4]),
        (3.0, 3 * seen - 2 * without, [4]),
    ):
        calls.clear()
        assert torch.allclose(adaptation.guided(*asked, scale), expected, atol=1e-5)
        assert calls == sizes  # no forward that is not needed
    assert not torch.allclose(without, seen, atol=1e-3)


@pytest.mark.parametrize(("most", "group"), [(1, 1), (3, 1), (3, 2), (1, 2)])
def test_pieces_are_told_their_own_cameras(most, group):
    prior = latent_model()
    adaptation = taught(prior)
    noisy, t, embedding, hints = question(prior, 4)
    whole, half = adaptation.predict(noisy, t, embedding, hints), adaptation.guided(noisy, t, embedding, hints, 0.5)
    prior.max_batch, prior.view_group = most, group
    calls = []
    adaptation.network.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    assert torch.allclose(adaptation.predict(noisy, t, embedding, hints), whole, atol=1e-5)
    assert calls == {(1, 1): [1] * 4, (3, 1): [3, 1], (3, 2): [2, 2], (1, 2): [2, 2]}[most, group]
    assert torch.allclose(adaptation.guided(noisy, t, embedding, hints, 0.5), half, atol=1e-5)


def test_learning_in_pieces_is_learning_at_once():
    answers, losses = [], []
    for most in (0, 1):
        prior = latent_model()
        prior.max_batch = most
        adaptation = adapt(prior, lr=1e-3)
        latents, t, embedding, hints = question(prior, 3)
        losses.append([adaptation.learn(latents, embedding, hints).item() for _ in range(3)])
        answers.append(adaptation.predict(latents, t, embedding, hints))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and torch.allclose(*answers, atol=1e-3)


def test_the_views_of_a_group_share_a_timestep():
    prior = latent_model()
    prior.view_group = 2
    adaptation, asked = adapt(prior), []
    inner = prior.denoise
    prior.denoise = lambda noisy, t, *rest: asked.append(t) or inner(noisy, t, *rest)
    latents, _, embedding, hints = question(prior, 4)
    for _ in range(5):
        adaptation.learn(latents, embedding, hints)
    t = torch.stack(asked)
    assert torch.equal(t[:, ::2], t[:, 1::2]) and (t[:, 0] != t[:, 2]).any()


# ---- checkpoints ------------------------------------------------------------------------------------------------------------


def test_a_restored_one_has_the_same_future_to_the_last_bit():
    def future(adaptation):
        latents, t, embedding, hints = question(adaptation.prior)
        losses = [adaptation.learn(latents, embedding, hints) for _ in range(3)]
        return [*losses, adaptation.predict(latents, t, embedding, hints)]

    first = taught(latent_model(), steps=3, warm_up=8)
    file = io.BytesIO()
    torch.save(first.state(), file)
    expected = future(first)
    file.seek(0)
    second = adapt(latent_model(), seed=9, warm_up=8)
    second.load_state(torch.load(file, weights_only=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, future(second), strict=True))
    assert first.steps == second.steps == 6


def test_a_state_of_another_rank_or_model_is_a_users_error():
    state = taught(latent_model(), rank=2).state()
    with pytest.raises(UserError, match="--lora_rank.*another rank.*--ckpt scratch"):
        adapt(latent_model(), rank=3).load_state(state)
    with pytest.raises(UserError, match="--lora_rank"):
        adapt(flow_model(), rank=2).load_state(state)
