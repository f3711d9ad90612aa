"""The published algorithm in plain loops, one token at a time, and folders of vectors recorded from it.

Written from the description of the recorded conventions (the update is added, statistics run while it trains and are
shared as the transforms are, 1e-7 beside the std, one loss mean over the whole batch), in float64, with nothing of the
package in it: an oracle for import, conformance and the hypernetwork's options.
"""

import itertools
import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

OPTIONS = {
    "shared": (True, False),
    "way": ("combine", "apart", "one_sided", "x_only", "delta_only"),
    "norm": (True, False),
    "n_hidden": (0, 1, 2),
    "init": ("id", "xavier"),
    "rank": (3, None),
}


def every_option():
    """Settings of the published code for all combinations."""
    for values in itertools.product(*OPTIONS.values()):
        chosen = dict(zip(OPTIONS, values, strict=True))
        way = chosen.pop("way")
        yield chosen | {key: key == way for key in ("combine", "one_sided", "x_only", "delta_only")}


def label(options) -> str:
    """A short name for a combination, for test reports."""
    way = next((k for k in ("combine", "one_sided", "x_only", "delta_only") if options[k]), "apart")
    shared = "shared" if options["shared"] else "each"
    norm = "norm" if options["norm"] else "raw"
    return f"{shared}-{way}-{norm}-{options['n_hidden']}-{options['init']}-{options['rank']}"


class Textbook:
    """A hypernetwork for layers `shapes`: name -> (d_in, d_out), in the order of inner_params; all weights random."""

    def __init__(self, shapes: dict[str, tuple[int, int]], options: dict, seed: int = 0) -> None:
        self.shapes, self.options = shapes, options
        generator = torch.Generator().manual_seed(seed)

        def random(*size, scale=0.3):
            return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

        self.state = OrderedDict(edit_lrs=random(len(shapes), scale=0.05))  # of either sign
        for name, (d_in, d_out) in shapes.items():
            prefix = self.prefix(name)
            if f"{prefix}k" in self.state:
                continue
            for letter, width in (("u", d_in), ("v", d_out)):
                for kind in ("mean", "std", "s"):
                    self.state[f"{prefix}{letter}_{kind}"] = torch.full(
                        (width,), float("nan"), dtype=torch.float64
                    )
            self.state[f"{prefix}k"] = torch.full((1,), float("nan"), dtype=torch.float64)
            for stack, width in self.stacks(name).items():
                rank = min(options["rank"] or width, width)
                for i in range(options["n_hidden"] + 1):
                    layer = f"{prefix}{stack}.layers.{i}."
                    self.state |= {
                        f"{layer}u": random(width, rank),
                        f"{layer}v": random(rank, width),
                    }
                    self.state[f"{layer}bias"] = random(width)
                    if options["shared"]:
                        modes = sum(shape == shapes[name] for shape in shapes.values())
                        self.state[f"{layer}mode_shift.weight"] = random(modes, width)
                        self.state[f"{layer}mode_scale.weight"] = 1 + random(modes, width)

    def prefix(self, name: str) -> str:
        """What the names of a layer's tensors begin with."""
        key = str(self.shapes[name]) if self.options["shared"] else name.replace(".", "#")
        return f"mend.{key}."

    def stacks(self, name: str) -> dict[str, int]:
        """Which stacks of blocks a layer passes, and how wide they are."""
        d_in, d_out = self.shapes[name]
        o = self.options
        if o["combine"]:
            return {"mlp": d_in + d_out}
        if o["x_only"] or (o["one_sided"] and d_in <= d_out):
            return {"mlp1": d_in}
        if o["delta_only"] or o["one_sided"]:
            return {"mlp2": d_out}
        return {"mlp1": d_in, "mlp2": d_out}

    def blocks(self, name: str, stack: str, z):
        """One token through a stack."""
        if stack not in self.stacks(name):
            return z
        same = [n for n in self.shapes if self.shapes[n] == self.shapes[name]]
        for i in range(self.options["n_hidden"] + 1):
            get = lambda kind: self.state[f"{self.prefix(name)}{stack}.layers.{i}.{kind}"]  # noqa: B023, E731
            h = get("u") @ (get("v") @ z) + get("bias")
            if self.options["shared"]:
                mode = same.index(name)
                h = h * get("mode_scale.weight")[mode] + get("mode_shift.weight")[mode]
            h = torch.stack([value if value > 0 else 0 * value for value in h])
            z = z + h if self.options["init"] == "id" else h
        return z

    def observe(self, name: str, rows) -> None:
        """Welford's update of the running statistics, row by row."""
        prefix, s = self.prefix(name), self.state
        for pair in rows:
            first = bool(s[f"{prefix}k"].isnan())
            s[f"{prefix}k"] = torch.ones(1, dtype=torch.float64) if first else s[f"{prefix}k"] + 1
            for letter, x in zip("uv", pair, strict=True):
                mean, total = (s[f"{prefix}{letter}_{kind}"] for kind in ("mean", "s"))
                new = x.clone() if first else mean + (x - mean) / s[f"{prefix}k"]
                s[f"{prefix}{letter}_s"] = (
                    torch.zeros_like(x) if first else total + (x - mean) * (x - new)
                )
                s[f"{prefix}{letter}_mean"] = new
        for letter in "uv":
            s[f"{prefix}{letter}_std"] = (s[f"{prefix}{letter}_s"] / (s[f"{prefix}k"] - 1)).sqrt()

    def normalised(self, name: str, letter: str, x):
        """One row of u or delta ("v" in the published names)."""
        mean, std = (self.state[f"{self.prefix(name)}{letter}_{kind}"] for kind in ("mean", "std"))
        return (x - mean) / (std + 1e-7)

    def update(self, factors: dict, *, training: bool = False) -> dict:
        """(d_out, d_in) changes that are added to the weights, from (u, delta) rows; zero rows do not count."""
        out = {}
        for i, (name, (d_in, d_out)) in enumerate(self.shapes.items()):
            rows = [
                (u, d)
                for u, d in zip(*factors[name], strict=True)
                if u.abs().sum() > 0 and d.abs().sum() > 0
            ]
            if training:
                self.observe(name, rows)
            change = torch.zeros(d_out, d_in, dtype=torch.float64)
            for pair in rows:
                if self.options["norm"]:
                    pair = [
                        self.normalised(name, letter, x)
                        for letter, x in zip("uv", pair, strict=True)
                    ]
                if self.options["combine"]:
                    z = self.blocks(name, "mlp", torch.cat(list(pair)))
                    pair = z[:d_in], z[d_in:]
                else:
                    pair = self.blocks(name, "mlp1", pair[0]), self.blocks(name, "mlp2", pair[1])
                change += torch.outer(pair[1], pair[0])
            out[name] = self.state["edit_lrs"][i] * change
        return out


