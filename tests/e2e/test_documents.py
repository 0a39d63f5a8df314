import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "emulator" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
MIGRATION = ROOT / "docs" / "migration.md"  # the first column of its tables holds old names
SUFFIXES = (".py", ".md", ".sh", ".cpp", ".h", ".cu", ".cuh", ".json", ".toml", ".png", ".gif", ".svg")
TOPS = ("benchmarks", "build_tools", "csrc", "docs", "emulator", "examples", "python", "scripts", "tests", "wmkernels")
LINK = re.compile(r"\]\((?!https?:)([^)\s]*)\)")
CODE = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
MODULE = re.compile(r"(wmkernels|worldmodel)(\.\w+)+")
MADE = re.compile(r"RUN/|runs?/|FILE|evaluated\.mp4|imagined\.(png|gif)|config\.json|digests\.json|build/|\.\.\.")
"""What a command writes, and abbreviations."""


def text_of(page: Path) -> str:
    text = FENCE.sub("", page.read_text())
    if page == MIGRATION:
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    return text


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def alternatives(path: str) -> list[str]:
    """Expands ``a/{b,c}.py`` to ``a/b.py`` and ``a/c.py``."""
    found = re.search(r"\{([^{}]*)\}", path)
    if not found:
        return [path]
    names = found[1].split(",")
    return [each for name in names for each in alternatives(path[: found.start()] + name.strip() + path[found.end() :])]


def is_path(code: str) -> bool:
    if MADE.search(code) or code in SUFFIXES or not re.fullmatch(r"[\w.<*{][\w./<>*{},-]+", code):
        return False
    return code.endswith(SUFFIXES) or ((ROOT / code.partition("/")[0]).is_dir() and "/" in code)


def exists(path: str) -> bool:
    """In the root or one of its folders; ``<op>`` matches any name."""
    pattern = re.sub(r"<\w+>", "*", path).rstrip("/")
    return any(ROOT.glob(pattern)) or any(any((ROOT / top).glob(f"**/{pattern}")) for top in TOPS)


def resolves(module: str) -> bool:
    parts = module.split(".")
    folder = ROOT if parts[0] == "wmkernels" else ROOT / "python"
    if any((folder / "/".join(parts)).with_suffix(suffix).exists() for suffix in ("", ".py")):
        return True
    owner = folder / "/".join(parts[:-1])
    files = [owner.with_suffix(".py"), owner / "__init__.py"]
    return any(re.search(rf"\b{parts[-1]}\b", file.read_text()) for file in files if file.exists())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    missing = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in heading_anchors(target)):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_path_and_module_that_a_page_names_exists(page: Path) -> None:
    names = CODE.findall(text_of(page))
    missing = [path for name in names if is_path(name) for path in alternatives(name) if not exists(path)]
    modules = {found[0] for name in names for found in MODULE.finditer(name.partition("(")[0])}
    assert missing == []
    assert sorted(module for module in modules if not is_path(module) and not resolves(module)) == []


def test_a_path_that_does_not_exist_is_found() -> None:
    assert is_path("wmkernels/selective_scan/missing.py") and not exists("wmkernels/selective_scan/missing.py")
    assert is_path("missing.cuh") and not exists("missing.cuh")
    assert exists("wmkernels/<op>/reference.py") and exists("reference.py")
    assert alternatives("csrc/{cpu,cuda}/x.h") == ["csrc/cpu/x.h", "csrc/cuda/x.h"]
    assert resolves("worldmodel.data.batch") and resolves("worldmodel.data.batch.Batch")
    assert not resolves("worldmodel.data.missing") and not resolves("worldmodel.missing.batch")


def test_the_readme_has_fewer_than_120_lines() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
