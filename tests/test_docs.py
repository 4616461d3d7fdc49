"""What README and docs say: commands are ones that scripts take, links lead somewhere, examples work, flags exist."""
import ast
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import DATASETS, ROOT, SMALL, epochs_of, rows_of, write_cifar10
from processes import forked

from singlestep import methods, options

sys.path.insert(0, str(ROOT / "docs"))
import tables

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md"),
                *ROOT.glob("benchmarks/*.md")])


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def commands(text: str) -> list[str]:
    """The commands of all shell blocks, continued lines joined, and those that a sentence or a table names."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    prose = " ".join(re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S).split())
    lines += re.findall(r"`((?:python|pip|pytest|sbatch|torchrun|experiments/\w+\.sh) [^`]+)`", prose)
    return [part.strip() for line in lines for part in line.split(" && ")]


class Parsed(Exception):
    """A script has read its command line."""


@pytest.fixture
def takes(monkeypatch):
    """takes(words): the script, its flags after it, reads its command line without complaint; it does no more."""
    parse_args = options.Parser.parse_args
    monkeypatch.setattr(options, "flags_like", lambda *rest: {})  # of a run that is not there

    def stop(self, *args):
        parse_args(self, *args)
        raise Parsed

    def check(script: str, *flags: str) -> None:
        if script in DATASETS:
            if flags not in (("--method", "list"), ("--help",)):
                options.parse(DATASETS[script], argv=list(flags))
            return
        monkeypatch.setattr(sys, "argv", [script, *flags])
        monkeypatch.setattr(options.Parser, "parse_args", stop)
        monkeypatch.syspath_prepend(str((ROOT / script).parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(ROOT / script), run_name="__main__")
        monkeypatch.setattr(options.Parser, "parse_args", parse_args)

    return check


# Commands of others; their files are looked for, and they are not run.
OTHERS = r"python -m venv|(\.venv/bin/)?(pip|ruff|mypy|python -m pytest|pytest)\b|source |pre-commit |git |mkdir |cd "
# Commands that tests of their own run.
TESTED = (r"pytest tests/|python (docs/tables\.py|tests/same_bits\.py|train_five\.py|evaluate\.py five_model|"
          r"-m singlestep\.)")
COMMANDS = {command: None for page in PAGES for command in commands(page.read_text())}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_its_script_takes(command, takes):
    words = shlex.split(command.replace("{}", "0"), comments=True)  # xargs' place for a number
    while words and re.match(r"[A-Z_]+=", words[0]):
        del words[0]
    scripts = [i for i, word in enumerate(words) if word.endswith((".py", ".sh", ".slurm"))]
    if re.match(TESTED, " ".join(words)):
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
        return
    if words[:2] == ["python", "-c"]:
        compile(words[2], "README", "exec")
    elif scripts:
        script, flags = words[scripts[0]], words[scripts[0] + 1:]
        assert (ROOT / script).exists()
        if script.endswith(".py"):
            takes(script, *flags)
        else:
            subprocess.run(["bash", "-n", ROOT / script], check=True)
            takes("train_cifar.py", *(flags if "sweep" in script else []))
    else:
        assert not words or re.match(OTHERS, " ".join(words)), "no test knows this command"
        assert all((ROOT / word).exists() for word in words if word.endswith(".txt"))


def test_the_example_works_block_by_block(tmp_path, call, evaluates, short, monkeypatch):
    """As it stands, but for the number of images, which are few and random, and AutoAttack's steps."""
    pytest.importorskip("pyautoattack")
    write_cifar10(tmp_path / "cifar-data", monkeypatch, n=6)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    written: dict = {}
    printed = io.StringIO()
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs/example.md").read_text(), re.S)
    for language, block in blocks:
        if language == "python":
            with contextlib.redirect_stdout(printed):
                exec(block, written)
            continue
        for line in block.splitlines():
            _, script, *flags = shlex.split(line)
            if script == "train_cifar.py":
                status, _, error = call(script, *(flag for flag in flags if "train-samples" not in flag))
            elif script == "evaluate.py":
                status, _, error = evaluates(*flags)
            else:
                assert line == "pip install pyautoattack" and "pyautoattack" in (
                    ROOT / "requirements-dev.txt").read_text()
            assert (status, error) == (0, "")
    clean, attacked, _, *judgements = printed.getvalue().splitlines()
    x, delta, rows = written["x"], written["delta"], written["record"]["attacks"]
    assert x.shape == (6, 3, 32, 32) and 0 < delta.abs().max() <= 8 / 255 + 1e-6
    assert rows[0]["accuracy"] == pytest.approx(written["accuracy"](x)) and clean.startswith("clean:")
    assert rows[1]["accuracy"] <= written["accuracy"](x + delta) + 1 / 6 and attacked.startswith("PGD-10:")
    assert [row["attack"] for row in rows][:3] == ["clean", "pgd-10-1", "autoattack"] and len(judgements) >= 2
    picture = (Path("runs/example/pgd.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_an_installed_project_has_every_module():
    text = (ROOT / "pyproject.toml").read_text()
    listed = ast.literal_eval(re.search(r"^packages = (\[.*?\])", text, re.S | re.M)[1])
    assert listed == [".".join(path.relative_to(ROOT).parent.parts) for path in sorted(
        (ROOT / "singlestep").rglob("__init__.py"))]


def test_the_files_for_github_and_pre_commit_say_what_is_here():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: .ci/run\n" in workflow and (ROOT / ".ci/run").stat().st_mode & 0o111
    needed = re.findall(r'additional_dependencies: \["(.*?)"\]', (ROOT / ".pre-commit-config.yaml").read_text())
    assert needed and set(needed) <= set((ROOT / "requirements-dev.txt").read_text().splitlines())


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        assert (page.parent / target).exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)", (page.parent / target if target else page).read_text(), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], anchor


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_prose_is_wrapped(page):
    text = re.sub(r"^ *```.*?^ *```|^ *\|[^\n]*$", "", page.read_text(), flags=re.M | re.S)
    assert [line for line in text.splitlines() if len(line) > 120] == []


def test_the_readme_counts_the_methods():
    count = re.search(r"(\d+)\s+other methods", (ROOT / "README.md").read_text())
    assert count and int(count[1]) == len(methods.METHODS.keys() - {"zerograd", "multigrad"})


def test_every_method_has_its_paper_in_the_references():
    entries = (ROOT / "docs/references.bib").read_text().split("\n\n")
    for name, method in methods.METHODS.items():
        number = method.source.removeprefix("arXiv ")
        assert any(name in re.split("[ ,\n]+", entry) and number.split()[-1] in entry
                   for entry in entries), name


def test_every_flag_that_the_docs_name_exists_and_the_other_way_round():
    known = {option for script in DATASETS.values() for action in options.parser(script, None)._actions
             for option in action.option_strings if option.startswith("--")}
    named = set(re.findall(r"`(--[a-z][\w-]*)", "".join((ROOT / "docs" / name).read_text() for name in (
        "flags.md", "methods.md", "accuracy.md", "collapse.md", "comparisons.md", "long_runs.md",
        "sharing.md", "authors_scripts.md"))))
    elsewhere = {"--attacks", "--epsilons", "--samples", "--data-set", "--which", "--out", "--again", "--by-seed",
                 "--csv", "--latex", "--network", "--weights",  # of evaluate.py
                 "--to", "--half", "--name"}  # of export.py
    assert named - known - elsewhere == set()
    unneeded = {"--help", "--no-amp", "--no-compile", "--tf32"}
    assert known - named - unneeded == set()


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of the scripts and of the package."""
    shutil.copytree(ROOT / "singlestep", tmp_path / "project" / "singlestep",
                    ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("train_*.py"), ROOT / "evaluate.py"):
        shutil.copy(path, tmp_path / "project")
    return tmp_path / "project"


def follow(page: str, project: Path) -> list[str]:
    """Apply a section's blocks to the project, as the comments above them say. Returns the files that changed."""
    changed = []
    for order, block in re.findall(r"<!-- (.*?) -->\n```python\n(.*?)```", page, re.S):
        where, _, file = order.rpartition(" ")
        path = project / file
        text = path.read_text() if path.exists() else ""
        if where.startswith("insert below"):
            end = text.index("\n    ", text.index(f"\n    {where.split()[2]}: ") + 1) + 1
            while text[end:].startswith("     "):  # the line goes on
                end = text.index("\n", end) + 1
            text = text[:end] + block + text[end:]
        else:
            text += ("\n\n" if text else "") + block
        path.write_text(text)
        changed.append(file)
    return changed


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)[1]


