"""The reference studies' mistakes, each planted in a small layer; and strangers that make none."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Plain(nn.Module):
    """A correct batch norm as people write it, for maps only; the mistakes below are its children."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def training_now(self) -> bool:
        return self.training

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)

    def remember(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(var.detach().to(self.running_var.dtype), self.momentum)

    def stored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.running_mean, self.running_var

    def affine(self, x: Tensor) -> Tensor:
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.running_mean.numel():
            raise ValueError(f"expected (N, {self.running_mean.numel()}, H, W), got {tuple(x.shape)}")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training_now():
            if x.numel() <= x.shape[1]:
                raise ValueError(
                    f"batch statistics need more than one value per channel, got {tuple(x.shape)}"
                )
            mean, var = self.moments(wide)
            self.remember(mean, var)
        else:
            mean, var = self.stored(x)
        y = (wide - mean.view(1, -1, 1, 1)) * torch.rsqrt(var + self.eps).view(1, -1, 1, 1)
        return self.affine(y).to(x.dtype)


class EarlyReturn(Plain):
    """Study 1: returned from torch's fused op before its stride was looked at."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, stride: int = 1) -> None:
        super().__init__(num_features, eps, momentum)
        self.stride = stride

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().moments(x[..., :: self.stride, :: self.stride])

    def forward(self, x: Tensor) -> Tensor:
        if x.is_floating_point():
            mean, var = self.running_mean, self.running_var
            args = (self.weight, self.bias, self.training, self.momentum, self.eps)
            return F.batch_norm(x, mean, var, *args)
        return super().forward(x)


class AffineInForward(Plain):
    """Study 1: the affine came to be in the first forward, after the optimizer had its list."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        del self.weight, self.bias

    def affine(self, x: Tensor) -> Tensor:
        if not hasattr(self, "weight"):
            self.weight = nn.Parameter(torch.ones(x.shape[1], dtype=x.dtype))
            self.bias = nn.Parameter(torch.zeros(x.shape[1], dtype=x.dtype))
        return super().affine(x)


class GateAnew(Plain):
    """Study 3: the gate was clamped into a new parameter in every forward."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.gate = nn.Parameter(torch.ones(num_features))

    def affine(self, x: Tensor) -> Tensor:
        self.gate = nn.Parameter(self.gate.clamp(0, 1))
        instance = F.instance_norm(x)
        gate = self.gate.view(1, -1, 1, 1)
        return super().affine(gate * x + (1 - gate) * instance)


class EvalByBatchSize(Plain):
    """Study 3: the stored variance was rescaled by m/(m−1) of the batch under evaluation."""

    def stored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        m = x.numel() // x.shape[1]
        return self.running_mean, self.running_var * (m / max(m - 1, 1))


class AverageWithGraph(Plain):
    """Study 3: running averages kept the graph of every batch."""

    def remember(self, mean: Tensor, var: Tensor) -> None:
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * var


class ZeroEps(Plain):
    """Study 2: nothing was added to the variance."""

    def __init__(self, num_features: int, momentum: float = 0.1) -> None:
        super().__init__(num_features, 0.0, momentum)


class IgnoredGroups(nn.Module):
    """Study 3: group norm took `num_groups` and always used two channels a group."""

    def __init__(self, num_features: int, num_groups: int = 4) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.weight.dtype) if x.dtype != torch.float64 else x
        groups = max(1, x.shape[1] // 2)
        return F.group_norm(wide, groups, self.weight, self.bias).to(x.dtype)


class GradModeDecides(Plain):
    """d2l's first version: batch statistics where gradients are on, stored ones where they are off."""

    def training_now(self) -> bool:
        return torch.is_grad_enabled()


class Sink(Plain):
    """Takes any option, so a misspelt one is never noticed."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, **kwargs: object) -> None:
        super().__init__(num_features, eps, momentum)


class InputDecides(Plain):
    """Batch statistics where the input needs gradient, in evaluation too."""

    def training_now(self) -> bool:
        return self.training or self.asked

    def forward(self, x: Tensor) -> Tensor:
        self.asked = x.requires_grad
        return super().forward(x)


class GateReset(Plain):
    """Writes its gate anew in every forward, in place, so that the optimizer's steps are lost."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.gate = nn.Parameter(torch.ones(num_features))

    def affine(self, x: Tensor) -> Tensor:
        self.gate.data = torch.ones_like(self.gate)
        return super().affine(self.gate.view(1, -1, 1, 1) * x)


class StrideWhereNarrow(Plain):
    """A fast path for whole vectors of channels, which knows no stride."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, stride: int = 1) -> None:
        super().__init__(num_features, eps, momentum)
        self.stride = stride

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().moments(x if x.shape[1] % 16 == 0 else x[..., :: self.stride, :: self.stride])


class EvalByLargeBatch(Plain):
    """Rescales in evaluation, and only batches above eight samples."""

    def stored(self, x: Tensor) -> tuple[Tensor, Tensor]:
        n = len(x)
        return self.running_mean, self.running_var * (n / (n - 1) if n > 8 else 1)


class WrongSign(Plain):
    """Sends the gradient back with the other sign."""

    def affine(self, x: Tensor) -> Tensor:
        return super().affine(2 * x.detach() - x)


class Mute(Plain):
    """Answers zero in evaluation."""

    def affine(self, x: Tensor) -> Tensor:
        return super().affine(x if self.training else 0 * x)


class Reseeds(Plain):
    """Sets the generator that everybody draws from."""

    def remember(self, mean: Tensor, var: Tensor) -> None:
        torch.manual_seed(0)
        super().remember(mean, var)


HELD: list[Tensor] = []


class Hoards(Plain):
    """Keeps what it saw where nobody looks."""

    def remember(self, mean: Tensor, var: Tensor) -> None:
        HELD.append(mean.detach().clone())
        super().remember(mean, var)


class InPlace(Plain):
    """Changes its input."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        x.detach().mul_(0.5)
        return y


class Noisy(Plain):
    """Draws from a generator of its own."""

    generator = torch.Generator()

    def affine(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape[0], generator=self.generator, dtype=x.dtype)
        return super().affine(x * (1 + 0.1 * noise.view(-1, 1, 1, 1)))


class Forwards(nn.BatchNorm2d):
    """Hands options on to a base that checks them."""

    def __init__(self, num_features: int, **batch_norm: float) -> None:
        super().__init__(num_features, **batch_norm)


class Draws(Plain):
    """Draws its start from torch's generator, and shifts whatever is drawn after it."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        nn.init.normal_(self.weight, 1, 0.02)


class Private(Plain):
    """Counts its batches where no checkpoint looks."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__(num_features, eps, momentum)
        self.seen = 0

    def remember(self, mean: Tensor, var: Tensor) -> None:
        self.seen += 1
        super().remember(mean, var)


class ForgetsItsInput(Plain):
    """Changes the shape."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(1)


class Unbuildable(nn.Module):
    """Asks for what nobody gives it."""

    def __init__(self, num_features: int, secret: str) -> None:
        super().__init__()


class HalfAGroup(nn.Module):
    """Right where it works, and it needs 32 channels to work."""

    def __init__(self, num_features: int, num_groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, num_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


MISTAKES = {  # class → the row of the card that must say so, and a word of it
    EarlyReturn: ("options", "stride: no other value changes anything"),
    AffineInForward: ("parameters", "made in forward"),
    GateAnew: ("parameters", "made anew in forward|replaced in forward"),
    EvalByBatchSize: ("evaluation", "depends on its batch mates"),
    AverageWithGraph: ("graphs", "keeps its graph|keeps it|carries a graph"),
    ZeroEps: ("constant channels", "is eps zero"),
    IgnoredGroups: ("options", "num_groups: no other value changes anything"),
    GradModeDecides: ("mode", "the gradient mode decides"),
    Sink: ("building", "a misspelt option is taken without a word"),
    InputDecides: ("mode", "an input that needs gradient"),
    GateReset: ("parameters", "forward writes over gate"),
    StrideWhereNarrow: ("options", "stride: acts on 12 channels, not on 64"),
    EvalByLargeBatch: ("evaluation", "depends on its batch mates"),
    WrongSign: ("gradients", "is not that of the output"),
    Mute: ("evaluation", "does not depend on its own input"),
    Reseeds: ("building", "sets torch's generator"),
    Hoards: ("graphs", "more tensors are held"),
    InPlace: ("repeatable", "changes its input in place"),
    Noisy: ("repeatable", "draws its own randomness"),
}
