"""ASAM: the size of its step, exact return, invariance to scale, and that it prefers flat minima."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from hpc_models.training.asam import neighbourhood, perturb, restore
from launch.engines.ranks import finish


def model_with_gradients(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)).to(dtype)
    x, y = torch.randn(16, 7, dtype=dtype), torch.randint(0, 3, (16,))
    nn.functional.cross_entropy(model(x), y).backward()
    return model, x, y


def test_relative_step_has_norm_rho_and_the_way_back_is_exact():
    model, _, _ = model_with_gradients(torch.float64)
    before = [p.detach().clone() for p in model.parameters()]
    saved = perturb(model.parameters(), 0.05)
    w = torch.cat([b.flatten() for b in before])
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    eps = torch.cat([p.detach().flatten() for p in model.parameters()]) - w
    assert float((eps / w.abs()).norm()) == pytest.approx(0.05, abs=1e-5)
    ratio = (eps / (w**2 * g))[g != 0]  # uphill, along w^2 g
    assert ratio.min() > 0
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
    restore(saved)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_hand_worked_example():
    w = torch.tensor([3.0, 0.0, -1.0], requires_grad=True)
    w.grad = torch.tensor([1.0, 5.0, 4.0])
    perturb([w], 0.5)  # |w| g = (3, 0, 4), norm 5; w^2 g = (9, 0, 4)
    torch.testing.assert_close(w.detach(), torch.tensor([3.9, 0.0, -0.6]))


def test_rescaling_layers_that_cancel_changes_nothing():
    """ASAM's point: the same function with weights a and 1/a times as large is equally sharp (Kwon et al. 2021)."""
    losses = []
    for a in (1.0, 20.0):
        model, x, y = model_with_gradients(torch.float64)
        with torch.no_grad():
            model[0].weight *= a
            model[0].bias *= a
            model[2].weight /= a
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        with neighbourhood(model.parameters(), 0.3), torch.no_grad():
            losses.append(float(nn.functional.cross_entropy(model(x), y)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_context_clears_gradients_raises_the_loss_and_keeps_the_second_gradients():
    model, x, y = model_with_gradients()
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(x), y))
    before = [p.detach().clone() for p in model.parameters()]
    with neighbourhood(model.parameters(), 0.2):
        assert all(p.grad is None for p in model.parameters())
        worst = nn.functional.cross_entropy(model(x), y)
        assert float(worst) > loss
        worst.backward()
    assert all(torch.equal(p, b) and p.grad is not None for p, b in zip(model.parameters(), before, strict=True))


def test_parameters_come_back_when_the_second_pass_fails():
    model, _, _ = model_with_gradients()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="boom"), neighbourhood(model.parameters()):
        raise RuntimeError("boom")
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_no_gradients_or_zero_ones_move_nothing_and_rho_must_be_positive():
    w = torch.ones(3, requires_grad=True)
    assert perturb([w]) == []
    w.grad = torch.zeros(3)
    perturb([w])
    assert torch.equal(w, torch.ones(3))
    with pytest.raises(ValueError, match="rho must be positive, got 0"):
        perturb([w], 0)


def test_the_flatter_of_two_minima_is_found():
    """f has a sharp minimum at 1 and a flat one at 4, equally deep; plain descent from 1.2 stays in the sharp one."""

    def f(w):
        return torch.minimum(50 * (w - 1) ** 2, 0.5 * (w - 4) ** 2)

    ends = []
    for rho in (None, 0.8):
        w = torch.tensor([1.2], requires_grad=True)
        for _ in range(400):
            w.grad = None
            f(w).sum().backward()
            if rho is not None:
                with neighbourhood([w], rho):
                    f(w).sum().backward()
            with torch.no_grad():
                w -= 0.005 * w.grad.clamp(-5, 5)
        ends.append(float(w))
    assert ends[0] == pytest.approx(1, abs=0.05)
    assert abs(ends[1] - 4) < 1


def _sharded(rank: int, world: int, port: int, out: str) -> None:
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    model, x, y = model_with_gradients()
    model.zero_grad()
    fully_shard(model)
    nn.functional.cross_entropy(model(x), y).backward()
    perturb(model.parameters(), 0.05)
    whole = [p.full_tensor().detach() for p in model.parameters()]
    if rank == 0:
        torch.save(whole, out)
    finish(0)  # gloo's threads now and then abort a process that ends otherwise


@pytest.mark.gloo
def test_sharded_parameters_move_as_whole_ones_do(tmp_path):
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_sharded, (2, port, str(tmp_path / "w.pt")), nprocs=2)
    model, _, _ = model_with_gradients()
    perturb(model.parameters(), 0.05)
    for a, b in zip(torch.load(tmp_path / "w.pt"), model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), atol=1e-6, rtol=1e-5)
