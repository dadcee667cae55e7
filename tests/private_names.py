"""The private names of the hosts that this library uses: found in its source, so that each has a canary."""

import ast
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "pplgrad"
# Python's own.
OURS = {"_fields", "_getframe", "_lru_cache_wrapper", "_replace"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


def names(folder):
    """Return the private names in a folder of pplgrad that nothing in pplgrad defines."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    defined = {path.stem for path in trees} | OURS
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            defined.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
    found = set()
    for path, tree in trees.items():
        if SOURCE / folder in path.parents:
            found.update(name for node in ast.walk(tree) for name in _used(node))
    return {name for name in found if is_private(name)} - defined


def _used(node):
    if isinstance(node, ast.Attribute):
        yield node.attr
    elif isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("pplgrad"):
        yield from node.module.split(".")
        yield from (alias.name for alias in node.names)
