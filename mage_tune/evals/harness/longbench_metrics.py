"""LongBench v1's scores (arXiv 2308.14508, table 1), each in [0, 1], equal to its published evaluation scripts.

Libraries are the ones those scripts score with where they are alive: `rouge` (its summary-level ROUGE-L is not that of
rouge-score) and `jieba`. Edit similarity is fuzzywuzzy's ratio, which without a C extension is difflib's: from the
standard library here. Where a published score has a quirk, it is kept and pointed out, as numbers are only worth
something next to other people's.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import cache
from typing import Any

Metric = Callable[[str, str, Sequence[str]], float]
"""(prediction, one accepted answer, all classes) -> score."""

FIRST_LINE = ("trec", "triviaqa", "samsum", "lsht")
"""Few-shot tasks, of whose answers only the first line counts: models go on with another example."""
CHINESE_MARKS = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃"
    "》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
SPLITS_CHINESE = ("multifieldqa_zh", "dureader", "vcsum")
"""Tasks whose scores need jieba's words."""


def score(task: str, prediction: str, answers: Sequence[str], classes: Sequence[str] | None = None) -> float:
    """The best score of a prediction against the accepted answers.

    Args:
        task: one of LongBench's names.
        prediction: as decoded.
        answers: at least one.
        classes: every class, for classification.
    """
    if task in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = METRICS[task][1]
    return max(0.0, *(metric(prediction, answer, classes or ()) for answer in answers))


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the tokens, with their counts."""
    common = sum((Counter(prediction) & Counter(answer)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(prediction), common / len(answer)
    return 2 * precision * recall / (precision + recall)


def qa_f1(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """F1 of SQuAD-normalised words: lower case, without punctuation and articles."""
    return token_f1(english_words(prediction), english_words(answer))


def english_words(text: str) -> list[str]:
    """Words as SQuAD's evaluation normalises them."""
    text = "".join(ch for ch in text.lower() if ch not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def qa_f1_zh(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """F1 of jieba's words, without punctuation and space."""
    return token_f1(chinese_words(prediction), chinese_words(answer))


def chinese_words(text: str) -> list[str]:
    """jieba's words, normalised one by one; those that were punctuation alone are gone."""
    words = ("".join(ch for ch in word.lower() if ch not in string.punctuation + CHINESE_MARKS) for word in cut(text))
    return [kept for kept in ("".join(word.split()) for word in words) if kept]


def cut(text: str) -> list[str]:
    """jieba's words.

    Raises:
        ImportError: jieba is not installed.
    """
    import jieba

    jieba.setLogLevel("ERROR")  # it reports loading its dictionary
    return list(jieba.cut(text, cut_all=False))


def rouge_l(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Summary-level ROUGE-L, F-measure, of the `rouge` package; 0 where it has no words to compare."""
    try:
        return float(_rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"])
    except (ValueError, RecursionError):  # nothing but full stops, or a "sentence" of a thousand words
        return 0.0


def rouge_l_zh(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """The same of jieba's words."""
    return rouge_l(" ".join(cut(prediction)), " ".join(cut(answer)), classes)


@cache
def _rouge() -> Any:
    from rouge import Rouge

    return Rouge()


def edit_similarity(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """difflib's ratio, in whole per cent, of the first line that is neither fence nor comment."""
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(100 * SequenceMatcher(None, line, answer).ratio()) / 100


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 / (classes named) if the right one is among them, where a class named within the right one does not count."""
    named = [name for name in classes if name in prediction]
    for name in named:  # the published loop: removing while iterating skips the entry after a removed one
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Share of the numbers in the prediction that are the answer."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """The same, with the answer's number."""
    return _retrieval(r"Paragraph (\d+)", prediction, answer)


def retrieval_zh(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """The same in Chinese."""
    return _retrieval(r"段落(\d+)", prediction, answer)


def _retrieval(pattern: str, prediction: str, answer: str) -> float:
    found = re.search(pattern, answer)
    if found is None:
        raise ValueError(f"answer {answer!r:.60} names no paragraph")
    return count(prediction, found[1], ())


METRICS: dict[str, tuple[str, Metric]] = {
    "narrativeqa": ("f1", qa_f1),
    "qasper": ("f1", qa_f1),
    "multifieldqa_en": ("f1", qa_f1),
    "multifieldqa_zh": ("f1", qa_f1_zh),
    "hotpotqa": ("f1", qa_f1),
    "2wikimqa": ("f1", qa_f1),
    "musique": ("f1", qa_f1),
    "dureader": ("rouge_l", rouge_l_zh),
    "gov_report": ("rouge_l", rouge_l),
    "qmsum": ("rouge_l", rouge_l),
    "multi_news": ("rouge_l", rouge_l),
    "vcsum": ("rouge_l", rouge_l_zh),
    "trec": ("accuracy", classification),
    "triviaqa": ("f1", qa_f1),
    "samsum": ("rouge_l", rouge_l),
    "lsht": ("accuracy", classification),
    "passage_count": ("accuracy", count),
    "passage_retrieval_en": ("accuracy", retrieval),
    "passage_retrieval_zh": ("accuracy", retrieval_zh),
    "lcc": ("edit_similarity", edit_similarity),
    "repobench-p": ("edit_similarity", edit_similarity),
}
"""Task -> name of its score and the score."""
