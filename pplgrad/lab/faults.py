"""What went wrong in a user's script, as one sentence: its own line, the site where one is known, and no traceback."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import numpy as np

from pplgrad.errors import ImpossibleValueError, PplgradError

LOOKS = 10
"""Runs of a program, of two particles each, in which a density that is not finite is looked for."""
Lines = Mapping[tuple[str, str], int]
"""Where the sites and parameters of ("guide" or "model", name) stand in the script."""

_LONGEST, _LONGEST_OWN = 300, 900
_OURS = Path(__file__).resolve().parents[1]
_PLACES = {"sample": "site", "factor": "site", "deterministic": "site", "param": "parameter"}
# What hosts append to a message for readers of a traceback.
_TABLES = re.compile(r"\s*(Trace Shapes:|-{10,}\n|JAX's tracebacks? |For simplicity, JAX has removed).*", re.DOTALL)
_REMOTE = "Traceback (most recent call last)"
_DIGITS = re.compile(r"-?\d+\.\d{5,}(?:e[+-]?\d+)?")


class ScriptError(PplgradError):
    """A model script, an option or an output folder cannot be used as given."""


class ScriptFault(ScriptError):
    """A model script raised, or returned what it must not; the message begins with the script's own line."""


class Diverged(ScriptError):
    """Training under an estimator left the finite numbers: a result of the estimator, and no fault of the script."""


def check_finite(parameters: Mapping[str, Any]) -> None:
    """Refuse parameters that are NaN or infinite."""
    for name, value in parameters.items():
        numbers = np.asarray(value)
        if numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            what = "NaN" if np.isnan(numbers).any() else "infinite"
            raise ImpossibleValueError(f"Parameter '{name}' is {what}; give it a finite start.")


def placed(path: Path, line: int | None) -> str:
    """Return a script's path with a line.

    >>> placed(Path("a.py"), 3), placed(Path("a.py"), None)
    ('a.py:3', 'a.py')
    """
    return f"{path}:{line}" if line else str(path)


def sentence(error: BaseException, path: Path, lines: Callable[[], Lines] = dict, start: int | None = None) -> str:
    """Return what went wrong, in one line that begins with the script's own.

    The line is that of the innermost frame in the script; where the error was raised after the script had returned, that
    of the site which the message names, by `lines`; else `start`, such as the line where the guide begins.
    """
    if isinstance(error, ScriptFault):
        return str(error)
    shown, frames = _told(error, path)
    own = isinstance(shown, PplgradError)
    words = shortened(str(shown), _LONGEST_OWN if own else _LONGEST)
    site, where = _site(frames, path), _where(shown, frames, path)
    if where is None:
        where = _by_name(words, path, lines, start)
    site = site if site and site.split()[-1] not in words else None
    if own:
        return f"{where}: {words}" if site is None else f"{where}: at {site}: {words}"
    head = type(shown).__name__ + (f" at {site}" if site else "")
    return f"{where}: {head}: {words}" if words else f"{where}: {head}."


def shortened(text: str, longest: int = _LONGEST) -> str:
    """Return a message on one line, with arrays and numbers cut short, without tables of shapes or tracebacks in it.

    >>> shortened("found invalid values:\\ntensor([0.12345678, 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12.])")
    'found invalid values: tensor([0.1235, 1., 2., ...])'
    """
    text = str(text)
    if _REMOTE in text:
        text = [line for line in text.splitlines() if line.strip()][-1]
    text = " ".join(_TABLES.sub("", text).split())
    text = _DIGITS.sub(lambda found: f"{float(found[0]):.4g}", text)
    text = _without_arrays(text).rstrip(" :")
    return text if len(text) <= longest else text[: longest - 4].rsplit(" ", 1)[0] + " ..."


def _without_arrays(text: str) -> str:
    """Return a text in which brackets that hold many numbers keep the first three."""
    result, start = "", 0
    while (begin := text.find("[", start)) >= 0:
        depth, end = 0, begin
        for end in range(begin, len(text)):
            depth += (text[end] == "[") - (text[end] == "]")
            if depth == 0:
                break
        inside = text[begin : end + 1]
        numbers = re.findall(r"[-+\w.]+", inside)
        many = len(numbers) > 6 and sum(
            bool(re.match(r"[-+]?(\d|\.|nan|inf|True|False)", n)) for n in numbers
        ) > 0.8 * len(numbers)
        if many:
            opened = len(inside) - len(inside.lstrip("["))
            inside = "[" * opened + ", ".join(numbers[:3]) + ", ..." + "]" * opened
        result += text[start:begin] + inside
        start = end + 1
    return result + text[start:]


def _told(error: BaseException, path: Path) -> tuple[BaseException, list[TracebackType]]:
    """Return the error to show, and the frames of the script in it or in what caused it.

    An error of pplgrad speaks for itself. A host may wrap one whose frames are the script's in another that has none.
    """
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in seen:
        seen.append(current)
        if frames := list(_frames(current, path)):
            own = isinstance(error, PplgradError)
            return error if own else current, frames
        if isinstance(current, SyntaxError) and current.filename and _users(current.filename, path):
            return current, []
        current = current.__cause__ or current.__context__
    return error, []


