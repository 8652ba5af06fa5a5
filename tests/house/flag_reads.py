"""Which fields of a command's flags the command reads: the value that `main` is given is followed through the source.

It goes where it is passed (functions, constructors, methods), where it is kept (`self.flags = flags`, and then in every
method of that class) and into its own methods and properties. Only what is read of it there counts: a field of the same
name of another object does not, nor does a line that merely records all flags.
"""
import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
Definition = tuple[str, ast.stmt]  # (module, what defines a name at its top level)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def source(module: str) -> str | None:
    """The text of a module of ours, None where there is none."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    return path.read_text() if path.is_file() else None


@functools.cache
def top_level(module: str) -> dict[str, ast.stmt | tuple[str, str]]:
    """The names that a module defines, and those that it imports from another of ours: (module, name)."""
    tree, names = ast.parse(source(module)), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    for node in tree.body:
        for target in getattr(node, "targets", [getattr(node, "target", node)]):
            names[getattr(target, "id", getattr(target, "name", ""))] = node
    return names


def defined(module: str, name: str) -> Definition | str | None:
    """What a name in a module stands for: a definition of ours, a module's name, or None for all else."""
    if source(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    found = top_level(module).get(name) if source(module) is not None else None
    return defined(*found) if isinstance(found, tuple) else (module, found) if found else None


def named(home: str, part: ast.AST) -> Definition | None:
    """The definition that an expression names: `f`, or `module.f`."""
    found = defined(home, part.id) if isinstance(part, ast.Name) else None
    if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
        owner = defined(home, part.value.id)
        found = defined(owner, part.attr) if isinstance(owner, str) else None
    return found if isinstance(found, tuple) else None


def reached(module: str) -> list[Definition]:
    """The definitions that a module's `main` can reach by their names."""
    todo, seen = [defined(module, "main")], {}
    while todo:
        home, node = todo.pop()
        if node not in seen:
            seen[node] = home
            todo += filter(None, (named(home, part) for part in ast.walk(node)))
    return [(home, node) for node, home in seen.items()]


class Reads:
    """Follows the flags of one command; `fields` is what is read of them."""

    def __init__(self, module: str) -> None:
        self.fields: set[str] = set()
        self.given: dict[ast.AST, set[str]] = {}  # function → names of its parameters that are the flags
        self.kept: set[tuple[str, str]] = set()  # (class, attribute) that hold them
        self.returned: set[Function] = set()  # functions that return them
        self.classes: dict[str, Definition] = {}
        self.functions: list[tuple[str, Function, str | None]] = []  # (module, function, class it is a method of)
        _, main = defined(module, "main")
        for home, node in reached(module):
            if isinstance(node, Function):
                self.functions.append((home, node, None))
            if isinstance(node, ast.ClassDef):
                self.classes[node.name] = home, node
                self.functions += [(home, part, node.name) for part in node.body if isinstance(part, Function)]
        self.given[main] = {main.args.args[0].arg}
        self.flags = [name for name in self.classes if name.endswith("Flags")]
        before = None
        while before != (before := (len(self.fields), len(self.kept), sum(map(len, self.given.values())),
                                    len(self.returned))):
            for home, function, owner in self.functions:
                self.home = home
                self.look(home, function, owner)

    def bases(self, name: str) -> list[str]:
        """A class of ours and those that it inherits from."""
        _, node = self.classes[name]
        above = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in self.classes]
        return [name, *(name for base in above for name in self.bases(base))]

    def look(self, home: str, function: Function, owner: str | None) -> None:
        """Note what a function reads of the flags, where it keeps them and to whom it gives them."""
        names = set(self.given.get(function, ()))
        self.types = {"self": owner, **self.types_in(home, function)}
        for part in ast.walk(function):  # other names for them
            if isinstance(part, ast.Assign):
                for target, value in pairs(part):
                    if self.is_flags(value, names, owner):
                        if isinstance(target, ast.Name):
                            names.add(target.id)
                        if isinstance(target, ast.Attribute) and getattr(target.value, "id", "") == "self" and owner:
                            self.kept.add((owner, target.attr))
        copied = any(isinstance(part, ast.Call) and getattr(part.func, "id", "") == "vars"
                     and self.is_flags(part.args[0], names, owner) for part in ast.walk(function))
        for part in ast.walk(function):
            if isinstance(part, ast.Return) and part.value is not None and (
                    self.is_flags(part.value, names, owner) or (copied and makes_flags(part.value))):
                self.returned.add(function)
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Load) and self.is_flags(part.value, names,
                                                                                                  owner):
                self.read(part.attr)
            if isinstance(part, ast.Call):
                if getattr(part.func, "id", "") == "getattr" and self.is_flags(part.args[0], names, owner):
                    self.fields |= words(part.args[1], function, home)
                else:
                    self.follow(part, names, home, owner)

    def types_in(self, home: str, function: Function) -> dict[str, str]:
        """The classes of ours that parameters are annotated with, and that local names are made by."""
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        found = {part.arg: named(home, part.annotation) for part in arguments}
        found |= {target.id: named(home, value.func) for part in ast.walk(function) if isinstance(part, ast.Assign)
                  for target, value in pairs(part) if isinstance(target, ast.Name) and isinstance(value, ast.Call)}
        return {name: known[1].name for name, known in found.items()
                if known and getattr(known[1], "name", "") in self.classes}

    def is_flags(self, part: ast.AST, names: set[str], owner: str | None) -> bool:
        """Whether an expression is the command's flags."""
        if isinstance(part, ast.Name):
            return part.id in names
        if isinstance(part, ast.Attribute):
            known = self.types.get(getattr(part.value, "id", ""))
            return any(attribute == part.attr and (known is None or holder in self.bases(known))
                       for holder, attribute in self.kept)
        if not isinstance(part, ast.Call):
            return False
        found = named(self.home, part.func)
        return (found is not None and found[1] in self.returned) or (
            bool(part.args) and self.is_flags(part.args[0], names, owner)
            and getattr(part.func, "attr", getattr(part.func, "id", "")) == "replace")  # dataclasses.replace

    def read(self, name: str) -> None:
        """A field is read, or a method or property of the flags is used: then `self` there are the flags."""
        self.fields.add(name)
        for method in self.methods(name, self.flags):
            self.given.setdefault(method, set()).add("self")

    def methods(self, name: str, classes: list[str]) -> list[Function]:
        """The methods of a name in some classes."""
        return [part for each in classes for part in self.classes[each][1].body
                if isinstance(part, Function) and part.name == name]

    def follow(self, call: ast.Call, names: set[str], home: str, owner: str | None) -> None:
        """Give the flags to the function that is called with them."""
        called, given = call.func, call.args
        if getattr(called, "id", "") == "partial":
            called, given = given[0], given[1:]
        places = [i for i, part in enumerate(given) if self.is_flags(part, names, owner)]
        keywords = [word.arg for word in call.keywords if self.is_flags(word.value, names, owner)]
        if not places and not keywords:
            return
        for target, skipped in self.targets(called, home, owner):
            if isinstance(target, ast.ClassDef):  # a dataclass keeps what its fields are given
                fields = [part.target.id for part in target.body if isinstance(part, ast.AnnAssign)]
                filled = [*(fields[i] for i in places if i < len(fields)), *keywords]
                self.kept |= {(target.name, name) for name in filled}
                continue
            arguments = [part.arg for part in [*target.args.posonlyargs, *target.args.args]][skipped:]
            taken = self.given.setdefault(target, set())
            taken |= {arguments[i] for i in places if i < len(arguments)} | set(keywords)

    def targets(self, called: ast.AST, home: str, owner: str | None) -> list[tuple[ast.AST, int]]:
        """(what may be called, how many of its first parameters are not among the arguments)."""
        found = named(home, called)
        if isinstance(called, ast.Subscript) and isinstance(called.value, ast.Dict):  # {"one": f, "other": g}[which]
            return [target for value in called.value.values for target in self.targets(value, home, owner)]
        if isinstance(called, ast.Attribute) and ast.unparse(called.value) == "super()" and owner:
            return [(method, 1) for method in self.methods(called.attr, self.bases(owner)[1:])]
        if getattr(called, "id", "") == "cls" and owner:
            found = self.classes[owner]
        if found is None and isinstance(called, ast.Attribute):
            known = named(home, called.value)  # a method of a named class, else of any class that has it
            within = self.bases(known[1].name) if known and getattr(known[1], "name", "") in self.classes else \
                list(self.classes)
            return [(method, 0 if is_static(method) else 1) for method in self.methods(called.attr, within)]
        if found and isinstance(found[1], Function):
            return [(found[1], 0)]
        if found and isinstance(found[1], ast.ClassDef) and found[1].name in self.classes:
            makers = self.methods("__init__", self.bases(found[1].name))
            return [(makers[0], 1)] if makers else [(found[1], 0)]
        return []


