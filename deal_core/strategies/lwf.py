"""LwF: on the new rows the model is held to the answers its parent gave (arXiv 1606.09282)."""

from __future__ import annotations

from peft import PeftModel

from deal_core.strategies.rehearsal import Question, Rehearsal, ask
from deal_core.strategies.strategy import MethodState, Strategy, TaskContext


class Lwf(Strategy):
    """SeqLoRA with T²·KL(parent ‖ model) on new rows, a few of them a step, at the positions of their answers."""

    name = "lwf"
    reads = ("rivals.lwf_weight", "rivals.lwf_temperature", "rehearsal.rows_per_step")

    def prepare(self, model: PeftModel, state: MethodState | None, context: TaskContext) -> None:
        """Ask the parent about the new task's rows."""
        super().prepare(model, state, context)
        self._rehearsal: Rehearsal | None = None
        if state is None:
            return
        rivals, rehearsal = self.config.rivals, self.config.rehearsal
        rows = [Question(row["prompt_ids"], row["answer_ids"]) for row in context.encoded]
        questions = ask(model, context.collator(), rows, temperature=rivals.lwf_temperature)
        self._rehearsal = Rehearsal(
            [[questions]], context.collator(), num_rows=rehearsal.rows_per_step, weight=rivals.lwf_weight,
            temperature=rivals.lwf_temperature, seed=self.seed,
        )  # fmt: skip

    def rehearsal(self) -> Rehearsal | None:
        """Return the parent's answers on the new rows."""
        return self._rehearsal
