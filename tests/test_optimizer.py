"""Adan against its formula written out for single numbers, and what a run needs of an optimiser."""

import copy
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from errors import UserError
from optimizer import Adan, build_optimizer, learning_rate_factor, rate_factors


class ScalarAdan:
    """The published update for a list of plain Python numbers."""

    def __init__(self, start, lr, betas, eps, decay, limit):
        self.p, self.lr, self.betas, self.eps, self.decay, self.limit = list(start), lr, betas, eps, decay, limit
        self.m, self.v, self.n = ([0.0] * len(start) for _ in range(3))
        self.last, self.k = None, 0

    def step(self, gradient):
        b1, b2, b3 = self.betas
        self.k += 1
        if self.limit > 0:
            norm = math.sqrt(sum(g * g for g in gradient))
            gradient = [g * min(1.0, self.limit / (norm + self.eps)) for g in gradient]
        for i, g in enumerate(gradient):
            d = 0.0 if self.last is None else g - self.last[i]
            self.m[i] = b1 * self.m[i] + (1 - b1) * g
            self.v[i] = b2 * self.v[i] + (1 - b2) * d
            self.n[i] = b3 * self.n[i] + (1 - b3) * (g + b2 * d) ** 2
            root = math.sqrt(self.n[i]) / math.sqrt(1 - b3**self.k) + self.eps
            update = self.m[i] / (1 - b1**self.k) + b2 * self.v[i] / (1 - b2**self.k)
            self.p[i] = (self.p[i] - self.lr * update / root) / (1 + self.lr * self.decay)
        self.last = gradient


@pytest.mark.parametrize("limit", [0.0, 1.5])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adan_follows_its_formula(limit, decay):
    values = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (part.clone().requires_grad_() for part in values.split([4, 2]))  # two tensors, one common norm
    betas = (0.9, 0.8, 0.95)
    ours = Adan([first, second], lr=0.1, betas=betas, eps=1e-6, weight_decay=decay, max_grad_norm=limit)
    scalar = ScalarAdan(values.tolist(), 0.1, betas, 1e-6, decay, limit)
    for step in range(7):
        gradient = torch.randn(6, generator=torch.Generator().manual_seed(step + 1), dtype=torch.float64)
        first.grad, second.grad = gradient[:4].clone(), gradient[4:].clone()
        ours.step()
        scalar.step(gradient.tolist())
        torch.testing.assert_close(torch.cat([first, second]).detach(), torch.tensor(scalar.p, dtype=torch.float64))


def test_the_norm_is_taken_over_all_groups_and_only_ever_shrinks():
    def moved(limit):
        params = [torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)]
        optimizer = Adan([{"params": [p]} for p in params], lr=1.0, eps=1e-3, max_grad_norm=limit)
        params[0].grad, params[1].grad = torch.tensor([3e-3]), torch.tensor([4e-3])
        optimizer.step()
        return [optimizer.state[p]["previous_gradient"].item() for p in params]

    assert moved(1.0) == pytest.approx([3e-3, 4e-3])  # below the limit
    scale = 2.5e-3 / (5e-3 + 1e-3)
    assert moved(2.5e-3) == pytest.approx([3e-3 * scale, 4e-3 * scale])


def test_the_gradient_itself_is_left_alone():
    p = torch.ones(3, requires_grad=True)
    p.grad = torch.tensor([30.0, 40.0, 0.0])
    Adan([p], max_grad_norm=5.0).step()
    assert p.grad.tolist() == [30.0, 40.0, 0.0]


def test_adan_converges_on_a_badly_scaled_quadratic():
    p = torch.tensor([4.0, -3.0], requires_grad=True)
    scale, target = torch.tensor([100.0, 1.0]), torch.tensor([1.0, 2.0])
    optimizer = Adan([p], lr=0.05)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.99**step
        optimizer.zero_grad()
        (scale * (p - target).square()).sum().backward()
        optimizer.step()
    assert (p - target).abs().max() < 1e-2


def test_a_parameter_that_joins_late_starts_at_its_own_first_step():
    early, late = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = Adan([early, late], lr=0.1)
    early.grad = torch.ones(1)
    optimizer.step()
    assert late.item() == 0 and not optimizer.state[late]
    late.grad = torch.ones(1)
    optimizer.step()
    assert late.item() == pytest.approx(-0.1, rel=1e-4)  # the first step is lr long, whatever the gradient
    assert optimizer.state[early]["step"] == 2 and optimizer.state[late]["step"] == 1


