"""Recipes: flags that belong together, in a JSON file, with the numbers that they should give and their source.

    bash scripts/autoregressive/train_c2i.sh --recipe c2i_B_256 --code-path /data/codes

A recipe has a section of flags for each command ("train": {"lr": 1e-4, …}). They count as typed before the command
line, so what is typed wins. Beside the sections: "expected" numbers, "hardware", "notes".
"""
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "scripts" / "recipes"
SECTIONS = ("train", "extract", "sample", "reconstruct", "evaluate")
PROSE = ("title", "expected", "hardware", "notes")


def recipe_names() -> list[str]:
    """The recipes that come with the program."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def recipe_path(name: str) -> Path:
    """The file of a recipe: of a name in scripts/recipes, or a path that ends in .json. Raises FileNotFoundError."""
    path = Path(name) if name.endswith(".json") else FOLDER / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"--recipe {name}: no such recipe, there are {', '.join(recipe_names())}; or give a "
                                "JSON file like those in scripts/recipes")
    return path


def read_recipe(name: str) -> dict[str, Any]:
    """A recipe's content. Raises FileNotFoundError, or ValueError that names the file and what is wrong with it."""
    path = recipe_path(name)
    try:
        recipe = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--recipe {path} is no JSON ({error})") from None
    if not isinstance(recipe, dict) or not any(section in recipe for section in SECTIONS):
        raise ValueError(f"--recipe {path} has no section of flags: expected some of {', '.join(SECTIONS)}")
    for key, value in recipe.items():
        if key not in (*SECTIONS, *PROSE):
            raise ValueError(f"--recipe {path}: {key!r} is no section, expected {', '.join((*SECTIONS, *PROSE))}")
        if key in SECTIONS and not isinstance(value, dict):
            raise ValueError(f"--recipe {path}: {key!r} must map flags to values")
    return recipe


def recipe_flags(name: str, sections: tuple[str, ...]) -> dict[str, Any]:
    """{"lr": 1e-4, …} of those of `sections` that a recipe has, underscores as hyphens.

    Raises ValueError when it has none of them: the recipe is for other commands.
    """
    recipe = read_recipe(name)
    present = [section for section in sections if section in recipe]
    if not present:
        raise ValueError(f"--recipe {name} has nothing for this command ({', '.join(sections)}): it has "
                         f"{', '.join(section for section in SECTIONS if section in recipe)}")
    return {key.replace("_", "-"): value for section in present for key, value in recipe[section].items()}
