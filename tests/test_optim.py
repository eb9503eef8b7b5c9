"""Optimizer groups by identity, schedules against the studies' numbers."""

import math
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from normbench.config import conf_dir
from normbench.optim import Schedule, make_optimizer, state_tensors


def options(name: str, **changes: Any) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "optim" / f"{name}.yaml"))
    assert isinstance(values, dict)
    del values["defaults"]
    return {**values, **changes}  # type: ignore[dict-item]


def schedule(name: str, *, lr: float = 1.0, momentum: float | None = None, steps: int, epoch: int = 100,
             samples: int = 100, batch: int = 1, **changes: Any) -> Schedule:  # fmt: skip
    values = OmegaConf.to_container(OmegaConf.load(conf_dir() / "optim" / "schedule" / f"{name}.yaml"))
    assert isinstance(values, dict)
    return Schedule({**values, **changes}, lr=lr, momentum=momentum, total_steps=steps, steps_per_epoch=epoch,
                    samples=samples, batch_size=batch)  # fmt: skip


class Wrapped(nn.Module):
    """A stranger's norm: its parameters have no telling name or shape."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 1, 1, 1))


@pytest.mark.parametrize("decay_norm", [False, True])
@pytest.mark.parametrize("decay_bias", [False, True])
def test_weight_decay_leaves_out_what_the_norm_callable_made(decay_norm: bool, decay_bias: bool) -> None:
    conv, norm, fc = nn.Conv2d(3, 4, 3), Wrapped(), nn.Linear(4, 2)
    values = options("sgd", weight_decay=0.1, decay_norm=decay_norm, decay_bias=decay_bias)
    optimizer = make_optimizer(values, nn.Sequential(conv, norm, fc), [norm])
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(conv.weight)] == decay[id(fc.weight)] == 0.1
    assert decay[id(norm.kernel)] == (0.1 if decay_norm else 0.0)
    assert decay[id(conv.bias)] == decay[id(fc.bias)] == (0.1 if decay_bias else 0.0)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_optimizers_are_torchs_with_the_options_given(name: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(options(name, lr=0.25), layer, [])
    assert type(optimizer).__name__.lower() == name
    assert {group["lr"] for group in optimizer.param_groups} == {0.25}
    if name == "sgd":
        assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(0.9, True)}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_fused_update_is_torchs_plain_one(name: str, channels_last: bool) -> None:
    # float64; lr and momentum change at every step as a schedule has it; the last bias joins late
    def trained(plain: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)).double()
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = make_optimizer(options(name, lr=0.1, weight_decay=0.1), model, [model[1]])
        assert all(group["fused"] for group in optimizer.param_groups)
        if plain:
            for group in optimizer.param_groups:
                group["foreach"] = group["fused"] = False
        cycle = schedule("one_cycle", lr=0.1, momentum=0.9 if name == "sgd" else None, steps=20)
        for step in range(20):
            cycle.apply(optimizer, step)
            optimizer.zero_grad()
            model(torch.randn(4, 3, 6, 6, dtype=torch.float64)).square().mean().backward()
            if step < 3:
                model[2].bias.grad = None
            optimizer.step()
        return [tensor.detach() for tensor in (*model.parameters(), *state_tensors(optimizer))]

    fused, plain = trained(False), trained(True)
    assert len(fused) == len(plain)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, check_dtype=False)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_fused_step_is_left_out_where_a_scaled_gradient_overflows(name: str) -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(options(name), layer, [])
    scaler = torch.amp.GradScaler("cpu")
    before = layer.weight.detach().clone()
    for x, moves in ((torch.full((1, 3), math.inf), False), (torch.ones(1, 3), True)):
        optimizer.zero_grad()
        scaler.scale(layer(x).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(layer.weight, before) is not moves
    assert scaler.get_scale() == 2.0**15


def test_what_no_fused_update_takes_is_updated_plainly() -> None:
    layer = nn.Linear(3, 2, dtype=torch.complex64)
    optimizer = make_optimizer(options("adam"), layer, [])
    layer(torch.ones(1, 3, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    assert not any(group["fused"] for group in optimizer.param_groups)


def test_frozen_parameters_get_no_group() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    optimizer = make_optimizer(options("sgd"), layer, [])
    assert [p for g in optimizer.param_groups for p in g["params"]] == [layer.weight]


def test_one_cycle_has_the_mbn_studys_numbers_with_its_missized_tail() -> None:
    # 50,000 images in batches of 512 for 24 epochs: N=2441, mid=1098, 2352 steps
    cycle = schedule("one_cycle", lr=0.4, momentum=0.9, steps=2352, epoch=98, samples=50_000, batch=512,
                     missized_tail=True)  # fmt: skip
    assert cycle.cycle_steps == 2441
    assert cycle.at(0) == pytest.approx((0.04, 0.9))
    assert cycle.at(1098) == pytest.approx((0.4, 0.85))
    assert cycle.at(2196) == pytest.approx((0.04, 0.9))
    assert cycle.at(2352)[0] == pytest.approx(0.0149, abs=2e-4)


def test_one_cycle_ends_at_its_floor_when_sized_right() -> None:
    cycle = schedule("one_cycle", lr=0.4, momentum=0.9, steps=2352, epoch=98, samples=50_000, batch=512)
    assert cycle.at(2352)[0] == pytest.approx(0.0004)
    assert schedule("one_cycle", lr=1.0, steps=10, low_momentum=None).at(4) == (1.0, None)


def test_step_schedule_falls_at_the_start_of_its_milestones() -> None:
    falls = schedule("step", lr=0.1, steps=1000, epoch=10)
    assert [falls.at(s)[0] for s in (0, 749, 750, 949, 950, 999)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    )


def test_cosine_warms_up_and_ends_at_its_end() -> None:
    curve = schedule("cosine", lr=2.0, steps=100, warmup=0.1, end=0.05)
    assert curve.at(0)[0] == pytest.approx(0.2)
    assert curve.at(9)[0] == pytest.approx(2.0)
    assert curve.at(55)[0] == pytest.approx(2.0 * (0.05 + 0.95 / 2))
    assert curve.at(100)[0] == pytest.approx(0.1)


def test_constant_is_constant_and_apply_sets_every_group() -> None:
    layer = nn.Linear(3, 2)
    optimizer = make_optimizer(options("sgd"), layer, [])
    schedule("constant", lr=0.5, momentum=0.3, steps=10).apply(optimizer, 7)
    assert {(g["lr"], g["momentum"]) for g in optimizer.param_groups} == {(0.5, 0.3)}
