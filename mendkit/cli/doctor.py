"""The command `doctor`: is all in place for training and editing?"""

import os
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import mendkit

from ..errors import MendkitError
from . import app as cli
from .app import Data, Words

if TYPE_CHECKING:
    from ..data.examples import EditExample
    from ..hparams import MENDHyperParams
    from ..models.base import BaseModel

# Edits that the statistics of an untrained editor come from.
FEW = 16


@cli.command("doctor configs/smollm2-135m.yaml --train-data my.jsonl")
def doctor(
    words: Words = None,
    *,
    train_data: Data = "facts:train",
    validation_data: Data = "facts:validation",
    data: Data = "facts:test",
) -> int:
    """Check settings, data, memory, folders, archive and model, and make and undo one edit.

    A line for each check: `ok`, or `failed` and what to do. The exit status is 1 if one failed.
    """
    checkup = Checkup(words, {"train": train_data, "validation": validation_data, "test": data})
    failed = 0
    for name, look, needed in (
        ("settings", checkup.settings, ()),
        ("data", checkup.read, ("hparams",)),
        ("memory", checkup.memory, ("hparams", "examples")),
        ("folders", checkup.folders, ("hparams",)),
        ("archive", checkup.archive, ("hparams",)),
        ("model", checkup.load, ("hparams",)),
        ("texts", checkup.texts, ("base", "examples")),
        ("one edit", checkup.edit, ("base", "examples")),
    ):
        if not all(getattr(checkup, key) for key in needed):
            cli.show(None, f"skipped {name}", as_json=False)
            continue
        try:
            verdict, said = "ok     ", look()
        except (MendkitError, OSError, RuntimeError) as error:
            verdict, said = "failed ", str(error) or type(error).__name__
            failed += 1
        cli.show(None, f"{verdict} {name}: {' '.join(said.split())}", as_json=False)
    return int(failed > 0)


class Checkup:
    """What was found so far. Each check returns what it saw, or raises."""

    hparams: "MENDHyperParams"
    base: "BaseModel"

    def __init__(self, words: Sequence[str] | None, files: dict[str, str]) -> None:
        self.words, self.files = words, files
        self.hparams = self.base = None  # type: ignore[assignment]
        self.examples: dict[str, Sequence[EditExample]] = {}

    def settings(self) -> str:
        """The hyperparameters."""
        from ..mend.training import check_logger

        h = self.hparams = cli.hyperparameters(self.words)
        check_logger(h.logger)
        return f"model_name: {h.model_name}, inner_params: {h.inner_params}"

    def read(self) -> str:
        """The files of examples."""
        found = {}
        for name, file in self.files.items():
            found[name] = mendkit.read_examples(file, columns=self.hparams.columns)
        self.examples = dict(found)
        return ", ".join(f"{len(rows)} edits in {self.files[name]}" for name, rows in found.items())

    def memory(self) -> str:
        """Whether training fits."""
        from ..cost.plan import check_memory

        check_memory(self.hparams, self.examples["train"], self.examples["validation"])
        return "training fits; `plan` says how much it takes"

    def folders(self) -> str:
        """Whether runs and caches can be written."""
        from ..models.cache import cache_root
        from ..runs import make_folder

        cache = Path(self.hparams.cache_dir or cache_root()).expanduser()
        for folder in (Path(self.hparams.results_dir), cache):
            if not os.access(make_folder(folder), os.W_OK):
                raise MendkitError(f"no right to write in {folder}; give another folder")
        return f"runs in {self.hparams.results_dir}, caches in {cache}"

    def archive(self) -> str:
        """What the archive says of itself."""
        path = self.hparams.archive
        if path is None:
            return "none; `train` writes one"
        metadata = mendkit.inspect_archive(path)
        return f"{path}, trained for {metadata['base_model']['name']}"

    def load(self) -> str:
        """The model and its edit sites."""
        self.base = mendkit.load_model(self.hparams)
        return f"{self.base!r}, the first site {self.base.sites[0].name}"

    def texts(self) -> str:
        """Whether every example can be tokenised."""
        from ..mend.batches import usable

        for name, examples in self.examples.items():
            kept = usable(self.base, self.hparams, examples)
            if len(kept) < len(examples):
                where, why = kept.skipped[-1].where, kept.skipped[-1].why
                raise MendkitError(
                    f"{len(examples) - len(kept)} of {len(examples)} in {self.files[name]} cannot "
                    f"be used, the last {where}: {why}; or give --skip-invalid"
                )
        return "all can be used"

    def edit(self) -> str:
        """An edit changes what the model says, and is undone to the bit."""
        example, h = self.examples["test"][0], self.hparams
        if h.archive is None:  # an editor that is not trained
            plain = {"max_iters": 0, "whiten": None, "whiten_pairs": False, "val_steps": 2}
            h = h.replace(**plain, release_trunk=False, stream_trunk=False, logger=None)
            few = self.examples["train"][:FEW]
            with TemporaryDirectory() as run:
                result = mendkit.train(h, few, few[:2], base=self.base, run_dir=run)
                h = h.replace(archive=str(result.archive))
                editor = mendkit.MENDEditor.from_hparams(h, base=self.base)
        else:
            editor = mendkit.MENDEditor.from_hparams(h, base=self.base)
        base, prompt = editor.base, example.prompt
        before, change = mendkit.next_tokens(base, prompt), editor.edit(example)
        with change.applied():
            during = mendkit.next_tokens(base, prompt)
            said = base.generate(prompt, max_new_tokens=8)
        if during == before:
            raise MendkitError("it moves no probability; raise `lr_scale` or `edit_lr`")
        if mendkit.next_tokens(base, prompt) != before:
            raise MendkitError("the probabilities did not come back; load the model anew")
        by = "" if self.hparams.archive else " by an untrained editor"
        return f"{prompt!r} → {said.strip()!r}{by}; undone, the model is what it was"
