"""Local response norm: neighbouring channels compete."""

import torch.nn.functional as F
from torch import Tensor

from normbench.norms.base import Norm, widen
from normbench.values import above_zero, number_from, positive_int


class LocalResponseNorm(Norm):
    """Damps a channel by the energy of its neighbours, as AlexNet did; by torch's own function.

        y = x / (k + alpha · mean(x²))^beta

    the mean over `size` neighbouring channels, the channel's own among them, at each position; channels
    beyond the ends count as zeros. Training and evaluation are alike.

    Args:
        num_features: channels C.
        size: channels of a neighbourhood, ≥ 1: ⌊size/2⌋ before the channel, ⌊(size − 1)/2⌋ after it.
        alpha: weight of the energy, ≥ 0.
        beta: exponent, ≥ 0.
        k: added to the energy, > 0.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none; no weight and no bias.
    Raises: ValueError — another channel count or rank.
    Source: Krizhevsky, Sutskever and Hinton, ImageNet Classification with Deep Convolutional Neural Networks,
        NeurIPS 2012, section 3.3; `torch.nn.functional.local_response_norm`.
        Differs from the source in: alpha multiplies the mean, the paper's the sum: AlexNet is size=5
        alpha=5e-4 beta=0.75 k=2, the defaults are torch's; (N, C) too, where torch wants a map.
    """

    def __init__(
        self, num_features: int, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
    ) -> None:
        super().__init__(num_features, affine=False)
        self.size = positive_int("size", size)
        self.alpha = number_from("alpha", alpha, 0)
        self.beta = number_from("beta", beta, 0)
        self.k = above_zero("k", k)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        wide = widen(x)
        # positions in one line: torch's path for higher ranks has no deterministic backward on CUDA
        line = wide.unsqueeze(-1) if x.ndim == 2 else wide.flatten(2)
        y = F.local_response_norm(line, self.size, self.alpha, self.beta, self.k)
        return y.view(x.shape).to(x.dtype)
