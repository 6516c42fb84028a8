"""Summaries and translations with an encoder-decoder such as T5 or BART; ROUGE, or the loss."""

import torch
from data import head, load_texts, text_column
from tqdm.auto import tqdm
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq

from hf_lpdecay import LpDecaySeq2SeqTrainer
from tasks.base import Task, check_columns, forward_batches, load_metric


class Seq2Seq(Task):
    """Summarization: texts in `text_column`, summaries in `target_column`. Translation: a column `translation` with a
    text by language. Sources have up to `block_size` tokens, targets up to `max_target_length`."""

    auto_class = AutoModelForSeq2SeqLM
    trainer_class = LpDecaySeq2SeqTrainer

    def load(self) -> None:
        script = self.script
        datasets = load_texts(script)
        if script.task == "translation":
            check_columns(datasets, {"The field translation": "translation"})
            languages = (script.source_lang, script.target_lang)
            known = list(datasets[0][0]["translation"])
            for option, language in zip(("source_lang", "target_lang"), languages):
                if language not in known:
                    raise ValueError(f"{option}={language!r} is not one of the languages {known}.")
            self.pair = lambda rows: [[row[language] for row in rows["translation"]] for language in languages]
        else:
            check_columns(datasets, {"target_column": script.target_column})
            column = text_column(datasets[0].remove_columns(script.target_column), script.text_column)
            self.pair = lambda rows: [rows[column], rows[script.target_column]]
        self.train, self.validation = (
            rows.map(self.tokenize, batched=True, remove_columns=rows.column_names, desc="Tokenizing")
            for rows in (head(datasets[0], script.max_train_samples), head(datasets[1], script.max_eval_samples))
        )
        try:
            self.metric = load_metric("rouge")
        except ImportError as error:
            self.metric = None
            print(f"The loss is reported, without ROUGE: {error}")

    def tokenize(self, rows):
        script = self.script
        sources, targets = self.pair(rows)
        sources = [script.source_prefix + source for source in sources]
        tokens = self.tokenizer(sources, truncation=True, max_length=script.block_size)
        labels = self.tokenizer(text_target=targets, truncation=True, max_length=script.max_target_length)
        return {**tokens, "labels": labels["input_ids"]}

    def collator(self, model):
        return DataCollatorForSeq2Seq(self.tokenizer, model)

    def compute_metrics(self, args):
        if self.metric is None or not args.predict_with_generate:  # there are only logits
            return None
        return lambda prediction: self.rouge(prediction.predictions, prediction.label_ids)

    @torch.no_grad()
    def evaluate(self, model, batch_size, desc):
        collator, rows = self.collator(model), self.validation
        total = count = 0
        for batch, outputs in forward_batches(model, rows, collator, batch_size, desc):
            tokens = (batch["labels"] != -100).sum().item()
            total, count = total + outputs.loss.item() * tokens, count + tokens
        results = {"loss": total / count}
        if self.metric is None:
            return results
        predictions, references = [], []
        for start in tqdm(range(0, len(rows), batch_size), desc=f"{desc} (generating)"):
            batch = collator([rows[i] for i in range(start, min(start + batch_size, len(rows)))]).to(model.device)
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            predictions += model.generate(**given, max_length=self.script.max_target_length + 1).tolist()
            references += batch["labels"].tolist()
        return {**self.rouge(predictions, references), **results}

    def rouge(self, predictions, references) -> dict[str, float]:
        """ROUGE of generated tokens against labels."""
        texts = []
        for rows in (predictions, references):
            tokens = [[int(token) for token in row if token >= 0] for row in rows]  # -100 is padding
            texts.append(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return self.metric.compute(predictions=texts[0], references=texts[1])
