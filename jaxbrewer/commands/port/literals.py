"""The configs a Python file writes out, read from its text alone: nothing in it is run.

Calls of ``TrainingConfig`` and ``DistillationConfig`` are found with their arguments, and dicts
that are intermediate matches or an ``emd`` argument. Values are literals, plain arithmetic and
joined lists of them, ``torch.device('…')``, and names bound once to such a value. Everything else
is reported with its line.
"""

import ast
import dataclasses
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from jaxbrewer.configurations.configs import DistillationConfig, TrainingConfig

CONFIGS = {"TrainingConfig": TrainingConfig, "DistillationConfig": DistillationConfig}

_BUDGET = 50_000  # values a file may spell out, so that lists of lists of lists end
_DEPTH = 40
_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_NAMING = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs,
    ast.MatchStar,
)  # fmt: skip
_ARITHMETIC = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_LARGEST = 10**18
_CHANGING = frozenset({
    "append", "extend", "insert", "pop", "remove", "clear", "update", "sort", "reverse",
    "setdefault", "popitem",
})  # fmt: skip


@dataclass(frozen=True)
class Unread:
    """An argument that is not a literal.

    Attributes:
        name: the argument.
        line: where it stands.
        why: what is there instead.
    """

    name: str
    line: int
    why: str


@dataclass
class Written:
    """A config or list of matches that a file writes out.

    Attributes:
        kind: ``training``, ``distillation``, ``matches``, ``emd`` or ``file``.
        line: where it stands.
        values: the arguments that could be read; a list for ``matches``, a file's name for
            ``file``.
        unread: those that could not.
        name: the name it is bound to, if any.
    """

    kind: str
    line: int
    values: Any
    unread: list[Unread] = field(default_factory=list)
    name: str = ""


class NotLiteralError(ValueError):
    """An expression whose value only running it would tell."""

    def __init__(self, node: ast.AST, why: str):
        super().__init__(why)
        self.line = getattr(node, "lineno", 0)


def parse(text: str) -> ast.Module:
    """Parses Python text.

    Raises:
        ValueError: it is not Python, with the line, or nested beyond reason.
    """
    try:
        with warnings.catch_warnings():  # what Python says of its escapes is the file's business
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            return ast.parse(text)
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno}: not Python: {error.msg}") from error
    except (RecursionError, MemoryError) as error:
        raise ValueError("nested too deeply to be read") from error


def written_configs(tree: ast.Module) -> list[Written]:
    """Every config, match and ``emd`` dict in a file, in the order of their lines."""
    reader = _Reader(tree)
    found = [written for call in reader.calls for written in reader.config(call)]
    found += reader.loose_dicts()
    return sorted(found, key=lambda written: written.line)


