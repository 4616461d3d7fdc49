"""plot.py: what it says and draws of runs whose files are known, and of folders that are none."""
import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers import DATASETS, ROOT, one_line, script

from singlestep import figures, methods, options
from singlestep.run.console import UsageError

sys.path.insert(0, str(ROOT / "experiments"))
from definitions import METHODS, RIVALS


def flags_of(*flags: str) -> dict:
    return options.parse(DATASETS["train_cifar.py"], argv=list(flags)).flags()


def write_run(folder: Path, *flags: str, pgd=(0.3, 0.4), fgsm=None, final=0.35, **more) -> Path:
    """The files of a run with these flags, whose accuracy under PGD was `pgd` after each epoch."""
    folder.mkdir(parents=True)
    args = {name: value for name, value in flags_of(f"--epochs={len(pgd)}", *flags).items() if name != "data_set"}
    (folder / "args.json").write_text(json.dumps({"data_set": "CIFAR-10", "args": args, "starts": []}))
    epochs = [{"epoch": i, "test_acc": 2 * acc, "test_robust_acc": acc, "fgsm_acc": (fgsm or pgd)[i], "lr": 0.1,
               "collapsed": bool(fgsm) and fgsm[i] > 0.5, **more} for i, acc in enumerate(pgd)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    if final is not None:
        (folder / "final.json").write_text(json.dumps({"robust_acc": final, "iters": 50, "restarts": 10}))
    return folder


def groups_of(*folders: Path) -> dict[str, list[figures.RunRecord]]:
    return figures.named([figures.read_run(folder) for folder in folders])


@pytest.fixture
def call_plot(call_main):
    """plot.py within this process: call_plot(*flags) -> (exit status, output, error output)."""
    return partial(call_main, figures)


def test_a_sweep_becomes_a_table_and_a_figure(tmp_path):
    write_run(tmp_path / "b", "--attack=zerograd", "--zero-qval=0.7", pgd=(0.2, 0.36, 0.31))
    write_run(tmp_path / "a", "--attack=zerograd", "--zero-qval=0", pgd=(0.3, 0.42, 0.01), fgsm=(0.3, 0.4, 0.8))
    done = script("plot.py", tmp_path / "b", tmp_path / "a", f"--out={tmp_path / 'x.png'}", "--y=test_robust_acc,lr")
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [" ".join(line.split()) for line in lines[:3]] == [
        "run epochs clean FGSM PGD best PGD @ epoch collapse final evaluation",
        "q = 0 3 2.0 80.0 1.0 42.0 @ 2 epoch 3 35.0 PGD-50-10", "q = 0.7 3 62.0 31.0 31.0 36.0 @ 2 no 35.0 PGD-50-10"]
    starts = [lines[0].index(head) for head in ("epochs", "clean", "PGD", "collapse")]
    assert all(line[start - 1] == " " and line[start] != " " for line in lines[:3] for start in starts)  # aligned
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "x.png"]


def test_without_out_nothing_is_written_and_one_line_says_how(tmp_path):
    write_run(tmp_path / "run", pgd=(0.1,), final=None)
    before = sorted(tmp_path.rglob("*"))
    done = script("plot.py", tmp_path / "run")
    assert done.returncode == 0 and "--out=" in done.stdout.splitlines()[-1] and sorted(tmp_path.rglob("*")) == before
    assert done.stdout.splitlines()[1].startswith("run")  # a single run is called like its folder


def test_runs_that_differ_in_the_seed_alone_become_a_band(tmp_path):
    for seed, last in enumerate((0.1, 0.2, 0.3)):
        write_run(tmp_path / f"m{seed}", "--attack=multigrad", f"--seed={seed}", pgd=(0.4, last), final=last,
                  fgsm=(0.4, 0.9 if seed == 0 else last))
    write_run(tmp_path / "pgd", "--attack=pgd", pgd=(0.4, 0.5))
    groups = groups_of(*sorted(tmp_path.iterdir()))
    assert {name: len(runs) for name, runs in groups.items()} == {"multigrad": 3, "pgd": 1}
    row = [str(cell) for cell in figures.row("multigrad", groups["multigrad"])]
    assert row == ["multigrad (3 seeds)", "2", "40.0 ± 20.0", "46.7 ± 37.9", "20.0 ± 10.0", "40.0 ± 0.0 @ 1",
                   "1 of 3, epoch 2", "20.0 ± 10.0 PGD-50-10"]
    axes, = figures.draw(groups, [figures.PGD]).axes
    means = {line.get_label(): list(line.get_ydata()) for line in axes.lines if not line.get_label().startswith("_")}
    assert means["multigrad"] == pytest.approx([40, 20]) and means["pgd"] == pytest.approx([40, 50])
    assert list(next(iter(axes.lines)).get_xdata()) == [1, 2]
    low, high = (extreme(axes.collections[0].get_paths()[0].vertices[:, 1]) for extreme in (min, max))
    assert (low, high) == pytest.approx((10, 40))
    cross, = [line for line in axes.lines if line.get_marker() == "x"]
    assert (cross.get_xdata()[0], cross.get_ydata()[0]) == (2, pytest.approx(10))