def raised_in(error: BaseException, path: Path) -> bool:
    """Whether the script's own frames are in an error or in what caused it."""
    return bool(_told(error, path)[1])


def _frames(error: BaseException, path: Path) -> Iterator[TracebackType]:
    step = error.__traceback__
    while step is not None:
        if _users(step.tb_frame.f_code.co_filename, path):
            yield step
        step = step.tb_next


@lru_cache(maxsize=4096)
def _users(filename: str, path: Path) -> bool:
    """Whether a file is the script or one that lies beside it, and is not installed there."""
    try:
        file, script = Path(filename).resolve(), path.resolve()
    except OSError:
        return False
    beside = script.parent in file.parents and not {"site-packages", "dist-packages"} & set(file.parts)
    return file == script or (beside and _OURS not in file.parents)


def is_script(filename: str, path: Path) -> bool:
    """Whether a file is the script itself."""
    return _users(filename, path) and Path(filename).resolve() == path.resolve()


def _where(error: BaseException, frames: list[TracebackType], path: Path) -> str | None:
    """Return the script's innermost line, and the neighbour's that it led to."""
    own = [step for step in frames if is_script(step.tb_frame.f_code.co_filename, path)]
    neighbour = frames[-1] if frames and (not own or frames[-1] is not own[-1]) else None
    beside = None if neighbour is None else (neighbour.tb_frame.f_code.co_filename, neighbour.tb_lineno)
    if isinstance(error, SyntaxError) and error.filename and _users(error.filename, path):
        if is_script(error.filename, path):
            return placed(path, error.lineno)
        beside = (error.filename, error.lineno or 1)
    remote = [int(n) for file, n in re.findall(r'File "([^"]+)", line (\d+)', str(error)) if is_script(file, path)]
    if remote:
        # A callback that the host ran elsewhere has its traceback in the message alone.
        return placed(path, remote[-1])
    near = f" ({Path(beside[0]).name}:{beside[1]})" if beside else ""
    if own:
        return placed(path, own[-1].tb_lineno) + near
    return f"{path}{near}" if near else None


def _by_name(words: str, path: Path, lines: Callable[[], Lines], start: int | None) -> str:
    """Return the line of the first site or parameter that a message names."""
    known = lines()
    sides = (
        ("model", "guide")
        if re.search(r"\bmodel\b", words) and not re.search(r"\bguide\b", words)
        else ("guide", "model")
    )
    for name in re.findall(r"'([^']+)'", words):
        for side in sides:
            if (side, name) in known:
                return placed(path, known[side, name])
    return placed(path, start)


def _site(frames: list[TracebackType], path: Path) -> str | None:
    """Return the site (or the parameter) in whose statement the error was raised."""
    for step in reversed(frames):
        calls = [call for call in _calls(step.tb_frame.f_code.co_filename) if _encloses(call, step)]
        for call in sorted(calls, key=lambda c: (-c.lineno, -c.col_offset)):
            name = _text(call.args[0] if call.args else None, step.tb_frame)
            if name is not None:
                return f"{_PLACES[_called(call)]} '{name}'"
    return None


def _calls(filename: str) -> list[ast.Call]:
    """Return the statements of a file that draw, observe, add or register something with a name."""
    try:
        tree = ast.parse(Path(filename).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _called(node) in _PLACES]


def _called(call: ast.Call) -> str:
    function = call.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _encloses(call: ast.Call, step: TracebackType) -> bool:
    """Whether what was executing stands inside a call."""
    code: CodeType = step.tb_frame.f_code
    line, end, column, last = list(code.co_positions())[step.tb_lasti // 2]
    if line is None or column is None or end is None or last is None:
        return call.lineno <= step.tb_lineno <= (call.end_lineno or call.lineno)
    first = (call.lineno, call.col_offset) <= (line, column)
    return first and (end, last) <= (call.end_lineno or 0, call.end_col_offset or 0)


def _text(node: ast.expr | None, frame: FrameType) -> str | None:
    """Return the name that a literal, a variable or an f-string of variables stands for."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            found: Any = frame.f_locals.get(name, frame.f_globals.get(name))
            return str(found) if isinstance(found, (str, int)) else None
        case ast.JoinedStr(values=parts):
            texts = [_text(part.value if isinstance(part, ast.FormattedValue) else part, frame) for part in parts]
            return None if None in texts else "".join(text for text in texts if text is not None)
        case _:
            return None


def caller_line(path: Path, frame: FrameType | None) -> int | None:
    """Return the script's line that called what is running."""
    while frame is not None:
        if is_script(frame.f_code.co_filename, path):
            return frame.f_lineno
        frame = frame.f_back
    return None


def begins(function: Any, path: Path) -> int | None:
    """Return the line of the script where a function begins, if it is the script's."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    return code.co_firstlineno if code is not None and is_script(code.co_filename, path) else None


def named_at(path: Path, name: str) -> int | None:
    """Return the line of the script that defines or assigns a name at its top level."""
    try:
        body = ast.parse(path.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    for node in reversed(body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name == name:
            return node.lineno
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.lineno
    return None
