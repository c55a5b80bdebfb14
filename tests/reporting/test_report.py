"""The report of one run: right numbers, one safe file, readable on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from mllm_cl.errors import RunError
from mllm_cl.reporting import read_run, write_report
from mllm_cl.reporting.charts import task_panels
from mllm_cl.reporting.formatting import NOT_MEASURED, markdown_cell
from mllm_cl.reporting.report import drift_table, general_table, instruction_table, metric_rows
from mllm_cl.reporting.run import predictions_path

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Page(HTMLParser):
    """Tags, text and every address a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "action"):
                self.loads.append(value or "")
            if name.startswith("on"):
                self.handlers.append(name)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def page(fake_run):
    folder = fake_run("llava-c", methods=[{"replay": {"size": 10}}], keep=0.9)
    path = write_report(folder, baselines=[fake_run("finetune", keep=0.6)])
    return folder, path.read_text(encoding="utf-8")


def test_files(page):
    folder, _ = page
    assert {"report.html", "report.md"} <= {path.name for path in folder.iterdir()}
    figures = sorted(path.name for path in (folder / "figures").iterdir())
    assert figures == ["accuracy_matrix.png", "general_ability.png", "task_curves.png"]
    assert all((folder / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in figures)


def test_one_file_without_scripts_or_addresses(page):
    parsed = Page(page[1])
    assert parsed.open == []  # every tag is closed
    assert parsed.loads == []
    assert parsed.handlers == []
    assert not {"script", "img", "link", "iframe", "object"} & set(parsed.tags)
    assert "url(" not in page[1]
    assert "@import" not in page[1]
    assert 'name="viewport"' in page[1]
    assert "prefers-color-scheme: dark" in page[1]


def test_answers_are_text(page):
    _, html = page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in html
    assert "日本語" in html
    assert "<script>alert" in Page(html).text


def test_every_number_of_the_matrix_is_shown(page):
    folder, html = page
    run, text = read_run(folder), Page(html).text
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for row in [*run.matrix.values, *run.matrix.general_values]:
        for value in row:
            if value is not None:
                assert f"{value:.1f}" in text
                assert f"{value:.1f}" in markdown
    for row in metric_rows(run)[0]:
        assert row.label in text
        assert row.sentence in text
        assert row.value in text


def test_drift_is_shown_for_the_stages_that_have_it(fake_run):
    folder = fake_run("drifting")
    entries = [
        {"event": "drift", "stage": 0, "feature_shift": 0.0, "one_word_share": 12.5, "mean_words": 6.25, "n": 8},
        {"event": "drift", "stage": 2, "feature_shift": 0.4321, "one_word_share": 87.5, "mean_words": 1.5, "n": 8},
    ]
    with (folder / "ledger.jsonl").open("a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)
    header, *rows = drift_table(read_run(folder))
    stages = read_run(folder).stages
    assert [row[0] for row in rows] == ["0-base", stages[1].name]
    assert len(header) == len(rows[0]) == 4
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Drift of the language side" in text
    assert all(cell in text for row in rows for cell in row)
    assert "Drift" not in write_report(fake_run("no-drift")).read_text(encoding="utf-8")


def test_general_scores_are_related_to_the_untouched_model(fake_run):
    header, base, first, *_ = general_table(read_run(fake_run("general")))
    assert header == ["stage", "pope", "science", "mean change", "kept, percent"]
    assert base[3:] == ["", ""]
    assert first[3:] == ["−1.5", f"{100 * (68.5 / 70 + 60.5 / 62) / 2:.1f}"]  # the fixture loses 1.5 per stage
    assert general_table(read_run(fake_run("no-base", base=False)))[1][4] == ""


def test_answers_in_the_form_asked_for(fake_run):
    folder = fake_run("forms")
    assert instruction_table(read_run(folder)) == []
    assert "Instruction following" not in write_report(folder).read_text(encoding="utf-8")
    run = read_run(folder)
    task, stage = run.matrix.tasks[0], run.matrix.stages[1]
    asked = "Which? Answer in one word."
    lines = [{"id": text, "question": asked, "prediction": text} for text in ("dog", "cat.", "a dog")]
    path = predictions_path(run, stage, task)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert instruction_table(read_run(folder)) == [["stage", task], [stage, "66.7"]]
    assert "66.7" in write_report(folder).read_text(encoding="utf-8")
    assert "## Instruction following" in (folder / "report.md").read_text(encoding="utf-8")


def test_baseline_is_compared(page):
    text = Page(page[1]).text
    assert "Against other runs" in text
    assert "methods.replay.size" in text
    assert "exact McNemar" in text


def test_unfinished_run(fake_run):
    folder = fake_run(finished=2, drop_fields=("tokens", "peak_memory_mib"))
    html = write_report(folder).read_text(encoding="utf-8")
    text = Page(html).text
    assert "unfinished: 2 of 4 stages" in text
    assert "03-charts: not trained." in text
    assert "cover the first 2 of 4 stages only" in text
    rows, through = metric_rows(read_run(folder))
    assert through == 2
    assert {row.key: row.divisor for row in rows}["backward_transfer"] == "1"
    assert NOT_MEASURED in text
    assert "nan" not in text.lower().split()


@pytest.mark.parametrize("damage", ["matrix.json", "ledger.jsonl", "environment.json", "evaluation"])
def test_whatever_is_missing_the_report_is_written(fake_run, damage):
    folder = fake_run(finished=1)
    shutil.rmtree(folder / damage) if damage == "evaluation" else (folder / damage).unlink()
    html = write_report(folder).read_text(encoding="utf-8")
    assert NOT_MEASURED in html
    assert (folder / "report.md").exists()


def test_one_task_and_no_general_benchmark(fake_run):
    html = write_report(fake_run(tasks=("plates",), general=(), base=False)).read_text(encoding="utf-8")
    text = Page(html).text
    assert "complete: 1 task" in text
    assert "no earlier task to remember" in text
    assert "no general benchmark was evaluated" in text


def test_many_tasks(fake_run):
    html = write_report(fake_run(tasks=tuple(f"task-{i}" for i in range(12)), rows=6)).read_text(encoding="utf-8")
    assert html.count("<figure") == 1 + 12 + 2


def test_same_run_same_bytes(fake_run):
    folder = fake_run(finished=2)
    names = ["report.html", "report.md", "figures/task_curves.png"]
    write_report(folder)
    first = [(folder / name).read_bytes() for name in names]
    write_report(folder)
    assert [(folder / name).read_bytes() for name in names] == first


def test_curves_are_broken_where_nothing_was_measured(fake_run):
    panels = {panel.title: panel for panel in task_panels(read_run(fake_run()))}
    menus = panels["menus"].lines[0]  # stage 0, then 2, 3, 4
    assert len(menus.points) == 4
    assert [len(segment.split()) for segment in menus.segments] == [3]
    assert all(0 <= y <= 150 for panel in panels.values() for line in panel.lines for _, y, _ in line.points)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(RunError):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_markdown_cells_cannot_leave_their_cell():
    cell = markdown_cell("a|b\n<img src=x> [x](http://y) `c` *d* _e_ f_g @me")
    assert "\n" not in cell
    assert not re.search(r"(?<!\\)[|`*\[]", cell)
    assert "<" not in cell
    assert "f_g" in cell
    assert "@" not in cell
    assert "://" not in cell


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1280])
def test_in_a_browser(page, tmp_path, width):
    """Opens a copy in which a script (the product has none, and forbids them) says how wide the page became."""
    probe = "<script>document.body.dataset.width = document.documentElement.scrollWidth + '/' + innerWidth</script>"
    copy = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page[1]).replace(
        "</body>", probe + "</body>"
    )
    (tmp_path / "copy.html").write_text(copy, encoding="utf-8")
    # a window of Chromium is never narrower than 500 pixels, a frame can be
    frame = f"""<body style="margin:0"><iframe src="copy.html" style="border:0;width:{width}px;height:900px"
        onload="document.body.dataset.width = this.contentDocument.body.dataset.width"></iframe></body>"""
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--enable-logging=stderr",
    ]
    options += [
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width + 200},1000",
        "--virtual-time-budget=3000",
    ]
    command = [str(CHROMIUM), *options, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<body[^>]*data-width="(\d+)/(\d+)"', done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    scroll, inner = map(int, found.groups())
    assert inner == width
    assert scroll <= inner
    assert ":CONSOLE" not in done.stderr