def test_tables_for_other_programs_and_seeds_apart(tmp_path, call_plot):
    for seed, last in enumerate((0.1, 0.3)):
        write_run(tmp_path / f"m{seed}", "--attack=multigrad", f"--seed={seed}", pgd=(0.4, last))
    files = tmp_path / "x.csv", tmp_path / "x.tex"
    flags = [tmp_path / "m0", tmp_path / "m1", f"--csv={files[0]}", f"--latex={files[1]}"]
    assert call_plot(*flags)[0] == 0
    rows = [dict(row) for row in csv.DictReader(files[0].open())]
    assert [(row["run"], row["PGD"], row["PGD deviation"], row["best PGD @ epoch note"]) for row in rows] == [
        ("multigrad (2 seeds)", "20.0", "14.1", "@ 1")]
    assert r"multigrad (2 seeds) & 2 & 40.0 $\pm$ 28.3 &" in files[1].read_text()
    status, output, _ = call_plot(*flags, "--by-seed")
    assert status == 0 and [line.split("  ")[0] for line in output.splitlines()[1:3]] == ["multigrad, seed=0",
                                                                                          "multigrad, seed=1"]
    assert [row["PGD"] for row in csv.DictReader(files[0].open())] == ["10.0", "30.0"]
    one_line(call_plot(*flags, f"--latex={tmp_path}"), "--latex: must be a file")


def test_runs_on_two_data_sets_are_two_rows(tmp_path):
    for seed, name in enumerate(("CIFAR-10", "SVHN")):
        run = write_run(tmp_path / name, "--method=pgd", f"--seed={seed}")
        saved = json.loads((run / "args.json").read_text())
        (run / "args.json").write_text(json.dumps({**saved, "data_set": name}))
    assert list(groups_of(tmp_path / "CIFAR-10", tmp_path / "SVHN")) == ["data-set=CIFAR-10", "data-set=SVHN"]


@pytest.mark.parametrize("left, right, names", [
    (["--method=fgsm"], ["--method=fgsm-rs"], {"fgsm", "fgsm-rs"}),
    (["--method=elle", "--epsilon=8"], ["--method=n-fgsm", "--epsilon=16", "--pgd-alpha=4"],
     {"elle, epsilon=8", "n-fgsm, epsilon=16"}),
    (["--attack=zerograd", "--zero-qval=0.2", "--multi-samps=5"], ["--attack=zerograd"], {"q = 0.2", "q = 0.35"}),
    (["--attack=fgsm", "--objective=logits"], ["--attack=pgd", "--amp"], {"fgsm + logits, no amp", "pgd, amp"}),
    (["--attack=pgd", "--batch-size=64"], ["--attack=pgd", "--train-samples=50"],
     {"no train-samples, batch-size=64", "train-samples=50, batch-size=128"}),
])
def test_runs_are_named_by_what_differs_and_has_an_effect(tmp_path, left, right, names):
    folders = write_run(tmp_path / "1", *left), write_run(tmp_path / "2", "--device=cpu", *right)
    assert set(groups_of(*folders)) == names


def test_runs_that_nothing_tells_apart_have_the_names_of_their_folders(tmp_path):
    folders = [write_run(tmp_path / name) for name in ("first", "second")]
    assert list(groups_of(*folders)) == ["first", "second"]
    folders = [write_run(tmp_path / name / "run") for name in ("third", "fourth")]
    assert list(groups_of(*folders)) == [str(folder.resolve()) for folder in folders]


