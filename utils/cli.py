"""Command lines from dataclasses: a field is a flag, declared once with its help.

    @dataclass(kw_only=True)
    class Options:
        cfg_scale: float = flag(1.0, "classifier-free guidance scale; 1 switches it off")

A subclass changes a default by restating the field with a plain value (`cfg_scale: float = 4.0`); help and choices
stay those of the declaration. `run` is what an entry calls: parse, execute, turn a user's mistake into one line.
"""
import argparse
import dataclasses
import importlib.util
import inspect
import json
import multiprocessing
import os
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from tqdm import tqdm

from utils import dist
from utils.files import plain, replacing
from utils.recipes import recipe_flags, recipe_path

Config = TypeVar("Config")
REQUIRED = dataclasses.MISSING
OLDEST_TORCH = (2, 8)  # the oldest that the test suite was run with: see CONTRIBUTING.md


def flag(default: Any, help: str, *, choices: tuple | None = None, parse: Callable[[str], Any] | None = None,
         positional: bool = False, repeated: bool = False) -> Any:
    """Declare a flag: a dataclass field with its help. `REQUIRED` as the default makes it mandatory.

    `positional`: it is given without its name, in the order of declaration. `repeated`: it may be given many times, and
    the field holds a list of the values, or its default, None.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "parse": parse,
                                                        "positional": positional, "repeated": repeated})


def build_parser(config_class: type, *, described_in: str | None = None) -> argparse.ArgumentParser:
    """The argparse parser of a dataclass whose fields were declared with `flag`.

    `described_in`: the module whose docstring's first line describes the command; None: the dataclass's own.

    --help has a group for each class that declares some of the flags, the command's own first. The first sentence of
    that class's docstring is the title, the rest of its first paragraph the description.
    """
    doc = sys.modules[described_in or config_class.__module__].__doc__ or ""
    parser = _Parser(description=doc.strip().split("\n")[0], allow_abbrev=False, add_help=False)
    parser.recipe_sections = getattr(config_class, "recipe_sections", ())
    parser.recipe_in_part = getattr(config_class, "recipe_in_part", False)
    parser.give_way = getattr(config_class, "give_way", lambda config, typed: None)
    fields, hints = dataclasses.fields(config_class), typing.get_type_hints(config_class)
    homes = {field.name: declaring_class(config_class, field.name) for field in fields}
    groups = {home: parser.add_argument_group(*titled(home)) for home in config_class.__mro__ if home in homes.values()}
    needed = []
    for field in fields:
        home = homes[field.name]
        needed += add_flag(groups[home], field, hints[field.name], **home.__dataclass_fields__[field.name].metadata)
    next(iter(groups.values())).add_argument("-h", "--help", action="help", help="show this text and exit")
    parser.usage = " ".join(["%(prog)s", *needed, "[flags]"])
    return parser


def add_flag(group: argparse._ArgumentGroup, field: dataclasses.Field, hint: Any, *, help: str, choices: tuple | None,
             parse: Callable[[str], Any] | None, positional: bool, repeated: bool) -> list[str]:
    """Add a field as a flag. Returns how to give it on the command line when it must be given, else nothing."""
    required = field.default is dataclasses.MISSING
    text = help + ("" if required or field.default is None else f" (default: {shown(field.default)})")
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if not required:
        options["default"] = field.default
    if positional:
        group.add_argument(field.name, metavar=field.name.upper(), type=checked(parse or str), **options)
        return [field.name.upper()]
    options |= {"dest": field.name, "required": required}
    kind = scalar(hint)
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options |= {"type": checked(parse or kind), "choices": choices} | ({"action": "append"} if repeated else {})
    name = "--" + field.name.replace("_", "-")
    group.add_argument(name, **options)
    return [f"{name} {field.name.upper()}"] if required else []


def declaring_class(config_class: type, name: str) -> type:
    """The class in the inheritance chain whose own field `name` was declared with flag(...)."""
    for base in config_class.__mro__:
        if name in inspect.get_annotations(base) and base.__dataclass_fields__[name].metadata:
            return base
    raise AssertionError(f"{config_class.__name__}.{name} has no flag(...) declaration in any base")


def titled(config_class: type) -> tuple[str, str | None]:
    """(first sentence, rest of the first paragraph or None) of a class's docstring."""
    paragraph = " ".join(inspect.getdoc(config_class).split("\n\n")[0].split())
    title, _, rest = paragraph.partition(". ")
    return title.removesuffix("."), rest or None


