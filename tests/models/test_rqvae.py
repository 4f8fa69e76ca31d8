"""RQ-VAE: it starts as residual k-means, learns, keeps its codes alive, and is the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.errors import UserError
from models.rqvae import (
    CODEBOOKS,
    DISTANCES,
    GRADIENTS,
    RQVAE,
    Codebook,
    RQVAEConfig,
    RQVAEModule,
    contrast,
    diversity_loss,
    gumbel_mixture,
    kmeans,
    nearest_in_batch,
    neighbour_losses,
    rotation_trick,
    straight_through,
)
from models.training import EpochSampler, TrainerConfig, fit

TINY = RQVAEConfig(level_sizes=[8, 8], latent=6, hidden=16, batch_size=64)
PLAIN = replace(TINY, joint=False, shrinkage=0.0, balance=0.0, refit_rounds=50)
"""Residual k-means and nothing else at the start."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, which wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def clusters(n: int = 240, dim: int = 12, centres: int = 12, seed: int = 0) -> Tensor:
    """Points around well separated centres."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(centres, dim, generator=generator) * 2
    return centre[torch.arange(n) % centres] + 0.3 * torch.randn(n, dim, generator=generator)


def batches(x: Tensor, size: int) -> DataLoader[Tensor]:
    return DataLoader(x, batch_size=size, sampler=EpochSampler(len(x), seed=0))  # type: ignore[arg-type]


def trained(x: Tensor, cfg: RQVAEConfig, work_dir: Path, *, epochs: int = 6, sources: list[int] | None = None) -> RQVAE:
    module = RQVAEModule.of(x, sources or [x.shape[1]], cfg, seed=0)
    loader = batches(x, cfg.batch_size)
    trainer = TrainerConfig(max_epochs=epochs, patience=None, accelerator="cpu", progress_bar=False)
    fit(module, loader, None, trainer, work_dir=work_dir, seed=0)
    return module.model


def error(model: RQVAE, x: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).reconstruction_BD - x).square().sum(-1).mean())


def test_the_untrained_model_is_residual_kmeans_on_the_principal_axes() -> None:
    x = clusters()
    model = RQVAE(12, PLAIN)
    model.initialise(x, seed=3)
    centred = x - x.mean(0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(model.latent(x).abs(), (centred @ axes[:6].T).abs(), atol=1e-4, rtol=1e-4)
    codes_BL, quantized_BE, residuals_LBE = model.quantize(model.latent(x))
    first = model.books[0]
    for code in codes_BL[:, 0].unique():
        members = residuals_LBE[0][codes_BL[:, 0] == code]
        torch.testing.assert_close(first.weight[code], members.mean(0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.decode(quantized_BE), quantized_BE @ model.project.weight + x.mean(0))


def test_codes_vectors_and_residuals_fit_together() -> None:
    x = clusters()
    model = RQVAE(12, TINY)
    model.initialise(x, seed=0)
    z_BE = model.latent(x)
    codes_BL, quantized_BE, residuals_LBE = model.quantize(z_BE)
    total = sum(book.weight[codes_BL[:, level]] for level, book in enumerate(model.books))
    torch.testing.assert_close(quantized_BE, total)
    torch.testing.assert_close(residuals_LBE[1], z_BE - model.books[0].weight[codes_BL[:, 0]])
    exact = torch.cdist(residuals_LBE[1], model.books[1].weight).min(-1).values
    chosen = (residuals_LBE[1] - model.books[1].weight[codes_BL[:, 1]]).norm(dim=-1)
    torch.testing.assert_close(chosen, exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimate", [straight_through, rotation_trick])
def test_estimators_give_the_code_forward_and_a_gradient_backward(estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
    z = torch.randn(5, 4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    q = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    out = estimate(z, q)
    torch.testing.assert_close(out, q)
    out.sum().backward()
    assert z.grad is not None
    assert z.grad.abs().min() > 0


def test_the_rotation_keeps_the_angle_between_gradient_and_code() -> None:
    z = torch.randn(7, 4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    q = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    gradient = torch.randn(7, 4, generator=torch.Generator().manual_seed(2))
    (back,) = torch.autograd.grad(rotation_trick(z, q), z, gradient)
    angle_out = torch.cosine_similarity(gradient, q, dim=-1)
    angle_in = torch.cosine_similarity(back, z, dim=-1)
    torch.testing.assert_close(angle_in, angle_out, atol=1e-5, rtol=1e-5)


def test_the_gumbel_gradient_is_that_of_the_mixture() -> None:
    """Against differences of ``softmax((noise - d²/(τ·unit))) @ E``, whose unit is a constant to the gradient."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    weight = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    noise = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    outer = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    unit = torch.cdist(z, weight).square().min(-1).values.mean()

    def mixed(place: int, values: Tensor) -> Tensor:
        one, vectors = (values, weight) if place == 0 else (z, values)
        return (((noise - torch.cdist(one, vectors).square() / (0.5 * unit)).softmax(-1) @ vectors) * outer).sum()

    leaves = z.clone().requires_grad_(), weight.clone().requires_grad_()
    codes, value = gumbel_mixture(*leaves, noise, temperature=0.5)
    torch.testing.assert_close(value, weight[codes])
    for place, gradient in enumerate(torch.autograd.grad((value * outer).sum(), leaves)):
        numeric = torch.zeros_like(gradient)
        for index in range(gradient.numel()):
            step = 1e-6 * torch.nn.functional.one_hot(torch.tensor(index), gradient.numel()).view_as(gradient)
            up, down = mixed(place, (z, weight)[place] + step), mixed(place, (z, weight)[place] - step)
            numeric.view(-1)[index] = (up - down) / 2e-6
        torch.testing.assert_close(gradient, numeric, atol=1e-6, rtol=1e-5)


