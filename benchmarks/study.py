"""The LLaVA-c study: runs what is missing and writes every table and figure of docs/llava_c.md.

    python benchmarks/study.py --output runs/study                    # everything; interrupted, it continues
    python benchmarks/study.py --output runs/study --chapters pilot   # one chapter
    python benchmarks/study.py --output runs/study --reduced          # one seed, short training, in minutes
    python benchmarks/study.py --output runs/study --report-only      # only the page, from what was measured
    python benchmarks/study.py --output runs/again --measured again.jsonl    # does not read what others have measured

Chapters: `pilot` (SAC variants on the same pair of checkpoints, at equal update norm), `presets` (UIR presets and
weights), `chain` (SAC variants with UIR in the loop), `trainings` (learning rate and rows per step, for each method),
`strengths` (of SAC, with the best of these), `inquiries` (their number and weight with the best of these, all rows),
`common` (the default against the other methods on the quickstart stream, one training for all), `streams` (on three
streams in two orders, each method with its own training), `pretraining` (the general mixture source by source, from a
model that can only describe pictures), `together` (with a small replay, with per-task adapters), `spectra` (singular
values of the updates), `goal` (what of `streams` reaches the aim).
Choices are made on validation splits (`pilot` to `inquiries`), all but the last with half of the quickstart stream's
training rows; `common` to `together` report on test splits, with all of them. The numbers of each finished
run become a line of docs/measured/runs.jsonl; `pilot` and `spectra` are made from the checkpoints of one run.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from measured import MEASURED, Measured, cells
from run_grid import NOT_RUN, ROOT, Job, table
from study_pair import pilot_rows, spectra_rows
from study_pretraining import make_captioner, pretraining_jobs

PAGE = ROOT / "docs" / "llava_c.md"
SAC, UIR = "spectral_consolidation", "inquiry_regularization"
# the defaults until the chapter `inquiries` had been run: half of the inquiries for all earlier tasks together
HALF_SHARED: dict[str, Any] = {"ratio": 1.0, "memory_ratio": 0.0}
SHARED, SAC_1 = {UIR: HALF_SHARED}, {SAC: {"strength": 1.0}}
SATURATE = {SAC: {"rate": "saturate"}}  # SAC's until the chain had been run
QUARTER: dict[str, Any] = {"memory_ratio": 0.25}
LLAVA_C, OLD = "LLaVA-c (SAC + UIR)", "LLaVA-c, shared inquiries"
TASKS = {
    "quickstart": ("digit-parity", "face-check", "compass", "surface-options", "coin-count", "ink-list"),
    "study-letters": ("letter-case", "vowel-check", "letter-count", "letter-side"),
    "study-surfaces": ("surface-name", "lighting", "mixed-halves", "frame-check"),
}
COLUMNS = {  # name in the measured runs, decimals
    "final average": ("mean_final_accuracy", 1),
    "just learnt": ("mean_finetune_accuracy", 1),
    "backward transfer": ("backward_transfer", 1),
    "change of general ability": ("general_change", 1),
    "feature shift": ("feature_shift", 3),
    "one-word answers": ("one_word_share", 1),
}
RUN = ("presets", "chain", "trainings", "strengths", "inquiries", "common", "streams", "pretraining", "together")
CHAPTERS = ("pilot", *RUN, "spectra", "goal")
HALF = {"stream": {"limit": {"train": 320, "validation": 80}}}
SHORT = {"training": {"num_train_epochs": 1}, "stream": {"limit": {"train": 48, "validation": 16, "test": 16}}}

PRESETS: dict[str, list[Any]] = {
    "none": [SATURATE],
    **{
        preset: [SATURATE, {UIR: {"preset": preset}}]
        for preset in ("uir_feat", "uir_cos", "uir_kl", "uir_self", "uir_image", "uir_task", "uir_prev", "uir_memory")
    },
    "uir_memory, shared inquiries": [SATURATE, SHARED],
    "uir_memory, shared, weight 1": [SATURATE, {UIR: HALF_SHARED | {"weight": 1.0}}],
    "uir_memory, shared, weight 4": [SATURATE, {UIR: HALF_SHARED | {"weight": 4.0}}],
    "uir_memory, shared, ratio 0.5": [SATURATE, {UIR: HALF_SHARED | {"ratio": 0.5}}],
    "uir_memory, shared, ratio 2": [SATURATE, {UIR: HALF_SHARED | {"ratio": 2.0}}],
}
CHAIN: dict[str, list[Any]] = {
    "UIR alone": [SHARED],
    **{
        f"UIR + {rate} {strength}": [{SAC: {"rate": rate, "strength": strength}}, SHARED]
        for rate, strength in (
            *((rate, 0.9) for rate in ("uniform", "saturate", "power_down", "power_up", "wiener", "overlap")),
            *(("uniform", strength) for strength in (0.7, 0.8, 1.0)),  # 1.0: a fresh adapter per task, added as it is
        )
    },
}
METHODS: dict[str, list[Any]] = {
    "finetune": ["finetune"],
    "joint": ["joint"],
    "single": ["single"],
    LLAVA_C: [SAC_1, UIR],
    OLD: [SAC, SHARED],
    "LLaVA-c, shared inquiries, SAC saturate": [SATURATE, SHARED],
    "ModelMix": [{SAC: {"rate": "uniform", "strength": 0.5}}],
    "ewc": ["ewc"],
    "lwf": ["lwf"],
    "replay 1 %": [{"replay": {"size": 38, "share": 0.25, "policy": "balanced"}}],
    "replay 5 %": [{"replay": {"size": 192, "share": 0.25, "policy": "balanced"}}],
}
RATE, BATCH = "learning_rate", "per_device_train_batch_size"
SHOWN = {RATE: "rate", BATCH: "batch"}
# what each method is tried with; the third is the training of all other chapters
TRAININGS: tuple[dict[str, float], ...] = tuple(
    {RATE: rate, BATCH: batch} for batch, rates in ((16, (1e-3, 2e-3, 5e-3)), (4, (2e-3, 3e-3, 5e-3))) for rate in rates
)
# the best of them by the chapter `trainings`: final average; for LLaVA-c among those that keep general ability
OWN: dict[str, dict[str, float]] = {
    "finetune": {RATE: 2e-3, BATCH: 4},
    "joint": {RATE: 5e-3, BATCH: 16},
    "single": {RATE: 2e-3, BATCH: 4},  # is fine-tuning
    LLAVA_C: {RATE: 3e-3, BATCH: 4},  # as chosen with shared inquiries
    OLD: {RATE: 3e-3, BATCH: 4},
    "ModelMix": {RATE: 1e-3, BATCH: 16},
    "ewc": {RATE: 3e-3, BATCH: 4},
    "lwf": {RATE: 2e-3, BATCH: 4},
    "replay 1 %": {RATE: 2e-3, BATCH: 4},
    "replay 5 %": {RATE: 2e-3, BATCH: 4},
}
STRENGTHS: dict[str, list[Any]] = {
    "UIR alone": [SHARED],
    "UIR + uniform 0.9": [SAC, SHARED],
    **{f"UIR + uniform {k}": [{SAC: {"rate": "uniform", "strength": k}}, SHARED] for k in (0.95, 1.0)},
}
INQUIRIES: dict[str, list[Any]] = {  # at LLaVA-c's best training, all rows
    "shared": [SAC, SHARED],
    "shared, weight 3": [SAC, {UIR: HALF_SHARED | {"weight": 3.0}}],
    "shared, ratio 2": [SAC, {UIR: HALF_SHARED | {"ratio": 2.0}}],
    "shared, SAC 1.0": [SAC_1, SHARED],
    "shared, SAC 1.0, weight 3": [SAC_1, {UIR: HALF_SHARED | {"weight": 3.0}}],
    "a quarter for each task": [SAC, {UIR: QUARTER}],
    "a quarter for each task, weight 1": [SAC, {UIR: QUARTER | {"weight": 1.0}}],
    "a quarter for each task, SAC 1.0": [SAC_1, {UIR: QUARTER}],
    "half for each task, SAC power_up 1.0": [{SAC: {"rate": "power_up", "strength": 1.0}}, UIR],
    "half for each task, SAC 0.95": [{SAC: {"strength": 0.95}}, UIR],
    "half for each task, SAC 1.0": METHODS[LLAVA_C],
    "half for each task, one general, SAC 1.0": [SAC_1, {UIR: {"ratio": 1.0}}],
    "half for each task, one general, SAC 1.0, weight 1": [SAC_1, {UIR: {"ratio": 1.0, "weight": 1.0}}],
}
ROUTED: list[Any] = [{"task_adapters": {"router": "prototype", "reject": 4.0}}]
TOGETHER: dict[str, list[Any]] = {  # replay alone with its own training, all others with LLaVA-c's
    LLAVA_C: METHODS[LLAVA_C],
    f"{LLAVA_C} + replay 1 %": [*METHODS[LLAVA_C], *METHODS["replay 1 %"]],
    "replay 1 %": METHODS["replay 1 %"],
    "task_adapters": ROUTED,
    "task_adapters + UIR": [*ROUTED, {UIR: {"preset": "uir_self"}}],  # general inquiries: no task is ever touched again
}


def jobs_of(
    variants: dict[str, list[Any]],
    *,
    seeds: Sequence[int],
    split: str,
    streams: Sequence[str],
    orders: Sequence[str],
    changes: dict[str, Any] | None = None,
) -> list[Job]:
    """All combinations, methods of one setting together so that a table fills row by row."""
    return [
        Job(
            label,
            methods,
            stream,
            TASKS[stream][::-1] if order == "reversed" else None,
            order,
            seed,
            split,
            changes or {},
        )
        for seed in seeds
        for stream in streams
        for order in orders
        for label, methods in variants.items()
    ]


def retrained(job: Job, settings: dict[str, float]) -> Job:
    """The same run with other training settings, which its label names."""
    label = ", ".join([job.label, *(f"{SHOWN[name]} {value:g}" for name, value in settings.items())])
    training = {**job.changes.get("training", {}), **settings}
    return replace(job, label=label, changes=job.changes | {"training": training})


def chapters(seeds: Sequence[int]) -> dict[str, list[Job]]:
    """The runs of each chapter that consists of runs."""
    one, given, both = ("quickstart",), ("given",), ("given", "reversed")
    choosing: dict[str, Any] = {"split": "validation", "streams": one, "orders": given, "changes": HALF}
    own = OWN[LLAVA_C]
    tried = {label: METHODS[label] for label in OWN if label != "single"}
    trainings = jobs_of(tried, seeds=seeds[:1], **choosing)
    strengths = jobs_of(STRENGTHS, seeds=seeds[:2], **choosing)
    inquiries = jobs_of(INQUIRIES, seeds=seeds[:1], split="validation", streams=tuple(TASKS), orders=both)
    against = {label: METHODS[label] for label in OWN}
    together = jobs_of(TOGETHER, seeds=seeds, split="test", streams=one, orders=given)
    streams = jobs_of(against, seeds=seeds, split="test", streams=tuple(TASKS), orders=both)
    return {
        "presets": jobs_of(PRESETS, seeds=seeds[:1], **choosing),
        "chain": jobs_of(CHAIN, seeds=seeds[:2], **choosing),
        "trainings": [retrained(job, settings) for job in trainings for settings in TRAININGS],
        "strengths": [retrained(job, own) for job in strengths],
        "inquiries": [retrained(job, own) for job in inquiries],
        "common": jobs_of(METHODS, seeds=seeds, split="test", streams=one, orders=given),
        "streams": [retrained(job, OWN[job.label]) for job in streams],
        "pretraining": pretraining_jobs(seeds),
        "together": [retrained(job, OWN.get(job.label, own)) for job in together],
    }


def short(job: Job) -> Job:
    """The same run with few rows and one epoch: shows that everything works, decides nothing."""
    return replace(job, label=f"short {job.label}", changes=job.changes | SHORT)


def is_enough(job: Job) -> bool:
    """True for the runs of the reduced study: the given order, and choices on one stream."""
    return job.order_name == "given" and (job.split == "test" or job.stream == "quickstart")


def results(jobs: Sequence[Job], measured: Measured) -> list[str]:
    """Lines of a table: one row per label, mean ± standard deviation over its finished runs."""
    rows = [[label, *cells(runs, COLUMNS), str(len(runs))] for label, runs in measured.by_label(jobs).items() if runs]
    return table(["", *COLUMNS, "runs"], rows) if rows else NOT_RUN


def by_setting(jobs: Sequence[Job], measured: Measured) -> list[str]:
    """One table per stream and order."""
    lines: list[str] = []
    for stream in dict.fromkeys(job.stream for job in jobs):
        for order in ("given", "reversed"):
            own = [job for job in jobs if (job.stream, job.order_name) == (stream, order)]
            if any(measured.get(job) for job in own):
                lines += [f"**{stream}, {order} order**", "", *results(own, measured), ""]
    return lines or NOT_RUN


def goal(jobs: Sequence[Job], measured: Measured) -> list[str]:
    """LLaVA-c beside joint training in each setting, and whether it reaches both marks of the goal in the mean."""
    rows = []
    for stream, order in dict.fromkeys((job.stream, job.order_name) for job in jobs):
        own = [job for job in jobs if (job.stream, job.order_name) == (stream, order)]
        found = {
            label.removeprefix("short ").split(",")[0]: runs for label, runs in measured.by_label(own).items() if runs
        }
        ours, joint = found.get(LLAVA_C, []), found.get("joint", [])
        if ours and joint:
            final, general = (
                mean(run[name] or 0.0 for run in ours) for name in ("mean_final_accuracy", "general_change")
            )
            reached = final >= mean(run["mean_final_accuracy"] or 0.0 for run in joint) and general >= -1.0
            theirs = cells(joint, {name: COLUMNS[name] for name in ("final average", "change of general ability")})
            shown = cells(ours, {name: COLUMNS[name] for name in ("final average", "change of general ability")})
            rows.append([f"{stream}, {order}", *shown, *theirs, str(len(ours)), "yes" if reached else "no"])
    kept = "change of general ability"
    titles = ("final average", kept, "joint: final average", f"joint: {kept}", "runs", "both marks")
    return table(["", *titles], rows) if rows else NOT_RUN


def put(text: str, name: str, lines: Sequence[str]) -> str:
    """Replaces what stands between the markers of a chapter."""
    start, end = f"<!-- study:{name} -->", f"<!-- /study:{name} -->"
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{PAGE}: has no place marked {start}")
    return pattern.sub(lambda _: "\n".join([start, *lines, end]), text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/study"))
    parser.add_argument("--measured", type=Path, help=f"numbers of earlier runs; {MEASURED.relative_to(ROOT)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--chapters", nargs="+", choices=CHAPTERS, default=list(CHAPTERS))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    parser.add_argument("--reduced", action="store_true", help="one seed, few rows, nothing written to docs/")
    parser.add_argument("--report-only", action="store_true")
    given = parser.parse_args()

    usual = given.output / MEASURED.name if given.reduced else MEASURED
    measured = Measured(given.measured or usual)
    planned = chapters(given.seeds[:1] if given.reduced else given.seeds)
    if given.reduced:
        planned = {name: [short(job) for job in jobs if is_enough(job)] for name, jobs in planned.items()}
    writers: dict[str, Callable[[], list[str]]] = {
        "pilot": lambda: pilot_rows(given.output / "pair", SHORT if given.reduced else {}, given.report_only),
        "spectra": lambda: spectra_rows(given.output / "pair"),
        "goal": lambda: goal(planned["streams"], measured),
        **{name: lambda name=name: results(planned[name], measured) for name in RUN},
        **{
            name: lambda name=name: by_setting(planned[name], measured)
            for name in ("inquiries", "streams", "pretraining")
        },
    }
    failures: list[str] = []
    text = PAGE.read_text(encoding="utf-8")
    for name in given.chapters:
        if name == "pretraining" and not given.report_only:
            make_captioner(given.output.resolve(), 4_000 if given.reduced else 16_000)
        if name in planned and not given.report_only:
            failures += measured.run_missing(planned[name], given.output, given.jobs)
        lines = writers[name]()
        print(f"\n## {name}\n", *lines, sep="\n", flush=True)
        if lines != NOT_RUN:  # another machine may have made the table that the page has
            text = put(text, name, lines)
        if not given.reduced:
            PAGE.write_text(text, encoding="utf-8")
    if failures:
        raise SystemExit("\n".join([f"{len(failures)} run(s) failed:", *failures]))


if __name__ == "__main__":
    main()
