"""From prompts to advertisers with exact probabilities, at about the cost of the prompts alone.

The prompts of a batch are read once, then the prefixes that are worth it (see :mod:`priors.tree_reader`); the head
multiplies the rows of one level only, and every step runs over the children of all prefixes of all users at once:

    level 1   hidden of the prompt's end            ─► all level-1 codes of the user
    level 2   best K prefixes as K query tokens     ─► the legal codes below each
    level 3   best K of those as K query tokens     ─► advertisers
    exact     best prefixes left, whatever level    ─► until none can hold an advertiser of the list

Interests, where the forecaster has any, are read off the hidden state of the prompt's end: they cost no token and no
step.

A prefix with a single advertiser below it needs no token: its probability is the advertiser's. Every probability is a
product of softmaxes over legal children, as in training; what a beam leaves behind is kept as the *frontier*: pruned
prefixes with their exact mass. Frontier and advertisers found are disjoint and together sum to one.

A prefix's probability bounds that of every advertiser below it, so the first n advertisers are *certified* to be the n
most probable of all as soon as no pruned prefix is more probable than the nth.

Shapes: B prompts, E prefixes, M children of theirs, N nodes of all depths, V codes of a level, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UserError
from models.prior_lm import PriorLM
from priors.anchor import TunedAnchor
from priors.anchor_tree import AnchorTree, DenseAnchor, OpenAnchor
from priors.calibration import Calibration
from priors.config import DecodeConfig
from priors.flat_trie import ActiveSets, FlatTrie
from priors.interests import TOP_INTERESTS, Interests
from priors.tree_reader import Prompts, Reading, reader_of

_READ_AT_ONCE = 256
"""Prefixes of one prompt that are read in one pass where all are wanted: bounds the memory of the mask."""


@dataclass(frozen=True)
class Decoded:
    """The forecast of one user-period.

    Attributes:
        advertiser_K: advertisers found, best first.
        log_prob_K: their exact log-probabilities.
        anchor_log_prob_K: what the tuned anchor alone gives them.
        level1_log_prob_N: log-probability of every level-1 prefix, in trie order; ``-inf`` where nothing is active.
        frontier_depth_F: depth of each stored pruned prefix, at least 2.
        frontier_node_F: its node of the trie.
        frontier_log_prob_F: its log-probability.
        bound: log-probability of the likeliest pruned prefix; ``-inf`` where none is left.
        certified: whether the list is proven to be the most probable advertisers of all.
        tokens: tokens computed for it, those of its prompt included.
        interest_I: the likeliest interests, best first; none where the forecaster has none.
        interest_log_prob_I: their exact log-probabilities.
        interest_anchor_log_prob_I: what their tuned anchor alone gives them.
    """

    advertiser_K: NDArray[np.int64]
    log_prob_K: NDArray[np.float64]
    anchor_log_prob_K: NDArray[np.float64]
    level1_log_prob_N: NDArray[np.float64]
    frontier_depth_F: NDArray[np.int64]
    frontier_node_F: NDArray[np.int64]
    frontier_log_prob_F: NDArray[np.float64]
    bound: float
    certified: bool
    tokens: int
    interest_I: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    interest_log_prob_I: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    interest_anchor_log_prob_I: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))

    @property
    def mass(self) -> float:
        """Probability covered by the advertisers found."""
        return float(np.exp(self.log_prob_K).sum())

    @property
    def remainder(self) -> float:
        """Probability of neither an advertiser found nor a prefix of the frontier."""
        return max(0.0, 1.0 - self.mass - float(np.exp(self.frontier_log_prob_F).sum()))


class TreeDecoder:
    """Decodes prompts under a trie.

    Args:
        model: the fine-tuned LM.
        base: base scores and the trie.
        calibration: temperature of the logits and exponent of the base, a level.
        cfg: beam, length of the list, floor of the frontier.
        interests: what else is forecast; None: nothing.
    """

    def __init__(
        self,
        model: PriorLM,
        base: TunedAnchor,
        calibration: Calibration,
        cfg: DecodeConfig,
        *,
        interests: Interests | None = None,
    ) -> None:
        self.model, self.cfg, self.interests = model.eval(), cfg, interests
        self.device = next(model.parameters()).device
        self.flat = FlatTrie.of(base.trie, self.device)
        self.anchor = AnchorTree(base, self.flat, repeats=model.head.repeats)
        self.reader = reader_of(model)
        self.lm_weight_L = torch.tensor(calibration.lm_weight, dtype=torch.float64, device=self.device)
        self.base_exponent_L = torch.tensor(calibration.base_exponent, dtype=torch.float64, device=self.device)
        self._path_ND = self._paths()

    @torch.inference_mode()
    def decode(
        self,
        prompts: Prompts,
        user_B: NDArray[np.integer],
        period_B: NDArray[np.integer],
        *,
        active_GA: NDArray[np.bool_] | None = None,
        group_B: NDArray[np.integer] | None = None,
    ) -> list[Decoded]:
        """Forecast a batch.

        Args:
            prompts: what the LM reads for each.
            user_B: whose anchor is the base of each.
            period_B: as-of periods.
            active_GA: True for the advertisers that a forecast may name: ``(A,)`` for all prompts, or one row a
                prompt; None for everyone. Probabilities are among them.
            group_B: row of ``active_GA`` of each prompt, where prompts share them.

        Returns:
            One forecast a prompt, in their order; none for no prompt.

        Raises:
            UserError: an empty prompt, or active advertisers that do not fit.
            FloatingPointError: the model gives no number for a prompt.
        """
        if not len(prompts):
            return []
        search = self._begin(prompts, user_B, period_B, active_GA, group_B)
        entries, hidden_EH = search.root(), search.reading.end_BH
        end_BH = hidden_EH
        found, pruned = _Prefixes.none(self.device, self.flat.n_levels), _Prefixes.none(self.device, self.flat.n_levels)
        level1_BN = torch.empty(0)
        for depth in range(self.flat.n_levels):
            children, alone = self._expand(search, entries, hidden_EH, range(depth, depth + 1))
            if depth == 0:
                first = self.flat.offset[1]
                level1_BN = torch.full((len(prompts), self.flat.offset[2] - first), -torch.inf, dtype=torch.float64)
                level1_BN[children.row_E.cpu(), children.node_E.cpu() - first] = children.log_prob_E.cpu()
            found = found.joined(children.select(alone)).best(self.cfg.top_k)[0]
            entries, rest = children.select(~alone).best(self.cfg.beam)
            pruned = pruned.joined(rest)
            if not len(entries):
                break
            hidden_EH = self._read(search, entries, keep=self.cfg.exact or depth + 2 < self.flat.n_levels)
        if self.cfg.exact:
            found, pruned = self._widen(search, found, pruned)
        decoded = self._collect(search, found, pruned, level1_BN)
        return decoded if self.interests is None else self._with_interests(decoded, end_BH, user_B, period_B)

    def _with_interests(
        self, decoded: list[Decoded], end_BH: Tensor, user_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> list[Decoded]:
        """The same forecasts with the likeliest interests."""
        assert self.interests is not None
        log_prob_BC, anchor_BC = self.interests.log_probs(self.model, end_BH, user_B, period_B)
        top = log_prob_BC.topk(min(TOP_INTERESTS, log_prob_BC.shape[1]))
        columns = (top.indices, top.values, anchor_BC.gather(1, top.indices))
        interest_BI, log_prob_BI, anchor_BI = (column.cpu().numpy() for column in columns)
        return [
            replace(
                one,
                interest_I=interest_BI[row],
                interest_log_prob_I=log_prob_BI[row],
                interest_anchor_log_prob_I=anchor_BI[row],
            )
            for row, one in enumerate(decoded)
        ]

    @torch.inference_mode()
    def score(
        self,
        prompts: Prompts,
        user_B: NDArray[np.integer],
        period_B: NDArray[np.integer],
        advertisers: Sequence[NDArray[np.integer]],
        *,
        active_GA: NDArray[np.bool_] | None = None,
        group_B: NDArray[np.integer] | None = None,
        floor: float = 0.0,
    ) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Exact log-probabilities of given advertisers; nothing else is decoded.

        Args:
            prompts, user_B, period_B, active_GA, group_B: as of :meth:`decode`.
            advertisers: indexes asked for, for each prompt.
            floor: probability below which nothing is asked for: a prefix with less is not read.

        Returns:
            For each prompt the log-probability of each advertiser, and what the tuned anchor alone gives it;
            ``-inf`` for one that is not active, and for one below a prefix that was not read.

        Raises:
            UserError: as of :meth:`decode`; or an advertiser that is not there.
        """
        if not len(prompts):
            return []
        n_levels, n_nodes = self.flat.n_levels, self.flat.n_nodes
        asked = [np.asarray(part, dtype=np.int64) for part in advertisers]
        row_T, advertiser_T = np.repeat(np.arange(len(asked)), [len(part) for part in asked]), np.concatenate(asked)
        n_advertisers = self.flat.trie.n_advertisers
        if len(asked) != len(prompts) or ((advertiser_T < 0) | (advertiser_T >= n_advertisers)).any():
            raise UserError(
                f"{len(asked)} lists of advertisers for {len(prompts)} prompts, between "
                f"{advertiser_T.min(initial=0)} and {advertiser_T.max(initial=0)}",
                expected=f"one list a prompt, of indexes below {n_advertisers}",
                action="give indexes of this log's advertisers",
            )
        search = self._begin(prompts, user_B, period_B, active_GA, group_B)
        wanted_TL = torch.from_numpy(row_T[:, None] * n_nodes + self.flat.path_nodes(advertiser_T)).to(self.device)
        pair_T = torch.from_numpy(row_T * n_advertisers + advertiser_T).to(self.device)
        log_prob_T = torch.full((2, len(pair_T)), -torch.inf, dtype=torch.float64, device=self.device)
        entries, hidden_EH = search.root(), search.reading.end_BH
        least = np.log(floor) if floor > 0 else -np.inf
        for depth in range(n_levels):
            on_the_way = wanted_TL[:, depth].unique()
            deeper = _Prefixes.none(self.device, n_levels)
            part_E = rank_within(entries.row_E) // _READ_AT_ONCE
            for number in range(int(part_E.max()) + 1):
                part = entries.select(part_E == number)
                if depth:
                    hidden_EH = self._read(search, part, keep=depth + 1 < n_levels)
                children, alone = self._expand(search, part, hidden_EH, range(depth, depth + 1))
                wanted = torch.isin(children.row_E * n_nodes + children.node_E, on_the_way)
                deeper = deeper.joined(children.select(wanted & ~alone & (children.log_prob_E >= least)))
                ends = children.select(wanted & alone)
                end_E = ends.row_E * n_advertisers + search.active.only_advertiser(ends.row_E, ends.node_E)
                end_E, order = end_E.sort()
                if len(end_E):
                    place_T = torch.searchsorted(end_E, pair_T).clamp_max(len(end_E) - 1)
                    hit_T = (end_E[place_T] == pair_T).nonzero()[:, 0]
                    values = torch.stack([ends.log_prob_E, ends.anchor_log_prob_E])[:, order]
                    log_prob_T[:, hit_T] = values[:, place_T[hit_T]]
            if not len(deeper):
                break
            entries = deeper.best(len(deeper))[0]
        bounds = np.cumsum([len(part) for part in asked])[:-1]
        ours, anchors = log_prob_T.cpu().numpy()
        return list(zip(np.split(ours, bounds), np.split(anchors, bounds), strict=True))

    def _begin(
        self,
        prompts: Prompts,
        user_B: NDArray[np.integer],
        period_B: NDArray[np.integer],
        active_GA: NDArray[np.bool_] | None,
        group_B: NDArray[np.integer] | None,
    ) -> _Search:
        if min(len(prompt) for prompt in prompts) == 0:
            raise UserError("an empty prompt", expected="at least one token", action="raise prior.prompt.max_tokens")
        active = ActiveSets(self.flat, active_GA, group_B, len(prompts))
        reading = self.reader.prefill(prompts)
        return _Search(
            reading=reading,
            active=active,
            anchor=self.anchor.open(user_B, period_B, active),
            tokens_B=torch.tensor([len(prompt) * reading.computes for prompt in prompts], device=self.device),
            n_levels=self.flat.n_levels,
            place_B=torch.arange(len(prompts), device=self.device),
        )

    def _expand(
        self, search: _Search, entries: _Prefixes, hidden_EH: Tensor, depths: range
    ) -> tuple[_Prefixes, Tensor]:
        """Legal children of prefixes of some depths, and which of them have one advertiser below."""
        entry_M, child_M = self.flat.children(entries.node_E)
        leaves_M = search.active.n_leaves(entries.row_E[entry_M], child_M)
        if not search.active.everyone:
            legal = (leaves_M > 0).nonzero()[:, 0]
            entry_M, child_M, leaves_M = entry_M[legal], child_M[legal], leaves_M[legal]
        depth_E = self.flat.depth_N[entries.node_E].long()
        base_M, repeat_M = search.anchor.scores(entries.row_E, entries.node_E, entry_M, child_M)
        lm_M = self._logits(entries, hidden_EH, depth_E, entry_M, child_M, repeat_M, depths)
        score_M = self.lm_weight_L[depth_E][entry_M] * lm_M + self.base_exponent_L[depth_E][entry_M] * base_M
        children = _Prefixes(
            row_E=entries.row_E[entry_M],
            node_E=child_M,
            log_prob_E=entries.log_prob_E[entry_M] + segment_log_softmax(score_M, entry_M, len(entries)),
            anchor_log_prob_E=entries.anchor_log_prob_E[entry_M] + segment_log_softmax(base_M, entry_M, len(entries)),
            chain_ED=entries.chain_ED[entry_M],
        )
        return children, leaves_M == 1

    def _logits(
        self,
        entries: _Prefixes,
        hidden_EH: Tensor,
        depth_E: Tensor,
        entry_M: Tensor,
        child_M: Tensor,
        repeat_M: Tensor | None,
        depths: range,
    ) -> Tensor:
        """The head's score of each child, of which so much is the user's own purchases."""
        code_M = self.flat.code_N[child_M].long()
        lm_M = torch.empty(len(child_M), dtype=torch.float64, device=self.device)
        for depth in depths:
            at_E = (depth_E == depth).nonzero()[:, 0]
            logits_EV, change_EV = self.model.head.apart(hidden_EH[at_E], depth)
            if not logits_EV.isfinite().all():
                bad = int(at_E[(~logits_EV.isfinite()).any(1).nonzero()[0, 0]])
                row = int(entries.row_E[bad])
                raise FloatingPointError(f"the LM gives no number for prompt {row} of the batch at level {depth + 1}")
            if len(depths) == 1:
                here: Tensor | slice = slice(None)
                place_M = entry_M
            else:
                here = (depth_E[entry_M] == depth).nonzero()[:, 0]
                place_M = torch.searchsorted(at_E, entry_M[here])
            lm_M[here] = logits_EV[place_M, code_M[here]].double()
            if repeat_M is not None and change_EV is not None:
                lm_M[here] += repeat_M[here] * change_EV[place_M, code_M[here]].double()
        return lm_M

    def _read(self, search: _Search, entries: _Prefixes, *, keep: bool) -> Tensor:
        """Let the LM read prefixes; where ``keep``, their columns are noted for those read later."""
        path_ED = self._path_ND[entries.node_E]
        place_E = search.place_B[entries.row_E]
        hidden_EH, column_E = search.reading.read(place_E, path_ED, entries.chain_ED, keep=keep)
        if keep:
            depth_E = self.flat.depth_N[entries.node_E].long()
            entries.chain_ED.scatter_(1, depth_E[:, None] - 1, column_E[:, None])
        if search.reading.computes:
            search.tokens_B += torch.bincount(entries.row_E, minlength=len(search.tokens_B))
        return hidden_EH

    def _paths(self) -> Tensor:
        """Tokens of every prefix that may be read, -1 after its end."""
        flat = self.flat
        path_ND = torch.full((flat.offset[-2], flat.n_levels - 1), -1, dtype=torch.long, device=self.device)
        for depth in range(1, flat.n_levels):
            nodes = slice(flat.offset[depth], flat.offset[depth + 1])
            path_ND[nodes] = path_ND[flat.parent_N[nodes].long()]
            path_ND[nodes, depth - 1] = self.model.id_token(depth - 1, flat.code_N[nodes].long())
        return path_ND

    def _widen(self, search: _Search, found: _Prefixes, pruned: _Prefixes) -> tuple[_Prefixes, _Prefixes]:
        """Read the likeliest prefixes left, until none can hold an advertiser of the list."""
        n_rows, top_k = len(search.tokens_B), self.cfg.top_k
        while True:
            count_B = torch.bincount(found.row_E, minlength=n_rows)
            last_B = (count_B.cumsum(0) - 1).clamp_min(0)
            least_B = torch.where(count_B >= top_k, found.log_prob_E[last_B], -torch.inf)
            open_E = pruned.log_prob_E > least_B[pruned.row_E]
            if not open_E.any():
                return found, pruned
            entries, rest = pruned.select(open_E).best(self.cfg.beam)
            search.narrow(entries.row_E.unique())
            hidden_EH = self._read(search, entries, keep=True)
            children, alone = self._expand(search, entries, hidden_EH, range(1, self.flat.n_levels))
            found = found.joined(children.select(alone)).best(top_k)[0]
            pruned = pruned.select(~open_E).joined(rest).joined(children.select(~alone))

    def _collect(self, search: _Search, found: _Prefixes, pruned: _Prefixes, level1_BN: Tensor) -> list[Decoded]:
        n_rows, floor = len(search.tokens_B), np.log(self.cfg.frontier_floor)
        bound_B = torch.full((n_rows,), -torch.inf, dtype=torch.float64, device=self.device)
        bound_B = bound_B.scatter_reduce(0, pruned.row_E, pruned.log_prob_E, "amax")
        deep = pruned.node_E >= self.flat.offset[2]
        stored = pruned.select((pruned.log_prob_E > floor) & deep).best(len(pruned))[0]
        frontier_depth, frontier_node = (part.cpu().numpy() for part in self.flat.within_depth(stored.node_E))
        advertiser_E = search.active.only_advertiser(found.row_E, found.node_E).cpu().numpy()
        log_prob_E, anchor_E = found.log_prob_E.cpu().numpy(), found.anchor_log_prob_E.cpu().numpy()
        frontier_E, level1 = stored.log_prob_E.cpu().numpy(), level1_BN.numpy()
        of_found, of_frontier = (
            np.searchsorted(part.row_E.cpu().numpy(), np.arange(n_rows + 1)) for part in (found, stored)
        )
        n_active, tokens = search.active.n_active(), search.tokens_B.cpu().numpy()
        decoded = []
        for row in range(n_rows):
            ours, rest = slice(*of_found[row : row + 2]), slice(*of_frontier[row : row + 2])
            whole = ours.stop - ours.start == min(self.cfg.top_k, n_active[row])
            decoded.append(
                Decoded(
                    advertiser_K=advertiser_E[ours],
                    log_prob_K=log_prob_E[ours],
                    anchor_log_prob_K=anchor_E[ours],
                    level1_log_prob_N=level1[row],
                    frontier_depth_F=frontier_depth[rest],
                    frontier_node_F=frontier_node[rest],
                    frontier_log_prob_F=frontier_E[rest],
                    bound=float(bound_B[row]),
                    certified=bool(whole and log_prob_E[ours.stop - 1] >= float(bound_B[row])),
                    tokens=int(tokens[row]),
                )
            )
        return decoded