# ------------------------------------------------------------------------------------------------- a causal model


class Editor:
    """A causal language model and a Textbook, with dense weights and full passes."""

    def __init__(self, model, names, options, seed: int = 0) -> None:
        self.model, self.weights = (
            model,
            {name: model.get_parameter(name).detach() for name in names},
        )
        self.transposed = {
            n: isinstance(model.get_submodule(n.rpartition(".")[0]), Conv1D) for n in names
        }
        flip = {
            n: tuple(w.shape) if self.transposed[n] else tuple(w.shape[::-1])
            for n, w in self.weights.items()
        }
        self.book = Textbook(flip, options, seed)

    def logits(self, batch, weights):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        return torch.func.functional_call(self.model, weights, (), inputs).logits

    def nll(self, logits, batch):
        """Mean over all labels of the batch."""
        values = []
        for row, pairs in enumerate(self.scored(batch)):
            values += [-logits[row, at].log_softmax(0)[batch["labels"][row, t]] for at, t in pairs]
        return torch.stack(values).mean()

    def scored(self, batch):
        """Per text: where a label is predicted, and where it stands."""
        return [
            [(t - 1, t) for t in range(1, row.shape[0]) if row[t] != -100]
            for row in batch["labels"]
        ]

    def batch(self, n: int, generator) -> dict:
        """Right-padded random texts of 5 to 8 tokens whose last 1 to 3 are scored."""
        ids = torch.randint(3, self.model.config.vocab_size, (n, 8), generator=generator)
        lengths = torch.randint(5, 9, (n,), generator=generator).tolist()
        labels, mask = torch.full((n, 8), -100), torch.zeros((n, 8), dtype=torch.long)
        for row, length in enumerate(lengths):
            first = length - int(torch.randint(1, 4, (1,), generator=generator))
            labels[row, first:length], mask[row, :length] = ids[row, first:length], 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def kl(self, before, after, batch):
        """Mean over the positions of the attention mask."""
        keep = batch["attention_mask"].bool()
        return F.kl_div(
            after[keep].log_softmax(-1),
            before[keep].log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )

    def factors(self, batch, weights):
        """(u, delta) of every position."""
        seen, handles = {}, []
        for name in self.weights:
            keep = lambda _, args, output, name=name: seen.__setitem__(name, (args[0], output))  # noqa: E731
            handles.append(
                self.model.get_submodule(name.rpartition(".")[0]).register_forward_hook(keep)
            )
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        loss = self.nll(self.logits(batch, leaves), batch)
        deltas = torch.autograd.grad(loss, [seen[name][1] for name in weights])
        for handle in handles:
            handle.remove()
        return {
            name: (seen[name][0].detach(), delta)
            for name, delta in zip(weights, deltas, strict=True)
        }

    def edit(self, batch, weights=None, *, training: bool = False):
        """Factors, the update in each weight's own orientation, and the edited weights."""
        weights = weights or self.weights
        whole = self.factors(batch, weights)
        flat = {name: (u.flatten(0, 1), delta.flatten(0, 1)) for name, (u, delta) in whole.items()}
        update = self.book.update(flat, training=training)
        update = {
            name: (u.T if self.transposed[name] else u).contiguous() for name, u in update.items()
        }
        return whole, update, {name: weights[name] + update[name] for name in weights}

    def scalars(self, logits, batch):
        right, log_probs = [], []
        for row, pairs in enumerate(self.scored(batch)):
            right.append(
                all(
                    int(logits[row, at].argmax()) == int(batch["labels"][row, t]) for at, t in pairs
                )
            )
            log_probs += [
                float(logits[row, at].log_softmax(0)[batch["labels"][row, t]]) for at, t in pairs
            ]
        log_probs = torch.tensor(log_probs, dtype=torch.float64)
        log_prob, prob = log_probs.mean(), log_probs.exp().mean()
        values = {"acc": sum(right) / len(right), "log_prob": float(log_prob), "prob": float(prob)}
        return values | {"nll": -float(log_prob), "n_tokens": float(len(log_probs))}


