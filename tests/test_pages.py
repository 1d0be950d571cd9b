"""The README and the pages in docs/ speak of what is there: files, lines, functions, flags; and their Python runs."""
import json
import re

import data
import eval as evaluation
import generate
import model
import train
from conftest import ROOT
from docs import calibrate

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_link_leads_to_a_file():
    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", page.read_text()) if "://" not in link]
    assert len(links) > 20 and [link for page, link in links if not (page.parent / link).is_file()] == []


def test_no_picture_and_no_page_is_left_unlinked():
    linked = {(page.parent / link).resolve() for page in PAGES for link in re.findall(r"\]\(([^)]+)\)", page.read_text())}
    assert [p.name for p in (ROOT / "docs").iterdir() if p.suffix in (".svg", ".md") and p not in linked] == []


def test_the_file_table_counts_lines_right():
    rows = dict(re.findall(r"^\| (\w+\.py) \| (\d+) \|", PAGES[0].read_text(), re.M))
    assert len(rows) == 5 and {name: int(n) for name, n in rows.items()} == {
        name: (ROOT / name).read_text().count("\n") for name in rows}
    assert sum(map(int, rows.values())) <= 1500


def test_every_function_that_the_tour_names_exists():
    """They stand in brackets behind an idea's name: **Confidence** (`confidence` in generate.py)."""
    heads = re.findall(r"^\d+\. \*\*.+?\*\* \(`(.+?)\)\. ", PAGES[0].read_text(), re.M | re.S)
    names = [name for head in heads for name in re.findall(r"(?:^|`)([A-Za-z_][\w.]*)(?:\(.*?\))?`", head)]
    assert len(heads) == 17 and len(names) > 20
    for first, *rest in (name.split(".") for name in names):
        found = next(vars(m)[first] for m in (model, generate, train, evaluation, calibrate, data) if first in vars(m))
        assert not rest or hasattr(found, *rest), (first, rest)


def test_the_pages_show_no_flag_that_no_script_defines():
    """Flags are strings of their own where they are added; torchrun's, pip's and pytest's are not ours."""
    source = "".join(p.read_text() for folder in (".", "docs") for p in (ROOT / folder).glob("*.py"))
    source += "".join((ROOT / "tests" / f"{name}.py").read_text() for name in ("bench", "bench_train", "smollm2", "kill", "calibration"))
    defined = set(re.findall(r'"(--[a-z][a-z-]*)"', source))
    theirs = {"--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id", "--shutdown-timeout", "--no-deps"}
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", "".join(p.read_text() for p in PAGES)))
    assert len(shown) > 40 and shown - defined - theirs == set()


def test_the_readmes_python_says_what_the_command_says(monkeypatch, capsys, tokenizer, tmp_path):
    block = re.search(r"```python\n(.+?)```", PAGES[0].read_text(), re.S).group(1)
    question = eval(re.search(r"prompt_text\((dict\(.+?\))\)", block).group(1))
    (tmp_path / "q.json").write_text(json.dumps([question | dict(output="")]))
    monkeypatch.chdir(ROOT)
    exec(block, {})
    printed = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["generate.py", "--ckpt", "tiny", "--threshold", "0.9", "--dtype", "bfloat16", "--json", "--data", str(tmp_path / "q.json")])
    generate.main()
    told = json.loads(capsys.readouterr().out)
    assert printed == "".join(f"{n} {tokenizer.decode([token])}\n" for token, n in zip(told["tokens"], told["exits"]))
    assert len(told["tokens"]) > 5 and min(told["exits"]) < 8
