"""ResNet-9 of the first study: eight convolutions, two residual pairs, a global maximum."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from normbench.models.init import SCHEMES
from normbench.models.placing import place_norms
from normbench.models.units import ConvUnit, MakeNorm, Recipe, check_task
from normbench.models.weights import reparametrize
from normbench.values import above_zero, one_of, positive_int


class ResNet9(nn.Module):
    """A small fast residual network for CIFAR-sized images, 2,440,256 parameters with batch norm.

        prep w → layer1 2w, pool → + residual pair → layer2 4w, pool → + residual pair → layer3 4w, pool
        → global maximum → fc → × logit_scale

    Args:
        width: channels of the first layer; the others have 2 and 4 times as many.
        logit_scale: fixed factor on the logits, > 0.
        bias, norm_position, dropout, dropout_position, activation: see `Recipe`.
        norm_layers: which slots get the norm, see `place_norms`.
        init: torch, xavier, he or glorot, see `initialise`.
        weight: none, standardized, scaled or weight_norm, see `reparametrize`.

    Shape: (N, in_channels, H, W) → (N, num_classes), from 8×8 up.
    Raises: ValueError — an option out of its range, or smaller images.
    Source: nrajmalwar/Modified-Batch-Normalization, Utils/Resnet9.py (after myrtle.ai's DAVIDnet). Differs
    from the source in: nothing.
    """

    norm_layers: dict[str, nn.Module]

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        norm: MakeNorm,
        width: int = 64,
        logit_scale: float = 0.2,
        bias: bool = False,
        norm_position: str = "before",
        norm_layers: str | Sequence[str] = "all",
        dropout: float = 0.0,
        dropout_position: str = "after",
        activation: str | None = None,
        init: str = "torch",
        weight: str = "none",
    ) -> None:
        super().__init__()
        check_task("resnet9", in_channels, num_classes, image_size)
        w = positive_int("width", width)
        self.logit_scale = above_zero("logit_scale", logit_scale)
        self.init = one_of("init", init, SCHEMES)
        recipe = Recipe(bias, norm_position, dropout, dropout_position, activation)

        def unit(features: int, out_features: int) -> ConvUnit:
            return ConvUnit(features, out_features, recipe, activation=nn.ReLU)

        self.prep = unit(in_channels, w)
        self.layer1 = unit(w, 2 * w)
        self.res1a = unit(2 * w, 2 * w)
        self.res1b = unit(2 * w, 2 * w)
        self.layer2 = unit(2 * w, 4 * w)
        self.res2a = unit(4 * w, 4 * w)
        self.res2b = unit(4 * w, 4 * w)
        self.layer3 = unit(4 * w, 4 * w)
        self.fc = nn.Linear(4 * w, num_classes, bias=False)
        reparametrize(self, weight)
        self.norm_layers = place_norms(self, norm, norm_layers, (in_channels, *image_size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.prep(x)
        x = F.max_pool2d(self.layer1(x), 2)
        x = x + self.res1b(self.res1a(x))
        x = F.max_pool2d(self.layer2(x), 2)
        x = x + self.res2b(self.res2a(x))
        x = F.max_pool2d(self.layer3(x), 2)
        logits: Tensor = self.fc(x.amax((2, 3))) * self.logit_scale
        return logits
