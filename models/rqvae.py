"""RQ-VAE: an embedding becomes a short path of codes, coarse to fine.

Idea. An autoencoder squeezes an embedding into a latent, and a residual quantiser writes the latent as
a sum of one codebook vector a level: level 1 takes the nearest vector, level 2 quantises what level 1
left over, and so on. The indices are the *semantic id*; near embeddings share its first codes.

    x_BD ──► encoder ──► z_BE ──► residual r¹ = z
                                     │  nearest in codebook 1 ──► c¹, e¹      r² = r¹ - e¹
                                     │  nearest in codebook 2 ──► c², e²      r³ = r² - e²
                                     ▼  ...
                         ẑ_BE = Σ eˡ ──► decoder ──► x̂_BD         id = (c¹, …, cᴸ)

    loss = |x - x̂|²  +  β · mean over levels |rˡ - sg(eˡ)|²  (+ |sg(rˡ) - eˡ|² where codebooks are learned)

Three choices keep codebooks from collapsing, which is what RQ-VAEs are known for:

* encoder and decoder start as the principal axes of the data beside an MLP whose output starts at zero,
  and the codebooks by k-means on the residuals. So the untrained model already *is* residual k-means, and
  training only moves away from it where the reconstruction gains;
* codebooks follow their members by exponential moving averages;
* a code that no sample of an epoch took moves to the residuals that its level describes worst.

Sources: RQ-VAE, Lee et al. 2022 (https://arxiv.org/abs/2203.01941, eq. 5-8); semantic ids, TIGER, Rajput
et al. 2023 (https://arxiv.org/abs/2305.05065); EMA codebooks, van den Oord et al. 2017
(https://arxiv.org/abs/1711.00937, appendix A.1); straight-through, Bengio et al. 2013
(https://arxiv.org/abs/1308.3432); rotation trick, Fifty et al. 2024 (https://arxiv.org/abs/2410.06424).

Shapes: A samples of the whole set, B of a batch, D input features, S sources joined in D, E latent features,
L levels, V codes of a level.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional

from data.errors import UserError

GRADIENTS = ("straight_through", "rotation")
CODEBOOKS = ("ema", "learned")
_KMEANS_SAMPLES_PER_CODE = 256
_DESCRIBED = 1e-10
"""Squared distance below which a residual counts as described by its code."""


@dataclass
class RQVAEConfig:
    """Sizes and training terms of an RQ-VAE.

    Attributes:
        level_sizes: codes a level, coarse to fine.
        latent: latent features E; at most the input features are used.
        hidden: units of the hidden layer of encoder and decoder.
        gradient: how the gradient passes the quantiser, ``straight_through`` or ``rotation``; the former
            describes The Complete Journey's advertisers better (squared error .46 against .54 of their variance).
        codebook: ``ema`` (moving averages of the members) or ``learned`` (by gradient).
        ema_decay: share of the old average kept a step.
        commitment: weight β of the pull of the latents to their codes.
        source_dropout: chance that a sample shows its first source alone in a step, so that one that lacks
            the others (a cold advertiser) is coded like its kind; it still has to reconstruct all.
        kmeans_iterations: Lloyd iterations of the initialisation.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        batch_size: samples a step.

    Raises:
        UserError: values out of their range, all told at once.
    """

    level_sizes: list[int] = field(default_factory=lambda: [64, 64, 64])
    latent: int = 64
    hidden: int = 128
    gradient: str = "straight_through"
    codebook: str = "ema"
    ema_decay: float = 0.95
    commitment: float = 0.1
    source_dropout: float = 0.3
    kmeans_iterations: int = 25
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    batch_size: int = 512

    def __post_init__(self) -> None:
        wrong = []
        if not self.level_sizes or min(self.level_sizes) < 2:
            wrong.append(("level_sizes", "at least one level, each of at least 2 codes, e.g. [64,64,64]"))
        if self.gradient not in GRADIENTS:
            wrong.append(("gradient", f"one of {', '.join(GRADIENTS)}"))
        if self.codebook not in CODEBOOKS:
            wrong.append(("codebook", f"one of {', '.join(CODEBOOKS)}"))
        for name in ("latent", "hidden", "kmeans_iterations", "batch_size"):
            if getattr(self, name) < 1:
                wrong.append((name, "a positive whole number"))
        for name in ("ema_decay", "source_dropout"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append((name, "a number from 0 up to but without 1"))
        for name in ("commitment", "weight_decay"):
            if getattr(self, name) < 0:
                wrong.append((name, "a number of at least 0"))
        if self.learning_rate <= 0:
            wrong.append(("learning_rate", "a number above 0"))
        if wrong:
            raise UserError.collect(
                [
                    UserError(
                        f"semantic_ids.rqvae.{name}={getattr(self, name)}",
                        expected=expected,
                        action=f"set semantic_ids.rqvae.{name}",
                    )
                    for name, expected in wrong
                ]
            )


def squared_distances(a_BE: Tensor, b_VE: Tensor) -> Tensor:
    """Squared Euclidean distances between all pairs, shape ``(B, V)``, never below zero."""
    cross_BV = a_BE @ b_VE.T
    return (a_BE.square().sum(-1, keepdim=True) - 2 * cross_BV + b_VE.square().sum(-1)).clamp_min(0)


def kmeans(x_AE: Tensor, n_codes: int, *, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's k-means from a k-means++ start (Arthur & Vassilvitskii 2007).

    An emptied cluster moves to the sample worst described. With fewer distinct samples than codes the codes
    left over repeat samples already taken; they stay without members.

    Args:
        x_AE: samples; more than 256 a code are thinned to that many.
        n_codes: clusters V.
        iterations: Lloyd iterations at the most; it stops once no sample changes its cluster.
        generator: source of every random choice.

    Returns:
        Centroids, shape ``(V, E)``.
    """
    if len(x_AE) > n_codes * _KMEANS_SAMPLES_PER_CODE:
        kept = torch.randperm(len(x_AE), generator=generator)[: n_codes * _KMEANS_SAMPLES_PER_CODE]
        x_AE = x_AE[kept]
    centroids_VE = x_AE.new_empty(n_codes, x_AE.shape[1])
    nearest_A = x_AE.new_full((len(x_AE),), math.inf)
    choice = int(torch.randint(len(x_AE), (1,), generator=generator))
    for code in range(n_codes):
        centroids_VE[code] = x_AE[choice]
        nearest_A = torch.minimum(nearest_A, (x_AE - x_AE[choice]).square().sum(-1))
        if nearest_A.sum() > 0:
            choice = int(torch.multinomial(nearest_A, 1, generator=generator))
        else:
            choice = int(torch.randint(len(x_AE), (1,), generator=generator))
    previous_A = None
    for _ in range(iterations):
        distance_A, member_A = squared_distances(x_AE, centroids_VE).min(-1)
        if previous_A is not None and torch.equal(member_A, previous_A):
            break
        previous_A = member_A
        count_V = torch.bincount(member_A, minlength=n_codes)
        sum_VE = torch.zeros_like(centroids_VE).index_add_(0, member_A, x_AE)
        filled_V = count_V > 0
        centroids_VE[filled_V] = sum_VE[filled_V] / count_V[filled_V, None]
        empty = (~filled_V).nonzero().flatten()
        worst = distance_A.argsort(descending=True, stable=True)[: len(empty)]
        worst = worst[distance_A[worst] > 0]
        centroids_VE[empty[: len(worst)]] = x_AE[worst]
    return centroids_VE


