"""Proxy norm: layer norm whose activation is normalized too, by a Gaussian that stands in for the batch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normbench.norms.base import Norm, per_channel, widen
from normbench.norms.group import normalize_groups
from normbench.values import flag, int_from, number_from, one_of, positive_int


def identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "identity": identity,
}


class ProxyNorm(Norm):
    """Layer or group norm and an activation, centred and scaled per channel as batch norm would, no batch.

        y = (f(n · weight + bias) - m) / sqrt(v + proxy_eps),    n = (x - mean) / sqrt(var + eps)
        m, v = mean and variance of f(p · weight + bias),    p ~ Normal(proxy_mean, (1 + proxy_scale)²)

    mean and var (÷n) over the channels of a group and all spatial axes, per sample; f the activation; m and v
    per channel, taken over num_quantiles evenly spaced quantiles of p and differentiated with the rest.
    Training and evaluation are alike. It holds its activation: use model.activation=none.

    Args:
        num_features: channels C.
        num_groups: groups G of the norm, dividing C; 1 is layer norm.
        activation: f: relu, gelu, silu or identity, with which the layer is its norm alone (proxy_eps=0).
        num_quantiles: quantiles of p, at (i + ½)/num_quantiles, ≥ 2.
        train_proxy: False keeps p a standard normal.
        eps: added to var, ≥ 0.
        proxy_eps: added to v, ≥ 0; not small, since a channel may be almost always off.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none; the parameters proxy_mean (C,) and proxy_scale (C,), zeros, beside weight and bias.
    Raises: ValueError — another channel count or rank; num_groups does not divide num_features.
    Source: Labatie, Masters, Eaton-Rosen and Luschi, Proxy-Normalizing Activations to Match Batch
        Normalization while Removing Batch Dependence, arXiv 2106.03743.
        Differs from the source in: the quantiles are stretched to a variance of one, by 1.0025 where there
        are 256, so that with identity the norm comes back exactly; a group of one value passes the norm.
    """

    quantiles: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        num_groups: int = 1,
        activation: str = "relu",
        num_quantiles: int = 256,
        train_proxy: bool = True,
        eps: float = 1e-5,
        proxy_eps: float = 0.03,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.num_groups = positive_int("num_groups", num_groups)
        if num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide num_features={num_features}")
        self.activation = one_of("activation", activation, ACTIVATIONS)
        self.num_quantiles = int_from("num_quantiles", num_quantiles, 2)
        self.train_proxy = flag("train_proxy", train_proxy)
        self.eps = number_from("eps", eps, 0)
        self.proxy_eps = number_from("proxy_eps", proxy_eps, 0)
        self.proxy_mean = nn.Parameter(torch.zeros(num_features), requires_grad=train_proxy)
        self.proxy_scale = nn.Parameter(torch.zeros(num_features), requires_grad=train_proxy)
        # a constant, so no part of a checkpoint; in float64, so that a layer in float64 is exact
        at = (torch.arange(num_quantiles, dtype=torch.float64) + 0.5) / num_quantiles
        quantiles = torch.special.ndtri(at)
        stretched = quantiles / quantiles.square().mean().sqrt()
        self.register_buffer("quantiles", stretched.unsqueeze(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        y = self.activate(normalize_groups(wide, self.num_groups, self.eps))
        mean, var = self.proxy_moments(wide.dtype)
        return ((y - per_channel(mean, y)) * per_channel((var + self.proxy_eps).rsqrt(), y)).to(x.dtype)

    def activate(self, normalized: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](self.scale_and_shift(normalized))

    def proxy_moments(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and variance, each (C,), of the activation of the proxy variable."""
        proxy = self.proxy_mean + (1 + self.proxy_scale) * self.quantiles.to(dtype)  # (num_quantiles, C)
        y = self.activate(proxy)
        mean = y.mean(0)
        return mean, (y - mean).square().mean(0)
