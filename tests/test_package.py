"""The package: what an install adds, that it works beside a user's own modules, and which file imports which."""
import ast
import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from helpers import ROOT

import attacks
import preactresnet
import singlestep.attacks
import singlestep.networks
import utils

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# A user's own modules, with names that modules of this project have, had, or might be thought to have.
NEIGHBOURS = ("utils.py", "data/__init__.py", "evaluate/__init__.py", "attacks/__init__.py", "train.py", "options.py",
              "checkpoint.py", "run/__init__.py")
SCRIPTS = {"train_cifar", "train_cifar100", "train_svhn", "train_tiny", "evaluate", "export", "plot"}
ARRAYS = {"torch", "torchvision", "numpy", "scipy"}
# Every file of the package, by its module's name.
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
         for path in sorted((ROOT / "singlestep").rglob("*.py"))}


def python(*words: str, cwd: Path, path: str = "") -> str:
    """Run Python with `path` before its own packages. Returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env={**environment, "PYTHONPATH": path}, timeout=280,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Build a wheel from a copy of the project's files. Returns the folder that it is installed into."""
    pytest.importorskip("setuptools", "70.1", reason="an older setuptools needs the package wheel")
    if not (ROOT / ".git").exists():
        pytest.skip("git lists the project's files")
    work = tmp_path_factory.mktemp("install")
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", ".", ":!build", ":!*.egg-info"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (work / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, work / "copy" / name)
    pip = ["-m", "pip", "--isolated", "--disable-pip-version-check"]
    python(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir=wheels", "./copy", cwd=work)
    wheel, = (work / "wheels").iterdir()
    python(*pip, "install", "--no-index", "--no-deps", "--no-compile", "--target=installed", str(wheel), cwd=work)
    return work / "installed"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's folder, in which every module raises an error when it is imported."""
    for name in NEIGHBOURS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"raise RuntimeError('the package imported {name}')\n")
    return tmp_path


def test_an_install_adds_one_package_with_all_its_files(installed):
    packages = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert packages == {"singlestep"} and len(list(installed.iterdir())) == 2
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == {
        path.relative_to(ROOT) for path in FILES.values()}


def test_it_works_beside_a_users_own_modules(installed, folder):
    (folder / "mine.py").write_text("""
import sys

import singlestep.attacks
import singlestep.evaluation
import singlestep.figures
import singlestep.objectives
import singlestep.train
import torch
from singlestep import evaluate, load_run, load_test, seed_everything
from singlestep.networks import PreActResNet18

seed_everything(0)
torch.save(PreActResNet18(10, base_width=4).state_dict(), "network.pth")
model, args = load_run("network.pth", data_set="cifar10", base_width=4)
x, y = load_test(args.data_set, n=4, synthetic=True)
for name, flags in {"fgsm": {}, "zerograd": {"q": 0.35}, "multigrad": {"samples": 3}, "pgd": {"steps": 2}}.items():
    delta = getattr(singlestep.attacks, name)(model, x, y, 8 / 255, 2 / 255, **flags)
    assert delta.shape == x.shape and 0 < delta.abs().max() <= 8 / 255 + 1e-6, name
print(singlestep.__file__, sorted(sys.modules))
""")
    *_, last = python("mine.py", cwd=folder, path=str(installed)).splitlines()  # after notes on the file
    file, modules = last.split(" ", 1)
    assert Path(file) == installed / "singlestep/__init__.py"
    assert {re.split(r"\W", name)[0] for name in NEIGHBOURS}.isdisjoint(ast.literal_eval(modules))


def test_evaluation_is_a_command(installed, folder):
    assert "--attacks" in python("-m", "singlestep.evaluation", "--help", cwd=folder, path=str(installed))


def test_the_lists_of_dependencies_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed, development = ({line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()} - {""}
                           for name in ("requirements.txt", "requirements-dev.txt"))
    extras = project["optional-dependencies"]
    assert set(project["dependencies"]) == needed
    assert {"-r requirements.txt", *extras["dev"]} == development
    packages = {extra: [re.split(r"\W", requirement)[0] for requirement in extras[extra]]
                for extra in extras.keys() - {"dev"}}
    assert packages == {"plot": ["matplotlib"], "tensorboard": ["tensorboard"], "autoattack": ["pyautoattack"]}
    assert all(set(extras[extra]) <= development for extra in packages)


