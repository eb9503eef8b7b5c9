"""Root mean square norm: layer norm without centring; without an affine it is pixel norm."""

from torch import Tensor

from normbench.norms.base import Norm, widen
from normbench.values import number_from, one_of


class RMSNorm(Norm):
    """Divides by the root mean square of what one sample holds, the cheaper half of layer norm.

        y = x / sqrt(mean(x²) + eps) * weight + bias

    the mean over the channels at each position (over=channels) or over channels and all spatial axes
    (over=sample), per sample, in training and evaluation alike.

    Args:
        num_features: channels C.
        over: channels, each position by itself, or sample, all positions together; equal on (N, C).
        eps: added to the mean square, ≥ 0.
        affine: learn weight and bias; False leaves both None, which with over=channels is pixel norm.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none.
    Raises: ValueError — another channel count or rank.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv 1910.07467; Karras et al.,
        Progressive Growing of GANs, arXiv 1710.10196 (pixel norm, eps 1e-8).
        Differs from the source in: a bias beside the weight (train_bias=false freezes it at zero).
    """

    def __init__(
        self,
        num_features: int,
        *,
        over: str = "channels",
        eps: float = 1e-6,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(num_features, affine=affine, train_weight=train_weight, train_bias=train_bias)
        self.over = one_of("over", over, ("channels", "sample"))
        self.eps = number_from("eps", eps, 0)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        axes = [1] if self.over == "channels" else list(range(1, x.ndim))
        y = wide * (wide.square().mean(axes, keepdim=True) + self.eps).rsqrt()
        return self.scale_and_shift(y).to(x.dtype)
