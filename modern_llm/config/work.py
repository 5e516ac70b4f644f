"""What a stage does besides optimizer steps, counted from its settings: tokens that pass through
the model, and steps of writing, a token of every answer of a batch. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from modern_llm.config.schema import PipelineConfig


@dataclass(frozen=True)
class Work:
    """At most so many tokens that a model reads or writes, and decoding steps, one after the other;
    and how often the stage's optimizer steps are taken once more, for a control.
    """

    tokens: int = 0
    steps: int = 0
    trainings: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.steps + other.steps,
                    self.trainings + other.trainings)

    def __mul__(self, times: int) -> Work:
        return Work(self.tokens * times, self.steps * times, self.trainings * times)


def answers(prompts: int, room: int, longest: int, samples: int = 1, rows: int = 256) -> Work:
    """To write `samples` answers to each prompt, each of which is read once.

    Args:
        room: tokens of prompt and answer together, at most.
        longest: tokens of an answer, at most.
        rows: answers written at once.
    """
    count = prompts * samples
    return Work(prompts * max(0, room - longest) + count * longest, -(-count // rows) * longest)


def of_dpo(config: PipelineConfig) -> Work:
    """The answers to held-out prompts, before and after, and the control with its own."""
    dpo, control = config.dpo, config.dpo.trains_control
    once = answers(dpo.max_validation_pairs, config.model.context_length, dpo.max_new_tokens)
    return once * (2 + control) + Work(trainings=int(control))


def of_grpo(config: PipelineConfig) -> Work:
    """The answers of every step, read again for their probabilities; those to held-out problems,
    before and after; the control with its own, whose steps, two thirds more, are counted twice.
    """
    grpo, room = config.grpo, config.model.context_length
    asked = grpo.max_steps * grpo.batch_size // grpo.group_size
    held = (answers(grpo.validation_problems, room, grpo.max_new_tokens)
            + answers(grpo.validation_problems, room, grpo.max_new_tokens, grpo.group_size))
    return (answers(asked, room, grpo.max_new_tokens, grpo.group_size, grpo.batch_size
                    * grpo.steps_per_round)
            + Work(tokens=grpo.max_steps * grpo.batch_size * room)
            + held * (2 + grpo.control) + Work(trainings=2 * int(grpo.control)))


def of_verifier(config: PipelineConfig) -> Work:
    """The generator's own answers, which it learns from and is judged on; the generator trained on
    as control, and its answers, one of them greedy.
    """
    own, room = config.verifier, config.model.context_length
    held, control = ((own.validation_problems, room, own.max_new_tokens), own.trains_control)
    return (answers(own.train_problems, room, own.max_new_tokens, own.samples_per_problem)
            + answers(*held, own.validation_samples)
            + (answers(*held, own.validation_samples) + answers(*held)
               + Work(trainings=1)) * control)