def run(main: Callable[[Config], None], config_class: type[Config], argv: list[str] | None = None) -> None:
    """Parse the command line and call main(config). A user's mistake prints one line and exits 2, no traceback.

    Set LLAMAGEN_TRACEBACK=1 to see where the line came from. An error that ended a long run has left its traceback in
    the run's folder (`error.traceback_file`), and the line says where.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        fail(f"torch {'.'.join(map(str, OLDEST_TORCH))} or newer is needed, this is {torch.__version__}: "
             "pip install --upgrade torch torchvision", quiet=dist.env_rank() > 0)
    config = build_parser(config_class, described_in=main.__module__).parse_args(argv, namespace=_Bare())
    try:
        main(config_class(**vars(config)))
    except KeyboardInterrupt:
        print("interrupted; to continue run it again, training with --resume auto", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if isinstance(error, RuntimeError) and dist.lost_contact(error):
            reason = message(error).splitlines()[0][:200]
            if dist.speaks_for_all(patience=2.0):
                print(f"error: lost contact with another process, which has died or hangs ({reason}); run it again to "
                      "continue, a training with --resume auto", file=sys.stderr, flush=True)
            os._exit(2)  # an orderly exit would wait for threads that wait for the other process
        kept = getattr(error, "traceback_file", None)
        if os.environ.get("LLAMAGEN_TRACEBACK") or not (kept or isinstance(error, ValueError | OSError)):
            raise
        where = f" (the traceback is in {kept})" if kept else ""
        fail(f"{'' if isinstance(error, ValueError | OSError) else type(error).__name__ + ': '}{message(error)}{where}",
             quiet=not dist.speaks_for_all())
    finally:
        dist.shutdown()


def require_package(name: str, *, purpose: str, package: str | None = None) -> None:
    """Raise ValueError that says what to install when a module that few commands need is missing; `package`: what it is
    called there, if not the same."""
    if importlib.util.find_spec(name) is None:
        package = package or name
        raise ValueError(f"{purpose} needs {package}: {sys.executable} -m pip install {package}")


def fail(text: str, *, quiet: bool) -> NoReturn:
    """Print the one line, unless another process says it, and exit 2."""
    if not quiet:
        print("error: " + one_line(text), file=sys.stderr, flush=True)
    sys.exit(2)


def say(text: str) -> None:
    """Print a line on rank 0, above the progress bar."""
    if dist.env_rank() == 0:
        tqdm.write(one_line(text))
        sys.stdout.flush()


def warn(text: str, *, kind: str = "warning", every_rank: bool = False) -> None:
    """Print a warning, or another `kind` of remark ("note"), in one line; on rank 0, unless each has its own."""
    if every_rank or dist.env_rank() == 0:
        write = print if multiprocessing.parent_process() else tqdm.write  # a loading process may not take tqdm's lock
        write(f"{kind}: {one_line(text)}", file=sys.stderr)


def one_line(text: str) -> str:
    """A text that cannot do more to a terminal than fill a line."""
    return plain(" ".join(text.split()))


def message(error: Exception) -> str:
    """The text of an exception, without the traceback that a DataLoader worker puts around it."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:
        return text.rstrip().splitlines()[-1].split(": ", 1)[-1]
    return text or type(error).__name__


def as_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready values."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}


