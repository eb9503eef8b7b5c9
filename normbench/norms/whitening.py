"""Whitening of a batch, by ZCA, by Cholesky's factor or by Newton's iteration."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normbench.norms.base import PlainBatchNorm, require_spread
from normbench.norms.group import grouping
from normbench.norms.rows import from_rows, to_rows
from normbench.values import one_of, positive_int


class InverseRoot(torch.autograd.Function):
    """(S + e · I)^(-1/2) of symmetric S ≥ 0; its gradient needs no eigenvalue to differ from another.

    With λ the eigenvalues and U the eigenvectors of S + e · I, the gradient is U (K ∘ Uᵀ G U) Uᵀ, where K
    holds the divided differences of λ^(-1/2): K_ij = −1 / (√λ_i √λ_j (√λ_i + √λ_j)), finite for λ_i = λ_j.
    """

    @staticmethod
    def forward(ctx: Any, cov: Tensor, added: Tensor) -> Tensor:
        # a diverging session has to end in NaN, not in the solver's error
        finite = cov.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(finite, cov, torch.zeros_like(cov)))
        roots = (values.clamp(min=0).unsqueeze(-1) + added).sqrt()  # (groups, g, 1); rounding goes below 0
        ctx.save_for_backward(roots, vectors)
        root = (vectors / roots.mT) @ vectors.mT
        return torch.where(finite, root, torch.full_like(root, torch.nan))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        roots, vectors = ctx.saved_tensors
        differences = -1 / (roots * roots.mT * (roots + roots.mT))
        inner = vectors.mT @ ((grad + grad.mT) / 2) @ vectors
        return vectors @ (differences * inner) @ vectors.mT, None


def zca(cov: Tensor, added: Tensor) -> Tensor:
    """The symmetric inverse root, which among all whitenings moves the channels least."""
    root: Tensor = InverseRoot.apply(cov, added)
    return root


def cholesky(cov: Tensor, added: Tensor) -> Tensor:
    """L⁻¹ of cov = L Lᵀ: a channel is freed of those before it."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    lower, info = torch.linalg.cholesky_ex(cov + added * eye)
    inverse = torch.linalg.solve_triangular(lower, eye.expand_as(cov), upper=False)
    return torch.where((info == 0).view(-1, 1, 1), inverse, torch.full_like(inverse, torch.nan))


def newton(cov: Tensor, added: Tensor, iterations: int) -> Tensor:
    """Newton's iteration towards the inverse root, from which small eigenvalues stay farthest away."""
    eye = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    full = cov + added * eye
    trace = (full * eye).sum((-1, -2), keepdim=True)
    root, product = eye.expand_as(cov), full / trace  # P and P S / t: rounding grows where P alone is carried
    for _ in range(iterations):
        step = 1.5 * eye - 0.5 * (root @ product)
        root, product = step @ root, product @ step
    return root * trace.rsqrt()


