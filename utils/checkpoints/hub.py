"""Checkpoints of the Hugging Face hub by name: which files a name means, fetched to the hub's cache on this machine.

    FoundationVision/LlamaGen:c2i_B_256.pt      a file of a repository
    owner/name                                  a repository with one checkpoint, or owner/name:folder with one there
    owner/name@revision:file                    a branch, a tag or a commit

A file or folder of that name here comes first. The address, the token and the cache are huggingface_hub's: HF_ENDPOINT,
HF_TOKEN (or `hf auth login`), HF_HOME, HF_HUB_OFFLINE.
"""
import contextlib
import functools
import importlib.util
import re
import socket
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from utils import cli, dist
from utils.checkpoints.file_index import INDEX_END, IS_PART
from utils.checkpoints.sharded import INDEX, STATE
from utils.files import few, first_line

SECONDS = 5.0  # that the hub may take to answer
WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors", "model.safetensors.index.json",
         "diffusion_pytorch_model.safetensors.index.json", "consolidated.pth", "pytorch_model.bin",
         "pytorch_model.bin.index.json")  # names of a repository's one checkpoint, what cannot run code first
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
CONFIG = "config.json"
PART = r"[A-Za-z0-9_][\w.-]{0,95}"
NAME = re.compile(rf"({PART}/{PART})(?:@([\w./-]+))?(?::([^:@\\]+)(?:@([\w./-]+))?)?", flags=re.ASCII)


@dataclass(frozen=True)
class HubName:
    """A repository, and what of it: a file, a folder, or the one checkpoint that it has."""

    repository: str
    inside: str | None = None  # file or folder
    revision: str | None = None

    def __str__(self) -> str:
        return (self.repository + (f"@{self.revision}" if self.revision else "")
                + (f":{self.inside}" if self.inside else ""))

    @property
    def file_name(self) -> str:
        """The name of the file, the folder or the repository, without what it lies in."""
        return PurePosixPath(self.inside or self.repository).name

    @property
    def stem(self) -> str:
        """The same without the ending of a file of weights."""
        return next((self.file_name.removesuffix(end) for end in WEIGHTS if self.file_name.endswith(end)),
                    self.file_name)

    def download_command(self, files: Sequence[str] = ()) -> str:
        """What to run on a machine that reaches the hub."""
        words = [self.repository, *(files or ([self.inside] if self.inside else []))]
        words += ["--revision", self.revision] if self.revision else []
        return f"`hf download {' '.join(words)} --local-dir {PurePosixPath(self.repository).name}`"


def hub_name(given: str | Path) -> HubName | None:
    """What a path means on the hub. None: it is a file or folder here, or a path to one that is missing.

    owner/name is no name of the hub if it ends as a file of weights does, or if the folder `owner` is here.
    """
    found = NAME.fullmatch(str(given))
    if found is None or Path(given).exists():
        return None
    repository, before, inside, behind = found.groups()
    owner, name = repository.split("/")
    if (before and behind) or ".." in repository or (inside and not _is_inside(inside)):
        return None
    if inside is None and before is None and (Path(owner).is_dir() or name.endswith((*WEIGHTS, ".json", ".npz"))):
        return None
    return HubName(repository, inside.strip("/") if inside else None, before or behind)


def _is_inside(path: str) -> bool:
    return not path.startswith("/") and not {"..", "."} & set(path.split("/")) and bool(path.strip("/"))


def known_as(given: str | Path) -> str:
    """The name of a checkpoint's file or folder, wherever it lies."""
    name = hub_name(given)
    return Path(given).name if name is None else name.file_name


def hint(given: str | Path) -> str:
    """What to add to the message that there is no such file: how names of the hub are written, if one may be meant."""
    text = str(given)
    if re.match(r"[A-Za-z][\w+.-]+:/", text):
        return ": a checkpoint is a file or folder here, or a name of the hub (owner/name:file), not a URL"
    if re.match(rf"{PART}/{PART}[:@]", text):
        return ": on the hub a file is called owner/name:file, or owner/name@revision:file"
    return ""


