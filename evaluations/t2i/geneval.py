"""GenEval's table from the results of its scorer, which runs elsewhere (it needs mmdetection 2 and a GPU).

    python3 evaluations/t2i/geneval.py results.jsonl

The overall score is the mean of the accuracies of the six tasks (arXiv 2310.11513), not of all images.
"""
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils import cli
from utils.cli import flag

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


@dataclass(kw_only=True)
class GenEvalFlags:
    """The summary command."""

    results: str = flag(cli.REQUIRED, "results.jsonl of GenEval's scorer", positional=True)


def summarise_geneval(path: str | Path) -> dict[str, float]:
    """The fraction of correct images of each task, and "overall", their mean.

    Raises FileNotFoundError, or ValueError when a task is missing: the mean of the others is another metric.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no results of GenEval's scorer at {path}")
    correct: dict[str, list[bool]] = defaultdict(list)
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").strip().split("\n"), start=1):
        try:
            row = json.loads(line)
            correct[row["tag"]].append({True: True, False: False}[row["correct"]])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'{path}, line {number}: expected a JSON object with "tag" and "correct" (true or false)'
                             ) from None
    if set(correct) != set(TASKS):
        raise ValueError(f"{path} has results for {', '.join(sorted(correct))}: expected {', '.join(TASKS)}")
    scores = {task: sum(correct[task]) / len(correct[task]) for task in TASKS}
    return {**scores, "overall": sum(scores.values()) / len(TASKS)}


def main(flags: GenEvalFlags) -> None:
    """Print the table."""
    for name, score in summarise_geneval(flags.results).items():
        print(f"{name:14} {score:.4f}")


if __name__ == "__main__":
    cli.run(main, GenEvalFlags)
