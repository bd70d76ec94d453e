"""The memory that training is predicted to take, by model, rank and length, for docs/training.md.

PYTHONPATH=. python bench/training_plan.py

No weights and no card: qlorachat's own plan for one row in a pass, all linear layers, paged 8-bit
AdamW, NF4 with double quantization.
"""

from qlorachat.training.config import TrainConfig
from qlorachat.training.memory.plan import predict
from tests.training.memory.shapes import LLAMA_7B, LLAMA_13B

GIB = 2**30
LENGTHS = (512, 1024, 2048)


def main() -> None:
    print(f"| GiB, rank 64 (rank 16) | {' | '.join(f'{n:,} tokens' for n in LENGTHS)} |")
    print("|---" * (len(LENGTHS) + 1) + "|")
    for name, shape in (("7B", LLAMA_7B.in_nf4()), ("13B", LLAMA_13B.in_nf4())):
        cells = []
        for length in LENGTHS:
            sizes = [
                predict(
                    shape,
                    TrainConfig(rank=rank, micro_batch=1, max_length=length),
                    longest=length,
                    device_type="cuda",
                    limit=None,
                ).predicted
                for rank in (64, 16)
            ]
            cells.append(f"{sizes[0] / GIB:.1f} ({sizes[1] / GIB:.1f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