def answers() -> bool:
    """Whether the hub can be asked: HF_HUB_OFFLINE is not set, and its address takes a connection within seconds."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    try:
        port = address.port or {"http": 80}.get(address.scheme, 443)
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True


def local_copy(name: HubName, *, token: str | bool | None = None, cache_dir: str | Path | None = None,
               force_download: bool = False, local_files_only: bool = False) -> Path:
    """The file of weights, or the folder of a training checkpoint, that a name means, in the hub's cache; fetched if
    it is not there. Several processes may ask at once: one of them fetches a file. A process asks once for a name.

    Raises ValueError or FileNotFoundError, soon and in one line, that says what to do.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        raise FileNotFoundError(f"there is no file or folder {name} here, and the hub cannot be asked for it without "
                                f"huggingface_hub: {sys.executable} -m pip install huggingface_hub")
    from huggingface_hub import constants

    if dist.env_rank() > 0:
        from huggingface_hub.utils import disable_progress_bars
        disable_progress_bars()
    cache = str(cache_dir or constants.HF_HUB_CACHE)
    return _fetched(name, constants.ENDPOINT, cache, token, force_download,
                    local_files_only or constants.HF_HUB_OFFLINE)


@functools.lru_cache(maxsize=64)
def _fetched(name: HubName, endpoint: str, cache: str, token: str | bool | None, force: bool, offline: bool) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    revision = name.revision or "main"
    if offline or not answers():
        return _from_cache(name, cache, "HF_HUB_OFFLINE is set" if offline else f"{endpoint} cannot be reached")
    try:
        info = HfApi(endpoint=endpoint, token=token).model_info(name.repository, revision=revision, timeout=SECONDS)
    except Exception as error:  # huggingface_hub's, and those of the HTTP client of its version
        refused = _refusal(name, error, endpoint)
        if refused is not None:
            raise refused from None
        return _from_cache(name, cache, f"{endpoint} does not answer ({first_line(error)[:150]})")
    wanted = files_meant(name, [sibling.rfilename for sibling in info.siblings or ()])
    try:
        found = [Path(hf_hub_download(name.repository, file, revision=revision, cache_dir=cache, token=token,
                                      endpoint=endpoint, force_download=force)) for file in wanted]
    except Exception as error:  # as above, and hf_xet's
        if isinstance(error, PermissionError):
            raise OSError(f"{name} cannot be kept in the hub's cache ({first_line(error)}): set HF_HOME to a folder "
                          "that can be written to") from None
        raise _refusal(name, error, endpoint) or OSError(
            f"{name} could not be fetched from {endpoint} ({first_line(error)[:200]}): run it again, or "
            f"{name.download_command(wanted)} and give what it writes") from None
    roots = {str(path).removesuffix(file) for path, file in zip(found, wanted, strict=True)}
    if len(roots) > 1:
        raise OSError(f"{name} was changed on the hub just now: run it again")
    return _meant(Path(roots.pop()), wanted)


def _meant(snapshot: Path, wanted: list[str]) -> Path:
    """What to read of the files that were wanted: the first, or their folder if they are a training checkpoint."""
    first = snapshot / wanted[0]
    return first.parent if first.name == STATE else first


