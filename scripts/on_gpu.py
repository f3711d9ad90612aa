"""One run on a GPU: are its numbers the CPU's, how fast is it, how much memory does it take?

    python scripts/on_gpu.py                 # at most 8 minutes on one CUDA device
    python scripts/on_gpu.py --tiny FOLDER   # every part on the CPU, with a small model folder

prints a Markdown table and writes it as JSON to --out (runs/on_gpu/on_gpu.json). A part that fails
is a row with its error; the other parts run all the same, and the exit status is 1.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mendkit import MENDEditor, MENDHyperParams, load_model, read_examples, train
from mendkit.cost.bench import open_model
from mendkit.cost.plan import plan
from mendkit.mend.edit import Edit
from mendkit.models.base import BaseModel
from mendkit.runs import provenance, write_json

MINUTES = 8
SHAPES = ("gpt2-xl-shape", "llama-7b-shape")  # random weights, bfloat16
STEPS, EDITS, FACTS = 20, 10, 64
PROMPT = "The capital of France is"
Row = dict[str, Any]


@dataclass
class Session:
    """The device, the real model, where files go, and the rows measured so far."""

    device: str
    model: str
    out: Path
    started: float = field(default_factory=time.perf_counter)
    rows: list[Row] = field(default_factory=list)

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    def settings(self, model: str, **changes: Any) -> MENDHyperParams:
        """The paper's recipe for a short run."""
        small = {"rank": 1920 if self.on_cuda else 8, "batch_size": 16 if self.on_cuda else 4}
        given = {"device": self.device, "cache_dir": str(self.out / "cache"), **small, **changes}
        return MENDHyperParams(
            model_name=model, release_trunk=False, val_steps=4, stats_examples=32, **given
        )

    def synchronise(self) -> float:
        """Wait for the device; the time then."""
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def editor_of(session: Session, base: BaseModel, h: MENDHyperParams, name: str) -> MENDEditor:
    """The editor of an archive that is trained in the folder `name` first."""
    facts = read_examples("facts:train", limit=FACTS), read_examples("facts:validation", limit=4)
    run = session.out / name
    archive = train(h, *facts, base=base, run_dir=run).archive
    return MENDEditor.from_hparams(h.replace(archive=str(archive)), base=base)


def logits_of(base: BaseModel) -> Tensor:
    """The logits after PROMPT, on the CPU."""
    inputs = base.tokenizer(PROMPT, return_tensors="pt").to(base.device)
    with torch.no_grad():
        return base.model(**inputs).logits[0, -1].double().cpu()


