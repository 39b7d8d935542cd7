"""Fine-tune all parameters of a causal language model with SGC, in one file to copy and change.

    python recipes/minimal.py MODEL TEXT [OUTPUT]     # MODEL: a name on the hub or a folder; TEXT: .txt or .jsonl

    python recipes/minimal.py HuggingFaceTB/SmolLM2-135M notes.txt out
    python recipes/minimal.py recipes/assets/tiny-llama README.md out      # without a network, 20 s on a CPU

The second prints a loss that falls from 5.6 to 3.2 (means of ten steps), and what the optimizer holds, 0.8 % of AdamW's
state; it writes `out/`, which `from_pretrained` opens. Lines of a .jsonl file need a "text". `recipes/finetune.py` does
all that is left out here: other tasks, evaluation, resuming, several GPUs.
"""

import sys

from datasets import load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from sgc.hf import SGCCallback, SGCFactory

LENGTH = 128  # tokens of a row


def main(model_name: str, data: str, output: str = "out") -> None:
    """Fine-tune a model on a file, and save it."""
    tokenizer = AutoTokenizer.from_pretrained(model_name, trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(model_name, trust_remote_code=False)

    rows = load_dataset("json" if data.endswith("l") else "text", data_files=data, split="train")
    rows = rows.filter(lambda row: row["text"].strip())
    rows = rows.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=LENGTH),
        batched=True,
        remove_columns=rows.column_names,
    )

    trainer = Trainer(
        model,
        TrainingArguments(output, num_train_epochs=3, learning_rate=1e-3, logging_steps=10, report_to="none"),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[SGCCallback()],  # logs what the optimizer holds; its learning rate is the Trainer's
        optimizer_cls_and_kwargs=(SGCFactory, {}),  # what is given here goes to SGC, as {"sketch_size": 32}
    )
    trainer.train()
    trainer.save_model(output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
