"""Causal language models: the next token in windows of text; perplexity."""

from data import blocks_of_tokens, head, load_texts, text_column
from transformers import AutoModelForCausalLM

from hf_lpdecay.evaluation import perplexity
from tasks.base import Task


PROMPT = "The function returns a list of"


class CausalLM(Task):
    """Texts are joined and cut into windows of `block_size` tokens."""

    auto_class = AutoModelForCausalLM

    def load(self) -> None:
        script = self.script
        texts = load_texts(script)
        column = text_column(texts[0], script.text_column)
        train, validation = (blocks_of_tokens(text, column, self.tokenizer, script.block_size) for text in texts)
        self.train, self.validation = head(train, script.max_train_samples), head(validation, script.max_eval_samples)

    def sample(self, model):
        model.eval()
        prompt = self.tokenizer(PROMPT, return_tensors="pt").to(model.device)
        tokens = model.generate(**prompt, max_new_tokens=20, do_sample=False, pad_token_id=self.tokenizer.eos_token_id)
        return PROMPT, self.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)

    def evaluate(self, model, batch_size, desc):
        return {"perplexity": perplexity(model, self.validation["input_ids"], batch_size, desc)}
