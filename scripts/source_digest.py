"""A digest of source files without comments and layout."""

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable
from pathlib import Path


def digest(paths: Iterable[Path]) -> str:
    """Of names and code."""
    text = []
    for path in paths:
        text += [path.name, code(path.read_text(), python=path.suffix == ".py")]
    return hashlib.sha256("\0".join(text).encode()).hexdigest()


def code(source: str, python: bool) -> str:
    """C++, or ``python``, without comments, docstrings and white space."""
    if not python:
        return re.sub(r"\s+", "", re.sub(r"//[^\n]*", "", source))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                last = first.end_lineno or first.lineno
                lines[first.lineno - 1 : last] = [""] * (last - first.lineno + 1)
    indented = (re.sub(r"(?<=\S)[ \t]+", "", line).rstrip() for line in lines)
    return "\n".join(line for line in indented if line)
