"""The commands `inspect`, `import`, `export`, `conformance` and `sites`."""

from functools import partial
from pathlib import Path
from typing import Annotated

import yaml
from typer import Argument, Option

import mendkit

from ..errors import MendkitError
from ..hparams import parse_overrides
from ..places import archive_file
from ..runs import user_path
from . import app as cli
from .app import Archive, Json, Out, Overwrite, Words

OutFolder = Annotated[
    Path, Option("--out", metavar="DIR", parser=user_path, help="folder to write to")
]
MODEL = "a hub id, a model folder, a GGUF file or a YAML file, and settings"
ModelWords = Annotated[
    list[str] | None, Argument(metavar="[MODEL|CONFIG] [KEY=VALUE]...", help=MODEL)
]
Folders = Annotated[
    list[Path], Argument(metavar="DIR...", parser=user_path, help="folders of reference vectors")
]
All = Annotated[
    bool, Option("--all", help="also attention and output layers, as --json always does")
]

Compact = Annotated[
    bool, Option("--compact", help="an archive of this kit, a third as large, in 8 and 12 bits")
]

Results = Annotated[
    Path | None, Option(metavar="FILE", parser=user_path, help="results.json of `evaluate`")
]
# Examples by which a scan tells keys apart.
SCAN_EXAMPLES = 200
Scan = Annotated[
    bool, Option("--scan", help="which blocks tell an edit from its neighbours; reads the weights")
]


@cli.command("inspect runs/first/archive.safetensors --json")
def inspect(archive: Archive, *, as_json: Json = False) -> int:
    """Print an archive's base model, settings and training."""
    metadata = mendkit.inspect_archive(archive)
    metadata["megabytes"] = archive_file(archive).stat().st_size / 1e6
    left_out = ("tensors", "sha256", "packing")
    about = {key: metadata[key] for key in metadata if key not in left_out}
    text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
    cli.show(metadata, text, as_json=as_json)
    return 0


@cli.command("import models/MEND/gpt2-xl gpt2-xl.yaml --out runs/imported")
def import_(
    archive: Archive, words: Words = None, *, out: OutFolder, overwrite: Overwrite = False
) -> int:
    """Turn an archive of the original MEND or of EasyEdit into one of this kit.

    No code in the foreign file is run. CONFIG is the configuration of its training, with
    `inner_params` in its order.
    """
    from ..interop.foreign import read_foreign

    place = cli.RunFolder(out, "archive.safetensors", "results.json", overwrite=overwrite)
    hparams = cli.hyperparameters(words)
    read_foreign(archive)  # before the model is loaded, which may take long
    new = mendkit.import_archive(archive, hparams, out=out / "archive.safetensors")
    place.write({"import.archive": str(new), "import.from": str(archive)})
    cli.say(str(new))
    return 0


@cli.command("export runs/imported/archive.safetensors gpt2-xl.yaml --out runs/exported")
def export(
    archive: Archive,
    words: Words = None,
    *,
    out: OutFolder,
    compact: Compact = False,
    overwrite: Overwrite = False,
) -> int:
    """Convert an archive of this kit to EasyEdit's format, or to a smaller file."""
    name = "archive.safetensors" if compact else "archive.pt"
    place = cli.RunFolder(out, name, "results.json", overwrite=overwrite)
    hparams = cli.hyperparameters(words)
    mendkit.inspect_archive(archive)  # before the model is loaded
    base, new = mendkit.load_model(hparams), out / name
    if compact:
        whole = mendkit.load_archive(archive, base=base)
        training = whole.metadata["training"]
        mendkit.save_archive(new, whole.base, whole.mend, training=training, compact=True)
    else:
        mendkit.export_archive(archive, new, base=base)
    place.write({"export.archive": str(new), "export.from": str(archive)})
    cli.say(str(new))
    return 0


@cli.command("push runs/small you/your-archive --results runs/scores/results.json")
def push(
    archive: Archive,
    repo: Annotated[str, Argument(metavar="USER/NAME")],
    *,
    results: Results = None,
    private: Annotated[bool, Option("--private", help="only you can see it")] = False,
    licence: Annotated[str | None, Option("--license", metavar="ID", help="apache-2.0, …")] = None,
) -> int:
    """Upload an archive to the hub, with a card of its metadata and scores.

    Others edit with `archive=hub:USER/NAME`. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from ..mend.export import BUNDLED, BUNDLED_HUB_ID
    from ..reporting.card import card, upload
    from ..reporting.report import read_json

    metadata = mendkit.inspect_archive(archive)
    if "packing" not in metadata:
        raise MendkitError(
            f"{archive} is of an earlier version and holds paths of the machine it was trained on; "
            "write it anew with `export --compact`"
        )
    model = metadata["base_model"]["name"]
    if model == BUNDLED:
        model = BUNDLED_HUB_ID
    scores = read_json(results) if results else {}
    text = card(metadata, scores, repo=repo, base_model=model, licence=licence)
    cli.say(upload(archive_file(archive), text, repo, private=private))
    return 0


@cli.command("conformance ../shared/reference")
def conformance(
    folders: Folders, *, out: Out = None, as_json: Json = False, overwrite: Overwrite = False
) -> int:
    """Compare with numbers recorded from the published code.

    Factors, updates, logits, scalars and training losses are compared. The exit status is 1 if one
    missed.
    """
    from ..interop.conformance import MISS, compare_folders, conformance_table

    place = cli.RunFolder(out, "results.json", overwrite=overwrite)
    rows = compare_folders(folders)
    missed = sum(row["verdict"] == MISS for row in rows)
    results = {"comparisons": len(rows), "missed": missed, "rows": rows}
    place.write({f"conformance.{key}": value for key, value in results.items()})
    cli.show(rows, conformance_table(rows), as_json=as_json)
    return int(missed > 0)


@cli.command("sites openai-community/gpt2 --all")
def sites(
    words: ModelWords = None,
    *,
    everything: All = False,
    scan: Scan = False,
    train_data: cli.Data = "facts:train",
    validation_data: cli.Data = "facts:validation",
    as_json: Json = False,
) -> int:
    """List what can be edited in a model, and what `inner_params: auto` picks there.

    It reads the model's configuration and no weights. --scan compares blocks by 40 edits: how
    much of an edit would reach its paraphrases, neighbours and unrelated prompts.
    """
    import pandas as pd

    from ..mend.preparation import scan_blocks
    from ..models.load import site_rows

    first, *settings = words or [""]
    if not first or "=" in first or Path(first).suffix in (".yaml", ".yml"):
        hparams = cli.hyperparameters(words)
    else:
        hparams = mendkit.MENDHyperParams(model_name=first).replace(**parse_overrides(settings))
    if scan:
        read = partial(mendkit.read_examples, columns=hparams.columns)
        h = hparams.replace(stats_held_out=False, stats_examples=SCAN_EXAMPLES, val_steps=40)
        train, validation = read(train_data, limit=SCAN_EXAMPLES), read(validation_data, limit=40)
        rows = scan_blocks(mendkit.load_model(hparams), h, train, validation)
        table = pd.DataFrame(rows).to_string(index=False, float_format="%.2f")
        cli.show(rows, table, as_json=as_json)
        return 0
    rows = site_rows(hparams)
    shown = [row for row in rows if everything or row["mlp"] or row["chosen"]]
    cli.show(rows, pd.DataFrame(shown, dtype=object).to_string(index=False), as_json=as_json)
    return 0
