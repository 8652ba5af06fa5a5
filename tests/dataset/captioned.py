"""Captioned pictures in every layout, made on the spot."""
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200), "grey": (120, 120, 120)}


def picture(index: int, *, size: int = 24) -> Image.Image:
    """A noisy picture, `size` pixels high and wider than that."""
    rng, colour = np.random.default_rng(index), list(COLOURS.values())[index % 4]
    pixels = np.clip(np.array(colour) + rng.normal(0, 30, (size, size + index % 5, 3)), 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def caption(index: int) -> str:
    return f"a {list(COLOURS)[index % 4]} picture, number {index}"


def png(index: int, *, size: int = 24) -> bytes:
    buffer = io.BytesIO()
    picture(index, size=size).save(buffer, "PNG")
    return buffer.getvalue()


def write_plain(root: Path, count: int = 6) -> Path:
    """root/{even,odd}/<i>.png beside <i>.txt."""
    for i in range(count):
        path = root / ("odd" if i % 2 else "even") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
        path.with_suffix(".txt").write_text(caption(i) + "\n", encoding="utf-8")
    return root


def jsonl_line(index: int, **changes) -> str:
    """LlamaGen's line: a short and a long caption."""
    return json.dumps({"image_path": f"images/{index}.png", "text": [f"short {index}", caption(index)], **changes})


def write_jsonl(root: Path, counts: tuple[int, ...] = (4, 3)) -> Path:
    """root/part-<k>.jsonl of so many lines each, pictures below root/images."""
    (root / "images").mkdir(parents=True)
    index = 0
    for k, count in enumerate(counts):
        lines = []
        for _ in range(count):
            (root / "images" / f"{index}.png").write_bytes(png(index))
            lines.append(jsonl_line(index))
            index += 1
        (root / f"part-{k}.jsonl").write_text("".join(line + "\n" for line in lines))
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to an archive, the same bytes at any time."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(path: Path, indices, *, format: int = tarfile.PAX_FORMAT) -> Path:
    """An archive as img2dataset writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for i in indices:
            add(archive, f"{i:09d}.png", png(i))
            add(archive, f"{i:09d}.txt", caption(i).encode())
            add(archive, f"{i:09d}.json", json.dumps({"caption": "not this", "key": f"{i:09d}"}).encode())
    return path


def write_tars(root: Path, counts: tuple[int, ...] = (4, 3)) -> Path:
    """root/0000<k>.tar of so many pairs each."""
    starts = np.cumsum([0, *counts]).tolist()
    for k, count in enumerate(counts):
        write_tar(root / f"{k:05d}.tar", range(starts[k], starts[k] + count))
    return root
