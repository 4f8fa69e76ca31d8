"""RQ-VAE: an embedding becomes a short path of codes, coarse to fine.

Idea. An autoencoder turns an embedding into a latent, and a residual quantiser writes the latent as
a sum of one codebook vector a level: level 1 takes the nearest vector, level 2 quantises what level 1
left over, and so on. The indices are the *semantic id*; near embeddings share its first codes.

    x_BD ──► encoder ──► z_BE ──► residual r¹ = z
                                     │  nearest in codebook 1 ──► c¹, e¹      r² = r¹ - e¹
                                     │  nearest in codebook 2 ──► c², e²      r³ = r² - e²
                                     ▼  ...
                         ẑ_BE = Σ eˡ ──► decoder ──► x̂_BD         id = (c¹, …, cᴸ)

    loss = |x - x̂|²  +  β · mean over levels |rˡ - sg(eˡ)|²  (+ |sg(z) - Σ eˡ|² where codebooks are learned)
           (+ diversity of the codebooks  + contrast of the reconstructed co-conversions, LETTER)

What keeps codebooks from collapsing, and makes IDs of entities that training did not see as good:

* encoder and decoder start as the principal axes of the data beside an MLP whose output starts at zero,
  and the codebooks by k-means on the residuals, with a price on crowded codes. So the untrained model
  already *is* residual k-means with evenly used codes;
* the vectors of all levels are then solved for at once, by ridge regression of the latents on the codes, in
  turn with encoding anew: a vector describes what the vectors of all other levels leave to it, and one of
  few members is pulled to zero. Codebooks of residual k-means know the training set by heart instead;
* in training they follow the same targets, by gradient or by exponential moving averages;
* a code that no sample of an epoch took moves to the residuals that its level describes worst.

Sources: RQ-VAE, Lee et al. 2022 (https://arxiv.org/abs/2203.01941, eq. 5-8); semantic ids, TIGER, Rajput
et al. 2023 (https://arxiv.org/abs/2305.05065); EMA codebooks, van den Oord et al. 2017
(https://arxiv.org/abs/1711.00937, appendix A.1); solving for all codebooks at once, Babenko & Lempitsky 2014
(additive quantization, CVPR); straight-through, Bengio et al. 2013 (https://arxiv.org/abs/1308.3432); rotation
trick, Fifty et al. 2024 (https://arxiv.org/abs/2410.06424); Gumbel softmax, Jang et al. 2017
(https://arxiv.org/abs/1611.01144); diversity and collaborative losses, LETTER, Wang et al. 2024
(https://arxiv.org/abs/2405.07314, eq. 4 and 6).

Shapes: A samples of the whole set, B of a batch, D input features, S sources joined in D, E latent features,
L levels, V codes of a level, W codes of all levels, G clusters of a level's codes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.nn import functional

from data.errors import UserError

GRADIENTS = ("straight_through", "rotation", "gumbel")
CODEBOOKS = ("ema", "learned")
DISTANCES = ("euclidean", "cosine")
ENCODERS = ("fixed", "trained")
_BLOCK = 65_536
"""Samples at a time where a matrix of all of them by all codes would not fit."""
_SLIGHT = 1e-3
"""Ridge of a joint solution without shrinkage: shifting all vectors of two levels against each other changes no sum."""
_DESCRIBED = 1e-10
"""Squared distance below which a residual counts as described by its code."""


@dataclass
class RQVAEConfig:
    """Sizes and training terms of an RQ-VAE.

    Attributes:
        level_sizes: codes a level, coarse to fine.
        latent: latent features E; at most the input features are used.
        hidden: units of the hidden layer of encoder and decoder.
        encoder: ``fixed``: the principal axes, with the MLP for samples alone that lack a source, which it makes up
            for; or ``trained``: axes and MLP are trained, for all samples.
        distance: ``euclidean``, or ``cosine``: all vectors of a level are kept at one length, so that the nearest
            one is that of the smallest angle.
        gradient: how the gradient passes the quantiser: ``straight_through``, ``rotation`` or ``gumbel``.
        gumbel_temperature: of ``gumbel``, in units of the level's mean squared distance to the nearest code.
        codebook: ``learned`` (by gradient) or ``ema`` (moving averages of the members, that no other loss reaches).
        ema_decay: share of the old average kept a step, of ``ema``.
        joint: a vector describes what the vectors of *all* other levels leave to it (where learned: the gradient of
            the reconstruction reaches all vectors); else what the coarser ones do.
        shrinkage: members that a vector lacks to full length: vectors of few members are pulled to zero, which
            describes entities that training did not see better. With ``joint``, the strength of a ridge.
        balance: how strongly k-means evens out the codes' members at the start; 0 not at all.
        kmeans_iterations: Lloyd iterations at the start.
        refit_rounds: rounds of encoding all and solving for all vectors at once (least squares) at the start.
        restart: codes that nobody took in an epoch move to what their level describes worst.
        commitment: weight of the pull of the latents to their codes.
        neighbours: weight of the contrast by which a sample shares the prefixes of its nearest sample of the batch
            more likely than those of others; of the first 512 samples of a batch.
        spread: weight of the push by which nearest samples of one prefix get different last codes.
        soft_temperature: of the soft choice of codes in these two, in units of the level's mean squared distance to
            the nearest code.
        diversity: weight of the pull of a code to another one of its cluster and away from the other clusters of the
            level (LETTER's diversity loss); with ``codebook=learned`` alone, since averages have no gradient.
        diversity_clusters: balanced clusters of a level's vectors, for that.
        collaborative: weight of the contrast that tells an entity by its reconstructed co-conversions among those of
            the batch (LETTER's collaborative loss).
        collaborative_temperature: of that contrast.
        source_dropout: chance that a source but the first is hidden from a sample in a step, each by itself: the
            latent of what is left is pulled to the latent of all, so that an entity that lacks a source (a cold
            advertiser) is coded like its kind.
        learning_rate: of AdamW, of encoder and decoder; all rates fall linearly to nothing.
        codebook_learning_rate: of learned vectors.
        weight_decay: of AdamW, on encoder and decoder.
        batch_size: samples a step.
        samples_per_epoch: the most samples an epoch; of a larger set, successive epochs go through successive parts.
        initial_samples: the most samples that the initialisation sees, by a seeded draw.

    Raises:
        UserError: values out of their range, all told at once.
    """

    level_sizes: list[int] = field(default_factory=lambda: [64, 64, 64])
    latent: int = 512
    hidden: int = 128
    encoder: str = "fixed"
    distance: str = "euclidean"
    gradient: str = "straight_through"
    gumbel_temperature: float = 0.02
    codebook: str = "learned"
    ema_decay: float = 0.95
    joint: bool = True
    shrinkage: float = 5.0
    balance: float = 1.0
    kmeans_iterations: int = 50
    refit_rounds: int = 15
    restart: bool = True
    commitment: float = 0.1
    neighbours: float = 0.2
    spread: float = 10.0
    soft_temperature: float = 0.1
    diversity: float = 0.0
    diversity_clusters: int = 8
    collaborative: float = 0.0
    collaborative_temperature: float = 0.1
    source_dropout: float = 0.3
    learning_rate: float = 1e-3
    codebook_learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    batch_size: int = 512
    samples_per_epoch: int = 131_072
    initial_samples: int = 65_536

    def __post_init__(self) -> None:
        wrong = []
        if not self.level_sizes or min(self.level_sizes) < 2:
            wrong.append(("level_sizes", "at least one level, each of at least 2 codes, e.g. [64,64,64]"))
        choices = {"encoder": ENCODERS, "distance": DISTANCES, "gradient": GRADIENTS, "codebook": CODEBOOKS}
        for name, names in choices.items():
            if getattr(self, name) not in names:
                wrong.append((name, f"one of {', '.join(names)}"))
        for name in (
            "latent", "hidden", "kmeans_iterations", "batch_size", "samples_per_epoch", "initial_samples",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                wrong.append((name, "a positive whole number"))
        for name in ("ema_decay", "source_dropout"):
            if not 0 <= getattr(self, name) < 1:
                wrong.append((name, "a number from 0 up to but without 1"))
        for name in (
            "shrinkage", "balance", "refit_rounds", "commitment", "neighbours", "spread", "diversity", "collaborative",
            "weight_decay",
        ):  # fmt: skip
            if not getattr(self, name) >= 0:
                wrong.append((name, "a number of at least 0"))
        for name in (
            "gumbel_temperature", "soft_temperature", "collaborative_temperature", "learning_rate",
            "codebook_learning_rate",
        ):  # fmt: skip
            if not getattr(self, name) > 0:
                wrong.append((name, "a number above 0"))
        if self.diversity > 0 and self.codebook != "learned":
            wrong.append(("diversity", "0 unless codebook=learned: moving averages have no gradient"))
        if self.diversity_clusters < 2:
            wrong.append(("diversity_clusters", "a whole number of at least 2"))
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


def kmeans(x_AE: Tensor, n_codes: int, *, iterations: int, generator: torch.Generator, balance: float = 0.0) -> Tensor:
    """Lloyd's k-means from a k-means++ start (Arthur & Vassilvitskii 2007), its clusters evened out by prices.

    An emptied cluster moves to the sample worst described. With fewer distinct samples than codes the codes left over
    repeat samples already taken; they stay without members.

    Where ``balance`` is above zero, eight more iterations follow in which a sample joins the cluster of the least
    squared distance plus price. In an iteration the price of a cluster rises twenty times, from zero, by ``balance``
    times the logarithm of its members over an even share (of a fifth of that at least), in units of a twentieth of the
    mean squared distance to the nearest centroid. This finds better clusters too: k-means alone gets stuck.

    Args:
        x_AE: samples.
        n_codes: clusters V.
        iterations: Lloyd iterations at the most; it stops once no sample changes its cluster.
        generator: source of every random choice.
        balance: strength of the prices.

    Returns:
        Centroids, shape ``(V, E)``.
    """
    centroids_VE = _spread_start(_draw(x_AE, _STARTS_PER_CODE * n_codes, generator), n_codes, generator)
    previous_A = None
    for _ in range(iterations):
        distance_A, member_A = _nearest(x_AE, centroids_VE)
        if previous_A is not None and torch.equal(member_A, previous_A):
            break
        previous_A = member_A
        _move(centroids_VE, x_AE, distance_A, member_A)
    for _ in range(_BALANCED_ITERATIONS if balance > 0 else 0):
        distance_A, member_A = _nearest(x_AE, centroids_VE)
        _move(centroids_VE, x_AE, distance_A, _priced(x_AE, centroids_VE, distance_A, member_A, balance))
    return centroids_VE


_BALANCED_ITERATIONS, _PRICE_RISES, _PRICE_STEP = 8, 20, 0.05


def _priced(x_AE: Tensor, centroids_VE: Tensor, distance_A: Tensor, member_A: Tensor, balance: float) -> Tensor:
    """Clusters of the samples under prices that even them out."""
    price_V = x_AE.new_zeros(len(centroids_VE))
    unit, even = balance * _PRICE_STEP * distance_A.mean(), len(x_AE) / len(centroids_VE)
    distance_AV = torch.cat([squared_distances(part_BE, centroids_VE) for part_BE in x_AE.split(_BLOCK)])
    for _ in range(_PRICE_RISES):
        share_V = torch.bincount(member_A, minlength=len(centroids_VE)) / even
        price_V += unit * share_V.clamp_min(0.2).log()
        member_A = (distance_AV + price_V).argmin(-1)
    return member_A


def _move(centroids_VE: Tensor, x_AE: Tensor, distance_A: Tensor, member_A: Tensor) -> None:
    """Each centroid to the mean of its members, an empty one to a sample worst described."""
    count_V = torch.bincount(member_A, minlength=len(centroids_VE))
    sum_VE = torch.zeros_like(centroids_VE).index_add_(0, member_A, x_AE)
    filled_V = count_V > 0
    centroids_VE[filled_V] = sum_VE[filled_V] / count_V[filled_V, None]
    empty_N = (~filled_V).nonzero().flatten()
    if len(empty_N):
        worst = distance_A.argsort(descending=True, stable=True)
        worst = worst[distance_A[worst] > _DESCRIBED][: 16 * len(empty_N)]
        worst_NE = _first_distinct(x_AE[worst], len(empty_N))
        centroids_VE[empty_N[: len(worst_NE)]] = worst_NE


_STARTS_PER_CODE = 64


def _spread_start(x_AE: Tensor, n_codes: int, generator: torch.Generator) -> Tensor:
    """Samples drawn one after the other by their squared distance to those drawn before; at random where all are."""
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
    return centroids_VE


def _nearest(x_AE: Tensor, vectors_VE: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to, and index of the nearest vector, in blocks."""
    nearest = [squared_distances(part_BE, vectors_VE).min(-1) for part_BE in x_AE.split(_BLOCK)]
    return torch.cat([one.values for one in nearest]), torch.cat([one.indices for one in nearest])


def _first_distinct(rows_BE: Tensor, n: int) -> Tensor:
    """The first ``n`` different rows, in their order."""
    if not n or not len(rows_BE):
        return rows_BE[:0]
    _, inverse_B = torch.unique(rows_BE, dim=0, return_inverse=True)
    first = torch.full((int(inverse_B.max()) + 1,), len(rows_BE), dtype=torch.long, device=rows_BE.device)
    first.scatter_reduce_(0, inverse_B, torch.arange(len(rows_BE), device=rows_BE.device), reduce="amin")
    return rows_BE[first.sort().values[:n]]


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


def gumbel_mixture(
    residual_BE: Tensor, weight_VE: Tensor, noise_BV: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """One code drawn forward, the gradient of the softmax mixture backward (arXiv 1611.01144).

    The logits are minus the squared distances over ``temperature`` times their mean over the batch at the nearest
    code (a constant to the gradient), plus Gumbel noise.

    Args:
        residual_BE: what is to be described.
        weight_VE: the codes' vectors.
        noise_BV: draws of a standard Gumbel variable; zero takes the nearest code.
        temperature: the smaller, the nearer the mixture is to one code.

    Returns:
        Codes ``(B,)`` and values ``(B, E)``.
    """
    distance_BV = squared_distances(residual_BE, weight_VE)
    unit = distance_BV.min(-1).values.mean().detach().clamp_min(_DESCRIBED)
    logits_BV = noise_BV - distance_BV / (temperature * unit)
    codes_B = logits_BV.argmax(-1)
    mixture_BE = logits_BV.softmax(-1) @ weight_VE
    return codes_B, mixture_BE + (functional.embedding(codes_B, weight_VE) - mixture_BE).detach()


def diversity_loss(codes_B: Tensor, weight_VE: Tensor, partner_B: Tensor) -> Tensor:
    """LETTER's diversity loss (arXiv 2405.07314, eq. 6): codes of a cluster together, clusters apart.

    ``mean over samples of -log( exp(e_c · e_p) / Σ_{v ≠ c} exp(e_c · e_v) )`` with ``p`` another code of the cluster
    of ``c``; here of vectors scaled to unit length over 0.1, so that no level is too short to be heard. Codes alone
    in their cluster have no partner and no say.

    Args:
        codes_B: codes c of the samples.
        weight_VE: vectors of the level.
        partner_B: the code p of each sample, -1 for none.

    Returns:
        A scalar; zero where no sample has a partner.
    """
    unit_VE = functional.normalize(weight_VE, dim=-1, eps=1e-6)
    similarity_BV = functional.embedding(codes_B, unit_VE) @ unit_VE.T / _DIVERSITY_TEMPERATURE
    itself_BV = functional.one_hot(codes_B, len(weight_VE)).bool()
    log_share_BV = similarity_BV.masked_fill(itself_BV, -torch.inf).log_softmax(-1)
    has = partner_B >= 0
    if not has.any():
        return weight_VE.sum() * 0
    return -log_share_BV[has].gather(1, partner_B[has, None]).mean()


_DIVERSITY_TEMPERATURE = 0.1


def neighbour_losses(
    residuals_LBE: Tensor, weights: list[Tensor], codes_BL: Tensor, near_N: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Whether near samples share prefixes, and whether those that do are told apart by the last code.

    At each level a sample chooses codes by ``softmax(-d² / (temperature · unit))``, with the level's mean squared
    distance to the nearest code as the unit. Two samples share a level by the chance ``s`` that both choose the same
    code, and a prefix by the product over its levels. By length l of the proper prefixes:

        Σ_l  w_l · mean over i of  log( mean over samples k of s_l(i, k) ) - log s_l(i, near(i)),  w_1 = 1, else .3

    is minus how much likelier than chance the prefix is shared. The other one is the mean chance to share the last
    code, over the pairs that share the prefix in fact.

    Args:
        residuals_LBE: what each level has to describe.
        weights: vectors of each level.
        codes_BL: the nearest codes.
        near_N: for each of the first N samples another one of the batch, the nearest; -1 for none, then it has no say.
        temperature: of the choice.

    Returns:
        The two losses; the first is zero with one level.
    """
    has_N, near_N, n = near_N >= 0, near_N.clamp_min(0), len(near_N)
    n_has = has_N.sum().clamp_min(1)
    losses, prefix_NN, with_near_N = [], None, None
    spread = residuals_LBE.new_zeros(())
    for level, weight_VE in enumerate(weights):
        own_NV, near_NV = squared_distances(residuals_LBE[level][:n], weight_VE), residuals_LBE[level][near_N]
        unit = own_NV.min(-1).values.mean().detach().clamp_min(_DESCRIBED) * temperature
        own_NV = (-own_NV / unit).softmax(-1)
        near_NV = (-squared_distances(near_NV, weight_VE) / unit).softmax(-1)
        shared_N = (own_NV * near_NV).sum(-1)
        if level + 1 == len(weights):
            alike_N = (codes_BL[:n, :-1] == codes_BL[near_N, :-1]).all(-1) & has_N
            spread = (alike_N * shared_N).sum() / alike_N.sum().clamp_min(1)
            break
        shared_NN = own_NV @ own_NV.T
        prefix_NN = shared_NN if prefix_NN is None else prefix_NN * shared_NN
        with_near_N = shared_N if with_near_N is None else with_near_N * shared_N
        gain_N = (prefix_NN.mean(1) + _SHARED).log() - (with_near_N + _SHARED).log()
        losses.append((gain_N * has_N).sum() / n_has * (1.0 if level == 0 else _LONGER_PREFIXES))
    return (torch.stack(losses).sum() if losses else spread * 0), spread


_SHARED, _LONGER_PREFIXES, _ANCHORS = 1e-9, 0.3, 512


def nearest_in_batch(x_BD: Tensor, n: int | None = None) -> Tensor:
    """For each of the first ``n`` samples the nearest one of the batch that is no copy of it, -1 for none, ``(N,)``."""
    first_ND = x_BD[:n]
    distance_NB = squared_distances(first_ND, x_BD)
    size_B = x_BD.square().sum(-1)
    same_NB = distance_NB <= _SAME * (size_B[: len(first_ND), None] + size_B).clamp_min(_SAME)
    nearest_N = distance_NB.masked_fill(same_NB, torch.inf).min(-1)
    return torch.where(nearest_N.values < torch.inf, nearest_N.indices, -1)


_SAME = 1e-5
"""Squared distance over squared length up to which rounding may have set two equal samples apart."""


def contrast(a_BC: Tensor, b_BC: Tensor, *, temperature: float) -> Tensor:
    """How badly each row of ``a`` tells its own row of ``b`` among all rows (InfoNCE of cosines, in nats)."""
    similarity_BB = functional.normalize(a_BC, dim=-1, eps=1e-6) @ functional.normalize(b_BC, dim=-1, eps=1e-6).T
    return functional.cross_entropy(similarity_BB / temperature, torch.arange(len(a_BC), device=a_BC.device))


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
        equal: the vectors have one length, see :meth:`equalise`.
    """

    weight: Tensor
    count_V: Tensor
    sum_VE: Tensor
    taken_V: Tensor

    def __init__(self, n_codes: int, dim: int, *, learned: bool, equal: bool = False) -> None:
        super().__init__()
        self.learned, self.equal = learned, equal
        if learned:
            self.weight = nn.Parameter(torch.zeros(n_codes, dim))
        else:
            self.register_buffer("weight", torch.zeros(n_codes, dim))
        self.register_buffer("count_V", torch.ones(n_codes))
        self.register_buffer("sum_VE", torch.zeros(n_codes, dim))
        self.register_buffer("taken_V", torch.zeros(n_codes))

    @torch.no_grad()
    def initialise(self, vectors_VE: Tensor, count_V: Tensor | None = None, *, shrinkage: float = 0.0) -> None:
        """Set all vectors and forget what was counted.

        Args:
            vectors_VE: the vectors.
            count_V: members of each in a batch, as far as known.
            shrinkage: of :meth:`observe`.
        """
        self.weight.copy_(vectors_VE)
        self.equalise()
        self.count_V.fill_(1.0)
        if count_V is not None:
            self.count_V.copy_(count_V)
        self.sum_VE.copy_(self.weight * (self.count_V[:, None] + shrinkage))
        self.taken_V.zero_()

    @torch.no_grad()
    def equalise(self) -> None:
        """Scale all vectors to their mean length, where they are to be equally long.

        The nearest one is then the one of the smallest angle. A zero vector has no direction and stays.
        """
        if self.equal:
            length_V1 = self.weight.norm(dim=-1, keepdim=True)
            mean = length_V1.mean()
            self.weight.mul_(torch.where(length_V1 > 0, mean / length_V1.clamp_min(1e-12), 1.0))

    def nearest(self, residual_BE: Tensor) -> Tensor:
        """Index of the nearest vector, shape ``(B,)``; the first of equally near ones."""
        return _nearest(residual_BE, self.weight)[1]

    @torch.no_grad()
    def observe(self, target_BE: Tensor, codes_B: Tensor, *, decay: float, shrinkage: float = 0.0) -> None:
        """Count who took which code and, without gradients, move the vectors to their members' average.

        Args:
            target_BE: what the vector of each sample's code should be.
            codes_B: the codes.
            decay: share of the old average that is kept.
            shrinkage: members of a batch, all zero, that each average has besides.
        """
        count_V = torch.bincount(codes_B, minlength=len(self.count_V)).to(target_BE.dtype)
        self.taken_V += count_V
        if self.learned:
            return
        sum_VE = torch.zeros_like(self.sum_VE).index_add_(0, codes_B, target_BE.to(self.sum_VE.dtype))
        self.count_V.lerp_(count_V, 1 - decay)
        self.sum_VE.lerp_(sum_VE, 1 - decay)
        alive_V = self.count_V > 1e-6
        self.weight[alive_V] = self.sum_VE[alive_V] / (self.count_V[alive_V, None] + shrinkage)
        self.equalise()

    @torch.no_grad()
    def restart(self, residual_BE: Tensor, codes_B: Tensor, unused_N: Tensor, *, shrinkage: float = 0.0) -> int:
        """Move unused codes to the residuals that the level describes worst.

        Args:
            residual_BE: what the level had to describe.
            codes_B: the codes taken.
            unused_N: indices of the codes to move.
            shrinkage: of :meth:`observe`.

        Returns:
            How many moved; fewer than asked for where too few different residuals are left undescribed.
        """
        if not len(unused_N):
            return 0
        error_B = (residual_BE - self.weight[codes_B]).square().sum(-1)
        worst_B = error_B.argsort(descending=True, stable=True)
        worst_B = worst_B[error_B[worst_B] > _DESCRIBED]
        vectors_NE = _first_distinct(residual_BE[worst_B[: 16 * len(unused_N)]], len(unused_N))
        moved = unused_N[: len(vectors_NE)]
        self.weight[moved] = vectors_NE
        self.equalise()
        self.sum_VE[moved] = self.weight[moved] * (1 + shrinkage)
        self.count_V[moved] = 1.0
        return len(moved)


class RQVAEOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        reconstruction_BD: x̂.
        codes_BL: the semantic ids, int64.
        residuals_LBE: what each level had to describe.
        targets_LBE: what the vector of each sample's code should be: the residual, or, jointly, what the vectors of
            all other levels leave.
        commitment: mean over samples and levels of the squared distance of residuals to their codes; its
            gradient reaches the encoder alone.
        codebook: squared distance of residuals to vectors with its gradient at the codebooks; zero for moving
            averages and where the vectors are learned jointly, from the reconstruction.
    """

    reconstruction_BD: Tensor
    codes_BL: Tensor
    residuals_LBE: Tensor
    targets_LBE: Tensor
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

    Call :meth:`initialise` with the data before training; until then all weights of the linear part are zero. A source
    whose features are all zero in a sample is unknown there.

    Example:
        >>> model = RQVAE(4, RQVAEConfig(level_sizes=[2, 2], latent=2, hidden=8))
        >>> x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
        >>> model.initialise(x, seed=0)
        >>> model.encode(x).shape
        torch.Size([32, 2])

    Args:
        dim: input features D.
        cfg: sizes and terms.
        source_dims: features of each source joined in D, in order; None for one source.

    Raises:
        ValueError: ``source_dims`` do not add up to ``dim``.
    """

    mean_D: Tensor
    source_SD: Tensor

    def __init__(self, dim: int, cfg: RQVAEConfig, source_dims: Sequence[int] | None = None) -> None:
        super().__init__()
        self.cfg, self.source_dims = cfg, list(source_dims or [dim])
        if sum(self.source_dims) != dim:
            raise ValueError(f"sources of {self.source_dims} features do not make up the input of {dim}")
        owner_D = torch.repeat_interleave(torch.arange(len(self.source_dims)), torch.tensor(self.source_dims))
        one_hot_SD = functional.one_hot(owner_D, len(self.source_dims)).T.float()
        self.register_buffer("source_SD", one_hot_SD, persistent=False)
        latent = min(cfg.latent, dim)
        self.register_buffer("mean_D", torch.zeros(dim))
        self.project = nn.Linear(dim, latent, bias=False).requires_grad_(cfg.encoder == "trained")
        self.expand = nn.Linear(latent, dim, bias=False)
        self.encoder = Correction(dim, cfg.hidden, latent)
        self.decoder = Correction(latent, cfg.hidden, dim)
        self.codebooks = nn.ModuleList(
            Codebook(size, latent, learned=cfg.codebook == "learned", equal=cfg.distance == "cosine")
            for size in cfg.level_sizes
        )
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.expand.weight)

    @property
    def books(self) -> list[Codebook]:
        """The codebooks, coarse to fine."""
        return [book for book in self.codebooks if isinstance(book, Codebook)]

    @torch.no_grad()
    def initialise(self, x_AD: Tensor, *, seed: int) -> None:
        """Start as residual k-means on the principal axes of the data, all vectors solved for at once.

        Args:
            x_AD: the training set; of more than ``initial_samples``, a draw is looked at.
            seed: of the draw, the MLPs' hidden layers and the k-means starts.
        """
        generator = torch.Generator().manual_seed(seed)
        x_AD = _draw(x_AD, self.cfg.initial_samples, generator)
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
        latent_AE = self.latent(x_AD)
        residual_AE = latent_AE
        for book in self.books:
            vectors_VE = kmeans(
                residual_AE, len(book.weight), iterations=self.cfg.kmeans_iterations, generator=generator,
                balance=self.cfg.balance,
            )  # fmt: skip
            book.initialise(vectors_VE)
            residual_AE = residual_AE - book.weight[book.nearest(residual_AE)]
        self.refit(latent_AE)

    @torch.no_grad()
    def refit(self, latent_AE: Tensor) -> None:
        """Encode all and solve for the vectors, in turn, ``refit_rounds`` times.

        Jointly: the vectors of all levels at once, ``min |Z - M E|² + shrinkage |E|²`` with M the codes of the
        samples as ones in a row. Else level by level: the mean of a code's residuals, shrunk. A code without a member
        keeps its vector. The moving averages start anew from the result.

        Args:
            latent_AE: latents of the training set.
        """
        per_batch = min(self.cfg.batch_size / len(latent_AE), 1.0)
        codes_AL = self.codes(latent_AE)
        for _ in range(self.cfg.refit_rounds):
            if self.cfg.joint:
                self._solve(latent_AE, codes_AL)
            else:
                self._average(latent_AE)
            before_AL, codes_AL = codes_AL, self.codes(latent_AE)
            if torch.equal(before_AL, codes_AL):
                break
        for level, book in enumerate(self.books):
            count_V = torch.bincount(codes_AL[:, level], minlength=len(book.weight)) * per_batch
            book.initialise(book.weight.clone(), count_V, shrinkage=self.cfg.shrinkage * per_batch)

    def _solve(self, latent_AE: Tensor, codes_AL: Tensor) -> None:
        sizes = [len(book.weight) for book in self.books]
        starts = [sum(sizes[:level]) for level in range(len(sizes))]
        gram_WW = latent_AE.new_zeros((sum(sizes), sum(sizes)), dtype=torch.float64)
        sum_WE = latent_AE.new_zeros(sum(sizes), latent_AE.shape[1])
        for one, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            sum_WE[start : start + size].index_add_(0, codes_AL[:, one], latent_AE)
            for other, (at, n) in enumerate(zip(starts, sizes, strict=True)):
                pairs = torch.bincount(codes_AL[:, one] * n + codes_AL[:, other], minlength=size * n)
                gram_WW[start : start + size, at : at + n] = pairs.view(size, n)
        members_W = gram_WW.diagonal().clone()
        gram_WW.diagonal().add_(max(self.cfg.shrinkage, _SLIGHT))
        solved_WE = torch.linalg.solve(gram_WW, sum_WE.double()).to(latent_AE.dtype)
        for book, start, size in zip(self.books, starts, sizes, strict=True):
            used_V = members_W[start : start + size] > 0
            book.weight[used_V] = solved_WE[start : start + size][used_V]
            book.equalise()

    def _average(self, latent_AE: Tensor) -> None:
        residual_AE = latent_AE
        for book in self.books:
            codes_A = book.nearest(residual_AE)
            count_V = torch.bincount(codes_A, minlength=len(book.weight))
            sum_VE = torch.zeros_like(book.weight).index_add_(0, codes_A, residual_AE)
            used_V = count_V > 0
            book.weight[used_V] = sum_VE[used_V] / (count_V[used_V, None] + self.cfg.shrinkage)
            book.equalise()
            residual_AE = residual_AE - book.weight[book.nearest(residual_AE)]

    def latent(self, x_BD: Tensor) -> Tensor:
        """The encoder's output, shape ``(B, E)``."""
        centred_BD = x_BD - self.mean_D
        z_BE = self.project(centred_BD)
        if self.cfg.encoder == "trained":
            return z_BE + self.encoder(centred_BD)
        lacking_B = (self.known(x_BD) == 0).any(-1)
        if lacking_B.any():
            z_BE = torch.where(lacking_B[:, None], z_BE + self.encoder(centred_BD), z_BE)
        return z_BE

    def known(self, x_BD: Tensor) -> Tensor:
        """Which sources know something of which sample: ones and zeros, ``(B, S)``."""
        return ((x_BD.square() @ self.source_SD.T) > 0).to(x_BD.dtype)

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

    @torch.no_grad()
    def codes(self, latent_AE: Tensor) -> Tensor:
        """Greedy codes of any number of latents, int64 ``(A, L)``."""
        return torch.cat([self.quantize(part_BE)[0] for part_BE in latent_AE.split(_BLOCK)])

    def forward(self, x_BD: Tensor) -> RQVAEOutput:
        """Encode, quantise, decode."""
        z_BE = self.latent(x_BD)
        codes_BL, quantized_BE, residuals_LBE = self.quantize(z_BE)
        learned = self.cfg.codebook == "learned"
        if self.cfg.gradient == "gumbel" and self.training:
            passed_BE = self._drawn(z_BE)
        else:
            estimate = rotation_trick if self.cfg.gradient == "rotation" else straight_through
            passed_BE = estimate(z_BE, quantized_BE.detach())
            if learned and self.cfg.joint:
                passed_BE = passed_BE + (quantized_BE - quantized_BE.detach())
        vectors_LBE = torch.stack(
            [functional.embedding(codes_BL[:, level], book.weight) for level, book in enumerate(self.books)]
        )
        commitment = (residuals_LBE - vectors_LBE.detach()).square().sum(-1).mean()
        targets_LBE = residuals_LBE.detach()
        if self.cfg.joint:
            targets_LBE = (z_BE - vectors_LBE.sum(0) + vectors_LBE).detach()
        codebook = commitment.new_zeros(())
        if learned and not self.cfg.joint:
            codebook = (targets_LBE - vectors_LBE).square().sum(-1).mean()
        return RQVAEOutput(self.decode(passed_BE), codes_BL, residuals_LBE, targets_LBE, commitment, codebook)

    def _drawn(self, z_BE: Tensor) -> Tensor:
        """The sum of vectors drawn by Gumbel noise, with the mixtures' gradient; codebooks follow the nearest codes."""
        residual_BE, passed_BE = z_BE, torch.zeros_like(z_BE)
        for book in self.books:
            uniform_BV = torch.rand(len(z_BE), len(book.weight), device=z_BE.device).clamp(1e-9, 1 - 1e-6)
            weight_VE = book.weight if book.learned else book.weight.clone()  # averages move before the backward pass
            _, value_BE = gumbel_mixture(
                residual_BE, weight_VE, -(-uniform_BV.log()).log(), temperature=self.cfg.gumbel_temperature
            )
            passed_BE = passed_BE + value_BE
            residual_BE = residual_BE - value_BE.detach()
        return passed_BE

    @torch.no_grad()
    def encode(self, x_BD: Tensor) -> Tensor:
        """Semantic ids, int64 ``(B, L)``; not unique where embeddings are near."""
        return torch.cat([self.codes(self.latent(part_BD)) for part_BD in x_BD.split(_BLOCK)])

    @torch.no_grad()
    def settle(self, x_AD: Tensor, *, rounds: int = 20) -> None:
        """Give every code a member over the whole set, as far as distinct embeddings allow.

        Level by level, coarse first: unused codes move to the worst-described residuals until each has a member.
        Training does the same after every epoch but the last; this closes it.

        Args:
            x_AD: the training set.
            rounds: tries a level; none without ``restart``.
        """
        residual_AE = torch.cat([self.latent(part_BD) for part_BD in x_AD.split(_BLOCK)])
        for book in self.books:
            codes_A = book.nearest(residual_AE)
            for _ in range(rounds if self.cfg.restart else 0):
                unused_N = (torch.bincount(codes_A, minlength=len(book.weight)) == 0).nonzero().flatten()
                if not book.restart(residual_AE, codes_A, unused_N):
                    break
                codes_A = book.nearest(residual_AE)
            for part_BE, codes_B in zip(residual_AE.split(_BLOCK), codes_A.split(_BLOCK), strict=True):
                part_BE -= book.weight[codes_B]


def _draw(x_AD: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """At most ``n`` rows, in their order."""
    if len(x_AD) <= n:
        return x_AD
    return x_AD[torch.randperm(len(x_AD), generator=generator)[:n].sort().values]


class RQVAEModule(lightning.LightningModule):
    """Trains an :class:`RQVAE` on batches ``x_BD``.

    Args:
        dim: input features D.
        source_dims: features of each source joined in D, in order.
        config: values of :class:`RQVAEConfig` as plain types, so that a checkpoint holds nothing else.
        n_samples: size of the training set, which the strength of the shrinkage is a share of.
        collaborative: which source holds the co-conversions, for the loss of that name; None for none.

    Raises:
        ValueError: ``source_dims`` do not add up to ``dim``, or the collaborative loss without its source.
    """

    def __init__(
        self,
        dim: int,
        source_dims: list[int],
        config: dict[str, Any],
        n_samples: int = 1,
        collaborative: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.cfg = RQVAEConfig(**config)
        if self.cfg.collaborative > 0 and collaborative is None:
            raise ValueError("the collaborative loss needs to know which source the co-conversions are")
        self.collaborative = collaborative
        self.model = RQVAE(dim, self.cfg, source_dims)
        self.shrinkage = self.cfg.shrinkage * min(self.cfg.batch_size / n_samples, 1.0)
        self._last: tuple[Tensor, Tensor] | None = None
        self._clusters: list[Tensor] = []

    @classmethod
    def of(
        cls, x_AD: Tensor, source_dims: list[int], cfg: RQVAEConfig, *, seed: int, collaborative: int | None = None
    ) -> RQVAEModule:
        """A module whose model is initialised from the data."""
        module = cls(x_AD.shape[1], source_dims, asdict(cfg), len(x_AD), collaborative)
        module.model.initialise(x_AD, seed=seed)
        return module

    def on_train_epoch_start(self) -> None:
        """Group the codes of each level for the diversity loss, by balanced k-means of their vectors."""
        if self.cfg.diversity == 0:
            return
        generator = torch.Generator().manual_seed(self.current_epoch)
        self._clusters = []
        for book in self.model.books:
            vectors_VE = book.weight.detach().cpu()  # as the generator is
            n_clusters = min(self.cfg.diversity_clusters, len(vectors_VE) // 2)
            centres_GE = kmeans(vectors_VE, n_clusters, iterations=20, generator=generator, balance=1.0)
            self._clusters.append(_nearest(vectors_VE, centres_GE)[1].to(book.weight.device))

    def training_step(self, x_BD: Tensor, batch_idx: int) -> Tensor:
        known_BS = self.model.known(x_BD)
        output = self.model(x_BD)
        reconstruction = (output.reconstruction_BD - x_BD).square().sum(-1).mean()
        loss = reconstruction + self.cfg.commitment * output.commitment + output.codebook
        if self.cfg.source_dropout > 0 and known_BS.shape[1] > 1:
            loss = loss + self._made_up_for(x_BD, known_BS, output.residuals_LBE[0].detach())
        if self.cfg.codebook == "learned":
            lengths = torch.stack([book.weight.square().sum() for book in self.model.books]).sum()
            loss = loss + self.shrinkage / len(x_BD) * lengths
        if (self.cfg.neighbours > 0 or self.cfg.spread > 0) and len(x_BD) > 1:
            weights = [book.weight if book.learned else book.weight.clone() for book in self.model.books]
            near, spread = neighbour_losses(
                output.residuals_LBE, weights, output.codes_BL, nearest_in_batch(x_BD, _ANCHORS),
                temperature=self.cfg.soft_temperature,
            )  # fmt: skip
            loss = loss + self.cfg.neighbours * near + self.cfg.spread * spread
        if self.cfg.diversity > 0:
            loss = loss + self.cfg.diversity * self._diversity(output.codes_BL)
        if self.collaborative is not None and self.cfg.collaborative > 0:
            loss = loss + self.cfg.collaborative * self._contrast(output.reconstruction_BD, x_BD, known_BS)
        for level, book in enumerate(self.model.books):
            book.observe(
                output.targets_LBE[level], output.codes_BL[:, level],
                decay=self.cfg.ema_decay, shrinkage=self.shrinkage,
            )  # fmt: skip
        self._last = (output.residuals_LBE.detach(), output.codes_BL)
        self.log_dict(
            {"train_loss": loss, "train_error": reconstruction, "train_commitment": output.commitment},
            prog_bar=True, on_step=False, on_epoch=True, batch_size=len(x_BD),
        )  # fmt: skip
        return loss

    def _made_up_for(self, x_BD: Tensor, known_BS: Tensor, latent_BE: Tensor) -> Tensor:
        """Squared distance of latents of samples with sources hidden to those of the whole, over the batch."""
        hidden_BS = torch.rand(known_BS.shape, device=x_BD.device) < self.cfg.source_dropout
        hidden_BS[:, 0] = False
        hidden_BS[known_BS[:, 0] == 0] = False  # never all that is known of a sample
        rows_B = (hidden_BS & (known_BS > 0)).any(-1)
        shown_BD = x_BD[rows_B] * ((~hidden_BS[rows_B]).to(x_BD.dtype) @ self.model.source_SD)
        return (self.model.latent(shown_BD) - latent_BE[rows_B]).square().sum() / len(x_BD)

    def _diversity(self, codes_BL: Tensor) -> Tensor:
        losses = []
        for level, (book, cluster_V) in enumerate(zip(self.model.books, self._clusters, strict=True)):
            codes_B = codes_BL[:, level]
            alike_BV = (cluster_V[codes_B, None] == cluster_V) & ~functional.one_hot(codes_B, len(cluster_V)).bool()
            weight_BV = alike_BV.float() + 1e-9
            partner_B = torch.where(alike_BV.any(-1), torch.multinomial(weight_BV, 1)[:, 0], -1)
            losses.append(diversity_loss(codes_B, book.weight, partner_B))
        return torch.stack(losses).mean()

    def _contrast(self, reconstruction_BD: Tensor, x_BD: Tensor, known_BS: Tensor) -> Tensor:
        rows, columns = known_BS[:, self.collaborative] > 0, self.model.source_SD[self.collaborative] > 0
        if int(rows.sum()) < 2:
            return reconstruction_BD.sum() * 0
        return contrast(
            reconstruction_BD[rows][:, columns], x_BD[rows][:, columns], temperature=self.cfg.collaborative_temperature
        )

    def on_train_batch_end(self, *_: Any) -> None:
        """Learned vectors that are to be equally long are made so again."""
        for book in self.model.books:
            if book.learned:
                book.equalise()

    def on_train_epoch_end(self) -> None:
        """Restart the codes that nobody took in this epoch, at the last batch's worst-described residuals."""
        if self._last is None:
            return
        residuals_LBE, codes_BL = self._last
        # The last epoch restarts none: a code set down on a single sample would never be averaged.
        restarts_wanted = self.cfg.restart and self.current_epoch + 1 < (self.trainer.max_epochs or 0)
        unused = 0
        for level, book in enumerate(self.model.books):
            unused_N = (book.taken_V == 0).nonzero().flatten()
            unused += len(unused_N)
            if restarts_wanted:
                book.restart(residuals_LBE[level], codes_BL[:, level], unused_N, shrinkage=self.shrinkage)
            book.taken_V.zero_()
        self.log("unused_codes", float(unused))
        self._last = None

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        books = [book.weight for book in self.model.books if book.learned]
        of_books = {id(weight) for weight in books}
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in of_books]
        groups: list[dict[str, Any]] = [{"params": others}]
        if books:
            groups.append({"params": books, "weight_decay": 0.0, "lr": self.cfg.codebook_learning_rate})
        optimizer = torch.optim.AdamW(groups, lr=self.cfg.learning_rate, weight_decay=self.cfg.weight_decay)
        steps = max(int(self.trainer.estimated_stepping_batches), 1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(1 - step / steps, 0.0))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
