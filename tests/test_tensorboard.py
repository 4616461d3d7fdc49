"""--tensorboard: what TensorBoard reads of a run is what metrics.jsonl holds, whatever befell the run."""
import importlib.util
import os

import pytest
from helpers import TINY, epochs_of, one_line

from singlestep.run.folder import SCALARS

pytest.importorskip("tensorboard")


def read(folder) -> dict[str, dict[int, float]]:
    """tag -> epoch -> value, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def agrees(folder) -> bool:
    told, records = read(folder / "tensorboard"), epochs_of(folder)
    wanted = {tag: {record["epoch"]: pytest.approx(float(record[name]), rel=1e-6) for record in records
                    if record.get(name) is not None} for tag, name in SCALARS.items()}
    return told == {tag: values for tag, values in wanted.items() if values}


def test_tensorboard_shows_the_epochs_also_after_a_resume_and_of_the_last_run_alone(tmp_path, call):
    flags = [*TINY, "--tensorboard", "--val-size=16", "--fname", tmp_path]
    assert call("train_cifar.py", *flags, "--epochs=1")[0] == 0 and agrees(tmp_path)
    assert call("train_cifar.py", *flags, "--epochs=3", "--resume=auto", "--allow-changes")[0] == 0
    assert len(epochs_of(tmp_path)) == 3 and agrees(tmp_path) and len(os.listdir(tmp_path / "tensorboard")) == 1
    assert "accuracy/validation" in read(tmp_path / "tensorboard")
    assert call("train_cifar.py", *flags, "--epochs=1")[0] == 0
    assert agrees(tmp_path) and agrees(tmp_path / "earlier_2")  # in the first is the final evaluation after one epoch


def test_without_the_package_one_line_says_so_before_anything_is_written(tmp_path, call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    one_line(call("train_cifar.py", *TINY, "--tensorboard", "--fname", tmp_path / "run"),
             "--tensorboard needs the package tensorboard: pip install tensorboard")
    assert not (tmp_path / "run").exists()
