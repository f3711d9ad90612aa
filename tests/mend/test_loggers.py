"""Loggers are told what `history.jsonl` holds; one that is absent is refused before anything is written."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from mendkit.__main__ import main
from mendkit.errors import MendkitError
from mendkit.mend.loggers import open_logger
from mendkit.mend.training import train
from tests.oracles.claims import EXAMPLES, quick


class Recorder(ModuleType):
    """A module with the interface that wandb and trackio share."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.given, self.rows, self.finished = {}, [], 0

    def init(self, **given):
        print("an advertisement")
        self.given = given
        return self

    def log(self, values, step):
        self.rows.append({"step": step, **values})

    def finish(self):
        self.finished += 1


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_wandb_is_told_every_row_of_the_history(llama, tmp_path, monkeypatch, capsys):
    tracker = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    train(quick(logger="wandb"), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "first")
    assert (
        tracker.rows == history(tmp_path / "first") and len(tracker.rows) == 6
    )  # 3 steps, validated at 0, 2, 3
    assert tracker.finished == 1 and tracker.given["name"] == "first"
    assert tracker.given["config"]["batch_size"] == 2
    assert tracker.given["dir"] == str(tmp_path / "first")
    assert capsys.readouterr().out == ""


def test_tensorboard_holds_the_last_runs_history_and_no_earlier_ones(llama, tmp_path):
    reason = 'needs tensorboard: pip install -c constraints.txt -e ".[tensorboard]"'
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason=reason
    )
    for seed in (1, 2):
        run = quick(logger="tensorboard", seed=seed)
        train(run, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path)
    events = module.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = history(tmp_path)
    for name in {key for row in rows for key in row} - {"step"}:
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert told == [
            (row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row
        ]


def test_only_the_first_process_logs(tmp_path, monkeypatch):
    tracker = Recorder("wandb")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with open_logger(quick(logger="wandb"), tmp_path, first=False) as log:
        log({"step": 1, "loss": 2.0})
    assert not tracker.given and not tracker.rows and not tracker.finished


def test_a_logger_that_is_absent_or_does_not_start_is_told_with_the_remedy(
    llama, tmp_path, monkeypatch, capsys
):
    def refuse(**given):
        raise RuntimeError("no key")

    tracker = Recorder("wandb")
    tracker.init = refuse
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    with pytest.raises(
        MendkitError, match=r"wandb did not start: no key; set it up, or `logger: null`"
    ):
        train(quick(logger="wandb"), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "a")
    monkeypatch.setattr("mendkit.mend.loggers.find_spec", lambda name: None)
    with pytest.raises(
        MendkitError, match=r"tensorboard is not installed; run `pip install .*\"\.\[tensorboard\]\"`"
    ):
        train(quick(logger="tensorboard"), EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "b")
    (tmp_path / "c.yaml").write_text("model_name: nowhere\nlogger: wandb\n", encoding="utf-8")
    assert main(["train", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "b")]) == 2
    assert 'pip install -c constraints.txt -e ".[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
