"""One forecast with all that is behind it, as ``adsid priors explain`` shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.artifacts import to_plain
from data.errors import UserError
from pipeline.forecasts import open_prior
from pipeline.prompts import period_of, user_of
from priors.decode import TreeDecoder
from priors.evaluate import constant_log_probs


@dataclass(frozen=True)
class ExplainedAdvertiser:
    """One advertiser of a forecast.

    Attributes:
        advertiser_id, name: as in the tables.
        id_tokens, token_ids: its semantic ID, by name and as the model reads it.
        log_prob: its exact log-probability.
        anchor_log_prob: what the tuned anchor alone gives it.
        history_log_prob: what anchor and history vector give it without the LM; None without such vectors.
        lm_share: log_prob less that of the line above, or else the anchor's: what the LM makes of it.
    """

    advertiser_id: Any
    name: str | None
    id_tokens: list[str]
    token_ids: list[int]
    log_prob: float
    anchor_log_prob: float
    history_log_prob: float | None
    lm_share: float


@dataclass(frozen=True)
class ExplainedInterest:
    """One interest of a forecast.

    Attributes:
        interest: the category.
        log_prob: its exact log-probability.
        anchor_log_prob: what its tuned anchor alone gives it.
    """

    interest: str
    log_prob: float
    anchor_log_prob: float


@dataclass(frozen=True)
class Explanation:
    """A forecast with all that is behind it.

    Attributes:
        user, period, as_of: of whom and when.
        prompt, token_ids: what the LM read.
        mass: probability of the advertisers listed.
        certified: whether they are proven to be the most probable ones.
        anchor_share: how much of the list's mass the anchor alone gives to the same advertisers.
        divergence: Kullback-Leibler divergence of the listed part from the anchor, in nats: what history and LM have
            changed.
        lm_divergence: the same from anchor and history, in nats: what the LM alone has changed.
        advertisers: best first.
        interests: the likeliest ones, best first; none where the forecaster has none.
    """

    user: str
    period: int
    as_of: str
    prompt: str
    token_ids: list[int]
    mass: float
    certified: bool
    anchor_share: float
    divergence: float
    lm_divergence: float
    advertisers: list[ExplainedAdvertiser]
    interests: list[ExplainedInterest]


def explain(run: Path, user: str, as_of: str, top_k: str = "10", overrides: Sequence[str] = ()) -> Explanation:
    """One forecast, decoded anew.

    Args:
        run: directory of a run whose stage prior is done.
        user: the id.
        as_of: a date or a period.
        top_k: length of the list, or ``all`` to score every advertiser.
        overrides: of single keys.

    Raises:
        UserError: no such run, user or time, or a list of no length.
    """
    if top_k != "all" and not (top_k.isdecimal() and int(top_k) > 0):
        raise UserError(f"--top-k {top_k}", expected="a whole number, at least 1, or all", action="give one of them")
    config, log, prior = open_prior(run, overrides, read=("prior.decode.", "evaluate"))
    index, period = user_of(log, user), period_of(log, as_of)
    prompt = prior.compiler.compile(index, period)
    cfg, trie = config.prior.decode, prior.base.trie
    if top_k != "all":
        cfg = replace(cfg, top_k=int(top_k), exact=True)
    decoder = TreeDecoder(prior.model, prior.base, prior.calibration, cfg, interests=prior.interests)
    asked = [prompt], np.array([index]), np.array([period])
    one = decoder.decode(*asked)[0]
    if top_k == "all":
        scored, anchors = decoder.score(*asked, [np.arange(trie.n_advertisers)])[0]
        advertisers = np.argsort(-scored, kind="stable")
        log_prob_K, anchor_K, certified = scored[advertisers], anchors[advertisers], True
    else:
        advertisers, log_prob_K, anchor_K = one.advertiser_K, one.log_prob_K, one.anchor_log_prob_K
        certified = one.certified
    without_lm_K, has_history = anchor_K, prior.compiler.history is not None
    if has_history:
        without_lm_K = constant_log_probs(prior, *asked[1:], own_history=True)[0, advertisers]
    tables, ids, offset = log.tables.advertisers, prior.compiler.ids, np.cumsum([0, *trie.level_sizes[:-1]])
    names = tables["name"].to_list() if "name" in tables.columns else [None] * trie.n_advertisers
    listed = [
        ExplainedAdvertiser(
            advertiser_id=to_plain(log.advertiser_ids[advertiser]),
            name=names[advertiser],
            id_tokens=list(ids.tokens(int(advertiser))),
            token_ids=(prior.compiler.first_id_token + offset + ids.codes_AL[advertiser]).tolist(),
            log_prob=float(log_prob),
            anchor_log_prob=float(anchor),
            history_log_prob=float(without_lm) if has_history else None,
            lm_share=float(log_prob - without_lm),
        )
        for advertiser, log_prob, anchor, without_lm in zip(
            advertisers, log_prob_K, anchor_K, without_lm_K, strict=True
        )
    ]
    categories = () if prior.interests is None else prior.interests.space.names
    interests = [
        ExplainedInterest(categories[index], float(log_prob), float(anchor))
        for index, log_prob, anchor in zip(
            one.interest_I, one.interest_log_prob_I, one.interest_anchor_log_prob_I, strict=True
        )
    ]
    prob_K = np.exp(log_prob_K)
    return Explanation(
        user=user,
        period=period,
        as_of=f"{log.calendar.start(period):%Y-%m-%d}",
        prompt=prior.compiler.text(prompt),
        token_ids=prompt.token_ids.tolist(),
        mass=float(prob_K.sum()),
        certified=certified,
        anchor_share=float(np.exp(anchor_K).sum()),
        divergence=float((prob_K * (log_prob_K - anchor_K)).sum()),
        lm_divergence=float((prob_K * (log_prob_K - without_lm_K)).sum()),
        advertisers=listed,
        interests=interests,
    )


def to_console(explained: Explanation) -> Group:
    """The forecast for people."""
    factors = ("history", "LM") if any(one.history_log_prob is not None for one in explained.advertisers) else ("LM",)
    table = Table("advertiser", "name", "ID", "probability", "anchor", *(f"× {factor}" for factor in factors))
    for column in table.columns[3:]:
        column.justify = "right"
    for one in explained.advertisers:
        prob, anchor = np.exp(one.log_prob), np.exp(one.anchor_log_prob)
        shares = [one.log_prob - one.lm_share - one.anchor_log_prob, one.lm_share][-len(factors) :]
        ratios = [f"{np.exp(share):.2f}" for share in shares]
        table.add_row(
            str(one.advertiser_id), one.name or "-", " ".join(one.id_tokens), f"{prob:.4f}", f"{anchor:.4f}", *ratios
        )
    interests = Table("interest", "probability", "anchor")
    for column in interests.columns[1:]:
        column.justify = "right"
    for one_interest in explained.interests:
        prob, anchor = np.exp(one_interest.log_prob), np.exp(one_interest.anchor_log_prob)
        interests.add_row(one_interest.interest, f"{prob:.4f}", f"{anchor:.4f}")
    proven = "proven to be the most probable" if explained.certified else "not proven to be the most probable"
    return Group(
        Text(f"user {explained.user}, as of {explained.as_of} (start of period {explained.period})\n"),
        Text(explained.prompt),
        Text("\ntoken ids: " + " ".join(map(str, explained.token_ids)) + "\n"),
        table,
        Text(
            f"{len(explained.advertisers)} advertisers, {proven}: {explained.mass:.3f} of the probability "
            f"({explained.anchor_share:.3f} by the anchor alone). It is {explained.divergence:.4f} nat off the anchor; "
            f"the LM's part is {explained.lm_divergence:.4f} nat."
        ),
        *((Text(), interests) if explained.interests else ()),
    )