def test_the_worked_example_of_a_method_works(tmp_path, project):
    changed = follow(section("Add a method"), project)
    assert changed == ["singlestep/attacks.py", "singlestep/methods.py", "singlestep/options.py"]
    flags = [*SMALL, "--method=random-length", "--shortest-step=0.5", "--fgsm-alpha=0.25", "--epsilon=8"]
    done = forked(project / "train_cifar.py", *flags, "--fname", tmp_path / "run")
    assert done.returncode == 0 and "--shortest-step=0.5" in done.stdout, done.stderr
    # A step of r alpha from a uniform start in the ball, clipped to the ball: on average a little over half of epsilon.
    assert 3.5 < epochs_of(tmp_path / "run")[0]["defence_mean"] < 5
    done = forked(project / "train_cifar.py", *flags, "--fname", tmp_path / "run", "--resume=auto", "--shortest-step=1")
    assert done.returncode == 2 and "--shortest-step 0.5, not 1.0" in done.stderr


def test_the_worked_example_of_a_data_set_works(tmp_path, project, monkeypatch):
    write_cifar10(tmp_path / "data", monkeypatch)
    follow(section("Add a data set"), project)
    unchecked = ("from torchvision import datasets\n"  # the test's files have other sums
                 "datasets.CIFAR10._check_integrity = datasets.CIFAR10._load_meta = lambda self: True\n")
    (project / "five.py").write_text(unchecked + (project / "five.py").read_text())
    small = [flag for flag in SMALL if flag not in ("--dummy", "--train-samples=80")]
    done = forked(project / "train_five.py", *small, "--data-dir", tmp_path / "data", "--fname", tmp_path / "run",
                  cwd=project)
    assert done.returncode == 0 and "CIFAR-10, five classes: 25 training images" in done.stdout, done.stderr
    assert torch.load(tmp_path / "run" / "model_1.pth", weights_only=True)["linear.weight"].shape[0] == 5
    done = forked(project / "evaluate.py", tmp_path / "run", "--device=cpu", "--attacks=clean,fgsm", cwd=project)
    assert done.returncode == 0 and rows_of(done.stdout)[0][:4] == ["clean", "", "", "5"], done.stderr


