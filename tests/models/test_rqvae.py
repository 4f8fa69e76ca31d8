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
    GRADIENTS,
    RQVAE,
    Codebook,
    RQVAEConfig,
    RQVAEModule,
    kmeans,
    rotation_trick,
    straight_through,
)
from models.training import EpochSampler, TrainerConfig, fit

TINY = RQVAEConfig(level_sizes=[8, 8], latent=6, hidden=16, batch_size=64)


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
    model = RQVAE(12, TINY)
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


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("codebook", CODEBOOKS)
def test_every_variant_describes_the_data_better_after_training(gradient: str, codebook: str, tmp_path: Path) -> None:
    x = clusters()
    cfg = replace(TINY, gradient=gradient, codebook=codebook, latent=3)
    start = RQVAE(12, cfg)
    start.initialise(x, seed=0)
    model = trained(x, cfg, tmp_path, epochs=15)
    assert error(model, x) < error(start, x)


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
    model.books[0].weight[3:] = 99.0
    model.settle(x)
    assert [len(model.encode(x)[:, level].unique()) for level in range(2)] == [8, 8]


def test_an_unknown_source_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x = clusters(dim=12)
    x[:40, 6:] = 0
    module = RQVAEModule.of(x, [6, 6], replace(TINY, source_dropout=0.0), seed=0)
    seen: dict[str, Tensor] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: seen.update(values))
    module.training_step(x[:40], 0)
    with torch.no_grad():
        first_half = (module.model(x[:40]).reconstruction_BD - x[:40])[:, :6].square().sum(-1).mean()
    assert float(seen["train_error"].detach()) == pytest.approx(
        float(first_half), rel=0.2
    )  # the averages moved within the step


def test_dropping_a_source_in_training_brings_cold_samples_near_their_kind(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(320) % 8
    text, bought = torch.randn(8, 6, generator=generator), torch.randn(8, 6, generator=generator) * 2
    x = torch.cat([text[kind], bought[kind]], -1) + 0.05 * torch.randn(320, 12, generator=generator)
    cold = x.clone()
    cold[:, 6:] = 0

    def same_first_code(dropout: float, work_dir: Path) -> float:
        model = trained(x, replace(TINY, source_dropout=dropout), work_dir, epochs=25, sources=[6, 6])
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
        ({"gradient": "gumbel"}, "straight_through, rotation"),
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
