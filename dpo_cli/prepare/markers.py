"""Marks that models and chat templates leave in texts: thoughts, special tokens, turns in another template."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from dpo_cli.families import QWEN
from dpo_cli.records import Message

# How models mark what they think before they answer. Case and spaces inside of a tag play no part.
_TAGS = (
    r"(?:seed:)?think(?:ing)?|(?:inner[ _-])?(?:thoughts?|monologue)|reasoning|scratchpad|cot|chain[ _-]of[ _-]thought"
)
_OPENS = rf"<\s*(?:{_TAGS})\s*>|<\|begin_of_thought\|>|(?-i:\[THINK\])|◁think▷"
_CLOSES = rf"<\s*/\s*(?:{_TAGS})\s*>|<\|end_of_thought\|>|(?-i:\[/THINK\])|◁/think▷"
_THOUGHT_TAG = re.compile(f"{_OPENS}|{_CLOSES}", re.IGNORECASE)
_THINK_BLOCK = re.compile(rf"\s*(?:{_OPENS})((?:(?!{_OPENS}|{_CLOSES}).)*)(?:{_CLOSES})\s*", re.DOTALL | re.IGNORECASE)
_SOLUTION = re.compile(  # behind a thought
    r"\s*(?:<\|begin_of_solution\|>\s*(.*?)\s*<\|end_of_solution\|>|<answer>\s*((?:(?!</?answer>).)*?)\s*</answer>)\s*",
    re.DOTALL | re.IGNORECASE,
)


def without_thoughts(text: str, thinking: bool) -> str | None:
    """Cut closed blocks of thought at the start, or with `thinking` make them one <think> block.

    None where any other tag of that kind is left: thought and answer can't be separated.
    """
    if not any(map(text.__contains__, "<[◁")) or not _THOUGHT_TAG.search(text):
        return text
    thoughts, end = [], 0
    while block := _THINK_BLOCK.match(text, end):
        thoughts.append(block[1].strip())
        end = block.end()
    rest = text[end:]
    if _THOUGHT_TAG.search(rest):
        return None
    solution = _SOLUTION.fullmatch(rest)
    rest = next(filter(None, solution.groups()), "") if solution else rest
    if not thinking:
        return rest
    as_qwen = len(thoughts) == 1 and not solution and text.lstrip().startswith("<think>") and "</think>" in text
    joined = "\n\n".join(filter(None, thoughts))
    return text if as_qwen else f"<think>\n{joined}\n</think>\n\n{rest}"


def special_tokens(tokens: Iterable[str]) -> re.Pattern[str]:
    """What finds the special tokens of a tokenizer in a text; Qwen3's own are among them, tags of thinking are not."""
    marked = {token for token in tokens if re.fullmatch(r"[<\[{|].+[>\]}|]", token)}  # a pad token may be a plain word
    marked -= {token for token in marked if _THOUGHT_TAG.fullmatch(token)}
    return re.compile("|".join(map(re.escape, sorted({*marked, *QWEN}))))


# What ends a turn in the templates of other models, and the name of the next speaker, where answers were cut too late.
_ENDS = re.compile(
    r"(?:\s*(?:<[|｜]im_start[|｜]>(?:user|assistant|system)?|<start_of_turn>(?:user|model)?"
    r"|<[|｜](?!vision|image|video|object|box|quad)/?[\w▁]+[|｜]>|&lt;(?:/?s|eos|\|\w+\|)&gt;"
    r"|</?s>|<eo[acdhmstu]>|<pad>|<unk>|<end>|<end_of_turn>|<end_of_utterance>|<reserved_\d+>|<turn\|>"
    r"|\[(?:EOS|END|PAD|SEP)\]"
    r"|\n[ \t]*(?:#+ *)?(?:Human|User|Assistant|人类|用户|助手) *[:：]|\n### (?:Instruction|Response|Input):?))+\s*$",
    re.IGNORECASE,
)
_END_CHARACTERS = (
    ">", "&gt;", "]", ":", "：", "### Instruction", "### Response", "### Input", "im_start|>user",
    "im_start|>assistant", "im_start|>system", "_turn>user", "_turn>model",
)  # fmt: skip
# What opens an answer in the templates of other models, and what a prompt that was rendered by one ends in.
_STARTS = re.compile(
    r"(?:\s*(?:<s>|<bos>|<[|｜](?:begin[_▁]of[_▁]\w+|startoftext|assistant)[|｜]>))+\s*", re.IGNORECASE
)
_RENDERED = (
    "[/INST]", "\nAssistant:", "ASSISTANT:", "助手：", "### Response:", "### Response", "### Assistant:",
    "<start_of_turn>model", "<|assistant|>", "<|end_header_id|>", "<｜Assistant｜>", "<|im_start|>assistant",
)  # fmt: skip
_MARKS = ("<", "INST]", "Human", "Assistant", "USER", "ASSISTANT", "### ", "人类", "助手")  # one is in every match of:
_LEAKED = re.compile(
    r"<[|｜]/?[\w▁]+[|｜]>|<eo[acdhmstu]>|<(?:start|end)_of_turn>|<extra_id_\d+>|\[/?INST\]|<</?SYS>>"
    r"|<(?:tool|function)_calls?>\s*[{\[]"
    r"|^[ \t]*(?:#+ *)?(?:Human|Assistant|USER|ASSISTANT|人类|助手) *[:：]|^### (?:Instruction|Response|Input):?\s*$",
    re.MULTILINE,
)


def without_markers(text: str, prompt: Sequence[Message], special: re.Pattern[str]) -> str | None:
    """Cut a start token, and an end token or a bare next turn at the end.

    None where such markers are inside; or special tokens in the prompt, which the tokenizer would obey; or where the
    prompt is in another model's template.
    """
    if any(special.search(turn["content"]) for turn in prompt):
        return None
    if prompt[-1]["content"].rstrip().endswith(_RENDERED):
        return None
    bare = text.rstrip()
    start = _STARTS.match(text) if "<" in text[:9] else None
    if start and bare.find("</s>") in (-1, len(bare) - len("</s>")):  # else it is a word struck out in HTML
        text = text[start.end() :]
        bare = text.rstrip()
    if bare.endswith(_END_CHARACTERS):
        found = _ENDS.search(bare)
        struck = found and (("</s>" in found[0] and "<s>" in text) or "&lt;s&gt;" in text)  # out: a word in HTML
        if found and not struck:
            text = bare[: found.start()]
    if special.search(text) or ("</s>" in text and "<s>" not in text):
        return None
    return None if any(map(text.__contains__, _MARKS)) and _LEAKED.search(text) else text