def test_a_run_from_before_the_newest_flags_still_has_its_place(tmp_path):
    old = write_run(tmp_path / "old", "--attack=fgsm", pgd=(0.4, 0.1))
    saved = json.loads((old / "args.json").read_text())
    for name in ("gradalign_lambda", "objective", "quiet", "label_smoothing", "noise_k"):
        saved["args"].pop(name, None)
    (old / "args.json").write_text(json.dumps(saved))
    records = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        del record["collapsed"], record["fgsm_acc"]
    (old / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    groups = groups_of(old, write_run(tmp_path / "new", "--attack=pgd"))
    name = "fgsm with fgsm-init=random, fgsm-alpha=2"
    assert list(groups) == [name, "pgd"] and figures.row("", groups[name])[-2] == "epoch 2"


def test_the_best_epoch_is_of_those_on_as_many_images():
    epochs = [{figures.PGD: accuracy, "test_images": n, "collapsed": False}
              for accuracy, n in ((0.3, 1000), (0.41, 1000), (0.42, 10000))]
    assert figures.best(epochs) == 2 and figures.best(epochs[2:]) == 1
    assert figures.collapse([epochs]) == "no" and figures.collapse([epochs] * 2) == "0 of 2"


@pytest.mark.parametrize("dataset", options.DATA_SETS.values(), ids=options.DATA_SETS)
def test_every_method_has_its_name_on_every_data_set(dataset):
    """Also one whose flags are others there, and one that adds flags to another's."""
    for name in methods.METHODS:
        assert figures.method(options.parse(dataset, argv=[f"--method={name}"]).flags())[0] == name


def test_every_method_has_a_look_of_its_own_and_numbers_go_from_dark_to_light():
    looks = {name: figures.style_of_method(flags_of(*flags.split())) for name, flags in RIVALS.items()}
    looks |= {name: figures.style_of_method(flags_of(f"--method={name}")) for name in methods.METHODS}
    assert {name for name, look in looks.items() if look is None} <= methods.METHODS.keys() - figures.STYLES.keys()
    assert len({look.colour for look in figures.STYLES.values()}) == len(figures.STYLES)
    assert len({(look.marker, look.dash) for look in figures.STYLES.values()}) == len(figures.STYLES)
    assert len({looks[name].colour for name in METHODS}) == len(METHODS)
    for flag in ("--zero-qval=0.9 --zero-qval=0.2 --zero-qval=0", "--epsilon=16 --epsilon=8 --epsilon=4"):
        styles = figures.styles([flags_of("--attack=zerograd", one) for one in flag.split()])
        light = [sum(weight * part for weight, part in zip((0.2, 0.7, 0.1), style.colour)) for style in styles]
        assert light == sorted(light, reverse=True) and len({style.marker for style in styles}) == 3


def test_one_run_is_drawn_under_three_attacks_in_one_panel(tmp_path, call_plot, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    runs = [write_run(tmp_path / f"{seed}", "--method=n-fgsm", f"--seed={seed}", pgd=(0.3, 0.1 + seed / 10),
                      fgsm=(0.4, 0.45)) for seed in (0, 1)]
    assert call_plot(runs[0], "--out=x.pdf")[0] == call_plot(*runs, "--out=x.pdf")[0] == 0
    for figure, pgd in zip(drawn, (10, 15)):
        axes, = figure.axes
        curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label()[0] != "_"}
        assert list(curves) == ["clean", "FGSM", "PGD"] == [text.get_text() for text in figure.legends[0].get_texts()]
        assert (curves["FGSM"], curves["PGD"]) == (pytest.approx([40, 45]), pytest.approx([30, pgd]))
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines if line.get_marker() != "x"}) == 3
    titles = [figure.axes[0].get_title() for figure in drawn]
    assert titles == [f"CIFAR-10, n-fgsm{seeds}, epsilon = 8/255" for seeds in ("", " (2 seeds)")]
    assert call_plot(runs[0], "--y=test_robust_acc", "--out=x.pdf")[0] == 0
    assert [text.get_text() for text in drawn[2].legends[0].get_texts()] == ["0"]  # its name among runs


