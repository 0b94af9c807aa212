"""What a run writes about itself: metrics.jsonl, TensorBoard events, sampled rollouts, and the
terminal.
"""

import collections
import contextlib
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX import SummaryWriter

from scope_jax.diversity import group_diversity
from scope_jax.hardware import GIB, peak_flops, peak_memory
from scope_jax.hosts import all_hosts
from scope_jax.models.flops import update_flops
from scope_jax.models.transformer import Transformer
from scope_jax.records import PAD, POLICY, TEACHER, InputError
from scope_jax.report import write_report
from scope_jax.steps import token_texts

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
    ("mfu", "mfu/update", "{:>6.1%}"),
    ("sec", "seconds/step", "{:>5.2f}"),
)
SUMMED = (  # of a run's steps, for the table at its end
    "policy_tokens", "teacher_tokens", "corrections/made", "corrections/accepted", "seconds/step",
)  # fmt: skip
RECENT, OF_RECENT = 64, ("step", "grad_norm", "skipped")
TRACKERS = ("wandb", "trackio")
REPORT_SHARE = 0.05  # of a run's time at most goes into its report while it trains
WORST = ("recompiles", "hbm_peak_gib", "skipped", "logp_gap")  # the largest of all processes counts
# Means over some of a process's rows, and how many these were.
MEANS_OVER = {
    "corrections/correct_share": "corrections/made",
    "corrections/first_error": "corrections/made",
    "prm/agreement": "prm/scored",
}


class Timer:
    """Adds up the wall-clock seconds of named phases within a step; a profile shows them by name.

    Attributes:
      seconds: of each phase since the last flush; on_phase: is called with a phase's name as it
        begins.
    """

    def __init__(self):
        self.seconds = collections.defaultdict(float)
        self.on_phase: Callable[[str], None] = lambda _: None

    @contextlib.contextmanager
    def __call__(self, phase: str):
        self.on_phase(phase)
        start = time.perf_counter()
        with jax.profiler.TraceAnnotation(phase):
            yield
        self.seconds[phase] += time.perf_counter() - start

    def flush(self, **tokens: float) -> dict[str, float]:
        """Returns {"seconds/PHASE": s, "tokens_per_s/PHASE": n / s} since the last flush and starts
        over.

        Args:
          tokens: tokens handled per phase.
        """
        seconds = {f"seconds/{phase}": value for phase, value in self.seconds.items()}
        speeds = {
            f"tokens_per_s/{p}": float(n) / self.seconds[p]
            for p, n in tokens.items()
            if self.seconds.get(p)
        }
        self.seconds.clear()
        return seconds | speeds


@contextlib.contextmanager
def no_hidden_copies() -> Iterator[None]:
    """A copy between host and devices that is not spelled out is an error in here."""
    to_device = jax.transfer_guard_host_to_device("disallow")
    with to_device, jax.transfer_guard_device_to_host("disallow"):
        yield


def speeds(timer: Timer, model, rows, trained, measured: dict) -> dict[str, float]:
    """Returns a step's seconds and tokens/s by phase, and its `utilisation`; the timer starts over.

    Args:
      rows, trained: as `utilisation`'s.
      measured: of the step; "teacher_tokens" is read.
    """
    tokens = {"sample": rows["mask"].sum(), "update": trained["mask"].sum()}
    found = timer.flush(**tokens, teach=measured.get("teacher_tokens", 0))
    return found | utilisation(model, rows, trained, found)


def utilisation(model, rows, trained, seconds: dict[str, float]) -> dict[str, float]:
    """Returns {"mfu/sample", "mfu/update": model flop/s over the devices' peak, "hbm_peak_gib"}.

    Counted is what has to be computed, on real tokens (models/flops.py): each prompt once for its
    group, nothing that is computed twice, no padding, one pass of an update. On a CPU the peak is
    what a matrix product reaches there. {} for a model that is no `Transformer`.

    Args:
      rows, trained: {"record", "prompt_mask", "mask"} as sampled and as trained on.
      seconds: `Timer.flush`'s, "seconds/sample" and "seconds/update".
    """
    if not isinstance(model, Transformer):
        return {}

    def lengths(rows):
        slots = len(rows["record"]) // (int(rows["record"][-1]) + 1)
        return slots, rows["prompt_mask"].sum(1)[::slots], rows["mask"].sum(1)

    slots, prompts, completions = lengths(trained)
    flops = {"update": update_flops(model.config, prompts, completions, group_size=slots)}
    slots, prompts, completions = lengths(rows)
    flops["sample"] = update_flops(model.config, prompts, completions, group_size=slots) / 3
    peak = peak_flops() * jax.local_device_count()
    found = {
        f"mfu/{phase}": float(n / (seconds[f"seconds/{phase}"] * peak))
        for phase, n in flops.items()
        if seconds.get(f"seconds/{phase}")
    }
    memory = peak_memory()
    return found if memory is None else {**found, "hbm_peak_gib": memory / GIB}


