"""The model card of a forecaster: what its configuration, its metrics and its files say, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from priors.base_model import why_random

_USE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory)
model = PeftModel.from_pretrained(model, f"{directory}/id_bias")  # the bias of the ID tokens' logits
```

The logits of ID tokens are what the LM adds to the counts. A forecast also needs the anchor's score of every code,
weighs both as `prior.json` says (`calibration`), and normalises over the codes that continue an advertiser's ID
(`ids/`). The adapters are merged and all weights are in float32."""


_NOT_THE_HISTORY = """

What the history vector adds (`prior.json`, `history`) is no function of the tokens and is not in these logits. A
forecast by this model and the anchor alone is the forecaster's without it; for the whole, load the artifact."""

_TAKEN = {
    "none": "its result is not used",
    "lists": "its lists serve retrieval (`reward/`); probabilities and ranking features are those from before it",
    "all": "its result is used for everything",
}


def _reward(metrics: Mapping[str, Any] | None) -> str:
    """What the reward stage did and what it is taken for, in one cell."""
    if not metrics:
        return "none"
    told = []
    for name, figures in metrics["select"].items():
        change = figures["difference"]
        told.append(
            f"{name} {figures['before']['value']:.4f} to {figures['after']['value']:.4f} "
            f"({change['value']:+.4f}, {change['low']:+.4f} to {change['high']:+.4f})"
        )
    judged = f"on the selection span, with 95 % intervals of the change: {'; '.join(told)}"
    return f"{metrics['prompts']} prompts; {_TAKEN[metrics['accepted_for']]}; {judged}"


def model_card(
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    versions: Mapping[str, str],
    plain: Mapping[str, Any],
    *,
    exported: bool,
) -> str:
    """Text of a ``README.md``.

    Args:
        config, metrics, versions: of the manifest of the stage ``prior``.
        plain: its ``prior.json``.
        exported: whether it goes with the plain causal LM or with the compact artifact.
    """
    prior, data = config["prior"], config["data"]
    base = plain["base_model"]
    random = why_random(base["name"], base.get("random_weights", False))
    weights = "its pretrained weights" if random is None else "random weights of its architecture"
    nll = metrics.get("select_nll_by_part") or []
    split = ", ".join(f"{name} {data['split'][name]}" for name in ("prior_fit", "prior_select"))
    history = plain.get("history")
    facts = {
        "Base model": f"`{base['name']}`, from {weights}",
        "Trained": _trained(prior, plain),
        "Data": f"`{data['source']}`; spans: {split} (by {data['split']['by']})",
        "Prompts": f"{metrics.get('prompts')}, at most {plain['prompt']['max_tokens']} tokens each",
        "Steps": metrics.get("steps"),
        "NLL on the selection span, after each part": ", ".join(f"{value:.4f}" for value in nll),
        "NLL of the anchor on the same prompts": f"{metrics.get('select_nll_anchor', float('nan')):.4f}",
        "Anchor": _anchor(metrics),
        "Kept": _kept(metrics),
        "History vector": _history(history, metrics.get("start")),
        "Interests": _interests(plain.get("interests"), metrics.get("interests")),
        "Reward stage": _reward(metrics.get("reward")),
        "Advertiser IDs": f"version `{plain['ids_version'][:12]}`",
        "Packages": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    }
    use = "`priors.artifact.PriorModel.load`; `adsid priors export` writes a plain causal LM of it."
    if exported:
        use = _USE + (_NOT_THE_HISTORY if history and history["prompts"] else "")
    command = "adsid priors export --run <run directory> --out <this directory>"
    made = f"`{command}`, of the stage `prior`" if exported else "the stage `prior` (`python train.py stage=prior`)"
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    settings = json.dumps(prior, indent=1, ensure_ascii=False)
    return f"""# Advertiser forecaster

A causal LM that reads a prompt about a user and scores the tokens of advertisers' semantic IDs. Made by {made}.

| | |
|---|---|
{table}

## Use

{use}

## Configuration

```json
{settings}
```
"""


def _trained(prior: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    """Which weights had a gradient, in words."""
    appended, rank = plain["base_model"].get("appended_layer"), prior["lora"]["rank"]
    parts = {
        "all weights": prior.get("train") == "full",
        f"LoRA of rank {rank}": prior.get("train") != "full" and rank > 0,
        "an appended layer": appended and prior.get("train") != "full",
        "the input rows of semantic IDs": plain["base_model"].get("train_input_rows"),
    }
    told = [name for name, trained in parts.items() if trained]
    return ", ".join([*told, f"a head of kind `{plain['head']['kind']}` over semantic IDs"])


def _anchor(metrics: Mapping[str, Any]) -> str:
    """The terms of the counting model, and why co-conversions are among them or not."""
    kind, gain = metrics.get("anchor_kind"), metrics.get("anchor_cooccurrence_gain")
    if kind is None:
        return "not told"
    if gain is None:
        return f"`{kind}`, as configured"
    change = f"{gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
    return f"`{kind}`: co-conversions change the NLL on the selection span by {change}"


def _kept(metrics: Mapping[str, Any]) -> str:
    """Whether these are trained weights, and what training changed on the selection span."""
    change = (metrics.get("start") or {}).get("select_change")
    if change is None:
        return "not told"
    told = f"the change of the NLL is {change['value']:+.4f} ({change['low']:+.4f} to {change['high']:+.4f})"
    if metrics["best_part"] < 0:
        return f"the weights that training started from, since none of its parts is shown to gain: {told} in the best"
    return f"the weights after part {metrics['best_part'] + 1}: against those that training started from, {told}"


def _history(plain: Mapping[str, Any] | None, start: Mapping[str, Any] | None) -> str:
    """What the head reads beside the prompt, in words."""
    if not plain or not plain["prompts"]:
        return "none"
    report = (start or {}).get("history")
    if report is None:
        return "beside the prompt"
    before, after = sum(report["nll_before"]), sum(report["nll_after"])
    return f"beside the prompt; fitted first: NLL on the selection span from {before:.4f} to {after:.4f}"


def _interests(plain: Mapping[str, Any] | None, metrics: Mapping[str, Any] | None) -> str:
    """The second thing that is forecast, in words."""
    if plain is None:
        return "none"
    of = f"{len(plain['names'])} values of the ads' column `{plain['column']}`, by a head and an anchor of their own"
    if not metrics:
        return of
    parts = ", ".join(f"{value:.4f}" for value in metrics["select_nll_by_part"])
    anchor = f"{metrics['select_nll_anchor']:.4f}"
    return f"{of}; weight {metrics['weight']:g}; NLL after each part {parts}, of the anchor {anchor}"