class DecorrelatedBatchNorm(PlainBatchNorm):
    """Batch norm that also takes out the correlations between the channels of a group.

        y = W (x - mean) * weight + bias,    W (cov + eps · I) Wᵀ = I
        zca:      W = (cov + eps · I)^(-1/2), symmetric
        cholesky: W = L⁻¹, lower triangular, of L Lᵀ = cov + eps · I
        newton:   W = P_T / sqrt(t), t = trace(S), S = cov + eps · I,
                  P_0 = I, P_k = (3 P_{k-1} - P_{k-1}³ S / t) / 2: nearly zca, the nearer the larger T

    mean (C,) and cov (÷n; groups of g channels, each g × g) over the batch and all spatial axes in training;
    evaluation makes W from the running covariance. Covariances and W are computed in float64: the smallest
    eigenvalue is felt most.

    A covariance of n values has rank below n, so where a group has as many channels, eps alone decides what
    leaves in the directions that the batch does not show. What rounding hides, 4 · g · precision · largest
    variance, is added to eps, without a gradient: precision is float64's in training and the running
    covariance's own in evaluation.

    Args:
        num_features: channels C.
        method: zca, cholesky or newton.
        iterations: T of newton, ≥ 1; null for the others, which are exact.
        num_groups: groups, dividing C; None derives them from channels_per_group.
        channels_per_group: without num_groups, groups have the largest divisor of C up to this many.
        eps: added to the covariance's diagonal, ≥ 0.
        momentum: weight of the new batch in the running statistics, 0 to 1; None averages all batches.
        affine: learn weight and bias; False leaves both None.
        train_weight: False freezes the weight at its start.
        train_bias: False freezes the bias at its start.
    Shape: (N, C, *) → (N, C, *), 0 to 3 spatial axes.
    State: running_mean (C,), running_cov (groups, g, g) ÷(n−1), num_batches_tracked ().
    Raises: ValueError — another channel count or rank; one value per channel in training, or with eps=0
        and an exact method no more values than a group has channels; num_groups does not divide
        num_features; newton without iterations, or iterations without newton.
    Source: Huang, Yang, Lang and Deng, Decorrelated Batch Normalization, arXiv 1804.08450 (zca, groups);
        Siarohin, Sangineto and Sebe, Whitening and Coloring, arXiv 1806.00420 (cholesky, eps 1e-3); Huang,
        Zhou, Zhu, Liu and Shao, Iterative Normalization, arXiv 1904.03441 (newton, 5 iterations).
        Differs from the source in: the authors of zca and newton average W itself, here the covariance
        (÷(n−1), as batch norm stores its variance) is averaged; a scale and a shift per channel in place of
        Siarohin's coloring matrix.
    """

    running_cov: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        method: str = "zca",
        iterations: int | None = None,
        num_groups: int | None = None,
        channels_per_group: int = 16,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        train_weight: bool = True,
        train_bias: bool = True,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            train_weight=train_weight,
            train_bias=train_bias,
        )
        self.method = one_of("method", method, ("zca", "cholesky", "newton"))
        if (iterations is None) is (method == "newton"):
            raise ValueError(
                f"iterations belongs to method=newton, got iterations={iterations}, method={method}"
            )
        self.iterations = None if iterations is None else positive_int("iterations", iterations)
        self.num_groups, self.channels_per_group = grouping(num_features, num_groups, channels_per_group)
        del self.running_var  # the diagonal of what takes its place
        groups, size = self.num_groups, self.channels_per_group
        self.register_buffer("running_cov", torch.eye(size).expand(groups, size, size).clone())

    def whiten(self, centred: Tensor, cov: Tensor, precision: float) -> Tensor:
        """W times the centred rows of every group, (groups, g, n)."""
        with torch.no_grad():  # of a covariance the largest entry is a variance
            hidden = 4 * self.channels_per_group * precision * cov.amax((-1, -2), keepdim=True)
            added = self.eps + hidden
        if self.method == "zca":
            matrix = zca(cov, added)
        elif self.iterations is None:
            matrix = cholesky(cov, added)
        else:
            matrix = newton(cov, added, self.iterations)
        return matrix.to(centred.dtype) @ centred

    @torch.no_grad()
    def track(self, mean: Tensor, cov: Tensor, count: int) -> None:
        self.blend(mean=mean, cov=cov * (count / (count - 1)))

    def by_batch(self, x: Tensor) -> Tensor:
        count = require_spread(x, x)
        if self.eps == 0 and self.method != "newton" and count <= self.channels_per_group:
            raise ValueError(
                f"eps=0 needs more values per channel than a group's {self.channels_per_group} channels, "
                f"got {tuple(x.shape)}; set eps > 0 or smaller groups"
            )
        rows = to_rows(x)
        mean = rows.mean(1)
        centred = self.grouped(rows - mean.unsqueeze(1))
        exact = centred.double()
        cov = exact @ exact.mT / count
        self.track(mean, cov, count)
        y = self.whiten(centred, cov, torch.finfo(cov.dtype).eps)
        return from_rows(y.flatten(0, 1), x)

    def by_running(self, x: Tensor) -> Tensor:
        centred = self.grouped(to_rows(x) - self.running_mean.unsqueeze(1))
        y = self.whiten(centred, self.running_cov.double(), torch.finfo(self.running_cov.dtype).eps)
        return from_rows(y.flatten(0, 1), x)

    def grouped(self, rows: Tensor) -> Tensor:
        """(C, n) → (groups, g, n)."""
        return rows.reshape(self.num_groups, self.channels_per_group, rows.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        # autocast, which the meta device does not have, would round what the products take
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            return super().forward(x)
