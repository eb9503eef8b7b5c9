"""The 6n+2-layer residual network for CIFAR, as the third study built it."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from normbench.models.init import SCHEMES
from normbench.models.placing import place_norms
from normbench.models.units import ConvUnit, MakeNorm, Recipe, check_task
from normbench.models.weights import reparametrize
from normbench.values import one_of, positive_int


class PadShortcut(nn.Module):
    """Every second pixel, and zeros for the new channels: option A of He et al., without parameters.

    Shape: (N, C, H, W) → (N, C + extra, ⌈H/2⌉, ⌈W/2⌉).
    """

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))


class Block(nn.Module):
    """Two 3×3 convolutions around a shortcut, which is added before the second activation.

    Where the width doubles, the map halves. A shortcut's convolution has a norm slot, and neither
    activation nor dropout, so `norm_position` and `dropout` leave it as it is.
    """

    def __init__(self, channels: int, out_channels: int, recipe: Recipe, shortcut: str) -> None:
        super().__init__()
        grows = out_channels != channels
        conv_stride = 2 if grows else 1
        self.first = ConvUnit(channels, out_channels, recipe, activation=nn.ReLU, conv_stride=conv_stride)
        # registered where it runs, so that slots stand in the order of the forward pass
        self.shortcut: nn.Module = nn.Identity()
        if grows and shortcut == "pad":
            self.shortcut = PadShortcut(out_channels - channels)
        elif grows:
            plain = Recipe(recipe.bias, "before", 0.0, "after")
            self.shortcut = ConvUnit(
                channels, out_channels, plain, activation=nn.Identity, kernel_size=1, conv_stride=2
            )
        self.second = ConvUnit(out_channels, out_channels, recipe, activation=nn.ReLU)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x), residual=self.shortcut(x))
        return y


class ResNetCIFAR(nn.Module):
    """The classic deep, thin CIFAR network of 6n+2 layers; 175,818 parameters for n=2 with batch norm.

        stem w → n blocks w → n blocks 2w, half the map → n blocks 4w, a quarter → mean over the map → fc

    Args:
        n: blocks per stage.
        shortcut: conv, a 1×1 convolution with a norm where the width doubles, or pad, zeros.
        width: channels of the first stage.
        bias, norm_position, dropout, dropout_position, activation: see `Recipe`.
        norm_layers: which slots get the norm, see `place_norms`.
        init: torch, xavier, he or glorot, see `initialise`.
        weight: none, standardized, scaled or weight_norm, see `reparametrize`.

    Shape: (N, in_channels, H, W) → (N, num_classes), from 8×8 up.
    Raises: ValueError — an option out of its range, or smaller images.
    Source: HarmanDotpy/Normalizations-in-Deep-Learning; He et al., Deep residual learning for image
    recognition, arXiv 1512.03385 §4.2. Differs from the first in: nothing; its 8×8 mean is one over the
    whole map here. Differs from the paper in: the shortcut and the biases, unless shortcut=pad bias=false.
    """

    norm_layers: dict[str, nn.Module]

    def __init__(
        self,
        *,
        in_channels: int,
        num_classes: int,
        image_size: tuple[int, int],
        norm: MakeNorm,
        n: int = 2,
        shortcut: str = "conv",
        width: int = 16,
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
        check_task("resnet_cifar", in_channels, num_classes, image_size)
        w, n = positive_int("width", width), positive_int("n", n)
        one_of("shortcut", shortcut, ("conv", "pad"))
        self.init = one_of("init", init, SCHEMES)
        recipe = Recipe(bias, norm_position, dropout, dropout_position, activation)

        def stage(channels: int, out_channels: int) -> nn.Sequential:
            widths = [channels] + [out_channels] * (n - 1)
            return nn.Sequential(*(Block(c, out_channels, recipe, shortcut) for c in widths))

        self.stem = ConvUnit(in_channels, w, recipe, activation=nn.ReLU)
        self.stage1 = stage(w, w)
        self.stage2 = stage(w, 2 * w)
        self.stage3 = stage(2 * w, 4 * w)
        self.fc = nn.Linear(4 * w, num_classes)
        reparametrize(self, weight)
        self.norm_layers = place_norms(self, norm, norm_layers, (in_channels, *image_size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
