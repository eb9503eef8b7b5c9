"""No normalization: what the other layers are compared with when the question is whether to normalize."""

from torch import Tensor

from normbench.norms.base import Norm


class NoNorm(Norm):
    """Hands its input back, so that a model can be built without normalization.

        y = x

    over no axes.

    Args:
        num_features: channels C, checked as in every other norm.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: none.
    Raises: ValueError — another channel count or rank.
    Source: HarmanDotpy, Normalizations-in-Deep-Learning (GitHub), nn.
        Differs from the source in: nothing.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        return x
