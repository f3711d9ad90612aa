"""Loggers are told what `history.jsonl` holds; an absent one is refused at once."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from mendkit.__main__ import main
from mendkit.errors import MendkitError
from mendkit.mend.training import train
from tests.oracles.claims import EXAMPLES, quick


class Recorder(ModuleType):
    """A module with wandb's interface."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.given, self.rows, self.finished = {}, {}, 0

    def init(self, **given):
        print("an advertisement")
        if given["config"]["seed"] == 13:
            raise RuntimeError("no key")
        self.given = given
        return self

    def log(self, values, step):
        self.rows.setdefault(step, {}).update(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder)
    return recorder


def history(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def test_wandb_is_told_every_row_of_the_history(llama, tmp_path, wandb, capsys):
    h, folder = quick(logger="wandb"), tmp_path / "first"
    train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=folder)
    expected = {}
    for row in history(folder):  # 3 steps, validated at 0, 2, 3
        expected.setdefault(row.pop("step"), {}).update(row)
    assert wandb.rows == expected and sorted(expected) == [0, 1, 2, 3]
    assert wandb.finished == 1 and wandb.given["config"]["batch_size"] == 2
    assert (wandb.given["name"], wandb.given["dir"]) == ("first", str(folder))
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
        expected = [(row["step"], pytest.approx(row[name])) for row in rows if name in row]
        assert told == expected


def test_a_logger_that_is_absent_or_does_not_start_is_told_with_the_remedy(
    llama, tmp_path, monkeypatch, capsys, wandb
):
    with pytest.raises(MendkitError, match=r"wandb did not start: no key; set it up, or `logger: "):
        h = quick(logger="wandb", seed=13)
        train(h, EXAMPLES, EXAMPLES[:1], base=llama, run_dir=tmp_path / "a")
    monkeypatch.setattr("mendkit.mend.training.find_spec", lambda name: None)
    config = tmp_path / "c.yaml"
    config.write_text("model_name: nowhere\nlogger: wandb\n")
    assert main(["train", str(config), "--out", str(tmp_path / "b")]) == 2
    assert 'pip install -c constraints.txt -e ".[wandb]"' in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
