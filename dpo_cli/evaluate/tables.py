"""The tables of figures that reports and the terminal show, in Markdown, and which figures they are, in both languages.

Nothing is computed here: a figure is looked up, rounded and put in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpo_cli.evaluate import words
from dpo_cli.evaluate.charts import Dot
from dpo_cli.show import LOSS, NATS, RATIO, SHARE, Unit, escaped, shorten, show_figure, table

BESIDE = 2  # languages that have room beside the whole on 80 columns


class Row(NamedTuple):
    """A line of a table.

    Attributes:
        key: the figure's in metrics.json.
        en, zh: its name and what it says, in English and in Chinese.
        compared: three figures, `<key>_base`, `<key>_tuned` and `<key>_change`.
    """

    key: str
    en: tuple[str, str]
    zh: tuple[str, str]
    unit: Unit = SHARE
    compared: bool = False

    def said(self, language: str) -> tuple[str, str]:
        """Its name and what it says."""
        return self.zh if language == "zh" else self.en

    def sides(self, figures: Mapping[str, Any]) -> str:
        """Both models' figures, `55% → 63%`."""
        return " → ".join(show_figure(figures[f"{self.key}_{one}"], self.unit, False) for one in ("base", "tuned"))


PER_TOKEN = Unit(3, signed=True)
# The tables, by their part of metrics.json.
ROWS: dict[str, tuple[Row, ...]] = {
    "pairs": (
        Row("reward_accuracy", ("Reward accuracy", "chosen gained more than rejected; 50% before training"),
            ("奖励准确率", "偏好的回答提升多于被拒的回答；训练前为 50%")),
        Row("reward_accuracy_per_token", ("… per token", "the same, gains divided by length"),
            ("… 每词元", "同上，除以长度")),
        Row("longer_wins", ("Longer answer wins", "what always taking the longer answer would get"),
            ("较长者胜", "总是选较长的回答所得的准确率")),
        Row("ranking_accuracy", ("Ranking", "chosen is likelier per token than rejected"),
            ("排序", "偏好的回答每词元概率高于被拒的回答"), compared=True),
        Row("margin", ("Reward margin", "beta × (gain of chosen − gain of rejected), nats"),
            ("奖励间隔", "beta ×（偏好回答的提升 − 被拒回答的提升），纳特"), NATS),
        Row("chosen_drift", ("Drift of chosen", "change of its log-probability, nats"),
            ("偏好回答的漂移", "其对数概率的变化，纳特"), NATS),
        Row("chosen_drift_per_token", ("… per token", "the same, divided by length"),
            ("… 每词元", "同上，除以长度"), PER_TOKEN),
        Row("rejected_drift", ("Drift of rejected", "change of its log-probability, nats"),
            ("被拒回答的漂移", "其对数概率的变化，纳特"), NATS),
        Row("rejected_drift_per_token", ("… per token", "the same, divided by length"),
            ("… 每词元", "同上，除以长度"), PER_TOKEN),
    ),
    "answers": (
        Row("loss", ("Loss", "nats a token, of the answers to be learned"),
            ("损失", "每词元纳特，在要学习的回答上"), LOSS, True),
        Row("perplexity", ("Perplexity", "exp of the loss"), ("困惑度", "损失的指数"), Unit(2), True),
        Row("auroc", ("AUROC", "a good answer gained more than a bad one to another prompt"),
            ("AUROC", "好的回答提升多于其他提示的坏回答")),
    ),
    "samples": (
        Row("valid_rate", ("Valid", "ended, not empty, in the prompt's language, no repetition, no markers"),
            ("有效", "有结尾、非空、与提示语言一致、无重复、无标记"), compared=True),
        Row("kl", ("KL to base", "nats a token, over the tuned model's answers"),
            ("对基座的 KL", "每词元纳特，微调后的回答"), Unit(4)),
        Row("kl_total", ("… of an answer", "nats, summed over its tokens"),
            ("… 每个回答", "纳特，对其词元求和"), Unit(2)),
        Row("length_ratio", ("Length ratio", "tuned to base, geometric mean"),
            ("长度比", "微调后比基座，几何平均"), RATIO),
        Row("tokens", ("Tokens", "of an answer"), ("词元数", "每个回答"), Unit(1), True),
        Row("truncated", ("Cut off", "answers that hit eval.max_new_tokens"),
            ("被截断", "达到 eval.max_new_tokens 的回答"), compared=True),
        Row("repetitive", ("Repetitive", "answers that repeat more than half of their 4-grams"),
            ("重复的回答", "过半四元组重复的回答"), compared=True),
        Row("distinct_2", ("Distinct-2", "different pairs of tokens among all; 200 tokens an answer"),
            ("Distinct-2", "不同词元对的占比；每个回答取 200 个词元"), Unit(3), True),
        Row("language_match", ("Language match", "answers in the prompt's language"),
            ("语言一致", "与提示语言一致的回答"), compared=True),
        Row("refusal", ("Refusals", "by their first words, a heuristic"),
            ("拒答", "按开头的词语判断，仅供参考"), compared=True),
    ),
    "judge": (
        Row("win_rate", ("Win rate", "of the tuned model over the base, a tie counts half"),
            ("胜率", "微调后对基座，平局计一半")),
        Row("length_adjusted_win_rate", ("… length-adjusted", "as it would be at equal lengths"),
            ("… 去除长度影响", "假设两者长度相同")),
        Row("wins", ("Won", "share of the prompts"), ("胜", "占提示的比例")),
        Row("ties", ("Tied", "share of the prompts"), ("平", "占提示的比例")),
        Row("losses", ("Lost", "share of the prompts"), ("负", "占提示的比例")),
        Row("position_consistency", ("Consistent", "the same verdict when the two answers swap places"),
            ("一致性", "交换两个回答的位置后判断不变")),
        Row("score_difference", ("Score difference", "tuned − base, in the reward model's own unit"),
            ("分数差", "微调后 − 基座，以奖励模型自己的单位计"), NATS),
        Row("calibration", ("Agrees with the data", "prefers the chosen answer of held-out pairs"),
            ("与数据一致", "在留出的偏好对上偏好数据所选的回答")),
    ),
}  # fmt: skip
# The figure whose n stands over a table's columns.
COUNTED = {"pairs": "reward_accuracy", "answers": "loss_tuned", "samples": "tokens_tuned", "judge": "win_rate"}
BY_KEY = {row.key: row for rows in ROWS.values() for row in rows}


