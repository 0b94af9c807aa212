"""Step labels by Monte-Carlo rollouts: a step is right while the policy still reaches the answer.

Math-Shepherd's automatic annotation (https://arxiv.org/abs/2312.08935): from every prefix of a
solution the policy samples `tries` continuations; the step that ends the prefix is labelled correct
if any of them is verified. The whole solution is its own verdict on its last step.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scope_jax.data import render_prompt, tokenize_prompts
from scope_jax.models.hf import load_hf, load_tokenizer
from scope_jax.records import InputError
from scope_jax.rewards import score_completions, verify
from scope_jax.sampling import continue_from, decoding_layout, generate
from scope_jax.steps import segment_steps, step_texts
from scope_jax.stopping import row_ends
from scope_jax.tasks.math_problems import read_problems


def success_rates(
    completion_ids,
    rewards,
    step_ends,
    step_mask,
    continue_fn: Callable,
    solved_fn: Callable,
    *,
    tries: int,
    rows: int,
) -> np.ndarray:
    """Returns [B, S] float32, how often a continuation of steps 0 .. k inclusive is right.

    Args:
      completion_ids: [B, T] of finished completions, on the host; rewards: [B], 1 = right.
      step_ends, step_mask: [B, S].
      continue_fn: (row index [rows], prefix_length [rows], call number) -> (ids [rows, U],
        mask [rows, U]); continuations of the rollouts' own tokens. A prefix_length of 0 is filling.
      solved_fn: (row index [n], list of n completions' ids) -> [n] bool.
      tries: continuations per step.
      rows: continuations in one call; static, so that one program serves all.
    """
    rates = np.zeros(step_ends.shape, np.float32)
    last = step_mask.sum(1) - 1
    whole = np.flatnonzero(step_mask.any(1))
    rates[whole, last[whole]] = np.asarray(rewards, np.float32)[whole]
    cuts = [(i, k) for i in whole for k in range(last[i]) for _ in range(tries)]
    for call, start in enumerate(range(0, len(cuts), rows)):
        part = cuts[start : start + rows]
        index, prefix = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        index[: len(part)] = [i for i, _ in part]
        prefix[: len(part)] = [step_ends[i, k] for i, k in part]
        ids, mask = continue_fn(index, prefix, call)
        completions = [
            [*completion_ids[i, : prefix[n]].tolist(), *ids[n][mask[n]].tolist()]
            for n, (i, _) in enumerate(part)
        ]
        solved = solved_fn(index[: len(part)], completions)
        for (i, k), right in zip(part, solved, strict=True):
            rates[i, k] += right / tries
    return rates


class Labeller(NamedTuple):
    """A policy that writes solutions, continues them from every step, and so labels them."""

    model: Any
    params: Any
    tokenizer: Any
    sampling: dict[str, Any]  # eos_ids, stop_table, pad_id of `generate`
    samples: int  # solutions per problem
    tries: int  # continuations per step
    max_new_tokens: int  # of a solution
    splitter: str
    rows: int  # continuations in one call
    reward_fn: Callable[[str, str], float] = verify  # (gold, completion); 1 = solved

    def label(self, prompts, records, real: int, key) -> list[dict]:
        """Returns rows {"prompt", "completions", "labels", "success"} of a batch of problems.

        Args:
          prompts: `Prompts` of the records; only the first `real` of them are no filling.
        """
        rollouts = jax.device_get(
            generate(
                self.model, self.params, prompts.ids, prompts.mask, key, group_size=self.samples,
                max_new_tokens=self.max_new_tokens, **self.sampling,
            )
        )  # fmt: skip
        of_row = [record for record in records for _ in range(self.samples)]
        ids, mask = rollouts.completion_ids, rollouts.completion_mask

        def solved(index, completions):
            texts = [self.tokenizer.decode(c, skip_special_tokens=True) for c in completions]
            golds = [of_row[i]["gold"] for i in index]
            return np.asarray(score_completions(self.reward_fn, golds, texts)) >= 1

        def continue_fn(index, prefix, call):
            budgets = np.where(prefix > 0, self.max_new_tokens - prefix, 0)
            written = continue_from(
                self.model, self.params, rollouts.prompt_ids[index], rollouts.prompt_mask[index],
                ids[index], prefix, jax.random.fold_in(key, call), max_new_tokens=budgets,
                buffer_length=self.max_new_tokens, **self.sampling,
            )  # fmt: skip
            return jax.device_get((written.completion_ids, written.completion_mask))

        ends, step_mask = segment_steps(self.tokenizer, ids, mask, self.splitter)
        whole = rollouts.finished & (np.arange(len(of_row)) < real * self.samples)
        texts = step_texts(self.tokenizer, ids, mask, ends, step_mask)
        whole &= [bool(steps) and all(step.strip() for step in steps) for steps in texts]
        step_mask &= whole[:, None]
        completions = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        rewards = solved(range(len(of_row)), completions)
        rates = success_rates(
            ids,
            rewards,
            ends,
            step_mask,
            continue_fn,
            solved,
            tries=self.tries,
            rows=self.rows,
        )
        return [
            {
                "prompt": of_row[i]["problem"],
                "completions": [step.strip() for step in texts[i] or []],
                "labels": [bool(rate > 0) for rate in rates[i][step_mask[i]]],
                "success": [round(float(rate), 4) for rate in rates[i][step_mask[i]]],
            }
            for i in np.flatnonzero(whole)
        ]


def label_problems(
    policy,
    data,
    out: pathlib.Path,
    *,
    problems: int,
    seed: int,
    prompt_length: int = 512,
    say: Callable[[str], None] = print,
    rows: int = 16,
    stop: Sequence[str] = (),
    **labelling,
) -> None:
    """Writes the policy's own solutions of problems with Monte-Carlo labels, in TRL's layout.

    Args:
      policy: directory of the model that writes and continues; its chat template is used if it has
        one.
      data: file of {"question", "answer"} or {"problem", "answer"} lines.
      out: JSON lines; appears only when it is whole.
      problems: how many of them; seed: of all samples.
      prompt_length: bucket of the prompts, in tokens.
      stop: strings that end a solution beside the end token.
      rows, labelling: `Labeller`'s samples, tries, max_new_tokens, splitter, reward_fn.
    Raises:
      InputError: bad data; or no solution that finished, so nothing to label.
    """
    records = read_problems(data)[:problems]
    tokenizer, eos_ids = load_tokenizer(policy)
    model, params = decoding_layout(*load_hf(policy))
    ends = row_ends(tokenizer, eos_ids, stop, model.config.vocab_size)
    ends["stop_table"] = jax.device_put(ends["stop_table"])
    labeller = Labeller(model, params, tokenizer, ends, rows=rows, **labelling)
    render = functools.partial(
        render_prompt, tokenizer, template="{problem}", chat=bool(tokenizer.chat_template)
    )
    key, began, written = jax.random.key(seed), time.perf_counter(), []
    group = max(1, rows // labeller.samples)
    for start in range(0, len(records), group):
        chosen = [records[min(i, len(records) - 1)] for i in range(start, start + group)]
        real = min(group, len(records) - start)  # the last batch is filled up
        prompts = tokenize_prompts(
            chosen, tokenizer=tokenizer, render=render, max_prompt_length=prompt_length,
            pad_id=ends["pad_id"],
        )  # fmt: skip
        written += labeller.label(prompts, chosen, real, jax.random.fold_in(key, start))
        seconds = time.perf_counter() - began
        done = f"{start + real:5}/{len(records)} problems"
        say(f"labels    {done}, {len(written)} solutions, {seconds:.0f}s")
    if not written:
        raise InputError(
            f"{policy} finished no solution of {data} within {labeller.max_new_tokens} tokens: "
            "nothing to label; raise --max-new-tokens"
        )
    partial = out.with_suffix(".partial")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in written]
    partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(out)
