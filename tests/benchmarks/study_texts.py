"""Do generated texts help as training texts, and how much does it cost when they are wrong?

    python tests/benchmarks/study_texts.py runs/study-texts       prints the two tables of docs/results/texts.md

001's "MLLM as a teacher" (inventory row 165) and its stated limitation, noisy descriptions (row 164), on rendered
people: `bdam` at demo size, three training text sources and four shares of exchanged descriptions, the same budget,
three seeds (each seed renders its own people, and all conditions of a seed share them). The texts are the template's,
written from true attributes: an upper bound of what an MLLM could write. The epoch is chosen on validation people; the
test people are looked at once. Finished runs are kept: start it again after a kill and it goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SOURCES = {"human captions": "caption", "generated texts": "identity+clothing", "both, half and half": "mix"}
NOISE = (0.0, 0.25, 0.5, 1.0)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student, two-sided, n - 1 degrees of freedom


def reidctl(*words: object) -> dict[str, Any]:
    """Run a stage and return what it printed with --json."""
    command = [sys.executable, "-m", "reidctl", *map(str, words), "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout)


def measure(home: Path, seed: int, target: str, noise: float, people: int, epochs: int) -> dict[str, float]:
    """Train and test one condition; rank-1 and mAP of text to image, in percent."""
    data, run = home / f"data-{seed}", home / f"{seed}-{target}-{noise}"
    split = ("--set", "synth.train_fraction=0.8", "--set", "synth.val_fraction=0.08", "--set", "synth.difficulty=0.3")
    size = ("--people", people, "--images-per-person", 3, "--workers", 1)
    reidctl("data", "synth", "--run", data, "--seed", seed, *size, *split)
    reidctl("caption", "--run", data, "--mllm", "template", "--seed", seed)
    texts = ("--set", f"method.target={target}", "--set", f"data.description_noise={noise}")
    length = ("--set", f"train.epochs={epochs}", "--seed", seed)
    source = ("--data", data / "data")
    reidctl("finetune", "--run", run, "--method", "bdam-tiny", *source, *texts, *length)
    reidctl("index", "--run", run, *source)
    found = reidctl("evaluate", "--run", run, *source, "--seed", seed)["metrics"]["t2i"]
    return {name: 100 * found[name] for name in ("rank1", "mAP")}


def interval(values: list[float]) -> str:
    """Mean and 95 % interval over seeds."""
    middle = statistics.mean(values)
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{middle:.1f} [{middle - half:.1f}, {middle + half:.1f}]"


def verdict(differences: list[float]) -> str:
    """What the differences say about 'the first is better'."""
    middle = statistics.mean(differences)
    half = T_95[len(differences)] * statistics.stdev(differences) / len(differences) ** 0.5
    return "holds" if middle > half else "does not hold" if middle < -half else "undecided"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--people", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=9)
    given = parser.parse_args()
    conditions = [(target, 0.0) for target in SOURCES.values()] + [("mix", noise) for noise in NOISE[1:]]
    found: dict[tuple[str, float], list[dict[str, float]]] = {condition: [] for condition in conditions}
    for seed in given.seeds:
        for target, noise in conditions:
            found[target, noise].append(measure(given.home, seed, target, noise, given.people, given.epochs))
            print(seed, target, noise, found[target, noise][-1], file=sys.stderr, flush=True)

    def row(name: str, key: tuple[str, float], base: tuple[str, float]) -> str:
        columns = []
        for metric in ("rank1", "mAP"):
            values = [one[metric] for one in found[key]]
            columns.append(interval(values))
            if key != base:
                ahead = [one[metric] - other[metric] for one, other in zip(found[key], found[base], strict=True)]
                columns.append(f"{interval(ahead)} ({verdict(ahead)})")
            else:
                columns.append("-")
        return f"| {name} | {' | '.join(columns)} |"

    head = "| {} | rank-1 | beyond the first row | mAP | beyond the first row |\n|---|---|---|---|---|"
    print(head.format("training texts"))
    for name, target in SOURCES.items():
        print(row(name, (target, 0.0), ("caption", 0.0)))
    print("\n" + head.format("descriptions of another person"))
    for noise in NOISE:
        print(row(f"{noise:.0%}", ("mix", noise), ("mix", 0.0)))


if __name__ == "__main__":
    main()
