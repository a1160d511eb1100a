"""The progress display: a bar on a terminal, plain lines elsewhere, nothing on stdout."""

import io

import pytest
from rich.console import Console

from minirlhf.training.progress import progress, sampling


def plain(plain_every: float, steps: int = 4) -> list[str]:
    out = io.StringIO()
    with progress("sft", 4, console=Console(file=out, width=40), plain_every=plain_every) as advance:
        for k in range(steps):
            advance(1000, {"loss": 0.5 + k} if k % 2 else None)
    return out.getvalue().splitlines()


def test_without_a_terminal_a_plain_line_says_steps_rate_time_left_and_metrics() -> None:
    lines = plain(0.0)
    assert len(lines) == 3  # from the first metrics on
    assert lines[0].startswith("sft 2/4  ") and lines[-1].startswith("sft 4/4  ")
    assert "tokens/s" in lines[0] and "ETA 0:00:0" in lines[0]
    assert lines[0].endswith("loss 1.5") and lines[1].endswith("loss 1.5") and lines[2].endswith("loss 3.5")


def test_plain_lines_come_every_so_often_and_at_the_end() -> None:
    assert [line.split()[1] for line in plain(60.0)] == ["2/4", "4/4"]


def test_a_stage_that_stops_early_says_no_false_end() -> None:
    assert [line.split()[1] for line in plain(60.0, steps=3)] == ["2/4"]


def test_the_rate_counts_tokens_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1.0, 2.0, 2.0])
    monkeypatch.setattr("minirlhf.training.progress.time.perf_counter", lambda: next(clock))
    out = io.StringIO()
    with progress("dpo", 7202, console=Console(file=out), plain_every=0.0) as advance:
        advance(1000)
        advance(1468, {"loss": 0.6931})
    assert out.getvalue() == "dpo 2/7202  1,234 tokens/s  ETA 2:00:00  loss 0.6931\n"


def test_on_a_terminal_a_bar_shows_the_same() -> None:
    out = io.StringIO()
    with progress("dpo", 2, console=Console(file=out, force_terminal=True, width=120)) as advance:
        advance(10, {"loss": 0.25})
        advance(10)
    shown = out.getvalue()
    assert "dpo" in shown and "2/2" in shown and "tokens/s" in shown and "loss 0.25" in shown


def test_nothing_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("sft", 1) as advance:
        advance(10, {"loss": 1.0})
    captured = capsys.readouterr()
    assert captured.out == "" and "sft 1/1" in captured.err


def test_long_sampling_says_tokens_rate_and_the_longest_that_it_can_still_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([0.0, 4.0, 10.0, 15.0, 20.0])
    monkeypatch.setattr("minirlhf.training.progress.time.perf_counter", lambda: next(clock))
    out = io.StringIO()
    with sampling("ours", 3000, console=Console(file=out), after=5.0) as told:
        for tokens in (400, 1000, 1500, 2000):  # at 4 s too soon, at 15 s too soon again
            told(tokens)
    assert out.getvalue().splitlines() == [
        "ours: 1,000 of at most 3,000 tokens sampled, 100 tokens/s, ETA 0:00:20 or less",
        "ours: 2,000 of at most 3,000 tokens sampled, 100 tokens/s, ETA 0:00:10 or less",
    ]
