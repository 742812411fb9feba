"""What report.html says in the language of `eval.report_language`: headings, the verdict, a sentence for each group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_cli.recipe.sections import Eval

WORDS: dict[str, dict[str, str]] = {
    # the verdict
    "better": {"en": "Better", "zh": "变好了"},
    "better_means": {
        "en": "The model learned the preference, and its text stayed intact.",
        "zh": "模型学到了偏好，文本质量没有受损。",
    },
    "learned_at_a_price": {"en": "Learned, at a price", "zh": "学到了，但有代价"},
    "learned_at_a_price_means": {
        "en": "The model learned the preference, but something else got worse.",
        "zh": "模型学到了偏好，但其他方面变差了。",
    },
    "worse": {"en": "Worse", "zh": "变差了"},
    "worse_means": {
        "en": "The tuned model is worse than the one it started from.",
        "zh": "微调后的模型不如微调前的模型。",
    },
    "not_learned": {"en": "Not learned", "zh": "没有学到"},
    "not_learned_means": {
        "en": "The model learned nothing that chance or the length of the answers would not explain.",
        "zh": "模型没有学到随机性或回答长度之外的偏好。",
    },
    "too_little_to_tell": {"en": "Too little to tell", "zh": "证据不足"},
    "too_little_to_tell_means": {
        "en": "What was measured is too little to say whether the model got better.",
        "zh": "现有的测量不足以判断模型是否变好。",
    },
    # the facts below it
    "run": {"en": "Run", "zh": "运行"},
    "model": {"en": "Model", "zh": "模型"},
    "method": {"en": "Method", "zh": "方法"},
    "rows": {"en": "Data", "zh": "数据"},
    "rows_are": {"en": "{train} trained on, {eval} held out", "zh": "训练 {train} 条，留出 {eval} 条"},
    "date": {"en": "Date", "zh": "日期"},
    "device": {"en": "Device", "zh": "设备"},
    "duration": {"en": "Training took", "zh": "训练用时"},
    "warnings": {"en": "Warnings", "zh": "警告"},
    # headings
    "answers": {"en": "Answers side by side", "zh": "回答对照"},
    "pairs": {"en": "Held-out pairs", "zh": "留出的偏好对"},
    "sets": {"en": "Other test sets", "zh": "其他测试集"},
    "samples": {"en": "Sampled answers", "zh": "采样的回答"},
    "judge": {"en": "Judge", "zh": "评审"},
    "accuracy": {"en": "Reward accuracy", "zh": "奖励准确率"},
    "learned": {"en": "Held-out answers", "zh": "留出的回答"},
    "margins": {"en": "Margins and training", "zh": "奖励间隔与训练过程"},
    "training": {"en": "Training", "zh": "训练过程"},
    "languages": {"en": "By language", "zh": "分语言"},
    "data": {"en": "Data", "zh": "数据"},
    "made": {"en": "How it was made", "zh": "运行环境"},
    "recipe": {"en": "Recipe", "zh": "配方"},
    # one sentence a group
    "answers_lead": {
        "en": "{changed} of the answers that changed most and {random} drawn at random; all {all} are in samples.jsonl "
        "beside this page.",
        "zh": "变化最大的 {changed} 个回答和随机抽取的 {random} 个；全部 {all} 个见本页旁的 samples.jsonl。",
    },
    "pairs_lead": {
        "en": "{accuracy} of {n} held-out prompts moved towards the chosen answer; before training it is 50%.",
        "zh": "在 {n} 个留出的提示中，{accuracy} 向偏好的回答移动；训练前为 50%。",
    },
    "sets_lead": {
        "en": "Pairs of {n} other sources, scored whole and alike in every run, whatever it was trained on.",
        "zh": "来自其他来源的偏好对（共 {n} 个测试集），不经数据过滤，在每次运行中以同样方式打分，与训练数据无关。",
    },
    "samples_lead": {
        "en": "The tuned model's answers are {ratio} as long as the base's; {repetitive} of them repeat themselves.",
        "zh": "微调后回答的长度是基座模型的 {ratio}；其中 {repetitive} 有重复。",
    },
    "judge_lead": {
        "en": "The judge prefers the tuned model's answer to {rate} of the prompts; with length taken out {adjusted}.",
        "zh": "评审在 {rate} 的提示上偏好微调后的回答；去除长度影响后为 {adjusted}。",
    },
    "accuracy_lead": {
        "en": "The length of the answers alone is right in {length} of the pairs: what the model has to beat.",
        "zh": "仅凭回答长度就有 {length} 判断正确：模型必须超过它。",
    },
    "learned_lead": {
        "en": "The loss on held-out answers went from {base} to {tuned} nats a token.",
        "zh": "留出回答上的损失从每词元 {base} 纳特变为 {tuned} 纳特。",
    },
    "training_lead": {
        "en": "The loss went from {first} to {last} over {steps} steps.",
        "zh": "{steps} 步训练中损失从 {first} 变为 {last}。",
    },
    "margins_lead": {
        "en": "{right} of {n} margins are above 0, where the chosen answer gained more; the loss went from {first} to "
        "{last} over {steps} steps.",
        "zh": "{n} 个奖励间隔中有 {right} 个大于 0，即偏好的回答提升更多；{steps} 步训练中损失从 {first} 变为 {last}。",
    },
    "languages_lead": {"en": "The same figures for each of {n} languages.", "zh": "{n} 种语言各自的同样指标。"},
    "data_lead": {
        "en": "{kept} of {came} prompts that were read passed the filters.",
        "zh": "读取的 {came} 个提示中有 {kept} 个通过了过滤。",
    },
    # in the groups
    "changed": {"en": "changed most", "zh": "变化最大"},
    "random": {"en": "at random", "zh": "随机"},
    "scores": {
        "en": "Scores: 1 where the judge prefers the tuned model's answer, 0 where the base's.",
        "zh": "分数：评审偏好微调后的回答为 1，偏好基座的回答为 0。",
    },
    "base": {"en": "base", "zh": "基座"},
    "tuned": {"en": "tuned", "zh": "微调后"},
    "tokens": {"en": "tokens", "zh": "个词元"},
    "cut_off": {"en": ", cut off", "zh": "，被截断"},
    "empty": {"en": "an empty answer", "zh": "空回答"},
    "in_full": {"en": "In full", "zh": "展开"},
    "legend_dot": {"en": "reward accuracy with its 95% interval", "zh": "奖励准确率及其 95% 区间"},
    "legend_rival": {
        "en": "always taking the longer answer. The dashed line is 50%: no preference.",
        "zh": "总是选较长的回答。虚线为 50%：没有偏好。",
    },
    "legend_training": {"en": "training", "zh": "训练"},
    "legend_held_out": {"en": "held out", "zh": "留出"},
    "footer": {
        "en": "Base and tuned model are the same weights, with the adapter off and on. Intervals are 95%: Wilson for "
        "shares, Bonett and Price for their changes, a bootstrap over pairs or prompts for the rest.",
        "zh": "基座与微调后的模型是同一份权重，分别关闭和启用适配器。区间均为 95%：比例用 Wilson 区间，比例的变化用 "
        "Bonett–Price 区间，其余对偏好对或提示做自助法。",
    },
}


def say(key: str, language: str, **values: Any) -> str:
    """The words under `key`, with their placeholders filled in."""
    return WORDS[key][language].format(**values)


def language(settings: Eval, spoken: Sequence[str]) -> str:
    """What the page is written in: as set, else Chinese where most of the held-out prompts are.

    Args:
        spoken: the languages of the held-out prompts.
    """
    return settings.report_language or ("zh" if 2 * spoken.count("zh") > len(spoken) else "en")