class CompileCounter:
    """Counts XLA compilations of this process from the moment it is made.

    Attributes:
      count: all of them; recompiles: those inside of `watch(warm=True)`.
    """

    def __init__(self):
        self.count = self.recompiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_):
        del duration_secs
        self.count += event == "/jax/core/compile/backend_compile_duration"

    @contextlib.contextmanager
    def watch(self, warm: bool) -> Iterator[None]:
        before = self.count
        yield
        self.recompiles += self.count - before if warm else 0


class Writer:
    """Writes a run's metrics to WORKDIR/metrics.jsonl, TensorBoard and, where one is named, an
    experiment tracker; its rollouts to WORKDIR/rollouts, WORKDIR/report.html, lines to stdout (on a
    terminal with a line below that moves). Of several processes the first one writes, the others'
    writer does nothing.

    A run that goes on takes up what the workdir's metrics.jsonl says of the steps before.

    Args:
      workdir: of the run.
      start_step: steps already done; lines of metrics.jsonl beyond it (of an interrupted run) are
        dropped.
      skipped: lines of the data that were left out; they are listed in WORKDIR/skipped_lines.jsonl.
      total_steps: of the run, for the time that is left.
      tracker: "" | "wandb" | "trackio"; the package's own variables apply (WANDB_MODE=offline).
      profile_from, profile_steps: `watching` writes a trace of these training steps to
        WORKDIR/profile; 0 = of none.
    Raises:
      InputError: a tracker that is not known or not installed, a profile that would crash.
    Attributes:
      recent: {"step", "grad_norm", "skipped"} of the last RECENT training steps, oldest first.
      before: the run's first evaluation, None if there is none yet.
      evaluated: the step of the last one, -1 if there is none. All the same in every process.
    """

    def __init__(
        self, workdir: pathlib.Path, start_step: int = 0, skipped: Sequence[dict] = (),
        total_steps: int = 0, *, tracker: str = "", profile_from: int = 0, profile_steps: int = 3,
    ):  # fmt: skip
        self.workdir = workdir
        self._silent = jax.process_index() > 0
        self._tracker = None if self._silent else _open_tracker(tracker, workdir)
        self._profiled = range(profile_from, profile_from + profile_steps if profile_from else 0)
        if self._profiled:
            _check_profiler()
        self._tracing = False
        self._reported, self._report_seconds = time.perf_counter(), 0.0
        self.console = Console(highlight=False, soft_wrap=True, quiet=self._silent)
        self._progress = progress_line(self.console, start_step, total_steps)
        self._lines = 0
        self._sums = collections.Counter()
        self._file = workdir / "metrics.jsonl"
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), flush_secs=30, write_to_disk=not self._silent,
            purge_step=start_step + 1 if start_step else None,
        )  # fmt: skip
        rows = [] if self._silent else self._take_up(start_step)
        if skipped and not self._silent:
            text = "".join(json.dumps(line) + "\n" for line in skipped)
            _replace(workdir / "skipped_lines.jsonl", text)
            self.say(f"{len(skipped)} bad lines of the data are left out: skipped_lines.jsonl")
        evaluations = [row for row in rows if "eval/k" in row]
        recent = [row for row in rows if "eval/k" not in row][-RECENT:]
        found = {
            "recent": [{key: row.get(key) for key in OF_RECENT} for row in recent],
            "before": evaluations[0] if evaluations else None,
            "evaluated": evaluations[-1]["step"] if evaluations else -1,
        }
        found = all_hosts(found)[0]  # the others may not see the first one's files
        self.recent, self.before, self.evaluated = found.values()

    def _take_up(self, start_step: int) -> list[dict]:
        """Drops the lines beyond a step; returns the others' rows."""
        rows = []
        if self._file.exists():
            lines = self._file.read_text(errors="replace").splitlines()
            rows = [row for row in map(_parse, lines) if row and row["step"] <= start_step]
            _replace(self._file, "".join(json.dumps(row) + "\n" for row in rows))
        for row in rows:
            if "eval/k" not in row:
                self._add_up(row)
        (self.workdir / "rollouts").mkdir(exist_ok=True)
        for file in (self.workdir / "rollouts").glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > start_step:
                file.unlink()
        return rows

    def write(self, step: int, metrics: dict) -> None:
        """Appends one row of scalars; a value that is not finite is written as null."""
        if self._silent:
            return
        row = {key: _finite(value) for key, value in metrics.items()}
        with self._file.open("a") as file:
            file.write(json.dumps({"step": step, **row}) + "\n")
        for key, value in row.items():
            if value is not None:
                self._tensorboard.add_scalar(key, value, step)
        if self._tracker is not None:
            try:
                self._tracker.log({k: v for k, v in row.items() if v is not None}, step=step)
            except Exception as error:  # another's server is no reason to lose a run
                self._tracker = None
                self.say(f"the tracker failed and gets nothing more: {error!r}", "bold red")

    @contextlib.contextmanager
    def watching(self, step: int, timer: Timer) -> Iterator[None]:
        """Around a training step: shows its phases, and traces it if it is one to be profiled."""
        timer.on_phase = self._show_phase
        if self._profiled and step == self._profiled[0]:
            jax.profiler.start_trace(str(self.workdir / "profile"))
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield
        if self._tracing and step == self._profiled[-1]:
            self._stop_trace()

    def _stop_trace(self) -> None:
        jax.profiler.stop_trace()
        self._tracing = False
        self.say(f"profile written to {self.workdir / 'profile'}: open it with XProf or Perfetto")

    def _show_phase(self, phase: str) -> None:
        if self._progress:
            self._progress.update(self._progress.task_ids[0], phase=phase)

    def step(self, step: int, metrics: dict) -> None:
        """Writes a training step's row and prints its line, with the headings every 20 lines.

        Args:
          metrics: of all processes, see `over_hosts`.
        """
        self.write(step, metrics)
        self._add_up(metrics)
        row = {"step": step} | {key: _finite(metrics[key]) for key in OF_RECENT if key in metrics}
        self.recent = [*self.recent, row][-RECENT:]
        if self._lines % 20 == 0:
            self.console.print(
                "  ".join(f"{name:>{_width(form)}}" for name, _, form in COLUMNS), style="bold"
            )
        self._lines += 1
        if self._progress:
            self._progress.update(self._progress.task_ids[0], completed=step, phase="")
        values = {"step": step, **metrics, "repairs": _repairs(metrics)}
        cells = [
            form.format(values[key]) if key in values else "-".rjust(_width(form))
            for _, key, form in COLUMNS
        ]
        self.console.print("  ".join(cells))
        if metrics.get("skipped"):
            self.say(f"step {step}: an update that was not finite was skipped", style="bold red")
        if metrics.get("spike"):
            self.say(
                f"step {step}: a spike, gradient norm {metrics['grad_norm']:.3g}", style="yellow"
            )

    def _add_up(self, row: dict) -> None:
        self._sums.update({key: float(row[key]) for key in SUMMED if row.get(key) is not None})
        self._sums["steps"] += 1

    def evaluation(self, step: int, results: dict[str, float]) -> None:
        """Writes an evaluation's row and prints its line."""
        self.write(step, results)
        self.before, self.evaluated = self.before or results, step
        shown = (f"{key.removeprefix('eval/')} {x:.3f}" for key, x in results.items() if "@" in key)
        text = f"eval at step {step}: {'  '.join(shown)}  (k = {results['eval/k']:.0f})"
        self.say(text, style="cyan")
        if time.perf_counter() - self._reported > self._report_seconds / REPORT_SHARE:
            self._report()

    def _report(self) -> None:
        """Writes report.html; what goes wrong with it is said and ends no run."""
        if self._silent:
            return
        began = time.perf_counter()
        try:
            write_report(self.workdir)
        except Exception as error:
            self.say(f"report.html could not be written: {error!r}", style="yellow")
        self._reported = time.perf_counter()
        self._report_seconds = self._reported - began

    def say(self, text: str, style: str = "") -> None:
        self.console.print(text, style=style or None, markup=False)

    def rollouts(
        self, step: int, rows, trace, problems, tokenizer, groups: int, trained=None
    ) -> None:
        """Writes `rollout_records` as JSON lines to rollouts/step_NNNNNN.jsonl."""
        if self._silent:
            return
        records = rollout_records(step, rows, trace, problems, tokenizer, groups, trained)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (self.workdir / "rollouts" / f"step_{step:06d}.jsonl").write_text(text)

    def finish(self, after: dict[str, float], recompiles: int) -> None:
        """Prints the end tables: evaluation before and after, and what the run did; closes the
        files.
        """
        if self._progress:
            self._progress.stop()
        if self._tracing:  # the run ended before the last step to be profiled
            self._stop_trace()
        before = self.before or after
        table = Table(title="evaluation", title_justify="left", header_style="bold")
        table.add_column("metric")
        for heading in ("before", "after", "change"):
            table.add_column(heading, justify="right")
        for key in (key for key in after if "@" in key):
            change = after[key] - before[key]
            name = key.removeprefix("eval/").replace("@k", f"@{after['eval/k']:.0f}")
            table.add_row(name, f"{before[key]:.3f}", f"{after[key]:.3f}", f"{change:+.3f}")
        self.console.print(table)
        sums, made = self._sums, self._sums["corrections/made"]
        share = f" ({sums['corrections/accepted'] / made:.0%})" if made else ""
        self._report()
        for name, value in {
            "repairs accepted / made": f"{sums['corrections/accepted']:.0f} / {made:.0f}{share}",
            "tokens by policy / teacher": (
                f"{sums['policy_tokens']:,.0f} / {sums['teacher_tokens']:,.0f}"
            ),
            "seconds per step": f"{sums['seconds/step'] / max(sums['steps'], 1):.2f}",
            "recompilations after warm-up": str(recompiles),
            "workdir": str(self.workdir),
            "report": str(self.workdir / "report.html"),
        }.items():
            self.say(f" {name:30}{value}")
        self._tensorboard.close()
        if self._tracker is not None:
            self._tracker.finish()