def test_without_noise_gumbel_takes_the_nearest_code() -> None:
    z, weight = torch.randn(20, 4), torch.randn(6, 4)
    codes, _ = gumbel_mixture(z, weight, torch.zeros(20, 6), temperature=0.3)
    assert torch.equal(codes, torch.cdist(z, weight).argmin(-1))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_variant_describes_the_data_better_after_training(
    gradient: str, codebook: str, distance: str, tmp_path: Path
) -> None:
    x = clusters()
    cfg = replace(PLAIN, gradient=gradient, codebook=codebook, distance=distance, latent=3, refit_rounds=0)
    start = RQVAE(12, cfg)
    start.initialise(x, seed=0)
    model = trained(x, cfg, tmp_path, epochs=15)
    assert error(model, x) < error(start, x)


def test_cosine_keeps_the_vectors_of_a_level_at_one_length_and_takes_the_smallest_angle(tmp_path: Path) -> None:
    x = clusters()
    for codebook in CODEBOOKS:
        model = trained(x, replace(TINY, distance="cosine", codebook=codebook), tmp_path / codebook, epochs=2)
        codes_BL, _, residuals_LBE = model.quantize(model.latent(x))
        for level, book in enumerate(model.books):
            lengths_V = book.weight.norm(dim=-1)
            torch.testing.assert_close(lengths_V, lengths_V.mean().expand(8), atol=1e-4, rtol=1e-4)
            angle_BV = torch.cosine_similarity(residuals_LBE[level][:, None], book.weight[None], dim=-1)
            chosen_B = angle_BV.gather(1, codes_BL[:, level, None])[:, 0]
            torch.testing.assert_close(chosen_B, angle_BV.max(-1).values, atol=1e-4, rtol=1e-4)


def test_vectors_are_solved_for_at_once_as_ridge_regression_of_the_latents_on_the_codes() -> None:
    x = clusters()
    model = RQVAE(12, replace(TINY, shrinkage=3.0, refit_rounds=0))
    model.initialise(x, seed=0)
    latent = model.latent(x).detach()
    codes = model.codes(latent)
    model.cfg = replace(model.cfg, refit_rounds=1)
    model.refit(latent)
    ones = torch.cat([torch.nn.functional.one_hot(codes[:, level], 8) for level in range(2)], -1).float()
    ridge = torch.cat([ones, 3.0**0.5 * torch.eye(16)])
    solved = torch.linalg.lstsq(ridge, torch.cat([latent, torch.zeros(16, 6)])).solution
    torch.testing.assert_close(torch.cat([book.weight for book in model.books]), solved, atol=1e-4, rtol=1e-3)


def test_solving_at_once_describes_the_data_better_than_level_by_level() -> None:
    x = clusters(centres=40)
    alone, joint = RQVAE(12, PLAIN), RQVAE(12, replace(PLAIN, joint=True))
    alone.initialise(x, seed=0)
    joint.initialise(x, seed=0)
    assert error(joint, x) < error(alone, x)