def figure_name(key: str, language: str = "en") -> str:
    return BY_KEY[key].said(language)[0]


class Tables:
    """Lay out `metrics.json` in Markdown tables.

    Args:
        language: what they are written in, en or zh.
        brief: for the terminal: no meanings, and few languages beside the whole.
    """

    def __init__(self, metrics: Mapping[str, Any], language: str = "en", brief: bool = False) -> None:
        self.metrics, self.language, self.brief, self.say = metrics, language, brief, words.speaker(language)

    def parts(self) -> dict[str, str]:
        """The tables of pairs, answers, samples, judge and test sets; without what was not asked for."""
        metrics, found = self.metrics, {}
        several = len(metrics["languages"]) > 1 and not (self.brief and len(metrics["languages"]) > BESIDE)
        for part in ROWS:
            if metrics[part]:
                languages = metrics["languages"].items() if several else ()
                groups = {name: one[part] for name, one in languages if one[part]}
                found[part] = self._figures(part, {self.say("all"): metrics[part], **groups})
        if metrics["sets"]:
            found["sets"] = self._sets(metrics["sets"])
        return found

    def accuracies(self) -> dict[str, list[Dot]]:
        """Reward accuracy beside what needs no model, and by language and source where there are several."""
        metrics, say = self.metrics, self.say
        if not metrics["pairs"]:
            return {}
        shortcut = metrics["baselines"]["shortcut"]
        rivals = {
            self._name("reward_accuracy"): metrics["pairs"]["reward_accuracy"],
            say("bet_longer"): metrics["pairs"]["longer_wins"],
            say("bet_trained"): metrics["baselines"]["majority"],
            say("bet_shortcut", name=shortcut["name"]) if shortcut else "": shortcut,
        }
        found = {say("to_beat"): [Dot(name, one) for name, one in rivals.items() if one]}
        for title, groups in (("languages", metrics["languages"]), ("by_source", metrics["sources"])):
            rows = [_dot(name, part["pairs"]) for name, part in groups.items() if part["pairs"]]
            if len(rows) > 1:
                found[say(title)] = rows
        return found

    def accuracy_tables(self) -> dict[str, str]:
        """The same as tables, by title."""
        found = {}
        for title, dots in self.accuracies().items():
            rivals = [show_figure(dot.rival, interval=False) if dot.rival else "–" for dot in dots]
            rows = [[dot.label, dot.text, rival] for dot, rival in zip(dots, rivals, strict=True)]
            found[title] = table([title, *map(self._name, ("reward_accuracy", "longer_wins"))], rows)
        return found

    def judged(self) -> str:
        """Who judged how many prompts."""
        judge, say = self.metrics["judge"], self.say
        if not judge:
            return ""
        note = say("judged", model=judge["model"], kind=judge["kind"], judged=judge["judged"], asked=judge["asked"])
        return note + (say("judged_template", digest=judge["template_sha256"][:12]) if judge["template_sha256"] else "")

    def _name(self, key: str) -> str:
        return figure_name(key, self.language)

    def _figures(self, part: str, groups: Mapping[str, Mapping[str, Any]]) -> str:
        """A column a group, with intervals; on the terminal only the first has them. Of two models a second line."""
        heads = [f"{shorten(name, 12)}, n = {one[COUNTED[part]]['n']:,}" for name, one in groups.items()]
        lines = []
        for row in ROWS[part]:
            title, meaning = row.said(self.language)
            key, unit = row.key, row.unit
            if row.compared:
                lines.append([title, *map(row.sides, groups.values()), meaning])
                key, title, meaning, unit = f"{row.key}_change", self.say("change"), "", row.unit.change
            found = [(figures.get(key), place == 0 or not self.brief) for place, figures in enumerate(groups.values())]
            cells = [show_figure(one, unit, interval, self.say("to")) if one else "" for one, interval in found]
            if cells[0]:
                lines.append([title, *cells, meaning])
        if self.brief:
            return table([self.say(f"{part}_head"), *heads], [line[:-1] for line in lines], left=(1,))
        return table([self.say(f"{part}_head"), *heads, self.say("says")], lines, left=range(len(heads) + 2))

    def _sets(self, sets: Mapping[str, Any]) -> str:
        """The figures of the test sets; below them each set's subsets and languages, and what was counted."""
        say = self.say
        heads = [say("test_set"), "n", *map(self._name, ("reward_accuracy", "longer_wins", "ranking_accuracy"))]
        found = [table(heads, [_set_line(shorten(name, 22), one["pairs"]) for name, one in sets.items()])]
        counts = []
        for name, one in sets.items():
            for part, title in (("subsets", "subsets"), ("languages", "set_languages")) if not self.brief else ():
                rows = [_set_line(shorten(group, 40), figures["pairs"]) for group, figures in one[part].items()]
                if rows:
                    found.append(table([say(title, name=shorten(name, 22)), *heads[1:]], rows))
            dropped = "".join(f", {count:,} {reason}" for reason, count in one["dropped"].items())
            numbers = {"kept": f"{one['kept']:,}", "came": f"{one['in']:,}", "overlap": f"{one['overlap']:,}"}
            counts.append(f"- {escaped(say('set_counts', name=name, dropped=dropped, **numbers))}")
        return "\n\n".join([*found, "\n".join(counts)])


def _set_line(name: str, pairs: Mapping[str, Any]) -> list[str]:
    accuracy, longer = pairs["reward_accuracy"], show_figure(pairs["longer_wins"], interval=False)
    return [name, f"{accuracy['n']:,}", show_figure(accuracy), longer, BY_KEY["ranking_accuracy"].sides(pairs)]


def _dot(name: str, pairs: Mapping[str, Any]) -> Dot:
    figure = pairs["reward_accuracy"]
    return Dot(f"{shorten(name, 22)}, n = {figure['n']:,}", figure, pairs["longer_wins"])