def rollout_records(
    step: int, rows: dict, trace, problems, tokenizer, groups: int, trained: dict | None = None
) -> list[dict]:
    """Returns what happened to the rollouts of a step's first groups, as JSON-able records.

    Tokens are told by lengths: "token_chars", characters of each token's text, and "step_ends",
    tokens before a step's end. Arrays over tokens that stay the same for long are runs, [[value,
    count], ..]: "advantages" (of the row as it was trained on), "source" (who wrote it). "logps"
    are the policy's own as it sampled, "logps_after" after the step's updates. Of a repair:
    "kept_prefix", "correction", "reward_after" and in "repair" {"kept" tokens, "tokens" after them
    (texts), and of the whole row "source", "advantages", "logps_after"}.

    Args:
      rows: the step's rollouts as sampled (train.py's dict of arrays).
      trace: (step_ends, step_mask, scores, first_error, chosen, accepted, corrected rows) of
        train.repair, or None where nothing is repaired.
      problems: records of the step's prompts.
      groups: how many of them to write.
      trained: the rows as trained on, with "advantages" and, where known, "logps_after" [B, T]
        among them; None: not known.
    """
    decode = lambda ids: tokenizer.decode(ids.tolist())  # noqa: E731
    chosen = np.flatnonzero(rows["record"] < groups)
    ids = [rows["ids"][row][rows["mask"][row]].tolist() for row in chosen]
    places = collections.Counter()
    records = []
    for row, texts in zip(chosen, token_texts(tokenizer, ids), strict=True):
        group = int(rows["record"][row])
        problem, n = problems[group], len(texts)
        record: dict[str, Any] = {"step": step}
        record |= {key: problem[key] for key in ("id", "problem", "gold")}
        record |= {"group": group, "slot": places[group]}
        places[group] += 1
        record["completion"] = "".join(texts)
        record["reward"] = float(rows["rewards"][row])
        record["finished"] = bool(rows["finished"][row])
        record["token_chars"] = [len(text) for text in texts]
        if "logps" in rows:
            record["logps"] = _rounded(rows["logps"][row][:n])
        add_update(record, trained, group, rows["ids"][row][:n])
        if trace is not None:
            step_ends, step_mask, scores, first_error, repaired, accepted, corrected = trace
            record["step_ends"] = step_ends[row][step_mask[row]].tolist()
            cuts = itertools.pairwise([0, *record["step_ends"]])
            record["steps"] = ["".join(texts[a:b]) for a, b in cuts]
            record["step_scores"] = [round(float(x), 4) for x in scores[row][step_mask[row]]]
            record["first_error"] = int(first_error[row])
            for i in np.flatnonzero((repaired == row) & accepted):
                new, source = corrected["ids"][i], corrected["source"][i]
                record["kept_prefix"] = decode(new[source == POLICY])
                record["correction"] = decode(new[source == TEACHER])
                record["reward_after"] = float(corrected["rewards"][i])
                source = source[source != PAD]
                new, kept = new[: len(source)], int((source == TEACHER).argmax())
                record["repair"] = {
                    "kept": kept,
                    "tokens": token_texts(tokenizer, [new.tolist()])[0][kept:],
                    "source": runs(source.tolist()),
                }
                add_update(record["repair"], trained, group, new, source)
        records.append(record)
    return records