def straight_through(z_BE: Tensor, quantized_BE: Tensor) -> Tensor:
    """The quantised value forward, the gradient of the identity backward (arXiv 1308.3432)."""
    return z_BE + (quantized_BE - z_BE).detach()


def rotation_trick(z_BE: Tensor, quantized_BE: Tensor) -> Tensor:
    """The quantised value forward; backward, the gradient turned and scaled alike (arXiv 2410.06424).

    The map from ``z`` to its quantised value is written as a rotation and a scaling, both held constant, so
    that the gradient keeps its angle to the code vector (eq. 4 of the paper, by Householder reflections).
    """
    z_norm_B = z_BE.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    q_norm_B = quantized_BE.norm(dim=-1, keepdim=True)
    z_unit_BE = (z_BE / z_norm_B).detach()
    q_unit_BE = (quantized_BE / q_norm_B.clamp_min(1e-6)).detach()
    mid_BE = functional.normalize(z_unit_BE + q_unit_BE, dim=-1, eps=1e-6)
    turned_BE = (
        z_BE
        - 2 * mid_BE * (z_BE * mid_BE).sum(-1, keepdim=True)
        + 2 * q_unit_BE * (z_BE * z_unit_BE).sum(-1, keepdim=True)
    )
    rotated_BE = turned_BE * (q_norm_B / z_norm_B).detach()
    # Exactly the code's value forward, whatever rounding the rotation brings (and at a zero latent).
    return rotated_BE + (quantized_BE - rotated_BE).detach()