def test_the_price_of_crowded_codes_evens_out_their_use() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 4, generator=generator) * torch.rand(1000, 1, generator=generator)  # dense in the middle

    def largest(balance: float) -> int:
        centroids = kmeans(x, 10, iterations=50, generator=torch.Generator().manual_seed(0), balance=balance)
        return int(torch.bincount(torch.cdist(x, centroids).argmin(-1), minlength=10).max())

    assert largest(1.0) < 0.7 * largest(0.0)


def test_the_diversity_loss_is_the_share_of_the_partner_among_all_other_codes() -> None:
    weight = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    codes, partner = torch.tensor([0, 3, 2]), torch.tensor([1, -1, 4])
    expected = []
    for code, other in ((0, 1), (2, 4)):
        scores = (weight @ weight[code] / 0.1).exp()
        expected.append(-(scores[other] / (scores.sum() - scores[code])).log())
    torch.testing.assert_close(diversity_loss(codes, weight, partner), torch.stack(expected).mean())
    assert float(diversity_loss(codes, weight, torch.full((3,), -1))) == 0


def test_the_contrast_is_least_where_rows_match() -> None:
    rows = torch.eye(4)
    assert contrast(rows, rows, temperature=0.1) < contrast(rows, rows.flip(0), temperature=0.1)
    torch.testing.assert_close(contrast(torch.ones(4, 4), rows, temperature=0.1), torch.tensor(4.0).log())


def test_the_diversity_loss_gathers_the_codes_of_a_cluster(tmp_path: Path) -> None:
    x = clusters()
    base = replace(TINY, codebook="learned", refit_rounds=0)
    without = trained(x, base, tmp_path / "without", epochs=8)
    diverse = trained(x, replace(base, diversity=1.0, diversity_clusters=3), tmp_path / "diverse", epochs=8)

    def apart(model: RQVAE) -> float:
        weight = model.books[0].weight.detach()
        centres = kmeans(weight, 3, iterations=20, generator=torch.Generator().manual_seed(0), balance=1.0)
        cluster = torch.cdist(weight, centres).argmin(-1)
        pairs = [(a, b) for a in range(8) for b in range(8) if a != b and cluster[a] == cluster[b]]
        return float(diversity_loss(torch.tensor(pairs)[:, 0], weight, torch.tensor(pairs)[:, 1]))

    assert apart(diverse) < apart(without)


def test_the_collaborative_loss_tells_entities_by_their_co_conversions(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([clusters(240, 6), 0.5 * torch.randn(240, 6, generator=generator)], -1)
    cfg = replace(TINY, source_dropout=0.0, refit_rounds=0)

    def score(weight: float) -> float:
        module = RQVAEModule.of(x, [6, 6], replace(cfg, collaborative=weight), seed=0, collaborative=1)
        trainer = TrainerConfig(max_epochs=10, patience=None, accelerator="cpu", progress_bar=False)
        fit(module, batches(x, 64), None, trainer, work_dir=tmp_path / str(weight), seed=0)
        with torch.no_grad():
            return float(contrast(module.model(x).reconstruction_BD[:, 6:], x[:, 6:], temperature=0.1))

    assert score(1.0) < score(0.0)
    with pytest.raises(ValueError, match="which source"):
        RQVAEModule(12, [6, 6], asdict(replace(cfg, collaborative=1.0)))


def test_averages_move_a_code_to_the_mean_of_its_members() -> None:
    book = Codebook(2, 2, learned=False)
    book.initialise(torch.tensor([[0.0, 0.0], [10.0, 10.0]]))
    members = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    for _ in range(100):
        book.observe(members, book.nearest(members), decay=0.8)
    torch.testing.assert_close(book.weight[0], members.mean(0), atol=1e-4, rtol=1e-4)
    assert book.weight[1].tolist() == [10.0, 10.0]
    assert book.taken_V.tolist() == [300.0, 0.0]


@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_a_collapsed_codebook_recovers_in_training(codebook: str, tmp_path: Path) -> None:
    x = clusters()
    cfg = replace(TINY, codebook=codebook)
    module = RQVAEModule.of(x, [12], cfg, seed=0)
    for book in module.model.books:
        book.initialise(torch.full_like(book.weight, 50.0) + torch.arange(8.0)[:, None])
    assert len(module.model.encode(x).unique(dim=0)) == 1
    loader = batches(x, 64)
    trainer = TrainerConfig(max_epochs=6, patience=None, accelerator="cpu", progress_bar=False)
    fit(module, loader, None, trainer, work_dir=tmp_path, seed=0)
    module.model.settle(x)
    codes_AL = module.model.encode(x)
    assert [len(codes_AL[:, level].unique()) for level in range(2)] == [8, 8]


def test_settling_leaves_no_code_without_a_member_where_there_are_points_enough() -> None:
    x = clusters()
    model = RQVAE(12, TINY)
    model.initialise(x, seed=0)
    with torch.no_grad():
        model.books[0].weight[3:] = 99.0
    model.settle(x)
    assert [len(model.encode(x)[:, level].unique()) for level in range(2)] == [8, 8]


def test_the_encoder_leaves_samples_that_know_all_sources_on_the_axes_and_makes_up_for_the_others() -> None:
    x = clusters()
    x[:40, 6:] = 0
    model = RQVAE(12, TINY, [6, 6])
    model.initialise(x, seed=0)
    axes = model.latent(x).detach()
    torch.nn.init.ones_(model.encoder.output.bias)
    torch.testing.assert_close(model.latent(x)[40:], axes[40:])
    torch.testing.assert_close(model.latent(x)[:40], axes[:40] + 1)
    everywhere = RQVAE(12, replace(TINY, encoder="trained"), [6, 6])
    everywhere.load_state_dict(model.state_dict())
    torch.testing.assert_close(everywhere.latent(x), axes + 1)
    assert not model.project.weight.requires_grad
    assert everywhere.project.weight.requires_grad


def test_the_nearest_sample_is_another_one_and_no_copy() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.1, 0.0], [5.0, 0.0]])
    assert nearest_in_batch(x).tolist() == [2, 2, 0, 2]
    assert nearest_in_batch(torch.ones(3, 2)).tolist() == [-1, -1, -1]
    assert nearest_in_batch(torch.zeros(1, 2)).tolist() == [-1]


