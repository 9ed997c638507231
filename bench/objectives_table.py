"""Objective x sampler x network evaluations: Frechet distances as a table (CSV, Markdown), a figure and samples.

    python bench/objectives_table.py --work working/objectives

trains the preset `quick` once with each objective, measures each with every sampler at each number of evaluations, and
writes bench/results/objectives.{csv,md,png} and objectives-samples.png. What is there already is not done again, so an
interrupted run goes on where it stopped.
"""

import csv
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

from fastdiff.cli import run_command  # noqa: E402
from fastdiff.sections import SamplerName  # noqa: E402
from fastdiff.words import counted  # noqa: E402

COLUMNS = (
    "objective",
    "schedule",
    "train_steps",
    "sampler",
    "sampler_steps",
    "evaluations",
    "metric",
    "value",
    "samples",
)


@dataclass(frozen=True)
class Flags:
    """Train with each objective, measure with each sampler. The defaults train 6 times for as long as `quick` takes (a
    few minutes each on two idle CPU cores) and draw 200 samples 36 times for each objective: hours on a CPU; fewer
    --samplers and --evaluations take proportionally less."""

    work: Path
    """Folder for the runs and the finished measurements; name it again to go on."""
    objectives: tuple[str, ...] = ("eps", "x0", "v", "score", "flow", "edm")
    """Objectives to train, each with the schedule of its own (--schedule auto)."""
    samplers: tuple[SamplerName, ...] = (
        "ddpm", "ddim", "heun", "euler-maruyama", "predictor-corrector", "dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde",
        "unipc",
    )  # fmt: skip
    """Samplers to measure (euler and euler-ancestral equal ddim with eta 0 and 1)."""
    evaluations: tuple[int, ...] = (5, 10, 20, 50)
    """Network evaluations for each sample; heun and predictor-corrector take about half as many steps."""
    preset: str = "quick"
    """Preset that is trained."""
    steps: int = 850
    """Training steps of each objective."""
    samples: int = 200
    """Samples of each Frechet distance."""
    out: Path = REPO / "bench" / "results"
    """Folder of the table and the figures."""


def steps_within(sampler: str, budget: int) -> int:
    """The most sampling steps, at least 1, that cost at most `budget` network evaluations."""
    from fastdiff.diffusion.plan import evaluations
    from fastdiff.diffusion.samplers import PLANS
    from fastdiff.diffusion.schedules import make_schedule

    schedule = make_schedule("flow")  # whichever: a sampler asks as often on all
    steps = range(2, budget + 1)
    return max((n for n in steps if evaluations(PLANS[sampler](schedule, schedule.grid(n))) <= budget), default=1)


def train(flags: Flags, objective: str) -> Path:
    """The run of this objective, trained now unless it is there."""
    root = flags.work / objective
    done = sorted(root.glob(f"*/checkpoints/step-{flags.steps}/manifest.json"))
    if not done:
        subprocess.run(
            [
                sys.executable, "train_cifar.py", "--preset", flags.preset, "--objective", objective,
                "--schedule", "auto", "--no-conditional", "--eval-guidance", "1", "--lr-decay", "constant",
                "--steps", str(flags.steps), "--save-every", str(flags.steps), "--eval-every", str(flags.steps),
                "--no-eval-at-start", "--features", "none", "--eval-steps", "20", "--run-root", str(root.resolve()),
            ],
            cwd=REPO, check=True,
        )  # fmt: skip
        done = sorted(root.glob(f"*/checkpoints/step-{flags.steps}/manifest.json"))
    return done[-1].parent