class Seq2Seq(Editor):
    """An encoder and a decoder: labels stand at the positions that predict them, and mask the locality KL."""

    def logits(self, batch, weights):
        start = torch.full((len(batch["labels"]), 1), self.model.config.decoder_start_token_id)
        shifted = torch.cat([start, batch["labels"][:, :-1]], 1)
        shifted[shifted == -100] = self.model.config.pad_token_id
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return torch.func.functional_call(
            self.model, weights, (), inputs | {"decoder_input_ids": shifted}
        ).logits

    def scored(self, batch):
        return [[(t, t) for t in range(row.shape[0]) if row[t] != -100] for row in batch["labels"]]

    def kl(self, before, after, batch):
        return super().kl(before, after, {"attention_mask": batch["labels"] != -100})

    def batch(self, n, generator):
        batch = super().batch(n, generator)
        labels = torch.randint(3, self.model.config.vocab_size, (n, 4), generator=generator)
        for row, length in enumerate(torch.randint(1, 5, (n,), generator=generator).tolist()):
            labels[row, length:] = -100
        return batch | {"labels": labels}


class Classifier(Editor):
    """One logit and labels 0 or 1 of shape (n, 1)."""

    def nll(self, logits, batch):
        p = 1 / (1 + (-logits).exp())
        return -torch.where(batch["labels"] == 1, p, 1 - p).log().mean()

    def kl(self, before, after, batch):
        p, q = before.sigmoid(), after.sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()

    def scalars(self, logits, batch):
        p = logits.sigmoid()
        p = torch.where(batch["labels"] == 1, p, 1 - p)
        log_prob = float(p.log().mean())
        values = {
            "acc": float((p > 0.5).double().mean()),
            "log_prob": log_prob,
            "prob": float(p.mean()),
        }
        return values | {"nll": -log_prob, "n_tokens": float(len(p))}

    def batch(self, n, generator):
        return super().batch(n, generator) | {
            "labels": torch.randint(0, 2, (n, 1), generator=generator)
        }


