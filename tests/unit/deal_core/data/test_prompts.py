"""Prompts ask as the task says, fit the model, and only ever lose the end of their text."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from deal_core.data.prompts import (
    MAX_CHARS_PER_TOKEN,
    cut_prompt,
    encode_answer,
    encode_prompt,
    render_prompt,
)
from deal_core.data.schema import TaskSchema
from deal_core.errors import ConfigError
from deal_core.evaluation.generation import answer_limit

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TASK = TaskSchema(name="animals", labels=("a dog", "a cat"), instruction="Which animal is it?\n")


def make_tokenizer(*, begins: bool = False, ends: bool = False, has_bos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer, so that every text comes back from its ids; `begins`, `ends`: tokens it adds itself."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        ["Which animal is it? Option: a dog, a cat Answer: the quick brown fox"] * 3,
        trainers.BpeTrainer(
            vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
        ),
    )
    single = " ".join((["<s>"] if begins else []) + ["$A"] + (["</s>"] if ends else []))
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>" if has_bos else None, eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def chat(*messages: tuple[str, str]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in messages])


COMPLETION, TALK = TaskSchema(name="t", format="completion"), TaskSchema(name="t", format="chat")
ASKED = replace(TASK, prompt="chat")
TEMPLATE = "{{{text}}} {options}? {instruction}:"
ASKED_CHAT = chat(("user", "Hi"), ("assistant", "Yes?"), ("user", "Hi"))


@pytest.mark.parametrize(
    ("task", "text", "prompt"),
    [
        (TASK, "It barks.", "Which animal is it?\nOption: a dog, a cat\nIt barks.\nAnswer:"),
        (TaskSchema(name="t"), "x", "x\nAnswer:"),
        (TaskSchema(name="t", labels=("a", "b")), "x", "Option: a, b\nx\nAnswer:"),
        (replace(TASK, instruction="Say", template=TEMPLATE), "{options}", "{{options}} a dog, a cat? Say:"),
        (COMPLETION, " {as} it\nis ", " {as} it\nis "),
        (replace(COMPLETION, instruction="Answer in verse."), "Why?", "Answer in verse.\nWhy?"),
        (TALK, ASKED_CHAT, "<s><|user|>Hi</s><|assistant|>Yes?</s><|user|>Hi</s><|assistant|>"),
        (replace(TALK, instruction="Be brief."), chat(("user", "Hi")), "<s><|system|>Be brief.</s><|user|>Hi</s>"),
        (
            replace(TALK, instruction="Be brief."),
            chat(("system", "Be rude."), ("user", "Hi")),
            "<s><|system|>Be rude.</s><|user|>Hi</s>",
        ),
        (ASKED, "It barks.", "<s><|user|>Which animal is it?\nOption: a dog, a cat\nIt barks.</s><|assistant|>"),
        (replace(COMPLETION, instruction="In verse.", prompt="chat"), "Why?", "<s><|user|>In verse.\nWhy?</s>"),
        (replace(ASKED, template="{text} {options}? Answer:"), "Hm.", "<s><|user|>Hm. a dog, a cat? Answer:</s>"),
    ],
)
def test_a_prompt_asks_as_the_task_says(
    tokenizer: PreTrainedTokenizerFast, task: TaskSchema, text: str, prompt: str
) -> None:
    if task.uses_chat_template:
        prompt = f"{prompt.removesuffix('<|assistant|>')}<|assistant|>"
    assert render_prompt(task, text, tokenizer) == prompt
    assert tokenizer.decode(encode_prompt(tokenizer, task, text, 200)) == prompt
    begun = encode_prompt(make_tokenizer(begins=True), task, text, 200)
    assert begun[0] == 0 and begun.count(0) == 1, "one beginning"


def test_chat_prompts_without_a_chat_template_are_refused_with_a_remedy() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ConfigError, match=r"has prompt: chat.*instruction-tuned base model, or task.prompt: plain"):
        encode_prompt(bare, ASKED, "It barks.", 99)


def test_answers_of_chat_prompts_have_room_for_the_longest_label(tokenizer: PreTrainedTokenizerFast) -> None:
    """A label after a blank and a label alone may have different numbers of tokens."""
    plain = TaskSchema(name="t", labels=("quick", "brown"))
    limits = []
    for task in (plain, replace(plain, prompt="chat")):
        longest = max(len(encode_answer(tokenizer, task, label, 50)) for label in task.labels)
        assert answer_limit(tokenizer, task, 50) == longest
        limits.append(longest)
    assert limits[0] < limits[1]


_shared_tokenizer = functools.cache(make_tokenizer)
AROUND = {
    "plain": ("Which animal is it?\nOption: a dog, a cat\n", "\nAnswer:"),
    "chat": ("<s><|user|>Which animal is it?\nOption: a dog, a cat\n", "</s><|assistant|>"),
}


@pytest.mark.parametrize("prompt", AROUND)
@settings(max_examples=40)
@given(text=st.text(max_size=160).filter(lambda text: "<" not in text), max_tokens=st.integers(60, 110))
def test_a_prompt_loses_the_end_of_its_text_and_no_more_than_it_must(prompt: Any, text: str, max_tokens: int) -> None:
    tokenizer, (before, after) = _shared_tokenizer(), AROUND[prompt]
    ids, is_cut = cut_prompt(tokenizer, replace(TASK, prompt=prompt), text, max_tokens)
    found = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    kept = found[len(before) : len(found) - len(after)]
    assert len(ids) <= max_tokens
    assert found == before + kept + after
    assert text.startswith(kept)
    assert is_cut == (kept != text)
    if kept != text:
        longer = before + text[: len(kept) + 1] + after
        assert len(tokenizer(longer, add_special_tokens=False)["input_ids"]) > max_tokens


def test_a_prompt_with_no_room_for_any_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"animals takes \d+ tokens without any text.*max_prompt_tokens = 16"):
        encode_prompt(tokenizer, TASK, "It barks." * 20, 16)


TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "chatml with a default system message, as SmolLM2 and Qwen2": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe helpful."
        "<|im_end|>\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "turns in pairs, the system message within the first, as Llama 2 and Mistral": (
        "{% if messages[0]['role'] == 'system' %}{% set told = messages[0]['content'] %}{% set turns = messages[1:] %}"
        "{% else %}{% set told = '' %}{% set turns = messages %}{% endif %}"
        "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (told + '\n\n' if loop.first and told else '') }}"
        "{{ m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "thoughts of earlier turns left out, as Qwen3": (
        "{% set last = namespace(user=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "<|{{ m['role'] }}|>{{ m['content'] if loop.index0 > last.user else m['content'].split('</think>')[-1] }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
}


def cut_turn_by_turn(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], most: int) -> list[int]:
    """The plain way: without its oldest turn, again and again, until the prompt fits; then without the text's end."""

    def encode(messages: list[dict[str, str]]) -> list[int]:
        rendered = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    while len(encode([*system, *turns])) > most:
        later = [index for index, turn in enumerate(turns) if index and turn["role"] == "user"]
        if not later:
            break
        turns = turns[later[0] :]
    *earlier, last = [*system, *turns]
    ends = range(len(last["content"]), -1, -1)
    tried = (encode([*earlier, {**last, "content": last["content"][:end]}]) for end in ends)
    return next(ids for ids in tried if len(ids) <= most)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25)