def test_neighbour_losses_are_the_chances_to_share_codes() -> None:
    """Against the definition, sample by sample."""
    generator = torch.Generator().manual_seed(0)
    residuals = torch.randn(3, 6, 2, generator=generator)
    weights = [torch.randn(4, 2, generator=generator) for _ in range(3)]
    distance = [torch.cdist(residuals[level], weights[level]).square() for level in range(3)]
    codes = torch.stack([one.argmin(-1) for one in distance], -1)
    codes[1, :2] = codes[0, :2]
    near = torch.tensor([1, 0, 3, 2, 5, -1])
    choice = [(-one / (5 * one.min(-1).values.mean())).softmax(-1) for one in distance]
    shared = [one @ one.T for one in choice]
    first, both = shared[0], shared[0] * shared[1]
    expected = sum(
        (both[i].mean() / both[i, near[i]]).log() * 0.3 + (first[i].mean() / first[i, near[i]]).log() for i in range(5)
    )
    losses = neighbour_losses(residuals, weights, codes, near, temperature=5.0)
    torch.testing.assert_close(losses[0], expected / 5, atol=1e-4, rtol=1e-4)
    alike = [i for i in range(5) if codes[i, :2].equal(codes[near[i], :2])]
    assert {0, 1} <= set(alike)
    torch.testing.assert_close(losses[1], torch.stack([shared[2][i, near[i]] for i in alike]).mean())


def test_neighbour_losses_bring_near_samples_below_one_prefix_and_apart_at_the_last_code(tmp_path: Path) -> None:
    x = clusters(centres=60)
    start = replace(PLAIN, kmeans_iterations=1, refit_rounds=0, batch_size=240)
    plain = replace(start, neighbours=0.0, spread=0.0, codebook_learning_rate=3e-2)

    def losses(cfg: RQVAEConfig, work_dir: Path) -> tuple[float, float]:
        model = trained(x, cfg, work_dir, epochs=20)
        codes_BL, _, residuals_LBE = model.quantize(model.latent(x))
        weights = [book.weight for book in model.books]
        near, spread = neighbour_losses(residuals_LBE, weights, codes_BL, nearest_in_batch(x), temperature=0.1)
        return float(near.detach()), float(spread.detach())

    without = losses(plain, tmp_path / "plain")
    assert losses(replace(plain, neighbours=30.0), tmp_path / "near")[0] < without[0]
    assert losses(replace(plain, spread=30.0), tmp_path / "spread")[1] < without[1] - 0.05


