"""Takes the pictures of the report that the docs show, from a real run of the worksheet.

    python experiments/screenshots.py                # trains (two minutes), then takes them
    python experiments/screenshots.py --workdir W    # of a run that is there

Needs playwright (extra `docs`) and a Chromium; --chromium says where it is.
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

from playwright.sync_api import Page, sync_playwright

from scope_jax.report import write_report

PICTURES = pathlib.Path(__file__).parents[1] / "docs" / "pictures"
# No GPU, no sandbox (root in a container), and nothing that asks the network by itself.
FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
)  # fmt: skip
LARGEST = 300_000  # bytes


def show_a_repair(page: Page) -> None:
    """Turns to a group with a rollout repaired at its third step or later, and points at a token of
    the correction.
    """
    page.select_option("#filter-repaired", "yes")
    page.check("#whole")
    for _ in range(200):
        kept = page.locator(".rollout").first.locator(":scope > .step")
        if (
            kept.count() > 1
            and page.locator(".rollout").first.locator(".rejected .step").count() > 1
        ):
            break
        page.click("#next")
    page.evaluate("scrollTo(0, document.getElementById('filters').offsetTop - 50)")
    page.locator(".correction .tok").nth(3).hover()


def take(report: pathlib.Path, chromium: str, out: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for scheme, name in (("light", "curves"), ("light", "rollouts"), ("dark", "rollouts")):
            page = browser.new_page(
                viewport={"width": 1240, "height": 860}, color_scheme=scheme, device_scale_factor=1
            )
            page.goto(report.resolve().as_uri())
            page.wait_for_selector("body[data-ready]")
            if name == "rollouts":
                show_a_repair(page)
            file = out / f"report_{name}_{scheme}.png"
            page.screenshot(path=file)
            page.close()
            size = file.stat().st_size
            print(f"{file}: {size / 1000:.0f} kB")
            assert size < LARGEST, f"{file} is too large for the repository"
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, help="of a run; else one is made")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--out", type=pathlib.Path, default=PICTURES)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workdir = args.workdir or pathlib.Path(folder) / "worksheet"
        if args.workdir is None:
            options = ["--config.eval.every=10", "--config.log.rollouts_every=2"]
            options += ["--config.log.diversity_every=2"]
            command = [sys.executable, "-m", "scope_jax.train", "--config", "worksheet"]
            subprocess.run([*command, "--workdir", str(workdir), *options], check=True)
        take(write_report(workdir), args.chromium, args.out)


if __name__ == "__main__":
    main()