def apart(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def edited(editor: MENDEditor) -> tuple[Edit, Tensor, str]:
    """An edit of PROMPT, ten times as strong, the logits with it, and what is written."""
    edit = editor.edit(PROMPT, "Lyon").scale(10.0)
    with edit.applied():
        return edit, logits_of(editor.base), editor.base.generate(PROMPT, max_new_tokens=5)


def equality(session: Session) -> Iterator[Row]:
    """One archive, made on the CPU, edits on the CPU and on the device."""
    h = session.settings(session.model, device="cpu", max_iters=0, dtype="float32")
    first = editor_of(session, load_model(h), h, "equality")
    there = load_model(h.replace(device=session.device))
    archive = str(session.out / "equality" / "archive.safetensors")
    second = MENDEditor.from_hparams(h.replace(archive=archive), base=there)
    error = apart(logits_of(there), logits_of(first.base))
    yield {"what": "logits, CPU against device", "value": error, "ok": error < 1e-4}
    (edit, logits, said), (on_device, logits_there, said_there) = edited(first), edited(second)
    changes = on_device.dense()
    error = max(apart(changes[name], value) for name, value in edit.dense().items())
    yield {"what": "ΔW, CPU against device", "value": error, "ok": error < 1e-2}
    error = apart(logits_there, logits)
    yield {"what": "logits of the edited model", "value": error, "ok": error < 1e-2}
    yield {"what": "the same words are written", "value": said_there, "ok": said == said_there}


def speed(session: Session, model: str, dtype: str) -> Iterator[Row]:
    """Seconds of a training step and of an edit, and the peak of memory against the plan."""
    h = session.settings(model, dtype=dtype, max_iters=STEPS, val_interval=STEPS)
    if session.on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    base = open_model(h)
    facts = read_examples("facts:train", limit=FACTS), read_examples("facts:validation", limit=4)
    run = session.out / model.replace("/", "_")[-40:]
    begun, stamps = session.synchronise(), []
    result = train(h, *facts, base=base, run_dir=run)
    seconds = session.synchronise() - begun
    caches = sum(value for name, value in result.cache.items() if name.endswith("seconds"))
    yield {"what": "caches and statistics, s", "value": caches}
    each = (seconds - caches) / STEPS
    yield {"what": "training step with its share of 2 validations, s", "value": each}
    yield {"what": "edits trained a second", "value": h.batch_size / each}
    if session.on_cuda:
        peak = torch.cuda.max_memory_allocated()
        planned = plan(h, *facts).peak
        yield {"what": "peak memory, GB", "value": peak / 1e9}
        yield {"what": "peak over plan (± 25 %)", "value": peak / planned}
    editor = MENDEditor.from_hparams(h.replace(archive=str(result.archive)), base=base)
    for example in read_examples("facts:test", limit=EDITS):
        start = session.synchronise()
        edit = editor.edit(example).apply()
        stamps.append(session.synchronise() - start)
        edit.undo()
    yield {"what": "one edit alone, s", "value": median(stamps)}


def adapter(session: Session) -> Iterator[Row]:
    """An edit as a LoRA adapter, read by peft on the device."""
    from peft import PeftModel

    h = session.settings(session.model, max_iters=0, dtype="float32")
    edit, logits, _ = edited(editor_of(session, load_model(h), h, "adapter"))
    edit.save_adapter(session.out / "lora")
    plain = load_model(h)
    before = logits_of(plain)
    plain.model = PeftModel.from_pretrained(plain.model, session.out / "lora").eval()
    error = apart(logits_of(plain) - before, logits - before)
    yield {"what": "logits' shift, peft against the edit", "value": error, "ok": error < 1e-2}


def device_map(session: Session) -> Iterator[Row]:
    """The model with its first half of blocks on the device and the others on the CPU."""
    from accelerate import dispatch_model

    h = session.settings(session.model, max_iters=0, dtype="float32")
    whole = load_model(h)
    expected = edited(editor_of(session, whole, h, "device_map"))
    count, place = whole.model.config.num_hidden_layers, 0 if session.on_cuda else "cpu"
    ends = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
    places: dict[str, Any] = dict.fromkeys(ends, place)
    for block in range(count):
        places[f"model.layers.{block}"] = place if block < count // 2 else "cpu"
    model = dispatch_model(load_model(h).model, places, main_device=place, force_hooks=True)
    spread = BaseModel(model, whole.tokenizer, name=whole.name)
    archive = str(session.out / "device_map" / "archive.safetensors")
    _, logits, said = edited(MENDEditor.from_hparams(h.replace(archive=archive), base=spread))
    error = apart(logits, expected[1])
    yield {"what": "logits of the edited model", "value": error, "ok": error < 1e-2}
    yield {"what": "the same words are written", "value": said, "ok": said == expected[2]}


def run_part(session: Session, part: str, model: str, rows: Callable[[], Iterator[Row]]) -> None:
    """Add a part's rows; its error is a row, too."""
    used = time.perf_counter() - session.started
    if used > 60 * MINUTES * 0.75:
        session.rows.append({"part": part, "model": model, "what": "left out", "value": used})
        return
    try:
        for row in rows():
            session.rows.append({"part": part, "model": model, **row})
    except Exception as error:  # the other parts still tell something
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        session.rows.append(
            {"part": part, "model": model, "what": "failed", "value": said, "ok": False}
        )


def table(rows: list[Row]) -> str:
    """The rows in Markdown."""
    lines = ["| part | model | | value | |", "|---|---|---|---|---|"]
    for row in rows:
        value = f"{row['value']:.3g}" if isinstance(row["value"], float) else row["value"]
        verdict = {True: "ok", False: "NOT OK", None: ""}[row.get("ok")]
        lines.append(f"| {row['part']} | {row['model']} | {row['what']} | {value} | {verdict} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Run all parts; the exit status is 1 if one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/on_gpu"))
    parser.add_argument("--tiny", metavar="FOLDER", help="a small model, on the CPU")
    given = parser.parse_args(words)
    if not given.tiny and not torch.cuda.is_available():
        sys.stderr.write("error: torch sees no CUDA device here; --tiny FOLDER tries the script\n")
        return 2
    device = "cpu" if given.tiny else "cuda:0"
    given.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=given.out) as work:
        session = Session(device, given.tiny or "smollm2-135m", Path(work))
        name = Path(session.model).name
        run_part(session, "equality", name, partial(equality, session))
        run_part(session, "speed, float32", name, partial(speed, session, session.model, "float32"))
        for shape in () if given.tiny else SHAPES:
            run_part(session, "speed, bfloat16", shape, partial(speed, session, shape, "bfloat16"))
        run_part(session, "PEFT adapter", name, partial(adapter, session))
        run_part(session, "device map", name, partial(device_map, session))
    gpu = torch.cuda.get_device_name(0) if session.on_cuda else "none"
    seconds = time.perf_counter() - session.started
    results = {"device": gpu, "seconds": seconds, "rows": session.rows, **provenance()}
    write_json(given.out / "on_gpu.json", results)
    print(f"{gpu}, {seconds:.0f} s\n\n{table(session.rows)}")
    return int(any(row.get("ok") is False for row in session.rows))


if __name__ == "__main__":
    sys.exit(main())
