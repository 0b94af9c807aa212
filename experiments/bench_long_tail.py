"""Times decoding of rows whose lengths have a long tail (W4 of ../shared/peers); useful tokens/s.

    python experiments/bench_long_tail.py --model-dir tiny --P 8 --G 8 --slots 16

Lengths are log-normal (--len-median, --len-sigma), given as budgets: to the sampler they come as
unexpectedly as end tokens. The last line of the output is one JSON object, as bench_decode.py's.
"""

import bench_decode

if __name__ == "__main__":
    bench_decode.main("W4", new_tokens=256)