@given(
    system=st.sampled_from([None, "Be kind."]),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=21).filter(lambda sizes: len(sizes) % 2),
    most=st.integers(100, 300),
)
def test_the_longest_end_of_a_chat_that_fits_is_kept_in_every_template(
    template: str, system: str | None, sizes: list[int], most: int
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[template]
    roles = ["user", "assistant"]
    turns = [(roles[number % 2], f"<think>so {number}</think>" + "no " * size) for number, size in enumerate(sizes)]
    asked = chat(*([("system", system)] if system else []), *turns)
    cut = cut_prompt(tokenizer, TALK, asked, most)
    assert cut.ids == cut_turn_by_turn(tokenizer, json.loads(asked), most)
    assert cut.is_cut == (cut.ids != cut_turn_by_turn(tokenizer, json.loads(asked), 10_000))


def test_of_a_very_long_text_only_what_can_fit_is_tokenised(tokenizer: PreTrainedTokenizerFast) -> None:
    seen: list[int] = []

    class Counting:
        chat_template = tokenizer.chat_template
        eos_token_id, eos_token, bos_token_id = tokenizer.eos_token_id, tokenizer.eos_token, tokenizer.bos_token_id
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text: str, **options: Any) -> Any:
            seen.append(len(text))
            return tokenizer(text, **options)

    long = "a quick dog " * 50_000
    for task, asked in (
        (TASK, long),
        (TALK, chat(("user", long))),
        (TALK, chat(("user", long), ("assistant", "Yes?"), ("user", "Go on."))),
        (TALK, chat(("user", "Go on."), ("assistant", long), ("user", long))),
        (TALK, chat(*[(("user", "assistant")[number % 2], f"message {number}") for number in range(9_999)])),
    ):
        seen.clear()
        cut = cut_prompt(Counting(), task, asked, 100)  # type: ignore[arg-type]
        assert cut.is_cut and len(cut.ids) <= 100
        assert sum(seen) < 4 * MAX_CHARS_PER_TOKEN * 100 < len(long)