@torch.no_grad()
def record(folder: Path, editor: Editor, *, n_edits: int = 2, seed: int = 0) -> Path:
    """A folder in the layout of the reference vectors; the archive is a pickle with a live configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    model, names, options, vectors = editor.model, list(editor.weights), editor.book.options, {}

    def batch(role, n):
        values = editor.batch(n, generator)
        vectors.update({f"{role}/{name}": value for name, value in values.items()})
        return values

    vectors |= {f"init/{name}": value.clone() for name, value in editor.book.state.items()}
    losses, accumulate, h = [], 2, {"cedit": 0.1, "cloc": 1.0}
    for step in range(accumulate + 1):
        inner, outer, loc = (
            batch(f"train/{step}/{r}", n)
            for r, n in (("inner", n_edits), ("outer", n_edits), ("loc", 3))
        )
        with torch.enable_grad():
            _, _, edited = editor.edit(inner, training=True)
        edit = float(editor.nll(editor.logits(outer, edited), outer))
        kl = float(editor.kl(editor.logits(loc, editor.weights), editor.logits(loc, edited), loc))
        losses.append({"edit": edit, "loc": kl, "total": h["cedit"] * edit + h["cloc"] * kl})
    for name, value in editor.book.state.items():  # what training would have changed
        if ".layers." in name or name == "edit_lrs":
            value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    vectors |= {f"final/{name}": value.clone() for name, value in editor.book.state.items()}
    inner, second = batch("eval/inner", n_edits), batch("eval/inner_second", 1)
    outer, loc = batch("eval/outer", n_edits), batch("eval/loc", 3)
    with torch.enable_grad():
        whole, update, edited = editor.edit(inner)
        _, again, _ = editor.edit(second, edited)
    vectors |= {f"eval/factors/{n}/x": u.contiguous() for n, (u, _) in whole.items()}
    vectors |= {f"eval/factors/{n}/delta": delta.contiguous() for n, (_, delta) in whole.items()}
    vectors |= {f"eval/update/{n}": u for n, u in update.items()} | {
        f"eval/update_second/{n}": u for n, u in again.items()
    }
    logits = {
        when: [editor.logits(b, w) for b in (outer, loc)]
        for when, w in (("pre", editor.weights), ("post", edited))
    }
    for when, pair in logits.items():
        vectors |= {
            f"eval/{when}_logits_{role}": x for role, x in zip(("outer", "loc"), pair, strict=True)
        }
    meta = {
        "inner_params": names,
        "hparams": options | h | {"edit_lr": 0.01, "lr": 1e-3},
        "losses": losses,
    }
    meta |= {f"eval_{when}": editor.scalars(pair[0], outer) for when, pair in logits.items()}
    meta |= {"eval_kl_loc": float(editor.kl(logits["pre"][1], logits["post"][1], loc))}
    meta |= {"n_edits": n_edits, "optimizer_steps_after": [[accumulate, 1.0]]}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    save_file(
        {name: value.clone().contiguous() for name, value in vectors.items()},
        folder / "vectors.safetensors",
    )
    model.config.save_pretrained(folder)
    own = dict(model.named_parameters())
    save_file(
        {name: value.clone() for name, value in own.items()}, folder / "base_model.safetensors"
    )
    save_published(folder / "archive.pt", editor.book.state, model.config)
    return folder


def as_float32(state) -> OrderedDict:
    """The state as a float32 run holds it: each std follows from its sum."""
    state = OrderedDict((name, value.float()) for name, value in state.items())
    for name in [name for name in state if name.endswith("_std")]:
        k = state[f"{name.rpartition('.')[0]}.k"]
        state[name] = (state[f"{name.removesuffix('std')}s"] / (k - 1)) ** 0.5
    return state


def save_published(path: Path, state, config) -> Path:
    """An archive as published code writes it."""
    content = {
        "model": OrderedDict(state, model_config=config),
        "opt": {},
        "lr_opt": {},
        "val_stats": {},
        "step": 12,
    }
    torch.save(content | {"start_time": "", "elapsed_time": 1.0}, path)
    return path
