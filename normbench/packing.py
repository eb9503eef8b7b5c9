"""Several sessions of one setting as one network: their channels side by side, their numbers apart.

    model = packed(one, 8)         (N, 8·C, H, W) → (N, 8·classes), the first C channels of the first session
    own_models(one, model, 8)      eight models of one session each, whose tensors are parts of its tensors

Every parameter and buffer of a packed model is the sessions' own, in turn along its first axis; only
a count of batches, which all share, stands once. So each session's state is a view, which `initialise`, a
checkpoint and an evaluation use as they use any model. Convolutions become grouped ones, linear layers one
batched product, norms wider ones of more groups: no number of one session can reach another's.
"""

import copy
import functools
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normbench.building import norm_layers_of, state_of
from normbench.manifest import LayerObservation
from normbench.models.dilated_cnn import DilatedCNN
from normbench.models.lenet import LeNet
from normbench.models.resnet9 import ResNet9
from normbench.models.resnet_cifar import PadShortcut, ResNetCIFAR
from normbench.norms.bin import BatchInstanceNorm
from normbench.norms.bn import BatchNorm
from normbench.norms.bnrs import BNRS
from normbench.norms.bnwos import BNWoS
from normbench.norms.brn import BatchRenorm
from normbench.norms.group import GroupNorm, InstanceNorm, LayerNorm
from normbench.norms.mbn import MBN
from normbench.norms.none import NoNorm
from normbench.norms.obn import FusedBatchNorm

MODELS = (DilatedCNN, LeNet, ResNet9, ResNetCIFAR)  # whose forward pass keeps channels in their order
# norms in which no channel sees another: as many channels more are the same norm
PER_CHANNEL = (
    *(FusedBatchNorm, BatchNorm, MBN, BNRS, BatchRenorm, BNWoS),
    *(BatchInstanceNorm, InstanceNorm, NoNorm),
)


class PackedLinear(nn.Linear):
    """A linear layer a session: (N, sessions · in) → (N, sessions · out) by one batched product."""

    sessions: int

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.sessions, self.out_features, self.in_features)
        inputs, kernels = x.view(len(x), self.sessions, -1).transpose(0, 1), weight.transpose(1, 2)
        if self.bias is None:
            y = torch.bmm(inputs, kernels)  # (sessions, N, out)
        else:
            y = torch.baddbmm(self.bias.view(self.sessions, 1, -1), inputs, kernels)
        return y.transpose(0, 1).flatten(1)


class PackedDropout(nn.Module):
    """Dropout whose zeros each session draws from its own generator, on the CPU those that it draws alone."""

    def __init__(self, p: float, generators: Sequence[torch.Generator]) -> None:
        super().__init__()
        self.p, self.generators = p, generators

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = [
            torch.empty_like(own).bernoulli_(1 - self.p, generator=generator)
            for own, generator in zip(x.chunk(len(self.generators), 1), self.generators, strict=True)
        ]
        return x * torch.cat(kept, 1).div_(1 - self.p)


class PackedPadShortcut(nn.Module):
    """`PadShortcut` a session: (N, sessions · C, H, W) → (N, sessions · (C + extra), ⌈H/2⌉, ⌈W/2⌉)."""

    def __init__(self, extra: int, sessions: int) -> None:
        super().__init__()
        self.extra, self.sessions = extra, sessions

    def forward(self, x: Tensor) -> Tensor:
        apart = x[:, :, ::2, ::2].unflatten(1, (self.sessions, -1))  # type: ignore[no-untyped-call]
        return F.pad(apart, (0, 0, 0, 0, 0, self.extra)).flatten(1, 2)