def test_nothing_to_do_is_fine():
    Adan([torch.zeros(2, requires_grad=True)]).step()


@pytest.mark.parametrize("bad", [{"lr": -1}, {"betas": (0.9, 1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": -1}])
def test_numbers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError):
        Adan([torch.zeros(1, requires_grad=True)], **bad)


@pytest.mark.parametrize("name", ["adan", "adam"])
def test_going_on_from_a_saved_state_equals_never_having_stopped(options, name, tmp_path):
    opt = options("--optim", name)

    def fresh():
        network = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
        groups = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(network[::2], (1e-2, 1e-3))]  # noqa: B905
        return network, build_optimizer(opt, groups)

    def train(network, optimizer, seeds):
        for seed in seeds:
            optimizer.zero_grad()
            network(torch.randn(8, 3, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

    through, optimizer = fresh()
    other, other_optimizer = fresh()
    train(through, optimizer, range(5))
    torch.save({"network": through.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    train(through, optimizer, range(5, 10))
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["network"])
    other_optimizer.load_state_dict(state["optimizer"])
    train(other, other_optimizer, range(5, 10))
    for one, two in zip(through.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_state_dict_does_not_change_under_later_steps():
    p = torch.ones(2, requires_grad=True)
    optimizer = Adan([p])
    p.grad = torch.ones(2)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    fresh = Adan([torch.ones(2, requires_grad=True)])
    fresh.load_state_dict(before)
    assert fresh.state_dict()["state"][0]["step"] == 1
    assert set(fresh.state_dict()["state"][0]) == {
        *("step", "mean", "mean_difference", "mean_square", "previous_gradient")
    }


def test_rates_of_groups_and_schedule(options):
    p, q = (torch.zeros(1, requires_grad=True) for _ in range(2))

    def rates(*typed):
        opt = options("--lr", "[0, 0.01, 0.002, 1]", "--iters", 100, *typed)
        groups = [{"params": [p], "lr": opt.lr.max(), "name": "encoder"}, {"params": [q], "lr": opt.lr.max()}]
        optimizer = build_optimizer(opt, groups)
        scheduler = LambdaLR(optimizer, learning_rate_factor(opt))
        found = [scheduler.get_last_lr()]
        for _ in range(50):
            optimizer.step()
            scheduler.step()
        return optimizer, [*found, scheduler.get_last_lr()]

    optimizer, found = rates("--optim", "adam")
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.param_groups[0]["name"] == "encoder"
    assert found == [pytest.approx([0.1, 0.01]), pytest.approx([0.06, 0.006])]
    optimizer, found = rates("--optim", "adan")
    assert isinstance(optimizer, Adan) and optimizer.param_groups[0]["max_grad_norm"] == 5
    assert found == [pytest.approx([0.5, 0.05]), pytest.approx([0.3, 0.03])]
    for name, kind in (("adamw", torch.optim.AdamW), ("adamax", torch.optim.Adamax)):
        optimizer, found = rates("--optim", name, "--lr_scale", "encoder=0.5")
        assert isinstance(optimizer, kind) and found[0] == pytest.approx([0.005, 0.01])
    _, found = rates("--optim", "adam", "--backbone", "vanilla")
    assert found[1] == pytest.approx([0.06 * 0.1**0.5, 0.006 * 0.1**0.5])


@pytest.mark.parametrize("text", ["encoder", "encoder=fast", "roof=2", "trunk=-1", "trunk=nan"])
def test_a_wrong_factor_is_said(text):
    assert rate_factors(" trunk = 2 , encoder=0.5,") == {"trunk": 2.0, "encoder": 0.5}
    with pytest.raises(UserError, match="--lr_scale"):
        rate_factors(text)


@pytest.mark.cuda
def test_a_step_on_the_gpu_waits_for_nothing():
    params = [torch.ones(1000, device="cuda", requires_grad=True), torch.ones(10, device="cuda", requires_grad=True)]
    optimizer = Adan(params, weight_decay=2e-5, max_grad_norm=5.0)
    for p in params:
        p.grad = torch.ones_like(p)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
