"""What a Gauss–Newton step reads beside its edits: other wordings, and texts that should stay."""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..data.examples import EditExample
from ..data.sampling import template_of
from ..hparams import MENDHyperParams
from ..mend.batches import edit_tokens, prepare_texts, probe_tokens
from ..models.base import BaseModel
from ..models.tokens import Tokens
from .base import text_windows

HELD = 1000  # examples whose subjects and unrelated prompts are drawn
RELATED = 0.75  # of the texts to keep, of examples like an edit
PASSAGE, BEGUN = 32, 8  # tokens of a passage, and of its beginning, which may change


class TextPool:
    """`kept` texts for a step to leave as they are, and each edit in `reworded` other wordings.

    Examples are like an edit if their prompts differ in the subject only. Their paraphrases are
    its other wordings. Beside the kept texts stay `passages` pieces of the running `text`.
    Raises as `prepare_texts`.
    """

    def __init__(
        self,
        base: BaseModel,
        hparams: MENDHyperParams,
        examples: Sequence[EditExample],
        *,
        kept: int,
        reworded: int,
        text: str = "",
        passages: int = 0,
    ) -> None:
        self.base, self.hparams, self.kept, self.reworded = base, hparams, kept, reworded
        # 1. What the examples say of each template.
        self.alike: dict[str, list[EditExample]] = {}
        wordings: dict[str, set[str]] = {}
        for example in examples if reworded else ():
            template = template_of(example.prompt, example.subject)
            if template is not None:
                self.alike.setdefault(template, []).append(example)
                found = {template_of(other, example.subject) for other in example.paraphrases}
                wordings.setdefault(template, set()).update(filter(None, found))
        self.wordings = {template: sorted(found) for template, found in wordings.items()}
        # 2. Neighbours and unrelated prompts, and subjects by where they stand: the tokens of a
        # name differ where a text begins.
        self.held: list[Tokens] = []
        self.subjects: dict[int, list[tuple[int, ...]]] = {}
        for texts in prepare_texts(base, hparams, examples[:HELD]) if kept else ():
            self.held += texts.neighbours + texts.unrelated
            places = texts.edit.subject
            if places:
                name = tuple(texts.edit.ids[place] for place in places)
                self.subjects.setdefault(min(places[0], 2), []).append(name)
        # 3. Running text.
        self.passages, self.running = passages, list[Tokens]()
        for window in text_windows(base, text, size=PASSAGE) if passages else ():
            if window.scored[BEGUN:]:
                self.running.append(replace(window, scored=window.scored[BEGUN:]))

    def other_words(self, edits: Sequence[Tokens], draw: random.Random) -> list[Tokens]:
        """Each edit in at most `reworded` other wordings."""
        texts = []
        for text in edits if self.alike else ():
            edit, template = self._as_example(text)
            known = self.wordings.get(template, [])
            for wording in draw.sample(known, min(self.reworded, len(known))):
                prompt = wording.replace("{}", edit.subject or "")
                texts.append(edit_tokens(self.base, self.hparams, edit, prompt))
        return texts

    def others(
        self, edits: Sequence[Tokens], draw: random.Random, *, most: int | None = None
    ) -> list[Tokens]:
        """`kept` texts beside the edits, at most `most`; none where the examples have none.

        Without `most` there are passages, too. Of the kept texts `RELATED` are of examples like an
        edit, where there are any. Of the rest half are the edits' prompts about other subjects.
        """
        passages: list[Tokens] = []
        if most is None:
            passages = draw.sample(self.running, min(self.passages, len(self.running)))
        if not self.held:
            return passages
        count = min(self.kept, most or self.kept)
        taken = {self.base.prompt_of(text).ids for text in edits}
        related = int(RELATED * count) if self.alike else 0
        drawn = [self._related(draw.choice(edits), draw) for _ in range(related)]
        texts = [text for text in drawn if text is not None and text.ids not in taken]
        for _ in range((count - len(texts) + 1) // 2):
            text = self._about_another(draw.choice(edits), draw)
            if text is not None and text.ids not in taken:
                texts.append(text)
        texts += [draw.choice(self.held) for _ in range(count - len(texts))]
        return texts + passages

    def _as_example(self, text: Tokens) -> tuple[EditExample, str]:
        """An edit as an example, and its template ("" without a subject)."""
        subject = [text.ids[place] for place in text.subject]
        decode = partial(self.base.tokenizer.decode, skip_special_tokens=True)
        parts = map(list, (self.base.prompt_of(text).ids, text.targets, subject))
        prompt, answer, name = map(str, map(decode, parts))
        edit = EditExample(prompt, answer.strip(), name.strip() or None)
        return edit, template_of(edit.prompt, edit.subject) or ""

    def _related(self, text: Tokens, draw: random.Random) -> Tokens | None:
        """A prompt, paraphrase or neighbour of an example like an edit; None without one."""
        alike = self.alike.get(self._as_example(text)[1])
        if not alike:
            return None
        like = draw.choice(alike)
        prompts = [(like.prompt,), like.paraphrases, [probe.prompt for probe in like.neighbours]]
        prompt = draw.choice(draw.choice(list(filter(None, prompts))))
        return probe_tokens(self.base, self.hparams, prompt)

    def _about_another(self, text: Tokens, draw: random.Random) -> Tokens | None:
        """An edit's prompt with another subject; None if its subject is not one piece of it."""
        places, prompt = text.subject, self.base.prompt_of(text).ids
        if not places or places[-1] >= len(prompt):
            return None
        first, end = places[0], places[-1] + 1
        names = self.subjects.get(min(first, 2))
        if not names or len(places) != end - first:
            return None
        ids = (*prompt[:first], *draw.choice(names), *prompt[end:])
        return Tokens(ids, (len(ids) - 1,))