def measure(flags: Flags, objective: str, checkpoint: Path) -> list[dict]:
    """The rows of one objective; rows of earlier calls are read back."""
    import numpy as np

    from fastdiff.data.cache import cache_folder
    from fastdiff.data.datasets import load_dataset
    from fastdiff.diffusion.plan import evaluations
    from fastdiff.evaluation.evaluate import evaluate, load_trained
    from fastdiff.evaluation.features import make_extractor
    from fastdiff.evaluation.frechet import FrechetDistance
    from fastdiff.evaluation.generate import SamplerSettings
    from fastdiff.runtime.device import resolve_device

    path = flags.work / objective / f"measured-{flags.steps}-{flags.samples}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {(row["sampler"], row["sampler_steps"]) for row in rows}
    wanted = dict.fromkeys((s, steps_within(s, budget)) for s in flags.samplers for budget in flags.evaluations)
    plan = [pair for pair in wanted if pair not in known]
    if not plan:
        return [row for row in rows if (row["sampler"], row["sampler_steps"]) in wanted]
    device = resolve_device("auto")
    trained = load_trained(checkpoint, device=device)
    config = trained.config
    data = load_dataset(
        config.images.data, root=config.images.data_root, split=config.images.split, image_size=config.net.image_size
    )
    extractor = make_extractor("efficientnet_lite0", device=device, size=config.eval.feature_size)
    distance = FrechetDistance(extractor, data, cache_dir=cache_folder(config.images.data_root), device=device)
    for sampler, steps in plan:
        generator = trained.generator(
            SamplerSettings(sampler, steps), batch_size=256, device=device, bf16=device.type == "cuda"
        )
        row, kept = evaluate(generator, distance, n=flags.samples, seed=0, keep=8)
        row |= {
            "objective": objective,
            "schedule": config.diffusion.resolved_schedule,
            "train_steps": trained.step,
            "evaluations": evaluations(generator.plan),
        }
        rows.append({name: row[name] for name in COLUMNS})
        np.save(flags.work / objective / f"{sampler}-{steps}.npy", kept)
        with path.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        drawn = counted(rows[-1]["evaluations"], "evaluation")
        print(f"{objective}: {sampler}, {drawn}: {row['value']:.4g}", flush=True)
    return [row for row in rows if (row["sampler"], row["sampler_steps"]) in wanted]


def write_tables(flags: Flags, rows: list[dict]) -> None:
    """objectives.csv, all rows; objectives.md, one line for each objective and sampler, a column for each budget."""
    out = flags.out
    with (out / "objectives.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"`{rows[0]['metric']}` of {rows[0]['samples']} samples (lower is better), by the most network evaluations of "
        "a sample.",
        "",
        f"| objective | schedule | sampler | {' | '.join(map(str, flags.evaluations))} |",
        "|---|---|---|" + "---:|" * len(flags.evaluations),
    ]
    for objective, schedule, sampler in dict.fromkeys((r["objective"], r["schedule"], r["sampler"]) for r in rows):
        values = {
            r["sampler_steps"]: r["value"] for r in rows if (r["objective"], r["sampler"]) == (objective, sampler)
        }
        cells = (f"{values[steps_within(sampler, budget)]:.0f}" for budget in flags.evaluations)
        lines.append(f"| {objective} | {schedule} | {sampler} | {' | '.join(cells)} |")
    (out / "objectives.md").write_text("\n".join(lines) + "\n")


def draw(rows: list[dict], work: Path, out: Path) -> None:
    """objectives.png, a panel for each objective; objectives-samples.png, a row of each one's best samples."""
    import numpy as np
    from matplotlib.figure import Figure

    from fastdiff.reporting.pictures import save_grid

    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    across = min(3, len(objectives))
    down = -(-len(objectives) // across)
    figure = Figure(figsize=(4.6 * across, 3.8 * down), dpi=110, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flatten()
    samples = []
    for panel, objective in zip(panels, objectives, strict=False):
        mine = [row for row in rows if row["objective"] == objective]
        for sampler in dict.fromkeys(row["sampler"] for row in mine):
            curve = sorted((row["evaluations"], row["value"]) for row in mine if row["sampler"] == sampler)
            panel.plot(*zip(*curve, strict=True), "o-", markersize=3.5, linewidth=1.3, label=sampler)
        panel.set(title=f"{objective} ({mine[0]['schedule']})", xscale="log", yscale="log")
        panel.grid(alpha=0.25)
        best = min(mine, key=lambda row: row["value"])
        samples.append(np.load(work / objective / f"{best['sampler']}-{best['sampler_steps']}.npy"))
    for panel in panels[len(objectives) :]:
        panel.set_visible(False)
    figure.supxlabel("network evaluations")
    figure.supylabel(rows[0]["metric"])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(out / "objectives.png")
    save_grid(np.concatenate(samples), out / "objectives-samples.png", columns=8)


def main() -> int:
    """Train, measure, write; returns the exit code."""
    flags = tyro.cli(Flags)
    rows = []
    for objective in flags.objectives:
        rows += measure(flags, objective, train(flags, objective))
    flags.out.mkdir(parents=True, exist_ok=True)
    write_tables(flags, rows)
    draw(rows, flags.work, flags.out)
    print(flags.out / "objectives.md")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