def test_the_readme_is_short_and_names_every_method():
    text = (ROOT / "README.md").read_text()
    table = len(methods.METHODS)  # a row each
    assert len(text.splitlines()) - table <= 144
    assert all(f"`{name}`" in text for name in methods.METHODS)
    page = (ROOT / "docs/methods.md").read_text()
    assert all(f"`{name}`" in page for name in (*methods.ATTACKS, *methods.OBJECTIVES))


def test_the_tables_of_methods_are_those_of_the_records(monkeypatch):
    pages = {page: (ROOT / page).read_text() for page in tables.PAGES}
    for page, text in pages.items():
        assert tables.refreshed(text) == text, f"{page} differs from the records: run python docs/tables.py --write"
        assert tables.refreshed(re.sub(r"(<!-- table: \w+ -->\n)(\|.*\n)+", r"\1", text)) == text
    for name, records in (("methods", methods.METHODS), ("attacks", methods.ATTACKS),
                          ("objectives", methods.OBJECTIVES)):
        shown, = (re.search(rf"^<!-- table: {name} -->\n((?:\|.*\n)+)", text, re.M) for text in pages.values()
                  if f"<!-- table: {name} -->" in text)
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown[1].splitlines()]
        assert [row[0] for row in rows[2:]] == [f"`{record}`" for record in records]
        assert {len(row) for row in rows} == {len(rows[0])} and all(all(row[:-1]) for row in rows)
    monkeypatch.setitem(methods.ATTACKS, "nfgsm", methods.Attack(
        dict(alpha="fgsm_alpha", q="zero_qval", parallel="multi_parallel"), defaults=dict(fgsm_alpha=0.5)))
    assert "`--fgsm-alpha=0.5`, `--zero-qval=0.35` (CIFAR-100: 0.45, SVHN: 0.7), `--multi-parallel` (off)" in (
        tables.attacks())
