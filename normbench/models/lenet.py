"""LeNet with norm slots, as the batch norm chapter of Dive into Deep Learning draws it."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from normbench.models.init import SCHEMES
from normbench.models.placing import place_norms
from normbench.models.units import ConvUnit, LinearUnit, MakeNorm, Recipe, check_task
from normbench.models.weights import reparametrize
from normbench.values import int_from, one_of


class LeNet(nn.Module):
    """Two 5×5 convolutions and three linear layers, sigmoid throughout; 44,878 parameters with batch norm.

        conv1 6 → mean pool → conv2 16 → mean pool → fc1 120 → fc2 84 → fc3

    Args:
        padding: of the first convolution; 2 is the book's LeNet without norm.
        bias, norm_position, dropout, dropout_position, activation: see `Recipe`; here of linear layers too.
        norm_layers: which slots get the norm, see `place_norms`.
        init: torch, xavier, he or glorot, see `initialise`.
        weight: none, standardized, scaled or weight_norm, see `reparametrize`.

    Shape: (N, in_channels, *image_size) → (N, num_classes), from 16×16 up.
    Raises: ValueError — an option out of its range, or smaller images.
    Source: Zhang et al., Dive into Deep Learning (d2l.ai), chapters LeNet and Batch Normalization. Differs
    from the source in: nothing; the size of fc1 follows the image.
    """

    norm_layers: dict[str, nn.Module]

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        norm: MakeNorm,
        padding: int = 0,
        bias: bool = True,
        norm_position: str = "before",
        norm_layers: str | Sequence[str] = "all",
        dropout: float = 0.0,
        dropout_position: str = "after",
        activation: str | None = None,
        init: str = "xavier",
        weight: str = "none",
    ) -> None:
        super().__init__()
        check_task("lenet", in_channels, num_classes, image_size, smallest=16)
        padding = int_from("padding", padding, 0)
        self.init = one_of("init", init, SCHEMES)
        recipe = Recipe(bias, norm_position, dropout, dropout_position, activation)
        height, width = (((side + 2 * padding - 4) // 2 - 4) // 2 for side in image_size)

        self.conv1 = ConvUnit(in_channels, 6, recipe, activation=nn.Sigmoid, kernel_size=5, padding=padding)
        self.conv2 = ConvUnit(6, 16, recipe, activation=nn.Sigmoid, kernel_size=5, padding=0)
        self.fc1 = LinearUnit(16 * height * width, 120, recipe, activation=nn.Sigmoid)
        self.fc2 = LinearUnit(120, 84, recipe, activation=nn.Sigmoid)
        self.fc3 = nn.Linear(84, num_classes)
        reparametrize(self, weight)
        self.norm_layers = place_norms(self, norm, norm_layers, (in_channels, *image_size))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.conv1(x), 2)
        x = F.avg_pool2d(self.conv2(x), 2)
        logits: Tensor = self.fc3(self.fc2(self.fc1(x.flatten(1))))
        return logits
