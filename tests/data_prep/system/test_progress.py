"""Progress: a bar for people, rare lines for logs, silence on other ranks."""

import io
import re

from data_prep.system.progress import Progress, format_duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_lines_and_no_control_characters():
    out = io.StringIO()
    with Progress(4, "build", "slides", interval_s=0, stream=out) as progress:
        for number in range(4):
            progress.update(1, note=f"slide {number}")
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and "\r" not in out.getvalue() and "\x1b" not in out.getvalue()
    assert re.match(r"build: 1/4 slides \(25 %\), .* elapsed, ETA \d+:\d\d, slide 0$", lines[0])
    assert lines[-1].startswith("build: 4/4 slides (100 %)") and "ETA" not in lines[-1]


def test_between_two_lines_there_is_silence():
    out = io.StringIO()
    with Progress(1000, "train", interval_s=3600, stream=out) as progress:
        for _ in range(1000):
            progress.update()
    assert len(out.getvalue().splitlines()) == 1


def test_a_long_wait_prints_its_line_too():
    out = io.StringIO()
    with Progress(2, "build", "slides", interval_s=0, stream=out) as progress:
        progress.update(0)
    assert out.getvalue().splitlines()[0].startswith("build: 0/2 slides (0 %)")


def test_a_terminal_gets_a_bar_and_whole_lines_of_text():
    out = Terminal()
    with Progress(3, "build", "slides", stream=out) as progress:
        progress.update(1, note="first")
        progress.write("failed: x")
        progress.update(2)
    assert "failed: x\n" in out.getvalue() and "3/3" in out.getvalue() and "build" in out.getvalue()


def test_other_ranks_are_silent():
    for stream in (io.StringIO(), Terminal()):
        with Progress(3, "build", rank=1, interval_s=0, stream=stream) as progress:
            progress.update(1)
            progress.write("text")
        assert stream.getvalue() == ""


def test_what_was_done_before_counts_in_the_position_and_not_in_the_rate():
    progress = Progress(100, "train", "steps", initial=90, stream=io.StringIO())
    progress._started_s -= 10  # ten seconds ago
    progress.update(5)
    line = progress.line()
    assert "95/100 steps (95 %)" in line and "0.5 steps/s" in line and "ETA 0:10" in line
    progress.total = None
    assert progress.line().startswith("train: 95 steps, 0.5 steps/s")


def test_durations():
    shown = [format_duration(seconds) for seconds in (0, 59.6, 3599, 3600, 86_461)]
    assert shown == ["0:00", "1:00", "59:59", "1:00:00", "24:01:01"]
