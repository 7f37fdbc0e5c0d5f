"""The progress of a run as it is seen: on terminals narrow and wide, and in a log."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from mage_tune.progress import TERMS, ProgressReporter, details

LOGS = {
    "loss": 27.5413,
    "diffusion": 5.4210,
    "query_alignment": 0.0113,
    "attention_alignment": 0.1234,
    "sparse_distillation": 10.1234,
    "grad_norm": 12.16,
    "tokens_per_s": 4332.3,
    "mfu": 0.415,
    "peak_gib": 60.31,
}


def shown(width: int, step_s: float = 15.0, logs: dict = LOGS) -> list[str]:
    """The rows of a terminal `width` wide after 100 of 200 steps, each of which took `step_s`."""
    now = [0.0]
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=200)
    with ProgressReporter(Console(width=width, force_terminal=True, file=io.StringIO())) as progress:
        progress.on_train_begin(None, state, None)
        progress.bar.get_time = lambda: now[0]
        for state.global_step in (98, 99, 100):
            now[0] += step_s
            progress.on_log(None, state, None, logs)
        plain = Console(width=width, color_system=None, file=io.StringIO())
        plain.print(progress.bar.get_renderable())
    return plain.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 120, 200])
def test_nothing_is_cut_off(width):
    first, second = shown(width)
    for part in ("100/200", "━", "25:00 left", "loss 27.541", "4,332 tok/s", "MFU 42%", "60.3 GiB"):
        assert part in first
    for term in TERMS:
        assert f"{term if width > 80 else term.partition('_')[0]} {LOGS[term]:.4f}" in second
    assert "grad 12.16" in second
    assert "…" not in first + second
    assert len(first) == width >= len(second)


def test_long_runs_of_small_models_fit_too():
    first, _ = shown(80, logs=LOGS | {"tokens_per_s": 116731.0})
    assert "100/200" in first and "116,731 tok/s" in first and "60.3 GiB" in first


def test_steps_of_minutes_have_a_time_left():
    assert "1:40:00 left" in shown(80, step_s=60.0)[0]


def test_a_single_term_is_the_loss_itself():
    logs = {name: LOGS[name] for name in ("loss", "diffusion", "grad_norm", "tokens_per_s")}
    assert details(logs) == "grad 12.16"
    assert shown(80, logs=logs)[1].strip() == "grad 12.16"


def test_a_line_of_a_log_stays_one_line():
    console = Console(width=80, file=io.StringIO())
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1)
    with ProgressReporter(console) as progress:
        progress.on_train_begin(None, state, None)
        state.global_step = 1
        progress.on_log(None, state, None, LOGS)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("step 1/1 · 0:00 left · loss 27.541 · 4,332 tok/s")
    assert "sparse_distillation 10.1234" in line
