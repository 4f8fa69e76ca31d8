"""Which messages of libraries are kept back; light to import, for it comes before them."""

from __future__ import annotations

import logging
import warnings

QUIET_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",  # devices seen, tips, "max_epochs reached"
    "lightning.pytorch.accelerators.cuda",
    "lightning.pytorch.trainer.connectors.checkpoint_connector",  # how a checkpoint is read
    "torchrec",
    "fbgemm_gpu",
    "transformers",
    "faiss.loader",
    "torch.distributed.elastic",
)
"""Loggers of libraries whose messages below an error say nothing a user could act on."""

QUIET_WARNINGS: tuple[tuple[str, str], ...] = (
    (r"lightning\..*", ".*does not have many workers.*"),  # on two cores, workers take time from the model
    (r"lightning\..*", ".*exists and is not empty.*"),  # the work directory of a resumed stage
    (r"lightning\..*", ".*Consider setting `?persistent_workers.*"),
    (r"lightning\..*", ".*smaller than the logging interval.*"),
    (r"lightning\..*", ".*in eval mode at the start of training.*"),  # the reward stage draws from what it trains
    (r"lightning\..*", ".*have no `val_dataloader`.*"),  # and is judged at its end
    (r"torch\..*", ".*does not have a deterministic implementation.*"),  # asked for with deterministic="warn"
    (r"torch\..*", ".*`torch.jit.*deprecated.*"),
    (r"torchrec\..*", ".*"),
    (r"fbgemm_gpu\..*", ".*"),
)
"""Module and message, as patterns, of warnings about how libraries are used here on purpose."""


def quiet_libraries() -> None:
    """Keep the listed messages back; ``--debug`` shows them all."""
    for name in QUIET_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for module, message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