def packed(model: nn.Module, sessions: int) -> nn.Module:
    """A model of so many sessions of `model`, all as it stands; dropout draws from its `generators`.

    Raises: ValueError — a model or norm layer that has no form for several sessions.
    """
    if not isinstance(model, MODELS):
        raise ValueError(
            f"{type(model).__name__} has no form for several sessions; use dilated_cnn, lenet, resnet9 or "
            "resnet_cifar, or leave pack out"
        )
    device = next(model.parameters()).device
    wide = copy.deepcopy(model)
    generators = [torch.Generator(device) for _ in range(sessions)]
    wide.generators = generators  # type: ignore[assignment]
    norms = {name: packed_norm(name, model, sessions).to(device) for name in norm_layers_of(model)}
    for name, norm in norms.items():
        repeat(norm_layers_of(model)[name], norm, sessions)
        put(wide, name, norm)
    wide.norm_layers = norms
    inside = {id(part) for norm in norms.values() for part in norm.modules()}
    for name, layer in list(wide.named_modules()):
        if id(layer) in inside:
            continue
        if isinstance(layer, nn.Conv2d):
            layer.groups, layer.in_channels = sessions, layer.in_channels * sessions
            layer.out_channels *= sessions
            repeat(layer, layer, sessions)
        elif isinstance(layer, nn.Linear):
            # torch makes a class of its own for a layer whose weight is reparametrized
            layer.__class__ = type(f"Packed{type(layer).__name__}", (PackedLinear, type(layer)), {})
            layer.sessions = sessions  # type: ignore[assignment]
            repeat(layer, layer, sessions)
        elif isinstance(layer, nn.Dropout):
            put(wide, name, PackedDropout(layer.p, generators))
        elif isinstance(layer, PadShortcut):
            put(wide, name, PackedPadShortcut(layer.extra, sessions))
    return wide


def packed_norm(name: str, model: nn.Module, sessions: int) -> nn.Module:
    """The norm layer `name` of `model` for so many sessions' channels, as new.

    Raises: ValueError — a class that is not known to leave channels, or a sample's groups of them, apart.
    """
    layer = norm_layers_of(model)[name]
    makers: dict[str, functools.partial[nn.Module]] = model.norm_makers  # type: ignore[assignment]
    make = makers[name]
    channels, options = sessions * make.args[0], dict(make.keywords)
    if getattr(layer, "sample", None) == "random":
        raise ValueError("sample=random draws one sample for all channels; use another, or leave pack out")
    if type(layer) in PER_CHANNEL:
        return make.func(channels, **options)
    if type(layer) is GroupNorm:
        return GroupNorm(channels, **{**options, "num_groups": sessions * layer.num_groups})
    if type(layer) is LayerNorm:
        return GroupNorm(channels, num_groups=sessions, **options)
    raise ValueError(
        f"{type(layer).__name__} has no form for several sessions; use obn, torch_bn, bn, mbn, bnrs, brn, "
        "brnc, bnwos, bin, in, ln, gn or nn, or leave pack out"
    )


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set the submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer.train(model.training))


@torch.no_grad()
def repeat(one: nn.Module, wide: nn.Module, sessions: int) -> None:
    """Give `wide` the state of `one` as often as there are sessions; counts stand once."""
    for source, part in zip(one.modules(), wide.modules(), strict=True):
        for kind in ("_parameters", "_buffers"):
            for name, tensor in getattr(source, kind).items():
                if tensor is None or tensor.ndim == 0:
                    continue
                values = torch.cat([tensor.detach()] * sessions)
                trained = kind == "_parameters"
                getattr(part, kind)[name] = (
                    nn.Parameter(values, requires_grad=tensor.requires_grad) if trained else values
                )


def own(tensor: Tensor, seat: int, sessions: int) -> Tensor:
    """One session's part of a packed model's tensor, a view; what all share stands once."""
    return tensor if tensor.ndim == 0 or sessions == 1 else tensor.chunk(sessions)[seat]


@torch.no_grad()
def own_models(one: nn.Module, wide: nn.Module, sessions: int) -> list[nn.Module]:
    """A model for each session, like `one`, whose parameters and buffers are its parts of the packed ones."""
    together, models = dict(state_of(wide)), []
    for seat in range(sessions):
        model = copy.deepcopy(one)
        for path, part in model.named_modules():
            for name, parameter in part.named_parameters(path, recurse=False):
                parameter.data = own(together[name].data, seat, sessions)
            for name in [name for name, _ in part.named_buffers(path, recurse=False)]:
                part._buffers[name.rpartition(".")[2]] = own(together[name], seat, sessions)
        models.append(model)
    return models


def of_one(seen: Mapping[str, LayerObservation], model: nn.Module, sessions: int) -> None:
    """Make what a packed model's norm layers showed the first session's: its layers, its part of input."""
    for name, layer in norm_layers_of(model).items():
        at = seen[name]
        at.layer = layer
        if at.probe is not None:
            at.shape = (at.shape[0], at.shape[1] // sessions, *at.shape[2:])
            at.probe = at.probe[:, : at.shape[1]].clone()
