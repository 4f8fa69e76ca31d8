"""A fitted forecaster, and its artifact: what of it is kept, and how it is read back.

The artifact is a directory:

    prior.json           base model's reference, anchor, calibration, interests, version of the advertiser IDs, config,
                         and where there was a reward stage, what its result is taken for
    ids/                 the advertiser IDs it was fitted on
    README.md            model card, written by the stage
    adapter/             LoRA weights as peft loads them, with prior.train=lora
    decoder/             all weights, where they are not the base model's: prior.train=full, random weights
    head.safetensors     heads, ID input rows, constants of the standardisation, the appended layer if there is one
    tokenizer/           the base tokenizer with the ID tokens
    reward/              adapter, head and the like of the LM whose lists serve retrieval, where it is another one
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AddedToken, PreTrainedTokenizerBase

from data.artifacts import to_plain
from data.errors import LineageError, UserError
from data.log import Log
from models.block import last_layer
from models.prior_lm import HEADS, PriorLM
from priors.anchor import Counts, TunedAnchor
from priors.base_model import BaseModel, load_base_model, without_adapters
from priors.calibration import Calibration
from priors.config import BaseModelConfig, HistoryConfig, PriorConfig, PromptConfig
from priors.dataset import TreeCollator
from priors.history import NO_CATEGORIES, Categories, HistoryVectors, freeze_history, history_size
from priors.interests import Interests
from priors.prompt import PromptCompiler
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.change import compare
from semantic_ids.trie import Trie

IDS = "ids"
REWARD = "reward"
NOTHING, FOR_LISTS, ALL = "none", "lists", "all"
"""What the result of a reward stage is taken for."""
_APPENDED = "appended."


@dataclass
class PriorModel:
    """A fitted forecaster, ready to decode.

    Attributes:
        model: base decoder with adapters, and the head.
        base: the tuned anchor over the trie.
        calibration: weights of logits and base.
        compiler: writes its prompts.
        constant_LH: mean of what the head reads of the selection prompts at each level, for the controls; zeros for
            hidden states that it does not read.
        cfg: what it was fitted with.
        base_reference: name of the base model.
        fitted_ids: the advertiser IDs it was fitted on; those in use may have grown since.
        interests: the second thing it forecasts; None: nothing.
        reward: what the result of the reward stage is taken for (`priors.reward`); None where there was none.
        list_model: the LM whose lists serve retrieval, to be saved beside; None where it is the same one.
        anchor_calibration: exponents, a level, that ``base`` was raised to by its last calibration; None where an older
            artifact does not tell them.
    """

    model: PriorLM
    base: TunedAnchor
    calibration: Calibration
    compiler: PromptCompiler
    constant_LH: Tensor
    cfg: PriorConfig
    base_reference: str
    fitted_ids: AdvertiserIds
    interests: Interests | None = None
    reward: str | None = None
    list_model: PriorLM | None = None
    anchor_calibration: tuple[float, ...] | None = None

    @property
    def uncalibrated(self) -> Calibration:
        """Weights that give what was said before the last calibration; they take back the exponents of the base."""
        n_levels = self.base.trie.n_levels
        return Calibration.identity(n_levels).over(self.anchor_calibration or (1.0,) * n_levels)

    @property
    def constant_hidden(self) -> Tensor:
        """The part of ``constant_LH`` that is of hidden states."""
        return self.constant_LH[:, : self.model.head.hidden_size]

    @property
    def collator(self) -> TreeCollator:
        return self.collator_of(self.base, interests=self.interests)

    def collator_of(self, base: TunedAnchor, *, interests: Interests | None = None) -> TreeCollator:
        """The same over other base scores."""
        return TreeCollator(
            base, first_id_token=self.compiler.first_id_token, interests=interests, repeats=self.model.head.repeats
        )

    def save(self, directory: Path) -> None:
        """Write the artifact into an existing directory."""
        # Weights that were trained are loaded as they were, not as frozen ones would be.
        kept = {"dtype": "float32"} if self.cfg.train == "full" else {}
        told = NO_CATEGORIES if self.compiler.history is None else self.compiler.history.categories
        plain = {
            "base_model": to_plain(self.cfg.base) | {"name": self.base_reference} | kept,
            "prompt": to_plain(self.cfg.prompt),
            "head": to_plain(self.cfg.head),
            "history": to_plain(self.cfg.history),
            "history_categories": list(told.bought),
            "history_browsed": list(told.browsed),
            "anchor": self.base.to_plain(),
            "calibration": to_plain(self.calibration),
            "anchor_calibration": to_plain(self.anchor_calibration),
            "ids_version": self.fitted_ids.version,
            "first_id_token": self.compiler.first_id_token,
            "interests": None if self.interests is None else self.interests.to_plain(),
        }
        if self.reward is not None:
            plain["reward"] = {"accepted_for": self.reward}
        (directory / "prior.json").write_text(json.dumps(plain, indent=1) + "\n")
        (directory / IDS).mkdir(exist_ok=True)
        self.fitted_ids.save(directory / IDS)
        self._save_weights(self.model, directory)
        if self.list_model is not None:
            (directory / REWARD).mkdir(exist_ok=True)
            self._save_weights(self.list_model, directory / REWARD)
        with_id_tokens(self.compiler.tokenizer, self.fitted_ids.level_sizes).save_pretrained(directory / "tokenizer")

    def _save_weights(self, model: PriorLM, directory: Path) -> None:
        state = heads_of(model) | _appended(model.decoder, self.cfg.base)
        state |= {"id_rows": model.id_rows.weight.detach(), "constant_LH": self.constant_LH.contiguous()}
        save_file(state, directory / "head.safetensors")
        decoder: Any = model.decoder
        if isinstance(decoder, PeftModel):
            decoder.save_pretrained(str(directory / "adapter"))
        if self.cfg.train == "full" or self.cfg.base.random_weights:
            plain_decoder = without_adapters(decoder)
            weights = {
                name.replace(".base_layer.", "."): value
                for name, value in plain_decoder.state_dict().items()
                if ".lora_" not in name
            }
            plain_decoder.save_pretrained(directory / "decoder", state_dict=weights)

    @classmethod
    def load(
        cls,
        directory: Path,
        log: Log,
        ids: AdvertiserIds,
        cfg: PriorConfig,
        *,
        base: TunedAnchor | None = None,
        lists: bool = False,
    ) -> PriorModel:
        """Read the artifact.

        Args:
            directory: where :meth:`save` wrote.
            log: the events that prompts and anchor are made of.
            ids: the advertiser IDs it was fitted on, or the same with new advertisers beside them: codes, vectors
                and tokens stay, so that a new advertiser is forecast by the codes it shares with its kind.
            cfg: the current configuration; base model, prompt, head and history are the artifact's own.
            base: its :func:`load_base`, where that was read before.
            lists: read the LM whose lists serve retrieval, where :attr:`reward` says that it is another one.

        Raises:
            UserError: there is no such artifact, or ``lists`` are asked of one that has no LM for them.
            LineageError: advertisers it was fitted on have other codes now or are gone, or the IDs are not those of
                the log's advertisers.
        """
        plain, fitted_ids = _fitted_on(directory, log, ids)
        if lists and not (directory / REWARD).is_dir():
            raise UserError(
                f"prior LM in {directory} without one for lists",
                expected="one whose reward stage was taken for lists alone",
                action="read the one that it has, for probabilities and lists alike",
            )
        model, base_model, constant_LH = load_model(directory / REWARD if lists else directory, plain, ids)
        base = _base_of(plain, log, ids) if base is None else base
        compiler = PromptCompiler(
            log,
            ids,
            base_model.tokenizer,
            PromptConfig.from_plain(plain["prompt"]),
            window=base_model.window,
            history=history_vectors(_history_config(plain), base.anchor.counts, ids, log, _history_categories(plain)),
        )
        return cls(
            model=model,
            base=base,
            calibration=Calibration.from_plain(plain["calibration"]),
            compiler=compiler,
            constant_LH=constant_LH,
            cfg=cfg,
            base_reference=plain["base_model"]["name"],
            fitted_ids=fitted_ids,
            interests=_interests_of(plain, log),
            reward=plain.get("reward", {}).get("accepted_for"),
            anchor_calibration=tuple(raised_L) if (raised_L := plain.get("anchor_calibration")) else None,
        )


def load_base(directory: Path, log: Log, ids: AdvertiserIds) -> TunedAnchor:
    """The tuned anchor of an artifact, without the LM over it.

    Args:
        directory, log, ids: as of :meth:`PriorModel.load`.

    Raises:
        UserError, LineageError: as of :meth:`PriorModel.load`.
    """
    plain, _ = _fitted_on(directory, log, ids)
    return _base_of(plain, log, ids)


def load_interests(directory: Path, log: Log) -> Interests | None:
    """What an artifact's interests are, and their anchor, without the LM over it; None where it forecasts none.

    Args:
        directory, log: as of :meth:`PriorModel.load`.

    Raises:
        UserError: there is no such artifact, or the log lacks the column of its interests.
    """
    return _interests_of(read_plain(directory), log)


def _interests_of(plain: dict[str, Any], log: Log) -> Interests | None:
    of_interests = plain.get("interests")  # an artifact from before there were interests has none
    return None if of_interests is None else Interests.from_plain(of_interests, log)


def _history_config(plain: dict[str, Any]) -> HistoryConfig:
    """The artifact's own; one from before there were history vectors has none, or reads them in one way only."""
    return HistoryConfig(**{"repeats": False} | plain["history"]) if "history" in plain else HistoryConfig(prompts=0)


