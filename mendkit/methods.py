"""Methods of model editing as settings of one trainer: what `method` in a file sets.

Each is a table of defaults, which the other keys of a file, and overrides, win over one by one.
docs/MANY_EDITS.md has the equations. Where papers leave a number to the model it is the kit's.
"""

from typing import Any

# MALMEN (Tan et al., 2024): the normal equation over the tokens of all edits made at once.
_MALMEN = {
    "aggregate": "normal_equation",
    "value_coefficient": "key",
    "ridge": 1.0,
    "edit_tokens": "scored",
    "train_on": "batch",
    "most_edits": 64,
}

# RLEdit (Li et al., 2025): MALMEN trained on sequences of batches, its statistics running on.
_RLEDIT = _MALMEN | {
    "lifelong_norm": True,
    "train_on": "episode",
    "batch_size": 8,
    "most_edits": 80,
    "back_depth": 10,
    "time_decay": 0.95,
    "cloc": 0.6,
    "cnorm": 1e-4,
}

# UltraEdit (Gu et al., 2025): no training; the statistics are those of the edits alone. The blocks
# of the hypernetwork stay the identity, so they are as small as they can be.
_ULTRAEDIT = {
    "aggregate": "normal_equation",
    "value_coefficient": "norm",
    "ridge": 1.0,
    "edit_tokens": "scored",
    "lifelong_norm": True,
    "stats_examples": 0,
    "std_floor": 0.0,
    "std_eps": 1e-7,
    "z_clip": None,
    "train_on": "batch",  # what is validated, and what `edit_lr: auto` is measured on
    "most_edits": 100,
    "edit_lr": 1e-6,
    "max_iters": 0,
    "rank": 1,
    "n_hidden": 0,
}

# StableEdit (Ma et al., 2026): statistics before the first edit, and deltas whitened in full.
_STABLEEDIT = _ULTRAEDIT | {"stats_examples": 500, "whiten_values": 0.01}

# PropMEND (Liu et al., 2025): the gradient of all tokens of a passage, and an outer loss on what
# follows from it, not on the edit.
_PROPMEND = {
    "edit_on": "text",
    "cedit": 0.0,
    "paraphrases_per_edit": 0,
    "cconsequence": 1.0,
}

METHODS: dict[str, dict[str, Any]] = {
    # MEND (Mitchell et al., 2022) is what the kit's defaults are, but for the weight of the edit.
    "mend": {"cedit": 0.1},
    "malmen": _MALMEN,
    "rledit": _RLEDIT,
    "ultraedit": _ULTRAEDIT,
    "stableedit": _STABLEEDIT,
    "propmend": _PROPMEND,
    # The kit's recipe for single edits (configs/smollm2-135m.yaml), with least squares for several.
    "mendkit": {
        "aggregate": "least_squares",
        "edit_lr": 2.6e-3,
        "edit_tokens": "scored",
        "loss_reduction": "sum",
        "whiten": 0.02,
        "whiten_pairs": True,
        "unit_response": True,
        "stats_examples": 700,
        "stats_held_out": True,
        "lr": 1e-3,
        "cedit": 0.6,
        "cpara": 0.6,
        "cneigh": 0.8,
        "cloc": 2.0,
        "cmargin": 0.3,
        "margin": 0.5,
        "texts_per_role": (4, 2, 3),
        "neighbours_per_edit": 2,
        "borrow": 0.25,
        "swap": 0.25,
        "max_iters": 500,
        "ema_decay": 0.98,
        "val_steps": 280,
    },
}
