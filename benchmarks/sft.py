"""Full fine-tuning speed and memory, the peer run beside it in the same quiet session.

    python benchmarks/sft.py --model MODEL --data chat.jsonl [--steps 8] [--dtype bfloat16] [--peer 'COMMAND']

Runs the very train step on packed rows of 1024 tokens, one row a step, one device, computing in float32 unless told
otherwise; counts real tokens only. `--peer` is a command that prints `RESULT {json}` with the same keys (for example a
TRL script in an environment of its own); the two run in turn, `--rounds` times, and the medians' ratio is printed.
"""

import measuring

if __name__ == "__main__":
    measuring.main(__file__, measuring.parser(__doc__, steps=8, row_length=1024).parse_args(), measuring.config)