def test_no_marker_is_beyond_an_axis(tmp_path):
    """One there looks like a measurement."""
    collapsing = write_run(tmp_path / "collapsing", pgd=(0.3, 0.01), fgsm=(0.3, 0.9))
    for figure in (figures.draw(many_runs(tmp_path, 8), [figures.PGD, "lr"]),
                   figures.draw_alone([figures.read_run(collapsing)])):
        figure.draw_without_rendering()
        for axes in figure.axes:
            for line in axes.lines:
                places = axes.transAxes.inverted().transform(line.get_transform().transform(line.get_xydata()))
                assert (abs(places - 0.5) < 0.5 + 1e-9).all(), line


def test_mistakes_are_one_line_and_write_nothing(tmp_path, call_plot):
    run, empty, damaged = (write_run(tmp_path / name) for name in ("run", "empty", "damaged"))
    (empty / "metrics.jsonl").write_text("")
    (damaged / "metrics.jsonl").write_text('{"epoch": 0, "test_robust_acc": "much"}\n')
    before = sorted(tmp_path.rglob("*"))
    for flags, named in (([tmp_path / "nowhere", run], "nowhere"), ([tmp_path], "no args.json"),
                         ([run, "--out=x.bmp"], ".svg"), ([run, "--y=test_robust"], "did you mean test_robust_acc"),
                         ([run, "--y=zzz"], "test_acc"), ([empty], "no epoch"), ([damaged], "metrics.jsonl is damaged"),
                         ([empty, damaged], "none of these"), ([run, "--out="], "--out"), ([""], "RUN"),
                         ([run, f"--out={tmp_path / 'no/x.png'}"], "--out"), ([run / "args.json"], "no args.json")):
        status, output, error = call_plot(*flags)
        assert status == 2 and named in error, (flags, error)
        assert [line.startswith("# skipped: ") for line in error.splitlines()].count(False) == 1
        assert not output or "x.png" in error
    assert sorted(tmp_path.rglob("*")) == before
    for record in ('"x"', "[1]", '{"epoch": 0, "test_robust_acc": 0.3, "test_acc": 0.6, "fgsm_acc": "0.4"}',
                   '{"epoch": 0, "test_robust_acc": 0.3, "test_acc": 0.6, "lr": [0.1]}',
                   '{"epoch": 0, "test_robust_acc": null, "test_acc": 0.6}'):
        (damaged / "metrics.jsonl").write_text(record + "\n")
        status, _, error = call_plot(damaged, "--y=test_robust_acc,lr")
        assert status == 2 and "metrics.jsonl is damaged" in error and error.count("\n") == 1, record
    (damaged / "args.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        figures.read_run(damaged)
    status, output, error = call_plot(run, empty, damaged)
    assert status == 0 and error.count("# skipped: ") == 2 and len(output.splitlines()) == 4


def test_a_figure_without_matplotlib_is_one_line_and_the_table_needs_none(tmp_path):
    run = write_run(tmp_path / "run")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/matplotlib.py").write_text("raise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}
    assert script("plot.py", run, env=environment).returncode == 0
    done = script("plot.py", run, f"--out={tmp_path / 'x.png'}", env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "pip install matplotlib" in done.stderr


@pytest.mark.parametrize("closed", (">&-", "2>&-", ">&- 2>&-", "<&-"))
def test_closed_streams_and_letters_that_ascii_has_not_are_no_obstacle(tmp_path, closed):
    run, other, out = write_run(tmp_path / "Läufe $x$"), write_run(tmp_path / "zwei"), tmp_path / "ö.svg"
    command = f"'{sys.executable}' '{ROOT / 'plot.py'}' '{run}' '{other}' --out='{out}' {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and done.stderr == b"" and out.read_text().count("<svg") == 1


@pytest.mark.parametrize("kind", ("png", "pdf", "svg"))
def test_the_same_runs_make_the_same_file(tmp_path, kind):
    groups = groups_of(write_run(tmp_path / "a", "--attack=pgd"), write_run(tmp_path / "b", "--attack=none"))
    files = [tmp_path / f"{i}.{kind}" for i in range(2)]
    for file in files:
        figures.save(figures.draw(groups, [figures.PGD, "lr"]), file)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("left, right, names", [
    (["--attack=fgsm"], ["--method=fgsm"], {"fgsm with fgsm-init=random, fgsm-alpha=2", "fgsm"}),
    (["--attack=ckpt", "--fgsm-alpha=1"], ["--attack=pgi"],
     {"ckpt with fgsm-alpha=1", "pgi with objective=ce, label-smoothing=0"}),
    (["--attack=pgd", "--label-smoothing=0.1"], ["--method=n-fgsm"], {"pgd with label-smoothing=0.1", "n-fgsm"}),
])
def test_only_a_published_method_has_its_name(tmp_path, left, right, names):
    folders = write_run(tmp_path / "1", *left), write_run(tmp_path / "2", *right)
    assert set(groups_of(*folders)) == names


def test_flags_that_change_neither_network_nor_curve_are_in_no_name(tmp_path):
    """Runs that differ in them and in the seed are averaged."""
    folders = [write_run(tmp_path / f"{seed}", f"--seed={seed}", *more) for seed, more in enumerate(
        ([], ["--compile", "--compile-mode=reduce-overhead"], ["--final-iters=5", "--final-samples=9"],
         ["--quiet", "--chkpt-iters=3", "--last-samples=9", "--final-restarts=2", "--deterministic"]))]
    assert list(groups_of(*folders)) == ["multigrad"]


def many_runs(root: Path, count: int) -> dict[str, list[figures.RunRecord]]:
    """Runs that differ in the attack and in six more flags."""
    pairs = [("--attack=zerograd", "--attack=fgsm"), ("--label-smoothing=0.1", "--label-smoothing=0.2"),
             ("--train-samples=40000", "--train-samples=45000"), ("--batch-size=128", "--batch-size=256"),
             ("--lr-schedule=cyclic", "--lr-schedule=onedrop"), ("--eps-warmup=5", "--eps-warmup=10"),
             ("--lr-max=0.1", "--lr-max=0.05")]
    return groups_of(*(write_run(root / f"{i}", *(pair[37 * i >> j & 1] for j, pair in enumerate(pairs)))
                       for i in range(count)))


@pytest.mark.parametrize("count, keys", [(8, [figures.PGD]), (40, [figures.PGD, "lr", figures.CLEAN]), (1, ["lr"])])
def test_a_figure_of_many_runs_is_legible(tmp_path, count, keys):
    """No name is cut off or on another one or on a panel, every curve has a look of its own, panels keep their size."""
    groups = many_runs(tmp_path, count)
    assert len(groups) == count and (count < 8 or max(map(len, groups)) > 80)
    figure = figures.draw(groups, keys)
    figure.draw_without_rendering()
    legend, = figure.legends
    texts = legend.get_texts()
    assert {" ".join(text.get_text().split()) for text in texts} == groups.keys()
    boxes = [text.get_window_extent() for text in texts]
    panels = [axes.get_tightbbox() for axes in figure.axes]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.width for box in boxes)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in [*boxes[:i], *panels])
    assert all(axes.get_window_extent().height > 2.5 * figure.dpi for axes in figure.axes)
    looks = {(str(line.get_color()), line.get_marker()) for line in figure.axes[0].lines}
    assert len(looks) == count