@dataclass
class _Search:
    """What decoding a batch carries along.

    Attributes:
        reading: the prompts, read.
        active: advertisers that may be named.
        anchor: base scores of the batch.
        tokens_B: tokens computed so far.
        n_levels: levels of the trie.
        place_B: row of ``reading`` of each prompt; rows that are done leave it.
    """

    reading: Reading
    active: ActiveSets
    anchor: OpenAnchor | DenseAnchor
    tokens_B: Tensor
    n_levels: int
    place_B: Tensor

    def root(self) -> _Prefixes:
        """The empty prefix of every prompt."""
        rows = torch.arange(len(self.tokens_B), device=self.tokens_B.device)
        zeros = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
        chain_ED = torch.full((len(rows), self.n_levels - 1), -1, dtype=torch.long, device=rows.device)
        return _Prefixes(rows, torch.zeros_like(rows), zeros, zeros, chain_ED)

    def narrow(self, rows: Tensor) -> None:
        """Keep in the cache the prompts that have something left to read."""
        if len(rows) < int((self.place_B >= 0).sum()):
            self.reading = self.reading.only(self.place_B[rows])
            self.place_B = torch.full_like(self.place_B, -1)
            self.place_B[rows] = torch.arange(len(rows), device=rows.device)


@dataclass(frozen=True)
class _Prefixes:
    """Prefixes of the prompts of a batch, one after the other.

    Attributes:
        row_E: prompt.
        node_E: node of the flat trie.
        log_prob_E: log-probability.
        anchor_log_prob_E: what the tuned anchor alone gives it.
        chain_ED: columns of the cache with the prefixes above it and, once read, with itself; -1 for none.
    """

    row_E: Tensor
    node_E: Tensor
    log_prob_E: Tensor
    anchor_log_prob_E: Tensor
    chain_ED: Tensor

    @classmethod
    def none(cls, device: torch.device, n_levels: int) -> _Prefixes:
        """No prefix."""
        number = torch.zeros(0, dtype=torch.long, device=device)
        value = torch.zeros(0, dtype=torch.float64, device=device)
        return cls(number, number, value, value, number.view(0, n_levels - 1))

    def __len__(self) -> int:
        return len(self.row_E)

    def select(self, chosen: Tensor) -> _Prefixes:
        """Some of them, by mask or index."""
        if chosen.dtype == torch.bool:
            chosen = chosen.nonzero()[:, 0]
        return _Prefixes(*(getattr(self, column.name)[chosen] for column in fields(self)))

    def joined(self, other: _Prefixes) -> _Prefixes:
        """These, then those."""
        if not len(other):
            return self
        return _Prefixes(*(torch.cat([getattr(self, c.name), getattr(other, c.name)]) for c in fields(self)))

    def best(self, k: int) -> tuple[_Prefixes, _Prefixes]:
        """The ``k`` likeliest of each prompt, best first, and the others; ties keep their order."""
        order = self.log_prob_E.argsort(descending=True, stable=True)
        order = order[self.row_E[order].argsort(stable=True)]
        chosen = rank_within(self.row_E[order]) < k
        return self.select(order[chosen]), self.select(order[~chosen])


def rank_within(row_E: Tensor) -> Tensor:
    """Place of each entry among those of its row, for rows that stand together."""
    if not len(row_E):
        return row_E
    count_R = torch.unique_consecutive(row_E, return_counts=True)[1]
    start_R = count_R.cumsum(0) - count_R
    return torch.arange(len(row_E), device=row_E.device) - torch.repeat_interleave(start_R, count_R)


def segment_log_softmax(score_M: Tensor, segment_M: Tensor, n_segments: int) -> Tensor:
    """Log-probabilities within segments of any lengths.

    Args:
        score_M: scores.
        segment_M: segment of each.
        n_segments: number of segments.

    Returns:
        ``(M,)``; the exponentials of a segment sum to 1.
    """
    top_E = score_M.new_full((n_segments,), -torch.inf).scatter_reduce(0, segment_M, score_M, "amax")
    below_M = score_M - top_E[segment_M]
    total_E = score_M.new_zeros(n_segments).index_add(0, segment_M, below_M.exp())
    return below_M - total_E.log()[segment_M]
