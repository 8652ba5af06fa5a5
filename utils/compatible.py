"""Names that LlamaGen's modules have and ours lack: looked for in compatibility/ when somebody asks for one."""
import importlib
from collections.abc import Callable
from typing import Any


def missing_names(module: str) -> Callable[[str], Any]:
    """The `__getattr__` (PEP 562) of a module, which is called for names that it lacks.

    They are those in `__all__` of compatibility/<last name of the module>.py. That file is imported only then, so that
    the module itself depends on nothing above it.
    """
    def look_up(name: str) -> Any:
        if not name.startswith("__"):
            room = importlib.import_module(f"compatibility.{module.rpartition('.')[2]}")
            if name in room.__all__:
                return getattr(room, name)
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look_up
