"""What figures are called in reports, in English and in Chinese, and what they say."""

from __future__ import annotations

# Of each figure its name and what it says, by its key in metrics.json: English, Chinese.
FIGURES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "reward_accuracy": (("Reward accuracy", "chosen gained more than rejected; 50% before training"),
        ("奖励准确率", "偏好的回答提升多于被拒的回答；训练前为 50%")),
    "reward_accuracy_per_token": (("… per token", "the same, gains divided by length"), ("… 每词元", "同上，除以长度")),
    "longer_wins": (("Longer answer wins", "what always taking the longer answer would get"),
        ("较长者胜", "总是选较长的回答所得的准确率")),
    "ranking_accuracy": (("Ranking", "chosen is likelier per token than rejected"),
        ("排序", "偏好的回答每词元概率高于被拒的回答")),
    "margin": (("Reward margin", "beta × (gain of chosen − gain of rejected), nats"),
        ("奖励间隔", "beta ×（偏好回答的提升 − 被拒回答的提升），纳特")),
    "margin_median": (("… median", "half of the pairs have more"), ("… 中位数", "一半的偏好对高于此值")),
    "margin_p10": (("… 10th percentile", "nine in ten pairs have more"), ("… 第 10 百分位", "九成的偏好对高于此值")),
    "margin_p90": (("… 90th percentile", "one in ten pairs has more"), ("… 第 90 百分位", "一成的偏好对高于此值")),
    "chosen_drift": (("Drift of chosen", "change of its log-probability, nats"),
        ("偏好回答的漂移", "其对数概率的变化，纳特")),
    "chosen_drift_per_token": (("… per token", "the same, divided by length"), ("… 每词元", "同上，除以长度")),
    "rejected_drift": (("Drift of rejected", "change of its log-probability, nats"),
        ("被拒回答的漂移", "其对数概率的变化，纳特")),
    "rejected_drift_per_token": (("… per token", "the same, divided by length"), ("… 每词元", "同上，除以长度")),
    "loss": (("Loss", "nats a token, of the answers to be learned"), ("损失", "每词元纳特，在要学习的回答上")),
    "perplexity": (("Perplexity", "exp of the loss"), ("困惑度", "损失的指数")),
    "auroc": (("AUROC", "a good answer gained more than a bad one to another prompt"),
        ("AUROC", "好的回答提升多于其他提示的坏回答")),
    "valid_rate": (("Valid", "ended, not empty, in the prompt's language, no repetition, no markers"),
        ("有效", "有结尾、非空、与提示语言一致、无重复、无标记")),
    "kl": (("KL to base", "nats a token, over the tuned model's answers"), ("对基座的 KL", "每词元纳特，微调后的回答")),
    "kl_total": (("… of an answer", "nats, summed over its tokens"), ("… 每个回答", "纳特，对其词元求和")),
    "length_ratio": (("Length ratio", "tuned to base, geometric mean"), ("长度比", "微调后比基座，几何平均")),
    "tokens": (("Tokens", "of an answer"), ("词元数", "每个回答")),
    "truncated": (("Cut off", "answers that hit eval.max_new_tokens"), ("被截断", "达到 eval.max_new_tokens 的回答")),
    "repetition": (("Repetition", "4-grams that stood there before, mean"), ("重复率", "此前出现过的四元组，平均")),
    "repetitive": (("Repetitive", "answers with more than half such 4-grams"), ("重复的回答", "四元组过半重复的回答")),
    "distinct_2": (("Distinct-2", "different pairs of tokens among all; 200 tokens an answer"),
        ("Distinct-2", "不同词元对的占比；每个回答取 200 个词元")),
    "compression": (("Compression", "zlib ratio, higher is duller; 200 tokens an answer"),
        ("压缩比", "zlib 压缩比，越高越单调；每个回答取 200 个词元")),
    "language_match": (("Language match", "answers in the prompt's language"), ("语言一致", "与提示语言一致的回答")),
    "refusal": (("Refusals", "by their first words, a heuristic"), ("拒答", "按开头的词语判断，仅供参考")),
    "win_rate": (("Win rate", "of the tuned model over the base, a tie counts half"),
        ("胜率", "微调后对基座，平局计一半")),
    "length_adjusted_win_rate": (("… length-adjusted", "as it would be at equal lengths"),
        ("… 去除长度影响", "假设两者长度相同")),
    "wins": (("Won", "share of the prompts"), ("胜", "占提示的比例")),
    "ties": (("Tied", "share of the prompts"), ("平", "占提示的比例")),
    "losses": (("Lost", "share of the prompts"), ("负", "占提示的比例")),
    "position_consistency": (("Consistent", "the same verdict when the two answers swap places"),
        ("一致性", "交换两个回答的位置后判断不变")),
    "score_difference": (("Score difference", "tuned − base, in the reward model's own unit"),
        ("分数差", "微调后 − 基座，以奖励模型自己的单位计")),
    "calibration": (("Agrees with the data", "prefers the chosen answer of held-out pairs"),
        ("与数据一致", "在留出的偏好对上偏好数据所选的回答")),
}  # fmt: skip


def figure_name(key: str, language: str = "en") -> tuple[str, str]:
    """A figure's name and what it says."""
    return FIGURES[key][language == "zh"]