def test_dropping_a_source_in_training_brings_cold_samples_near_their_kind(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(320) % 8
    text, bought = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator) * 2
    x = torch.cat([text[kind], bought[kind]], -1) + 0.05 * torch.randn(320, 12, generator=generator)
    cold = x.clone()
    cold[:, 6:] = 0

    def same_first_code(dropout: float, work_dir: Path) -> float:
        cfg = replace(TINY, source_dropout=dropout, learning_rate=1e-2)
        model = trained(x, cfg, work_dir, epochs=25, sources=[6, 6])
        return float((model.encode(x)[:, 0] == model.encode(cold)[:, 0]).float().mean())

    assert same_first_code(0.3, tmp_path / "dropped") > same_first_code(0.0, tmp_path / "never") + 0.2


def test_the_same_seed_gives_the_same_bytes_and_a_resumed_run_too(tmp_path: Path) -> None:
    x = clusters()
    whole = trained(x, TINY, tmp_path / "whole", epochs=4)
    again = trained(x, TINY, tmp_path / "again", epochs=4)
    # Interrupted in the middle: the same maximum of epochs, stopped by an exception.
    module = RQVAEModule.of(x, [12], TINY, seed=0)
    loader = batches(x, 64)
    trainer = TrainerConfig(max_epochs=4, patience=None, accelerator="cpu", progress_bar=False)

    def fail(*_: object) -> None:
        if module.current_epoch == 2:
            raise ConnectionAbortedError

    module.on_train_epoch_start = fail  # type: ignore[method-assign]
    with pytest.raises(ConnectionAbortedError):
        fit(module, loader, None, trainer, work_dir=tmp_path / "cut", seed=0)
    resumed = trained(x, TINY, tmp_path / "cut", epochs=4)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_kmeans_finds_separated_clusters() -> None:
    x = clusters(centres=6)
    centroids = kmeans(x, 6, iterations=50, generator=torch.Generator().manual_seed(0))
    members = torch.cdist(x, centroids).argmin(-1)
    assert all(len(members[torch.arange(240) % 6 == centre].unique()) == 1 for centre in range(6))


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), id="fewer samples than codes"),
        pytest.param(torch.ones(500, 4), id="all samples equal"),
        pytest.param(torch.zeros(500, 4), id="all samples zero"),
    ],
)
def test_too_few_distinct_samples_leave_codes_unused_but_stay_finite(x: Tensor, tmp_path: Path) -> None:
    model = trained(x, replace(TINY, latent=4), tmp_path, epochs=2)
    model.settle(x)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert len(model.encode(x).unique(dim=0)) == len(x.unique(dim=0))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"level_sizes": []}, "at least one level"),
        ({"level_sizes": [64, 1]}, "at least one level"),
        ({"gradient": "reinforce"}, "straight_through, rotation, gumbel"),
        ({"distance": "manhattan"}, "euclidean, cosine"),
        ({"diversity": 0.1, "codebook": "ema"}, "unless codebook=learned"),
        ({"diversity_clusters": 1}, "at least 2"),
        ({"encoder": "frozen"}, "fixed, trained"),
        ({"soft_temperature": 0.0}, "above 0"),
        ({"shrinkage": -1.0}, "at least 0"),
        ({"balance": float("nan")}, "at least 0"),
        ({"gumbel_temperature": 0.0}, "above 0"),
        ({"samples_per_epoch": 0}, "positive whole number"),
        ({"codebook": "hashed"}, "ema, learned"),
        ({"ema_decay": 1.0}, "without 1"),
        ({"source_dropout": -0.1}, "without 1"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"batch_size": 0}, "positive whole number"),
        ({"commitment": -1.0}, "at least 0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(values: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as refused:
        RQVAEConfig(**values)  # type: ignore[arg-type]
    assert f"semantic_ids.rqvae.{next(iter(values))}" in str(refused.value)
    assert expected in str(refused.value)


def test_all_bad_values_are_told_at_once() -> None:
    with pytest.raises(UserError) as refused:
        RQVAEConfig(latent=0, hidden=0)
    assert "latent=0" in str(refused.value)
    assert "hidden=0" in str(refused.value)


def test_a_checkpoint_holds_plain_types(tmp_path: Path) -> None:
    x = clusters()
    trained(x, TINY, tmp_path, epochs=1)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["hyper_parameters"]["config"] == asdict(TINY)


def test_sources_must_make_up_the_input() -> None:
    with pytest.raises(ValueError, match="do not make up"):
        RQVAEModule(12, [5, 5], asdict(TINY))
