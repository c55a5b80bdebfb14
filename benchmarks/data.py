"""Reading at scale: indexing a LLaVA JSON, validating rows and images, and ten million rows in parquet shards.

    python benchmarks/data.py json --rows 665000
    python benchmarks/data.py parquet --rows 10000000 --shuffled 300000
    python benchmarks/data.py validate --rows 20000 --images 2000
    python benchmarks/data.py json --rows 665000 --with-datasets      the same by plain datasets.load_dataset

All files are synthetic and made first, in `--folder` (a temporary one by default). Every measurement runs in a process of
its own; memory is the growth of anonymous memory (files that are mapped into memory do not count) at its highest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TEXT = "the a red green small large car dog tree street on under beside with two three people stand run blue"
WORDS = TEXT.split()


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def make_json(path: Path, rows: int) -> None:
    """A LLaVA JSON like the mixture of LLaVA-1.5: about 1.4 kB and two questions a row."""
    rng = random.Random(0)
    pool = [sentence(rng, 60) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(rows):
            texts = [f"<image>\nWhat is in picture {number}?", *rng.choices(pool, k=3)]
            turns = [{"from": ("human", "gpt")[turn % 2], "value": text} for turn, text in enumerate(texts)]
            folder = ("coco/train2017", "gqa/images", "vg/VG_100K")[number % 3]
            row = {"id": f"{number:012d}", "image": f"{folder}/{number:012d}.jpg", "conversations": turns}
            file.write((",\n" if number else "\n") + json.dumps(row))
        file.write("\n]\n")


def make_parquet(folder: Path, rows: int, shards: int = 20) -> None:
    """Shards of text rows with an image path each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    each = rows // shards
    for shard in range(shards):
        numbers = range(shard * each, (shard + 1) * each)
        table = pa.table(
            {
                "id": [f"r{number}" for number in numbers],
                "query": [f"<image>What is in picture {number % 997}?" for number in numbers],
                "response": [WORDS[number % len(WORDS)] for number in numbers],
                "image": [f"images/{number % 100_000:06d}.jpg" for number in numbers],
            }
        )
        pq.write_table(table, folder / f"train-{shard:05d}-of-{shards:05d}.parquet", row_group_size=100_000)


def make_images(folder: Path, count: int) -> None:
    """JPEG files of 640 x 480."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / f"{number}.jpg", quality=85)


def anonymous_mib() -> float:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("this system does not say how much memory is anonymous")


def _measured(function: Callable[..., dict[str, Any]], arguments: tuple, queue: Any) -> None:
    import datasets  # not part of what is measured
    import numpy  # noqa: F401

    import mllm_cl.streams  # noqa: F401

    datasets.disable_progress_bars()
    before, most, is_done = anonymous_mib(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_done.wait(0.05):
            most = max(most, anonymous_mib())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started, used = time.perf_counter(), time.process_time()
    found = function(*arguments)
    seconds, used = time.perf_counter() - started, time.process_time() - used
    is_done.set()
    watcher.join()
    queue.put({"seconds": round(seconds, 1), "cpu": round(used, 1), "MiB": round(max(most, before) - before), **found})


def measure(name: str, function: Callable[..., dict[str, Any]], *arguments: Any) -> None:
    """Prints what a function costs in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_measured, args=(function, arguments, queue))
    process.start()
    found = queue.get()
    process.join()
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items()), flush=True)


def index_json(path: Path) -> dict[str, Any]:
    from mllm_cl.data.readers import read_rows

    rows = read_rows(path)
    return {"rows": len(rows), "last": rows[len(rows) - 1]["id"]}


def index_by_source(path: Path) -> dict[str, Any]:
    from mllm_cl.data.readers import read_rows_by

    parts = read_rows_by(path, lambda raw: raw["image"].split("/")[0])
    return {name: len(rows) for name, rows in parts.items()}


def load_json_with_datasets(path: Path, cache: str) -> dict[str, Any]:
    import datasets

    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
    return {"rows": len(rows), "last": rows[len(rows) - 1]["id"]}  # type: ignore[call-overload, arg-type]


def read_all(path: Path) -> dict[str, Any]:
    from mllm_cl.data.readers import read_rows

    return {"rows": sum(1 for _ in read_rows(path))}


def open_parquet(folder: Path) -> dict[str, Any]:
    from mllm_cl.data.readers import read_rows

    return {"rows": len(read_rows(folder))}


