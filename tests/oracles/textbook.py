"""The published algorithm in plain loops, one token at a time, and folders recorded from it.

Written from the description of the recorded conventions: the update is added, statistics run while
it trains and are shared as the transforms are, 1e-7 stands beside the std, the loss is one mean
over the whole batch. In float64, with nothing of the package in it.
"""

import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
SHAPES = {"b.weight": (4, 6), "a.weight": (4, 6), "c.weight": (6, 4), "d.weight": (5, 5)}
T5 = "{}.block.2.layer.{}.DenseReluDense.{}.weight"
NAMES = {
    "gpt2": tuple(f"transformer.h.{i}.mlp.c_{n}.weight" for i in (2, 1) for n in ("proj", "fc")),
    "llama": tuple(
        f"model.layers.{i}.mlp.{n}_proj.weight" for i in (2, 1) for n in ("up", "down", "gate")
    ),
    "t5": tuple(
        T5.format(side, i, n)
        for side, i in (("decoder", 2), ("encoder", 1))
        for n in ("wo", "wi_1", "wi_0")
    ),
    "bert": tuple(
        f"model.encoder.layer.{i}.{n}.dense.weight"
        for i in (2, 1)
        for n in ("output", "intermediate")
    ),
}
"""Layers of the tiny models, not in the models' own order."""
WAYS = ("combine", "apart", "one_sided", "x_only", "delta_only")


def options_of(way: str, **others) -> dict:
    """Settings of the published code; `way` is how u and delta are put together."""
    return others | {key: key == way for key in WAYS if key != "apart"}


