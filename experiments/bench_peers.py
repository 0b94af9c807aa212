"""Times this library and its peers, one after another on one machine.

    python experiments/bench_peers.py --peers ../shared/peers --models MODELS \\
        --torch TV/bin/python --tunix PV/bin/python --out peers.json

MODELS holds `tiny` and `q05` of make_model.py; TV and PV are the environments of the peers' README.
Every line is the median of --reps repetitions in a process of its own, compilation outside; the
order is ours, Tunix, torch, so that a machine that slows down harms neither side alone: ours is run
again at the end, and both medians are printed. Updates run in the settings that were fastest for
each library (rows whose gradients exist at once, recomputation), and the peers in their defaults
too. Progress goes to stderr, a Markdown table to stdout, every process's JSON line to --out. About
an hour on two cores; nothing else may run.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

CASES = {
    "W1 tiny": ("W1", "tiny", "--P 8 --G 8 --new-tokens 128"),
    "W1 q05": ("W1", "q05", "--P 4 --G 4 --new-tokens 32"),
    "W4 tiny, 64 slots": ("W4", "tiny", "--P 8 --G 8 --new-tokens 256 --slots 64"),
    "W4 tiny, 16 slots": ("W4", "tiny", "--P 8 --G 8 --new-tokens 256 --slots 16"),
    "W2 tiny": ("W2", "tiny", "--B 16 --new-tokens 128"),
    "W2 q05": ("W2", "q05", "--B 2 --new-tokens 64"),
    "W3 tiny": ("W3", "tiny", "--P 8 --G 8 --new-tokens 128"),
}
HERE = pathlib.Path(__file__).parent
OURS = {
    "W1": "bench_decode.py", "W2": "bench_update.py", "W3": "bench_rl_step.py",
    "W4": "bench_long_tail.py",
}  # fmt: skip
FASTEST = {"W2 tiny": "--micro 2 --remat attention", "W3 tiny": "--micro 8"}  # settings of ours


def commands(case: str, args) -> dict[str, list[str]]:
    """Returns {library: the beginning of its command line}, in the order in which they run."""
    workload = CASES[case][0]
    ours = [sys.executable, str(HERE / OURS[workload]), *FASTEST.get(case, "").split()]
    tunix = lambda script: [args.tunix, str(args.peers / script), "--workload", workload]  # noqa: E731
    torch = lambda script: [args.torch, str(args.peers / script), "--workload", workload]  # noqa: E731
    lines = {"scope_jax": ours}
    if workload in ("W1", "W4"):
        lines["Tunix"] = tunix("tunix_sampler.py")
        for name, impl in {
            "torch loop": "loop", "transformers generate": "generate", "transformers cb": "cb",
        }.items():  # fmt: skip
            lines[name] = [*torch("hf.py"), "--impl", impl]
    else:
        lines["Tunix"] = tunix("tunix_grpo.py")
    if workload == "W2":
        lines["torch"] = torch("hf.py")
    if case == "W2 tiny":
        for name in ("Tunix", "torch"):
            lines[f"{name}, 4 rows a part"] = [*lines[name], "--micro", "4"]
    if workload == "W3":
        lines["TRL"] = torch("trl_grpo.py")
        lines["TRL cb"] = [*torch("trl_grpo.py"), "--cb"]
    return {**lines, "scope_jax again": ours}


def run(peer: str, line: list[str], case: str, args) -> dict:
    _, model, sizes = CASES[case]
    work = ["--model-dir", str(args.models / model), *sizes.split(), "--reps", str(args.reps)]
    print(f"{case}: {peer}", file=sys.stderr, flush=True)
    done = subprocess.run([*line, *work], capture_output=True, text=True)
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"{' '.join([*line, *work])} failed")
    return {"case": case, "name": peer, **json.loads(done.stdout.splitlines()[-1])}


def table(rows: list[dict]) -> str:
    """Returns a Markdown table: tokens/s, ratio to ours, seconds to the first token, peak memory.

    Raises:
      SystemExit: two lines of a case are not of the same work.
    """
    lines = ["| work | library | tokens/s | ours is faster by | first token s | peak MB |"]
    lines += ["|---|---|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = [row for row in rows if row["case"] == case]
        if len({row["work_hash"] for row in of_case}) != 1:
            raise SystemExit(f"{case}: the inputs differ: {[row['work_hash'] for row in of_case]}")
        ours = [row["tokens_per_s"] for row in of_case if row["name"].startswith("scope_jax")]
        for row in of_case:
            ratio = statistics.mean(ours) / row["tokens_per_s"]
            shown = "" if row["name"].startswith("scope_jax") else f"{ratio:.2f}x"
            first_token = f"{row['ttft_s']:.2f}" if row.get("ttft_s") else ""
            lines.append(
                f"| {case} | {row['name']} | {row['tokens_per_s']:,.0f} | {shown} | "
                f"{first_token} | {row['peak_rss_mb']:,.0f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--peers", type=pathlib.Path, required=True, help="folder of the peers' scripts")
    add("--models", type=pathlib.Path, required=True, help="folder of tiny and q05")
    add("--torch", required=True, help="python of the environment with torch and transformers")
    add("--tunix", required=True, help="python of the environment with Tunix")
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--reps", type=int, default=5)
    add("--out", type=pathlib.Path, required=True)
    args = parser.parse_args()
    rows = []
    for case in args.cases:
        for peer, line in commands(case, args).items():
            rows.append(run(peer, line, case, args))
            args.out.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