def _history_size(plain: dict[str, Any], ids: AdvertiserIds) -> int:
    cfg = _history_config(plain)
    return history_size(ids, cfg.decays, _history_categories(plain)) if cfg.prompts else 0


def _history_categories(plain: dict[str, Any]) -> Categories:
    """Those that the history vectors tell, as of the fit; an artifact from before they could has none."""
    return Categories(tuple(plain.get("history_categories", [])), tuple(plain.get("history_browsed", [])))


def history_vectors(
    cfg: HistoryConfig, counts: Counts, ids: AdvertiserIds, log: Log, categories: Categories
) -> HistoryVectors | None:
    """What gives the history vectors; None where they are left out."""
    return HistoryVectors(counts, ids, decays=cfg.decays, log=log, categories=categories) if cfg.prompts else None


def heads_of(model: PriorLM) -> dict[str, Tensor]:
    """Weights and constants of all heads, by name in the model."""
    return {name: value.contiguous() for name, value in model.state_dict().items() if name.startswith(HEADS)}


def _base_of(plain: dict[str, Any], log: Log, ids: AdvertiserIds) -> TunedAnchor:
    return TunedAnchor.from_plain(plain["anchor"], Counts.of(log), Trie.from_codes(ids.codes_AL, ids.level_sizes))