def test_the_constraints_have_a_tested_version_of_every_dependency():
    lines = [(ROOT / name).read_text().splitlines() for name in ("constraints.txt", "requirements.txt",
                                                                 "requirements-dev.txt")]
    tested = dict(line.split("==") for line in lines[0] if not line.startswith("#"))
    needed = [re.match(r"([\w-]+)(?:>=([\d.]+))?", line) for line in (*lines[1], *lines[2]) if line[:1].isalpha()]
    assert {each[1] for each in needed} | {"robustbench", "torchattacks"} == tested.keys()
    for name, least in (each.groups() for each in needed):
        numbers = [[int(part) for part in version.split(".")] for version in (tested[name], least or "0")]
        assert numbers[0] >= numbers[1], name


def test_the_package_and_its_command_line_need_no_pytorch():
    loaded = python("-c", "import sys, singlestep, singlestep.methods, singlestep.options; print(sorted(sys.modules))",
                    cwd=ROOT)
    assert ARRAYS.isdisjoint(ast.literal_eval(loaded))


def test_every_lazy_name_exists_and_type_checkers_see_the_same():
    tree = ast.parse(FILES["singlestep"].read_text())
    block, = (node for node in tree.body if for_type_checkers(node))
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {name: (module, name) for name, module in singlestep.WHERE.items()}
    assert set(singlestep.__all__) == set(singlestep.WHERE) <= set(dir(singlestep))
    for name, module in singlestep.WHERE.items():
        assert getattr(singlestep, name) is getattr(importlib.import_module(f"singlestep.{module}"), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        singlestep.no_such_name  # noqa: B018


def test_the_published_import_paths_lead_to_the_same_objects():
    assert {"fgsm", "zerograd", "multigrad", "pgd"} <= vars(attacks).keys()
    for name, value in vars(singlestep.attacks).items():
        assert name.startswith("_") or getattr(attacks, name) is value
    assert len(preactresnet.__all__) == 6
    for name in preactresnet.__all__:
        assert getattr(preactresnet, name) is getattr(singlestep.networks, name)
    assert set(utils.__all__) == {"load_run", "load_test", "evaluate", "seed_everything"}
    for name in utils.__all__:
        assert getattr(utils, name) is getattr(singlestep, name)


def for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements in `node`, those inside functions included, those for type checkers excluded."""
    for child in node.orelse if for_type_checkers(node) else ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from statements(child)


@functools.cache
def imports(path: Path) -> frozenset[str]:
    """The names of the modules that a file imports, in full."""
    found: set[str] = set()
    package = path.relative_to(ROOT).parent.parts
    for node in statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            above = package[:len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return frozenset(found)


def reached(module: str) -> set[str]:
    """The names of the modules that a module of the package imports, itself or through others of the package."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = imports(FILES[waiting.pop()]) - found
        found |= new
        waiting += new & FILES.keys()
    return found


def outside(modules: Iterable[str]) -> set[str]:
    """Packages of others among `modules`."""
    return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names - {"singlestep"}


@pytest.mark.parametrize("module", FILES)
def test_no_file_imports_one_that_imports_it(module):
    assert module not in reached(module)


def test_files_import_only_what_is_below_them():
    for module in ("attacks", "objectives"):
        found = imports(FILES[f"singlestep.{module}"])
        assert outside(found) == {"torch"} and found.isdisjoint(FILES), module
    for module in ("methods", "options"):
        assert outside(reached(f"singlestep.{module}")).isdisjoint(ARRAYS), module
    for module in FILES:
        if module.startswith("singlestep.run"):
            assert all(name.startswith("singlestep.run") for name in imports(FILES[module]) & FILES.keys()), module


def test_no_file_imports_a_script():
    files = [*ROOT.glob("*.py"), *FILES.values(),
             *(path for folder in ("tests", "experiments", "benchmarks") for path in (ROOT / folder).glob("*.py"))]
    assert all((ROOT / f"{name}.py").exists() for name in SCRIPTS)
    for path in files:
        assert {name.partition(".")[0] for name in imports(path)}.isdisjoint(SCRIPTS), path
