import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mindspeed_mm_rl.report import render_table, report_columns, report_evaluation, write_report
from mindspeed_mm_rl.sinks import JsonlSink, console_line, open_metric_log, read_records
from tests.disks import small_disk


def write(path, steps, resume_from=0):
    sink = JsonlSink(path, resume_from)
    for step in steps:
        sink.write(step, {"dapo/score/mean": step / 10})
    sink.close()


def test_a_resumed_run_continues_the_file_after_its_iteration(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3, 4])
    write(path, [3], resume_from=2)
    assert [record["iteration"] for record in read_records(path)] == [1, 2, 3]


def test_a_new_run_moves_the_old_file_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for run in (1, 2, 3):
        write(path, [run])
    assert [read_records(tmp_path / name)[0]["iteration"] for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")] == [1, 2, 3]


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2])
    path.write_text(path.read_text() + '{"iteration": 3, "dapo/sc')
    write(path, [3], resume_from=2)
    assert [record["iteration"] for record in read_records(path)] == [1, 2, 3]


def test_nan_is_null(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(1, {"actor/kl_loss": math.nan, "actor/entropy": 1.5})
    sink.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"iteration": 1, "actor/kl_loss": None, "actor/entropy": 1.5}


def test_a_full_disk_is_named_and_leaves_whole_lines(tmp_path):
    with small_disk(tmp_path / "disk", 8192) as disk:
        path = disk / "metrics.jsonl"
        sink = JsonlSink(path)
        with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
            for step in range(1, 1000):
                sink.write(step, {"dapo/score/mean": step / 10})
        sink.close()
        assert [record["iteration"] for record in read_records(path)] == list(range(1, step))
        assert path.read_text().endswith("}\n")


def test_samples_that_could_not_be_graded_are_on_the_console():
    assert "rewards/" not in console_line(3, 80, {"rewards/timeouts": 0.0, "rewards/crashes": 0.0})
    line = console_line(3, 80, {"timing/all": 7.5, "rewards/timeouts": 12.0, "rewards/crashes": 0.0})
    assert line.endswith(" | timing/all : 7.5000 | rewards/timeouts : 12")


def test_console_line_has_the_known_form():
    line = console_line(3, 80, {"dapo/score/mean": 0.25, "actor/lr": 2.5e-4, "timing/all": 7.5, "timing/adv": 0.1})
    assert line.split("] ", 1)[1] == "iteration: 3 / 80 | dapo/score/mean : 0.2500 | actor/lr : 2.5000e-04 | timing/all : 7.5000"


def test_every_sink_gets_every_iteration(tmp_path):
    lines: list[str] = []
    log = open_metric_log(tmp_path, 2, 0, use_tensorboard=True, print_line=lines.append)
    for step in (1, 2):
        log.record(step, {"dapo/score/mean": step / 10})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 6)) for event in events.Scalars("train/dapo/score/mean")] == [(1, 0.1), (2, 0.2)]
    assert len(lines) == 2
    assert len(read_records(tmp_path / "metrics.jsonl")) == 2


def test_tensorboard_shows_what_the_file_holds_after_a_resumed_and_a_new_run(tmp_path):
    for resume_from, steps in ((0, [1, 2, 3, 4]), (2, [3]), (0, [1])):
        log = open_metric_log(tmp_path, 4, resume_from, use_tensorboard=True, print_line=lambda line: None)
        for step in steps:
            log.record(step, {"dapo/score/mean": len(steps)})
        log.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        shown = [(event.step, event.value) for event in events.Scalars("train/dapo/score/mean")]
        kept = [(record["iteration"], record["dapo/score/mean"]) for record in read_records(tmp_path / "metrics.jsonl")]
        assert shown == kept


def test_the_table_has_first_and_last_and_at_most_a_dozen_rows():
    records = [{"iteration": step, "rollout/reward/mean": step / 100} for step in range(1, 81)]
    rows = render_table(records, report_columns("dapo")).splitlines()
    assert rows[1].split()[:2] == ["1", "0.01"]
    assert rows[-1].split()[:3] == ["80", "0.8", "-"]
    assert len(rows) <= 13


def test_the_report_writes_table_and_picture(tmp_path):
    write(tmp_path / "metrics.jsonl", range(1, 6))
    table = write_report(tmp_path, "dapo")
    assert (tmp_path / "table.txt").read_text() == table + "\n"
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_evaluations_in_the_file_has_no_colours(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    (tmp_path / "metrics.jsonl").write_text('{"iteration": 1, "eval/sums/mean@1": 0.5}\n')
    report_evaluation(tmp_path, best=1)
    assert "sums" in (tmp_path / "table.txt").read_text() and "\x1b" not in (tmp_path / "table.txt").read_text()
