"""Sequences of edits by the papers' equations, in plain loops over tokens, in float64.

MEND (Mitchell et al., 2022): ΔW = −α Σ g̃ h̃ᵀ. MALMEN (Tan et al., 2024) and RLEdit (2025): each
token asks for v = −α (h·h̃) g̃. UltraEdit (2025) and StableEdit (2026): v = −α ‖h̃‖² g̃. These solve
ΔW = V Hᵀ (H Hᵀ + λ I)⁻¹ for all tokens of a turn. The statistics of UltraEdit, StableEdit and
RLEdit take up a turn's tokens before they normalise them. Nothing of the package computes here.
"""

import torch
from torch.nn.functional import cross_entropy


class Methods:
    """One method on a model of linear layers, with dense weights; `state`: an archive's tensors."""

    def __init__(self, base, h, state):
        self.base, self.h = base, h
        self.state = {name: value.double() for name, value in state.items()}
        self.weights = {site.name: base.site_weight(site).double() for site in base.sites}
        self.seen = {site.name: ([], []) for site in base.sites}  # h and g of the statistics

    def factors(self, text):
        """(h, g) of every token that counts, by site, on the model as edited so far."""
        inputs, added, handles = {}, {}, []
        for site in self.base.sites:

            def hook(_, args, output, name=site.name):
                inputs[name], added[name] = args[0], torch.zeros_like(output, requires_grad=True)
                return output + added[name]

            handles.append(self.base.site_module(site).register_forward_hook(hook))
        with torch.enable_grad():
            ids = {"input_ids": torch.tensor([text.ids])}
            logits = torch.func.functional_call(self.base.model, self.weights, (), ids).logits[0]
            loss = cross_entropy(logits[list(text.scored)], torch.tensor(text.targets))
            grads = torch.autograd.grad(loss, list(added.values()))
        for handle in handles:
            handle.remove()
        found = {}
        for (name, x), g in zip(inputs.items(), grads, strict=True):
            places = text.scored
            if self.h.edit_tokens == "all":  # those that the loss depends on
                places = [t for t in range(len(text.ids)) if g[0, t].any()]
            found[name] = [(x[0, t].detach(), g[0, t]) for t in places]
        return found

    def observe(self, tokens):
        """Let the statistics take up tokens by site."""
        for name, pairs in tokens.items():
            for h, g in pairs:
                self.seen[name][0].append(h)
                self.seen[name][1].append(g)

    def per_feature(self, x, rows):
        """(x − μ) / σ, with the kit's floor and clip where the settings have them."""
        mean = sum(rows) / len(rows)
        std = (sum((row - mean) ** 2 for row in rows) / max(len(rows) - 1, 1)) ** 0.5
        floor = self.h.std_floor * std.median()
        most = self.h.z_clip or float("inf")
        z = []
        for value, m, sd in zip(x.tolist(), mean.tolist(), std.tolist(), strict=True):
            score = (value - m) / (max(sd, float(floor)) + self.h.std_eps)
            z.append(min(max(score, -most), most))
        return torch.tensor(z, dtype=torch.float64)

    def whitened(self, x, rows):
        """(Σ + ridge · mean(diag Σ) · I)^(−1/2) (x − μ), by the eigenvectors of Σ."""
        mean = sum(rows) / len(rows)
        covariance = sum(torch.outer(row - mean, row - mean) for row in rows) / (len(rows) - 1)
        ridge = self.h.whiten_values * covariance.trace() / len(x)
        z = torch.zeros_like(x)
        values, vectors = torch.linalg.eigh(covariance + ridge * torch.eye(len(x)).double())
        for k, value in enumerate(values):
            z += vectors[:, k] * (vectors[:, k] @ (x - mean)) / value**0.5
        return z

    def transformed(self, index, name, h, g):
        """The blocks of the layer's group on [h; g]."""
        group = "x".join(map(str, self.weights[name].shape[::-1]))
        alike = [n for n, w in self.weights.items() if w.shape == self.weights[name].shape]
        layer, z = alike.index(name), torch.cat([h, g])
        for block in range(self.h.n_hidden + 1):
            part = {
                key: self.state[f"blocks.{group}.{block}.{key}"]
                for key in ("U", "V", "bias", "scale", "shift")
            }
            hidden = part["U"] @ (part["V"] @ z) + part["bias"]
            z = z + (part["scale"][layer] * hidden + part["shift"][layer]).clamp(min=0)
        return z[: len(h)], z[len(h) :]

    def turn(self, texts):
        """Make these edits at once, on top of those before; their ΔW by site."""
        tokens = {name: [] for name in self.weights}
        for text in texts:
            for name, pairs in self.factors(text).items():
                tokens[name] += pairs
        if self.h.lifelong_norm:
            self.observe(tokens)
        changes = {}
        for index, (name, pairs) in enumerate(tokens.items()):
            alpha = self.state["log_edit_lr"][index].exp()
            keys, values = [], []
            summed = torch.zeros_like(self.weights[name])
            for h, g in pairs:
                keys_seen, gradients_seen = self.seen[name]
                of_values = self.whitened if self.h.whiten_values else self.per_feature
                z = self.per_feature(h, keys_seen), of_values(g, gradients_seen)
                h_, g_ = self.transformed(index, name, *z)
                summed -= alpha * torch.outer(g_, h_)
                like = h @ h_ if self.h.value_coefficient == "key" else h_ @ h_
                keys.append(h)
                values.append(-alpha * like * g_)
            changes[name] = summed
            if self.h.aggregate == "normal_equation":
                ridge = self.state["log_ridge"][index, 0].exp()
                left = sum(torch.outer(v, h) for v, h in zip(values, keys, strict=True))
                gram = sum(torch.outer(h, h) for h in keys) + ridge * torch.eye(len(keys[0]))
                changes[name] = left @ torch.linalg.inv(gram.double())
            self.weights[name] = self.weights[name] + changes[name]
        return changes
