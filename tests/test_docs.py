"""What README and docs say: commands parse, links lead somewhere, the worked example works, flags exist."""
import re
import shlex

import pytest
from conftest import DATASETS, ROOT, SMALL, epochs_of

import attacks
import options

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/*.md"),
                *ROOT.glob("benchmarks/*.md")])


def commands(text: str) -> list[str]:
    """The lines of all shell blocks, continued ones joined, without indentation."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.M | re.S)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else page.parent.name)
def test_every_training_command_is_one_that_its_script_takes(page):
    for command in commands(page.read_text()):
        found = re.search(r"(train_\w+\.py)(.*)", command)
        if found and "--method list" not in command:
            options.parse(DATASETS[found[1]], argv=[word for word in shlex.split(found[2]) if word != "list"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name if page.parent == ROOT else page.parent.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_flag_that_the_docs_name_exists_and_the_other_way_round():
    known = {option for script in DATASETS.values() for action in options.parser(script, None)._actions
             for option in action.option_strings if option.startswith("--")}
    named = set(re.findall(r"`(--[a-z][\w-]*)", "".join((ROOT / "docs" / name).read_text() for name in (
        "flags.md", "methods.md", "accuracy.md", "long_runs.md"))))
    elsewhere = {"--attacks", "--epsilons", "--samples", "--data-set", "--which"}  # of evaluate.py
    assert named - known - elsewhere == set()
    unneeded = {"--help", "--no-amp", "--no-compile", "--tf32"}
    assert known - named - unneeded == set()


def test_the_worked_example_of_a_method_works(tmp_path, call, small_dummy, monkeypatch):
    text = (ROOT / "docs/methods.md").read_text()
    function, line = (re.search(rf"<!-- example: {file} -->\n```python\n(.*?)```", text, re.S)[1] for file in (
        "attacks.py", "options.py"))
    monkeypatch.setattr(options, "ATTACKS", dict(options.ATTACKS))
    written: dict = {}
    exec(function, vars(attacks), written)
    name, = written
    monkeypatch.setattr(attacks, name, written[name], raising=False)
    exec(line, vars(options))
    assert call("train_cifar.py", *SMALL, f"--attack={name}", "--fname", tmp_path / "run")[0] == 0
    assert 0 < epochs_of(tmp_path / "run")[0]["defence_mean"] <= 8


def test_the_readme_is_short_and_names_every_method():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    assert all(f"`{name}`" in text for name in options.METHODS)
    methods = (ROOT / "docs/methods.md").read_text()
    assert all(f"`{name}`" in methods for name in (*options.ATTACKS, *options.OBJECTIVES))