def makes_flags(part: ast.AST) -> bool:
    """Whether an expression is `SomeFlags(**…)`."""
    return isinstance(part, ast.Call) and getattr(part.func, "id", "").endswith("Flags")


def is_static(method: Function) -> bool:
    """Whether a method takes neither self nor cls."""
    return any(getattr(part, "id", "") == "staticmethod" for part in method.decorator_list)


def pairs(assign: ast.Assign) -> list[tuple[ast.AST, ast.AST]]:
    """(target, value) of an assignment, `a, b = x, y` included."""
    found = []
    for target in assign.targets:
        both = isinstance(target, ast.Tuple) and isinstance(assign.value, ast.Tuple)
        found += zip(target.elts, assign.value.elts, strict=False) if both else [(target, assign.value)]
    return found


def words(part: ast.AST, function: Function, home: str) -> set[str]:
    """The strings that the name in `getattr(flags, name)` runs through: a constant, or what a loop around it goes over.

    `for field in dataclasses.fields(SomeFlags)` is over the fields of that class.
    """
    if isinstance(part, ast.Constant):
        return {part.value}
    name = ast.unparse(part).split(".")[0]
    found: set[str] = set()
    for loop in ast.walk(function):
        if isinstance(loop, ast.For | ast.comprehension) and re.search(rf"\b{name}\b", ast.unparse(loop.target)):
            found |= strings(loop.iter, function, home)
    return found