def reward_metrics(rewards, solved_at: float) -> dict[str, float]:
    """Returns {"reward", "solve_rate"}: of rewards [B] their mean and the share of solved rows."""
    rewards = np.asarray(rewards)
    return {"reward": rewards.mean(), "solve_rate": (rewards >= solved_at).mean()}


def learning_metrics(infos: list[dict], advantages) -> dict[str, Any]:
    """Returns the means over a step's updates, how many were skipped, and the sampler's `logp_gap`.

    Args:
      infos: `train_step`'s, on the host, one for each update; the first ran on the weights that
        sampled, so that it alone tells how far apart sampler and trainer are.
      advantages: [P, slots] of the rows; a group whose rows all have 0 holds no signal.
    """
    measured: dict[str, Any] = {name: np.mean([i[name] for i in infos]) for name in infos[0]}
    measured["skipped"] = int(sum(info["skipped"] for info in infos))
    measured["logp_gap"] = infos[0].get("logp_gap", infos[0]["log_ratio_max"])
    measured["groups_with_signal"] = (np.asarray(advantages) != 0).any(1).mean()
    return measured


def add_update(record: dict, trained: dict | None, group: int, ids, source=None) -> None:
    """Puts a row's "advantages", as runs, and "logps_after" into its record, if a row with these
    tokens (and sources) was trained on in its group: what equal rows of a group have is equal.
    """
    if trained is None or "advantages" not in trained:
        return
    size, n = len(trained["ids"]) // (int(trained["record"][-1]) + 1), len(ids)
    for row in range(group * size, (group + 1) * size):
        same = trained["mask"][row].sum() == n and (trained["ids"][row][:n] == ids).all()
        if same and source is not None:
            same = (trained["source"][row][:n] == source).all()
        if same and trained["row_mask"][row]:
            record["advantages"] = runs(round(float(x), 4) for x in trained["advantages"][row][:n])
            if "logps_after" in trained:
                record["logps_after"] = _rounded(trained["logps_after"][row][:n])
            return