class Codebook(nn.Module):
    """The vectors of one level, with the averages they follow and the count of who took them.

    Example:
        >>> book = Codebook(2, 3, learned=False)
        >>> book.initialise(torch.eye(2, 3))
        >>> book.nearest(torch.tensor([[0.9, 0.1, 0.0], [0.0, 2.0, 0.0]])).tolist()
        [0, 1]

    Args:
        n_codes: codes V.
        dim: features E of a vector.
        learned: the vectors are a parameter; else they follow moving averages.
    """

    weight: Tensor
    count_V: Tensor
    sum_VE: Tensor
    taken_V: Tensor

    def __init__(self, n_codes: int, dim: int, *, learned: bool) -> None:
        super().__init__()
        self.learned = learned
        if learned:
            self.weight = nn.Parameter(torch.zeros(n_codes, dim))
        else:
            self.register_buffer("weight", torch.zeros(n_codes, dim))
        self.register_buffer("count_V", torch.ones(n_codes))
        self.register_buffer("sum_VE", torch.zeros(n_codes, dim))
        self.register_buffer("taken_V", torch.zeros(n_codes))

    @torch.no_grad()
    def initialise(self, vectors_VE: Tensor) -> None:
        """Set all vectors and forget what was counted."""
        self.weight.copy_(vectors_VE)
        self.sum_VE.copy_(vectors_VE)
        self.count_V.fill_(1.0)
        self.taken_V.zero_()

    def nearest(self, residual_BE: Tensor) -> Tensor:
        """Index of the nearest vector, shape ``(B,)``; the first of equally near ones."""
        return squared_distances(residual_BE, self.weight).argmin(-1)

    @torch.no_grad()
    def observe(self, residual_BE: Tensor, codes_B: Tensor, *, decay: float) -> None:
        """Count who took which code and, without gradients, move the vectors to their members' average."""
        count_V = torch.bincount(codes_B, minlength=len(self.count_V)).to(residual_BE.dtype)
        self.taken_V += count_V
        if self.learned:
            return
        sum_VE = torch.zeros_like(self.sum_VE).index_add_(0, codes_B, residual_BE)
        self.count_V.lerp_(count_V, 1 - decay)
        self.sum_VE.lerp_(sum_VE, 1 - decay)
        alive_V = self.count_V > 1e-6
        self.weight[alive_V] = self.sum_VE[alive_V] / self.count_V[alive_V, None]

    @torch.no_grad()
    def restart(self, residual_BE: Tensor, codes_B: Tensor, unused_N: Tensor) -> int:
        """Move unused codes to the residuals that the level describes worst.

        Args:
            residual_BE: what the level had to describe.
            codes_B: the codes taken.
            unused_N: indices of the codes to move.

        Returns:
            How many moved; fewer than asked for where too few different residuals are left undescribed.
        """
        error_B = (residual_BE - self.weight[codes_B]).square().sum(-1)
        worst_B = error_B.argsort(descending=True, stable=True)
        vectors_NE = _first_distinct(residual_BE[worst_B[error_B[worst_B] > _DESCRIBED]], len(unused_N))
        moved = unused_N[: len(vectors_NE)]
        self.weight[moved] = vectors_NE
        self.sum_VE[moved] = vectors_NE
        self.count_V[moved] = 1.0
        return len(moved)


class RQVAEOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        reconstruction_BD: x̂.
        codes_BL: the semantic ids, int64.
        residuals_LBE: what each level had to describe.
        commitment: mean over samples and levels of the squared distance of residuals to their codes; its
            gradient reaches the encoder alone.
        codebook: the same value with its gradient at the codebooks; zero for moving averages.
    """

    reconstruction_BD: Tensor
    codes_BL: Tensor
    residuals_LBE: Tensor
    commitment: Tensor
    codebook: Tensor


class Correction(nn.Module):
    """The MLP beside a linear map; its output starts at zero.

    Args:
        dim: input features.
        hidden: units of the hidden layer.
        out: output features.
    """

    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(dim, hidden), nn.Linear(hidden, out)

    def initialise(self, generator: torch.Generator) -> None:
        """Draw the hidden layer's weights, set all others to zero."""
        bound = 1 / math.sqrt(self.hidden.in_features)
        nn.init.uniform_(self.hidden.weight, -bound, bound, generator=generator)
        for zero in (self.hidden.bias, self.output.weight, self.output.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(functional.gelu(self.hidden(x)))


class RQVAE(nn.Module):
    """The autoencoder with a residual quantiser between.

    Call :meth:`initialise` with the data before training; until then all weights of the linear part are zero.

    Example:
        >>> model = RQVAE(4, RQVAEConfig(level_sizes=[2, 2], latent=2, hidden=8))
        >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        >>> model.initialise(x, seed=0)
        >>> model.encode(x).shape
        torch.Size([32, 2])

    Args:
        dim: input features D.
        cfg: sizes and terms.

    """

    mean_D: Tensor

    def __init__(self, dim: int, cfg: RQVAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        latent = min(cfg.latent, dim)
        self.register_buffer("mean_D", torch.zeros(dim))
        self.project = nn.Linear(dim, latent, bias=False)
        self.expand = nn.Linear(latent, dim, bias=False)
        self.encoder = Correction(dim, cfg.hidden, latent)
        self.decoder = Correction(latent, cfg.hidden, dim)
        self.codebooks = nn.ModuleList(
            Codebook(size, latent, learned=cfg.codebook == "learned") for size in cfg.level_sizes
        )
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.expand.weight)

    @property
    def books(self) -> list[Codebook]:
        """The codebooks, coarse to fine."""
        return [book for book in self.codebooks if isinstance(book, Codebook)]

    @torch.no_grad()
    def initialise(self, x_AD: Tensor, *, seed: int) -> None:
        """Start as residual k-means on the principal axes of the data.

        Args:
            x_AD: the training set.
            seed: of the MLPs' hidden layers and the k-means starts.
        """
        generator = torch.Generator().manual_seed(seed)
        self.mean_D.copy_(x_AD.mean(0))
        centred_AD = x_AD - self.mean_D
        covariance_DD = (centred_AD.T @ centred_AD).double() / len(x_AD)
        _, axes_DD = torch.linalg.eigh(covariance_DD)
        axes_ED = axes_DD.T.flip(0)[: self.project.out_features].float()
        largest_E = axes_ED.abs().argmax(-1, keepdim=True)
        axes_ED = axes_ED * axes_ED.gather(1, largest_E).sign()  # the sign of an eigenvector is arbitrary
        self.project.weight.copy_(axes_ED)
        self.expand.weight.copy_(axes_ED.T)
        self.encoder.initialise(generator)
        self.decoder.initialise(generator)
        residual_AE = self.latent(x_AD)
        for book in self.books:
            vectors_VE = kmeans(
                residual_AE, len(book.weight), iterations=self.cfg.kmeans_iterations, generator=generator
            )
            book.initialise(vectors_VE)
            residual_AE = residual_AE - book.weight[book.nearest(residual_AE)]

    def latent(self, x_BD: Tensor) -> Tensor:
        """The encoder's output, shape ``(B, E)``."""
        centred_BD = x_BD - self.mean_D
        return self.project(centred_BD) + self.encoder(centred_BD)

    def decode(self, quantized_BE: Tensor) -> Tensor:
        """The embedding of a latent, shape ``(B, D)``."""
        return self.expand(quantized_BE) + self.decoder(quantized_BE) + self.mean_D

    def quantize(self, z_BE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Greedy residual quantisation.

        Returns:
            Codes ``(B, L)``; their summed vectors ``(B, E)``; the residual each level saw ``(L, B, E)``,
            whose gradient reaches ``z`` and no codebook.
        """
        residual_BE, codes, residuals, quantized_BE = z_BE, [], [], torch.zeros_like(z_BE)
        for book in self.books:
            codes_B = book.nearest(residual_BE)
            vectors_BE = functional.embedding(codes_B, book.weight)
            codes.append(codes_B)
            residuals.append(residual_BE)
            quantized_BE = quantized_BE + vectors_BE
            residual_BE = residual_BE - vectors_BE.detach()
        return torch.stack(codes, -1), quantized_BE, torch.stack(residuals)

    def forward(self, x_BD: Tensor) -> RQVAEOutput:
        """Encode, quantise, decode."""
        z_BE = self.latent(x_BD)
        codes_BL, quantized_BE, residuals_LBE = self.quantize(z_BE)
        vectors_LBE = torch.stack(
            [functional.embedding(codes_BL[:, level], book.weight) for level, book in enumerate(self.books)]
        )
        commitment = (residuals_LBE - vectors_LBE.detach()).square().sum(-1).mean()
        codebook = commitment.new_zeros(())
        if self.cfg.codebook == "learned":
            codebook = (residuals_LBE.detach() - vectors_LBE).square().sum(-1).mean()
        estimate = rotation_trick if self.cfg.gradient == "rotation" else straight_through
        reconstruction_BD = self.decode(estimate(z_BE, quantized_BE.detach()))
        return RQVAEOutput(reconstruction_BD, codes_BL, residuals_LBE, commitment, codebook)

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> Tensor:
        """Semantic ids, int64 ``(B, L)``; not unique where embeddings are near."""
        return self.quantize(self.latent(x_BD))[0]

    @torch.no_grad()
    def settle(self, x_AD: Tensor, *, rounds: int = 20) -> None:
        """Give every code a member over the whole set, as far as distinct embeddings allow.

        Level by level, coarse first: unused codes move to the worst-described residuals until each has a
        member. Training does the same after every epoch but the last; this closes it.

        Args:
            x_AD: the training set.
            rounds: tries a level.
        """
        residual_AE = self.latent(x_AD)
        for book in self.books:
            codes_A = book.nearest(residual_AE)
            for _ in range(rounds):
                unused_N = (torch.bincount(codes_A, minlength=len(book.weight)) == 0).nonzero().flatten()
                if not len(unused_N) or not book.restart(residual_AE, codes_A, unused_N):
                    break
                codes_A = book.nearest(residual_AE)
            residual_AE = residual_AE - book.weight[codes_A]


def _first_distinct(rows_BE: Tensor, n: int) -> Tensor:
    """The first ``n`` different rows, in their order."""
    if not n or not len(rows_BE):
        return rows_BE[:0]
    _, inverse_B = torch.unique(rows_BE, dim=0, return_inverse=True)
    first = torch.full((int(inverse_B.max()) + 1,), len(rows_BE), dtype=torch.long)
    first.scatter_reduce_(0, inverse_B, torch.arange(len(rows_BE)), reduce="amin")
    return rows_BE[first.sort().values[:n]]


class RQVAEModule(lightning.LightningModule):
    """Trains an :class:`RQVAE` on batches ``x_BD``.

    Args:
        dim: input features D.
        source_dims: features of each source joined in D, in order. A source that is all zero for a sample is
            unknown there, and its reconstruction is not asked for.
        config: values of :class:`RQVAEConfig` as plain types, so that a checkpoint holds nothing else.

    Raises:
        ValueError: ``source_dims`` do not add up to ``dim``.
    """

    known_SD: Tensor

    def __init__(self, dim: int, source_dims: list[int], config: dict[str, Any]) -> None:
        super().__init__()
        if sum(source_dims) != dim:
            raise ValueError(f"sources of {source_dims} features do not make up the input of {dim}")
        self.save_hyperparameters()
        self.cfg = RQVAEConfig(**config)
        self.model = RQVAE(dim, self.cfg)
        owner_D = torch.repeat_interleave(torch.arange(len(source_dims)), torch.tensor(source_dims))
        self.register_buffer("known_SD", functional.one_hot(owner_D, len(source_dims)).T.float(), persistent=False)
        self._last: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, x_AD: Tensor, source_dims: list[int], cfg: RQVAEConfig, *, seed: int) -> RQVAEModule:
        """A module whose model is initialised from the data."""
        module = cls(x_AD.shape[1], source_dims, asdict(cfg))
        module.model.initialise(x_AD, seed=seed)
        return module

    def training_step(self, x_BD: Tensor, batch_idx: int) -> Tensor:
        known_BS = ((x_BD.square() @ self.known_SD.T) > 0).float()
        shown_BS = torch.ones_like(known_BS)
        alone_B = torch.rand(len(x_BD), device=x_BD.device) < self.cfg.source_dropout
        shown_BS[alone_B, 1:] = 0
        output = self.model(x_BD * (shown_BS @ self.known_SD))
        error_BD = (output.reconstruction_BD - x_BD).square() * (known_BS @ self.known_SD)
        reconstruction = error_BD.sum(-1).mean()
        loss = reconstruction + self.cfg.commitment * output.commitment + output.codebook
        for level, book in enumerate(self.model.books):
            book.observe(output.residuals_LBE[level].detach(), output.codes_BL[:, level], decay=self.cfg.ema_decay)
        self._last = (output.residuals_LBE.detach(), output.codes_BL)
        self.log_dict(
            {"train_loss": loss, "train_error": reconstruction, "train_commitment": output.commitment},
            prog_bar=True, on_step=False, on_epoch=True, batch_size=len(x_BD),
        )  # fmt: skip
        return loss

    def on_train_epoch_end(self) -> None:
        """Restart the codes that nobody took in this epoch, at the last batch's worst-described residuals."""
        if self._last is None:
            return
        residuals_LBE, codes_BL = self._last
        # The last epoch restarts none: a code set down on a single sample would never be averaged.
        restarts_wanted = self.current_epoch + 1 < (self.trainer.max_epochs or 0)
        unused = 0
        for level, book in enumerate(self.model.books):
            unused_N = (book.taken_V == 0).nonzero().flatten()
            unused += len(unused_N)
            if restarts_wanted:
                book.restart(residuals_LBE[level], codes_BL[:, level], unused_N)
            book.taken_V.zero_()
        self.log("unused_codes", float(unused))
        self._last = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.cfg.learning_rate, weight_decay=self.cfg.weight_decay)