def strings(part: ast.AST, function: Function, home: str, depth: int = 3) -> set[str]:
    """The strings in an expression, and in what the names in it were made of."""
    found = {text.value for text in ast.walk(part) if isinstance(text, ast.Constant) and isinstance(text.value, str)}
    for name in (node.id for node in ast.walk(part) if isinstance(node, ast.Name)) if depth else ():
        for assign in ast.walk(function):
            if isinstance(assign, ast.Assign) and any(getattr(target, "id", "") == name for target in assign.targets):
                found |= strings(assign.value, function, home, depth - 1)
        known = defined(home, name)
        if isinstance(known, tuple) and isinstance(known[1], ast.Assign | ast.AnnAssign) and known[1].value is not None:
            found |= strings(known[1].value, function, known[0], depth - 1)
        if isinstance(known, tuple) and isinstance(known[1], ast.ClassDef):
            found |= fields_of(known)
    return found


def fields_of(definition: Definition) -> set[str]:
    """The fields of a class of flags and of those that it inherits from."""
    home, node = definition
    above = [found for base in node.bases if (found := named(home, base))]
    return {part.target.id for part in node.body if isinstance(part, ast.AnnAssign)}.union(*map(fields_of, above))


@functools.cache
def read_fields(module: str) -> frozenset[str]:
    """The fields that the command of a module reads of its flags."""
    return frozenset(Reads(module).fields)
