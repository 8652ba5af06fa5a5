"""Sample a set and score it: a row of the paper's table in one command.

    bash scripts/autoregressive/sample_and_score.sh --recipe c2i_B_256 --gpt-ckpt c2i_B_256.pt \\
        --vq-ckpt vq_ds16_c2i.pt --fid-reference VIRTUAL_imagenet256_labeled.npz --inception INCEPTION.pth

Runs the sampler, then the evaluator with its preset gfid (without one if --features is given: that is no FID). The
numbers that the recipe expects are shown beside those measured, on the screen and in <settings>.scores.json.
"""
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from autoregressive.sample import sample_ddp
from autoregressive.sample.pipeline import load_pipeline
from autoregressive.sample.sample_ddp import SampleSetFlags
from evaluations.c2i import evaluator
from evaluations.c2i.comparison_rules import check_preset, check_sets
from evaluations.c2i.evaluator import EvaluatorFlags
from evaluations.c2i.features import load_network
from evaluations.c2i.image_sets import ImageSet, open_image_set
from evaluations.c2i.scores import TITLES, MetricFlags, chosen_metrics
from utils import cli, dist
from utils.cli import flag
from utils.files import replacing
from utils.recipes import read_recipe, recipe_flags

TOLERANCE = 0.1  # FID: published and repeated values of one recipe differ by 0.02 to 0.13


@dataclass(kw_only=True)
class SampleAndScoreFlags(SampleSetFlags, MetricFlags):
    """The command that samples and scores."""

    recipe_sections: ClassVar[tuple[str, ...]] = ("sample", "evaluate")
    fid_reference: str = flag(cli.REQUIRED, "what samples are compared with: ADM's VIRTUAL_imagenet256_labeled.npz, or "
                                            "one made by evaluations/c2i/reference.py")


def preset(flags: SampleAndScoreFlags) -> str | None:
    """The evaluator's preset: gfid (statistics of a training set as reference), unless --features measures no FID."""
    return "gfid" if flags.features is None else None


def check(flags: SampleAndScoreFlags, process: dist.Process, *, size: tuple[int, int]) -> None:
    """Raise, before anything is sampled, the errors that the evaluator would raise for samples of `size`."""
    metrics, reference = chosen_metrics(flags), open_image_set(flags.fid_reference)
    network = load_network(flags, device=process.device)
    planned = ImageSet("samples", flags.num_fid_samples, flags.scored_size(size))
    check_sets(reference, planned, metrics, network=network)
    if preset(flags):
        check_preset(preset(flags), reference, planned, known_as=None)


def typed_otherwise(flags: SampleAndScoreFlags) -> list[str]:
    """The flags that were typed with another value than the recipe's."""
    plain = cli.build_parser(type(flags)).parse_args(["--recipe", flags.recipe, "--fid-reference", flags.fid_reference])
    names = [key.replace("-", "_") for key in recipe_flags(flags.recipe, flags.recipe_sections)]
    return [name for name in names if getattr(flags, name) != getattr(plain, name)]


def compare(results: dict[str, float], recipe: dict[str, Any], *, changed: list[str]) -> dict[str, Any]:
    """The measured and the expected numbers, and a verdict on the difference."""
    measured = {name: results[name] for name in TITLES if name in results}
    expected = {name: value for name, value in recipe.get("expected", {}).items() if name in measured}
    verdict = "no expected FID to compare with"
    if "fid" in expected:
        off = measured["fid"] - expected["fid"]
        verdict = f"FID is within {TOLERANCE} of the expected" if abs(off) <= TOLERANCE else \
            f"FID is {abs(off):.2f} {'above' if off > 0 else 'below'} the expected, more than repeated runs differ"
        if changed:
            verdict += f"; but {', '.join('--' + name.replace('_', '-') for name in changed)} is not the recipe's"
    return {"measured": measured, "expected": expected, "source": recipe.get("expected", {}).get("source"),
            "verdict": verdict}


def side_by_side(scores: dict[str, Any]) -> str:
    """Measured and expected side by side, in lines."""
    lines = [f"{'':<18}{'measured':>12}{'expected':>12}"]
    for name, value in scores["measured"].items():
        wanted = scores["expected"].get(name)
        lines.append(f"{TITLES[name]:<18}{value:>12.4f}{'–' if wanted is None else wanted:>12}")
    return "\n".join([*lines, scores["verdict"]])


def main(flags: SampleAndScoreFlags) -> None:
    """Check, sample, score, compare."""
    process = dist.setup()
    pipeline = load_pipeline(flags, device=process.device)
    check(flags, process, size=pipeline.image_size)
    changed = typed_otherwise(flags) if flags.recipe else []
    npz = sample_ddp.main(flags, pipeline)
    measuring = {field.name: getattr(flags, field.name) for field in dataclasses.fields(MetricFlags)}
    scoring = EvaluatorFlags(reference=flags.fid_reference, sample=str(npz), preset=preset(flags), **measuring)
    evaluator.main(scoring)
    if not process.is_main:
        return
    results = json.loads(evaluator.report_path(scoring).read_text())
    recipe = read_recipe(flags.recipe) if flags.recipe else {}
    scores = compare(results, recipe, changed=changed)
    path = npz.with_name(f"{npz.name.removesuffix('.npz')}.scores.json")
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({"recipe": flags.recipe, "changed": changed, **scores}, indent=2) + "\n")
    print(f"{side_by_side(scores)}\nscores: {path}")


if __name__ == "__main__":
    cli.run(main, SampleAndScoreFlags)
