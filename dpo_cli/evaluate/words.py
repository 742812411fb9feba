"""All that a report says, in English and in Chinese: `eval.report_language` chooses. English is everywhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from dpo_cli.recipe.sections import Eval

Say = Callable[..., str]

WORDS: dict[str, tuple[str, str]] = {
    # the verdict: its kinds, what each means, and the reasons it gives
    "better": ("Better", "变好了"),
    "better_means": ("The model learned the preference, and its text stayed intact.",
        "模型学到了偏好，文本质量没有受损。"),
    "learned_at_a_price": ("Learned, at a price", "学到了，但有代价"),
    "learned_at_a_price_means": ("The model learned the preference, but something else got worse.",
        "模型学到了偏好，但其他方面变差了。"),
    "worse": ("Worse", "变差了"),
    "worse_means": ("The tuned model is worse than the one it started from.", "微调后的模型不如微调前的模型。"),
    "not_learned": ("Not learned", "没有学到"),
    "not_learned_means": ("The model learned nothing that chance or the length of the answers would not explain.",
        "模型没有学到随机性或回答长度之外的偏好。"),
    "too_little_to_tell": ("Too little to tell", "证据不足"),
    "too_little_to_tell_means": ("What was measured is too little to say whether the model got better.",
        "现有的测量不足以判断模型是否变好。"),
    "sentence": ("{kind}: {reasons}.", "{kind}：{reasons}。"),
    "and": ("; ", "；"),
    "to": (" to ", " 至 "),
    "needed": (" About {n} held-out prompts would tell.", "大约需要 {n} 个留出的提示才能判断。"),
    "moved": ("{share} of {n} held-out prompts moved towards the chosen answer (95% interval {interval}; 50% before "
        "training, {length} by always taking {bet})",
        "{n} 个留出的提示中有 {share} 向偏好的回答移动（95% 区间 {interval}；训练前为 50%，{bet}时为 {length}）"),
    "auroc": ("{share} of good answers gained more than bad ones to other prompts (AUROC, 95% interval "
        "{interval}; 50% before training)",
        "好的回答提升多于其他提示的坏回答的比例为 {share}（AUROC，95% 区间 {interval}；训练前为 50%）"),
    "bet_longer": ("the longer answer", "较长的回答"),
    "bet_shorter": ("the shorter answer", "较短的回答"),
    "bet_trained": ("longer or shorter, as in training", "按训练数据选较长或较短的回答"),
    "bet_shortcut": ("in training: {name}", "训练数据：{name}"),
    "loss_went": ("the loss on {n} held-out answers went from {base} to {tuned} nats a token (95% interval of the "
        "change {interval})",
        "{n} 个留出的回答上的损失从每词元 {base} 变为 {tuned} 纳特（变化的 95% 区间 {interval}）"),
    "unseen": ("no answers were sampled", "没有采样回答"),
    "broken": ("the text fell apart ({sides} of the answers are valid)", "文本崩坏（有效回答的比例 {sides}）"),
    "intact": ("the text is intact", "文本完好"),
    "silent": ("the judge gave no verdict on any of {n} prompts", "评审对 {n} 个提示都没有给出判断"),
    "prefers_tuned": ("the judge prefers its answers", "评审偏好微调后的回答"),
    "prefers_base": ("the judge prefers the base's answers", "评审偏好基座的回答"),
    "prefers_unclear": ("to the judge its answers are not distinguishable from the base's",
        "评审无法区分微调后与基座的回答"),
    "prefers": ("{who} (win rate {rate}, {interval}, over {n} prompts; with length taken out {adjusted}, {without})",
        "{who}（胜率 {rate}，{interval}，共 {n} 个提示；去除长度影响后为 {adjusted}，{without}）"),
    "price_truncated": ("more answers do not end ({sides})", "没有结尾的回答增多（{sides}）"),
    "price_repetitive": ("more answers repeat themselves ({sides})", "重复的回答增多（{sides}）"),
    "price_refusal": ("more answers refuse ({sides})", "拒答增多（{sides}）"),
    "price_language_match": ("fewer answers are in the prompt's language ({sides})",
        "与提示语言一致的回答减少（{sides}）"),
    "price_length": ("answers are {times} as long", "回答的长度变为 {times}"),
    "price_by_length": ("its answers win by their length ({times})", "其回答靠长度取胜（{times}）"),
    "price_drift": ("the chosen answers' log-probability changed by {nats} nats a token",
        "偏好回答的对数概率每词元变化 {nats} 纳特"),
    "advice_truncated": ("{price}: it may have unlearned to stop", "{price}：模型可能忘记了如何结束"),
    "advice_repetitive": ("{price}: lower train.learning_rate or raise train.beta",
        "{price}：请降低 train.learning_rate 或提高 train.beta"),
    "advice_language_match": ("{price}: look at the languages of the training pairs",
        "{price}：请检查训练偏好对的语言"),
    "advice_refusal": ("{price}: look for refusals in the training pairs", "{price}：请检查训练偏好对中的拒答"),
    "advice_length": ("{price}: go by the length-adjusted win rate", "{price}：请以去除长度影响的胜率为准"),
    # warnings
    "changes_nothing": ("the adapter changes nothing: both models give every held-out answer the same probability",
        "适配器没有任何作用：两个模型给每个留出回答的概率都相同"),
    "chosen_fell": ("the chosen answers became less likely ({nats} nats on average): normal up to a point; where text "
        "gets worse lower train.learning_rate, or with dpo add an sft term to its loss_type",
        "偏好回答的概率下降（平均 {nats} 纳特）：一定程度内属正常；若文本变差，请降低 train.learning_rate，或在 dpo "
        "的 loss_type 中加入 sft 项"),
    "few_pairs": ("few held-out pairs in {name} ({n}): its interval is wide",
        "{name} 的留出偏好对很少（{n}）：其区间很宽"),
    "below_half": ("in {name} the accuracy is below 50%: there it learned the opposite",
        "{name} 的准确率低于 50%：学到的是相反的偏好"),
    "near_half": ("in {name} the accuracy is not distinguishable from 50%", "{name} 的准确率与 50% 无法区分"),
    "shortcut": ("betting on {name} alone is right in {share} of the training pairs, so this accuracy may be just that",
        "仅凭 {name} 就能判断对 {share} 的训练偏好对，因此这一准确率可能只是由此而来"),
    "no_verdict": ("{n} of {asked} prompts got no verdict from the judge and are left out",
        "评审对 {asked} 个提示中的 {n} 个没有给出判断，未计入"),
    "judge_cut": ("the judge saw an answer cut short in {n} of {asked} prompts: raise eval.judge.max_length",
        "评审在 {asked} 个提示中的 {n} 个上看到的回答被截断：请提高 eval.judge.max_length"),
    "inconsistent": ("the judge keeps to its verdict in only {share} of the prompts when the answers swap places",
        "交换回答的位置后，评审只在 {share} 的提示上保持原判"),
    "disagrees": ("the judge agrees with the data's own preference in {share} of {n} held-out pairs, not clearly "
        "better than chance: its win rate says little about these data",
        "评审在 {n} 个留出偏好对中的 {share} 上与数据一致，并不明显好于随机：其胜率对这份数据说明不了多少"),
    "overlap": ("{n} of {kept} prompts of {name} were trained on, or nearly: name its file in data.contamination, so "
        "that they are kept out, and train again",
        "{name} 的 {kept} 个提示中有 {n} 个（或近似的）在训练数据里：请把它的文件写入 data.contamination 以排除它们，"
        "再重新训练"),
    # the facts below the verdict
    "run": ("Run", "运行"),
    "model": ("Model", "模型"),
    "method": ("Method", "方法"),
    "rows_are": ("{train} trained on, {eval} held out", "训练 {train} 条，留出 {eval} 条"),
    "date": ("Date", "日期"),
    "device": ("Device", "设备"),
    "duration": ("Training took", "训练用时"),
    "warnings": ("Warnings", "警告"),
    "data_remark": ("data: ", "数据准备："),
    # headings
    "answers": ("Answers side by side", "回答对照"),
    "pairs": ("Held-out pairs", "留出的偏好对"),
    "sets": ("Other test sets", "其他测试集"),
    "samples": ("Sampled answers", "采样的回答"),
    "judge": ("Judge", "评审"),
    "accuracy": ("Reward accuracy", "奖励准确率"),
    "learned": ("Held-out answers", "留出的回答"),
    "margins": ("Margins and training", "奖励间隔与训练过程"),
    "training": ("Training", "训练过程"),
    "languages": ("By language", "分语言"),
    "data": ("Data", "数据"),
    "made": ("How it was made", "运行环境"),
    "recipe": ("Recipe", "配方"),
    # one sentence a group
    "answers_lead": ("{changed} of the answers that changed most and {random} drawn at random; all {all} are in "
        "samples.jsonl beside this page.",
        "变化最大的 {changed} 个回答和随机抽取的 {random} 个；全部 {all} 个见本页旁的 samples.jsonl。"),
    "sets_lead": ("Pairs of {n} other sources, scored whole and alike in every run, whatever it was trained on.",
        "{n} 个其他来源的偏好对，不经数据过滤，在每次运行中以同样方式打分，与训练数据无关。"),
    "accuracy_lead": ("The length of the answers alone is right in {length} of the pairs: what the model has to beat.",
        "仅凭回答长度就有 {length} 判断正确：模型必须超过它。"),
    "margins_lead": ("{right} of {n} margins are above 0, where the chosen answer gained more.",
        "{n} 个奖励间隔中有 {right} 个大于 0，即偏好的回答提升更多。"),
    "pairs_lead": ("{accuracy} of {n} held-out prompts moved towards the chosen answer; before training it is 50%.",
        "在 {n} 个留出的提示中，{accuracy} 向偏好的回答移动；训练前为 50%。"),
    "samples_lead": ("The tuned model's answers are {ratio} as long as the base's; {repetitive} of them repeat "
        "themselves.",
        "微调后回答的长度是基座模型的 {ratio}；其中 {repetitive} 有重复。"),
    "judge_lead": ("The judge prefers the tuned model's answer to {rate} of the prompts; with length taken out "
        "{adjusted}.",
        "评审在 {rate} 的提示上偏好微调后的回答；去除长度影响后为 {adjusted}。"),
    "learned_lead": ("The loss on the held-out answers to be learned went from {base} to {tuned} nats a token.",
        "要学习的留出回答上的损失从每词元 {base} 纳特变为 {tuned} 纳特。"),
    "training_lead": ("The loss went from {first} to {last} over {steps} steps.",
        "{steps} 步训练中损失从 {first} 变为 {last}。"),
    "data_lead": ("{kept} of {came} prompts that were read passed the filters.",
        "读取的 {came} 个提示中有 {kept} 个通过了过滤。"),
    # in the groups
    "changed": ("changed most", "变化最大"),
    "random": ("at random", "随机"),
    "scores": ("Scores: 1 where the judge prefers the tuned model's answer, 0 where the base's.",
        "分数：评审偏好微调后的回答为 1，偏好基座的回答为 0。"),
    "score": (", score {score}", "，分数 {score}"),
    "base": ("base", "基座"),
    "tuned": ("tuned", "微调后"),
    "count": ("{n:,} tokens", "{n:,} 个词元"),
    "cut_off": (", cut off", "，被截断"),
    "empty": ("an empty answer", "空回答"),
    "in_full": ("In full", "展开"),
    "sampled": ("{prompts} held-out prompts, at most {max_new_tokens} tokens an answer; temperature {temperature}, "
        "top_p {top_p}, top_k {top_k}, seed {seed}. Base → tuned, and the change from prompt to prompt.",
        "{prompts} 个留出的提示，每个回答至多 {max_new_tokens} 个词元；temperature {temperature}，top_p {top_p}，"
        "top_k {top_k}，seed {seed}。基座 → 微调后，以及逐个提示的变化。"),
    "judged": ("Judge: {model} ({kind}). {judged:,} of {asked:,} prompts judged.",
        "评审：{model}（{kind}）。{asked:,} 个提示中已评 {judged:,} 个。"),
    "judged_template": (" Template sha256 {digest}.", "提示模板 sha256 {digest}。"),
    # tables
    "pairs_head": ("held-out pairs", "留出的偏好对"),
    "answers_head": ("held-out answers", "留出的回答"),
    "judge_head": ("judge", "评审"),
    "samples_head": ("sampled answers", "采样的回答"),
    "all": ("all", "全部"),
    "says": ("what it says", "含义"),
    "change": ("… change", "… 变化"),
    "test_set": ("test set", "测试集"),
    "subsets": ("{name}, subsets", "{name}，子集"),
    "set_languages": ("{name}, languages", "{name}，语言"),
    "set_counts": ("{name}: {kept} of {came} prompts scored{dropped}; {overlap} of them in the training data",
        "{name}：{came} 个提示中有 {kept} 个已打分{dropped}；{overlap} 个在训练数据里"),
    "to_beat": ("What it has to beat", "必须超过的基线"),
    "by_source": ("By source", "分来源"),
    # charts
    "margins_drawn": ("reward margins of held-out pairs, nats", "留出偏好对的奖励间隔，纳特"),
    "curve_loss": ("loss", "损失"),
    "curve_rewards/accuracies": ("reward accuracy", "奖励准确率"),
    "curve_rewards/margins": ("reward margin", "奖励间隔"),
    "curve_rewards/chosen": ("reward of chosen", "偏好回答的奖励"),
    "curve_rewards/rejected": ("reward of rejected", "被拒回答的奖励"),
    "curve_logps/chosen": ("log-probability of chosen", "偏好回答的对数概率"),
    "step": ("step {n}", "第 {n} 步"),
    "curve": ("{title} over training steps: from {first} to {last}", "{title}随训练步数：从 {first} 到 {last}"),
    "curve_held_out": ("; held out from {first} to {last}", "；留出：从 {first} 到 {last}"),
    "histogram": ("reward margins of {n} held-out pairs, {right} of them above 0",
        "{n} 个留出偏好对的奖励间隔，其中 {right} 个大于 0"),
    # several runs side by side
    "compared": ("{n} runs side by side", "{n} 次运行并排比较"),
    "best": ("Best: {run}", "最佳：{run}"),
    "best_means": ("By {measure} {run} is ahead of every other run; of {other}, the nearest, by {change}, on {n} "
        "prompts.",
        "按{measure}，{run} 领先其他每次运行；领先最接近的 {other} {change}，共 {n} 个提示。"),
    "no_best": ("No difference can be told", "无法区分优劣"),
    "no_best_means": ("By {measure} {run} is ahead of {other} by {change}, on {n} prompts: chance may be all of it.",
        "按{measure}，{run} 领先 {other} {change}，共 {n} 个提示：可能只是随机。"),
    "nothing_shared": ("Nothing to compare by", "没有可比之处"),
    "nothing_shared_means": ("The runs were measured on no pairs in common; eval.sets gives them some.",
        "这些运行没有在相同的偏好对上测量；可用 eval.sets 提供相同的测试集。"),
    "left": ("Only {run} is left", "只剩下 {run}"),
    "left_means": ("The others are worse than what they started from.", "其余的都不如微调前的模型。"),
    "none_left": ("No run is left", "没有可选的运行"),
    "none_left_means": ("Each is worse than what it started from.", "每次运行都不如微调前的模型。"),
    "no_candidate": ("{run} is no candidate: by its own verdict it is worse than what it started from",
        "{run} 不参评：按其自身的结论，它不如微调前的模型"),
    "differences": ("Differences from {run}", "与 {run} 的差异"),
    "differences_lead": ("Prompt by prompt, on those that both runs were measured on; above 0 the run has more than "
        "{run}.",
        "逐个提示比较两次运行都测量过的部分；大于 0 表示高于 {run}。"),
    "compared_answers_lead": ("The same prompts in every run: {changed} where the answers differ most, {random} at "
        "random.",
        "每次运行回答同样的提示：差异最大的 {changed} 个，随机的 {random} 个。"),
    "figures": ("Figures", "指标"),
    "recipes": ("What the recipes differ in", "配方的不同"),
    "differs": ("{run} differs in {what}", "{run} 的不同：{what}"),
    "nothing": ("nothing", "无"),
    "figure_head": ("figure", "指标"),
    "difference_head": ("difference, 95% interval", "差异及 95% 区间"),
    "prompts_head": ("prompts", "提示数"),
    "elo_head": ("Elo over the base", "对基座的 Elo"),
    "train_head": ("train", "训练"),
    "memory_head": ("memory", "内存"),
    "legend_dot": ("reward accuracy with its 95% interval", "奖励准确率及其 95% 区间"),
    "legend_rival": ("always taking the longer answer. The dashed line is 50%: no preference.",
        "总是选较长的回答。虚线为 50%：没有偏好。"),
    "legend_training": ("training", "训练"),
    "legend_held_out": ("held out", "留出"),
    "footer": ("Base and tuned model are the same weights, with the adapter off and on. Intervals are 95%: Wilson for "
        "shares, Bonett and Price for their changes, a bootstrap over pairs or prompts for the rest.",
        "基座与微调后的模型是同一份权重，分别关闭和启用适配器。区间均为 95%：比例用 Wilson 区间，比例的变化用 Bonett–"
        "Price 区间，其余对偏好对或提示做自助法。"),
}  # fmt: skip


def speaker(language: str) -> Say:
    """`say` in one language."""
    return partial(say, language=language)


def say(key: str, language: str = "en", **values: Any) -> str:
    """The words under `key`, with their placeholders filled in."""
    return WORDS[key][language == "zh"].format(**values)


def language(settings: Eval, spoken: Sequence[str]) -> str:
    """What the page is written in: as set, else Chinese where most of the held-out prompts are.

    Args:
        spoken: the languages of the held-out prompts.
    """
    return settings.report_language or ("zh" if 2 * spoken.count("zh") > len(spoken) else "en")
