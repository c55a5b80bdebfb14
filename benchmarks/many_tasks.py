"""Does a long stream stay flat? Seconds and resident memory per stage over many small tasks, evaluation apart.

    python benchmarks/many_tasks.py                                  # 30 tasks, stacked adapters
    python benchmarks/many_tasks.py --method spectral_consolidation --tasks 100 --output many_tasks.json

The model has random weights; what is measured is what the protocol adds: a trainer per task, adapters that come and go,
consolidation with recompression, stages on disk. The consolidated adapter grows until it has its full rank, so the slopes are of
the second half.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from mllm_cl.data.rows import Row, Rows, assistant_message, user_message
from mllm_cl.models.tiny import build_fixture
from mllm_cl.recipe import Recipe, load_recipe
from mllm_cl.streams import Stream, Task
from mllm_cl.training.capabilities import build_methods
from mllm_cl.training.loop import Run
from mllm_cl.training.progress import Silent
from mllm_cl.training.run_folder import find_run

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


def make_stream(tasks: int, rows: int) -> Stream:
    """Tasks about the colour of a square; every task asks in its own words."""

    def row(task: int, index: int) -> Row:
        colour = list(COLOURS)[(task + index) % len(COLOURS)]
        messages = [user_message(f"Question {task}: which colour is this?", 1), assistant_message(f"{colour} {task}")]
        return {"id": str(index), "messages": messages, "images": [Image.new("RGB", (16, 16), COLOURS[colour])]}

    made = [
        Task(f"task-{task}", train=Rows([row(task, index) for index in range(rows)]), test=Rows([row(task, 0)]))
        for task in range(1, tasks + 1)
    ]
    return Stream("many", tuple(made), fingerprint=f"many/{tasks}/{rows}")


def make_recipe(folder: Path, method: str) -> Recipe:
    adapters = {"adapters": "stacked"} if method == "finetune" else {}
    return load_recipe(
        {
            "name": "many tasks",
            "output_dir": str(folder / "run"),
            "model": {
                "name_or_path": str(build_fixture(folder / "model")),
                "lora": {"r": 8, "lora_alpha": 16},
                **adapters,
            },
            "stream": {"path": "in memory"},
            "methods": [method],
            "training": {"learning_rate": 1e-3, "per_device_train_batch_size": 8, "save_strategy": "no"},
        }
    )


def slope(values: list[float]) -> float:
    """Least-squares slope per stage."""
    count = len(values)
    middle, mean = (count - 1) / 2, sum(values) / count
    spread = sum((index - middle) ** 2 for index in range(count))
    return sum((index - middle) * (value - mean) for index, value in enumerate(values)) / spread if spread else 0.0


def measure(method: str, tasks: int, rows: int) -> dict[str, Any]:
    """Learns the stream stage by stage and returns what each stage took."""
    process, stages = psutil.Process(), []
    with tempfile.TemporaryDirectory() as folder:
        recipe, stream = make_recipe(Path(folder), method), make_stream(tasks, rows)
        run = Run(recipe, find_run(recipe), stream, build_methods(recipe), Silent(), "single")
        for stage, task in enumerate(stream, start=1):
            started, busy = time.perf_counter(), time.process_time()
            run.learn(stage, task)
            seconds, busy = time.perf_counter() - started, time.process_time() - busy
            rss = process.memory_info().rss / 2**20
            stages.append({"stage": stage, "seconds": seconds, "cpu_seconds": busy, "rss_mib": rss})
    half = stages[tasks // 2 :]
    return {
        "method": method,
        "tasks": tasks,
        "rows": rows,
        "threads": torch.get_num_threads(),
        "stages": stages,
        "slope_seconds_per_stage": slope([stage["seconds"] for stage in half]),
        "slope_cpu_seconds_per_stage": slope([stage["cpu_seconds"] for stage in half]),
        "slope_mib_per_stage": slope([stage["rss_mib"] for stage in half]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="finetune", help="name of a method; finetune runs with stacked adapters")
    parser.add_argument("--tasks", type=int, default=30)
    parser.add_argument("--rows", type=int, default=16, help="training rows per task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    result = measure(options.method, options.tasks, options.rows)
    print("stage  seconds  of the processor  RSS in MiB")
    for stage in result["stages"]:
        print("{stage:5d}  {seconds:7.3f}  {cpu_seconds:16.3f}  {rss_mib:10.1f}".format(**stage))
    print(f"slope of the second half, per stage: {1000 * result['slope_seconds_per_stage']:+.2f} ms, ", end="")
    print(f"{1000 * result['slope_cpu_seconds_per_stage']:+.2f} ms of the processor, ", end="")
    print(f"{result['slope_mib_per_stage']:+.3f} MiB")
    if options.output:
        options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