def _rounded(logps) -> list[float]:
    return [round(float(x), 3) for x in logps]


def runs(values) -> list[list]:
    """Returns [[value, how many in a row], ..].

    >>> runs([1, 1, 2])
    [[1, 2], [2, 1]]
    """
    return [[value, len(list(same))] for value, same in itertools.groupby(values)]


def progress_line(console: Console, start: int, total: int) -> Progress | None:
    """Returns a started line with step, phase and the time that is left; None off a terminal."""
    if not console.is_terminal or console.is_dumb_terminal or console.quiet or total <= start:
        return None
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    phase = TextColumn("{task.fields[phase]}", markup=False, style="dim")
    line = Progress(TextColumn("step"), *columns, phase, console=console, transient=True)
    line.add_task("", total=total, completed=start, phase="")
    line.start()
    console.show_cursor(True)  # a run that is killed must not leave a terminal without one
    return line


def _check_profiler() -> None:
    """Raises InputError where libtpu would take the process down as a profile starts.

    Seen with jaxlib 0.10.2 and libtpu 0.0.52 on a machine without a TPU: PluginTracer::Start ends
    in a segmentation fault, unless JAX was told to leave TPUs alone.
    """
    told = os.environ.get("JAX_PLATFORMS")
    if jax.default_backend() != "tpu" and not told and importlib.util.find_spec("libtpu"):
        raise InputError(
            "log.profile_from: libtpu is installed, there is no TPU, and its profiler would crash "
            "the run: set the variable JAX_PLATFORMS=cpu (or cuda)"
        )


