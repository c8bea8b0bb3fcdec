"""The token mask: improbable tokens carry no loss, the input stays, and a run keeps its mask."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from deal_core.adapter.state import adapter_on, attach_adapter, load_method_state
from deal_core.config import AdapterConfig, TrainConfig
from deal_core.data.collate import LOSS_MASK, AnswerCollator, answer_loss, encode_rows
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation import likelihood as measure_module
from deal_core.method_config import MethodConfig, RehearsalConfig, TokenMaskConfig
from deal_core.strategies.strategy import TaskContext
from deal_core.training.token_mask import MASK_FILE, counted_tokens, mask_tokens
from deal_core.training.train import TrainingSetup

TASK = TaskSchema(name="stories", format="completion", instruction="Continue the text.")
SHORT = TrainConfig(
    max_steps=4, batch_size=8, learning_rate=5e-3, schedule="constant", balance_labels=False, max_prompt_tokens=64,
    max_answer_tokens=20, group_by_length=False, checkpoint_steps=2,
)  # fmt: skip
HALF, ALL = TokenMaskConfig(share=0.5), TokenMaskConfig(share=1.0, keep_end=False)
STORY = ("the", "sea", "is", "blue", "and", "moss", "is", "green", "while", "a", "rose", "is", "red")


def stories(num_rows: int, first: int = 0) -> Dataset:
    """Rows whose answers differ in length."""
    rows = [
        {"input": f"story {i} " + "and more " * (i % 3), "output": " ".join(STORY[i % 5 : i % 5 + 2 + i % 7])}
        for i in range(first, first + num_rows)
    ]
    return Dataset.from_list(rows)


def setup_of(mask: TokenMaskConfig, *, task: TaskSchema = TASK, train: TrainConfig = SHORT) -> TrainingSetup:
    return TrainingSetup(
        task=task, strategy="seq_lora", adapter=AdapterConfig(rank=4), method=MethodConfig(token_mask=mask), train=train
    )


@pytest.fixture
def mask(base, parent, tmp_path):
    """Mask tokens of stories with the parent."""

    def run(config: TokenMaskConfig, *, rows: Dataset | None = None, parent=parent, lend=lambda: base, **changes):
        return mask_tokens(
            stories(10) if rows is None else rows, setup_of(config, **changes), lend, parent_folder=parent,
            file=tmp_path / MASK_FILE,
        )  # fmt: skip

    return run


@pytest.fixture
def learn(train, mask, parent):
    """Train on masked stories."""

    def run(config: TokenMaskConfig, strategy: str = "seq_lora", train_config: TrainConfig = SHORT, **changes):
        rows = mask(config, train=train_config).rows if config.is_on else stories(10)
        return train(strategy, parent, rows=rows, task=TASK, train=train_config, token_mask=config, **changes)

    return run


def refuse():
    raise AssertionError("the base model was asked for")


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def by_hand(model, base, rows: Dataset) -> list[torch.Tensor]:
    """The loss of every answer token, row by row."""
    encoded = encode_rows(rows, base.tokenizer, TASK, max_prompt_tokens=64, max_answer_tokens=20)
    found = []
    for row in encoded:
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        with torch.no_grad():
            losses_T = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        found.append(losses_T[-len(row["answer_ids"]) :])
    return found


# which tokens


@pytest.mark.parametrize("share", [1e-9, 0.07, 0.24, 0.5, 0.7])
@pytest.mark.parametrize("choose", ["high", "random"])
def test_a_share_masks_as_many_tokens_and_no_end_token(share, choose):
    losses_T = torch.rand(97, generator=torch.Generator().manual_seed(0)).double() * 9
    is_end_T = torch.arange(97) % 5 == 4
    losses_T[is_end_T] += 10  # the ends are the most surprising tokens
    config = TokenMaskConfig(share=share, choose=choose)
    counts_T = counted_tokens(losses_T, is_end_T, config, torch.Generator().manual_seed(1))
    assert share - 1 / 97 < float((~counts_T).double().mean()) <= share and counts_T[is_end_T].all()
    others_T = ~is_end_T & counts_T
    if choose == "high" and (~counts_T).any():
        assert losses_T[~counts_T].min() > losses_T[others_T].max()
    elif (~counts_T).sum() > 5:
        assert losses_T[~counts_T].min() < losses_T[others_T].max(), "drawn at random"


def test_a_bound_masks_the_tokens_above_it_and_random_masks_as_many():
    losses_T = torch.tensor([0.1, 0.9, 1.0, 3.0, 5.0, 0.2, 9.0]).double()
    is_end_T = torch.tensor([False] * 6 + [True])
    bound = TokenMaskConfig(max_perplexity=2.5)  # exp(0.916)
    counts_T = counted_tokens(losses_T, is_end_T, bound, torch.Generator())
    assert counts_T.tolist() == [True, True, False, False, False, True, True]
    without_end = counted_tokens(losses_T, is_end_T, replace(bound, keep_end=False), torch.Generator())
    assert without_end.tolist() == [True, True, False, False, False, True, False]
    drawn = [
        counted_tokens(losses_T, is_end_T, replace(bound, choose="random"), torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1, 2, 3)
    ]
    assert all(int((~each).sum()) == 3 and each[6] for each in drawn)
    assert drawn[0].tolist() == drawn[1].tolist() and len({tuple(each.tolist()) for each in drawn}) > 1


@pytest.mark.parametrize("reader", ["parent", "base"])
def test_the_parent_or_else_the_base_says_which_tokens(mask, base, parent, reader, monkeypatch):
    monkeypatch.setattr(measure_module, "CHUNK_ROWS", 4)
    folder = parent if reader == "parent" else None
    with adapter_on(base.model, folder) as model:
        losses = by_hand(model, base, stories(10))
    flat = torch.cat([each[:-1] for each in losses]).sort().values
    bound = float(flat[len(flat) // 3 : len(flat) // 3 + 2].mean().exp())  # between two tokens
    found = mask(TokenMaskConfig(max_perplexity=bound), parent=folder)
    expected = [[*(each[:-1] <= math.log(bound)).tolist(), True] for each in losses]
    assert list(found.rows[LOSS_MASK]) == expected
    num_masked, total = len(flat) - len(flat) // 3 - 1, len(flat) + 10
    name = "the parent version" if reader == "parent" else "the base model"
    assert found.note == (
        f"{num_masked} of {total} answer tokens ({num_masked / total:.1%}) carry no loss: {name} finds them a "
        f"perplexity above {bound:g}"
    )
    assert found.rows.select_columns(["input", "output"]).to_list() == stories(10).to_list()


def test_the_reader_differs(mask):
    """Otherwise the test above could not tell the parent from the base."""
    assert mask(HALF).rows[LOSS_MASK] != mask(HALF, parent=None).rows[LOSS_MASK]


# the loss


@pytest.mark.parametrize("shares_prefix", [False, True])
def test_loss_and_gradient_are_those_without_the_masked_tokens(mask, base, shares_prefix):
    rows = mask(HALF).rows
    encoded = encode_rows(stories(10), base.tokenizer, TASK, max_prompt_tokens=64, max_answer_tokens=20)
    model = attach_adapter(base.model, AdapterConfig(rank=4), seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = AnswerCollator(base.tokenizer, is_seq2seq=False, shares_prefix=shares_prefix)
    masking = AnswerCollator(base.tokenizer, is_seq2seq=False, shares_prefix=shares_prefix, masks_answers=True)
    batch = masking(list(encoded.add_column(LOSS_MASK, list(rows[LOSS_MASK]))))
    for name, value in plain(list(encoded)).items():
        assert torch.equal(batch[name], value), "the input stays as it is"
    loss = answer_loss(model, batch)
    expected = torch.zeros(())
    for row, counts in zip(encoded, rows[LOSS_MASK], strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["answer_ids"]])
        losses_T = cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")[-len(counts) :]
        expected = expected + losses_T[torch.tensor(counts)].sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(
        torch.autograd.grad(loss, trained), torch.autograd.grad(expected, trained), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert loss < answer_loss(model, plain(list(encoded)))
    model.unload()


def test_the_first_steps_loss_is_the_mean_over_the_tokens_that_count(mask, base, parent, learn):
    batch = replace(SHORT, batch_size=10, max_steps=1)
    run = learn(HALF, train_config=batch)
    counts = torch.tensor([each for row in mask(HALF, train=batch, lend=refuse).rows[LOSS_MASK] for each in row])
    with adapter_on(base.model, parent) as model:
        losses_T = torch.cat(by_hand(model, base, stories(10)))
    assert run.losses == [pytest.approx(float(losses_T[counts].mean()), rel=1e-4)]
    assert float(losses_T[~counts].mean()) > run.losses[0] + 1


@pytest.mark.parametrize("strategy", ["seq_lora", "deal"])
def test_a_mask_without_a_token_changes_no_bit(learn, strategy):
    off, idle = (learn(config, strategy) for config in (TokenMaskConfig(), TokenMaskConfig(max_perplexity=1e300)))
    masked = learn(HALF, strategy)
    assert off.losses == idle.losses != masked.losses
    for name, value in weights(off.folder).items():
        assert torch.equal(weights(idle.folder)[name], value)


def test_micro_batches_equal_one_large_batch(learn):
    whole = learn(HALF, "deal", train_config=SHORT)
    split = learn(HALF, "deal", train_config=replace(SHORT, batch_size=2, gradient_accumulation_steps=4))
    assert whole.losses == pytest.approx(split.losses, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_a_batch_without_a_token_that_counts_has_no_loss(learn, parent, weight):
    run = learn(ALL, train_config=replace(SHORT, prompt_loss_weight=weight))
    if weight:
        assert all(0 < loss < math.inf for loss in run.losses)
    else:
        assert run.losses == [0.0] * 4
        assert all(torch.equal(value, weights(parent)[name]) for name, value in weights(run.folder).items())


def test_what_other_parts_of_a_training_read_is_not_masked(learn, base, parent, mask):
    kept = RehearsalConfig(texts="stored", stored_share=1.0)
    off, masked = (learn(config, "deal", rehearsal=kept) for config in (TokenMaskConfig(), HALF))
    stored = [load_method_state(run.folder).stored_rows for run in (off, masked)]
    assert stored[0].keys() == stored[1].keys() and stored[0]
    assert all(torch.equal(stored[1][name], value) for name, value in stored[0].items())
    fisher = load_method_state(learn(ALL, "ewc").folder).tensors
    assert max(float(value.abs().max()) for value in fisher.values()) > 0
    encoded = encode_rows(stories(3), base.tokenizer, TASK, max_prompt_tokens=64, max_answer_tokens=20)
    context = TaskContext(
        base=base, task=TASK, rows=stories(3), encoded=encoded, old_tasks=(), adapter=AdapterConfig(), train=SHORT
    )
    batch = context.collator()(list(encoded.add_column(LOSS_MASK, [[False] * len(a) for a in encoded["answer_ids"]])))
    assert "counted_labels" not in batch


# the run


def test_a_second_call_reads_the_file_and_another_run_does_not(mask, tmp_path):
    first = mask(HALF)
    file = tmp_path / MASK_FILE
    assert not list(tmp_path.glob("*.part"))
    again = mask(HALF, lend=refuse)
    assert again.note == first.note and list(again.rows[LOSS_MASK]) == list(first.rows[LOSS_MASK])
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file(tensors | {"counts": torch.ones_like(tensors["counts"])}, file, metadata)
    assert all(all(each) for each in mask(HALF, lend=refuse).rows[LOSS_MASK]), "the file counts"
    for change in (
        {"config": TokenMaskConfig(share=0.4)}, {"rows": stories(10, first=1)}, {"parent": None},
        {"train": replace(SHORT, max_answer_tokens=5)},
    ):  # fmt: skip
        with pytest.raises(AssertionError, match="was asked for"):
            mask(**{"config": HALF, **change}, lend=refuse)


def test_a_resumed_run_has_the_losses_of_one_that_did_not_stop(learn, tmp_path):
    def die(step: int, _: object) -> None:
        if step == 3:
            raise InterruptedError

    whole = learn(HALF, "deal")
    folders = {"output_folder": tmp_path / "a", "checkpoint_folder": tmp_path / "c"}
    with pytest.raises(InterruptedError):
        learn(HALF, "deal", on_log=die, **folders)
    resumed = learn(HALF, "deal", **folders)
    assert resumed.result.resumed_from_step == 2 and resumed.losses == whole.losses


def test_a_mask_of_chosen_rows_takes_its_share_of_them(mask):
    chosen = stories(10).select([1, 4, 7])
    masks = [each for row in mask(HALF, rows=chosen).rows[LOSS_MASK] for each in row]
    assert masks.count(False) == len(masks) // 2


def test_a_task_with_labels_is_refused_before_a_model_is_read(mask, task):
    with pytest.raises(ConfigError, match=r"several sentences; the labels of task 'colours' are what it would mask"):
        mask(HALF, task=task, lend=refuse)


def test_rows_without_their_mask_are_refused(train, mask):
    longer = replace(SHORT, max_answer_tokens=3)
    for rows in (stories(10), mask(HALF).rows):
        with pytest.raises(ConfigError, match="no column loss_mask that fits"):
            train("seq_lora", rows=rows, task=TASK, train=longer, token_mask=HALF)


@pytest.mark.parametrize(("values", "message"), [
    ({"share": 0.2, "max_perplexity": 2.5}, r"max_perplexity is 2.5 and token_mask.share is 0.2; give only one"),
    ({"keep_end": False}, "token_mask.keep_end would do nothing"), ({"choose": "random"}, "choose would do nothing"),
    ({"share": 0.0}, "share is 0.0; give more than 0"), ({"share": 1.5}, "share is 1.5"),
    ({"max_perplexity": 0.5}, "max_perplexity is 0.5; give at least 1"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        TokenMaskConfig(**values)
    assert not TokenMaskConfig().is_on and HALF.is_on