def _fitted_on(directory: Path, log: Log, ids: AdvertiserIds) -> tuple[dict[str, Any], AdvertiserIds]:
    """What `read_plain` gives, and the IDs of the fit, which those given may have outgrown."""
    plain = read_plain(directory)
    fitted_ids = _same_codes(directory, plain["ids_version"], ids)
    check_advertisers(log, ids)
    return plain, fitted_ids


def read_plain(directory: Path) -> dict[str, Any]:
    """``prior.json`` of an artifact.

    Raises:
        UserError: there is none.
    """
    try:
        plain: dict[str, Any] = json.loads((directory / "prior.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"prior LM in {directory}",
            expected="a directory with prior.json",
            action="fit it first: train.py stage=prior",
        ) from error
    return plain


def load_model(directory: Path, plain: dict[str, Any], ids: AdvertiserIds) -> tuple[PriorLM, BaseModel, Tensor]:
    """The LM of an artifact, without prompts and anchor.

    Args:
        directory: the artifact.
        plain: its :func:`read_plain`.
        ids: codebooks it was fitted with.

    Returns:
        The LM in evaluation mode, the base model below it, and the mean of what the head reads at each level.

    Raises:
        LineageError: head or input rows fit neither the codebooks nor the base model.
    """
    weights = directory / "decoder"
    base_model = load_base_model(BaseModelConfig(**plain["base_model"]), weights=weights if weights.exists() else None)
    state = load_file(directory / "head.safetensors")
    decoder: Any = base_model.decoder
    added = {name: state.pop(name) for name in [*state] if name.startswith(_APPENDED)}
    if added:
        last_layer(decoder).load_state_dict({name.removeprefix(_APPENDED): value for name, value in added.items()})
    if (directory / "adapter").exists():
        decoder = PeftModel.from_pretrained(decoder, str(directory / "adapter"))
    id_rows, constant_LH = state.pop("id_rows"), state.pop("constant_LH")
    try:
        model = PriorLM(
            decoder,
            codebooks=[torch.from_numpy(vectors_VD) for vectors_VD in ids.code_vectors],
            id_rows=id_rows,
            first_id_token=plain["first_id_token"],
            head=plain["head"]["kind"],
            n_interests=len(plain["interests"]["names"]) if plain.get("interests") else None,
            history_size=_history_size(plain, ids),
            repeats=_history_config(plain).repeats,
        )
        given = model.load_state_dict(state, strict=False)
        lacking = sorted(set(heads_of(model)) & set(given.missing_keys)) + given.unexpected_keys
        if lacking:
            raise ValueError(f"a head of another kind: {', '.join(lacking)}")
    except (ValueError, RuntimeError) as error:
        raise LineageError(
            f"prior LM in {directory}: {str(error).splitlines()[-1].strip()}",
            expected="a head and input rows that fit the IDs' codebooks and the base model",
            action="take the IDs and the base model it was fitted with, or fit it again: train.py stage=prior",
        ) from error
    freeze_history(model)
    return model.eval(), base_model, constant_LH


def with_id_tokens(tokenizer: PreTrainedTokenizerBase, level_sizes: tuple[int, ...]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with ``<adv_level_code>`` tokens, numbered as the model numbers them."""
    tokenizer = copy.deepcopy(tokenizer)
    names = [f"<adv_{level + 1}_{code}>" for level, size in enumerate(level_sizes) for code in range(size)]
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    return tokenizer


def _appended(decoder: Any, cfg: BaseModelConfig) -> dict[str, Tensor]:
    """Weights of the appended layer, for the artifact."""
    if not cfg.appended_layer:
        return {}
    state = last_layer(decoder).state_dict()
    return {f"{_APPENDED}{name}": value.detach().contiguous() for name, value in state.items()}


def _same_codes(directory: Path, version: str, ids: AdvertiserIds) -> AdvertiserIds:
    """The IDs a prior was fitted on, if the given ones are the same or have only grown.

    Raises:
        LineageError: they are others.
    """
    if ids.version == version:
        return ids
    what = f"prior LM in {directory}, fitted on IDs {version[:12]}, with IDs {ids.version[:12]}"
    again = "take the IDs it was fitted on, or fit it again: train.py stage=prior"
    if not (directory / IDS).is_dir():
        raise LineageError(
            f"{what}; it is of an older adsid and keeps no copy of its IDs to compare with",
            expected="the advertiser IDs it was fitted on",
            action=again,
        )
    fitted = AdvertiserIds.load(directory / IDS)
    found = compare(fitted, ids)
    if not found.only_grew:
        raise LineageError(
            f"{what}: {found.in_words()}",
            expected="the advertiser IDs it was fitted on, or the same with new advertisers beside them",
            action=again,
        )
    return fitted


def check_advertisers(log: Log, ids: AdvertiserIds) -> None:
    """Row ``i`` of the IDs is advertiser ``i`` of the log.

    Raises:
        LineageError: it is not.
    """
    if np.array_equal(ids.advertiser_ids, log.advertiser_ids):
        return
    in_log, with_id = log.advertiser_ids.tolist(), ids.advertiser_ids.tolist()
    without, unknown = sorted({*in_log} - {*with_id}), sorted({*with_id} - {*in_log})
    told = [
        f"{len(some)} {which}, e.g. {some[0]}"
        for some, which in ((without, "of the log without an ID"), (unknown, "with an ID but not in the log"))
        if some
    ]
    what = "; ".join(told) or "in another order"
    raise LineageError(
        f"IDs of {len(ids)} advertisers for a log of {len(log.advertiser_ids)}: {what}",
        expected="one ID for each advertiser of the log, in its order",
        action="make the IDs of this log (adsid run run.until=semantic_ids), or take the log the IDs belong to",
    )
