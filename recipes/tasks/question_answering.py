"""Extractive question answering: the answer is a span of a context, with SQuAD's fields; exact match and F1."""

import numpy as np
from data import head, load_texts
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from tasks.base import Task, check_columns, check_fast, forward_batches, load_metric


class QuestionAnswering(Task):
    """Rows have `question`, `context` and `answers` with lists `text` and `answer_start`, empty where a context has no
    answer (SQuAD 2).

    A context that is longer than `block_size` tokens is read in windows that overlap by `doc_stride` tokens.
    """

    auto_class = AutoModelForQuestionAnswering

    def __init__(self, script, path):
        super().__init__(script, path)
        self.examples = len(self.questions)

    def load(self) -> None:
        script = self.script
        check_fast(self.tokenizer, script.task)
        datasets = load_texts(script)
        check_columns(datasets, {f"The field {name}": name for name in ("question", "context", "answers")})
        train, questions = head(datasets[0], script.max_train_samples), head(datasets[1], script.max_eval_samples)
        self.has_unanswerable = any(not answers["text"] for answers in train["answers"])
        train, windows = (
            rows.map(
                self.tokenize, batched=True, with_indices=True, remove_columns=rows.column_names, desc="Tokenizing"
            )
            for rows in (train, questions)
        )
        extra = ["question_index", "spans"]
        self.questions = questions
        # Of each window: its question, and where its tokens are in the context, [-1, -1] for all others.
        self.question_index, self.spans = list(windows["question_index"]), list(windows["spans"])
        self.train, self.validation = train.remove_columns(extra), windows.remove_columns(extra)
        self.metric = load_metric("span_f1")

    def tokenize(self, rows, indices):
        script = self.script
        questions = [question.strip() for question in rows["question"]]
        longest = max(len(tokens) for tokens in self.tokenizer(questions, add_special_tokens=False)["input_ids"])
        room = script.block_size - longest - self.tokenizer.num_special_tokens_to_add(pair=True)
        if room <= script.doc_stride:
            raise ValueError(
                f"block_size={script.block_size} leaves {max(room, 0)} tokens for the context beside a question of"
                f" {longest}, and doc_stride={script.doc_stride} of them overlap: raise block_size or lower doc_stride."
            )
        windows = self.tokenizer(
            questions,
            rows["context"],
            truncation="only_second",
            max_length=script.block_size,
            stride=script.doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        row_of = windows.pop("overflow_to_sample_mapping")
        offsets = windows.pop("offset_mapping")
        starts, ends, spans = [], [], []
        for i, row in enumerate(row_of):
            in_context = [part == 1 for part in windows.sequence_ids(i)]
            spans.append([list(span) if inside else [-1, -1] for span, inside in zip(offsets[i], in_context)])
            start, end = _positions(spans[-1], rows["answers"][row])
            starts.append(start)
            ends.append(end)
        question_index = [indices[row] for row in row_of]
        return {
            **windows,
            "start_positions": starts,
            "end_positions": ends,
            "question_index": question_index,
            "spans": spans,
        }

    def collator(self, model):
        return DataCollatorWithPadding(self.tokenizer)

    def compute_metrics(self, args):
        return lambda prediction: self.score(*prediction.predictions[:2])

    def evaluate(self, model, batch_size, desc):
        starts, ends = [], []
        for _, outputs in forward_batches(model, self.validation, self.collator(model), batch_size, desc):
            starts.extend(outputs.start_logits.float().cpu().numpy())
            ends.extend(outputs.end_logits.float().cpu().numpy())
        return self.score(starts, ends)

    def score(self, starts, ends) -> dict[str, float]:
        """Metrics of the best spans by the logits of each window's tokens."""
        references = [answers["text"] or [""] for answers in self.questions["answers"]]
        return self.metric.compute(predictions=self.answers(starts, ends), references=references)

    def answers(self, starts, ends) -> list[str]:
        """For each question the span whose start and end have the largest sum of logits, over all its windows; "" where
        the training data have questions without an answer and the first token's logits are larger still."""
        best = [(-np.inf, "")] * len(self.questions)
        none = [np.inf] * len(self.questions)
        contexts = list(self.questions["context"])
        for index, spans, start, end in zip(self.question_index, self.spans, starts, ends):
            start, end = start[: len(spans)], end[: len(spans)]  # without the padding
            none[index] = min(none[index], start[0] + end[0])
            inside = np.array(spans)[:, 0] >= 0
            # An answer starts and ends in the context, in that order, and is not too long.
            allowed = np.tri(len(spans), k=0, dtype=bool).T & np.tri(
                len(spans), k=self.script.max_answer_length - 1, dtype=bool
            )
            sums = np.where(allowed & np.outer(inside, inside), start[:, None] + end[None, :], -np.inf)
            first, last = np.unravel_index(sums.argmax(), sums.shape)
            if sums[first, last] > best[index][0]:
                best[index] = (sums[first, last], contexts[index][spans[first][0] : spans[last][1]].strip())
        return ["" if self.has_unanswerable and null > score else text for (score, text), null in zip(best, none)]


def _positions(spans: list[list[int]], answers: dict[str, list]) -> tuple[int, int]:
    """First and last token of the answer; the window's first token where it does not lie in the window."""
    if not answers["text"]:
        return 0, 0
    begin = answers["answer_start"][0]
    end = begin + len(answers["text"][0])
    tokens = [i for i, (first, last) in enumerate(spans) if first < end and last > begin and first >= 0]
    inside = tokens and spans[tokens[0]][0] <= begin and spans[tokens[-1]][1] >= end
    return (tokens[0], tokens[-1]) if inside else (0, 0)
