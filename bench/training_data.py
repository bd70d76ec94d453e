"""How fast rows become token ids and packed micro-batches, on this CPU.

python bench/training_data.py ROWS.jsonl.gz MODEL [--template llama2]    (only MODEL's tokenizer)
"""

import argparse
from pathlib import Path
from time import perf_counter

from qlorachat.checkpoints import read_tokenizer
from qlorachat.templates import BUILTIN_TEMPLATES
from qlorachat.training.config import TrainConfig
from qlorachat.training.data.batches import plan_schedule
from qlorachat.training.data.rows import read_rows
from qlorachat.training.data.samples import build_samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows")
    parser.add_argument("model", type=Path)
    parser.add_argument("--template", default="llama2")
    options = parser.parse_args()
    template = next(each for each in BUILTIN_TEMPLATES if each.name == options.template)
    config = TrainConfig(packing=True, epochs=1, micro_batch=1, accumulation=1)
    tokenizer = read_tokenizer(options.model)
    began = perf_counter()
    rows = read_rows(options.rows)
    samples = build_samples(rows.rows, template, tokenizer, max_length=config.max_length)
    schedule = plan_schedule([len(each.ids) for each in samples.samples], config)
    seconds = perf_counter() - began
    count = len(rows.rows) + len(rows.bad)
    fill = sum(schedule.tokens) / (len(schedule.steps) * config.max_length)
    print(
        f"{count:,} rows, {samples.tokens:,} tokens: {seconds:.1f} s, {count / seconds:,.0f} rows/s"
    )
    print(f"{len(schedule.steps):,} packs of {config.max_length} tokens, {fill:.1%} full")


if __name__ == "__main__":
    main()
