"""The documentation site: its programs run, its pages name everything public, and its generated parts are current.

`make docs` builds it with warnings as errors; these tests need no Sphinx.
"""

import re
import sys
from importlib import import_module
from pathlib import Path

import pyro
import pytest

from pplgrad.estimators import registry

DOCS = Path(__file__).parents[1] / "docs"
if str(DOCS / "_ext") not in sys.path:
    sys.path.append(str(DOCS / "_ext"))
generated, docstrings = import_module("generated"), import_module("docstrings")

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
# Pages that have tests of their own, and distributed.md, whose blocks are parts of programs that need several processes.
ELSEWHERE = {"tutorial.md", "long_training.md", "studies.md", "distributed.md", "assessing.md", "contributing.md"}
SOURCES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
WRITTEN = [page for page in SOURCES if str(page.relative_to(DOCS)) not in generated.pages()]
PAGES = [page for page in WRITTEN if page.name not in ELSEWHERE and BLOCK.search(page.read_text())]


def run(page, tmp_path, monkeypatch, change=lambda code: code, only=lambda block: True):
    """Run a page's blocks in their order, in one scope."""
    monkeypatch.chdir(tmp_path)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    scope = {"__name__": "page"}
    for block in filter(only, BLOCK.findall(page.read_text())):
        exec(change(block), scope)
    pyro.clear_param_store()
    return scope


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    scope = run(page, tmp_path, monkeypatch)
    if page.name == "quickstart.md":
        assert scope["result"].losses[-20:].mean() < scope["result"].losses[:20].mean()
        assert sum(scope["losses"][-20:]) < sum(scope["losses"][:20])
    if page.name == "marginalisation.md":
        assert scope["found"]["k"].shape == (1, 100, 4, 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", ["pyro", "numpyro"])
def test_each_librarys_part_of_the_quick_start_runs_alone(library, tmp_path, monkeypatch, capsys):
    page = DOCS / "quickstart.md"
    scope = run(page, tmp_path, monkeypatch, only=lambda block: ("numpyro" in block) == (library == "numpyro"))
    assert "result" in scope if library == "numpyro" else "everywhere" in scope
    said = capsys.readouterr().out
    # At what is left of the gradient after the training.
    assert library == "numpyro" or ("unbiased to within" in said and "biased:" not in said)


def test_the_pages_that_are_run():
    found = {str(page.relative_to(DOCS)) for page in PAGES}
    guide = {
        f"guide/{name}.md"
        for name in ("baselines", "compiled", "objectives", "marginalisation", "watching", "black_box")
    }
    assert found >= guide | {f"migrating/{name}.md" for name in ("pyro", "numpyro", "storchastic", "tfp")}
    assert found >= {"quickstart.md"}


def test_the_table_of_estimators_is_current():
    text = (DOCS / "estimators" / "index.md").read_text()
    (found,) = re.findall(r"<!-- pplgrad estimators -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found == registry.markdown(), "put the output of `pplgrad estimators --format markdown` there"


def documented(pages):
    """Return the full names that the pages have an entry for."""
    text = "\n".join(pages.values())
    return re.findall(r"^\.\. auto(?:class|function):: (\S+)$", text, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("module", generated.MODULES)
def test_every_public_name_is_in_the_reference_once(module):
    found = [name for name in documented(generated.pages()) if name.rpartition(".")[0] == module]
    assert sorted(found) == sorted(f"{module}.{name}" for name in import_module(module).__all__)


def test_every_estimator_has_a_page_that_says_when_it_wins():
    words = generated.tomllib.loads(generated.WORDS.read_text())
    assert set(words) == {type(estimator).__name__ for estimator in registry.every_estimator()}
    assert all(len(text) > 40 and text.endswith(".") for text in words.values())


def test_every_estimator_can_be_chosen_or_is_a_relative_of_one_that_can():
    """The names that the table for choosing gives exist."""
    text = (DOCS / "choosing.md").read_text()
    module = import_module("pplgrad")
    names = set(re.findall(r"`([A-Z]\w+)\(", text)) - {"TraceGrad_ELBO"}
    assert len(names) > 15 and all(hasattr(module, name) for name in names)


@pytest.mark.parametrize("story", sorted((DOCS / "stories").glob("[!i]*.md")), ids=lambda path: path.stem)
def test_a_story_is_a_notebook_that_plays_an_example(story):
    """That its cells run, the building of the site shows."""
    text = story.read_text()
    assert text.startswith("---\nfile_format: mystnb\n") and "format_name: myst" in text
    assert f'play("{story.stem}", ' in text and (DOCS.parent / "examples" / f"{story.stem}.py").exists()
    for cell in re.findall(r"```\{code-cell\} ipython3\n(.*?)```", text, re.DOTALL):
        compile(cell, str(story), "exec")


def test_there_are_six_stories():
    assert len(list((DOCS / "stories").glob("[!i]*.md"))) == 6


def test_a_broken_block_and_a_forgotten_name_are_seen(tmp_path, monkeypatch):
    page = DOCS / "guide" / "baselines.md"
    with pytest.raises(Exception, match="split_optimiser"):
        run(page, tmp_path, monkeypatch, lambda code: code.replace("split_optimizer", "split_optimiser"))
    pages = generated.pages()
    del pages["estimators/REBAR.md"]
    assert "pplgrad.REBAR" in documented(generated.pages()) and "pplgrad.REBAR" not in documented(pages)


def built_inventory():
    """Return the names in the site's inventory, or nothing where the site is not built."""
    path = DOCS / "_build" / "html" / "objects.inv"
    if not path.exists():
        return None
    import zlib

    with path.open("rb") as file:
        for _ in range(4):
            file.readline()
        lines = zlib.decompress(file.read()).decode().splitlines()
    return {line.split(" ")[0] for line in lines if " py:" in line}


def test_every_public_name_is_in_the_inventory():
    found = built_inventory()
    if found is None:
        pytest.skip("the site is not built: `make docs`")
    wanted = {f"{module}.{name}" for module in generated.MODULES for name in import_module(module).__all__}
    assert wanted <= found, (
        f"{sorted(wanted - found)} are not in the site: build it again (`make docs`), or write their entry"
    )


def test_links_between_pages_lead_somewhere():
    """Sphinx checks this too, with anchors; here a page cannot be forgotten where Sphinx is not there."""
    made = generated.pages()
    for page in WRITTEN:
        for link in re.findall(r"\]\(([\w./-]+\.(?:md|py|toml|png))(?:#[\w-]+)?\)", page.read_text()):
            target = (page.parent / link).resolve()
            inside = target.relative_to(DOCS) if target.is_relative_to(DOCS) else None
            assert target.exists() or str(inside) in made, (page.name, link)


def test_every_page_is_in_the_contents():
    text = "\n".join(page.read_text() for page in WRITTEN)
    listed = {
        entry.strip()
        for block in re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
        for entry in block.split("\n")
    }
    for path in [str(page.relative_to(DOCS)) for page in WRITTEN] + [p for p in generated.pages() if "/" not in p]:
        name = path.removesuffix(".md")
        assert name == "index" or name in listed or name.rpartition("/")[2] in listed, path


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("q*(z) of layer_* and |b|", r"q\*(z) of layer\_\* and \|b\|"),
        (r"shape (n, \*event)", r"shape (n, \*event)"),
        ("the `DisARM` of `x_i`", ":py:obj:`DisARM <pplgrad.DisARM>`"),
        ("``ScoreFunction(samples=2)`` here", ":py:obj:`ScoreFunction(samples=2) <pplgrad.ScoreFunction>` here"),
        ("`lambda x: x * 2`", "``lambda x: x * 2``"),
    ],
)
def test_a_docstring_is_plain_text_with_code(text, found):
    assert found in docstrings.converted([text], docstrings.public())[0]


@pytest.mark.slow
def test_a_doctest_stays():
    lines = ["Example:", "    >>> a * b_", "    'x|y'", "", "text_ *"]
    assert docstrings.converted(lines, {})[1:] == [*lines[1:4], r"text\_ \*"]
