"""Fine-tuning the forecaster: trees of targets against TRL's ``SFTTrainer`` and the bare model, in one run.

    python -m benchmarks.sft /data/tables /data/ids minutes=20
    python -m benchmarks.sft /data/tables /data/ids minutes=6 prior.prompt.max_tokens=96

``/data/tables`` are the five tables of The Complete Journey (``adsid data prepare``), ``/data/ids`` advertiser IDs made
of them (the stage ``semantic_ids``). All sides have the same base model (bf16, frozen), LoRA of the same rank on the
same layers, the same prompts of the fit span, rates, warm-up and cosine, and the same minutes of training after their
start; each is a process of its own, one after the other.

*trl*: one advertiser a prompt as completion, the three ID tokens; their rows, tied in input and output, start from the
words of their advertisers and are trained (``trainable_token_indices``). Each prompt is shown with one of its targets,
drawn anew in each pass, which weighs prompts as the measure does. Of padded and packed batches, attention
implementations and autocast the quickest is taken, by a trial of some steps.
*ours*: all targets of a prompt (up to ``max_targets``) in one tree, over the anchor; *ours, no anchor*: the same over a
uniform base, so that both sides know nothing of counts but what the prompt says.

NLL is that of the targets of the selection prompts over the legal children of the trie, mean over prompts. Bars: four
times TRL's target advertisers a second, a lower NLL, and 0.85 of the tokens a second of forward and backward alone on
dense batches of the same model; tokens are those of prompts and trees, without padding. Rates are also given by time of
the cores, which other work on the machine changes little.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.measure import in_own_process, row, serve
from data.log import Log, load_log
from models.prior_lm import TreeBatch, row_nll, target_log_prob
from pipeline.config import compose
from pipeline.quiet import quiet_libraries
from priors.anchor import Anchor, AnchorConstants, Counts, TunedAnchor
from priors.base_model import BaseModel, load_base_model, packaged_model
from priors.config import PriorConfig
from priors.dataset import PromptDataset, TreeCollator
from priors.fit import adapted_modules, batches, build_model, fit_anchor, fit_lm, sample_rows, word_rows
from priors.prompt import PromptCompiler
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.trie import Trie

MODULE = "benchmarks.sft"
BASE = ("data=complete_journey", "experiment=full", "trainer.progress_bar=false", "trainer.accelerator=cpu",
        "prior.base.dtype=bfloat16", "prior.trainer.max_epochs=1", "prior.select_prompts=256")  # fmt: skip
TRIAL_PROMPTS, TRIAL_STEPS = 64, 4
TRL_VARIANTS: tuple[dict[str, Any], ...] = (
    {"attention": "sdpa", "batch": 8, "packing": False, "autocast": False},
    {"attention": "eager", "batch": 8, "packing": False, "autocast": False},
    {"attention": "eager", "batch": 8, "packing": False, "autocast": True},
    {"attention": "eager", "batch": 16, "packing": False, "autocast": True},
    {"attention": "sdpa", "batch": 1, "packing": True, "autocast": True},
)


def main() -> None:
    """Run all sides and print the rows."""
    quiet_libraries()
    if serve({"ours": ours, "uniform": uniform, "bare": bare, "trial": trl_trial, "trl": trl}):
        return
    given = [word for word in sys.argv[3:] if word.startswith("minutes=")]
    minutes = float(given[-1].removeprefix("minutes=")) if given else 20.0
    overrides = [word for word in sys.argv[3:] if word not in given]
    argument = {"tables": sys.argv[1], "ids": sys.argv[2], "minutes": minutes, "overrides": overrides}

    def run(case: str, **more: Any) -> dict[str, float]:
        return in_own_process(MODULE, case, json.dumps(argument | more))

    trial = run("trial")
    variant = int(trial["variant"])
    theirs = run("trl", variant=variant, steps=max(TRIAL_STEPS, int(60 * minutes * trial["steps_a_second"])))
    dense, anchored, plain = run("bare"), run("ours"), run("uniform")

    ratio = anchored["targets_a_second"] / theirs["targets_a_second"]
    row("target advertisers learned, ours", anchored["targets_a_second"], "1/s", ratio=ratio)
    per_core = anchored["targets_a_core_second"] / theirs["targets_a_core_second"]
    row("the same by time of the cores", anchored["targets_a_core_second"], "1/core-second", ratio=per_core)
    row(f"target advertisers learned, trl {TRL_VARIANTS[variant]}", theirs["targets_a_second"], "1/s")
    row(
        "prompts read, ours",
        anchored["prompts_a_second"],
        "1/s",
        ratio=anchored["prompts_a_second"] / theirs["prompts_a_second"],
    )
    for name, side in (("ours", anchored), ("ours, no anchor", plain), ("trl", theirs)):
        row(
            f"selection NLL after {side['minutes']:.1f} minutes, {name}",
            side["nll"],
            "nat",
            ratio=side["nll"] / theirs["nll"],
        )
        row(f"prompts seen, {name}", side["prompts"], "prompts")
        row(f"peak memory, {name}", side["peak_gib"], "GiB", ratio=side["peak_gib"] / theirs["peak_gib"])
    row("selection NLL of the anchor alone", anchored["base_nll"], "nat")
    row("selection NLL of a uniform choice at each level", plain["base_nll"], "nat")
    row("tokens, ours over the bare model", anchored["tokens_a_second"], "1/s",
        ratio=anchored["tokens_a_second"] / dense["tokens_a_second"])  # fmt: skip
    row("the same by time of the cores", anchored["tokens_a_core_second"], "1/core-second",
        ratio=anchored["tokens_a_core_second"] / dense["tokens_a_core_second"])  # fmt: skip
    row("tokens, bare model, dense batches", dense["tokens_a_second"], "1/s")
    row("tokens, trl over the bare model", theirs["tokens_a_second"], "1/s",
        ratio=theirs["tokens_a_second"] / dense["tokens_a_second"])  # fmt: skip


@dataclass(frozen=True)
class Setup:
    """What all sides share."""

    log: Log
    ids: AdvertiserIds
    trie: Trie
    cfg: PriorConfig
    base_model: BaseModel
    compiler: PromptCompiler
    train: PromptDataset
    select: PromptDataset
    uniform: TunedAnchor
    minutes: float
    argument: dict[str, Any]

    @classmethod
    def of(cls, text: str) -> Setup:
        argument = json.loads(text)
        config = compose([*BASE, *argument["overrides"]])
        log, ids = (
            load_log(Path(argument["tables"]), config.data, evaluate="validation"),
            AdvertiserIds.load(Path(argument["ids"])),
        )
        cfg, trie = config.prior, Trie.from_codes(ids.codes_AL, ids.level_sizes)
        base_model = load_base_model(cfg.base)
        compiler = PromptCompiler(log, ids, base_model.tokenizer, cfg.prompt, window=base_model.window)
        rows = log.advertiser_targets(cfg.prompt_span(log.split.prior_fit))
        train = PromptDataset(
            sample_rows(rows, cfg.prompts, cfg.seed), compiler, max_targets=cfg.max_targets, seed=cfg.seed
        )
        select = PromptDataset(
            sample_rows(log.advertiser_targets("prior_select"), cfg.select_prompts, cfg.seed), compiler
        )
        anchor = Anchor(Counts.of(log), AnchorConstants())
        flat = TunedAnchor(anchor, trie, np.zeros(trie.n_levels), [np.zeros(size) for size in trie.level_sizes])
        return cls(log, ids, trie, cfg, base_model, compiler, train, select, flat, argument["minutes"], argument)


# --- ours --------------------------------------------------------------------------------------------------


def ours(argument: str) -> dict[str, Any]:
    """Trees over the tuned anchor."""
    setup = Setup.of(argument)
    choose = PromptDataset(
        sample_rows(setup.log.advertiser_targets("prior_select"), 1000, setup.cfg.seed), setup.compiler
    )
    base, _ = fit_anchor(setup.uniform.anchor.counts, setup.trie, setup.train, choose, setup.cfg.anchor)
    return _ours(setup, base)


def uniform(argument: str) -> dict[str, Any]:
    """Trees over a base that knows nothing."""
    setup = Setup.of(argument)
    return _ours(setup, setup.uniform)


def _ours(setup: Setup, base: TunedAnchor) -> dict[str, Any]:
    collator = TreeCollator(base, first_id_token=setup.compiler.first_id_token)

    def trained(prompts: int) -> tuple[_Meter, float, float]:
        rows = sample_rows(setup.train.targets, prompts, setup.cfg.seed)
        train = PromptDataset(rows, setup.compiler, max_targets=setup.cfg.max_targets, seed=setup.cfg.seed)
        base_model = load_base_model(setup.cfg.base)
        model = build_model(base_model, setup.ids, setup.log, setup.compiler, setup.cfg)
        meter = _Meter()
        with tempfile.TemporaryDirectory() as work:
            fit_lm(model, train, setup.select, collator, setup.cfg, user_ids=setup.log.user_ids,
                   work_dir=Path(work), callbacks=(meter,))  # fmt: skip
        nll, base_nll = [], []
        with torch.inference_mode():
            for batch in batches(setup.select, collator, 8):
                nll.append(row_nll(batch, target_log_prob(batch, model.log_probs(batch))))
                scores = [decisions.base_NV.log_softmax(-1) for decisions in batch.levels]
                base_nll.append(row_nll(batch, target_log_prob(batch, scores)))
        return meter, float(torch.cat(nll).mean()), float(torch.cat(base_nll).mean())

    # The schedule of the rates ends with the prompts, so their number is set before.
    rate = trained(TRIAL_PROMPTS)[0].prompts_a_second
    meter, nll, base_nll = trained(min(len(setup.train), round(60 * setup.minutes * rate)))
    return meter.figures() | {"nll": nll, "base_nll": base_nll}


class _Meter(Callback):
    """What was learned, from the second step on."""

    def __init__(self) -> None:
        self.begun, self.first, self.last = 0.0, 0.0, 0.0
        self.cores = [0.0, 0.0]
        self.targets, self.prompts, self.tokens, self.all_prompts = 0, 0, 0, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.begun = self.last = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: TreeBatch, batch_idx: int
    ) -> None:
        self.last = time.monotonic()
        self.all_prompts += batch.n_prompts
        if not self.first:
            self.first, self.cores[0] = self.last, time.process_time()
            return
        self.cores[1] = time.process_time()
        self.targets += len(batch.target_row_Y)
        self.prompts += batch.n_prompts
        # Padding and a prompt's first token see themselves alone.
        self.tokens += int((batch.visible_BTT.sum(-1) > 1).sum()) + batch.n_prompts

    @property
    def prompts_a_second(self) -> float:
        return self.prompts / (self.last - self.first)

    def figures(self) -> dict[str, float]:
        seconds, core_seconds = self.last - self.first, self.cores[1] - self.cores[0]
        return {
            "targets_a_second": self.targets / seconds,
            "targets_a_core_second": self.targets / core_seconds,
            "prompts_a_second": self.prompts / seconds,
            "tokens_a_second": self.tokens / seconds,
            "tokens_a_core_second": self.tokens / core_seconds,
            "minutes": (self.last - self.begun) / 60,
            "prompts": self.all_prompts,
        }


def bare(argument: str) -> dict[str, Any]:
    """Forward and backward of the same adapted decoder on dense batches, without data, head or optimiser."""
    setup = Setup.of(argument)
    model = build_model(setup.base_model, setup.ids, setup.log, setup.compiler, setup.cfg).train()
    collator = TreeCollator(setup.uniform, first_id_token=setup.compiler.first_id_token)
    length = round(np.mean([collator.length(setup.train[index]) for index in range(200)]))
    tokens_BT = torch.randint(0, 1000, (setup.cfg.batch_size, length))
    best, by_core = 0.0, 0.0
    for attention in ("sdpa", "eager"):
        decoder: Any = model.decoder
        decoder.get_base_model().set_attn_implementation(attention)
        for step in range(2 + 8):
            if step == 2:
                started, cores = time.monotonic(), time.process_time()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                hidden = decoder(inputs_embeds=model.embed(tokens_BT), use_cache=False).last_hidden_state
            hidden.float().square().mean().backward()
        best = max(best, 8 * tokens_BT.numel() / (time.monotonic() - started))
        by_core = max(by_core, 8 * tokens_BT.numel() / (time.process_time() - cores))
    return {"tokens_a_second": best, "tokens_a_core_second": by_core}


# --- TRL ---------------------------------------------------------------------------------------------------


def trl_trial(argument: str) -> dict[str, Any]:
    """The quickest way to run TRL here."""
    setup = Setup.of(argument)
    rates = [_trl(setup, variant, TRIAL_STEPS, 1e9)[1] for variant in TRL_VARIANTS]
    best = int(np.argmax([rate["targets_a_second"] for rate in rates]))
    return {"variant": best, "steps_a_second": rates[best]["steps_a_second"]}


def trl(argument: str) -> dict[str, Any]:
    """TRL for as long as asked."""
    setup = Setup.of(argument)
    variant = TRL_VARIANTS[setup.argument["variant"]]
    model, figures = _trl(setup, variant, setup.argument["steps"], 60 * setup.minutes)
    return figures | {"nll": _legal_nll(setup, model)}


def _trl(setup: Setup, variant: dict[str, Any], steps: int, limit: float) -> tuple[Any, dict[str, Any]]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cfg, first, n_ids = setup.cfg, setup.compiler.first_id_token, sum(setup.ids.level_sizes)
    directory = str(packaged_model(cfg.base.name)) if cfg.base.name.startswith("packaged:") else cfg.base.name
    causal: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    causal.set_attn_implementation(variant["attention"])
    causal.resize_token_embeddings(max(causal.config.vocab_size, first + n_ids), mean_resizing=False)
    rows_VH = word_rows(setup.base_model, setup.ids, setup.log)
    causal.get_input_embeddings().weight.data[first : first + n_ids] = rows_VH.to(torch.bfloat16)
    adapter = LoraConfig(
        r=cfg.lora.rank,
        lora_alpha=cfg.lora.alpha,  # type: ignore[arg-type]
        target_modules=[f"model.{name}" for name in adapted_modules(causal.model, cfg.lora)],
        trainable_token_indices={"embed_tokens": list(range(first, first + n_ids))},
        task_type="CAUSAL_LM",
    )
    model: Any = get_peft_model(causal, adapter)
    model.get_output_embeddings().bias = None  # TRL asks for it, peft's wrapper of a tied head does not hand it on
    per_batch = variant["batch"] * (1024 // 128 if variant["packing"] else 1)
    examples = _completions(setup, min(60_000, (steps + 8) * per_batch * 2))
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name],
            "lr": cfg.lora.learning_rate,
        },
        {
            "params": [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name],
            "lr": cfg.head.learning_rate,
        },
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

    class Meter(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun, self.ends, self.cores = time.monotonic(), list[float](), list[float]()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.ends.append(time.monotonic())
            self.cores.append(time.process_time())
            if self.ends[-1] - self.begun > limit:
                control.should_training_stop = True

    class Counted(SFTTrainer):
        counts: list[tuple[int, int]]

        def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            in_completions = int((inputs["labels"] != -100).sum())
            real = inputs["attention_mask"].sum() if "attention_mask" in inputs else inputs["input_ids"].numel()
            self.counts.append((in_completions // setup.trie.n_levels, int(real)))
            return super().compute_loss(model, inputs, *args, **kwargs)

    meter = Meter()
    with tempfile.TemporaryDirectory() as work:
        settings = SFTConfig(
            output_dir=work, per_device_train_batch_size=variant["batch"], max_steps=steps, packing=variant["packing"],
            max_length=1024, bf16=variant["autocast"], gradient_checkpointing=False, lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10), use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no",
            disable_tqdm=True, dataloader_pin_memory=False, seed=cfg.seed, shuffle_dataset=False,
        )  # fmt: skip
        trainer = Counted(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list(examples),
            processing_class=setup.base_model.tokenizer,
            callbacks=[meter],
            optimizers=(optimizer, None),
        )
        trainer.counts = []
        trainer.train()
    seconds, counted = meter.ends[-1] - meter.ends[0], trainer.counts[1 : len(meter.ends)]
    targets = sum(count for count, _ in counted)
    return model, {
        "targets_a_second": targets / seconds,
        "targets_a_core_second": targets / (meter.cores[-1] - meter.cores[0]),
        "prompts_a_second": targets / seconds,
        "tokens_a_second": sum(tokens for _, tokens in counted) / seconds,
        "steps_a_second": len(counted) / seconds,
        "minutes": (meter.ends[-1] - meter.begun) / 60,
        "prompts": sum(count for count, _ in trainer.counts),
    }


def _completions(setup: Setup, n: int) -> list[dict[str, list[int]]]:
    """Prompts with one of their targets as completion; passes over all prompts, each with targets drawn anew."""
    rng, offset = np.random.default_rng(setup.cfg.seed), setup.compiler.first_id_token
    starts = offset + np.concatenate([[0], np.cumsum(setup.ids.level_sizes[:-1])])

    def passes() -> Iterator[int]:
        while True:
            yield from rng.permutation(len(setup.train)).tolist()

    examples: list[dict[str, list[int]]] = []
    for index in passes():
        example = setup.train[index]
        prompt, completion = (
            example.token_ids.tolist(),
            (starts + setup.ids.codes_AL[rng.choice(example.targets)]).tolist(),
        )
        examples.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
        if len(examples) == n:
            return examples
    return examples


@torch.inference_mode()
def _legal_nll(setup: Setup, model: Any) -> float:
    """NLL of the selection prompts' targets over legal children, of a causal LM that has ordinary ID rows."""
    model.eval()
    causal, first = model.get_base_model(), setup.compiler.first_id_token
    causal.set_attn_implementation("sdpa")
    embedding, head_VH = model.get_input_embeddings(), model.get_output_embeddings().weight.float()
    nll = []
    for batch in batches(setup.select, TreeCollator(setup.uniform, first_id_token=first), 8):
        hidden_BTH = causal.model(
            inputs_embeds=embedding(batch.input_ids_BT),
            attention_mask=torch.where(batch.visible_BTT, 0.0, torch.finfo(torch.bfloat16).min).to(torch.bfloat16)[
                :, None
            ],
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).last_hidden_state
        start, log_probs = first, []
        for decisions in batch.levels:
            rows_VH = head_VH[start : start + decisions.base_NV.shape[1]]
            start += len(rows_VH)
            at_NH = hidden_BTH[decisions.row_N, decisions.position_N].float()
            log_probs.append((at_NH @ rows_VH.T + decisions.base_NV).log_softmax(-1))
        nll.append(row_nll(batch, target_log_prob(batch, log_probs)))
    return float(torch.cat(nll).mean())


if __name__ == "__main__":
    main()
