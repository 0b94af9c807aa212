"""What a run writes about itself: metrics.jsonl, TensorBoard events, sampled rollouts, and the terminal."""

import collections
import contextlib
import json
import pathlib
import time

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from tensorboardX import SummaryWriter

COLUMNS = (  # heading, metric, format
    ("step", "step", "{:>5d}"),
    ("reward", "reward", "{:>6.3f}"),
    ("solved", "solve_rate", "{:>6.1%}"),
    ("signal", "groups_with_signal", "{:>6.1%}"),
    ("repairs", "repairs", "{:>7}"),
    ("loss", "loss", "{:>8.4f}"),
    ("entropy", "entropy", "{:>7.3f}"),
    ("sample t/s", "tokens_per_s/sample", "{:>10,.0f}"),
    ("teach t/s", "tokens_per_s/teach", "{:>9,.0f}"),
    ("update t/s", "tokens_per_s/update", "{:>10,.0f}"),
    ("sec", "seconds/step", "{:>5.2f}"),
)


class Timer:
    """Adds up the wall-clock seconds of named phases within a step."""

    def __init__(self):
        self.seconds = collections.defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(phase):
            yield
        self.seconds[phase] += time.perf_counter() - start

    def flush(self) -> dict[str, float]:
        """Returns {"seconds/PHASE": s} since the last flush and starts over."""
        seconds = {f"seconds/{phase}": value for phase, value in self.seconds.items()}
        self.seconds.clear()
        return seconds


class CompileCounter:
    """Counts XLA compilations of this process from the moment it is made."""

    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration: float, **_):
        del duration
        self.count += event == "/jax/core/compile/backend_compile_duration"


class Writer:
    """Writes metrics of steps to WORKDIR/metrics.jsonl and TensorBoard, rollouts to WORKDIR/rollouts, lines to stdout.

    Args:
      workdir: of the run.
      start_step: steps already done; lines of metrics.jsonl beyond it (of an interrupted run) are dropped.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int = 0):
        self.workdir = workdir
        self.console = Console(highlight=False, soft_wrap=True)
        self._lines = 0
        file = workdir / "metrics.jsonl"
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _step_of(line) <= start_step]
            file.write_text("".join(f"{line}\n" for line in kept))
        self._metrics = file.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), flush_secs=30)
        (workdir / "rollouts").mkdir(exist_ok=True)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one row of scalars; values that are not finite are written as null."""
        row = {k: _finite(v) for k, v in metrics.items()}
        self._metrics.write(json.dumps({"step": step, **row}) + "\n")
        self._metrics.flush()
        for key, value in row.items():
            if value is not None:
                self._tensorboard.add_scalar(key, value, step)

    def progress(self, step: int, metrics: dict) -> None:
        """Prints one line for a step, with the headings every 20 lines."""
        if self._lines % 20 == 0:
            self.console.print("  ".join(f"{name:>{_width(form)}}" for name, _, form in COLUMNS), style="bold")
        self._lines += 1
        values = {"step": step, **metrics, "repairs": _repairs(metrics)}
        cells = [form.format(values[key]) if key in values else "-".rjust(_width(form)) for _, key, form in COLUMNS]
        self.console.print("  ".join(cells))

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style or None, markup=False)

    def rollouts(self, step: int, records: list[dict]) -> None:
        """Writes records as JSON lines to rollouts/step_NNNNNN.jsonl; text stays data, whatever it holds."""
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (self.workdir / "rollouts" / f"step_{step:06d}.jsonl").write_text(lines)

    def summary(self, before: dict[str, float], after: dict[str, float], totals: dict[str, str], title: str) -> None:
        """Prints the end table: evaluation before and after, then what the run did."""
        table = Table(title=title, title_justify="left", header_style="bold")
        table.add_column("evaluation")
        for heading in ("before", "after", "change"):
            table.add_column(heading, justify="right")
        for key in after:
            old, new = before.get(key, float("nan")), after[key]
            table.add_row(key.removeprefix("eval/"), f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
        self.console.print(table)
        facts = Table(show_header=False, box=None)
        for key, value in totals.items():
            facts.add_row(key, value)
        self.console.print(facts)

    def close(self) -> None:
        self._metrics.close()
        self._tensorboard.close()


def _width(form: str) -> int:
    return int("".join(filter(str.isdigit, form.split(">")[1].split(".")[0])))


def _repairs(metrics: dict) -> str:
    if "corrections/made" not in metrics:
        return "-"
    return f"{metrics['corrections/accepted']:.0f}/{metrics['corrections/made']:.0f}"


def _finite(value) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None


def _step_of(line: str) -> float:
    """Returns the step of a metrics line; a torn last line of a killed run counts as beyond every step."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