def _from_cache(name: HubName, cache: str, why: str) -> Path:
    """What an earlier call fetched. Raises FileNotFoundError where that is not all there."""
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(cache) / repo_folder_name(repo_id=name.repository, repo_type="model")
    reference = folder / "refs" / (name.revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else name.revision or ""
    snapshot = folder / "snapshots" / commit
    names = [str(path.relative_to(snapshot).as_posix()) for path in snapshot.rglob("*")
             if path.is_file()] if commit and snapshot.is_dir() else []
    if not names or (name.inside and not any(_lies_in(file, name.inside) for file in names)):
        raise FileNotFoundError(f"there is no file or folder {name} here, nor is it in the hub's cache, and {why}: "
                                f"where the hub can be reached, {name.download_command()}, and give what it writes")
    meant = _meant(snapshot, files_meant(name, names))
    cli.warn(f"{why}: {name} is taken from the hub's cache ({meant.name} of {commit[:12]})", kind="note")
    return meant


def _lies_in(file: str, place: str) -> bool:
    return file == place or file.startswith(f"{place}/")


def files_meant(name: HubName, names: Sequence[str]) -> list[str]:
    """Which of a repository's files a name means, the one to be read first. Raises ValueError or FileNotFoundError."""
    if name.inside in names:
        return _with_what_belongs(name.inside, names)
    folder = "" if name.inside is None else f"{name.inside}/"
    inside = [file.removeprefix(folder) for file in names if file.startswith(folder)]
    inside = [file for file in inside if "/" not in file]
    if {STATE, INDEX} <= set(inside):  # the order of a set of names is not the same in two processes
        return [folder + STATE, *(folder + file for file in sorted(inside) if file != STATE)]
    weights = sorted(file for file in inside if file.endswith(WEIGHTS) and not IS_PART.search(file))
    safe = [file for file in weights if file.endswith(".safetensors")]
    known = next((file for file in WHOLE if file in inside), None)
    chosen = [known] if known else safe or weights
    if not chosen:
        there = [file for file in sorted(names) if file.endswith((*WEIGHTS, INDEX_END)) and not IS_PART.search(file)]
        said = f"it has {few(there, most=12)}" if there else "it has no checkpoint at all"
        raise FileNotFoundError(f"the hub's repository {name.repository} has no checkpoint "
                                f"{name.inside or 'at its top'}: {said}")
    if len(chosen) > 1:
        raise ValueError(f"{name} holds {len(chosen)} checkpoints: say which, as {name.repository}:{folder}{chosen[0]} "
                         f"({few(chosen, most=12)})")
    return _with_what_belongs(folder + chosen[0], names)


def _with_what_belongs(file: str, names: Sequence[str]) -> list[str]:
    """A file, the parts that an index speaks of, and the config.json that describes safetensors."""
    folder = file[:-len(PurePosixPath(file).name)]
    beside = [other for other in sorted(names) if other.startswith(folder) and "/" not in other[len(folder):]]
    kind = next((end for end in WEIGHTS if file.endswith((end, end + INDEX_END))), None)
    parts = [other for other in beside if file.endswith(INDEX_END) and IS_PART.search(other)
             and other.endswith(kind or WEIGHTS)]
    config = [folder + CONFIG] if kind == ".safetensors" and folder + CONFIG in beside else []
    return [file, *parts, *config]


def _refusal(name: HubName, error: Exception, endpoint: str) -> Exception | None:
    """The one line for what the hub refuses; None for what it could not do just now."""
    from huggingface_hub import errors

    page, token = f"{endpoint}/{name.repository}", "`hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return ValueError(f"{name} is gated: ask for access at {page}, then {token}")
    if isinstance(error, errors.RevisionNotFoundError):
        return FileNotFoundError(f"the hub's repository {name.repository} has no revision {name.revision or 'main'}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return FileNotFoundError(f"there is no file or folder {name} here, and the hub has no repository "
                                 f"{name.repository}, or a private one: for that, {token}")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return FileNotFoundError(f"the hub's repository {name.repository} has no {name.inside or 'such file'}")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return ValueError(f"{endpoint} does not let you read {name} ({status}): {token}")
    return None


@contextlib.contextmanager
def pushing(repository: str) -> Iterator[None]:
    """Within the block, what huggingface_hub raises while it writes to a repository is one line."""
    from huggingface_hub import constants, errors

    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.LocalTokenNotFoundError) or status in (401, 403):
            raise ValueError(f"{constants.ENDPOINT} does not let you write to {repository}: `hf auth login` with a "
                             "token that may write, or set HF_TOKEN") from None
        if isinstance(error, errors.HFValidationError):
            raise ValueError(f"{repository} is no name of a repository: expected owner/name ({first_line(error)[:200]})"
                             ) from None
        if isinstance(error, errors.HfHubHTTPError | ConnectionError) or type(error).__module__.split(".")[0] in (
                "httpx", "httpx2", "requests", "httpcore"):
            raise OSError(f"{repository} could not be written to {constants.ENDPOINT} ({first_line(error)[:200]}): run "
                          "it again") from None
        raise