def save_config(path: Path, config: Any, **derived: Any) -> None:
    """Write the resolved config, and what was derived from it, as JSON beside what it produced."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps({**as_dict(config), **derived}, indent=2, default=str) + "\n")


def image_size(text: str) -> tuple[int, int]:
    """Parse "256" or "256x384" (height x width, pixels)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("expected a size such as 256 or 256x384 (height x width)")
    return int(parts[0]), int(parts[-1])


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, without the usage. --a_b means --a-b.

    The flags of a --recipe count as typed before those of the command line, so the latter win. Flags before a lone `--`
    are a launch script's own defaults: a recipe wins over them. Where a flag rules out the value that a weaker source
    gave another one, the command's `give_way(config, stronger)` takes that value back; `stronger` are names of fields.
    """

    recipe_sections: tuple[str, ...] = ()  # of a recipe; none: the command takes no recipes
    recipe_in_part: bool = False  # the sections are another command's: flags that this one does not take are left out

    def parse_known_args(self, args=None, namespace=None):
        """Parse --a_b as --a-b, which is how some of LlamaGen's scripts spell their flags."""
        words = [hyphenated(word) for word in (sys.argv[1:] if args is None else args)]
        end = words.index("--") if "--" in words else -1
        defaults, words = words[:max(end, 0)], words[end + 1:]
        try:
            supplied = self.recipe_words(words) if self.recipe_sections else []
        except (ValueError, OSError) as error:
            fail(message(error), quiet=dist.env_rank() > 0)
        config, unknown = super().parse_known_args([*defaults, *supplied, *words], namespace)
        for stronger in (words, [*supplied, *words]):
            self.give_way(config, {word.partition("=")[0].removeprefix("--").replace("-", "_") for word in stronger
                                   if word.startswith("--")})
        return config, unknown

    def recipe_words(self, words: list[str]) -> list[str]:
        """The flags of the recipe that `words` name, as one would type them. Raises ValueError for wrong ones."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--recipe", nargs="?")
        name = finder.parse_known_args(words)[0].recipe
        supplied = []
        for key, value in recipe_flags(name, self.recipe_sections).items() if name else ():
            action = self._option_string_actions.get(f"--{key}")
            if action is None and self.recipe_in_part:
                continue
            wrong = "is no flag of this command" if action is None else misfit(action, value)
            if wrong:
                raise ValueError(f"{recipe_path(name)}: --{key} {wrong}")
            supplied.append({True: f"--{key}", False: f"--no-{key}"}[value] if isinstance(value, bool)
                            else f"--{key}={value}")
        return supplied

    def error(self, message: str) -> NoReturn:
        fail(f"{message} (see --help)", quiet=dist.env_rank() > 0)


class _Bare(argparse.Namespace):
    """Receives the parsed flags."""


def misfit(action: argparse.Action, value: Any) -> str | None:
    """What is wrong with a recipe's value for a flag; None: nothing."""
    switch = isinstance(action, argparse.BooleanOptionalAction)
    if switch != isinstance(value, bool):
        return f"is {value!r}, expected {'true or false' if switch else 'a value'}"
    if switch:
        return None
    if not isinstance(value, str | int | float):
        return f"is {value!r}, expected a number or a text"
    try:
        parsed = action.type(str(value))
    except (argparse.ArgumentTypeError, TypeError) as error:
        return f"is {value!r}: {error}"
    if action.choices is not None and parsed not in action.choices:
        return f"is {value!r}, choose from {', '.join(map(str, action.choices))}"
    return None


def hyphenated(word: str) -> str:
    """A flag's name with hyphens, its value as it is."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def scalar(hint: Any) -> type:
    """The type inside `X | None` or `list[X]`; str for Literal."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    if typing.get_origin(hint) is list:
        hint, = typing.get_args(hint)
    return str if typing.get_origin(hint) is typing.Literal else hint


def shown(default: Any) -> str:
    """A default as one would type it."""
    return "x".join(map(str, default)) if isinstance(default, tuple) else str(default)


def shown_size(size: tuple[int, int]) -> str:
    """An image size as it stands in names of folders: 256, or 256x384."""
    return shown(tuple(size) if size[0] != size[1] else size[0])


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let argparse show the message of a parser's ValueError."""
    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    return convert
