"""Packed stores that lie elsewhere: any URL that fsspec understands (s3://, gs://, hf://, https://, …).

A store is copied to the user's cache before training, then memory-mapped like any other. Not file by file when first
touched: batches are drawn from all over the store, so the first of them touch every file; training would stand still
for them one at a time, without a bar. What a cut connection leaves is kept, file by file.

The cache's folder is named by the hash of the manifest, and a file gets there whole and with the hash that the manifest
states, so what another version of the store left is never taken for this one, and processes may fetch at once.
"""
import hashlib
import shutil
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dataset.code_check import codes_cache, local_place
from dataset.code_manifest import FORMAT, file_hashes, parse_manifest
from utils import dist
from utils.files import file_hash, first_line, replacing

THREADS = 8  # files on the way at a time: object stores answer slowly and to many
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "http": "aiohttp",
            "https": "aiohttp", "az": "adlfs", "abfs": "adlfs", "ssh": "paramiko", "sftp": "paramiko"}


class DamagedFileError(Exception):
    """A file came, but it is not the one that the manifest speaks of."""


def is_url(path: str) -> bool:
    """Whether a path is for fsspec."""
    return "://" in path


def fetch_store(url: str, *, subfolder: str | None = None, kind: str = FORMAT) -> tuple[Path, dict[str, str]]:
    """Copy the packed store, of format `kind`, at `url` or in its `subfolder` to the cache → (folder, {file: what is
    wrong with it}).

    All processes call this together. Raises ValueError or OSError, one line that names what cannot be had.
    """
    files, root = filesystem(url)
    root, text = find_manifest(files, root, url=url, subfolder=subfolder)
    manifest = parse_manifest(text, f"{url}: manifest.json", kind=kind)
    folder = codes_cache() / hashlib.sha256(text.encode()).hexdigest()[:32]
    hashes = file_hashes(manifest)
    rank, workers = local_place()
    wanted = [name for name in list(hashes)[rank::workers] if not (folder / name).is_file()]
    damaged: dict[str, str | None] = {}
    failed: list[str] = []
    pool = ThreadPoolExecutor(THREADS)
    try:
        jobs = {pool.submit(fetch_file, files, f"{root}/{name}", folder / name, sha256=hashes[name]): name
                for name in wanted}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc=f"fetching {url}", unit="file", mininterval=1.0,
                        delay=1.0, disable=dist.env_rank() > 0):
            damaged[jobs[job]] = job.result()
    except OSError as error:
        failed.append(str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    failed = dist.gather_lists(failed)
    if failed:
        raise OSError(f"{failed[0]}; run it again to go on, {folder} keeps what has come")
    if len(set(dist.gather_lists([folder.name]))) > 1:  # processes read one version and the next
        raise OSError(f"{url} was changed just now: run it again")
    with replacing(folder / "manifest.json") as temporary:
        temporary.write_text(text)
    return folder, {name: said for part in dist.gather_lists([damaged]) for name, said in part.items() if said}


def filesystem(url: str, *, flag: str = "--code-path") -> tuple[Any, str]:
    """(fsspec file system, path in it) of a URL, which `flag` gave. Raises ValueError that names a missing package."""
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"{flag} {url} needs fsspec: pip install fsspec") from None
    protocol = url.partition("://")[0]
    try:
        files, root = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(protocol)
        raise ValueError(f"{flag} {url}: " + (f"{protocol}:// needs {package}: pip install {package}" if package
                                                   else first_line(error))) from None
    except ValueError as error:  # no such protocol
        raise ValueError(f"{flag} {url}: {first_line(error)}") from None
    return files, root.rstrip("/")


def has_manifest(url: str, *, subfolder: str | None = None) -> bool:
    """Whether a packed store is at `url`, or in its `subfolder`. Raises ValueError that names a missing package."""
    files, root = filesystem(url, flag="--data-path")
    try:
        return any(files.exists(f"{place}/manifest.json") for place in ([root, f"{root}/{subfolder}"] if subfolder
                                                                       else [root]))
    except Exception:  # back ends raise what they like; who reads the store says what is wrong
        return True


def find_manifest(files: Any, root: str, *, url: str, subfolder: str | None) -> tuple[str, str]:
    """(path of the store, its manifest). Raises FileNotFoundError when there is none."""
    for place in [root, f"{root}/{subfolder}"] if subfolder else [root]:
        try:
            return place, files.cat_file(f"{place}/manifest.json").decode(errors="replace")
        except FileNotFoundError:
            continue
        except Exception as error:  # back ends raise what they like
            raise OSError(f"--code-path {url}: manifest.json cannot be fetched ({first_line(error)[:200]})") from None
    below = f", nor does {subfolder} in it" if subfolder else ""
    raise FileNotFoundError(f"--code-path {url} holds no manifest.json{below}: give the URL of a packed store itself, "
                            "such as <url>/imagenet256_codes")


def fetch_file(files: Any, source: str, target: Path, *, sha256: str) -> str | None:
    """Copy one file. Returns what is wrong if it is missing or has another hash; raises OSError if it does not come."""
    name = files.unstrip_protocol(source)
    try:
        with replacing(target) as temporary:
            with files.open(source, "rb") as incoming, open(temporary, "wb") as outgoing:
                shutil.copyfileobj(incoming, outgoing, 2**22)
            found = file_hash(temporary)
            if found != sha256:
                raise DamagedFileError(f"{name} has SHA-256 {found[:12]}…, its manifest says {sha256[:12]}…")
    except DamagedFileError as error:
        return str(error)
    except FileNotFoundError:
        return f"{name} is missing"
    except Exception as error:  # back ends raise what they like
        raise OSError(f"{name} cannot be fetched ({first_line(error)[:200]})") from None
    return None
