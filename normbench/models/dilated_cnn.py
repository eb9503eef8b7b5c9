"""The second study's network: four dilated convolutions, no stride anywhere."""

from collections.abc import Sequence

from torch import Tensor, nn

from normbench.models.init import SCHEMES
from normbench.models.placing import place_norms
from normbench.models.units import ConvUnit, MakeNorm, Recipe, check_task
from normbench.models.weights import reparametrize
from normbench.values import one_of, positive_int


class DilatedCNN(nn.Module):
    """Sees far without shrinking the map, so every norm works on all pixels; 28,650 parameters on MNIST.

        conv1 → conv2 → conv3 → conv4 (3×3, dilations 1, 2, 4, 8, GELU) → mean over the map → fc

    Args:
        width: channels of every convolution.
        bias, norm_position, dropout, dropout_position, activation: see `Recipe`.
        norm_layers: which slots get the norm, see `place_norms`.
        init: torch, xavier, he or glorot, see `initialise`.
        weight: none, standardized, scaled or weight_norm, see `reparametrize`.

    Shape: (N, in_channels, H, W) → (N, num_classes), from 8×8 up.
    Raises: ValueError — an option out of its range, or smaller images.
    Source: enhuiz/batchnorms. Differs from the source in: nothing.
    """

    norm_layers: dict[str, nn.Module]

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        norm: MakeNorm,
        width: int = 32,
        bias: bool = True,
        norm_position: str = "before",
        norm_layers: str | Sequence[str] = "all",
        dropout: float = 0.0,
        dropout_position: str = "after",
        activation: str | None = None,
        init: str = "torch",
        weight: str = "none",
    ) -> None:
        super().__init__()
        check_task("dilated_cnn", in_channels, num_classes, image_size)
        w = positive_int("width", width)
        self.init = one_of("init", init, SCHEMES)
        recipe = Recipe(bias, norm_position, dropout, dropout_position, activation)

        self.conv1 = ConvUnit(in_channels, w, recipe, activation=nn.GELU)
        self.conv2 = ConvUnit(w, w, recipe, activation=nn.GELU, dilation=2)
        self.conv3 = ConvUnit(w, w, recipe, activation=nn.GELU, dilation=4)
        self.conv4 = ConvUnit(w, w, recipe, activation=nn.GELU, dilation=8)
        self.fc = nn.Linear(w, num_classes)
        reparametrize(self, weight)
        self.norm_layers = place_norms(self, norm, norm_layers, (in_channels, *image_size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv4(self.conv3(self.conv2(self.conv1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