def iterate_parquet(folder: Path, most: int, is_shuffled: bool) -> dict[str, Any]:
    from mllm_cl.data.order import shuffled
    from mllm_cl.data.readers import read_rows

    rows = read_rows(folder)
    before, highest = anonymous_mib(), 0.0
    started, used = time.perf_counter(), time.process_time()
    count = 0
    for _ in shuffled(rows) if is_shuffled else rows:
        count += 1
        if count % 10_000 == 0:
            highest = max(highest, anonymous_mib())
        if count == most:
            break
    return {"rows": count, **rates(count, started, used), "MiB grown while iterating": round(highest - before, 1)}


def rates(count: int, started: float, used: float) -> dict[str, int]:
    """Rows per second since two readings of the clocks, and per second of CPU time."""
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    return {"rows/s": round(count / seconds), "rows/CPU s": round(count / cpu)}


def iterate_with_datasets(folder: Path, most: int, cache: str) -> dict[str, Any]:
    import datasets

    rows: Any = datasets.load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", cache_dir=cache)
    started, used = time.perf_counter(), time.process_time()
    count = 0
    for _ in rows:
        count += 1
        if count == most:
            break
    return {"rows": count, **rates(count, started, used)}


def validate(path: Path, images: Path, check: str, workers: int) -> dict[str, Any]:
    from mllm_cl.data.validate import Checks, validate_file

    problems = validate_file(path, image_folder=images, checks=Checks(images=check, workers=workers))  # type: ignore[arg-type]
    return {"problems": len(problems)}


def python_share(path: Path, images: Path, rounds: int = 5) -> dict[str, Any]:
    """What a validation costs beyond what the decoder itself does: the two in turn, medians of CPU time."""
    from statistics import median

    from PIL import Image

    from mllm_cl.data.validate import Checks, validate_file

    files = sorted((images / "images").glob("*.jpg"))

    def decode() -> None:
        for file in files:
            with Image.open(file) as image:
                image.draft("RGB", (64, 64))
                image.load()

    def check(workers: int) -> None:
        assert not validate_file(path, image_folder=images, checks=Checks(workers=workers))

    def cpu(function: Callable[[], None]) -> float:
        started = time.process_time()
        function()
        return time.process_time() - started

    ratios: dict[str, list[float]] = {"1 thread": [], "8 threads": []}
    for _ in range(rounds):
        bare = cpu(decode)
        for name, workers in (("1 thread", 1), ("8 threads", 8)):
            ratios[name].append(cpu(lambda workers=workers: check(workers)) / bare)
    return {f"CPU of validating / of decoding alone, {name}": round(median(found), 2) for name, found in ratios.items()}


def make_validation(folder: Path, rows: int, images: int) -> Path:
    make_images(folder / "images", images)
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            row = {"id": number, "query": "<image>What?", "response": "red", "image": f"images/{number % images}.jpg"}
            file.write(json.dumps(row) + "\n")
    return path


def make_plain(folder: Path, images: int) -> Path:
    path = folder / "plain.jsonl"
    rows = ({"id": n, "query": "<image>What?", "response": "red", "image": f"images/{n}.jpg"} for n in range(images))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("json", "parquet", "validate"))
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--most", type=int, default=0, help="rows to iterate over; all by default")
    parser.add_argument(
        "--shuffled", type=int, default=0, help="rows to iterate over in shuffled order; as --most by default"
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--with-datasets", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, most = Path(name), options.most or options.rows
        cache = str(folder / "cache")
        if options.what == "json":
            path = folder / "mix.json"
            make_json(path, options.rows)
            print(f"{path.stat().st_size / 1e9:.2f} GB")
            measure("index", index_json, path)
            measure("index by source", index_by_source, path)
            measure("read every row", read_all, path)
            if options.with_datasets:
                measure("datasets.load_dataset", load_json_with_datasets, path, cache)
        elif options.what == "parquet":
            make_parquet(folder / "shards", options.rows)
            measure("open (first time, converts)", open_parquet, folder / "shards")
            measure("open (again)", open_parquet, folder / "shards")
            measure("iterate", iterate_parquet, folder / "shards", most, False)
            measure("iterate shuffled", iterate_parquet, folder / "shards", options.shuffled or most, True)
            if options.with_datasets:
                measure("datasets.load_dataset", iterate_with_datasets, folder / "shards", most, cache)
        else:
            path = make_validation(folder, options.rows, options.images)
            for check in ("none", "exists", "header", "decode"):
                for workers in (1, 8):
                    measure(f"images {check}, {workers} threads", validate, path, folder, check, workers)
            measure("share of Python, one row per image", python_share, make_plain(folder, options.images), folder)


if __name__ == "__main__":
    main()