def every_option():
    """Fifteen settings of the published code, in which every pair of values occurs."""
    for w, way in enumerate(WAYS):
        for n in range(3):
            yield options_of(
                way,
                n_hidden=n,
                shared=bool((w + n) % 2),
                norm=bool((w + n // 2 + w // 2) % 2),
                init=("id", "xavier")[(n + w * (w - 1) // 2) % 2],
                rank=(3, None)[(w * n + w // 2 + n // 2) % 2],
            )


def label(options) -> str:
    """A short name for a combination, for test reports."""
    return "-".join(f"{key}={value}" for key, value in options.items() if value is not False)


class Textbook:
    """A hypernetwork for layers `shapes`: name -> (d_in, d_out), in the order of inner_params.

    All its weights are random.
    """

    def __init__(self, shapes: dict[str, tuple[int, int]], options: dict, seed: int = 0) -> None:
        self.shapes, self.options = shapes, options
        generator = torch.Generator().manual_seed(seed)

        def random(*size, scale=0.3):
            return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

        self.state = OrderedDict(edit_lrs=random(len(shapes), scale=0.05))  # of either sign
        for name, shape in shapes.items():
            prefix = self.prefix(name)
            if f"{prefix}k" in self.state:
                continue
            for letter, width in zip("uv", shape, strict=True):
                for kind in ("mean", "std", "s"):
                    self.state[f"{prefix}{letter}_{kind}"] = empty(width)
            self.state[f"{prefix}k"] = empty(1)
            for stack, width in self.stacks(name).items():
                rank = min(options["rank"] or width, width)
                for i in range(options["n_hidden"] + 1):
                    layer = f"{prefix}{stack}.layers.{i}."
                    self.state[f"{layer}u"] = random(width, rank)
                    self.state[f"{layer}v"] = random(rank, width)
                    self.state[f"{layer}bias"] = random(width)
                    if options["shared"]:
                        modes = len(self.alike(name))
                        self.state[f"{layer}mode_shift.weight"] = random(modes, width)
                        self.state[f"{layer}mode_scale.weight"] = 1 + random(modes, width)

    def alike(self, name: str) -> list[str]:
        """The layers of the same shape."""
        return [other for other in self.shapes if self.shapes[other] == self.shapes[name]]

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
        for i in range(self.options["n_hidden"] + 1):
            layer = f"{self.prefix(name)}{stack}.layers.{i}."
            h = self.state[f"{layer}u"] @ (self.state[f"{layer}v"] @ z) + self.state[f"{layer}bias"]
            if self.options["shared"]:
                mode = self.alike(name).index(name)
                h = h * self.state[f"{layer}mode_scale.weight"][mode]
                h = h + self.state[f"{layer}mode_shift.weight"][mode]
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
                if first:
                    s[f"{prefix}{letter}_mean"] = x.clone()
                    s[f"{prefix}{letter}_s"] = torch.zeros_like(x)
                    continue
                old = s[f"{prefix}{letter}_mean"]
                new = old + (x - old) / s[f"{prefix}k"]
                s[f"{prefix}{letter}_mean"] = new
                s[f"{prefix}{letter}_s"] = s[f"{prefix}{letter}_s"] + (x - old) * (x - new)
        for letter in "uv":
            s[f"{prefix}{letter}_std"] = (s[f"{prefix}{letter}_s"] / (s[f"{prefix}k"] - 1)).sqrt()

    def normalised(self, name: str, letter: str, x):
        """One row of u or delta ("v" in the published names)."""
        prefix = f"{self.prefix(name)}{letter}"
        return (x - self.state[f"{prefix}_mean"]) / (self.state[f"{prefix}_std"] + 1e-7)

    def update(self, factors: dict, *, training: bool = False) -> dict:
        """(d_out, d_in) changes that are added to the weights; rows that are zero do not count.

        `factors`: by layer u, (rows, d_in), and delta, (rows, d_out).
        """
        out = {}
        for lr, (name, (d_in, d_out)) in zip(
            self.state["edit_lrs"], self.shapes.items(), strict=True
        ):
            rows = [(u, d) for u, d in zip(*factors[name], strict=True) if u.any() and d.any()]
            if training:
                self.observe(name, rows)
            change = torch.zeros(d_out, d_in, dtype=torch.float64)
            for u, d in rows:
                if self.options["norm"]:
                    u, d = self.normalised(name, "u", u), self.normalised(name, "v", d)
                if self.options["combine"]:
                    z = self.blocks(name, "mlp", torch.cat([u, d]))
                    u, d = z[:d_in], z[d_in:]
                else:
                    u, d = self.blocks(name, "mlp1", u), self.blocks(name, "mlp2", d)
                change += torch.outer(d, u)
            out[name] = lr * change
        return out


def empty(width: int):
    """What published code keeps before it has seen a factor."""
    return torch.full((width,), torch.nan, dtype=torch.float64)


# ---------------------------------------------------------------------------------- a causal model


class Editor:
    """A causal language model and a Textbook, with dense weights and full passes."""

    def __init__(self, model, names, options, seed: int = 0) -> None:
        self.model = model
        self.layers = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
        self.weights = {name: model.get_parameter(name).detach() for name in names}
        shapes = {name: tuple(self.plain(name, w).shape[::-1]) for name, w in self.weights.items()}
        self.book = Textbook(shapes, options, seed)

    def plain(self, name: str, weight):
        """A weight as (d_out, d_in), or back as it lies in the model."""
        return weight.T if isinstance(self.layers[name], Conv1D) else weight

    def logits(self, batch, weights):
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        return torch.func.functional_call(self.model, weights, (), inputs).logits

    def scored(self, batch):
        """(text, where a label is predicted, the label) of every label."""
        for row, labels in enumerate(batch["labels"].tolist()):
            for t in range(1, len(labels)):
                if labels[t] != -100:
                    yield row, t - 1, labels[t]

    def log_probs(self, logits, batch):
        """Of every label of the batch."""
        scored = self.scored(batch)
        return torch.stack([logits[row, at].log_softmax(0)[token] for row, at, token in scored])

    def nll(self, logits, batch):
        """Mean over all labels of the batch."""
        return -self.log_probs(logits, batch).mean()

    def kl(self, before, after, batch):
        """Mean over the positions of the attention mask."""
        keep = batch["attention_mask"].bool()
        p, q = before[keep].log_softmax(-1), after[keep].log_softmax(-1)
        return F.kl_div(q, p, log_target=True, reduction="batchmean")

    def scores(self, logits, batch):
        """Accuracy counts texts whose every label is right."""
        right = [True] * len(logits)
        for row, at, token in self.scored(batch):
            right[row] = right[row] and int(logits[row, at].argmax()) == token
        return sum(right) / len(right), self.log_probs(logits, batch)

    def batch(self, n: int, generator) -> dict:
        """Right-padded random texts of 5 to 8 tokens whose last 1 to 3 are scored."""
        ids = torch.randint(3, self.model.config.vocab_size, (n, 8), generator=generator)
        lengths = torch.randint(5, 9, (n,), generator=generator).tolist()
        labels, mask = torch.full((n, 8), -100), torch.zeros((n, 8), dtype=torch.long)
        for row, length in enumerate(lengths):
            first = length - int(torch.randint(1, 4, (1,), generator=generator))
            labels[row, first:length], mask[row, :length] = ids[row, first:length], 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def factors(self, batch, weights):
        """(u, delta) of every position."""
        seen, handles = {}, []
        for name, layer in self.layers.items():
            keep = lambda _, args, output, name=name: seen.__setitem__(name, (args[0], output))  # noqa: E731
            handles.append(layer.register_forward_hook(keep))
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        loss = self.nll(self.logits(batch, leaves), batch)
        deltas = torch.autograd.grad(loss, [seen[name][1] for name in weights])
        for handle in handles:
            handle.remove()
        pairs = zip(weights, deltas, strict=True)
        return {name: (seen[name][0].detach(), delta) for name, delta in pairs}

    @torch.enable_grad()
    def edit(self, batch, weights=None, *, training: bool = False):
        """Factors, the update in each weight's orientation, and the edited weights."""
        weights = weights or self.weights
        whole = self.factors(batch, weights)
        flat = {name: [x.flatten(0, 1) for x in pair] for name, pair in whole.items()}
        update = {}
        for name, change in self.book.update(flat, training=training).items():
            update[name] = self.plain(name, change).contiguous()
        return whole, update, {name: weights[name] + update[name] for name in weights}


class Seq2Seq(Editor):
    """An encoder and a decoder: labels stand where they are predicted, and mask the locality KL."""

    def logits(self, batch, weights):
        start = torch.full((len(batch["labels"]), 1), self.model.config.decoder_start_token_id)
        shifted = torch.cat([start, batch["labels"][:, :-1]], 1)
        shifted[shifted == -100] = self.model.config.pad_token_id
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
        inputs["decoder_input_ids"] = shifted
        return torch.func.functional_call(self.model, weights, (), inputs).logits

    def scored(self, batch):
        for row, at in (batch["labels"] != -100).nonzero().tolist():
            yield row, at, int(batch["labels"][row, at])

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

    def log_probs(self, logits, batch):
        p = 1 / (1 + (-logits).exp())
        return torch.where(batch["labels"] == 1, p, 1 - p).log().flatten()

    def kl(self, before, after, batch):
        p, q = before.sigmoid(), after.sigmoid()
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()

    def scores(self, logits, batch):
        log_probs = self.log_probs(logits, batch)
        return float((log_probs.exp() > 0.5).double().mean()), log_probs

    def batch(self, n, generator):
        labels = torch.randint(0, 2, (n, 1), generator=generator)
        return super().batch(n, generator) | {"labels": labels}


# --------------------------------------------------------------------------------- what is recorded


@torch.no_grad()
def record(folder: Path, editor: Editor, *, n_edits: int = 2, seed: int = 0) -> Path:
    """A folder in the layout of the reference vectors, with two edits or as many as given."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    state, vectors = editor.book.state, {}

    def batch(role, n):
        values = editor.batch(n, generator)
        vectors.update({f"{role}/{name}": value for name, value in values.items()})
        return values

    vectors |= {f"init/{name}": value.clone() for name, value in state.items()}
    h = {"cedit": 0.1, "cloc": 1.0, "edit_lr": 0.01, "lr": 1e-3}
    meta = {"inner_params": list(editor.weights), "hparams": editor.book.options | h}
    meta |= {"losses": [], "n_edits": n_edits, "optimizer_steps_after": [[2, 1.0]]}
    for step in range(3):
        inner, outer = (batch(f"train/{step}/{role}", n_edits) for role in ("inner", "outer"))
        loc = batch(f"train/{step}/loc", 3)
        _, _, edited = editor.edit(inner, training=True)
        edit = float(editor.nll(editor.logits(outer, edited), outer))
        kl = float(editor.kl(editor.logits(loc, editor.weights), editor.logits(loc, edited), loc))
        total = h["cedit"] * edit + h["cloc"] * kl
        meta["losses"].append({"edit": edit, "loc": kl, "total": total})
    for name, value in state.items():  # what training would have changed
        if ".layers." in name or name == "edit_lrs":
            value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    vectors |= {f"final/{name}": value.clone() for name, value in state.items()}

    inner, second = batch("eval/inner", n_edits), batch("eval/inner_second", 1)
    outer, loc = batch("eval/outer", n_edits), batch("eval/loc", 3)
    whole, update, edited = editor.edit(inner)
    _, again, _ = editor.edit(second, edited)
    for name, (u, delta) in whole.items():
        vectors |= {f"eval/factors/{name}/x": u, f"eval/factors/{name}/delta": delta}
        vectors |= {f"eval/update/{name}": update[name], f"eval/update_second/{name}": again[name]}
    for when, weights in {"pre": editor.weights, "post": edited}.items():
        logits = editor.logits(outer, weights)
        vectors[f"eval/{when}_logits_outer"] = logits
        vectors[f"eval/{when}_logits_loc"] = editor.logits(loc, weights)
        accuracy, log_probs = editor.scores(logits, outer)
        mean = float(log_probs.mean())
        scores = {"acc": accuracy, "log_prob": mean, "nll": -mean}
        scores |= {"prob": float(log_probs.exp().mean()), "n_tokens": float(len(log_probs))}
        meta[f"eval_{when}"] = scores
    logits = [vectors[f"eval/{when}_logits_loc"] for when in ("pre", "post")]
    meta["eval_kl_loc"] = float(editor.kl(*logits, loc))

    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    own = dict(editor.model.named_parameters())
    for file, tensors in {"vectors": vectors, "base_model": own}.items():
        save_file(
            {name: value.clone().contiguous() for name, value in tensors.items()},
            folder / f"{file}.safetensors",
        )
    editor.model.config.save_pretrained(folder)
    save_published(folder / "archive.pt", state, editor.model.config)
    return folder


def as_float32(state) -> OrderedDict:
    """The state as a float32 run holds it: each std follows from its sum."""
    state = OrderedDict((name, value.float()) for name, value in state.items())
    for name in state:
        if name.endswith("_std"):
            k = state[f"{name.rpartition('.')[0]}.k"]
            state[name] = (state[f"{name.removesuffix('std')}s"] / (k - 1)) ** 0.5
    return state


def save_published(path: Path, state, config) -> Path:
    """An archive as published code writes it: a pickle with a live configuration."""
    content = {"model": OrderedDict(state, model_config=config), "opt": {}, "lr_opt": {}}
    content |= {"val_stats": {}, "step": 12, "start_time": "", "elapsed_time": 1.0}
    torch.save(content, path)
    return path
