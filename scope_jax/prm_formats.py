r"""How a problem and its reasoning steps become the tokens a process reward model reads.

Each published PRM was trained on one layout of text and reads a step's verdict at one token of it
(METHOD.md section 4). Host code: texts in, ids and read positions out.

    qwen_math      <system><user: problem><assistant: s1 <extra_0> s2 <extra_0> ..>
                                                         ^            ^              read here
    trl            [bos] problem s1 \n s2 \n ..          last token of each separator
    skywork        [bos] problem \n s1 \n s2 \n ..       each newline token behind a step
    math_shepherd  [bos] problem s1 ки \n s2 ки ..       each ки
    rlhflow        <user: problem s1><assistant: +><user: s2><assistant: +> ..
                                               ^ the token that PREDICTS each "+"

A text that cannot be laid out exactly gives None instead of a guess: it does not survive the PRM's
tokenizer, it spells one of its special tokens, or it does not show one verdict per step. An
off-by-one here is the fault that users of other stacks report most.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from scope_jax.records import InputError
from scope_jax.steps import survives

# What Qwen2.5-Math-PRM's model card puts into the system turn.
QWEN_SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."


@dataclasses.dataclass(frozen=True)
class PRMFormat:
    """A layout by name, and the token or text that ends a step in it."""

    name: str
    step_token: str = ""  # "" = the layout's own, see STEP_TOKENS

    def __post_init__(self):
        if self.name not in STEP_TOKENS:
            raise InputError(
                f"PRM format {self.name!r} is not known; known: {', '.join(STEP_TOKENS)}"
            )
        if not self.step_token:
            object.__setattr__(self, "step_token", STEP_TOKENS[self.name])


STEP_TOKENS = {
    "qwen_math": "<extra_0>",
    "trl": "\n",
    "skywork": "\n",
    "math_shepherd": "ки",
    "rlhflow": "+",
}


class PRMInput(NamedTuple):
    """One solution as a PRM reads it."""

    ids: list[int]
    reads: list[int]  # the index in `ids` at which each step is read, increasing


class PRMTexts:
    """Lays out problems and steps for one PRM and its tokenizer.

    Args:
      tokenizer: the PRM's own, a transformers tokenizer.
      prm_format: the layout that the PRM was trained on.
      source: what errors call the tokenizer, usually its directory.
    Raises:
      InputError: the tokenizer has no such step token, or no chat template where one is needed.
    """

    def __init__(self, tokenizer, prm_format: PRMFormat, source: Any = "the PRM's tokenizer"):
        self.tokenizer, self.format = tokenizer, prm_format
        if prm_format.name in ("qwen_math", "rlhflow") and not tokenizer.chat_template:
            raise InputError(f"{source} has no chat template; PRM format {prm_format.name} is one")
        self._step_ids = self._find_step_ids()
        one_token = prm_format.name != "trl"  # only TRL's separator may be several tokens
        unknown = tokenizer.unk_token_id in self._step_ids
        if not self._step_ids or unknown or (one_token and len(self._step_ids) != 1):
            raise InputError(
                f"{source} has no step token {prm_format.step_token!r}, which PRM format "
                f"{prm_format.name} reads its scores at"
            )
        if prm_format.name == "rlhflow":  # what the template writes before an assistant's turn
            turn = [{"role": "user", "content": "1"}]
            opened = self._chat(turn, add_generation_prompt=True)
            opening = opened.removeprefix(self._chat(turn))
            self._opening = tokenizer.encode(opening, add_special_tokens=False)

    def __call__(self, problem: str, steps: Sequence[str]) -> PRMInput | None:
        """Returns the ids of a problem with its steps, or None where they cannot be exact.

        Blanks around a step belong to no layout and are left out.
        """
        problem, steps = problem.strip(), [step.strip() for step in steps]
        if not problem or not steps or not all(steps):
            return None
        if not survives(self.tokenizer, "\n".join([problem, *steps])):
            return None
        layout: Callable = getattr(self, f"_{self.format.name}")
        ids, reads = layout(problem, steps)
        return PRMInput(ids, reads) if len(reads) == len(steps) else None

    def _find_step_ids(self) -> list[int]:
        alone = self._encode(self.format.step_token)
        if self.format.name != "math_shepherd":
            return alone
        # Written behind a space, which a byte-level tokenizer may join to the mark.
        behind = self._encode(f"1 {self.format.step_token}")[len(self._encode("1")) :]
        return alone if behind[-len(alone) :] == alone else behind

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _chat(self, messages: list[dict], *, add_generation_prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _bos(self) -> list[int]:
        bos = self.tokenizer.bos_token_id
        return [] if bos is None else [bos]

    def _qwen_math(self, problem, steps):
        token = self.format.step_token
        messages = [
            {"role": "system", "content": QWEN_SYSTEM},
            {"role": "user", "content": problem},
            {"role": "assistant", "content": token.join(steps) + token},
        ]
        return self._where_step_token(self._encode(self._chat(messages)))

    def _math_shepherd(self, problem, steps):
        token = self.format.step_token
        text = f"{problem} " + "\n".join(f"{step} {token}" for step in steps)
        return self._where_step_token([*self._bos(), *self._encode(text)])

    def _where_step_token(self, ids):
        return ids, [i for i, token in enumerate(ids) if token == self._step_ids[0]]

    def _trl(self, problem, steps):
        return self._pieces([*self._bos(), *self._encode(problem)], steps)

    def _skywork(self, problem, steps):
        return self._pieces([*self._bos(), *self._encode(problem + "\n")], steps)

    def _pieces(self, ids, steps):
        """Each step tokenised by itself, then the separator's tokens; read at their last one."""
        reads = []
        for step in steps:
            ids = [*ids, *self._encode(step), *self._step_ids]
            reads.append(len(ids) - 1)
        return ids, reads

    def _rlhflow(self, problem, steps):
        messages = []
        for step in [f"{problem} {steps[0]}", *steps[1:]]:
            messages.append({"role": "user", "content": step})
            messages.append({"role": "assistant", "content": self.format.step_token})
        ids = self._encode(self._chat(messages))
        marked = [*self._opening, self._step_ids[0]]
        width = len(marked)
        ends = [i for i in range(width, len(ids) + 1) if ids[i - width : i] == marked]
        return ids, [end - 2 for end in ends]


def pad_inputs(
    inputs: Sequence[PRMInput | None], *, width: int, num_steps: int, pad_id: int = 0
) -> dict[str, np.ndarray]:
    """Returns ids, mask [B, width] and score_positions, step_mask [B, num_steps] of `score_steps`.

    A row that is None, longer than `width` or with more than `num_steps` steps stays empty: its
    masks are False throughout, so it is not scored.
    """
    rows = len(inputs)
    out = {
        "ids": np.full((rows, width), pad_id, np.int32),
        "mask": np.zeros((rows, width), bool),
        "score_positions": np.zeros((rows, num_steps), np.int32),
        "step_mask": np.zeros((rows, num_steps), bool),
    }
    for row, item in enumerate(inputs):
        if item is None or len(item.ids) > width or len(item.reads) > num_steps:
            continue
        out["ids"][row, : len(item.ids)] = item.ids
        out["mask"][row, : len(item.ids)] = True
        out["score_positions"][row, : len(item.reads)] = item.reads
        out["step_mask"][row, : len(item.reads)] = True
    return out
