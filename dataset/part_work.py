"""Writing a store part by part, shared out over processes (`code_writer.py` says how parts become files)."""
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dataset import code_writer
from dataset.code_manifest import Manifest, read_manifest
from utils import dist

Part = tuple[int, range]  # its number, the rows of the data that it is made of


def complete_store(folder: Path, recipe: dict[str, Any], count: int, *, write_parts: Callable[[list[Part]], None],
                   tell_begun: Callable[[dict[str, Any]], None] = lambda recipe: None) -> tuple[Manifest, bool]:
    """Write the parts that are not there yet, join them, write the manifest; (the manifest, whether it is new).

    All processes call this together. recipe: what rank 0 writes; count: rows of the data; write_parts: writes those
    that are this process's; tell_begun: called on rank 0 with the recipe of a store that was begun before. Raises
    ValueError for a folder of another recipe.
    """
    main = dist.env_rank() == 0
    with dist.failing_together():
        if main:
            code_writer.begin(folder, recipe)
    if (folder / "manifest.json").is_file():
        dist.barrier()
        return read_manifest(folder, kind=recipe["format"]), False
    begun = code_writer.extraction_recipe(folder)
    if main:
        tell_begun(begun)
    rows = code_writer.layout(begun)["part_rows"]
    parts = [range(first, min(first + rows, count)) for first in range(0, count, rows)]
    write_parts([(i, parts[i]) for i in range(dist.env_rank(), len(parts), dist.world_size())
                 if not code_writer.is_done(folder, i)])
    dist.barrier()
    code_writer.join(folder, len(parts), rank=dist.env_rank(), workers=dist.world_size())
    dist.barrier()
    with dist.failing_together():
        if main:
            code_writer.finish(folder, len(parts))
    return read_manifest(folder, kind=recipe["format"]), True
