"""What consolidating a whole 7B LLaVA costs, against the dense SVD of one of its matrices.

All linear layers of the language part of LLaVA-1.5-7B (32 layers x q, k, v, o, gate, up, down = 224 matrices), LoRA
factors of the given rank with random directions and a decaying spectrum. Timed, layer by layer:
`LowRankDelta.from_lora`, `consolidate_many` at its defaults, `to_lora`. Making the factors is not timed, and only one
layer of them exists at a time.

    python benchmarks/consolidation.py --output consolidation.json
    python benchmarks/consolidation.py --layers 2 --dense-size 0        # a quick look, without the dense comparison
    python benchmarks/consolidation.py --dense-size 4096 --dense-limit 1200

Memory is the peak of the process above its size before the first matrix, minus the factors of the one layer that is
there: what consolidation needs on top of the adapter itself. The dense comparison runs in a process of its own, with a
time limit: float32 SVD of one square matrix, rates, and the product back; for sizes below 4096 the time is
extrapolated with size^3 and marked so.

Measure on idle cores: threads of the linear algebra library wait for each other, so that on busy cores two can take ten
times longer than one. `--threads 1` and the CPU seconds are the figures that survive a busy machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from mllm_cl.spectral import LowRankDelta, consolidate, consolidate_many
from mllm_cl.spectral.rates import power_up

HIDDEN, INTERMEDIATE, LAYERS = 4096, 11008, 32
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN),
    "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
MIB = 2**20


def random_lora(
    out: int, in_: int, rank: int, dtype: torch.dtype, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """A spectrum near i^-0.8 in random directions, mixed so that no column shows it."""
    decay = torch.arange(1, rank + 1) ** -0.8
    mix = torch.randn(rank, rank, generator=generator) / rank**0.5
    lora_A = torch.randn(rank, in_, generator=generator) / in_**0.5
    lora_B = (torch.randn(out, rank, generator=generator) * decay) @ mix / out**0.5
    return lora_A.to(dtype), lora_B.to(dtype)


def resident_bytes() -> int:
    """Memory of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """The most memory this process ever had (Linux counts KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def time_low_rank(layers: int, rank: int, dtype: torch.dtype) -> dict[str, float]:
    """Seconds for all matrices, and the memory this takes beyond the factors."""
    generator = torch.Generator().manual_seed(0)
    LowRankDelta.from_lora(torch.eye(2), torch.eye(2))  # loads the linear algebra library
    before, layer_bytes, seconds, cpu_seconds = resident_bytes(), 0, 0.0, 0.0
    for layer in range(layers):
        loras = {
            f"layers.{layer}.{name}": random_lora(*shape, rank, dtype, generator) for name, shape in SHAPES.items()
        }
        layer_bytes = sum(t.numel() * t.element_size() for pair in loras.values() for t in pair)
        start, cpu_start = time.perf_counter(), time.process_time()
        done = consolidate_many({name: LowRankDelta.from_lora(*pair) for name, pair in loras.items()})
        for name, delta in done.items():
            for old, new in zip(loras[name], delta.to_lora(rank=rank), strict=True):
                old.copy_(new)
        seconds += time.perf_counter() - start
        cpu_seconds += time.process_time() - cpu_start
    return {
        "matrices": layers * len(SHAPES),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "adapter_mib": layers * layer_bytes / MIB,
        "extra_mib": (peak_bytes() - before - layer_bytes) / MIB,
    }


def time_one(size: int, rank: int, dtype: torch.dtype) -> float:
    """Median seconds of the low-rank route for one square matrix."""
    pair = random_lora(size, size, rank, dtype, torch.Generator().manual_seed(1))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        consolidate(LowRankDelta.from_lora(*pair)).to_lora(rank=rank)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def run_dense(size: int) -> None:
    """Child process: prints seconds and extra MiB of the dense route for one square matrix."""
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0))
    torch.linalg.svd(torch.eye(2))
    before, start = resident_bytes(), time.perf_counter()
    left, sigma, right_t = torch.linalg.svd(matrix, full_matrices=False)
    c = power_up(sigma)
    c = c * (0.5 * sigma.norm() / (c * sigma).norm())
    kept = (left * (c * sigma).float()) @ right_t
    print(
        json.dumps(
            {
                "norm": float(kept.norm()),
                "seconds": time.perf_counter() - start,
                "extra_mib": (peak_bytes() - before) / MIB,
            }
        )
    )


def time_dense(size: int, threads: int, limit: float) -> dict[str, float] | None:
    """Runs `run_dense` in a fresh process; `None` if it takes longer than `limit` seconds."""
    command = [sys.executable, __file__, "--child-dense", str(size), "--threads", str(threads)]
    try:
        answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    return json.loads(answer.stdout)


def table(result: dict) -> str:
    """The figures as a markdown table."""
    low, dense, size = result["low_rank"], result["dense"], result["dense_size"]
    name = f"{low['matrices']} matrices of a 7B LLaVA, rank {result['rank']} ({low['cpu_seconds']:.1f} CPU seconds)"
    lines = ["| | seconds | MiB above the adapter |", "|---|---|---|"]
    lines.append(f"| {name} | {low['seconds']:.1f} | {low['extra_mib']:.0f} |")
    if size:
        lines.append(f"| one {size} x {size}, low-rank route | {result['low_rank_one_seconds']:.3f} | |")
        if dense is None:
            lines.append(f"| one {size} x {size}, dense SVD | > {result['dense_limit']:g} (stopped) | |")
        else:
            ratio = dense["seconds"] / result["low_rank_one_seconds"]
            name = f"one {size} x {size}, dense SVD ({ratio:.0f} x)"
            lines.append(f"| {name} | {dense['seconds']:.1f} | {dense['extra_mib']:.0f} |")
            one = result["dense_one_4096_seconds"]
            if size != HIDDEN:
                lines.append(f"| one 4096 x 4096, dense SVD, *extrapolated* with size^3 | {one:.0f} | |")
            lines.append(f"| all 224, dense SVD, *extrapolated* with max min^2 | {result['dense_all_seconds']:.0f} | |")
    return "\n".join(lines)


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LAYERS, help="decoder layers to consolidate (default: 32)")
    parser.add_argument("--rank", type=int, default=128, help="LoRA rank (default: 128)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the adapter")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--dense-size", type=int, default=2048, help="side of the dense matrix; 0 leaves it out")
    parser.add_argument("--dense-limit", type=float, default=600, help="seconds after which the dense SVD is stopped")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--child-dense", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child_dense:
        run_dense(args.child_dense)
        return

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[args.dtype]
    result: dict = {
        "low_rank": time_low_rank(args.layers, args.rank, dtype),
        "rank": args.rank,
        "dtype": args.dtype,
        "threads": args.threads,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "dense_size": args.dense_size,
        "dense_limit": args.dense_limit,
        "dense": None,
    }
    if args.dense_size:
        result["low_rank_one_seconds"] = time_one(args.dense_size, args.rank, dtype)
        result["dense"] = time_dense(args.dense_size, args.threads, args.dense_limit)
        if result["dense"] is not None:
            per_unit = result["dense"]["seconds"] / args.dense_size**3
            work = sum(max(shape) * min(shape) ** 2 for shape in SHAPES.values()) * LAYERS
            result["dense_one_4096_seconds"] = per_unit * HIDDEN**3
            result["dense_all_seconds"] = per_unit * work
    print(table(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