def test_an_answer_is_a_blank_the_label_and_the_end(tokenizer: PreTrainedTokenizerFast) -> None:
    for one in (tokenizer, make_tokenizer(begins=True, ends=True)):
        ids = encode_answer(one, TASK, "a dog", 50)
        assert one.decode(ids) == " a dog</s>"
        assert ids.count(1) == 1 == len([i for i in ids if i < 2])
    for task, answer in ((ASKED, "a dog"), (COMPLETION, "\n  code"), (TALK, "Yes")):
        assert tokenizer.decode(encode_answer(tokenizer, task, answer, 50)) == f"{answer}</s>", "without a blank"


def test_a_long_answer_loses_its_end_and_keeps_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = encode_answer(tokenizer, TASK, "zyxwvutsrq", 50)
    assert encode_answer(tokenizer, TASK, "zyxwvutsrq", 5) == [*whole[:4], 1]
    assert encode_answer(tokenizer, TASK, "zyxwvutsrq", len(whole)) == whole


@pytest.mark.parametrize(
    ("begins", "ends", "has_bos", "first_is_bos", "last_is_eos"),
    [
        (False, False, True, False, False),  # SmolLM2
        (True, False, True, True, False),  # Llama
        (True, True, True, True, False),  # Llama set to add an end, which a prompt must not have
        (False, True, False, False, True),  # T5
    ],
)
def test_special_tokens_are_those_of_the_models_kind(
    begins: bool, ends: bool, has_bos: bool, first_is_bos: bool, last_is_eos: bool
) -> None:
    ids = encode_prompt(make_tokenizer(begins=begins, ends=ends, has_bos=has_bos), TASK, "It barks.", 200)
    assert (ids[0] == 0, ids[-1] == 1) == (first_is_bos, last_is_eos)


def test_a_prompt_that_ends_with_the_end_token_by_itself_keeps_it(tokenizer: PreTrainedTokenizerFast) -> None:
    assert encode_prompt(tokenizer, COMPLETION, "turn</s>", 50)[-1] == 1


# --- chats with tools

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}<tool>{{ tool.function.name }}</tool>{% endfor %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.name }}{{ call.function.arguments | tojson }}</call>"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
TOOL_CHAT = [
    {"role": "user", "content": "Sum?", "tools": [{"type": "function", "function": {"name": "add"}}]},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "2"},
]
BRIEF = replace(TALK, instruction="Be brief.")


def test_a_chat_with_tools_is_the_tokenizers_own_and_the_tools_stay_when_old_turns_are_cut() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    asked = '<tool>add</tool><|system|>Be brief.<|user|>Sum?<|assistant|><call>add{"a": 1}</call><|tool|>2<|assistant|>'
    assert render_prompt(BRIEF, json.dumps(TOOL_CHAT), tokenizer) == asked
    later = [{"role": "assistant", "content": "Two."}, {"role": "user", "content": "Thanks"}]
    whole = encode_prompt(tokenizer, BRIEF, json.dumps([*TOOL_CHAT, *later]), 500)
    cut = cut_prompt(tokenizer, BRIEF, json.dumps([*TOOL_CHAT, *later]), len(whole) - 1)
    assert cut.is_cut
    assert tokenizer.decode(cut.ids) == "<tool>add</tool><|system|>Be brief.<|user|>Thanks<|assistant|>"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ((" in m.tool_calls or []", " in []"), "leaves out the tool calls"),
        (("{{ m.content }}", "{{ m.content if m.role != 'tool' }}"), "leaves out the tool messages"),
        ((" in tools or []", " in []"), "leaves out the tools"),
        (("{{ m.content }}", "{{ raise_exception('no tools here') }}"), "cannot write a chat.*no tools here"),
    ],
)
def test_a_template_that_hides_the_tools_is_refused(change: tuple[str, str], found: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE.replace(*change)
    without_tools = [{"role": "user", "content": "Sum?"}, *TOOL_CHAT[1:]]
    without_calls = [TOOL_CHAT[0], *TOOL_CHAT[2:]]
    with pytest.raises(ConfigError, match=found):
        render_prompt(BRIEF, json.dumps(without_tools if "calls" in found else without_calls), tokenizer)