class _Reader:
    """Resolves expressions of one file."""

    def __init__(self, tree: ast.Module):
        self.scope_of: dict[ast.AST, tuple[ast.AST, ...]] = {}
        self.parent: dict[ast.AST, ast.AST] = {}
        self.bindings: dict[ast.AST, dict[str, list[ast.expr | None]]] = {}
        self.changed: set[str] = set()
        self.used: set[ast.AST] = set()
        self.budget = _BUDGET
        self.aliases = {name: name for name in CONFIGS}
        nodes = list(self._walk(tree))
        for node in nodes:
            self._note_bindings(node)
        self._spread_changes()
        self.calls = [n for n in nodes if isinstance(n, ast.Call) and self._config_of(n)]
        self.dicts = [n for n in nodes if isinstance(n, ast.Dict)]

    # ---- finding one's way ---------------------------------------------------------------------

    def _walk(self, tree: ast.Module) -> Iterator[ast.AST]:
        """Every node, each with the scopes around it noted, without recursion."""
        pending: list[tuple[ast.AST, tuple[ast.AST, ...]]] = [(tree, (tree,))]
        self.bindings[tree] = {}
        while pending:
            node, scopes = pending.pop()
            self.scope_of[node] = scopes
            yield node
            inner = scopes
            if isinstance(node, _SCOPES):
                inner = (*scopes, node)
                self.bindings[node] = {}
            for child in ast.iter_child_nodes(node):
                self.parent[child] = node
                pending.append((child, inner))

    def _note_bindings(self, node: ast.AST) -> None:
        """Notes what a node binds, and what it changes in place."""
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            self._bind(node, node.id, self._bound_value(node))
        elif isinstance(node, ast.arg):
            self._bind(node, node.arg, None)
        elif isinstance(node, _NAMING) and node.name:
            self._bind(node, node.name, None)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                self._bind(node, alias.asname or alias.name.split(".")[0], None)
                if alias.name in CONFIGS and alias.asname:
                    self.aliases[alias.asname] = alias.name
        elif isinstance(node, ast.Global | ast.Nonlocal):
            self.changed.update(node.names)
        elif isinstance(node, ast.Subscript | ast.Attribute):
            self._note_change(node)

    def _bind(self, node: ast.AST, name: str, value: ast.expr | None) -> None:
        self.bindings[self.scope_of[node][-1]].setdefault(name, []).append(value)

    def _bound_value(self, name: ast.Name) -> ast.expr | None:
        """What a plain assignment that always runs binds to a name; None for any other binding."""
        statement = self.parent.get(name)
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or name is statement.value:
            return None
        if isinstance(statement, ast.Assign) and len(statement.targets) > 1:
            return None
        around = self.parent.get(statement)
        plain = around is self.scope_of[statement][-1] or _is_main(around)
        return statement.value if plain else None

    def _note_change(self, node: ast.Subscript | ast.Attribute) -> None:
        """Notes names whose value is changed in place: ``x[…] = …``, ``x.append(…)``."""
        stored = not isinstance(node.ctx, ast.Load)
        called = isinstance(node, ast.Attribute) and node.attr in _CHANGING
        root: ast.expr = node
        while isinstance(root, ast.Subscript | ast.Attribute):
            root = root.value
        if (stored or called) and isinstance(root, ast.Name):
            self.changed.add(root.id)

    def _spread_changes(self) -> None:
        """What is changed under one name is changed under the name it came from."""
        pending = list(self.changed)
        while pending:
            name = pending.pop()
            for bound in self.bindings.values():
                for value in bound.get(name, ()):
                    if isinstance(value, ast.Name) and value.id not in self.changed:
                        self.changed.add(value.id)
                        pending.append(value.id)

    def _config_of(self, call: ast.Call) -> tuple[str, str] | None:
        """Which config a call makes, and by which method: ``('TrainingConfig', 'from_dict')``."""
        function, method = call.func, ""
        if isinstance(function, ast.Attribute) and function.attr in ("from_dict", "from_json_file"):
            method, function = function.attr, function.value
        if isinstance(function, ast.Attribute) and function.attr in CONFIGS:
            return function.attr, method
        if isinstance(function, ast.Name) and function.id in self.aliases:
            return self.aliases[function.id], method
        return None

    # ---- configs -------------------------------------------------------------------------------

    def config(self, call: ast.Call) -> Iterator[Written]:
        """What one call of a config class writes out."""
        name, method = self._config_of(call) or ("", "")
        self.used.update(ast.walk(call))
        kind = name.removesuffix("Config").lower()
        written = Written(kind, call.lineno, {}, name=self._name_of(call))
        if method == "from_json_file":
            argument = call.args[0] if call.args else None
            values, unread = self._try("json_filename", argument or call)
            if isinstance(values, str):
                yield Written("file", call.lineno, values, name=kind)
            else:
                why = unread.why if unread else "it is no text"
                written.unread.append(Unread("from_json_file", call.lineno, why))
                yield written
            return
        if method == "from_dict":
            for argument in [*call.args, *(k.value for k in call.keywords)][:1]:
                self._spread(written, argument)
        else:
            self._read_arguments(written, call, CONFIGS[name])
        yield written

    def _read_arguments(self, written: Written, call: ast.Call, cls: Any) -> None:
        names = [f.name for f in dataclasses.fields(cls) if not f.kw_only]
        for i, argument in enumerate(call.args):
            if isinstance(argument, ast.Starred) or i >= len(names):
                why = _source(argument) + " is not a list of arguments written out"
                written.unread.append(Unread("arguments", argument.lineno, why))
                break
            self._set(written, names[i], argument)
        for keyword in call.keywords:
            if keyword.arg is None:
                self._spread(written, keyword.value)
            else:
                self._set(written, keyword.arg, keyword.value)

    def _spread(self, written: Written, argument: ast.expr, depth: int = 0) -> None:
        """Takes the items of a dict as arguments, each by itself where the dict is written out."""
        try:
            if depth > _DEPTH:
                raise NotLiteralError(argument, "too deeply nested to be read")
            node = self._follow(argument)
        except NotLiteralError as error:
            written.unread.append(Unread("**", error.line, str(error)))
            return
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self._set(written, key.value, value)
                elif key is None:
                    self._spread(written, value, depth + 1)
                else:
                    why = f"the key {_source(key)} is not a literal"
                    written.unread.append(Unread("**", value.lineno, why))
            return
        values, unread = self._try("**", argument)
        if isinstance(values, dict) and all(isinstance(key, str) for key in values):
            written.values.update(values)
        else:
            written.unread.append(unread or Unread("**", argument.lineno, "it is no dict"))

    def _set(self, written: Written, name: str, node: ast.expr) -> None:
        value, unread = self._try(name, node)
        if unread is None:
            written.values[name] = value
        else:
            written.unread.append(unread)

    def _try(self, name: str, node: ast.expr) -> tuple[Any, Unread | None]:
        try:
            return self.value(node), None
        except NotLiteralError as error:
            return None, Unread(name, error.line, str(error))

    # ---- dicts outside of configs --------------------------------------------------------------

    def loose_dicts(self) -> list[Written]:
        """Matches and ``emd`` dicts that no config has used: lists by name, others by line."""
        lists: dict[ast.AST, Written] = {}
        found: list[Written] = []
        for node in self.dicts:
            keys = {k.value for k in node.keys if isinstance(k, ast.Constant)}
            if node in self.used or not keys & {"layer_T", "layer_num_S"}:
                continue
            values: Any
            values, unread = self._try("emd" if "layer_num_S" in keys else "match", node)
            problems = [unread] if unread else []
            if "layer_num_S" in keys:
                found.append(Written("emd", node.lineno, values or {}, problems))
                continue
            around = self.parent[node]
            if not isinstance(around, ast.List | ast.Tuple):
                around = node
            if around not in lists:
                name = self._name_of(around)
                lists[around] = Written("matches", around.lineno, {}, name=name)
            if unread is None:
                lists[around].values[node.lineno, node.col_offset] = values
            lists[around].unread += problems
        for written in lists.values():
            written.values = [value for _, value in sorted(written.values.items())]
        return found + list(lists.values())

    def _name_of(self, node: ast.AST) -> str:
        statement = self.parent.get(node)
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            return statement.targets[0].id
        return ""

    # ---- values --------------------------------------------------------------------------------

    def value(self, node: ast.expr, depth: int = 0) -> Any:
        """The value of an expression.

        Raises:
            NotLiteralError: only running it would tell.
        """
        self.budget -= 1
        if depth > _DEPTH or self.budget < 0:
            raise NotLiteralError(node, "too large or too deeply nested to be read")
        if isinstance(node, ast.Constant) and not isinstance(node.value, bytes | complex):
            return node.value
        if isinstance(node, ast.List | ast.Tuple):
            return [self.value(item, depth + 1) for item in node.elts]
        if isinstance(node, ast.Dict):
            return self._dict(node, depth)
        if isinstance(node, ast.UnaryOp | ast.BinOp):
            return self._arithmetic(node, depth)
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        if isinstance(node, ast.Subscript):
            return self._item(node, depth)
        if isinstance(node, ast.Name):
            return self.value(self._follow(node), depth + 1)
        raise NotLiteralError(node, f"{_source(node)} is not a literal")

    def _follow(self, node: ast.expr) -> ast.expr:
        """The expression a name stands for, through further names; others as they are."""
        for _ in range(_DEPTH):
            if not isinstance(node, ast.Name):
                self._use(node)
                return node
            bound = self._bound(node)
            if not bound:
                raise NotLiteralError(node, f"{node.id} is not bound in this file")
            if len(bound) > 1:
                raise NotLiteralError(node, f"{node.id} is bound {len(bound)} times")
            if node.id in self.changed:
                raise NotLiteralError(node, f"{node.id} is changed after it is bound")
            if bound[0] is None:
                raise NotLiteralError(node, f"{node.id} is not bound to a literal")
            node = bound[0]
        raise NotLiteralError(node, "names stand for names without end")

    def _bound(self, name: ast.Name) -> list[ast.expr | None]:
        """Everything a name is bound to in the scope it is looked up in."""
        scopes = self.scope_of[name]
        for scope in reversed(scopes):
            hidden = isinstance(scope, ast.ClassDef) and scope is not scopes[-1]
            if name.id in self.bindings[scope] and not hidden:
                return self.bindings[scope][name.id]
        return []

    def _use(self, node: ast.AST) -> None:
        """Notes that a config has read what stands in an expression, or tried to."""
        if node not in self.used:
            self.used.update(ast.walk(node))

    def _dict(self, node: ast.Dict, depth: int) -> dict[Any, Any]:
        found = {}
        for key, value in zip(node.keys, node.values, strict=True):
            if key is None:
                inner = self.value(value, depth + 1)
                if not isinstance(inner, dict):
                    raise NotLiteralError(value, f"**{_source(value)} is no dict")
                found.update(inner)
                continue
            made = self.value(key, depth + 1)
            if isinstance(made, list | dict):
                raise NotLiteralError(key, f"{_source(key)} cannot be a key")
            found[made] = self.value(value, depth + 1)
        return found

    def _arithmetic(self, node: ast.UnaryOp | ast.BinOp, depth: int) -> Any:
        if isinstance(node, ast.UnaryOp):
            value = self.value(node.operand, depth + 1)
            if isinstance(node.op, ast.USub) and _is_number(value):
                return -value
            if isinstance(node.op, ast.Not) and isinstance(value, bool):
                return not value
            raise NotLiteralError(node, f"{_source(node)} is not a literal")
        left, right = self.value(node.left, depth + 1), self.value(node.right, depth + 1)
        lists = isinstance(left, list) and isinstance(right, list)
        operation = _ARITHMETIC.get(type(node.op))
        numbers = all(_is_number(x) and abs(x) <= _LARGEST for x in (left, right))
        if operation is None or not (numbers or (lists and isinstance(node.op, ast.Add))):
            raise NotLiteralError(node, f"{_source(node)} is not a literal")
        if lists:
            self.budget -= len(left) + len(right)
        try:
            return operation(left, right)
        except ArithmeticError as error:
            raise NotLiteralError(node, f"{_source(node)}: {error}") from error

    def _call(self, node: ast.Call, depth: int) -> Any:
        """``torch.device('cuda')``, ``torch.device('cuda', 1)`` and ``dict(a=1)``."""
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        name = node.func.id if isinstance(node.func, ast.Name) else name
        if name == "device" and node.args and not node.keywords:
            parts = [self.value(argument, depth + 1) for argument in node.args]
            if isinstance(parts[0], str):
                return ":".join(map(str, parts))
        if name == "dict" and not node.args and all(k.arg for k in node.keywords):
            return {k.arg: self.value(k.value, depth + 1) for k in node.keywords}
        raise NotLiteralError(node, f"{_source(node)} is not a literal")

    def _item(self, node: ast.Subscript, depth: int) -> Any:
        """``matches['L3_hidden_mse']`` where both are written out."""
        try:
            table = self._follow(node.value)
        except NotLiteralError as error:
            raise NotLiteralError(node, f"{_source(node)}: {error}") from error
        index = self.value(node.slice, depth + 1)
        if isinstance(table, ast.Dict) and not isinstance(index, list | dict):
            for key, value in zip(table.keys, table.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == index:
                    return self.value(value, depth + 1)
        raise NotLiteralError(node, f"{_source(node)} is not a literal")


def _is_main(node: ast.AST | None) -> bool:
    """Whether a statement is ``if __name__ == …``."""
    test = node.test if isinstance(node, ast.If) else None
    name = test.left if isinstance(test, ast.Compare) else None
    return isinstance(name, ast.Name) and name.id == "__name__"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _source(node: ast.AST) -> str:
    """An expression as text, cut where it is long."""
    try:
        text = " ".join(ast.unparse(node).split())
    except (RecursionError, ValueError):
        return "this expression"
    return text if len(text) <= 60 else text[:57] + "…"