def _open_tracker(name: str, workdir: pathlib.Path) -> Any:
    """Returns the package of an experiment tracker with the run open in it; None for "".

    The run's id lies in WORKDIR/tracker_id, so that a run that goes on goes on there, too.
    """
    if not name:
        return None
    if name not in TRACKERS:
        raise InputError(f"log.tracker={name!r} is none of {', '.join(TRACKERS)} (or empty)")
    try:
        tracker = importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"log.tracker={name!r}: cannot import {name} ({error}): pip install {name}, or "
            "--config.log.tracker="
        ) from None
    file, config = workdir / "tracker_id", workdir / "config.json"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:12])
    run = f"{workdir.resolve().name}-{file.read_text()}"
    options: dict[str, Any] = {"project": "scope_jax", "name": run, "resume": "allow"}
    if config.exists():
        options["config"] = json.loads(config.read_text())
    if name == "wandb":
        options |= {"id": run, "dir": str(workdir)}
    tracker.init(**options)
    return tracker


def correction_metrics(plan, accepted, step_mask, wrong) -> dict[str, float]:
    """Returns what a step's repairs amounted to.

    Args:
      plan: (first_error [B], chosen [C], is_real [C], ..) of `locate.plan_corrections`.
      accepted: [C] bool; step_mask: [B, S] bool, steps that were scored; wrong: [B] bool.
    """
    first_error, chosen, is_real = plan[:3]
    scored, repaired = step_mask.any(1), chosen[is_real]
    share = (first_error / np.maximum(step_mask.sum(1), 1))[repaired]
    mean = lambda x, empty: float(x.mean()) if x.size else empty  # noqa: E731
    return {
        "corrections/made": int(is_real.sum()),
        "corrections/accepted": int(accepted.sum()),
        "corrections/correct_share": mean(share, 0.0),
        "corrections/first_error": mean(first_error[repaired], -1.0),
        "prm/agreement": mean(((first_error >= 0) == wrong)[scored], 0.0),  # verdict on the whole
        "prm/scored": int(scored.sum()),
        "prm/unscored": int((~scored).sum()),
    }


def over_hosts(metrics: dict) -> dict:
    """Returns a step's metrics of all processes together; all must call it.

    Whole numbers are counts and are added up, as speeds are; of times, memory and recompilations
    the most counts. Other numbers are means over rows or groups, of which each process has equally
    many, or MEANS_OVER some of them.
    """
    if jax.process_count() == 1:
        return metrics
    parts = all_hosts({key: np.asarray(value).item() for key, value in metrics.items()})
    together = {}
    for key, value in parts[0].items():
        values = [part[key] for part in parts]
        if key.startswith("seconds/") or key in WORST:
            together[key] = max(values)
        elif key.startswith("tokens_per_s/") or isinstance(value, int):
            together[key] = sum(values)
        else:
            weights = [part[MEANS_OVER[key]] if key in MEANS_OVER else 1 for part in parts]
            together[key] = np.average(values, weights=weights if any(weights) else None)
    return together


def mean_diversity(texts: list[str], group_size: int) -> dict[str, float]:
    """Returns the mean over groups of `diversity.group_diversity`, under "diversity/" names."""
    groups = [group_diversity(texts[i : i + group_size]) for i in range(0, len(texts), group_size)]
    return {
        f"diversity/{name}": float(np.mean([group[name] for group in groups])) for name in groups[0]
    }


def _width(form: str) -> int:
    return int("".join(filter(str.isdigit, form.split(">")[1].split(".")[0])))


def _repairs(metrics: dict) -> str:
    if "corrections/made" not in metrics:
        return "-"
    return f"{metrics['corrections/accepted']:.0f}/{metrics['corrections/made']:.0f}"


def _finite(value) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None


def _parse(line: str) -> dict | None:
    """Returns a metrics line's row; None for a torn line of a killed run."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


def _replace(file: pathlib.Path, text: str) -> None:
    """Writes a file so that a kill leaves the old one or the new one."""
    new = file.with_name(file.name + ".new")
    new.write_text(text)
    new.replace(file)