@pytest.mark.parametrize("settings", [{"MPLBACKEND": "module://matplotlib_inline.backend_inline"},
                                      {"MPLBACKEND": "no-such-backend"}, {"MATPLOTLIBRC": "text.usetex: True"}])
def test_the_users_matplotlib_is_no_obstacle(tmp_path, settings):
    (tmp_path / "matplotlibrc").write_text(settings.get("MATPLOTLIBRC", ""))
    done = script("plot.py", write_run(tmp_path / "run"), f"--out={tmp_path / 'x.svg'}",
                  env={**os.environ, **settings, "MATPLOTLIBRC": str(tmp_path)})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "x.svg").read_text().count("<svg") == 1


def test_figures_leave_the_users_matplotlib_as_it_is_and_are_not_drawn_in_its_style(tmp_path, monkeypatch):
    import matplotlib

    groups = groups_of(write_run(tmp_path / "run"))
    figures.save(figures.draw(groups, ["lr"]), tmp_path / "1.svg")
    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 9, "axes.facecolor": "red"}):
        before = dict(matplotlib.rcParams)
        figures.save(figures.draw(groups, ["lr"]), tmp_path / "2.svg")
        assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()


def test_the_constants_of_the_data_set_are_no_difference():
    """An exported file states them; its run's args.json does not."""
    means = None, list(options.CIFAR10.mean), (0.5, 0.5, 0.5)
    run, stated, other = (figures.defaults({"data_set": "CIFAR-10", "mean": mean}) for mean in means)
    assert figures.differing([run, stated]) == [] and figures.differing([stated, run, other]) == ["mean"]
