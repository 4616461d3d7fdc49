"""export.py: what is exported is loaded with equal logits, by these scripts and by RobustBench, and says what it is."""
import importlib
import json
import re
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, one_line, rows_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from singlestep import checkpoints, export, options, train
from singlestep.checkpoints import load_run
from singlestep.networks import PreActResNet18, WideResNet
from singlestep.run.console import UsageError

X = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CIFAR10 = {"data_set": "cifar10", "base_width": 4}
PUBLISHED = ["--data-set=cifar10", "--base-width=4"]
FLAGS = [*TINY, "--method=n-fgsm", "--attack=nfgsm", "--final-iters=0", "--data-dir", "secret folder", "--seed=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("private") / "run"
    argv, before = ["train_cifar.py", *FLAGS, f"--fname={folder}"], sys.argv
    sys.argv = argv  # which args.json records
    try:
        train.main(options.CIFAR10, options.parse(options.CIFAR10, argv=argv[1:]))
    finally:
        sys.argv = before
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the run, so that a test can change it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def exported(capsys):
    """export.py in this process: exported(*flags) -> (status, output, error output)."""
    def run_main(*flags):
        status = 0
        try:
            export.main(options.parse_export(argv=[str(flag) for flag in flags]))
        except SystemExit as end:
            status = end.code or 0
        return status, *capsys.readouterr()
    return run_main


def logits(path, **flags) -> torch.Tensor:
    with torch.no_grad():
        return load_run(path, **flags)[0](X)


def metadata(path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["singlestep"])


def test_an_exported_network_has_equal_logits_and_its_runs_arguments(run, exported, tmp_path):
    status, output, error = exported(run, f"--to={tmp_path / 'new/x.safetensors'}")
    assert (status, error) == (0, "") and output.endswith("x.safetensors\nwrote " + str(tmp_path / "new/x.md") + "\n")
    assert torch.equal(logits(tmp_path / "new/x.safetensors"), logits(run))
    (_, before), (_, after) = load_run(run), load_run(tmp_path / "new/x.safetensors")
    for name in options.FLAGS.keys() - {"data_dir", "fname", "mean", "std"}:
        assert getattr(before, name) == getattr(after, name), name
    assert (after.mean, after.std, after.data_set) == (options.CIFAR10.mean, options.CIFAR10.std, "CIFAR-10")
    again = exported(tmp_path / "new/x.safetensors", f"--to={tmp_path / 'y.safetensors'}")
    assert again[0] == 0 and metadata(tmp_path / "y.safetensors") == metadata(tmp_path / "new/x.safetensors")


def test_the_metadata_say_how_the_network_was_made_and_name_no_folder(run, exported, tmp_path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records[0] |= {"test_acc": 1.0, "fgsm_acc": 1.0, "test_robust_acc": 0.75, "best": True, "collapsed": False}
    records[1] |= {"test_acc": 1.0, "fgsm_acc": 1.0, "test_robust_acc": 0.125, "best": False, "collapsed": True}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    found = {}
    for source, which in ((run, "last"), (run, "best"), (run, "healthy"), (run / "model_0.pth", "last")):
        assert exported(source, f"--which={which}", f"--to={tmp_path / 'x.safetensors'}")[0] == 0
        found[source.name, which] = known = metadata(tmp_path / "x.safetensors")
        content = (tmp_path / "x.safetensors").read_bytes().decode("latin1") + (tmp_path / "x.md").read_text()
        assert "secret" not in content and str(run.parent) not in content and "private" not in content
    assert [each["network"] for each in found.values()] == [
        {"epoch": 1, "collapsed": True}, *3 * [{"epoch": 0, "collapsed": False}]]
    assert [row["robust"] for row in found["run", "last"]["accuracy"]] == [8, 8, 1]
    assert [row["robust"] for row in known["accuracy"]] == [8, 8, 6]
    assert known["results"] == {"collapse_epoch": 1, "collapsed_epochs": 1, "best_robust_acc": 0.75,
                                "last_robust_acc": 0.125}
    assert known["args"].items() >= dict(model="PreActResNet18", base_width=4, method="n-fgsm", attack="nfgsm",
                                         epsilon=8.0, noise_k=2.0, seed=3).items()
    assert {"depth", "shortcut", "block", "no_final_norm", "mean", "std"} <= known["args"].keys()
    assert known["statement"]["classes"] == 10 and known["starts"][0]["commit"]
    assert known["starts"][0]["command"] == ["train_cifar.py", *(
        flag for flag in FLAGS if flag not in ("--data-dir", "secret folder"))]


def test_the_card_says_that_the_network_collapsed(run, exported, tmp_path):
    for pgd, there in ((0.0, True), (1.0, False)):
        record = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        record |= {"test_acc": 1.0, "fgsm_acc": 1.0, "test_robust_acc": pgd}
        (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")
        exported(run, f"--to={tmp_path / 'x.safetensors'}")
        card = (tmp_path / "x.md").read_text()
        assert ("**Catastrophic overfitting**" in card) == there == ("; collapse in epoch 1\n" in card)
        assert f"| pgd-1-1 | l_inf | 8 | 2 | 8 | {8 * pgd:.0f} ({pgd:.1%}) |" in card and "Seed: 3\n" in card
        assert "* Command: `python train_cifar.py --dummy" in card and "* Commit " in card


def test_what_evaluate_measured_is_of_this_network_and_in_the_metadata(run, exported, evaluates, tmp_path):
    flags = ["--device=cpu", "--samples=12", "--attacks=clean,pgd-2-1"]
    one = rows_of(evaluates(run, *flags)[1])
    assert evaluates(run / "model_0.pth", "--device=cpu", "--samples=11", "--attacks=fgsm")[0] == 0
    assert exported(run, f"--to={tmp_path / 'new/x.safetensors'}")[0] == 0
    rows = metadata(tmp_path / "new/x.safetensors")["accuracy"]
    assert [(row["attack"], row["n"]) for row in rows] == [
        ("clean", 12), ("fgsm", 8), ("pgd-1-1", 8), ("pgd-2-1", 12)]
    again = rows_of(evaluates(tmp_path / "new/x.safetensors", *flags)[1])
    assert [row[:-1] for row in again] == [row[:-1] for row in one] and len(one) == 2


def test_a_file_that_is_exported_again_has_new_accuracies_too(exported, evaluates, tmp_path, run):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert exported(run, f"--to={first}")[0] == 0
    assert evaluates(first, "--device=cpu", "--samples=20", "--attacks=clean,pgd-3-1")[0] == 0
    assert exported(first, f"--to={second}")[0] == 0
    before, after = metadata(first), metadata(second)
    rows = {(row["attack"], row["n"]) for row in after["accuracy"]}
    assert rows == {("clean", 20), ("fgsm", 8), ("pgd-1-1", 8), ("pgd-3-1", 20)}
    assert {**before, "accuracy": 0} == {**after, "accuracy": 0} and len(before["accuracy"]) == 3
    older = {**before, "args": {name: value for name, value in before["args"].items() if name != "block"}}
    save_file(load_file(first), first, {"format": "pt", "singlestep": json.dumps(older)})
    assert exported(first, f"--to={second}")[0] == 0 and len(metadata(second)["accuracy"]) == 4


def test_a_file_that_is_exported_again_has_the_given_network(exported, tmp_path, run):
    one_line(exported(run, "--half", f"--to={tmp_path}/"), "--half works only with")
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert exported(run, f"--to={first}")[0] == 0
    assert exported(first, "--mean=0,0,0", "--std=1,1,1", f"--to={second}")[0] == 0
    assert not torch.equal(logits(first), logits(second))
    assert torch.equal(logits(second), logits(first, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert metadata(second)["args"]["mean"] == [0, 0, 0] and metadata(second)["accuracy"] == []


def test_the_final_evaluation_is_of_the_network_that_it_evaluated(run, exported, tmp_path):
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = [epoch["epoch"] for epoch in epochs if epoch["best"]][-1]
    for model, evaluated in (("last", 1), ("best", best)):
        (run / "final.json").write_text(json.dumps({
            "model": model, "iters": 3, "restarts": 2, "alpha": 1.0, "epsilon": 8.0, "images": 64, "clean_acc": 0.5,
            "robust_acc": 0.25}))
        for epoch in (0, 1):
            to = tmp_path / f"{model}_{epoch}.safetensors"
            assert exported(run / f"model_{epoch}.pth", f"--to={to}")[0] == 0
            rows = {row["attack"]: (row["step"], row["n"], row["robust"]) for row in metadata(to)["accuracy"]}
            assert rows.get("pgd-3-2") == ((1.0, 64, 16) if epoch == evaluated else None)
            assert (rows["clean"] == (None, 64, 32)) == (epoch == evaluated)
    for damaged in ("{", "[]", '{"model": "last", "iters": 3}'):
        (run / "final.json").write_text(damaged)
        one_line(exported(run, f"--to={tmp_path / 'x.safetensors'}"), "final.json is damaged")


def test_half_precision_is_near_and_half_as_large(run, exported, tmp_path):
    whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
    assert exported(run, f"--to={whole}")[0] == exported(run, "--half", f"--to={half}")[0] == 0
    assert {value.dtype for value in load_file(half).values()} == {torch.float16, torch.int64}
    torch.testing.assert_close(logits(half), logits(run), rtol=0.01, atol=0.01)
    assert not torch.equal(logits(half), logits(run)) and half.stat().st_size < 0.6 * whole.stat().st_size
    assert "rounded to float16" in (tmp_path / "half.md").read_text()
    large = PreActResNet18(base_width=4).state_dict()
    large["bn.running_var"].fill_(1e5)
    torch.save(large, tmp_path / "large.pt")
    done = exported(tmp_path / "large.pt", "--half", *PUBLISHED, f"--to={tmp_path / 'x.safetensors'}")
    assert done[0] == 2 and "beyond float16's range: do not use --half" in done[2] and done[2].count("\n") == 1


def test_a_published_file_is_exported_without_a_training_that_nobody_knows(exported, tmp_path):
    network = PreActResNet18(base_width=4, final_norm=False, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)).eval()
    torch.save({"mu": torch.tensor([0.1, 0.2, 0.3]), "sigma": torch.tensor([0.4, 0.5, 0.6]),
                **{f"module.{key}": value for key, value in network.state_dict().items()}}, tmp_path / "x.pt")
    status, _, error = exported(tmp_path / "x.pt", *PUBLISHED, f"--to={tmp_path / 'x.safetensors'}")
    assert (status, error) == (0, "") and torch.equal(logits(tmp_path / "x.safetensors"), network(X))
    known = metadata(tmp_path / "x.safetensors")
    assert known["args"].keys() == set(options.NETWORK) and known["args"]["no_final_norm"]
    assert (known["starts"], known["accuracy"], known["results"]["last_robust_acc"]) == ([], [], None)
    card = (tmp_path / "x.md").read_text()
    assert "# PreActResNet18 for CIFAR-10\n" in card and "Training" not in card


def test_a_strangers_safetensors_file_is_loaded_by_its_shapes(tmp_path):
    network = PreActResNet18(base_width=4, mean=options.CIFAR10.mean, std=options.CIFAR10.std).eval()
    save_file({f"module.{key}": value for key, value in network.state_dict().items()}, tmp_path / "x.safetensors",
              {"format": "pt"})
    assert torch.equal(logits(tmp_path / "x.safetensors", **CIFAR10), network(X))
    (tmp_path / "x.safetensors").rename(tmp_path / "x.bin")
    assert torch.equal(logits(tmp_path / "x.bin", **CIFAR10), network(X))
    with pytest.raises(UsageError, match=r"has no args\.json with a data set: add --data-set"):
        load_run(tmp_path / "x.bin")
    with pytest.raises(UsageError, match="is of another architecture"):
        load_run(tmp_path / "x.bin", data_set="cifar10")


@pytest.mark.parametrize("known", ["{", "[]", "{}", '{"args": 1, "data_set": "CIFAR-10"}',
                                   '{"args": {}, "data_set": "CIFAR-10", "statement": {"name": 1}}'])
def test_damaged_metadata_are_one_line(known, tmp_path, evaluates):
    save_file(PreActResNet18(base_width=4).state_dict(), tmp_path / "x.safetensors", {"singlestep": known})
    one_line(evaluates(tmp_path / "x.safetensors", "--device=cpu", "--attacks=clean"),
             f"the metadata of {tmp_path / 'x.safetensors'} is damaged: export the network again")


def test_a_wrong_flag_in_the_metadata_is_named(run, exported, tmp_path, evaluates):
    exported(run, f"--to={tmp_path / 'x.safetensors'}")
    known = metadata(tmp_path / "x.safetensors")
    known["args"]["base_width"] = "wide"
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "x.safetensors", {"singlestep": json.dumps(known)})
    one_line(evaluates(tmp_path / "x.safetensors", "--device=cpu"),
             "x.safetensors: --base-width must be a whole number")


@pytest.mark.parametrize("part", [0.5, 0.999])
def test_a_truncated_file_is_one_line(part, run, exported, tmp_path, evaluates):
    path = tmp_path / "x.safetensors"
    exported(run, f"--to={path}")
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    one_line(evaluates(path, "--device=cpu"), f"{path} is a safetensors file that was truncated or altered")


def test_the_command_of_a_run_like_another_has_all_its_flags(run, exported, tmp_path):
    args = json.loads((run / "args.json").read_text())
    args["starts"][0]["command"] = ["train_cifar.py", "--like", "somewhere", "--amp", "--seed=3", "--fname=private"]
    args["args"]["lr_max"] = 0.12345678
    (run / "args.json").write_text(json.dumps(args))
    assert exported(run, f"--to={tmp_path / 'x.safetensors'}")[0] == 0
    script, *flags = metadata(tmp_path / "x.safetensors")["starts"][0]["command"]
    assert script == "train_cifar.py" and flags[:2] == ["--amp", "--seed=3"] and "--lr-max=0.12345678" in flags
    assert not any("like" in flag or "somewhere" in flag or "private" in flag for flag in flags)
    repeated = options.parse(options.CIFAR10, argv=flags)
    own = {name for name, each in options.FLAGS.items() if each.metadata["group"] not in ("files", "machine")}
    wanted = {name: args["args"][name] for name in own - {"data_dir"}}
    assert json.loads(json.dumps({name: getattr(repeated, name) for name in wanted})) == wanted


def test_a_network_of_synthetic_images_is_said_to_be_one(run, exported, tmp_path):
    assert exported(run, f"--to={tmp_path / 'x.safetensors'}")[0] == 0
    card = (tmp_path / "x.md").read_text()
    assert "datasets:" not in card and "for synthetic images" in card
    assert "# warning: this network was trained on synthetic images" in exported(run, f"--to={tmp_path}/bench/")[1]


@pytest.mark.parametrize("flags, named", [
    (["RUN", "--to=x.pth"], "--to: must end in .safetensors, or be a folder that ends in /, not 'x.pth'"),
    (["RUN"], "the following arguments are required: --to"),
    (["RUN", "--to=r/", "--name=a-b"], "--name: must be of letters, digits and _, such as Author2026Title, not 'a-b'"),
    (["nowhere", "--to=x.safetensors"], "nowhere is missing"),
    (["RUN", "--to=x.safetensors", "--which=first"], "--which must be last, best, healthy")])
def test_wrong_flags_are_one_line(flags, named, trained, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, output, error = exported(*(trained if flag == "RUN" else flag for flag in flags))
    assert status == 2 and not output and named in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


NETWORKS = {"shortcut": dict(shortcut="raw"), "no_norm": dict(no_final_norm=True),
            "nuat": dict(model="ResNet18", block="nuat"), "wide": dict(model="WideResNet", depth=10, width_factor=1),
            "constants": dict(mean=(0.0,) * 3, std=(1.0,) * 3)}


@pytest.fixture
def through_robustbench(monkeypatch):
    """through_robustbench(folder, name): the network as RobustBench's load_model loads it."""
    from robustbench.model_zoo import model_dicts
    from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    from robustbench.utils import load_model

    def load(folder: Path, name: str, data_set: str = "cifar10"):
        source = (folder / f"{name}.py").read_text()
        assert "singlestep" not in source and "from ." not in source and max(map(len, source.splitlines())) < 300
        monkeypatch.syspath_prepend(str(folder))
        zoo = model_dicts[BenchmarkDataset(data_set)][ThreatModel.Linf]
        monkeypatch.setitem(zoo, *importlib.import_module(name).ENTRY)
        return load_model(name, model_dir=folder / "models", dataset=data_set, threat_model="Linf")
    return load


@pytest.mark.parametrize("name", NETWORKS)
def test_robustbench_loads_the_network_with_equal_logits(name, exported, tmp_path, through_robustbench):
    flags = {"base_width": 4, **NETWORKS[name]}
    args = options.arguments(options.CIFAR10, flags)
    torch.manual_seed(0)
    torch.save(export.networks.new_network(options.CIFAR10, args).state_dict(), tmp_path / "x.pt")
    words = ["--data-set=cifar10", *(options.as_flags({flag: value}) for flag, value in flags.items())]
    status, output, error = exported(tmp_path / "x.pt", *words, f"--to={tmp_path}/r/", f"--name={name}")
    assert (status, error) == (0, "") and "name, authors, venue\n" in output
    network = through_robustbench(tmp_path / "r", name)
    assert torch.equal(network(X), logits(tmp_path / "x.pt", data_set="cifar10", **flags))


def test_robustbenchs_card_has_its_fields_and_what_was_measured(run, exported, evaluates, tmp_path,
                                                                 through_robustbench):
    from robustbench.utils import ModelInfo

    records = [{"network": export.fingerprint(load_run(run)[0]), "attacks": [
        dict(attack="autoattack", epsilon=8.0, step=None, n=1000, robust=281),
        dict(attack="clean", epsilon=0.0, step=None, n=1000, robust=501),
        dict(attack="autoattack", epsilon=4.0, step=None, n=1000, robust=350)]}]
    records.append({**records[0], "norm": "l_2", "attacks": [dict(records[0]["attacks"][0], robust=999)]})
    (run / "evaluation.json").write_text(json.dumps(records))
    status, output, _ = exported(run, f"--to={tmp_path}/r/")
    assert status == 0 and "AutoAttack accuracy is missing" not in output
    card = json.loads((tmp_path / "r/model_info/cifar10/Linf/n_fgsm_PreActResNet18.json").read_text())
    assert card.keys() <= {field.name for field in fields(ModelInfo)}
    assert card.items() >= dict(link="https://arxiv.org/abs/2202.01181", dataset="cifar10", eps="8/255",
                                clean_acc="50.10", autoattack_acc="28.10").items()
    assert torch.equal(through_robustbench(tmp_path / "r", "n_fgsm_PreActResNet18")(X), logits(run))
    saved = (run / "args.json").read_text()
    (run / "args.json").write_text(saved.replace('"norm": "l_inf"', '"norm": "l_2"'))
    (run / "state.pth").unlink()  # which evaluations follow
    assert exported(run / "model_1.pth", f"--to={tmp_path}/l2/")[0] == 0
    card = json.loads((tmp_path / "l2/model_info/cifar10/L2/n_fgsm_PreActResNet18.json").read_text())
    assert card["eps"] == "0.0314" and card["autoattack_acc"] == "99.90"
    torch.save(WideResNet(10, 1).state_dict(), tmp_path / "x.pt")
    wide = ["--model=WideResNet", "--depth=10", "--width-factor=1"]
    status, _, error = exported(tmp_path / "x.pt", "--data-set=svhn", *wide, f"--to={tmp_path}/s/")
    assert status == 2 and "RobustBench has CIFAR-10 and CIFAR-100, not SVHN" in error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("name, collapsed", [("n-fgsm", False), ("fgsm", True)])
def test_the_networks_that_ship_are_small_and_say_what_they_are(name, collapsed):
    path = ROOT / f"networks/{name}.safetensors"
    opened, known = checkpoints.open_run(path), metadata(path)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16, torch.int64}
    assert path.stat().st_size < 2e6
    assert opened.model(X).isfinite().all() and opened.args.base_width == 16 and opened.args.method == name
    assert known["network"]["collapsed"] is collapsed
    start, = known["starts"]
    assert re.fullmatch("[0-9a-f]{40}", start["commit"]) and "--seed=0" in start["command"]
    assert path.with_suffix(".md").read_text() == export.card(known, opened, path.name, half=True)
    robust = {(row["attack"], row["epsilon"]): row["robust"] / row["n"] for row in known["accuracy"]}
    fgsm, pgd = (robust[attack, opened.args.epsilon] for attack in ("fgsm", "pgd-50-1"))
    assert pgd < fgsm / 10 if collapsed else pgd > 0.9 * fgsm
